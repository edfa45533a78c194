"""Divide a source's images into a public part, the same in every run, and train, validation and test parts by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import train_test_split

from fgl_app.cards import Card
from fgl_app.errors import DataError
from fgl_app.rng import derive_seed

DIVISION = "the run's seed"
"""What the private images are divided by, kept in ``config.json``: a run that an earlier version divided by the card
alone must not go on with another division, which would train on its test images."""


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

    def split(part: list[int], second_size: int, random_state: int) -> tuple[list[int], list[int]]:
        if second_size == 0:
            return part, []
        try:
            first, second = train_test_split(
                part, test_size=second_size, random_state=random_state, shuffle=True, stratify=values[part]
            )
        except ValueError as error:
            raise DataError(
                f"The images of {card.name} must be enough to hold some of every class out, but are not ({error})."
            ) from None
        return sorted(first), sorted(second)

    everything = list(range(len(values)))
    private, public = split(everything, round(card.public * len(everything)), card.split_seed)
    rest, test = split(private, round(card.test * len(private)), private_state(card, seed, "test"))
    train, validation = split(rest, round(card.validation * len(private)), private_state(card, seed, "validation"))
    return {"public": public, "train": train, "validation": validation, "test": test}


def private_state(card: Card, seed: int, part: str) -> int:
    """Return scikit-learn's ``random_state`` of one division of the private images, from the seeds of run and card."""
    return derive_seed(seed, "division", card.split_seed, part) % 2**32
