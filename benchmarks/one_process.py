"""A Flower grid in one process, for measuring what the server and the messages cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from fgl_app.client_app import app


def identify_process() -> None:
    """Give Flower's messages the identity that they lack outside a runtime (private; flwr 1.41)."""
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)


class OneProcess:
    """The part of a Flower grid that strategies use: it calls the ClientApp for each message, serialized both ways."""

    def __init__(self, run_config: dict[str, Any], num_clients: int, num_partitions: int | None = None) -> None:
        """Make the nodes; with fewer partitions than clients, several clients hold the same one."""
        self._run_config = run_config
        self._num_clients = num_clients
        self._num_partitions = num_partitions or num_clients
        self._numbers = itertools.count()
        self._open: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Return the nodes."""
        return list(range(self._num_clients))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages, and name them as a SuperLink does."""
        names = []
        for message in messages:
            names.append(f"message-{next(self._numbers)}")
            message.metadata.__dict__["_message_id"] = names[-1]
            self._open[names[-1]] = message
        return names

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies to messages."""
        return self.pull_messages(self.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Call the ClientApp for each message."""
        replies = []
        for message_id in message_ids:
            received = message_from_proto(message_to_proto(self._open.pop(message_id)))
            node = received.metadata.dst_node_id
            place = {"partition-id": node % self._num_partitions, "num-partitions": self._num_partitions}
            context = Context(1, node, place, RecordDict(), self._run_config)
            replies.append(message_from_proto(message_to_proto(app(received, context))))
        return replies
