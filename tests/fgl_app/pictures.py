"""Files of pictures as cameras, microscopes, scanners and hospitals write them."""

import struct
import zlib

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def ramp(largest, size=16, dtype=np.uint16):
    """Return numbers that rise from 0 on the left to ``largest`` on the right."""
    return np.broadcast_to(np.rint(np.linspace(0, largest, size)), (size, size)).astype(dtype)


def write_png16(path, values):
    """Write uint16 ``[H, W, C]`` as PNG of 16 bits per channel, which Pillow does for grey only."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def write_dicom(path, values, **elements):
    """Write a DICOM file of one grey picture; ``elements`` are further or other elements, None for absent."""
    content = pydicom.Dataset()
    content.file_meta = FileMetaDataset()
    content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    content.SOPInstanceUID = content.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    content.Rows, content.Columns = values.shape[-2:]
    content.SamplesPerPixel, content.PhotometricInterpretation = 1, "MONOCHROME2"
    content.BitsAllocated, content.BitsStored, content.HighBit = 16, 12, 11
    content.PixelRepresentation = int(np.issubdtype(values.dtype, np.signedinteger))
    content.PixelData = values.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(content, name)
        else:
            setattr(content, name, value)
    content.save_as(path, enforce_file_format=True)


def write_rotated_jpeg(path, size=(40, 20)):
    """Write a picture that lies on its side, left half red, and says in EXIF that its left is up."""
    picture = Image.new("RGB", size, "blue")
    picture.paste("red", (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    picture.save(path, exif=exif, quality=95)
