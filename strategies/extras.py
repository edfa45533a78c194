"""What a strategy of one's own may ask of its clients and keep over a restart, beside what this application knows of.

The strategy is handed to :class:`strategies.FGL` or :class:`strategies.CheckedRounds` as ``inner``. All of it is
optional::

    class Scaffold(FedAvg):
        extra_records = {"control": ArrayRecord}  # in each answer to "train", beside "arrays" and "metrics"
        extra_metrics = ("num-steps",)  # metrics that each answer to "train" must have, beside this application's;
                                         # that of `weighted_by_key` is one of them

        def memory(self):  # tensors by name, kept with each checkpoint
            return self.control

        def restore(self, memory):  # called before the first round of a resumed run
            self.control = dict(memory)

An ArrayRecord that clients were sent under the same name must come back with arrays of equal names, shapes and types;
those of any other are the strategy's to check. Other metrics may come undeclared: the strategy sees those that all
clients of an exchange sent, and the mean of each is recorded by round. Nothing of this is accepted where noise or
withheld counts protect what clients send.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import WARNING
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy

from fgl_app.errors import ConfigError, RoundError
from fgl_app.records import EQUAL_WEIGHT, METRICS, NUM_EXAMPLES
from strategies.differential_privacy import adds_noise
from strategies.updates import values_of

MAX_EXAMPLES = 10_000_000
"""Most images that a client may say it has."""
MAX_METRICS = 100
"""Most metrics of one reply beside those of this application."""
MAX_METRIC = 1e300
"""Largest absolute value of one; means of several stay finite."""
_RECORD_BYTES = 64 * 1024
"""A declared record may be as large as the model and this."""
_OWN = "own/"
"""Begins the names of a strategy's own tensors in the memory that is kept with a checkpoint."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,63}")


