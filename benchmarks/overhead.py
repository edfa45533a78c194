"""What our checks cost: rounds of FedAvg in our strategy against rounds in Flower's own.

Both ask the same ClientApp, with the same data and model, through serialized messages in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from benchmarks.common import finish, parser, take_turns
from benchmarks.one_process import OneProcess, identify_process
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.phases import initial_arrays, parameter_names
from strategies.rounds import CheckedRounds


def rounds_of(make: Callable[[], Strategy], grid: Grid, arrays: Any, num_rounds: int) -> Callable[[], int]:
    """Return a function that runs rounds of a fresh strategy from the same weights."""

    def run() -> int:
        make().start(grid=grid, initial_arrays=arrays, num_rounds=num_rounds, train_config=ConfigRecord())
        return num_rounds

    return run


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--model", default="resnet18")
    options.add_argument("--clients", type=int, default=5)
    options.add_argument("--num-rounds", type=int, default=2)
    chosen = options.parse_args()
    identify_process()
    torch.manual_seed(0)
    run_config = default_run_config() | {
        "model": chosen.model,
        "num-clients": chosen.clients,
        "local-epochs": 1,
        "device": chosen.device,
    }
    settings = parse_run_config(run_config)
    names = settings.card.class_names()
    arrays, grid = initial_arrays(settings, names), cast(Grid, OneProcess(run_config, chosen.clients))

    def stock() -> Strategy:
        return FedAvg(fraction_evaluate=0.0)

    def ours() -> Strategy:
        return CheckedRounds(stock(), num_clients=chosen.clients, parameters=parameter_names(settings, names))

    rates = take_turns(
        {
            "flower": rounds_of(stock, grid, arrays, chosen.num_rounds),
            "ours": rounds_of(ours, grid, arrays, chosen.num_rounds),
        },
        chosen.rounds,
    )
    finish(
        "overhead",
        "rounds",
        chosen,
        contenders=rates,
        ratio=rates["flower"]["per_second"] / rates["ours"]["per_second"],
    )


if __name__ == "__main__":
    main()
