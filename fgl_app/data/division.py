"""Divide a source's images into public, train, validation and test parts; the same in every run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import train_test_split

from fgl_app.cards import Card
from fgl_app.errors import DataError


def divide(card: Card, strata: Sequence[int]) -> dict[str, list[int]]:
    """Divide the training part of a card's source.

    Args:
        card: Says which shares are public, held out for validation and held out for the test.
        strata: Class, or class and domain as one number, of each image; every part keeps their proportions.

    Returns:
        Sorted indices under ``public``, ``train``, ``validation`` and ``test``; empty where the card has no such share.
        Validation and test are shares of the private images, those that are not public.

    Raises:
        DataError: If a class has too few images to be divided.
    """
    values = np.asarray(strata)

    def split(part: list[int], second_size: int) -> tuple[list[int], list[int]]:
        if second_size == 0:
            return part, []
        try:
            first, second = train_test_split(
                part, test_size=second_size, random_state=card.split_seed, shuffle=True, stratify=values[part]
            )
        except ValueError as error:
            raise DataError(
                f"The images of {card.name} must be enough to hold some of every class out, but are not ({error})."
            ) from None
        return sorted(first), sorted(second)

    everything = list(range(len(values)))
    private, public = split(everything, round(card.public * len(everything)))
    rest, test = split(private, round(card.test * len(private)))
    train, validation = split(rest, round(card.validation * len(private)))
    return {"public": public, "train": train, "validation": validation, "test": test}
