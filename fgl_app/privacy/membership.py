"""Membership inference: can a model's outputs tell the images it was trained on from others?

FGL (Table 3) compares means of four measures; Song & Mittal 2021 ("Systematic Evaluation of Privacy Risks of Machine
Learning Models", USENIX Security) attack with a threshold on each of them. What such thresholds achieve is a ROC curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import entr, log_softmax, logsumexp
from scipy.stats import hypergeom
from sklearn.metrics import roc_curve

from fgl_app.intervals import LEVEL, Interval

Floats = npt.NDArray[np.float64]

SIGNS: Mapping[str, int] = {"entropy": -1, "loss": -1, "confidence": 1, "modified entropy": -1}
"""The measures in the order of FGL's Table 3; 1 where members have larger values, -1 where smaller."""
FALSE_POSITIVE_RATES = (0.001, 0.01)
"""Where true-positive rates are read off, as Carlini et al. 2022 do."""
_RESAMPLES_AT_A_TIME = 50


@dataclass(frozen=True)
class Attack:
    """How well one score tells members from others."""

    gap: Interval
    """Difference of the means over members and non-members, in the score's own unit; positive where members score as
    members are taken to. FGL's Table 3 reports its absolute value, which is above zero without any leak."""
    auc: Interval
    """Area under the ROC curve: probability that a member scores above a non-member; 0.5 is guessing."""
    tpr: Mapping[float, Interval]
    """Share of the members found by the best threshold whose false-positive rate is at most the key."""
    p_values: Mapping[float, float]
    """Probability, for each key of ``tpr``, that guessing finds as many members; see :func:`guessing_p_value`."""
    least_fpr: float
    """1 / number of non-members: below it a false-positive rate can only be zero."""


def measures(logits: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, Floats]:
    """Compute the four measures of each image from the classifier's logits.

    With F(x) = softmax(``logits``) and y = ``labels``, in nats (Song & Mittal 2021, Section 3):

    - confidence: F(x)_y, the probability of the true class (Yeom et al. 2018; 0 to 1),
    - loss: -log F(x)_y, the cross-entropy,
    - entropy: -sum_i F(x)_i log F(x)_i (Salem et al. 2019),
    - modified entropy: Mentr(F(x), y) = -(1 - F(x)_y) log F(x)_y - sum_{i != y} F(x)_i log(1 - F(x)_i), which is zero
      for a certain right answer and without bound for a certain wrong one.

    No probability is clipped: log F(x)_i comes from a log-softmax, and log(1 - F(x)_i) of the largest probability from
    the others, so that both are exact where a probability rounds to 0 or 1.

    Args:
        logits: ``[N, K]``, finite, K at least 2.
        labels: True classes ``[N]``, 0 to K - 1.

    Returns:
        float64 ``[N]`` for each name in :data:`SIGNS`.
    """
    log_p, of_image, true = _log_probabilities(logits, labels)
    p, log_rest = np.exp(log_p), _log_complements(log_p)
    wrong = p * log_rest
    wrong[of_image, true] = 0.0
    log_true = log_p[of_image, true]
    return {
        "entropy": entr(p).sum(axis=1),
        "loss": -log_true,
        "confidence": p[of_image, true],
        "modified entropy": -np.exp(log_rest[of_image, true]) * log_true - wrong.sum(axis=1),
    }


def scaled_confidence(logits: npt.ArrayLike, labels: npt.ArrayLike) -> Floats:
    """Return log(p / (1 - p)) of the true class's probability p, about normal over models (Carlini et al. 2022).

    Args:
        logits: ``[N, K]``, finite, K at least 2.
        labels: True classes ``[N]``, 0 to K - 1.

    Returns:
        float64 ``[N]``, finite even where p rounds to 1.
    """
    log_p, of_image, true = _log_probabilities(logits, labels)
    log_true = log_p[of_image, true]
    log_p[of_image, true] = -np.inf
    return np.asarray(log_true - logsumexp(log_p, axis=1))


def attack(
    members: Floats, others: Floats, sign: int, generator: np.random.Generator, num_resamples: int = 1000
) -> Attack:
    """Measure a threshold attack, with percentile bootstrap intervals over images.

    Args:
        members: Score of each image that was trained on, ``[N]``.
        others: Score of each image that was not, ``[M]``.
        sign: 1 if members are taken to score higher, -1 if lower.
        generator: Draws the resamples.
        num_resamples: Bootstrap resamples; members and others are drawn separately.
    """
    scores = sign * np.concatenate([members, others])
    inside = np.arange(len(scores)) < len(members)
    found = _statistics(scores, inside, np.ones((1, len(scores))))[0]
    sizes = np.diff([*range(0, num_resamples, _RESAMPLES_AT_A_TIME), num_resamples]).tolist()
    drawn = np.concatenate(
        [
            _statistics(
                scores, inside, np.hstack([_resamples(len(each), size, generator) for each in (members, others)])
            )
            for size in sizes
        ]
    )
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    gap, auc, *rates = (Interval(*map(float, each)) for each in zip(found, low, high, strict=True))
    tpr = dict(zip(FALSE_POSITIVE_RATES, rates, strict=True))
    return Attack(
        gap,
        auc,
        tpr,
        {
            rate: guessing_p_value(
                round(each.value * len(members)), allowed_alarms(rate, len(others)), len(members), len(others)
            )
            for rate, each in tpr.items()
        },
        1 / len(others),
    )


