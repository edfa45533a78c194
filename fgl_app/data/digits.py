"""Scikit-learn's 1,797 handwritten digits and their one fixed split.

The images are the test part of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin & Kaynak 1998): 8 x 8
pixels, intensities 0 to 16. They ship with scikit-learn, so nothing is downloaded.

One third is *public*: it is part of the corpus of the shipped tiny foundation models, as a large model has seen its
domain on the web, and is never given to a client. The other two thirds are private and are divided into train (70 %),
validation (10 %) and test (20 %).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SPLIT_SEED = 1797
"""Fixed for ever: the shipped models were trained on the public third that it gives."""


def load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load all digits.

    Returns:
        Images, uint8 ``[1797, 8, 8]`` with ink at 255 and paper at 0, and labels, int64 ``[1797]`` in 0 to 9.
    """
    bunch = load_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return images, bunch.target.astype(np.int64)


def split_indices(labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Divide the digits into public, train, validation and test parts, stratified by class.

    Args:
        labels: Labels of all digits, int64 ``[1797]``.

    Returns:
        Sorted indices, int64, under ``public`` (599), ``train`` (838), ``validation`` (120) and ``test`` (240).
    """
    indices = np.arange(len(labels))

    def divide(part: NDArray[np.int64], second_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        first, second = train_test_split(
            part, test_size=second_size, random_state=SPLIT_SEED, shuffle=True, stratify=labels[part]
        )
        return np.sort(first), np.sort(second)

    private, public = divide(indices, len(indices) // 3)
    rest, test = divide(private, round(0.2 * len(private)))
    train, validation = divide(rest, round(0.1 * len(private)))
    return {"public": public, "train": train, "validation": validation, "test": test}
