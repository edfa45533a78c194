"""A site's folder as cameras, scanners, macOS, Windows, NAS devices and notebooks leave it."""

import numpy as np
from pictures import ramp, write_dicom, write_png16, write_rotated_jpeg
from PIL import Image
from pillow_heif import from_pillow

IMAGES = {"cat": 13, "chien \u00e9t\u00e9": 12, "phones": 10, "x2": 11}
"""Readable images of each class."""
UNREADABLE = {
    "truncated": 1, "empty file": 1, "link that leads nowhere": 1, "not an image of a known format": 1,
}  # fmt: skip
IGNORED = {
    "._*": 2, ".DS_Store": 2, "hidden": 1, "hidden folder": 1, "folder .ipynb_checkpoints": 1, "folder @eaDir": 1,
    "folder __MACOSX": 1, "folder #snapshot": 2, "folder .git": 1, "Thumbs.db": 1, "of type .txt": 2,
    "of type .cr2": 1, "link to a folder above it": 1, "outside the class folders": 1,
}  # fmt: skip


def noise(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8))


def write_odd_folder(root):
    """Write a folder of four classes with everything that is odd about folders and pictures."""
    cat = root / "cat"
    (cat / "2023" / "spring").mkdir(parents=True)
    noise(0).save(cat / "plain.png")
    noise(1).save(cat / "2023" / "deep.png")
    noise(2).save(cat / "2023" / "spring" / "deeper.jpeg")
    Image.fromarray(ramp(65535, 24)).save(cat / "sixteen.png")
    Image.fromarray(ramp(4095, 24)).save(cat / "twelve_in_sixteen.tif")
    Image.fromarray(np.linspace(-1, 1, 576, dtype=np.float32).reshape(24, 24)).save(cat / "float.tiff")
    write_png16(cat / "deep_colour.png", np.stack([ramp(4095, 24), ramp(0, 24), ramp(0, 24)], axis=2))
    write_rotated_jpeg(cat / "rotated.JPG")
    transparent = Image.new("RGBA", (24, 24), (255, 0, 0, 0))
    transparent.paste((0, 0, 255, 255), (6, 6, 18, 18))
    transparent.save(cat / "alpha.png")
    transparent.convert("P").save(cat / "palette.png", transparency=transparent.convert("P").getpixel((0, 0)))
    wide = Image.new("RGB", (1200, 300), "lime")
    wide.paste("black", (450, 0, 750, 300))
    wide.save(cat / "wide.png")
    Image.new("RGB", (20_000, 1), "yellow").save(cat / "line.png")
    write_dicom(cat / "1.2.840.1", ramp(4000, 24), WindowCenter=2000, WindowWidth=2000)
    noise(3).save(cat / "cut.png")
    (cat / "cut.png").write_bytes((cat / "cut.png").read_bytes()[:900])
    (cat / "empty.jpg").touch()
    (cat / "nowhere.png").symlink_to(root / "gone.png")
    (cat / "text.bmp").write_text("no image")
    (cat / "notes.txt").write_text("sampled in spring")
    (cat / "raw.cr2").write_bytes(bytes(100))
    (cat / "again").symlink_to(cat)

    for name in ("chien e\u0301te\u0301", "x\u00b2"):  # as macOS writes accents; the second is x2 in the form NFKC
        (root / name).mkdir()
        for number in range(11):
            noise(100 * len(name) + number).save(root / name / f"{number}.png")
    noise(1103).save(root / "chien e\u0301te\u0301" / "last.webp", lossless=True)
    (root / "phones").mkdir()
    for number in range(10):
        from_pillow(noise(2000 + number)).save(root / "phones" / f"{number}.heic")

    for folder, name in (("cat", "._plain.png"), ("x\u00b2", "._0.png"), ("cat", ".DS_Store"), (".", ".DS_Store")):
        (root / folder / name).write_bytes(b"\0\5\x16\7")
    (cat / "Thumbs.db").write_bytes(bytes(9))
    (cat / ".nomedia").touch()
    (cat / ".hidden").mkdir()
    noise(4).save(cat / ".hidden" / "secret.png")
    (cat / ".ipynb_checkpoints").mkdir()
    noise(0).save(cat / ".ipynb_checkpoints" / "plain-checkpoint.png")
    (cat / "@eaDir" / "plain.png").mkdir(parents=True)
    for size in "SM":
        noise(0).save(cat / "@eaDir" / "plain.png" / f"SYNOPHOTO_THUMB_{size}.jpg")
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    for name in ("._plain.png", "._deep.png"):
        (root / "__MACOSX" / "cat" / name).write_bytes(b"\0\5\x16\7")
    for place in (root, root / "phones"):  # a file server's copies of each day
        for day in range(3):
            (place / "#snapshot" / f"day{day}" / "cat").mkdir(parents=True)
            noise(0).save(place / "#snapshot" / f"day{day}" / "cat" / "plain.png")
    (root / ".git" / "objects").mkdir(parents=True)
    (root / ".git" / "objects" / "pack").write_bytes(bytes(9))
    (root / "README.txt").write_text("four classes")
    noise(5).save(root / "loose.png")
    return root