def allowed_alarms(rate: float, num_others: int) -> int:
    """Return how many of the non-members may be taken for members at a false-positive rate."""
    return math.floor(rate * num_others + 1e-9)


def guessing_rate(rate: float, num_others: int) -> float:
    """Return the share of the members that guessing finds on average at a false-positive rate.

    Guessing ranks the images in a random order. Of M others k = floor(rate M) may stand above the threshold; before the
    (k + 1)th other a member stands with probability (k + 1) / (M + 1), which is more than the rate for few others.
    """
    return (allowed_alarms(rate, num_others) + 1) / (num_others + 1)


def guessing_p_value(found: int, allowed: int, num_members: int, num_others: int) -> float:
    """Return the probability that guessing finds as many members or more at a number of false alarms.

    Guessing ranks the images in a random order. A threshold that lets ``allowed`` others through finds ``found``
    members or more if at least that many of the first ``found + allowed`` images are members, which has a
    hypergeometric probability. It is exact for any number of images, which a bootstrap of so few is not, and too large,
    never too small, where scores are equal.

    Args:
        found: Members above the threshold.
        allowed: Others that may be.
        num_members: N.
        num_others: M, more than ``allowed``.
    """
    return float(hypergeom.sf(found - 1, num_members + num_others, num_members, found + allowed))


def roc(members: Floats, others: Floats, sign: int) -> tuple[Floats, Floats]:
    """Return false- and true-positive rates of every threshold, both rising from 0 to 1; see :func:`attack`."""
    truth = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    fpr, tpr, _ = roc_curve(truth, sign * np.concatenate([members, others]))
    return np.asarray(fpr), np.asarray(tpr)


def balanced(
    member_labels: Sequence[int], other_labels: Sequence[int], most: int, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Choose as many members as non-members of every class, so that no attack can guess by class or by numbers.

    Args:
        member_labels: Class of each member.
        other_labels: Class of each non-member.
        most: Images on either side, at most, about; the classes keep their proportions.
        generator: Makes the choice.

    Returns:
        Rows of the members and of the non-members, sorted.
    """
    sides = [np.asarray(member_labels), np.asarray(other_labels)]
    common = {label: int(min((side == label).sum() for side in sides)) for label in np.unique(sides[0])}
    share = min(1.0, most / max(1, sum(common.values())))
    chosen: list[list[int]] = []
    for side in sides:
        rows = [
            generator.permutation(np.nonzero(side == label)[0])[: max(1, round(share * count))]
            for label, count in common.items()
            if count
        ]
        chosen.append(sorted(np.concatenate(rows).tolist()) if rows else [])
    return chosen[0], chosen[1]


def _log_probabilities(
    logits: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    log_p = np.asarray(log_softmax(np.asarray(logits, dtype=np.float64), axis=1))
    return log_p, np.arange(len(log_p)), np.asarray(labels, dtype=np.int64)


def _log_complements(log_p: Floats) -> Floats:
    """Return log(1 - p) of log p, ``[N, K]``; rows of p sum to one."""
    of_image, largest = np.arange(len(log_p)), log_p.argmax(axis=1)
    others = log_p.copy()
    others[of_image, largest] = -np.inf
    p = np.exp(others)  # at most 1/2, where log1p is exact
    complements = np.log1p(-p)
    complements[of_image, largest] = logsumexp(others, axis=1)
    return np.asarray(complements)


def _resamples(number: int, size: int, generator: np.random.Generator) -> Floats:
    """How often each of ``number`` images is drawn in each of ``size`` bootstrap resamples, ``[size, number]``."""
    drawn = generator.integers(0, number, (size, number)) + number * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number).astype(np.float64)


def _statistics(scores: Floats, inside: npt.NDArray[np.bool_], counts: Floats) -> Floats:
    """Signed difference of means, AUC and the true-positive rates of many resamples at once, ``[R, 2 + rates]``.

    Args:
        scores: Score of each image, ``[N]``.
        inside: Whether it is a member, ``[N]``.
        counts: How often each image counts in each resample, ``[R, N]``.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.nonzero(np.diff(scores[order]))[0], len(scores) - 1)  # images of equal score fall together
    rates = []
    for side in (~inside, inside):
        found = (counts * side)[:, order].cumsum(axis=1)[:, ends]
        rates.append(np.pad(found / found[:, -1:], ((0, 0), (1, 0))))
    fpr, tpr = rates
    means = [(counts * side) @ scores / (counts * side).sum(axis=1) for side in (inside, ~inside)]
    return np.stack(
        [
            means[0] - means[1],
            np.trapezoid(tpr, fpr, axis=1),
            *(np.where(fpr <= rate + 1e-12, tpr, 0).max(axis=1) for rate in FALSE_POSITIVE_RATES),
        ],
        axis=1,
    )
