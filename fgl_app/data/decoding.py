"""Decode a picture of any kind to 8-bit RGB: the one decoder of simulation, sites, captioners, audit and reports.

| a picture with | becomes |
|---|---|
| 8 bits per channel | what it is |
| whole numbers of more bits, grey or colour | scaled by the bits that it uses: by 255 / (2^b - 1), where b is the smallest number of bits from 8 on that holds its largest value. So 12 bits in a 16-bit file are neither white nor black, and 8 bits in one stay as they are. Each picture is scaled alone: one that is darker by half or more than others of its source is brightened |
| fractions (float TIFF), or whole numbers below 0 | the range from the 0.5th to the 99.5th percentile of its finite numbers, stretched from black to white; what is not finite is black |
| the tag MinIsWhite of TIFF | inverted, once its numbers are scaled |
| an EXIF orientation | upright |
| transparency, also of a palette or one colour | laid on white, as browsers show it |
| CMYK, YCbCr, LAB, HSV, palettes, 1 bit | converted by Pillow, without colour profiles |
| several frames or pages | its first one |
| DICOM | see :mod:`fgl_app.data.dicom` |

A picture of more than :data:`MAX_PIXELS` pixels is not decoded.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_png

from fgl_app.errors import DataError
from fgl_app.image_folders import ENDINGS, is_dicom, missing_reader

MAX_PIXELS = 89_478_485
"""Pillow's bound, 256 MiB of RGB: more is taken for an attack, or for a slide that must be cut into tiles first."""
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file's ending says: Pillow would start Ghostscript for PostScript called ``.png``."""
_PHOTOMETRIC = 262
"""TIFF's tag that says what its numbers mean; 0 is MinIsWhite."""
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out."""

    name: str
    """Its path, or its row in a source without files."""
    reason: str
    of_its_type: bool = False
    """Whether it shares the reason with all images of its type, which this installation cannot read."""

    def __str__(self) -> str:
        """Return one printable line."""
        return f"{self.name!r}: {self.reason}"


class UnreadableError(DataError):
    """An image cannot be decoded; it is left out, counted and listed, and ends no run."""

    def __init__(self, name: str, reason: str, *, of_its_type: bool = False) -> None:
        """Keep the image's name and the reason, for lists."""
        super().__init__(f"{name!r} cannot be decoded: {reason}.")
        self.image = Unreadable(name, reason, of_its_type)


class NotShownError(ValueError):
    """A picture is whole, but the rules do not say how it is to be shown; the message is the reason."""


def open_picture(path: str | Path) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    Raises:
        UnreadableError: If it is no readable image.
    """
    path = Path(path)
    with _explained(path):
        if path.stat().st_size == 0:
            raise UnreadableError(str(path), "empty file")
        if (reason := missing_reader(path)) is not None:
            raise UnreadableError(str(path), reason, of_its_type=True)
        if path.suffix.lower() not in ENDINGS and is_dicom(path):
            from fgl_app.data.dicom import read_dicom

            return read_dicom(path)
        with open_file(path) as file:
            return to_rgb(file)


def open_bytes(content: bytes, name: str) -> Image.Image:
    """Decode the content of an image file, which a table holds, as :func:`open_picture` decodes a file.

    Args:
        content: All bytes of the file.
        name: Of the image, for errors.

    Raises:
        UnreadableError: If it is no readable image.
    """
    with _explained(name):
        if not content:
            raise UnreadableError(name, "empty file")
        with open_file(io.BytesIO(content)) as file:
            return to_rgb(file, content)


@contextlib.contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    """Turn what a decoder raises into an UnreadableError, and keep its warnings of odd metadata to itself."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UnreadableError:
        raise
    # Pillow's decoders share no error: OSError, ValueError, SyntaxError, struct.error, RuntimeError (AVIF),
    # NotImplementedError, ... and one damaged file must not keep a site out of a federation.
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UnreadableError(str(source), reason_of(error, source if isinstance(source, Path) else None)) from None


def open_file(file: Path | io.BytesIO) -> Image.Image:
    """Open a file with Pillow, which reads its first bytes only; formats that are no pictures are not known."""
    _register_heif()
    Image.init()
    return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])


