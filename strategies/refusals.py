"""What clients sent and the server did not use, by client and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from flwr.app import Message

from fgl_app.errors import ApprovalError, ConfigError, DataError, FGLError, ModelError, PromptError

UNREADABLE = 200
"""Code of the error that takes the place of a reply that Flower cannot read, or that answers no question of ours."""
WITHHELD = "Withheld, because it could tell who was drawn; the server's log has the reasons."
_ASTRAY = {  # Flower's own; see flwr.common.constant.ErrorCode
    3: "No reply came before the message expired.",
    4: "Its reply came too late.",
    5: "The SuperNode went away.",
}
_SENTENCES = (
    _ASTRAY
    | {
        8: "The client's process ended.",
        UNREADABLE: "Refused: records that are none of Flower's.",
    }
    | {
        error.client_code: error.client_sentence
        for error in (FGLError, ConfigError, DataError, ModelError, PromptError, ApprovalError)
    }
)


def error_sentence(reply: Message) -> str:
    """Return our own sentence for an error reply; the client's words may quote its files, and are not used."""
    return _SENTENCES.get(reply.error.code, f"Flower's error code {reply.error.code}.")


def went_astray(reply: Message) -> bool:
    """Return whether an error reply is Flower's own, of a client that did not fail, but was gone or too late."""
    return reply.error.code in _ASTRAY


class Refusals:
    """Counts refusals by client and reason. No reason quotes what a client sent, but names that code would have."""

    def __init__(self, places: dict[int, int] | None = None) -> None:
        """Begin with none.

        Args:
            places: Partition ids by node, as far as they are known; what is learned is added.
        """
        self._counts: Counter[tuple[int, str]] = Counter()
        self.places = {} if places is None else places

    def learn(self, node: int, place: int | None) -> None:
        """Remember the first partition id that a node says it has: by another one it would choose when it is drawn."""
        if place is not None:
            self.places.setdefault(node, place)

    def add(self, node: int, reason: str, count: int = 1) -> None:
        """Count ``count`` refusals."""
        self._counts[node, reason] += count

    def name_of(self, node: int) -> int:
        """Name a client by its partition id, or by Flower's id of its node where that is unknown."""
        return self.places.get(node, node)

    def names_of(self, nodes: Iterable[int]) -> dict[int, str]:
        """Name clients as :meth:`name_of` does, but by Flower's id where several nodes say that they have one place."""
        claims = Counter(self.places.values())
        return {node: str(node if claims[self.places.get(node, node)] > 1 else self.name_of(node)) for node in nodes}

    def rows(self, *, named: bool = True) -> list[dict[str, Any]]:
        """Return the refusals for ``results.json``; ``node`` is Flower's id, which a client cannot choose.

        Args:
            named: Whether rows say whose they are, and why. Without, one row counts them all: a reason tells who was
                drawn to anybody who knows whose images cannot be read.
        """
        if not named:
            count = sum(self._counts.values())
            return [{"client": None, "node": None, "reason": WITHHELD, "count": count}] if count else []
        return [
            {"client": self.places.get(node), "node": str(node), "reason": reason, "count": count}
            for (node, reason), count in sorted(self._counts.items())
        ]

    def reasons(self) -> list[str]:
        """Return the distinct reasons."""
        return sorted({reason for _, reason in self._counts})
