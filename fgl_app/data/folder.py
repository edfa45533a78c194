"""A client's own images: one folder per class, with images at every depth below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from fgl_app import image_folders
from fgl_app.cards import Card
from fgl_app.data.decoding import open_picture
from fgl_app.data.findings import Decoded, Findings, decode_readable, findings_of
from fgl_app.data.images import HeldOut, ImageSet
from fgl_app.data.readers import Part
from fgl_app.errors import DataError
from fgl_app.image_folders import class_of, describe, find_images, loose_files, total
from fgl_app.rng import numpy_generator

SPLIT_SEED = 0
"""A node's split depends on the list of its images alone, so that no test image is ever trained on, whatever the run's
seed and whichever files can be read. It holds while the folder stays as it is: an image that is added or removed
divides its class anew."""


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


def load_own(
    part: Part,
    class_names: Sequence[str],
    image_size: int,
    *,
    of_card: Card | None = None,
) -> tuple[ImageSet, HeldOut, Findings]:
    """Decode a client's own images, and divide them into what it trains on and what it holds out.

    Args:
        part: Where they lie.
        class_names: The run's K classes.
        image_size: Side of the images, px.
        of_card: The client's own card, which counts the part's classes and says how pictures are scaled; None for a
            folder, whose pictures are cropped and whose labels count the run's classes.

    Returns:
        The training images, those held out, and what was found; labels count the run's classes.

    Raises:
        DataError: If no image, or none to train on, can be decoded.
    """
    rows, names = range(len(part.labels)), of_card.class_names() if of_card else class_names
    transforms, fit = (of_card.transforms, of_card.fit) if of_card else ((), "crop")
    decoded = decode_readable(part, rows, transforms, image_size, fit)
    train, held_out = split_own(part, decoded, [class_names.index(name) for name in names])
    findings = findings_of(decoded, part, rows, names)
    return train, held_out, dataclasses.replace(findings, num_test=len(held_out.test))


def split_own(part: Part, decoded: Decoded, numbers: Sequence[int]) -> tuple[ImageSet, HeldOut]:
    """Divide a client's images as :func:`split_rows` divides their list, and leave out the unreadable ones.

    A file that cannot be read at one moment, and can at another, moves no other file to another side.

    Args:
        part: The list of the client's images.
        decoded: All of them that can be read.
        numbers: For each class of the part its number in the run, by which images are labelled.

    Raises:
        DataError: If no training image can be read.
    """
    run_labels = torch.tensor(numbers, dtype=torch.int64)[decoded.images.labels]
    images, place = ImageSet(decoded.images.images, run_labels), {row: at for at, row in enumerate(decoded.rows)}
    train, validation, test = (
        images.take([place[row] for row in rows if row in place]) for rows in split_rows(part.labels)
    )
    if not len(train):
        raise DataError(
            f"At least one image that is not held out must be readable, but all {len(decoded.rows):,} readable ones "
            f"are held out and {len(decoded.unreadable):,} others are not readable. The first: {decoded.unreadable[0]}."
        )
    return train, HeldOut(validation, test)


def split_rows(labels: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Divide a list of images by class: 70 % train, 10 % validation, 20 % test; every class has a training image.

    Args:
        labels: Class of each image that is listed, readable or not. Which number a class has does not matter: a site
            counts its own classes until it knows the run's.

    Returns:
        Sorted rows of the training, the validation and the test images.
    """
    train: list[int] = []
    validation: list[int] = []
    test: list[int] = []
    for label in sorted(set(labels)):
        rows = [row for row, each in enumerate(labels) if each == label]
        order = [rows[index] for index in numpy_generator(SPLIT_SEED, "folder-split").permutation(len(rows))]
        num_test, num_validation = round(0.2 * len(rows)), round(0.1 * len(rows))
        test += order[:num_test]
        validation += order[num_test : num_test + num_validation]
        train += order[num_test + num_validation :]
    return sorted(train), sorted(validation), sorted(test)
