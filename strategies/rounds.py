"""Rounds of any Flower strategy that cannot fail in silence, and that give the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fgl_app.errors import ConfigError, DataError, FGLError, ModelError, PromptError, RoundError
from fgl_app.records import reply_order, serialized_bytes

_SENTENCES = {
    error.client_code: error.client_sentence for error in (FGLError, ConfigError, DataError, ModelError, PromptError)
}


@dataclass
class Traffic:
    """Bytes that clients uploaded, counted on the serialized Flower messages."""

    model_bytes: list[int] = field(default_factory=list)
    """Size of each reply to a training message."""
    prompt_bytes: list[int] = field(default_factory=list)
    """Size of each reply to the prompt message."""
    prompt_payload_bytes: list[int] = field(default_factory=list)
    """Size of the packed prompts alone in each of them."""


class CheckedRounds(Strategy):
    """Run the rounds of an inner strategy, whatever it is, and check what Flower leaves unchecked.

    * A round in which no client trained ends the run with the reasons; Flower would go on with the old weights.
    * Replies are put into the order of their partition ids, so that floating-point sums do not depend on who was first.
    * Integer buffers, such as BatchNorm's ``num_batches_tracked``, come back as integers. BatchNorm's running mean and
      variance are averaged like every other array (FGL, Eq. 4: the whole state dict).
    * Rounds are numbered on from ``rounds_done``, so that a resumed run sends the numbers it would have sent.
    """

    def __init__(self, inner: Strategy, *, rounds_done: int = 0) -> None:
        """Wrap ``inner``; ``rounds_done`` rounds came before the first one."""
        self.inner = inner
        self.rounds_done = rounds_done
        self.traffic = Traffic()
        self.train_metrics: dict[int, MetricRecord] = {}
        """What the inner strategy made of the clients' training metrics, by round."""
        self.client_metrics: dict[int, MetricRecord] = {}
        """What the inner strategy made of the clients' evaluation metrics, by round."""
        self._dtypes: dict[str, str] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the round, numbered from the start of the run."""
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        return self.inner.configure_train(self.rounds_done + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the inner strategy aggregate the sorted replies.

        Raises:
            RoundError: If no client trained, or the inner strategy aggregated nothing.
        """
        number = self.rounds_done + server_round
        ordered = self.usable_replies(f"training round {number}", replies)
        self.traffic.model_bytes += [serialized_bytes(reply) for reply in ordered if reply.has_content()]
        arrays, metrics = self.inner.aggregate_train(number, ordered)
        if arrays is None or len(arrays) == 0:
            raise RoundError(f"Training round {number} must give new weights, but the strategy aggregated none.")
        if metrics is not None:
            self.train_metrics[number] = metrics
        return restore_integers(arrays, self._dtypes), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the evaluation by clients, if it wants one."""
        return self.inner.configure_evaluate(self.rounds_done + server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the inner strategy aggregate the clients' metrics and keep them.

        Raises:
            RoundError: If clients were asked and none could evaluate.
        """
        number = self.rounds_done + server_round
        replies = list(replies)
        if not replies:
            return None
        metrics = self.inner.aggregate_evaluate(number, self.usable_replies(f"evaluation round {number}", replies))
        if metrics is not None:
            self.client_metrics[number] = metrics
        return metrics

    def summary(self) -> None:
        """Log the inner strategy."""
        log(INFO, "\t├──> Rounds of %s, from round %s on", type(self.inner).__name__, self.rounds_done + 1)
        self.inner.summary()

    def usable_replies(self, exchange: str, replies: Iterable[Message]) -> list[Message]:
        """Sort the replies and log the failures.

        Args:
            exchange: What was asked, for messages.
            replies: All replies, in any order.

        Returns:
            All replies in reproducible order; those with an error are the inner strategy's business.

        Raises:
            RoundError: If none has content.
        """
        ordered = sorted(replies, key=reply_order)
        failures = [reply for reply in ordered if reply.has_error()]
        reasons = sorted({_reason(reply) for reply in failures})
        if len(failures) == len(ordered):
            raise RoundError(
                f"In {exchange} at least one client must succeed, but {len(failures)} of {len(ordered)} failed: "
                f"{' '.join(reasons) or 'no client replied in time.'}"
            )
        if failures:
            log(WARNING, "%s: %s of %s clients failed: %s", exchange, len(failures), len(ordered), " ".join(reasons))
        return ordered


def restore_integers(arrays: ArrayRecord, dtypes: dict[str, str]) -> ArrayRecord:
    """Give arrays that were integers before the aggregation their type back, rounded to the nearest.

    Args:
        arrays: Aggregated arrays, whatever dtype the mean gave them.
        dtypes: NumPy dtype of each array before.
    """
    restored: dict[str, Array] = {}
    for name, array in arrays.items():
        dtype = np.dtype(dtypes.get(name, array.dtype))
        value = array.numpy()
        if np.issubdtype(dtype, np.integer):
            restored[name] = Array(np.asarray(np.rint(value), dtype))
        else:
            restored[name] = Array(np.asarray(value, dtype))
    return ArrayRecord(restored)


def wait_for_clients(grid: Grid, num_clients: int, timeout_s: float, sleep: Callable[[float], None]) -> list[int]:
    """Wait until ``num_clients`` nodes are connected.

    Raises:
        RoundError: If fewer are connected after ``timeout_s`` seconds.
    """
    waited = 0.0
    while len(nodes := sorted(grid.get_node_ids())) < num_clients:
        if waited >= timeout_s:
            raise RoundError(
                f"`num-clients` is {num_clients}, but after {timeout_s:g} s only {len(nodes)} were connected. Start "
                f"the missing SuperNodes (in simulation: --federation-config num-supernodes={num_clients}) or lower it."
            )
        sleep(0.5)
        waited += 0.5
    return nodes


def _reason(reply: Message) -> str:
    code = reply.error.code
    # Flower passes a client's text on word for word; only our own sentences are shown.
    return _SENTENCES.get(code, f"Flower's error code {code}.")
