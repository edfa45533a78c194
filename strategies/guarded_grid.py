"""The grid of a deployment, in which a reply that Flower cannot read is an error of its client and of nobody else."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterable
from typing import Any, cast

from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.message_pb2 import Message as Header
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.grid import HttpGrid

from strategies.refusals import UNREADABLE

_PATIENCE_S = 3.0
"""Seconds that one pull waits for objects on their way: as long as Flower's own loop sleeps between two of them."""
_POLL_S = 0.1
_MAX_OBJECTS = 100_000
"""Of one reply; each array of a model is two, and one more for every 5 MiB."""


def guarded(grid: Grid) -> Grid:
    """Return the grid such that no reply can break it; the simulation engine's as it is: nothing in it is parsed."""
    return cast(Grid, _GuardedGrid(grid)) if isinstance(grid, HttpGrid) else grid


class _GuardedGrid:
    """Asks for many replies at once, as Flower does, but has Flower read each of them by itself.

    The SuperLink checks a reply's header, that it answers a question to its sender, and deletes what it has passed on.
    All else is read here, from what the client made up: one exception of Flower's would lose the others' replies. And
    one whose objects are still on their way is left for the next time, where Flower would wait for them for minutes.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._arriving: dict[str, _OneReply] = {}
        """Replies whose header has come, by their question."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = set(message_ids)
        if unanswered := asked - self._arriving.keys():
            client = self._grid._runtime_client
            found = client.PullMessages(PullAppMessagesRequest(message_ids=unanswered))
            for header, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                if (question := header.metadata.reply_to_message_id) in unanswered:
                    self._arriving[question] = _OneReply(client, header, tree)
        patience_ends = time.monotonic() + _PATIENCE_S
        replies = self._read_whole(asked)
        while not asked.isdisjoint(self._arriving) and time.monotonic() < patience_ends:
            time.sleep(_POLL_S)
            replies += self._read_whole(asked)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self._arriving.clear()  # what an earlier exchange has not waited for
        # This pulls by our method, and sleeps between two pulls, also before it ends.
        replies = list(HttpGrid.send_and_receive(cast(HttpGrid, self), messages, timeout=timeout))
        return replies + self._read_whole(set(self._arriving))

    def _read_whole(self, asked: set[str]) -> list[Message]:
        """Read those replies to questions of ``asked`` of which all has come."""
        replies: list[Message] = []
        for question in [question for question in self._arriving if question in asked]:
            if self._arriving[question].may_be_whole():
                with contextlib.suppress(_NotAllThereError):
                    replies += self._read(self._arriving[question])
                    del self._arriving[question]
        return replies

    def _read(self, arriving: _OneReply) -> list[Message]:
        reader = copy.copy(self._grid)
        reader._client = cast(Any, arriving)
        true = metadata_from_proto(arriving.header.metadata)
        refused = make_message(true, error=Error(UNREADABLE))
        if arriving.num_objects > _MAX_OBJECTS:
            return [refused]
        try:
            replies = reader.pull_messages([true.reply_to_message_id])
        except Exception:
            if not arriving.confirmed:  # what comes before is the connection's fault
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


class _NotAllThereError(Exception):
    """An object of a reply has not reached the SuperLink."""


class _OneReply:
    """A client of the SuperLink, but that there is one new message, whose objects are kept until all have come."""

    def __init__(self, client: Any, header: Header, tree: ObjectTree) -> None:
        self._client = client
        self.header = header
        self._tree = tree
        self.num_objects = sum(1 for _ in iterate_object_tree(tree))
        self._fetched: dict[str, PullObjectResponse] = {}
        self._missing: PullObjectRequest | None = None
        self.confirmed = False
        """Whether all of the reply has come; Flower then reads it."""

    def may_be_whole(self) -> bool:
        """Ask for the object that was missing, and for no other, whether it has come."""
        if self._missing is None:
            return True
        found = self._client.PullObject(self._missing)
        if found.object_found and not found.object_available:
            return False
        self._missing = None
        return True

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        return PullAppMessagesResponse(messages_list=[self.header], message_object_trees=[self._tree])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        found = self._fetched.get(request.object_id) or self._client.PullObject(request)
        if found.object_found and not found.object_available:
            self._missing = request
            raise _NotAllThereError
        self._fetched[request.object_id] = found
        return cast(PullObjectResponse, found)

    def ConfirmMessageReceived(  # noqa: N802
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        answer = self._client.ConfirmMessageReceived(request)
        self.confirmed = True
        self._fetched.clear()
        return cast(ConfirmMessageReceivedResponse, answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)
