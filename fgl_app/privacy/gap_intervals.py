"""Intervals for what several attacked models give away, over images that they may share.

The runs of one method differ in their seed. Their test images may be the same, or overlap, and so may their members:
the gaps of such runs are no independent sample, and Student's interval over three of them is too narrow. Here an image
that several runs share counts as one draw (clustered standard errors: Liang & Zeger 1986). The interval is over images;
it takes the runs' seeds as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from fgl_app.intervals import LEVEL, Interval
from fgl_app.privacy.membership import Floats


@dataclass(frozen=True)
class Scored:
    """One score of every attacked image under one model."""

    ids: npt.NDArray[np.int64]
    """Identity of each image, members first, ``[N + M]``; the same image has the same identity in every run."""
    num_members: int
    """N, at least 2, as is M."""
    values: Floats
    """Score of each image, larger for members, ``[N + M]``."""


Statistic = Callable[[Floats, Floats], tuple[float, Floats]]
"""From scores of members ``[N]`` and others ``[M]`` to an estimate and each image's share of its error, ``[N + M]``."""


def gap(members: Floats, others: Floats) -> tuple[float, Floats]:
    """Return the difference of the means, members minus others, and each image's share of its error."""
    shares = [_shares(members), -_shares(others)]
    return float(members.mean() - others.mean()), np.concatenate(shares)


def area(members: Floats, others: Floats) -> tuple[float, Floats]:
    """Return the area under the ROC curve and each image's share of its error (DeLong et al. 1988).

    The area is the mean, over members, of the share of others that score below one, where equal scores count half.
    """
    ranks = rankdata(np.concatenate([members, others]))
    above = (ranks[: len(members)] - rankdata(members)) / len(others)
    below = 1 - (ranks[len(members) :] - rankdata(others)) / len(members)
    return float(above.mean()), np.concatenate([_shares(above), _shares(below)])


def over_images(models: Sequence[Scored], references: Sequence[Scored] | None, statistic: Statistic) -> Interval:
    """Estimate the mean of a statistic over runs, or of its difference from reference models, with its interval.

    The standard error is the root of the sum, over distinct images, of the square of the image's shares in all runs.

    Args:
        models: The same method's models, one for each seed.
        references: For each of them a model that was attacked on the same images; None for the statistic itself.
        statistic: :func:`gap` or :func:`area`.
    """
    estimates, ids, shares = [], [], []
    for index, model in enumerate(models):
        estimate, share = _apply(statistic, model)
        if references is not None:
            minus = _apply(statistic, references[index])
            estimate, share = estimate - minus[0], share - minus[1]
        estimates.append(estimate)
        ids.append(model.ids)
        shares.append(share / len(models))
    _, image = np.unique(np.concatenate(ids), return_inverse=True)
    per_image = np.bincount(image, weights=np.concatenate(shares))
    half = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt(float((per_image**2).sum()))
    mean = math.fsum(estimates) / len(estimates)
    return Interval(mean, mean - half, mean + half)


def _apply(statistic: Statistic, model: Scored) -> tuple[float, Floats]:
    return statistic(model.values[: model.num_members], model.values[model.num_members :])


def _shares(values: Floats) -> Floats:
    """Return what each of N values adds to the error of their mean; the squares sum to its variance, s^2 / N."""
    number = len(values)
    return np.asarray((values - values.mean()) / math.sqrt(number * (number - 1)))
