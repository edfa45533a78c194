"""What Flower's server optimizers need besides Flower: trained arrays only, and a memory that outlives a restart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy import FedAvgM, QFedAvg, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fgl_app.errors import RoundError
from fgl_app.records import ARRAYS, METRICS

_MOMENTS = ("m_t", "v_t")
"""FedAdagrad's, FedAdam's and FedYogi's moments of the updates (Reddi et al. 2021, Algorithm 2)."""


def is_server_optimizer(strategy: Strategy) -> bool:
    """Return whether the strategy treats the mean update as a gradient.

    BatchNorm's running variance, moved like a weight, could become negative: such a strategy must see what is trained
    and nothing else.
    """
    return isinstance(strategy, FedOpt | FedAvgM | QFedAvg)


def begin_from_sent_arrays(strategy: Strategy) -> None:
    """Have the strategy begin the round from the arrays it is given.

    FedAvgM would go on from its own last arrays, whatever fine-tuning made of them.
    """
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = None


def only(arrays: ArrayRecord, names: Collection[str]) -> ArrayRecord:
    """Return the arrays of these names, in their order."""
    return ArrayRecord({name: array for name, array in arrays.items() if name in names})


def split_statistics(contents: Sequence[RecordDict], names: Collection[str]) -> list[RecordDict]:
    """Take the arrays that are not among the trained ``names`` out of the clients' replies.

    Returns:
        For each reply, the arrays taken with the metrics, as Flower's weighted mean wants them.
    """
    taken = []
    for content in contents:
        arrays = content.array_records[ARRAYS]
        rest = ArrayRecord({name: array for name, array in arrays.items() if name not in names})
        taken.append(RecordDict({ARRAYS: rest, METRICS: content.metric_records[METRICS]}))
        content[ARRAYS] = only(arrays, names)
    return taken


def join_statistics(
    arrays: ArrayRecord, statistics: Sequence[RecordDict], weighted_by: str, order: Sequence[str]
) -> ArrayRecord:
    """Put the mean of the clients' BatchNorm statistics beside the optimizer's new weights (FGL, Eq. 4).

    Args:
        arrays: What the optimizer made of the trained arrays.
        statistics: What :func:`split_statistics` took.
        weighted_by: Metric that is a client's weight.
        order: Names of all arrays.

    Raises:
        RoundError: If a client's reply lacks one of them.
    """
    mean = aggregate_arrayrecords(list(statistics), weighted_by)
    joined = {**arrays, **mean}
    if set(joined) != set(order) or any(set(item[ARRAYS]) != set(mean) for item in statistics):
        raise RoundError("Every client must return the arrays that it was sent, but at least one returned others.")
    return ArrayRecord({name: joined[name] for name in order})


def memory_of(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Return what a server optimizer of Flower remembers between rounds, moments or momentum; empty if nothing."""
    if isinstance(strategy, FedOpt):
        kept = {key: getattr(strategy, key) or {} for key in _MOMENTS}
        return {f"{key}/{name}": torch.from_numpy(np.array(v)) for key in _MOMENTS for name, v in kept[key].items()}
    if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
        vectors = enumerate(strategy.momentum_vector)
        return {f"momentum/{index}": torch.from_numpy(np.array(vector)) for index, vector in vectors}
    return {}


def restore_memory(strategy: Strategy, memory: Mapping[str, torch.Tensor]) -> None:
    """Give a server optimizer the memory of an earlier start; without any it begins anew."""
    if isinstance(strategy, FedOpt):
        for key in _MOMENTS:
            own = {
                name.removeprefix(f"{key}/"): value.numpy() for name, value in memory.items() if name.startswith(key)
            }
            setattr(strategy, key, own or None)
    elif isinstance(strategy, FedAvgM):
        vectors = [value for name, value in memory.items() if name.startswith("momentum/")]
        strategy.momentum_vector = [memory[f"momentum/{index}"].numpy() for index in range(len(vectors))] or None
