import dataclasses
import subprocess
import sys
import tracemalloc

import datasets
import numpy as np
import pydicom
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from pictures import ramp, write_dicom, write_png16, write_rotated_jpeg
from PIL import Image

from fgl_app.cards import load_card
from fgl_app.data import decoding
from fgl_app.data.decoding import UnreadableError, open_picture, to_grey
from fgl_app.data.findings import decode_readable
from fgl_app.data.headers import read_header
from fgl_app.data.images import to_pixels
from fgl_app.data.readers import Part, open_part
from fgl_app.errors import DataError


def decoded(path):
    return np.asarray(open_picture(path))


def reason(path):
    with pytest.raises(UnreadableError) as caught:
        open_picture(path)
    return caught.value.image.reason


@pytest.mark.parametrize(("largest", "bits"), [(255, 8), (300, 9), (1023, 10), (4095, 12), (9000, 14), (65535, 16)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_whole_numbers_are_scaled_by_the_bits_that_they_use(tmp_path, largest, bits, ending):
    Image.fromarray(ramp(largest)).save(tmp_path / f"deep.{ending}")

    expected = np.rint(ramp(largest).astype(np.float64) * 255 / (2**bits - 1))
    assert np.abs(decoded(tmp_path / f"deep.{ending}")[:, :, 0] - expected).max() == 0


def test_twelve_bits_of_sixteen_are_neither_black_nor_white(tmp_path):
    Image.fromarray(ramp(4095)).save(tmp_path / "xray.png")

    pixels = to_pixels(open_picture(tmp_path / "xray.png"), (), 16)

    assert pixels[0, 0].tolist() == pytest.approx(np.linspace(0, 255, 16), abs=1)


@pytest.mark.parametrize(("largest", "bits"), [(700, 10), (4095, 12), (65535, 16)])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_sixteen_bits_are_scaled_by_the_bits_that_they_use(tmp_path, largest, bits, channels):
    values = np.stack([ramp(largest)] * channels, axis=2)
    if channels in (2, 4):
        values[:, :, -1] = 65535  # opaque
    write_png16(tmp_path / "deep.png", values)

    expected = np.rint(ramp(largest).astype(np.float64) * 255 / (2**bits - 1))
    assert np.abs(decoded(tmp_path / "deep.png") - expected[:, :, None]).max() == 0


def test_fractions_are_stretched_between_their_percentiles(tmp_path):
    values = np.linspace(-2.5, 7.5, 4000, dtype=np.float32).reshape(40, 100)
    values[0, 0], values[0, 1], values[0, 2] = 1e30, np.nan, -np.inf  # a hot pixel, and holes
    Image.fromarray(values).save(tmp_path / "map.tif")

    grey = decoded(tmp_path / "map.tif")[:, :, 0]

    low, high = np.sort(values[np.isfinite(values)])[[20, -21]]  # half a percent of 3,998 on each side
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    inner = np.isfinite(values)
    assert np.abs(grey[inner] - expected[inner]).max() <= 1
    assert grey[0, :3].tolist() == [255, 0, 0]


def test_numbers_below_zero_are_stretched_and_constant_ones_are_black(tmp_path):
    Image.fromarray(ramp(2000).astype(np.int32) - 1000).save(tmp_path / "ct.tif")
    Image.fromarray(np.full((8, 8), 3.5, np.float32)).save(tmp_path / "flat.tif")
    spot = np.zeros((40, 40), np.float32)
    spot[20, 20] = 9.0
    Image.fromarray(spot).save(tmp_path / "spot.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "holes.tif")

    assert decoded(tmp_path / "ct.tif")[0, [0, -1], 0].tolist() == [0, 255]
    assert decoded(tmp_path / "flat.tif").max() == 0
    assert np.argwhere(decoded(tmp_path / "spot.tif")[:, :, 0] == 255).tolist() == [[20, 20]]
    assert reason(tmp_path / "holes.tif") == "none of its numbers is finite"


def test_a_picture_stands_upright(tmp_path):
    write_rotated_jpeg(tmp_path / "phone.jpg")

    picture = open_picture(tmp_path / "phone.jpg")

    assert picture.size == (20, 40)
    red, blue = picture.getpixel((10, 5)), picture.getpixel((10, 35))
    assert red[0] > 200 > 50 > red[2]
    assert blue[2] > 200 > 50 > blue[0]


def test_what_is_transparent_is_white(tmp_path):
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    half.paste((0, 0, 0, 0), (0, 0, 8, 4))
    half.save(tmp_path / "alpha.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 200])
    palette.paste(0, (0, 0, 8, 4))
    palette.save(tmp_path / "palette.png", transparency=0)
    colour = Image.new("RGB", (8, 8), (9, 9, 9))
    colour.paste((0, 200, 0), (0, 4, 8, 8))
    colour.save(tmp_path / "colour.png", transparency=(9, 9, 9))
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")

    rows = {name: decoded(tmp_path / f"{name}.png")[[0, 7], 0].tolist() for name in ("alpha", "palette", "colour")}

    assert rows["alpha"] == [[255] * 3, [255, 127, 127]]
    assert rows["palette"] == [[255] * 3, [0, 0, 200]]
    assert rows["colour"] == [[255] * 3, [0, 200, 0]]
    assert decoded(tmp_path / "grey.png").min() == 255


def test_other_modes_and_the_first_of_several_frames(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.tif")
    Image.new("1", (8, 8), 1).save(tmp_path / "fax.tif")
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])

    assert decoded(tmp_path / "fax.tif").min() == 255
    for name in ("print.tif", "moving.gif", "pages.tif"):
        assert decoded(tmp_path / name)[0, 0].tolist() == [255, 0, 0]


def test_pictures_of_phones_are_read(tmp_path):
    from pillow_heif import from_pillow

    from_pillow(Image.new("RGB", (64, 64), "red")).save(tmp_path / "phone.heic", quality=95)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "phone.avif", quality=95)

    for name in ("phone.heic", "phone.avif"):
        assert np.abs(decoded(tmp_path / name)[32, 32].astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (1, -1024), (2, 100)])
@pytest.mark.parametrize(("center", "width"), [(600, 400), (40, 350), (1000.5, 1)])
def test_a_window_of_dicom_goes_from_black_to_white(tmp_path, slope, intercept, center, width):
    values = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    elements = {"RescaleSlope": slope, "RescaleIntercept": intercept, "WindowCenter": center, "WindowWidth": width}
    write_dicom(tmp_path / "ct.dcm", values, **elements)
    write_dicom(tmp_path / "inverted.dcm", values, **elements, PhotometricInterpretation="MONOCHROME1")

    shown = values * float(slope) + intercept
    # DICOM PS3.3 C.11.2.1.2.1: linear between center - 0.5 -/+ (width - 1) / 2.
    linear = (shown - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    black, white = shown <= center - 0.5 - (width - 1) / 2, shown > center - 0.5 + (width - 1) / 2
    expected = np.where(black, 0, np.where(white, 255, linear * 255))
    grey = decoded(tmp_path / "ct.dcm")[:, :, 0]
    assert np.abs(grey - expected).max() <= 0.51
    assert (decoded(tmp_path / "inverted.dcm")[:, :, 0] == 255 - grey).all()


def test_dicom_without_a_window_is_stretched_and_needs_no_ending(tmp_path):
    values = ramp(2400, 32).astype(np.int16) - 1000
    write_dicom(tmp_path / "1.2.840.113619.2.55", values, BitsStored=16, HighBit=15)

    grey = decoded(tmp_path / "1.2.840.113619.2.55")[:, :, 0]

    assert grey[0, [0, -1]].tolist() == [0, 255]
    assert grey[0, 16] == pytest.approx(255 * 16 / 31, abs=2)


def test_dicom_in_colour_is_read(tmp_path):
    values = np.zeros((8, 8, 3), np.uint8)
    values[:, :, 0] = 200
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    depth = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    write_dicom(tmp_path / "skin.dcm", values, Rows=8, Columns=8, PixelRepresentation=0, **colour, **depth)

    assert decoded(tmp_path / "skin.dcm")[3, 3].tolist() == [200, 0, 0]


def test_dicom_that_is_no_single_picture_is_unreadable_with_its_reason(tmp_path):
    write_dicom(tmp_path / "film.dcm", np.zeros((40, 8, 8), np.uint16), NumberOfFrames=40)
    write_dicom(tmp_path / "report.dcm", np.zeros((8, 8), np.uint16), PixelData=None)
    write_dicom(tmp_path / "text.dcm", np.zeros((8, 8), np.uint16), PixelData=None, Rows=None)
    write_dicom(tmp_path / "short.dcm", np.zeros((8, 8), np.uint16), Rows=9000)

    assert reason(tmp_path / "film.dcm") == "DICOM of 40 frames; save the one that counts by itself"
    assert reason(tmp_path / "report.dcm") == "DICOM without a picture"
    assert reason(tmp_path / "text.dcm") == "DICOM without a picture"
    assert "damaged" in reason(tmp_path / "short.dcm")


def test_dicom_of_few_bytes_that_hold_many_is_not_inflated(tmp_path):
    write_dicom(tmp_path / "bomb.dcm", np.zeros((4096, 8192), np.uint16))
    content = pydicom.dcmread(tmp_path / "bomb.dcm")
    content.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    content.save_as(tmp_path / "bomb.dcm")
    assert (tmp_path / "bomb.dcm").stat().st_size < 200_000  # of 64 MiB

    tracemalloc.start()
    said, header = reason(tmp_path / "bomb.dcm"), read_header(tmp_path / "bomb.dcm")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert said == "DICOM that is deflated as a whole; save it uncompressed"
    assert header is None
    assert peak < 32 * 2**20


@pytest.mark.parametrize(
    ("elements", "sentence"),
    [
        ({"NumberOfFrames": 20_000}, "DICOM of 20000 frames; save the one that counts by itself"),
        ({"SamplesPerPixel": 30_000}, "DICOM of 30000 numbers in each pixel"),
        ({"Rows": 60_000, "Columns": 60_000}, "more than 89,478,485 pixels; reduce it or cut it into tiles"),
    ],
)
def test_dicom_that_says_it_is_too_large_is_refused_before_its_pixels_are_read(tmp_path, elements, sentence):
    write_dicom(tmp_path / "slide.dcm", np.zeros((2048, 8192), np.uint16), **elements)

    tracemalloc.start()
    said = reason(tmp_path / "slide.dcm")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert said == sentence
    assert peak < 16 * 2**20  # of 32 MiB


def test_damaged_files_are_unreadable_with_their_reason(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:700])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")

    assert {name: reason(tmp_path / f"{name}.png") for name in ("cut", "empty", "text", "nowhere", "postscript")} == {
        "cut": "truncated",
        "empty": "empty file",
        "text": "not an image of a known format",
        "nowhere": "link that leads nowhere",
        "postscript": "not an image of a known format",
    }


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (10_000, 8_949)).save(tmp_path / "slide.png")

    assert reason(tmp_path / "slide.png") == "more than 89,478,485 pixels; reduce it or cut it into tiles"
    assert decoding.MAX_PIXELS < 10_000 * 8_949


