"""Screen what clients send back from a round: an update that breaks a rule is dropped, with its reason."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fgl_app.records import (
    ARRAYS,
    CLIENT,
    METRICS,
    NORM_BIT,
    NUM_EXAMPLES,
    evaluation_metrics,
    serialized_bytes,
    training_metrics,
)
from fgl_app.training import Evaluation
from strategies.extras import MAX_EXAMPLES, Extras
from strategies.updates import STATISTICS, values_of

MAX_LOSS = 1e9
"""Largest mean loss that a client may report, in nats; no cross-entropy, with or without FedProx's term, is below 0."""
_NPY_HEADER_BYTES = 4096
"""More than the header of any array in NumPy's format takes."""
_NO_MOVE = 1e-30
"""Squared norm of an update below which its norm in float32 may be 0."""
_MOST_GROWTH = {False: 10.0, True: 1000.0}
"""By how much local training may multiply the norm of the weights where `max-update-norm` is 0, and (True) in any case
that of BatchNorm's statistics: honest training stays far below, and what is above makes the mean useless, or NaN."""
_NO_EVALUATION = Evaluation(0.0, 0.0, 0, torch.zeros(0))
EVALUATED = evaluation_metrics(_NO_EVALUATION, _NO_EVALUATION)
"""Metrics of every answer to ``evaluate``, with values of the right types."""
_EVALUATED_RECORDS = {METRICS: MetricRecord, CLIENT: ConfigRecord}
_TRAINED_RECORDS = {ARRAYS: ArrayRecord, **_EVALUATED_RECORDS}
_NO_EXTRAS = Extras()


def trained_metrics(norm_bit: bool) -> MetricRecord:
    """Return the metrics of every answer to ``train``, with values of the right types."""
    return MetricRecord({**training_metrics(1, 0.0), **({NORM_BIT: 0} if norm_bit else {})})


def update_fault(
    reply: Message,
    sent: ArrayRecord,
    max_update_norm: float = 0.0,
    *,
    norm_bit: bool = False,
    must_move: bool = False,
    extras: Extras = _NO_EXTRAS,
) -> str | None:
    """Say what is wrong with a client's trained weights w_i.

    Args:
        reply: The client's answer to ``train``.
        sent: The weights w that it was sent; names, shapes and dtypes must be theirs.
        max_update_norm: Largest ||w_i - w||_2 over all floating-point arrays but BatchNorm's statistics, which move
            much farther than weights; with 0, ||w_i|| may be 10 times ||w||. The norm of the statistics may grow to
            1000 times what it was. Each ||w|| counts as 1 at least.
        norm_bit: Whether the client has to say if it clipped its update.
        must_move: Whether w_i must differ from w; Flower's clipping on the server divides by the norm.
        extras: What it may hold beside weights and the metrics of this application.

    Returns:
        The reason why it cannot be used, or None. It quotes nothing that the client sent but names of records and
        metrics, if they are such as code has.
    """
    fault = _metrics_fault(reply.content, trained_metrics(norm_bit), extras)
    if fault is not None:
        return fault
    try:
        size = serialized_bytes(reply)
    except Exception:  # of numbers and texts that Flower's messages cannot hold, but its JSON can
        return "records that are none of Flower's"
    arrays = reply.content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord) or set(arrays) != set(sent):
        return "arrays that are not the model's"
    fault = extras.size_fault(size, sum(len(array.data) for array in sent.values()))
    fault = fault or extras.records_fault(reply.content, _TRAINED_RECORDS)
    if fault is not None:
        return fault
    square = 0.0
    grown = {kind: [0.0, 0.0] for kind in _MOST_GROWTH}  # squares of the norms before and after
    for name, before in sent.items():
        expected, found = values_of(before), _readable(arrays[name], before)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            return "arrays that have not the model's shapes and types"
        if np.issubdtype(found.dtype, np.floating):
            told = _square_norm(found)  # where it is finite, one pass without a mask has shown that all are
            if not (math.isfinite(told) or np.isfinite(found).all()):
                return "weights that are not finite"
            if name.endswith("running_var") and (found < 0).any():
                return "variances below 0"
            statistic = name.endswith(STATISTICS)
            if (max_update_norm or must_move) and not statistic:
                with np.errstate(over="ignore"):  # what overflows is infinite, and above every norm
                    difference = found - expected
                    square += float(np.vdot(difference, difference))
            if statistic or not max_update_norm:
                squares = grown[statistic]
                squares[0] += _square_norm(expected)
                squares[1] += told
    if max_update_norm and math.sqrt(square) > max_update_norm:
        return "an update whose norm is above `max-update-norm`"
    for kind, (before_square, after_square) in grown.items():
        if after_square > _MOST_GROWTH[kind] ** 2 * max(1.0, before_square):
            return f"weights more than {_MOST_GROWTH[kind]:g} times as large as those that it was sent"
    if must_move and square < _NO_MOVE:
        return "weights that have not changed"
    return None


def num_examples_told(reply: Message) -> int | None:
    """Return how many images a client says it trained on, also where its update is refused; None if it does not say."""
    record = reply.content.get(METRICS) if reply.has_content() else None
    number = record.get(NUM_EXAMPLES) if isinstance(record, MetricRecord) else None
    fits = isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MAX_EXAMPLES
    return cast(int, number) if fits else None


def evaluation_fault(reply: Message, extras: Extras = _NO_EXTRAS) -> str | None:
    """Say what is wrong with a client's answer to ``evaluate``; None if nothing is."""
    fault = _metrics_fault(reply.content, EVALUATED, extras)
    fault = fault or extras.records_fault(reply.content, _EVALUATED_RECORDS)
    if fault is None:
        record = reply.content.metric_records[METRICS]
        if not all(0 <= cast(float, record[key]) <= 1 for key in ("accuracy", "validation_accuracy")):
            return "an accuracy that is none"
    return fault


def _metrics_fault(content: RecordDict, expected: MetricRecord, extras: Extras) -> str | None:
    """Compare a reply's metrics with a record that has every key; Flower stops the run if one lacks a key."""
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        return "no metrics"
    for key in sorted(set(expected) - set(record)):
        return f"metrics without `{key}`"
    if (fault := extras.metrics_fault(record, expected)) is not None:
        return fault
    for key, value in expected.items():
        found = record[key]
        if isinstance(found, bool) or not isinstance(found, int if isinstance(value, int) else int | float):
            return f"metrics of other types: `{key}`"
        if isinstance(found, float) and not math.isfinite(found):  # an int may be too large for a float
            return f"metrics that are not finite: `{key}`"
        if isinstance(value, float) and not 0 <= found <= MAX_LOSS:
            return "a loss or an accuracy that is out of range"
        if isinstance(value, int) and not (1 if key == NUM_EXAMPLES else 0) <= found <= MAX_EXAMPLES:
            return "a number of images that is out of range"
    return None


def _readable(array: Array, before: Array) -> np.ndarray | None:
    """Read an array, unless it is larger than the one that was sent."""
    if len(array.data) > len(before.data) + _NPY_HEADER_BYTES:
        return None
    try:
        return values_of(array)
    except Exception:  # whatever NumPy raises at bytes that are no array
        return None


def _square_norm(values: np.ndarray) -> float:
    """Return ||values||^2; infinite where that is too large for their type, NaN where one of them is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.vdot(values, values))
