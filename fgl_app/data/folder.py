"""A client's own images: one folder per class, as torchvision's ``ImageFolder`` reads it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from logging import WARNING
from pathlib import Path

import torch
from flwr.common.logger import log
from torchvision.datasets import ImageFolder

from fgl_app.data.images import HeldOut, ImageSet, to_pixels
from fgl_app.data.readers import Part, open_image
from fgl_app.errors import DataError
from fgl_app.rng import numpy_generator

SPLIT_SEED = 0
"""A node's split depends on its images alone, so that no test image is ever trained on, whatever the run's seed. It
holds while the folder stays as it is: an image that is added or removed divides its class anew."""


def class_folders(folder: Path) -> list[str]:
    """Return the names of a folder's sub-folders as classes, hidden ones left out.

    Raises:
        DataError: If the folder cannot be read.
    """
    try:
        entries = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        return sorted(set(map(_class_of, entries)))
    except OSError:
        raise DataError(
            f"`data-path` must be a folder with one sub-folder per class, but {str(folder)!r} is none."
        ) from None


def _class_of(name: str) -> str:
    """Return the class that a folder is named like: macOS writes accents as characters of their own, Linux does not."""
    return unicodedata.normalize("NFKC", name)


def load_folder(folder: Path, class_names: Sequence[str], image_size: int) -> tuple[ImageSet, list[Path]]:
    """Read all images below ``folder/CLASS NAME/``.

    Args:
        folder: Folder whose sub-folders are named like classes; classes may be absent.
        class_names: The run's K classes; a folder's label is its name's index here.
        image_size: Images are scaled to this shorter side and cropped to the centre square, px.

    Returns:
        The images, and the files that could not be read.

    Raises:
        DataError: If the folder cannot be read, has a sub-folder that is no class, or holds no readable image.
    """
    found = class_folders(folder)
    unknown = [name for name in found if name not in class_names]
    if unknown:
        raise DataError(
            f"Sub-folders of {str(folder)!r} must be named like the classes {', '.join(class_names)}, but "
            f"{unknown[0]!r} is not. Rename it or add it to `class-names`."
        )
    if not found:
        raise DataError(f"{str(folder)!r} must hold sub-folders named like {', '.join(class_names)}, but holds none.")
    listing = ImageFolder(folder, allow_empty=True)
    rows = [
        (path, class_names.index(_class_of(listing.classes[local])))
        for path, local in listing.samples
        if _class_of(listing.classes[local]) in found  # not of a hidden folder, such as a viewer's thumbnails
    ]
    if not rows:
        raise DataError(f"The class folders of {str(folder)!r} must hold images, but hold none.")
    part = Part(tuple(label for _, label in rows), None, lambda row: open_image(Path(rows[row][0])))
    images, unreadable = decode_readable(part, (), image_size)
    return images, [Path(rows[row][0]) for row in unreadable]


def decode_readable(part: Part, transforms: Sequence[tuple[str, int]], image_size: int) -> tuple[ImageSet, list[int]]:
    """Decode the images of one client, but for those that cannot be read.

    One damaged file must not keep a site out of a federation: it is left out, and reported.

    Args:
        part: The client's images.
        transforms: The card's steps before an image is scaled to ``image_size``.
        image_size: Side of the images, px.

    Returns:
        The readable images, without domains, and the rows of the others.

    Raises:
        DataError: If no image is readable.
    """
    images, labels, damage = [], [], {}
    for row, label in enumerate(part.labels):
        try:
            images.append(to_pixels(part.image(row), transforms, image_size))
            labels.append(label)
        except DataError as error:
            damage[row] = str(error)
    if not images:
        raise DataError(
            f"At least one of a client's images must be readable, but none of {len(damage)} is. The first: {damage[0]}"
        )
    for reason in damage.values():
        log(WARNING, "left out: %s", reason)
    return ImageSet(torch.stack(images), torch.tensor(labels, dtype=torch.int64)), list(damage)


def split_folder(data: ImageSet) -> tuple[ImageSet, HeldOut]:
    """Divide a client's images by class: 70 % train, 10 % validation, 20 % test; every class keeps a training image."""
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for label in sorted(set(data.labels.tolist())):
        rows = torch.nonzero(data.labels == label).flatten().tolist()
        order = [rows[index] for index in numpy_generator(SPLIT_SEED, "folder-split", label).permutation(len(rows))]
        num_test, num_validation = round(0.2 * len(rows)), round(0.1 * len(rows))
        parts["test"] += order[:num_test]
        parts["validation"] += order[num_test : num_test + num_validation]
        parts["train"] += order[num_test + num_validation :]
    train, validation, test = (data.take(sorted(parts[name])) for name in ("train", "validation", "test"))
    return train, HeldOut(validation, test)