MEASURED = """
import resource, sys
from fgl_app.data.decoding import open_picture
from fgl_app.data.findings import decode_readable
from fgl_app.data.headers import read_header
from fgl_app.data.images import to_pixels

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for fit in ("crop", "pad", "squash"):
        for transforms in ((), (("resize", 256),)):
            pixels = to_pixels(open_picture(path), transforms, 224, fit)
            assert pixels.shape == (3, 224, 224) and pixels[0].max() == 255
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_long_picture_takes_little_memory(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, size in zip(paths, [(20_000, 1), (1, 20_000), (60_000, 7)], strict=True):
        Image.new("RGB", size, "red").save(path)

    command = [sys.executable, "-c", MEASURED, *map(str, paths)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert grown < 100_000  # KiB; the first alone took 3.9 GB


def test_a_wide_picture_is_cropped_padded_or_squashed():
    picture = Image.new("RGB", (1200, 300), "blue")
    picture.paste("red", (0, 0, 300, 300))

    crop, pad, squash = (to_pixels(picture, (), 40, fit) for fit in ("crop", "pad", "squash"))

    assert crop[0].max() == 0  # the red quarter is cut off
    assert (pad.sum(0).amax(1) > 0).nonzero().flatten().tolist() == list(range(15, 25))  # 40 * 300 / 1200 rows
    assert (pad[0, 20, :9] == 255).all()
    assert pad[0, 20, 11:].max() == 0
    assert (squash[0, :, :9] == 255).all()
    assert (squash[2, :, 11:] == 255).all()


def test_ordinary_pictures_are_decoded_to_the_same_bytes_as_ever(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(12, 20, 3), (33, 17, 3), (28, 28), (50, 7, 3)]
    for number, shape in enumerate(shapes):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{number}.png")

        raw = TF.pil_to_tensor(Image.open(tmp_path / f"{number}.png").convert("RGB"))
        expected = TF.center_crop(TF.resize(raw, [16], antialias=True), [16, 16])
        assert torch.equal(to_pixels(open_picture(tmp_path / f"{number}.png"), (), 16), expected)
    card = load_card("digits")
    part = open_part(card, "train", "")
    for row in (0, 900, 1796):
        grown = TF.resize(TF.pil_to_tensor(part.image(row).convert("RGB")), [32], antialias=True)
        expected = TF.center_crop(TF.resize(grown, [16], antialias=True), [16, 16])
        assert torch.equal(to_pixels(part.image(row), card.transforms, 16, card.fit), expected)


def test_any_numbers_become_eight_bits():
    for values in (np.zeros((3, 3), np.uint16), np.array([[0, 2**31 - 1]], np.int32), np.array([[0.25]], np.float32)):
        assert to_grey(values).dtype == np.uint8


@pytest.mark.parametrize(
    "values",
    [ramp(65535), ramp(4095), np.linspace(-2, 9, 256, dtype=np.float32).reshape(16, 16)],
)
def test_a_tiff_whose_zero_is_white_is_no_negative(tmp_path, values):
    for meaning in (0, 1):
        Image.fromarray(values).save(tmp_path / f"{meaning}.tif", tiffinfo={262: meaning})
        with Image.open(tmp_path / f"{meaning}.tif") as stored:
            assert stored.tag_v2[262] == meaning
            assert np.array_equal(np.asarray(stored), values)

    inverted, plain = (decoded(tmp_path / f"{meaning}.tif") for meaning in (0, 1))

    assert (inverted[0, 0].tolist(), inverted[-1, -1].tolist()) == ([255] * 3, [0] * 3)
    assert np.array_equal(inverted, 255 - plain)
    header = read_header(tmp_path / "0.tif")
    assert "inverted, because 0 is white in them" in header.changes
    assert "inverted, because 0 is white in them" not in read_header(tmp_path / "1.tif").changes


def too_large_for_numpy():
    return np.zeros(2**60, np.uint8)


def too_large_for_torch():
    return torch.zeros(2**60, dtype=torch.uint8)


def out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("allocate", [too_large_for_numpy, too_large_for_torch, out_of_gpu_memory])
def test_want_of_memory_is_no_fault_of_an_image(allocate, tmp_path, monkeypatch):
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        decode_readable(Part((0,), None, lambda row: allocate()), [0], (), 8, "crop")
    assert not isinstance(raised.value, DataError)
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: allocate())

    with pytest.raises((MemoryError, RuntimeError)) as raised:
        open_picture(tmp_path / "good.png")
    assert not isinstance(raised.value, DataError)


def test_an_image_of_a_hub_table_is_decoded_as_a_file_is(tmp_path):
    deep = np.stack([ramp(4095), ramp(2000), ramp(0)], axis=2)
    write_png16(tmp_path / "deep.png", deep)
    Image.fromarray(ramp(4095)).save(tmp_path / "grey.tif", tiffinfo={262: 0})
    write_rotated_jpeg(tmp_path / "rotated.jpg")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "slide.png")
    (tmp_path / "text.png").write_bytes(b"no image")
    files = sorted(path for path in tmp_path.iterdir() if path.suffix != ".yaml")
    (tmp_path / "hub").mkdir()
    stored = datasets.Dataset.from_dict(
        {"img": [{"bytes": path.read_bytes(), "path": None} for path in files], "label": [0, 1, 0, 1, 0]},
        features=datasets.Features(
            img={"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, label=datasets.Value("int64")
        ),
    )
    stored.cast_column("img", datasets.Image()).to_parquet(str(tmp_path / "hub" / "train-00000-of-00001.parquet"))
    card = dataclasses.replace(load_card("cifar10"), columns={"image": "img", "label": "label"}, source_options={})
    card = dataclasses.replace(card, classes=tuple(dataclasses.replace(card.classes[n], source_id=n) for n in range(2)))

    part = open_part(card, "train", str(tmp_path / "hub"))

    assert [path.name for path in files] == ["deep.png", "grey.tif", "rotated.jpg", "slide.png", "text.png"]
    for row, path in enumerate(files[:3]):
        assert np.array_equal(np.asarray(part.image(row)), decoded(path))
    assert np.asarray(part.image(0))[0, :, 0].tolist() == np.rint(ramp(4095)[0] * (255 / 4095)).tolist()
    for row, path in enumerate(files[3:], 3):
        with pytest.raises(UnreadableError) as caught:
            part.image(row)
        assert caught.value.image.reason == reason(path)
    assert "89,478,485 pixels" in reason(files[3])
