"""Divide a source's images into a public part, the same in every run, and train, validation and test parts by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split

from fgl_app.cards import Card
from fgl_app.errors import DataError
from fgl_app.rng import derive_seed


def divide(card: Card, strata: Sequence[int], seed: int) -> dict[str, list[int]]:
    """Divide the training part of a card's source.

    The public part depends on the card's ``split-seed`` alone, because the shipped models were trained on it. The
    seed of the run divides the other images, so that the spread over seeds includes that of the test images.

    Args:
        card: Says which shares are public, held out for validation and held out for the test.
        strata: Class, or class and domain as one number, of each image; every part keeps their proportions.
        seed: The run's seed.

    Returns:
        Sorted indices under ``public``, ``train``, ``validation`` and ``test``; empty where the card has no such share.
        Validation and test are shares of the private images, those that are not public.

    Raises:
        DataError: If a class has too few images to be divided.
    """
    values = np.asarray(strata)

    def split(part: list[int], second_size: int, state: int, name: str) -> tuple[list[int], list[int]]:
        if second_size == 0:
            return part, []
        first, second = stratified(card, part, values, second_size, state, name)
        return sorted(first), sorted(second)

    everything = list(range(len(values)))
    private, public = split(everything, round(card.public * len(everything)), card.split_seed, "public")
    rest, test = split(private, round(card.test * len(private)), private_state(card, seed, "test"), "test")
    num_validation, state = round(card.validation * len(private)), private_state(card, seed, "validation")
    train, validation = split(rest, num_validation, state, "validation")
    return {"public": public, "train": train, "validation": validation, "test": test}


def private_state(card: Card, seed: int, part: str) -> int:
    """Return scikit-learn's ``random_state`` of one division of the private images, from the seeds of run and card."""
    return derive_seed(seed, "division", card.split_seed, part) % 2**32


def stratified(
    card: Card, rows: Sequence[int], strata: npt.NDArray[np.int64], second_size: int, state: int, name: str
) -> tuple[list[int], list[int]]:
    """Divide rows into two parts by chance, each with the proportions of the strata.

    Args:
        card: Names the strata in errors.
        rows: Rows of the source.
        strata: Class, or class and domain as one number, of every row of the source.
        second_size: Rows in the second part.
        state: Scikit-learn's ``random_state``.
        name: What the second part is for, in errors.

    Raises:
        DataError: If there are too few rows for both parts to hold all strata.
    """
    numbers, counts = np.unique(strata[list(rows)], return_counts=True)
    fewest = int(counts.argmin())
    if counts[fewest] < 2:
        raise DataError(
            f"{_stratum(card, int(numbers[fewest]))} of {card.name} has a single image left to divide when the {name} "
            "images are held out, so that it would be missing on one side. Every class needs at least 3 images: add "
            "some, or leave the class out."
        )
    if min(second_size, len(rows) - second_size) < len(numbers):
        kinds = "pairs of class and domain" if card.domains else "classes"
        raise DataError(
            f"{second_size} of {len(rows)} images of {card.name} would be held out as {name} images, too few for its "
            f"{len(numbers)} {kinds}: each needs one on both sides. Add images or leave classes out."
        )
    first, second = train_test_split(
        list(rows), test_size=second_size, random_state=state, shuffle=True, stratify=strata[list(rows)]
    )
    return first, second


def _stratum(card: Card, number: int) -> str:
    label, domain = number % len(card.classes), number // len(card.classes)
    name = f"Class {card.classes[label].name!r}"
    return f"{name} in domain {card.domains[domain]!r}" if card.domains else name
