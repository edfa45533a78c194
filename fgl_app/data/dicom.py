"""Decode DICOM, as hospitals store X-rays, CT and MR, to 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from fgl_app.data.decoding import UnreadableError, check_size, to_grey

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax of files that are compressed whole, as zip does: pydicom would inflate any number of bytes."""
_MOST_SAMPLES = 4
"""Numbers of one pixel, of any colour space of DICOM."""
_FAR = 1e9
"""A value far outside any window: what it becomes is the end of the window's range."""


def read_elements(path: Path) -> Dataset:
    """Read what a DICOM file says of its picture, without the picture.

    Raises:
        UnreadableError: If all of it is compressed, by a method that may hide any number of bytes in few.
    """
    import pydicom

    if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == _DEFLATED:
        raise UnreadableError(str(path), "DICOM that is deflated as a whole; save it uncompressed")
    return pydicom.dcmread(path, stop_before_pixels=True)


def read_dicom(path: Path) -> Image.Image:
    """Decode the one frame of a DICOM file.

    Its numbers are rescaled (slope and intercept, or the modality's table); its window, the first if there are
    several, goes from black to white, and without a window the percentiles do as for fractions. MONOCHROME1 is
    inverted. Colours are those that pydicom gives, RGB.

    Raises:
        UnreadableError: If the file does not hold exactly one frame that can be decoded.
    """
    import pydicom

    with warnings.catch_warnings(action="ignore"):  # of odd values in its elements, file by file
        elements = read_elements(path)
        if "Rows" not in elements:  # e.g. a report
            raise UnreadableError(str(path), "DICOM without a picture")
        frames, samples = (int(elements.get(name) or 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
        if frames != 1:
            raise UnreadableError(str(path), f"DICOM of {frames} frames; save the one that counts by itself")
        if samples > _MOST_SAMPLES:
            raise UnreadableError(str(path), f"DICOM of {samples} numbers in each pixel")
        check_size(int(elements.Columns), int(elements.Rows))
        content = pydicom.dcmread(path)
        if not any(name in content for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise UnreadableError(str(path), "DICOM without a picture")
        try:
            values = content.pixel_array
        except RuntimeError:  # pydicom names the plugins that it looked for
            syntax = content.file_meta.TransferSyntaxUID.name
            raise UnreadableError(str(path), f"DICOM compressed as {syntax}; save it uncompressed") from None
        if samples > 1:
            return Image.fromarray(to_grey(values)).convert("RGB")
        if content.PhotometricInterpretation == "PALETTE COLOR":
            from pydicom.pixels.processing import apply_color_lut

            return Image.fromarray(to_grey(apply_color_lut(values, content))).convert("RGB")
        grey = _shown(values, content)
    return Image.fromarray(255 - grey if content.PhotometricInterpretation == "MONOCHROME1" else grey).convert("RGB")


def _shown(values: npt.NDArray[np.number], content: Dataset) -> npt.NDArray[np.uint8]:
    """Scale the numbers of a grey picture as its header says that it is to be shown."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    rescaled = np.asarray(apply_modality_lut(values, content))
    if content.get("VOILUTSequence"):
        bits = int(content.VOILUTSequence[0].LUTDescriptor[2])
        return _between(apply_voi_lut(rescaled.astype(np.int64), content), 0, 2**bits - 1)
    if content.get("WindowCenter") is None or content.get("WindowWidth") is None:
        return to_grey(rescaled.astype(np.float32))
    with np.errstate(over="ignore"):  # of a sigmoid far outside its window
        black, white = apply_voi_lut(np.array([-_FAR, _FAR]), content)
        return _between(apply_voi_lut(rescaled, content), float(black), float(white))


def _between(values: npt.NDArray[np.number], black: float, white: float) -> npt.NDArray[np.uint8]:
    grey: npt.NDArray[np.uint8] = np.rint(np.clip((values - black) * (255 / (white - black)), 0, 255)).astype(np.uint8)
    return grey
