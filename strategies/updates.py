"""What a round's weights say: how far the clients' updates point apart, and the types that an aggregation must keep."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord

STATISTICS = ("running_mean", "running_var")
"""How the names of BatchNorm's statistics end; nothing trains them, and they move much farther than weights."""
_CACHED_VALUES = 1 << 16
"""Values of each client that are compared at a time, which a CPU's cache holds."""


def trained_names(arrays: ArrayRecord) -> frozenset[str]:
    """Return the names of the floating-point arrays but for BatchNorm's statistics, which are known by their names."""
    return frozenset(
        name
        for name, array in arrays.items()
        if np.issubdtype(np.dtype(array.dtype), np.floating) and not name.endswith(STATISTICS)
    )


def values_of(array: Array) -> np.ndarray:
    """Read an array where it lies; ``Array.numpy`` would copy it, as often as it is called.

    Returns:
        A view that cannot be written to, with the shape and dtype that the data themselves tell.

    Raises:
        ValueError: If the data are no array of numbers in NumPy's format, version 1 or 2.
    """
    file = io.BytesIO(array.data)  # shares the bytes
    version = np.lib.format.read_magic(file)
    if array.stype != "numpy.ndarray" or version not in ((1, 0), (2, 0)):
        raise ValueError(f"An array must be in NumPy's format, version 1 or 2, but is {array.stype!r}, {version}.")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read_header(file)
    count = math.prod(shape)
    if dtype.hasobject or any(side < 0 for side in shape):
        raise ValueError("An array must hold numbers and have sides of 0 or more.")
    values = np.frombuffer(array.data, dtype, count, file.tell()) if count else np.empty(0, dtype)
    return values.reshape(shape, order="F" if by_columns else "C")


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
        before = values_of(array).ravel()
        if (parameters is not None and name not in parameters) or not np.issubdtype(before.dtype, np.floating):
            continue
        after = [values_of(arrays[name]).ravel() for arrays in received]
        for start in range(0, len(before), _CACHED_VALUES):
            part = slice(start, start + _CACHED_VALUES)
            total = np.zeros_like(before[part])
            for values in after:
                with np.errstate(over="ignore", invalid="ignore"):  # what overflows has no metrics, see below
                    update = values[part] - before[part]
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
        if array.dtype == dtype.name:
            restored[name] = array
        else:
            value = array.numpy()
            restored[name] = Array(np.asarray(np.rint(value) if np.issubdtype(dtype, np.integer) else value, dtype))
    return ArrayRecord(restored)
