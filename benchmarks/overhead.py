"""What our checks cost: rounds of FedAvg in our strategy against rounds in Flower's own.

Both ask the same ClientApp, with the same data and model, through serialized messages in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.common import finish, parser, take_turns
from fgl_app.client_app import app
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.phases import initial_arrays, parameter_names
from strategies.rounds import CheckedRounds


class OneProcess(Grid):
    """Calls the ClientApp for each message, which is serialized and read back both ways."""

    def __init__(self, run_config: dict[str, Any], num_clients: int) -> None:
        """Make the nodes."""
        self._run_config = run_config
        self._num_clients = num_clients

    def set_run(self, run: object) -> None:
        """Not used by a strategy."""

    @property
    def run(self) -> Any:
        """Not used by a strategy."""
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Not used by a strategy."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return list(range(self._num_clients))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not used by a strategy."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not used by a strategy."""
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Call the ClientApp for each message."""
        replies = []
        for message in messages:
            received = message_from_proto(message_to_proto(message))
            node = received.metadata.dst_node_id
            place = {"partition-id": node, "num-partitions": self._num_clients}
            context = Context(1, node, place, RecordDict(), self._run_config)
            replies.append(message_from_proto(message_to_proto(app(received, context))))
        return replies


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
    for name in ("_run_id", "_node_id", "_task_id"):  # outside a runtime Flower's messages lack an identity
        setattr(TaskIdentity, name, 1)
    torch.manual_seed(0)
    run_config = default_run_config() | {"model": chosen.model, "num-clients": chosen.clients, "local-epochs": 1}
    settings = parse_run_config(run_config)
    names = settings.card.class_names()
    arrays, grid = initial_arrays(settings, names), OneProcess(run_config, chosen.clients)

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
        {
            "benchmark": "overhead",
            "options": {key: str(value) for key, value in vars(chosen).items()},
            "unit": "rounds",
            "contenders": rates,
            "ratio": rates["flower"]["per_second"] / rates["ours"]["per_second"],
        },
        chosen.json,
    )


if __name__ == "__main__":
    main()