@runtime_checkable
class KeepsState(Protocol):
    """A strategy that remembers something between rounds, and says what."""

    def memory(self) -> Mapping[str, torch.Tensor]:
        """Return what the strategy remembers after a round."""

    def restore(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Go on with what :meth:`memory` returned after the last finished round of an earlier start."""


@dataclass(frozen=True)
class Extras:
    """What a client's reply may hold beside what this application knows of."""

    records: Mapping[str, type] = field(default_factory=dict)
    """Records that must be there, and their classes."""
    sent: Mapping[str, ArrayRecord] = field(default_factory=dict)
    """ArrayRecords that those of their names must be like."""
    metrics: frozenset[str] = frozenset()
    """Metrics that must be there."""
    weight: str = ""
    """The one of them that is a client's weight in the aggregation; empty where that is one of this application's."""
    accepted: bool = True
    """Whether there may be more metrics."""

    @classmethod
    def of(cls, strategy: Strategy, *, accepted: bool) -> Extras:
        """Return what a strategy declares for the answers to ``train``.

        Raises:
            ConfigError: If it declares something where nothing is accepted.
        """
        records: dict[str, type] = dict(getattr(strategy, "extra_records", {}))
        metrics = tuple(getattr(strategy, "extra_metrics", ()))
        key = getattr(strategy, "weighted_by_key", NUM_EXAMPLES)
        weight = "" if key in (NUM_EXAMPLES, EQUAL_WEIGHT) else str(key)
        metrics += (weight,) if weight and weight not in metrics else ()
        if (records or metrics) and not accepted:
            raise ConfigError(
                f"{type(strategy).__name__} asks clients for {(*records, *metrics)[0]!r}, which neither noise nor "
                "withheld counts would protect. Run it without `client-dp`, `example-dp-noise` and with "
                "prompt-counts=exact."
            )
        return cls(records, metrics=frozenset(metrics), weight=weight, accepted=accepted)

    def asked(self, questions: Sequence[Message]) -> Extras:
        """Return the same, but that an ArrayRecord must be like the one of its name in the questions to the clients."""
        sent = questions[0].content.array_records if questions else {}
        return replace(self, sent={name: record for name, record in sent.items() if name in self.records})

    def records_fault(self, content: RecordDict, known: Mapping[str, type]) -> str | None:
        """Say which record should not be there, is missing, or cannot be used; None if all is well.

        Args:
            content: Of the reply.
            known: Records that this application reads, and their classes.
        """
        for name in sorted({*content} - {*known, *self.records}):
            return f"a record {_shown(name)} that the strategy does not declare"
        for name, kind in {**known, **self.records}.items():
            if name in content and not isinstance(content[name], kind):
                return f"a record {_shown(name)} that is no {kind.__name__}"
        for name in self.records:
            if name not in content:
                return f"no record {_shown(name)}, which the strategy declares"
            if (fault := _record_fault(content[name], self.sent.get(name))) is not None:
                return f"{fault} in the record {_shown(name)}"
        return None

    def size_fault(self, num_bytes: int, model_bytes: int) -> str | None:
        """Say whether a reply with declared records is larger than as many models; None if it is not."""
        most = (len(self.records) + 1) * (model_bytes + _RECORD_BYTES)
        return "records that are larger than the model" if self.records and num_bytes > most else None

    def metrics_fault(self, record: MetricRecord, known: Collection[str]) -> str | None:
        """Say what is wrong with the metrics that are not among the ``known`` ones; None if nothing is."""
        for name in sorted(self.metrics - {*record}):
            return f"metrics without {_shown(name)}, which the strategy declares"
        more = sorted({*record} - {*known})
        if more and not self.accepted:
            return f"a metric {_shown(more[0])}, which neither noise nor withheld counts protect"
        if len(more) > MAX_METRICS:
            return f"more than {MAX_METRICS} metrics beside those of this application"
        for name in more:
            value = record[name]
            if not _NAME.fullmatch(name):
                return f"a metric {_shown(name)}"
            if isinstance(value, bool) or not isinstance(value, int | float):
                return f"a metric {_shown(name)} that is not one number"
            if not abs(value) <= MAX_METRIC:
                return f"a metric {_shown(name)} that is not finite, or larger than {MAX_METRIC:g}"
            if name == self.weight and not 0 < value <= MAX_EXAMPLES:
                return f"a weight {_shown(name)} that is not above 0 and at most {MAX_EXAMPLES:,}"
        return None


def take_means(contents: Sequence[RecordDict], known: Collection[str], weighted_by: str) -> dict[str, float]:
    """Return the mean of each further metric, and take those out that not all replies have.

    Flower aggregates nothing where the replies differ in their metrics.

    Args:
        contents: Replies that :class:`Extras` found no fault with.
        known: Metrics of this application.
        weighted_by: Metric that is a client's weight in the means; where not all have it, as in the answers to
            ``evaluate``, the number of images is.
    """
    records = [content.metric_records[METRICS] for content in contents]
    weighted_by = weighted_by if all(weighted_by in record for record in records) else NUM_EXAMPLES
    means = {}
    for name in sorted({name for record in records for name in record} - {*known}):
        having = [record for record in records if name in record]
        weights = [float(cast(float, record[weighted_by])) for record in having]
        values = [float(cast(float, record[name])) for record in having]
        total = sum(weights) or 1.0  # nobody has a test image
        means[name] = math.fsum(weight / total * value for weight, value in zip(weights, values, strict=True))
        if len(having) < len(records):
            for record in having:
                del record[name]
    return means


def memory_of(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Return copies of what a strategy of one's own says that it remembers; empty if it says nothing.

    Raises:
        RoundError: If that is anything but tensors by name.
    """
    own = _wrapped(strategy)
    if not isinstance(own, KeepsState):
        return {}
    kept = dict(own.memory())
    for name, value in kept.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise RoundError(
                f"memory() of {type(own).__name__} returned {type(value).__name__} under {name!r}; it must return "
                "tensors by name."
            )
    return {_OWN + name: value.detach().cpu().clone().contiguous() for name, value in kept.items()}


def restore_memory(strategy: Strategy, memory: Mapping[str, torch.Tensor]) -> None:
    """Give a strategy of one's own back what :func:`memory_of` returned after the last finished round."""
    own = _wrapped(strategy)
    kept = {name.removeprefix(_OWN): value for name, value in memory.items() if name.startswith(_OWN)}
    if kept and isinstance(own, KeepsState):
        own.restore(kept)


def warn_if_forgetful(strategy: Strategy) -> None:
    """Warn that a strategy of one's own says nothing of its state, which a resumed run would lose."""
    own = _wrapped(strategy)
    if not isinstance(own, KeepsState) and not type(own).__module__.startswith(("flwr.", "strategies.")):
        log(
            WARNING,
            "%s has no memory() and restore(): if it remembers anything between rounds, a resumed run begins without "
            "it; see strategies/extras.py",
            type(own).__name__,
        )


def _wrapped(strategy: Strategy) -> Strategy:
    return strategy.strategy if adds_noise(strategy) else strategy


def _shown(name: str) -> str:
    """Quote a name that a client may have chosen, if it is one that code would have and no text."""
    return f"`{name}`" if _NAME.fullmatch(name) else "whose name is not 1 to 64 letters, digits and any of _ . / -"


def _record_fault(record: ArrayRecord | MetricRecord | ConfigRecord, sent: ArrayRecord | None) -> str | None:
    if isinstance(record, MetricRecord):
        values = (value if isinstance(value, list) else [value] for value in record.values())
        return None if all(math.isfinite(number) for numbers in values for number in numbers) else "infinite metrics"
    if isinstance(record, ConfigRecord):
        return None
    if sent is not None and set(record) != set(sent):
        return "other arrays than were sent"
    for name, array in record.items():
        try:
            found = values_of(array)
            like = found if sent is None else values_of(sent[name])
        except Exception:  # whatever NumPy raises at bytes that are no array
            return "arrays that cannot be read"
        if found.shape != like.shape or found.dtype != like.dtype:
            return "arrays of other shapes and types than were sent"
        if found.dtype.kind not in "fiub" or not np.isfinite(found).all():
            return "arrays that are not finite numbers"
    return None