def out_of_memory(error: Exception) -> bool:
    """Return whether an error is the machine's and not the image's: the same image can be read with more memory."""
    # PyTorch has no class for what its allocator of the CPU's memory raises.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def reason_of(error: Exception, path: Path | None = None) -> str:
    """Say in a few words why an image could not be decoded."""
    match error:
        case UnreadableError():
            return error.image.reason
        case NotShownError():
            return str(error)
        case FileNotFoundError() if path is not None and path.is_symlink():
            return "link that leads nowhere"
        case FileNotFoundError():
            return "gone since it was listed"
        case PermissionError():
            return "unreadable without permission"
        case UnidentifiedImageError():
            return "not an image of a known format"
        case Image.DecompressionBombError():
            return _too_large()
        case OSError() if "truncated" in str(error) or "end of file" in str(error):
            return "truncated"
    return f"damaged ({type(error).__name__})"


def to_rgb(picture: Image.Image, content: bytes | None = None) -> Image.Image:
    """Return a picture of any mode as 8-bit RGB, upright; the rules are those of this module.

    Args:
        picture: As Pillow opened it.
        content: The file's bytes; None for a picture that has a file of its own.

    Raises:
        NotShownError: If it has no numbers that can be scaled.
        Image.DecompressionBombError: If it has more than :data:`MAX_PIXELS` pixels.
    """
    check_size(picture.width, picture.height)
    deep = has_deep_channels(picture)
    inverted = is_inverted(picture)
    picture.load()
    if deep:
        picture = _of_deep_colour(picture, content)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = to_grey(np.asarray(picture))
        return Image.fromarray(255 - grey if inverted else grey).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def check_size(width: int, height: int) -> None:
    """Refuse a picture that is too large to be decoded.

    Raises:
        Image.DecompressionBombError: If it has more than :data:`MAX_PIXELS` pixels.
    """
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(_too_large())


def to_grey(values: npt.NDArray[np.number]) -> npt.NDArray[np.uint8]:
    """Scale numbers of any range to 0 to 255, by the rules of this module.

    Args:
        values: Whole numbers or fractions, of any shape.

    Raises:
        NotShownError: If none of them is finite.
    """
    if np.issubdtype(values.dtype, np.integer) and values.min() >= 0:
        bits = max(8, int(values.max()).bit_length())
        return (
            np.rint(values * np.float32(255 / (2**bits - 1))).astype(np.uint8) if bits > 8 else values.astype(np.uint8)
        )
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise NotShownError("none of its numbers is finite")
    low, high = map(float, np.percentile(finite, _PERCENTILES))
    if low == high:  # nearly all of it is of one value
        low, high = float(finite.min()), float(finite.max())
    scaled = (np.where(np.isfinite(values), values, low) - low) * (255 / (high - low) if high > low else 0.0)
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def has_deep_channels(picture: Image.Image) -> bool:
    """Return whether a file has colour, or grey with transparency, of 16 bits, which Pillow cuts to the upper eight."""
    tiles = getattr(picture, "tile", None) or [(None,) * 4]
    return picture.mode not in ("I", "F") and not picture.mode.startswith("I;") and ";16" in str(tiles[0][3])


def is_inverted(picture: Image.Image) -> bool:
    """Return whether 0 is white in a TIFF of more than 8 bits or of fractions; in one of 8, Pillow sees to that."""
    tags = getattr(picture, "tag_v2", {})
    return (picture.mode.startswith("I") or picture.mode == "F") and tags.get(_PHOTOMETRIC) == 0


def _of_deep_colour(picture: Image.Image, content: bytes | None) -> Image.Image:
    """Scale a loaded picture of 16 bits per channel by the bits that its colours use, and keep its other properties."""
    name = getattr(picture, "filename", "")
    if picture.format != "PNG" or not (name or content):
        if np.asarray(picture.convert("RGB")).max() < 128:
            raise NotShownError("colour of 16 bits whose upper bit is never used; save it with 8 bits per channel")
        return picture
    stored = torch.frombuffer(bytearray(content or Path(name).read_bytes()), dtype=torch.uint8)
    channels = decode_png(stored, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    has_alpha = channels.shape[2] in (2, 4)
    colours = to_grey(channels[:, :, :-1] if has_alpha else channels)
    if colours.shape[2] == 1:
        colours = colours.repeat(3, axis=2)
    if has_alpha:
        colours = np.concatenate([colours, (channels[:, :, -1:] >> 8).astype(np.uint8)], axis=2)
    scaled = Image.fromarray(colours)
    scaled.info = {key: value for key, value in picture.info.items() if key == "exif"}
    return scaled


def _too_large() -> str:
    return f"more than {MAX_PIXELS:,} pixels; reduce it or cut it into tiles"


@functools.cache
def _register_heif() -> None:
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
