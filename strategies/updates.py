"""What a round's weights say: how far the clients' updates point apart, and the types that an aggregation must keep."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord


def update_metrics(
    sent: ArrayRecord, received: Sequence[Mapping[str, Array]], parameters: Collection[str] | None = None
) -> dict[str, float]:
    """Measure how far the clients' updates d_i = w_i - w point in different directions.

    Args:
        sent: The weights w that the clients began with.
        received: The weights w_i of each of M clients.
        parameters: Names of the arrays that count; None for all.

    Returns:
        ``gradient_diversity``: sum_i ||d_i||^2 / ||sum_i d_i||^2 (Yin et al. 2018, arXiv 1706.05699, Definition 1), 1/M
        for equal updates and 1 for orthogonal ones; ``client_drift``: sqrt(1/M sum_i ||w_i - mean_j w_j||^2).
    """
    squares, square_of_sum = 0.0, 0.0
    for name, array in sent.items():
        before = array.numpy()
        if (parameters is not None and name not in parameters) or not np.issubdtype(before.dtype, np.floating):
            continue
        total = np.zeros_like(before)
        for arrays in received:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows has no metrics, see below
                update = arrays[name].numpy() - before
                squares += float(np.vdot(update, update))
                total += update
        square_of_sum += float(np.vdot(total, total))
    if not received or square_of_sum == 0 or not math.isfinite(squares):
        return {}
    count = len(received)
    drift = math.sqrt(max(0.0, squares / count - square_of_sum / count**2))
    return {"gradient_diversity": squares / square_of_sum, "client_drift": drift}


def restore_integers(arrays: ArrayRecord, dtypes: dict[str, str]) -> ArrayRecord:
    """Give arrays that were integers before the aggregation their type back, rounded to the nearest.

    Args:
        arrays: Aggregated arrays, whatever dtype the mean gave them.
        dtypes: NumPy dtype of each array before.
    """
    restored: dict[str, Array] = {}
    for name, array in arrays.items():
        dtype = np.dtype(dtypes.get(name, array.dtype))
        value = array.numpy()
        if np.issubdtype(dtype, np.integer):
            restored[name] = Array(np.asarray(np.rint(value), dtype))
        else:
            restored[name] = Array(np.asarray(value, dtype))
    return ArrayRecord(restored)
