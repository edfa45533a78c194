"""The grid of a deployment, in which a reply that Flower cannot read is an error of its client and of nobody else."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ConfirmMessageReceivedResponse, ObjectTree
from flwr.proto.message_pb2 import Message as Header
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from strategies.refusals import UNREADABLE


def guarded(grid: Grid) -> Grid:
    """Return the grid such that no reply can break it; the simulation engine's as it is: nothing in it is parsed."""
    return cast(Grid, _GuardedGrid(grid)) if isinstance(grid, HttpGrid) else grid


class _GuardedGrid:
    """Asks for many replies at once, as Flower does, but has Flower read each of them by itself.

    The SuperLink checks a reply's header, that it answers a question to its sender, and deletes what it has passed on.
    All else is read here, from what the client made up: one exception of Flower's would lose the others' replies.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = set(message_ids)
        found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        return [
            reply
            for header, tree in zip(found.messages_list, found.message_object_trees, strict=True)
            if header.metadata.reply_to_message_id in asked
            for reply in self._read(header, tree)
        ]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return HttpGrid.send_and_receive(cast(HttpGrid, self), messages, timeout=timeout)  # which pulls by our method

    def _read(self, header: Header, tree: ObjectTree) -> list[Message]:
        one = PullAppMessagesResponse(messages_list=[header], message_object_trees=[tree])
        client = _OneReply(self._grid._runtime_client, one)
        reader = copy.copy(self._grid)
        reader._client = cast(Any, client)
        true = metadata_from_proto(header.metadata)
        refused = make_message(true, error=Error(UNREADABLE))
        try:
            replies = reader.pull_messages([true.reply_to_message_id])
        except Exception:
            if not client.confirmed:  # what comes before is the connection's fault
                raise
            return [refused]
        return [
            reply
            if reply.metadata.reply_to_message_id == true.reply_to_message_id
            # Flower answers for a lost node under an id of its own, with an error.
            and (reply.has_error() or reply.metadata.src_node_id == true.src_node_id)
            else refused
            for reply in replies
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class _OneReply:
    """A client of the SuperLink, but that it is asked for new messages no more: there is one that has come."""

    def __init__(self, client: Any, found: PullAppMessagesResponse) -> None:
        self._client = client
        self._found = found
        self.confirmed = False
        """Whether all of the reply has come; Flower then reads it."""

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        return self._found

    def ConfirmMessageReceived(  # noqa: N802
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        answer = self._client.ConfirmMessageReceived(request)
        self.confirmed = True
        return cast(ConfirmMessageReceivedResponse, answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)
