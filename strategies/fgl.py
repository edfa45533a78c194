"""Federated Generative Learning as a Flower strategy: a prompt round, then the rounds of any other strategy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fgl_app.data.images import ImageSet
from fgl_app.errors import RoundError
from fgl_app.prompts import MergedPrompts
from strategies.prompt_round import PromptRound
from strategies.rounds import CheckedRounds, Ledger

Synthesize = Callable[[MergedPrompts, Callable[[], None]], ImageSet]
Pretrain = Callable[[ArrayRecord, ImageSet], ArrayRecord]
Finetune = Callable[[int, ArrayRecord, ImageSet], ArrayRecord]


class FGL(CheckedRounds):
    """Round 1: prompts, synthesis, pre-training. Rounds 2 to R: the inner strategy, from those weights.

    Must be the outermost strategy, because Flower runs the ``start()`` of the outermost one only: ``FGL(DP(FedAvg()))``
    works, ``DP(FGL(FedAvg()))`` would skip the prompt round.

    Args:
        inner: Strategy of rounds 2 to R; ``FedAvg()`` if None.
        class_names: The K classes; empty for the union of the clients' classes.
        num_clients: Clients that must be connected when an exchange begins.
        prompt_round: Makes the exchange that asks the clients for their prompts.
        synthesize: Draws the synthetic set from the merged prompts, and calls its second argument now and then, which
            listens for late clients.
        pretrain: Trains the initial weights on the synthetic set (FGL, Section 3.3; its result is the one-shot model).
        finetune: Trains the aggregated weights of a round on the synthetic set ("R-round-syn"); None for none.
        prompts: Merged prompts of an earlier start of this run, or those that the server wrote itself (GPT-FL); then no
            client is asked.
        on_prompts: Called with the merged prompts before and after images are drawn from them.
        fraction_train: Share of the clients that train in a round.
        seed: Seed of their draw; None for a secret one.
        parameters: Names of the arrays that are trained; see :class:`CheckedRounds`.
        connect_timeout_s: Seconds to wait for the clients.
        min_clients: Quorum of connected clients and usable replies; see :class:`CheckedRounds`.
        max_update_norm: Largest L2 norm of a client's update; 0 for ten times that of the weights it was sent.
        rounds_done: 0, or the finished rounds of an earlier start; with 1 or more, ``start()`` takes their weights as
            its initial arrays and neither pre-trains nor evaluates them again.
        ledger: Is told what leaves the clients in the rounds; None for nobody.
        accept_extras: Whether clients may send more than this application reads; see :mod:`strategies.extras`.
    """

    def __init__(
        self,
        inner: Strategy | None = None,
        *,
        class_names: Sequence[str],
        num_clients: int,
        prompt_round: Callable[[Grid], PromptRound],
        synthesize: Synthesize,
        pretrain: Pretrain,
        finetune: Finetune | None = None,
        prompts: MergedPrompts | None = None,
        on_prompts: Callable[[MergedPrompts, PromptRound], None] = lambda merged, exchange: None,
        fraction_train: float = 1.0,
        seed: int | None = 0,
        parameters: Collection[str] | None = None,
        connect_timeout_s: float = 120.0,
        min_clients: int = 0,
        max_update_norm: float = 0.0,
        rounds_done: int = 0,
        ledger: Ledger | None = None,
        accept_extras: bool = True,
    ) -> None:
        """See the class."""
        super().__init__(
            inner if inner is not None else FedAvg(),
            num_clients=num_clients,
            class_names=class_names,
            fraction_train=fraction_train,
            seed=seed,
            parameters=parameters,
            connect_timeout_s=connect_timeout_s,
            min_clients=min_clients,
            max_update_norm=max_update_norm,
            rounds_done=rounds_done,
            ledger=ledger,
            accept_extras=accept_extras,
        )
        self._prompt_round = prompt_round
        self._synthesize = synthesize
        self._pretrain = pretrain
        self._finetune = finetune
        self._prompts = prompts
        self._on_prompts = on_prompts
        self._synthetic: ImageSet | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the prompt round and the server's phase, then Flower's own loop for the other rounds.

        Args:
            grid: Access to the clients.
            initial_arrays: Weights to pre-train from; if ``rounds_done`` > 0, those of the last finished round.
            num_rounds: R as the paper counts: 1 is one-shot, 5 is the prompt round and four rounds of the inner
                strategy.
            timeout: Seconds to wait for the replies of one exchange.
            train_config: Sent with every training message.
            evaluate_config: Sent with every evaluation message.
            evaluate_fn: Evaluates on the server after every round, from round 1, the one-shot model, on.

        Returns:
            The final arrays and the metrics of all rounds, numbered as the paper does.

        Raises:
            RoundError: If fewer clients than needed connect, or none succeeds in an exchange.
        """
        if self._prompts is None:
            self._synthetic = self._draw_while_listening(self._collect_prompts(grid))
        else:
            self.class_names = self._prompts.class_names
            self._synthetic = self._synthesize(self._prompts, lambda: None)
        arrays = initial_arrays
        if self.rounds_done == 0:
            arrays = self._pretrain(initial_arrays, self._synthetic)
            self._evaluate_on_clients(grid, arrays, evaluate_config or ConfigRecord(), timeout)
            self.rounds_done = 1
        result = super().start(
            grid,
            arrays,
            num_rounds - self.rounds_done,
            timeout,
            train_config,
            evaluate_config,
            None if evaluate_fn is None else lambda done, current: evaluate_fn(self.rounds_done + done, current),
        )
        if len(result.arrays) == 0:  # Flower fills it in its loop, which had no round to run
            result.arrays = arrays
        return _renumbered(result, self.rounds_done)

    def _collect_prompts(self, grid: Grid) -> PromptRound:
        """Ask every client for its prompts (FGL, Algorithm 1: the clients' part of round 1).

        Raises:
            RoundError: If fewer clients than the quorum connect, or send usable prompts.
        """
        nodes = self.wait_for_clients(grid)
        log(INFO, "[ROUND 1] asking %s clients for prompts", len(nodes))
        exchange = self._prompt_round(grid)
        exchange.ask(nodes)
        exchange.wait(self._quorum_of(exchange))
        self._check_quorum(exchange)
        return exchange

    def _quorum_of(self, exchange: PromptRound) -> int:
        return max(1, min(self._min_clients, exchange.num_asked))

    def _check_quorum(self, exchange: PromptRound) -> None:
        needed = self._quorum_of(exchange)
        if exchange.num_used < needed:
            raise RoundError(
                f"In the prompt round at least {needed} of {exchange.num_asked} clients must send usable prompts, but "
                f"{exchange.num_asked - exchange.num_used} of {exchange.num_asked} failed: "
                f"{' '.join(exchange.refusals.reasons()) or 'no client replied in time.'}"
            )

    def _draw_while_listening(self, exchange: PromptRound) -> ImageSet:
        """Draw the synthetic set; prompts that come before it is finished are merged, and what they add is drawn."""
        images, drawn_for = None, 0
        while images is None or drawn_for < exchange.num_used:
            found = exchange.merged()
            self._check_quorum(exchange)  # again, because merging may refuse a client's classes
            drawn_for = exchange.num_used
            self._on_prompts(found, exchange)
            self.class_names = found.class_names
            images = self._synthesize(found, exchange.listen)
            exchange.listen(ask=False)
        self._on_prompts(found, exchange)  # now it is known who missed it
        self._places |= exchange.refusals.places
        return images

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate as the inner strategy does, then fine-tune on the synthetic set if asked to."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and self._finetune is not None:
            assert self._synthetic is not None
            arrays = self._finetune(self.rounds_done + server_round, arrays, self._synthetic)
        return arrays, metrics

    def summary(self) -> None:
        """Log the server's phase and the inner strategy."""
        log(INFO, "\t├──> Federated Generative Learning, fine-tuning: %s", "on" if self._finetune else "off")
        super().summary()

    def _evaluate_on_clients(self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, timeout: float) -> None:
        """Evaluate the one-shot model where the inner strategy evaluates on clients; Flower's loop starts later."""
        questions = list(self.configure_evaluate(1, arrays, config, grid))
        if questions:
            self.aggregate_evaluate(1, grid.send_and_receive(questions, timeout=timeout))


def _renumbered(result: Result, offset: int) -> Result:
    """Number a result's rounds as the paper does: the loop's round r is round ``offset`` + r."""
    for metrics in (
        result.train_metrics_clientapp,
        result.evaluate_metrics_clientapp,
        result.evaluate_metrics_serverapp,
    ):
        shifted = {offset + number: value for number, value in metrics.items()}
        metrics.clear()
        metrics.update(shifted)
    return result
