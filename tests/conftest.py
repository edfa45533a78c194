"""Fixtures: settings from the shipped defaults, and a grid that calls the real ClientApp through real serialization."""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import settings as hypothesis_settings

from fgl_app.config import default_run_config, parse_run_config
from fgl_app.settings import RunConfigValue, Settings

# What is found by chance is found at night; the same commit passes CI always or never.
hypothesis_settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True, database=None)
hypothesis_settings.register_profile("nightly", max_examples=10_000, deadline=None, derandomize=False)
hypothesis_settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole runs first: begun at the end, they would leave all other processes idle."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.fixture(scope="module", autouse=True)
def known_chance() -> Iterator[None]:
    """Draw from seeds what is no seed's, the noise of privacy: a test of it that passes once passes always."""
    seeds = itertools.count()
    np.random.seed(0)  # which Flower draws from
    drawn, default_rng = random.Random(0), np.random.default_rng
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed=None: default_rng(next(seeds) if seed is None else seed))
        patch.setattr(secrets, "randbits", drawn.getrandbits)
        yield


SMALL = {
    "image-size": 8,
    "model": "cnn",
    "images-per-class": 2,
    "num-inference-steps": 2,
    "server-epochs": 1,
    "server-finetune-epochs": 0,
    "local-epochs": 1,
    "num-clients": 3,
    "num-server-rounds": 2,
    "connect-timeout-s": 1,
    "prompt-deadline-s": 1,
}
"""Overrides that make a whole run take seconds."""


class FakeGrid(Grid):
    """Calls a ClientApp for each message, in a new order every time; every message is serialized and read back."""

    def __init__(self, app: ClientApp, run_config: dict[str, RunConfigValue], num_clients: int) -> None:
        self.app, self.run_config = app, run_config
        self.node_configs = {
            1000 + index: {"partition-id": index, "num-partitions": num_clients} for index in range(num_clients)
        }
        self.asked: list[str] = []
        self.reverse = False
        self.broken: set[int] = set()
        self.gone: set[int] = set()
        """Nodes that Flower has lost: it answers in their place."""
        self.silent = False
        self.late: set[int] = set()
        """Nodes that have not answered yet."""
        self._numbers = itertools.count()
        self._open: dict[str, Message] = {}

    def set_run(self, run: object) -> None:
        raise AssertionError("a strategy does not set the run")

    @property
    def run(self) -> object:
        raise AssertionError("a strategy does not read the run")

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise AssertionError("deprecated by Flower")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.node_configs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._numbers)}"
            self._open[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.reverse = not self.reverse
        ready = [
            message_id
            for message_id in sorted(set(message_ids) & set(self._open), reverse=self.reverse)
            if not self.silent and self._open[message_id].metadata.dst_node_id not in self.late
        ]
        return [self._call(self._open.pop(message_id)) for message_id in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _call(self, message: Message) -> Message:
        received = message_from_proto(message_to_proto(message))
        node = received.metadata.dst_node_id
        self.asked.append(received.metadata.message_type)
        if node in self.broken:
            return Message(Error(100, "a client's own words"), reply_to=received)
        if node in self.gone:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=received)
        context = Context(1, node, self.node_configs[node], RecordDict(), self.run_config)
        return message_from_proto(message_to_proto(self.app(received, context)))


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a runtime, Flower's messages need an identity of the process (private; flwr 1.41)."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def run_config(tmp_path: Path) -> dict[str, RunConfigValue]:
    return default_run_config() | SMALL | {"output-dir": str(tmp_path / "runs")}


@pytest.fixture
def settings(run_config: dict[str, RunConfigValue]) -> Settings:
    return parse_run_config(run_config)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_grid(run_config: dict[str, RunConfigValue]) -> Callable[..., FakeGrid]:
    from fgl_app.client_app import app

    def make(**overrides: RunConfigValue) -> FakeGrid:
        changed = run_config | {key.replace("_", "-"): value for key, value in overrides.items()}
        return FakeGrid(app, changed, int(changed["num-clients"]))

    return make
