"""Strategies that choose clients by the distances between them, such as Krum, choose by what the clients trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from logging import INFO

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import Bulyan, MultiKrum, Strategy
from flwr.serverapp.strategy.multikrum import select_multikrum

from fgl_app.errors import RoundError
from fgl_app.records import ARRAYS, METRICS
from strategies.updates import values_of

SelectionRule = Callable[[list[RecordDict], int, int], list[RecordDict]]
"""Flower's: from the contents of replies, the number of hostile clients and the number to choose, the chosen ones."""


def aggregate_train(
    strategy: Strategy, server_round: int, replies: Sequence[Message], sent: ArrayRecord, names: Collection[str]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Have the strategy aggregate the replies; Krum, MultiKrum and Bulyan choose by the updates of the trained arrays.

    Flower measures their distances over all arrays. Of a model with BatchNorm these are mostly differences between the
    numbers of batches, and between running means and variances: whoever trains for as many steps as most others is
    then near to all, whatever its weights are. The statistics of a chosen client go with its weights.

    Distances between updates are those between weights. But Flower computes them from squared norms, and those of the
    weights are so large that in float32 small updates are lost in rounding.

    Args:
        strategy: Any strategy.
        server_round: Number of the round.
        replies: Usable replies with whole models.
        sent: The weights that the clients began with.
        names: Names of the arrays that are trained.
    """
    if isinstance(strategy, Bulyan):
        rule = strategy.selection_rule
        strategy.selection_rule = _by_updates(rule, sent, names)
        try:
            return strategy.aggregate_train(server_round, replies)
        finally:
            strategy.selection_rule = rule
    if isinstance(strategy, MultiKrum) and type(strategy).aggregate_train is MultiKrum.aggregate_train:
        choose = _by_updates(select_multikrum, sent, names)
        contents = [reply.content for reply in replies]
        chosen = choose(contents, strategy.num_malicious_nodes, strategy.num_nodes_to_select)
        log(INFO, "round %s: %s aggregates %s of %s updates", server_round, type(strategy).__name__, len(chosen),
            len(replies))  # fmt: skip
        replies = [reply for reply in replies if any(reply.content is content for content in chosen)]
    return strategy.aggregate_train(server_round, replies)


def _by_updates(rule: SelectionRule, sent: ArrayRecord, names: Collection[str]) -> SelectionRule:
    """Return the rule that sees the updates of the trained arrays, and chooses among the whole contents."""
    trained = [name for name in sent if name in names]

    def updates_of(content: RecordDict) -> RecordDict:
        arrays = content.array_records[ARRAYS]
        updates = {name: Array(np.asarray(values_of(arrays[name]) - values_of(sent[name]))) for name in trained}
        return RecordDict({ARRAYS: ArrayRecord(updates), METRICS: content.metric_records[METRICS]})

    def choose(contents: list[RecordDict], num_malicious: int, num_selected: int) -> list[RecordDict]:
        seen = [updates_of(content) for content in contents]
        places = {id(update): place for place, update in enumerate(seen)}
        chosen = [places.get(id(update)) for update in rule(seen, num_malicious, num_selected)]
        if None in chosen:
            raise RoundError("`selection_rule` of Bulyan must return some of the contents it got, but returned others.")
        return [contents[place] for place in chosen if place is not None]

    return choose
