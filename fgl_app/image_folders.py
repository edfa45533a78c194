"""Find the images in a folder: which sub-folders are classes, which files are images, and what is passed over.

One reader for all: simulation, sites, audit and ``fgl check-data`` see the same files.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import features

from fgl_app.errors import DataError

ENDINGS = frozenset({
    ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
})  # fmt: skip
"""Lower-case endings of the types that Pillow always reads."""
_HEIF_ENDINGS = frozenset({".heic", ".heif", ".hif"})
_EXTRA_ENDINGS = frozenset({".avif", ".dcm", ".dicom", *_HEIF_ENDINGS})
_EXTRA = "(to read them: pip install 'federated-generative-learning[pictures]')"
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_CLUTTER = frozenset({
    "#recycle", "#snapshot", "$recycle.bin", ".ds_store", ".git", ".ipynb_checkpoints", ".snapshot", ".zfs", "@eadir",
    "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "lost+found", "system volume information", "thumbs.db",
})  # fmt: skip
"""Lower-case names of what operating systems and NAS devices leave in folders: thumbnails, deleted files, settings."""


@dataclass(frozen=True)
class FoundImages:
    """The image files below one folder."""

    files: tuple[Path, ...]
    """In an order that the names alone decide: folder by folder, in each by name."""
    ignored: Mapping[str, int]
    """Number of files that are passed over, for each reason; a folder that is never data counts as one."""


def is_clutter(name: str) -> bool:
    """Return whether a file or folder is hidden, or left by an operating system or a NAS: it is never data."""
    return name.startswith(".") or name.lower() in _CLUTTER


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of a folder's sub-folders, which are its classes.

    Raises:
        DataError: If the folder cannot be read, is divided into train, test and so on, or holds two folders of one
            class.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not is_clutter(entry.name) and entry.is_dir())
    except OSError as error:
        raise DataError(
            f"Expected a folder with one sub-folder per class, but {str(folder)!r} cannot be opened ({error.strerror})."
        ) from None
    parts = [name for name in names if name.lower() in _PARTS and _holds_folders_only(folder / name)]
    if len(parts) > 1 or (parts and parts == names):
        raise DataError(
            f"{str(folder)!r} is divided into {', '.join(parts)}, which are no classes. Name one of them, e.g. "
            f"{str(folder / parts[0])!r}: this application holds images out for validation and test by itself. A "
            "simulation keeps a division that is there with a card, whose `splits` name its folders."
        )
    folder_of: dict[str, str] = {}
    for name in names:
        if (other := folder_of.setdefault(class_of(name), name)) != name:
            raise DataError(
                f"The class folders of {str(folder)!r} must have names that differ in Unicode's normal form NFKC, but "
                f"{other!r} and {name!r} are both {class_of(name)!r}. Rename one of them, or put them together."
            )
    return names


def class_of(name: str) -> str:
    """Return the class that a folder is named like: macOS writes accents as characters of their own, Linux does not."""
    return unicodedata.normalize("NFKC", name)


def find_images(folder: Path) -> FoundImages:
    """Find the images of one class, in its folder and at every depth below it.

    Links are followed. Hidden files and what systems leave behind are passed over, and so are files whose type is not
    known; a file without a known ending may still be DICOM. Which packages are installed changes nothing: server and
    sites must list the same files, and a picture that needs an absent package is one that cannot be decoded.
    """
    found: list[tuple[str, str, Path]] = []
    ignored: Counter[str] = Counter()
    for path, reason in _walk(folder, ()):
        if reason is None:
            found.append((str(path.parent), path.name, path))
        else:
            ignored[reason] += 1
    return FoundImages(tuple(path for *_, path in sorted(found)), dict(ignored))


def loose_files(folder: Path) -> dict[str, int]:
    """Count what lies beside the class folders, in no class, for each reason to pass it over."""
    ignored: Counter[str] = Counter()
    for entry in os.scandir(folder):
        if is_clutter(entry.name):
            ignored[_clutter_reason(entry)] += 1
        elif not entry.is_dir():
            ignored[_type_reason(Path(entry.path)) or "outside the class folders"] += 1
    return dict(ignored)


def total(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Add two counts by reason."""
    return dict(Counter(counts) + Counter(more))


def describe(counts: Mapping[str, int]) -> str:
    """Return counts by reason as a phrase, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda it: (-it[1], it[0])))


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM files do, whatever its name: few of them have an ending."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" and path.name.upper() != "DICOMDIR"
    except OSError:
        return False


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, str | None]]:
    """Yield each file below a folder, and why it is passed over, or None for an image."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError:
        yield folder, "folder that cannot be opened"
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        yield folder, "link to a folder above it"
        return
    for entry in entries:
        path = folder / entry.name
        if is_clutter(entry.name):
            yield path, _clutter_reason(entry)
        elif entry.is_dir():
            yield from _walk(path, (*above, identity))
        else:
            yield path, _type_reason(path)


def _type_reason(path: Path) -> str | None:
    """Return why a file is passed over, or None for an image."""
    ending = path.suffix.lower()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "that are no regular files"
    except OSError:  # link that leads nowhere is named with the unreadable images if it is called like one
        pass
    if ending in ENDINGS or ending in _EXTRA_ENDINGS or is_dicom(path):
        return None
    return f"of type {ending}" if ending.isprintable() and 1 < len(ending) <= 12 else "without a known type"


def missing_reader(path: Path) -> str | None:
    """Return what is absent here to read a file's type, as the reason why it cannot be read; None if nothing is."""
    ending = path.suffix.lower()
    if ending in _HEIF_ENDINGS:
        return None if _installed("pillow_heif") else f"of type {ending} {_EXTRA}"
    if ending == ".avif":
        return None if features.check("avif") else "of type .avif, which this Pillow cannot read"
    if ending in ENDINGS or _installed("pydicom") or not is_dicom(path):
        return None
    return f"of type DICOM {_EXTRA}"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _clutter_reason(entry: os.DirEntry[str]) -> str:
    """Say what is passed over; nothing looks into such a folder, which may hold a file server's copies of years."""
    is_known = entry.name.lower() in _CLUTTER
    if entry.is_dir(follow_symlinks=False):
        return f"folder {entry.name}" if is_known else "hidden folder"
    if entry.name.startswith("._"):
        return "._*"
    return entry.name if is_known else "hidden"


def _holds_folders_only(folder: Path) -> bool:
    """Return whether a folder holds sub-folders and no image of its own, as the parts of a divided data set do."""
    try:
        entries = [entry for entry in os.scandir(folder) if not is_clutter(entry.name)]
    except OSError:
        return False
    folders = [entry for entry in entries if entry.is_dir()]
    return bool(folders) and not any(
        _type_reason(Path(entry.path)) is None for entry in entries if entry not in folders
    )
