"""Tiny copies of data sets in the layouts of their sources, and a card of one."""

import gzip
import io
import struct

import datasets
import numpy as np
import yaml
from PIL import Image

from fgl_app.data.findings import decode_readable, findings_of
from fgl_app.data.folder import open_folder

IMAGENET_IDS = {  # of the FGL paper, from its authors' code
    "imagefruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
    "imageyellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
    "imagesquawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
}
DOMAINNET_IDS = [1, 73, 11, 19, 29, 31, 290, 121, 225, 39]
DOMAINS = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
HELD_OUT = {"train": "train", "test": "test"}
HUB = {  # columns of image and label, number of classes, parts of the card and of the hub
    "cifar10": ("img", "label", 10, HELD_OUT),
    "cifar100": ("img", "fine_label", 100, HELD_OUT),
    "flowers102": ("image", "label", 102, {"train": "train", "validation": "validation", "test": "test"}),
    "domainnet10": ("image", "label", 345, HELD_OUT),
} | {
    name: ("image", "label", 1000, {"train": "train", "test": "validation"}) for name in [*IMAGENET_IDS, "imagenet100"]
}


def picture(number, domain=0, size=4):
    """Return an image that tells which source label and domain it was written for."""
    return Image.new("RGB", (size, size), (number // 8, 30 * (number % 8), 40 * domain))


def told(part):
    red, green, blue = part.images[:, :, 4, 4].int().T
    return (8 * red + green // 30).tolist(), (blue // 40).tolist()


def encoded(number, domain=0):
    buffer = io.BytesIO()
    picture(number, domain).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_hub(folder, split, columns, rows, features):
    """Write the parquet file of one part as the hub has it; rows are tuples of source label and domain."""
    data = {columns[0]: [encoded(*row) for row in rows]}
    data |= {name: [row[number] for row in rows] for number, name in enumerate(columns[1:])}
    kinds = datasets.Features({columns[0]: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    table = datasets.Dataset.from_dict(data, features=datasets.Features(kinds | features))
    table.cast_column(columns[0], datasets.Image()).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def write_tree(folder, names, count, ending, colour=picture):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour(number).save(folder / name / f"{index}.{ending}")


def load_folder(folder, names, size):
    """Return all readable images of a folder, and what was found."""
    part = open_folder(folder, names)
    rows = range(len(part.labels))
    decoded = decode_readable(part, rows, (), size, "crop")
    return decoded.images, findings_of(decoded, part, rows, names)


def write_hub_card(folder, classes, **changes):
    content = {
        "title": "Cats",
        "source": {"kind": "huggingface", "name": "owner/cats"},
        "splits": {"train": "train", "test": "test"},
        "validation": 0.25,
        "classes": classes,
        "prompts": {"class": "{class}"},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def write_fashion_mnist(folder):
    """Write four hundred training and twenty test images of noise as Debian packages Fashion-MNIST."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 20)):
        images = generator.integers(0, 255, (count, 28, 28), np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
            with gzip.open(folder / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())
