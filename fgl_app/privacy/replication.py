"""Replication: are synthetic images copies of private training images?

FGL (Figure 7, after Somepalli et al. 2023) looks for the nearest training images by cosine similarity of features. Near
is relative: real images that nobody trained on have near neighbours, too, and they are the yardstick here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import fisher_exact
from sklearn.neighbors import NearestNeighbors

Floats = npt.NDArray[np.float32]

QUANTILE = 0.99
"""A synthetic image is a near-copy if it is nearer to a training image than this share of the held-out real images."""
SIGNIFICANCE = 0.01
"""Largest p-value at which a run is said to replicate."""
NEAR_IDENTICAL = 0.999
"""Similarity from which on two images are all but identical; exact copies reach 1 but for rounding."""


@dataclass(frozen=True)
class Replication:
    """How near the synthetic images are to the training images."""

    nearest: npt.NDArray[np.int64]
    """Training images next to each synthetic one, nearest first, int64 ``[Q, k]``."""
    similarity: Floats
    """Cosine similarity to each of them, -1 to 1, float32 ``[Q, k]``."""
    baseline: Floats
    """Similarity of each held-out real image to its nearest training image, float32 ``[B]``."""
    threshold: float
    """The :data:`QUANTILE` of the baseline."""
    near_copies: int
    """Synthetic images more similar than the threshold."""
    p_value: float
    """Probability of as many or more near-copies if synthetic images were no nearer than held-out real ones: Fisher's
    exact test, one-sided, of near-copies among the synthetic against the same among the held-out images."""

    @property
    def beyond_baseline(self) -> int:
        """Synthetic images more similar to a training image than any held-out image is."""
        return int((self.similarity[:, 0] > self.baseline.max()).sum())

    @property
    def near_identical(self) -> int:
        """Synthetic images that are all but identical to a training image."""
        return int((self.similarity[:, 0] >= NEAR_IDENTICAL).sum())

    @property
    def usual_identical(self) -> int:
        """Held-out images that are: data sets hold duplicates themselves."""
        return int((self.baseline >= NEAR_IDENTICAL).sum())

    @property
    def more_near_copies(self) -> bool:
        """Whether there are more near-copies than chance explains."""
        return self.p_value < SIGNIFICANCE

    @property
    def copies(self) -> bool:
        """Whether training images are all but identical to a larger share of the synthetic than of the held-out images.

        A few exact copies among thousands of images are too few for :attr:`more_near_copies`.
        """
        return self.near_identical * len(self.baseline) > self.usual_identical * len(self.similarity)

    @property
    def replicates(self) -> bool:
        """Whether there are more near-copies, or more copies, than real images give reason to expect."""
        return self.more_near_copies or self.copies


def find_replicas(synthetic: Floats, train: Floats, held_out: Floats, num_neighbours: int = 2) -> Replication:
    """Compare synthetic images with the training images, by an exact search.

    The mean training feature is subtracted first: features whose entries are all positive, such as pixels or what
    follows a ReLU, are all similar otherwise.

    Args:
        synthetic: Features of the synthetic images, ``[Q, D]``.
        train: Features of the clients' training images, ``[N, D]``.
        held_out: Features of real images on which nobody trained, ``[B, D]``; they calibrate the threshold.
        num_neighbours: k, nearest training images that are named; at most N.
    """
    centre = train.mean(axis=0)
    search = NearestNeighbors(n_neighbors=min(num_neighbours, len(train)), metric="cosine", algorithm="brute")
    search.fit(train - centre)
    distance, nearest = search.kneighbors(synthetic - centre)
    baseline = 1 - search.kneighbors(held_out - centre, n_neighbors=1, return_distance=True)[0][:, 0]
    similarity = 1 - distance
    threshold = float(np.quantile(baseline, QUANTILE))
    near_copies, usual = int((similarity[:, 0] > threshold).sum()), int((baseline > threshold).sum())
    table = [[near_copies, len(synthetic) - near_copies], [usual, len(baseline) - usual]]
    p_value = float(fisher_exact(table, alternative="greater").pvalue)
    return Replication(nearest, similarity, baseline, threshold, near_copies, p_value)


def top_pairs(found: Replication, number: int) -> list[tuple[int, int, float]]:
    """Return synthetic image, its nearest training image and their similarity, the most similar pairs first.

    A training image is named once, with the synthetic image nearest to it, so that one copy does not fill the list.
    """
    pairs: dict[int, tuple[int, int, float]] = {}
    for row in np.argsort(-found.similarity[:, 0], kind="stable").tolist():
        real = int(found.nearest[row, 0])
        pairs.setdefault(real, (row, real, float(found.similarity[row, 0])))
        if len(pairs) == number:
            break
    return list(pairs.values())
