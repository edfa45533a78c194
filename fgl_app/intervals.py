"""Confidence intervals over the seeds of an experiment."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

LEVEL = 0.95
"""Confidence level of every interval that tables show."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def of_mean(values: Sequence[float]) -> Interval:
    """Return the mean of a sample with Student's interval: mean ± t(S - 1) s / sqrt(S).

    It holds its level if the values are independent and about normal. With three values t is 4.3, so that only
    differences far above their spread are told from zero.

    Args:
        values: One value for each of S seeds, S at least 2.
    """
    mean, half = statistics.fmean(values), 0.0
    if deviation := statistics.stdev(values):
        half = float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
