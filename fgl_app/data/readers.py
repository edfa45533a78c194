"""Open a part of a card's source: with scikit-learn, torchvision, Hugging Face's datasets, or as plain folders.

Every reader gives the same three things: the label of each image, its domain if there are several, and the image itself
on request, so that a client decodes only the images that it holds.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fgl_app.cards import Card
from fgl_app.data.decoding import UnreadableError, open_bytes, open_picture
from fgl_app.errors import DataError
from fgl_app.files import cache_folder, canonical_json, sha256, write_atomically
from fgl_app.image_folders import describe, find_images, loose_files, total


@dataclass(frozen=True, eq=False)  # opened once and known by identity
class Part:
    """N images of one part of a source, not yet decoded."""

    labels: tuple[int, ...]
    """Class of each image, 0 to K - 1, as the card counts; length N."""
    domains: tuple[int, ...] | None
    """Domain of each image, 0 to D - 1; None for a data set of one domain."""
    image: Callable[[int], Image.Image]
    """Decodes image number i; any error means that it cannot be read."""
    name: Callable[[int], str] = "row {}".format
    """Names image number i for people: its path, or its row in the source."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are no images, by reason; of folders only."""
    empty_classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Classes that have a folder, but no image in it: what is passed over in it, by reason."""
    root: Path | None = None
    """Folder below which its files lie; None for a source that is no folder of files."""

    def listing(self) -> str | None:
        """Return a hash of its files' names below ``root`` and of their labels; None for a source without such files.

        Another list of files is divided otherwise, by whatever divides it.
        """
        if self.root is None:
            return None
        start, listed = len(str(self.root)), hashlib.sha256()
        for row, label in enumerate(self.labels):
            listed.update(f"{label}\0{self.name(row)[start:]}\0".encode("utf-8", "surrogateescape"))
        return listed.hexdigest()[:16]


def open_part(card: Card, name: str, data_dir: str) -> Part:
    """Open ``train``, ``validation`` or ``test`` of a card's source.

    Args:
        card: The data set.
        name: A key of ``card.splits``.
        data_dir: Folder where the data lie; empty for the cache, into which the library downloads.

    Raises:
        DataError: If the data cannot be found, downloaded or understood.
    """
    reader: Callable[[Card, Any, Path | None], Part] = {
        "sklearn": _open_sklearn,
        "torchvision": _open_torchvision,
        "huggingface": _open_huggingface,
        "folder": _open_folder,
    }[card.kind]
    folder = Path(data_dir).expanduser() if data_dir else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"`data-dir` must be a folder, but {str(folder)!r} is none.")
    part = reader(card, card.splits[name], folder)
    if not part.labels:
        raise DataError(f"The {name} part of {card.name} must hold images of the card's classes, but holds none.")
    return part


def _open_sklearn(card: Card, split: Any, folder: Path | None) -> Part:
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, card.locator)()
    scale = 255.0 / float(bunch.images.max())
    pixels = np.rint(bunch.images * scale).astype(np.uint8)
    return Part(tuple(map(int, bunch.target)), None, lambda row: Image.fromarray(pixels[row]))


_PICKLED = ("CIFAR10", "CIFAR100")
"""Data sets of torchvision whose files are pickles, which execute what they hold."""


def _open_torchvision(card: Card, split: Any, folder: Path | None) -> Part:
    import torchvision

    made = getattr(torchvision.datasets, card.locator, None)
    if made is None:
        raise DataError(f"`source.name` of {card.name} must be a class of torchvision.datasets, not {card.locator!r}.")
    if card.locator in _PICKLED:
        raise DataError(
            f"`source.name` of {card.name} must not be {card.locator}, whose files torchvision unpickles. Use its "
            "copy on the Hugging Face hub, as the shipped cards do."
        )
    root = folder or cache_folder() / "data"
    if folder is not None and (folder / "train-images-idx3-ubyte.gz").is_file():
        root = _unpack_idx(card.locator, folder)
    arguments = {**card.source_options, **split, "root": str(root)}
    try:
        dataset = _first_that_works(lambda: made(**arguments, download=False), lambda: made(**arguments, download=True))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{card.title} must lie in {str(root)!r} or be downloaded by torchvision, but neither works "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Set `data-dir` to a folder that holds it."
        ) from None
    labels = _torchvision_labels(dataset)
    if getattr(dataset, "loader", None) is not None:  # of data sets that are folders of files
        dataset.loader = open_picture
    return _choose(card, labels, None, lambda row: dataset[row][0])


def _torchvision_labels(dataset: Any) -> list[int]:
    """List the labels of a data set; one that has no list of them is read through, if possible without decoding."""
    listed = getattr(dataset, "targets", None)
    if listed is not None:
        return [int(label) for label in listed]
    loader = getattr(dataset, "loader", None)  # e.g. Imagenette, whose images take a minute to decode
    if loader is None:
        return [int(dataset[row][1]) for row in range(len(dataset))]
    blank = Image.new("RGB", (1, 1))
    dataset.loader = lambda path: blank
    try:
        return [int(dataset[row][1]) for row in range(len(dataset))]
    finally:
        dataset.loader = loader


def _open_huggingface(card: Card, split: Any, folder: Path | None) -> Part:
    import datasets

    datasets.disable_progress_bars()
    try:
        # A card pins the version by `revision` among its options.
        name = str(folder) if folder else card.locator
        table = datasets.load_dataset(name, split=split, **card.source_options)  # nosec B615
    except Exception as error:  # its many errors have no base of their own
        raise DataError(
            f"{card.title} must be a data set that the hub, its local cache or `data-dir` has, but split {split!r} of "
            f"{str(folder) if folder else card.locator!r} cannot be loaded ({type(error).__name__})."
        ) from None
    columns = card.columns
    absent = [column for column in columns.values() if column not in table.column_names]
    if absent:
        raise DataError(
            f"{card.title} must have the column {absent[0]!r}, but has {', '.join(table.column_names)}. "
            "Correct `columns` in the card."
        )
    domains = None
    if "domain" in columns:
        numbers = {name: number for number, name in enumerate(card.domains)}
        names = _column(table, columns["domain"], named=True)
        domains = [numbers.get(str(name), -1) for name in names]
        if all(number < 0 for number in domains):
            raise DataError(
                f"{card.title} must have domains that the card names, but has "
                f"{', '.join(sorted(map(str, set(names))))}. Correct `domains` in the card."
            )
    labels = _column(table, columns["label"], named=isinstance(card.classes[0].source_id, str))
    image = columns["image"]
    if isinstance(table.features[image], datasets.Image):  # as stored: our decoder is that of folders, too
        table = table.cast_column(image, datasets.Image(decode=False))
    return _choose(card, labels, domains, lambda row: _stored(table[row][image], row))


def _stored(value: Any, row: int) -> Image.Image:
    """Decode an image as a table stores it: the bytes of its file, or its path."""
    if not isinstance(value, Mapping):
        raise UnreadableError(f"row {row}", "no image")
    content: bytes | None = value["bytes"]
    return open_picture(value["path"]) if content is None else open_bytes(content, f"row {row}")


def _column(table: Any, column: str, *, named: bool) -> list[int | str]:
    """Read a column; the numbers of a ClassLabel as its names if ``named``, with "" for -1, which means no label."""
    values: list[int | str] = table[column][:]
    names = getattr(table.features[column], "names", None)
    if not named or names is None:
        return values
    return [names[value] if isinstance(value, int) and value >= 0 else "" for value in values]


def _open_folder(card: Card, split: Any, folder: Path | None) -> Part:
    if folder is None and not card.locator:
        raise DataError(f"`data-dir` must be the folder of {card.title}, but is empty.")
    root = (folder or Path(card.locator)) / split
    rows: list[tuple[Path, int, int]] = []
    ignored: Mapping[str, int] = {}
    of_classes: dict[int, Mapping[str, int]] = {}
    for number, domain in enumerate(card.domains or ("",)):
        if (root / domain).is_dir():
            ignored = total(ignored, loose_files(root / domain))
        for label, item in enumerate(card.classes):
            below = root / domain / str(item.source_id)
            if below.is_dir():
                found = find_images(below)
                rows += [(path, label, number) for path in found.files]
                ignored = total(ignored, found.ignored)
                of_classes[label] = total(of_classes.get(label, {}), found.ignored)
    if not rows:
        layout = "DOMAIN/CLASS" if card.domains else "CLASS"
        seen = f"other files only: {describe(ignored)}" if ignored else "none"
        raise DataError(f"{str(root)!r} must hold images as {layout}/NAME.png of the card's classes, but holds {seen}.")
    return Part(
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows) if card.domains else None,
        lambda index: open_picture(rows[index][0]),
        lambda index: str(rows[index][0]),
        ignored,
        {card.classes[label].name: of_classes[label] for label in of_classes.keys() - {row[1] for row in rows}},
        root,
    )


def _choose(
    card: Card,
    source_ids: Sequence[int | str],
    domains: Sequence[int] | None,
    image: Callable[[int], Image.Image],
) -> Part:
    """Keep the images of the card's classes and domains, and count classes as the card does."""
    labels = {item.source_id: index for index, item in enumerate(card.classes)}
    kept = [row for row, value in enumerate(source_ids) if value in labels and (domains is None or domains[row] >= 0)]
    return Part(
        tuple(labels[source_ids[row]] for row in kept),
        None if domains is None else tuple(domains[row] for row in kept),
        lambda index: image(kept[index]),
        lambda index: f"row {kept[index]}",
    )


def _unpack_idx(name: str, folder: Path) -> Path:
    """Unpack a folder of ``*-ubyte.gz`` files, as Debian packages them, to where torchvision looks for them."""
    # A changed file is unpacked anew, and another folder elsewhere.
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*-ubyte.gz"))]
    root = cache_folder() / "data-unpacked" / sha256(canonical_json([str(folder.resolve()), *files]))[:16]
    raw = root / name / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for packed in sorted(folder.glob("*-ubyte.gz")):
        target = raw / packed.stem
        if not target.exists():
            with gzip.open(packed) as file:
                write_atomically(target, file.read())
    return root


def _first_that_works(first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    try:
        return first()
    except (OSError, RuntimeError):
        return second()
