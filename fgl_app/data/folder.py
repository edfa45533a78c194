"""A client's own images: one folder per class, with images at every depth below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fgl_app import image_folders
from fgl_app.data.decoding import open_picture
from fgl_app.data.findings import Findings, decode_readable, findings_of
from fgl_app.data.images import HeldOut, ImageSet
from fgl_app.data.readers import Part
from fgl_app.errors import DataError
from fgl_app.image_folders import class_of, describe, find_images, loose_files, total
from fgl_app.rng import numpy_generator

SPLIT_SEED = 0
"""A node's split depends on its images alone, so that no test image is ever trained on, whatever the run's seed. It
holds while the folder stays as it is: an image that is added or removed divides its class anew."""


def class_folders(folder: Path) -> list[str]:
    """Return the classes that a folder's sub-folders are named like.

    Raises:
        DataError: If the folder cannot be read, is divided into train, test and so on, or holds two folders of one
            class.
    """
    return sorted(map(class_of, image_folders.class_folders(folder)))


def open_folder(folder: Path, class_names: Sequence[str]) -> Part:
    """List all images below ``folder/CLASS NAME/``.

    Args:
        folder: Folder whose sub-folders are named like classes; classes may be absent.
        class_names: The run's K classes; a folder's label is its name's index here.

    Raises:
        DataError: If the folder cannot be read, has a sub-folder that is no class, or holds no image.
    """
    folders = image_folders.class_folders(folder)
    unknown = [name for name in folders if class_of(name) not in class_names]
    if unknown:
        raise DataError(
            f"Sub-folders of {str(folder)!r} must be named like the classes {', '.join(class_names)}, but "
            f"{unknown[0]!r} is not. Rename it or add it to `class-names`."
        )
    if not folders:
        raise DataError(f"{str(folder)!r} must hold sub-folders named like {', '.join(class_names)}, but holds none.")
    found = {name: find_images(folder / name) for name in folders}
    rows = [(path, class_names.index(class_of(name))) for name in folders for path in found[name].files]
    ignored = loose_files(folder)
    for images in found.values():
        ignored = total(ignored, images.ignored)
    if not rows:
        seen = f"other files only: {describe(ignored)}" if ignored else "none"
        raise DataError(f"The class folders of {str(folder)!r} must hold images, but hold {seen}.")
    held = {class_names[label] for _, label in rows}
    return Part(
        tuple(label for _, label in rows),
        None,
        lambda row: open_picture(rows[row][0]),
        lambda row: str(rows[row][0]),
        ignored,
        {class_of(name): images.ignored for name, images in found.items() if class_of(name) not in held},
    )


def load_folder(folder: Path, class_names: Sequence[str], image_size: int) -> tuple[ImageSet, Findings]:
    """Read all images below ``folder/CLASS NAME/``.

    Args:
        folder: Folder whose sub-folders are named like classes; classes may be absent.
        class_names: The run's K classes; a folder's label is its name's index here.
        image_size: Images are scaled to this shorter side and cropped to the centre square, px.

    Returns:
        The images, and what else was found.

    Raises:
        DataError: If the folder cannot be read, has a sub-folder that is no class, or holds no readable image.
    """
    part = open_folder(folder, class_names)
    rows = range(len(part.labels))
    images, unreadable = decode_readable(part, rows, (), image_size, "crop")
    return images, findings_of(images, part, rows, class_names, unreadable)


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
