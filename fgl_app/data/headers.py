"""What picture files are, as their first bytes say, without decoding them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from fgl_app.data.decoding import has_deep_channels, is_inverted, open_file
from fgl_app.image_folders import ENDINGS, is_dicom


@dataclass(frozen=True)
class Header:
    """What is known of one picture file."""

    kind: str
    """Its format, e.g. PNG."""
    size: tuple[int, int]
    """Width and height, px, before it is turned upright."""
    changes: tuple[str, ...]
    """What the decoder does to it that its owner may want to know."""


def read_header(path: Path) -> Header | None:
    """Read what a picture file is; None if it cannot be said."""
    try:
        if path.suffix.lower() not in ENDINGS and is_dicom(path):
            return _of_dicom(path)
        with warnings.catch_warnings(action="ignore"), open_file(path) as picture:
            return Header(str(picture.format), picture.size, tuple(_changes(picture)))
    except Exception:  # decoders share no error; that it is unreadable is said elsewhere
        return None


def _of_dicom(path: Path) -> Header:
    from fgl_app.data.dicom import read_elements

    content = read_elements(path)
    window = content.get("WindowCenter") is not None or bool(content.get("VOILUTSequence"))
    shown = "shown through its window" if window else "stretched from the 0.5th to the 99.5th percentile"
    return Header("DICOM", (int(content.Columns), int(content.Rows)), (shown,))


def _changes(picture: Image.Image) -> list[str]:
    changes = []
    if picture.mode.startswith("I") or has_deep_channels(picture):
        changes.append("scaled from more than 8 bits")
    if picture.mode == "F":
        changes.append("stretched from the 0.5th to the 99.5th percentile")
    if is_inverted(picture):
        changes.append("inverted, because 0 is white in them")
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        changes.append("turned upright")
    if picture.has_transparency_data:
        changes.append("laid on white")
    if getattr(picture, "n_frames", 1) > 1:
        changes.append("reduced to the first of several frames")
    if max(picture.size) >= 2 * min(picture.size):
        changes.append("at least twice as long as wide or as wide as long")
    return changes
