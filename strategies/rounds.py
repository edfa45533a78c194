"""Rounds of any Flower strategy that cannot fail in silence, and that give the same bytes every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Protocol, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fgl_app.errors import RoundError
from fgl_app.records import (
    ARRAYS,
    CLASS_NAMES,
    EQUAL_WEIGHT,
    MAX_CLIENTS,
    METRICS,
    NUM_EXAMPLES,
    PLACE_MESSAGE,
    arrays_bytes,
    num_unreadable_of,
    place_of,
    serialized_bytes,
)
from fgl_app.rng import numpy_generator
from strategies import distances, extras
from strategies.differential_privacy import adds_noise, calibrate, norm_memory, reports_clipping, restore_norm
from strategies.participation import num_sampled, only_nodes
from strategies.refusals import Refusals, error_sentence
from strategies.screening import EVALUATED, evaluation_fault, num_examples_told, trained_metrics, update_fault
from strategies.server_optimizers import (
    begin_from_sent_arrays,
    is_server_optimizer,
    join_statistics,
    memory_of,
    only,
    restore_memory,
    split_statistics,
)
from strategies.updates import restore_integers, trained_names, update_metrics


class Ledger(Protocol):
    """Remembers what leaves the clients, for the accountant of differential privacy."""

    def asked_to_train(self, server_round: int, drawn: tuple[int, int], places: Collection[int] | None) -> None:
        """Note, before they are asked, that clients will be asked to train.

        Args:
            server_round: Number of the round.
            drawn: How many clients, and of how many they were drawn.
            places: The partition ids that they say they have; None where all are asked.
        """

    def told(self, num_examples: Collection[int]) -> None:
        """Note the numbers of training images that clients told, whether or not their updates can be used."""


class CheckedRounds(Strategy):
    """Run the rounds of an inner strategy, whatever it is, and check what Flower leaves unchecked.

    * A round in which fewer clients than the quorum trained ends the run with the reasons; Flower would go on with the
      old weights.
    * Replies are untrusted: one that breaks a rule of :mod:`strategies.screening` is dropped, with its reason.
    * Replies are put into the order of their partition ids, so that floating-point sums do not depend on who was first.
    * Integer buffers, such as BatchNorm's ``num_batches_tracked``, come back as integers. BatchNorm's running mean and
      variance are averaged like every other array (FGL, Eq. 4: the whole state dict), also beside a server optimizer,
      which sees the trained arrays only. Krum, MultiKrum and Bulyan choose clients by the trained arrays.
    * With ``fraction_train`` below 1 the clients of a round are drawn from the seed and the round's number; Flower
      would draw them from a global generator and node ids that differ in every run.
    * Clients may send more than this application reads, where :mod:`strategies.extras` allows it.
    * Rounds are numbered on from ``rounds_done``, so that a resumed run sends the numbers it would have sent.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        num_clients: int,
        class_names: Sequence[str] = (),
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
        """Wrap ``inner``.

        Args:
            inner: Any Flower strategy.
            num_clients: Clients that must be connected when an exchange begins.
            class_names: The label space, sent with every message to clients that hold folders of their own.
            fraction_train: Share of the clients, rounded up, that train in a round; the inner strategy's own share
                must be 1 and its least number of nodes at most as many.
            seed: Seed of their draw; None for a secret one, which differential privacy counts on.
            parameters: Names of the arrays that are trained, which alone count in distances between clients and reach a
                server optimizer; None for all floating-point arrays but those named as BatchNorm's statistics are.
            connect_timeout_s: Seconds to wait for them; Flower's own strategies would wait for ever.
            min_clients: Quorum: so many must be connected when that time is over, and so many usable replies must come,
                or all where fewer are asked. 0: all of ``num_clients`` must be connected, and one usable reply is
                enough.
            max_update_norm: Largest L2 norm of a client's update; 0 for ten times that of the weights it was sent.
            rounds_done: Rounds that came before the first one.
            ledger: Is told what leaves the clients; None for nobody.
            accept_extras: Whether clients may send metrics and records beside those of this application; never where
                the inner strategy adds noise, which would not cover them.

        Raises:
            ConfigError: If they may not, but the inner strategy asks for some.
        """
        self.inner = inner
        self._extras = extras.Extras.of(inner, accepted=accept_extras and not adds_noise(inner))
        extras.warn_if_forgetful(inner)
        self.rounds_done = rounds_done
        self._ledger = ledger
        self._num_clients = num_clients
        self.class_names: tuple[str, ...] = tuple(class_names)
        self._fraction_train = fraction_train
        self._seed = seed
        self._secret_draw = seed is None and fraction_train < 1
        """Whether differential privacy relies on nobody's learning who was drawn: what is kept must not tell."""
        self._parameters = parameters
        self._splits_statistics = is_server_optimizer(inner)
        self._trained: Collection[str] = ()
        self._places: dict[int, int] = {}
        self._sent: ArrayRecord | None = None
        self._connect_timeout_s = connect_timeout_s
        self._min_clients = min_clients
        self._waited_for_all = False
        self._max_update_norm = max_update_norm
        self._asked: dict[str, list[Message]] = {}
        self.model_bytes: dict[int, list[int]] = {}
        """Size of each usable reply to the training messages of a round, as Flower serializes it, by round. Where the
        draw is secret, the size of the arrays that were sent: the size of a reply depends on its sender."""
        self.client_metrics: dict[int, MetricRecord] = {}
        """What the inner strategy made of the clients' evaluation metrics, by round."""
        self.extra_metrics: dict[int, dict[str, dict[str, float]]] = {}
        """Means of the metrics that clients sent beside those of this application, by round, exchange and name."""
        self.client_accuracy: dict[int, dict[str, float]] = {}
        """Accuracy that each client measured on test images of its own, 0 to 1, by round and client."""
        self.update_metrics: dict[int, dict[str, float]] = {}
        """Diversity and drift of the clients' updates, by round; empty where noise is to hide the updates."""
        self.draws: dict[int, tuple[int, int]] = {}
        """Clients that were asked to train in a round, and of how many they were drawn, by round."""
        self.refusals: dict[int, Refusals] = {}
        """What clients sent in a round and was not used, by round."""
        self.unreadable_images: dict[int, dict[str, int]] = {}
        """Files that clients who trained in a round could not read, by round and client."""
        self._unreadable_told: dict[str, int] = {}
        self._dtypes: dict[str, str] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the round, numbered from the start of the run.

        Raises:
            RoundError: If fewer clients than needed are connected.
        """
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        self._sent = arrays
        self._trained = trained_names(arrays) if self._parameters is None else self._parameters
        number = self.rounds_done + server_round
        config = self._with_label_space(config)
        begin_from_sent_arrays(self.inner)
        nodes = self.wait_for_clients(grid)
        self.draws[number] = len(nodes), len(nodes)
        places: list[int] | None = None
        if self._fraction_train < 1:
            nodes, population = self._draw_clients(grid, nodes, number)
            self.draws[number] = len(nodes), population
            places = [self._places[node] for node in nodes]
        # Flower's sampling would wait without end for a node that has left since.
        grid = only_nodes(grid, lambda: nodes)
        if self._splits_statistics:
            messages = list(self.inner.configure_train(number, only(arrays, self._trained), config, grid))
            for message in messages:
                message.content[ARRAYS] = arrays
        else:
            messages = list(self.inner.configure_train(number, arrays, config, grid))
        self._asked["train"] = messages
        if self._ledger is not None:
            self._ledger.asked_to_train(number, self.draws[number], places)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the inner strategy aggregate the sorted replies.

        Raises:
            RoundError: If fewer clients than the quorum trained, or the inner strategy aggregated nothing.
        """
        number = self.rounds_done + server_round
        sent = self._sent
        assert sent is not None
        replies = list(replies)
        if self._ledger is not None:
            told = (num_examples_told(reply) for reply in replies)
            self._ledger.told({count for count in told if count is not None})
        norm_bit, private = reports_clipping(self.inner), adds_noise(self.inner)
        asked = self._extras.asked(self._asked["train"])
        ordered = self.usable_replies(
            number,
            "train",
            replies,
            lambda reply: update_fault(
                reply, sent, self._max_update_norm, norm_bit=norm_bit, must_move=private, extras=asked
            ),
        )
        if self._secret_draw:
            self.model_bytes[number] = [arrays_bytes(ARRAYS, sent)] * len(ordered)
        else:
            self.model_bytes[number] = [serialized_bytes(reply) for reply in ordered]
        self._note_unreadable(number, ordered)
        contents = [reply.content for reply in ordered]
        for content in contents:
            arrays = content.array_records[ARRAYS]  # Flower's clipping goes by places, not by names
            content[ARRAYS] = ArrayRecord({name: arrays[name] for name in sent})
            # The weight of the unweighted mean is not the client's to choose.
            content.metric_records[METRICS][EQUAL_WEIGHT] = 1
        self._keep_extra_metrics(number, "train", contents, trained_metrics(norm_bit))
        updates = [content.array_records[ARRAYS] for content in contents]
        if adds_noise(self.inner):  # what is measured on the updates themselves would tell of them
            calibrate(self.inner, len(ordered))
        else:
            self.update_metrics[number] = update_metrics(sent, updates, self._trained)
        statistics = split_statistics(contents, self._trained) if self._splits_statistics else []
        new, metrics = distances.aggregate_train(self.inner, number, ordered, sent, self._trained)
        if new is None or len(new) == 0:
            raise RoundError(f"Training round {number} must give new weights, but the strategy aggregated none.")
        if statistics:
            assert isinstance(self.inner, FedAvg)
            new = join_statistics(new, statistics, self.inner.weighted_by_key, list(self._dtypes))
        # Flower logs these means, on which there is no noise: of the losses and of who clipped its update.
        return restore_integers(new, self._dtypes), None if private else metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the evaluation by clients, if it wants one."""
        config = self._with_label_space(config)
        # Nobody is waited for where no client evaluates: the round would be lost for one that has left.
        waiting = only_nodes(grid, lambda: self.wait_for_clients(grid))
        questions = list(self.inner.configure_evaluate(self.rounds_done + server_round, arrays, config, waiting))
        self._asked["evaluate"] = questions
        return questions

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the inner strategy aggregate the clients' metrics and keep them.

        Raises:
            RoundError: If clients were asked and fewer than the quorum could evaluate.
        """
        number = self.rounds_done + server_round
        if not self._asked["evaluate"]:
            return None
        accepted = extras.Extras(accepted=self._extras.accepted)
        ordered = self.usable_replies(number, "evaluate", replies, lambda reply: evaluation_fault(reply, accepted))
        self._keep_extra_metrics(number, "evaluate", [reply.content for reply in ordered], EVALUATED)
        metrics = self.inner.aggregate_evaluate(number, ordered)
        if metrics is not None:
            self.client_metrics[number] = metrics
            names = self.refusals[number].names_of(reply.metadata.src_node_id for reply in ordered)
            accuracies = [cast(float, reply.content[METRICS]["accuracy"]) for reply in ordered]
            self.client_accuracy[number] = dict(zip(names.values(), accuracies, strict=True))
        return metrics

    def memory(self) -> dict[str, torch.Tensor]:
        """Return what the inner strategy remembers between rounds."""
        return memory_of(self.inner) | norm_memory(self.inner) | extras.memory_of(self.inner)

    def restore(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Give the inner strategy what it remembered after the last finished round of an earlier start."""
        restore_memory(self.inner, memory)
        restore_norm(self.inner, memory)
        extras.restore_memory(self.inner, memory)

    def summary(self) -> None:
        """Log the inner strategy."""
        log(INFO, "\t├──> Rounds of %s, from round %s on", type(self.inner).__name__, self.rounds_done + 1)
        self.inner.summary()

    def wait_for_clients(self, grid: Grid) -> list[int]:
        """Wait until enough nodes are connected and return their ids.

        The first time it waits for all clients; whoever is missing then is not waited for again, but takes part when
        it has come.

        Raises:
            RoundError: If fewer than the quorum are connected when the time is over.
        """
        quorum = self._min_clients or self._num_clients
        wanted = quorum if self._waited_for_all else self._num_clients
        deadline = time.monotonic() + self._connect_timeout_s
        while len(nodes := sorted(grid.get_node_ids())) < wanted and time.monotonic() < deadline:
            time.sleep(0.5)
        self._waited_for_all = True
        if len(nodes) < quorum:
            key = "min-clients" if self._min_clients else "num-clients"
            raise RoundError(
                f"`{key}` is {quorum}, but after {self._connect_timeout_s:g} s only {len(nodes)} clients "
                "were connected. Start the missing SuperNodes (in simulation: --federation-config "
                f"num-supernodes={self._num_clients}) or lower it; what is finished is kept."
            )
        if len(nodes) < self._num_clients:
            log(WARNING, "%s of %s clients are connected; going on without the others", len(nodes), self._num_clients)
        return nodes

    def _with_label_space(self, config: ConfigRecord) -> ConfigRecord:
        """Add the class names here and not to the configuration of ``start()``, which Flower logs."""
        return ConfigRecord({**config, CLASS_NAMES: list(self.class_names)}) if self.class_names else config

    def _draw_clients(self, grid: Grid, nodes: Sequence[int], number: int) -> tuple[list[int], int]:
        """Draw the clients of a round by their place, which, unlike Flower's node ids, is the same in every run.

        Returns:
            Their nodes, and the number of clients that they were drawn from.
        """
        unknown = [node for node in nodes if node not in self._places]
        if unknown:
            questions = [Message(RecordDict(), message_type=PLACE_MESSAGE, dst_node_id=node) for node in unknown]
            for reply in list(grid.send_and_receive(questions, timeout=self._connect_timeout_s)):
                node, place = reply.metadata.src_node_id, place_of(reply)
                if node in unknown and place is not None:
                    self._places.setdefault(node, place)
        ordered = sorted((node for node in nodes if node in self._places), key=lambda node: (self._places[node], node))
        count = num_sampled(self._fraction_train, self._num_clients)
        if len(ordered) < min(count, self._min_clients or count):
            raise RoundError(
                f"Round {number} needs {count} clients that said their place, but only {len(ordered)} of {len(nodes)} "
                "did. Look into the others' logs, or lower `fraction-train`."
            )
        if self._seed is None:
            generator = np.random.default_rng()
        else:
            generator = numpy_generator(self._seed, "participation", number)
        drawn = generator.permutation(len(ordered))[:count]
        return [ordered[index] for index in sorted(drawn.tolist())], len(ordered)

    def usable_replies(
        self, number: int, exchange: str, replies: Iterable[Message], fault_of: Callable[[Message], str | None]
    ) -> list[Message]:
        """Keep the replies that can be used, and note why the others, or the silent clients, cannot.

        Args:
            number: Of the round.
            exchange: ``train`` or ``evaluate``.
            replies: All replies, in any order.
            fault_of: Says what is wrong with a reply's content; None if nothing is.

        Returns:
            The usable replies in reproducible order.

        Raises:
            RoundError: If they are fewer than the quorum.
        """
        # Flower answers in the name of a lost node under an id of its own: the question tells which one it was.
        open_nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in self._asked[exchange]}
        num_asked = len(self._asked[exchange])
        refusals = self.refusals.setdefault(number, Refusals(self._places))
        usable: dict[int, Message] = {}
        for reply in replies:
            node = open_nodes.pop(reply.metadata.reply_to_message_id, None)
            if node is None:  # nobody has asked that, or it has been answered
                continue
            if reply.has_content() and reply.metadata.src_node_id != node:
                refusals.add(node, "Refused: a reply in the name of another client.")
                continue
            refusals.learn(node, place_of(reply))
            fault = error_sentence(reply) if reply.has_error() else fault_of(reply)
            if fault is None:
                usable[node] = reply
            else:
                refusals.add(node, fault if reply.has_error() else f"Refused: {fault}.")
        for node in open_nodes.values():
            refusals.add(node, "It did not reply in time.")
        failed = f"{num_asked - len(usable)} of {num_asked} failed: {' '.join(refusals.reasons())}"
        if len(usable) < max(1, min(self._min_clients, num_asked)):
            raise RoundError(
                f"In round {number} ({exchange}) at least {max(1, min(self._min_clients, num_asked))} of {num_asked} "
                f"clients must succeed, but {failed}"
            )
        if len(usable) < num_asked:
            log(WARNING, "round %s (%s): %s", number, exchange, failed)
        return [usable[node] for node in sorted(usable, key=lambda node: (self._places.get(node, MAX_CLIENTS), node))]

    def _keep_extra_metrics(
        self, number: int, exchange: str, contents: Sequence[RecordDict], known: MetricRecord
    ) -> None:
        weighted_by = self.inner.weighted_by_key if isinstance(self.inner, FedAvg) else NUM_EXAMPLES
        if means := extras.take_means(contents, known, weighted_by):
            self.extra_metrics.setdefault(number, {})[exchange] = means

    def _note_unreadable(self, number: int, replies: Iterable[Message]) -> None:
        """Keep how many images each client could not read, and log what was not logged before."""
        counts = {reply.metadata.src_node_id: num_unreadable_of(reply) for reply in replies}
        names = self.refusals[number].names_of(counts)
        found = {names[node]: count for node, count in counts.items() if count}
        for client, count in found.items():
            if not self._secret_draw and self._unreadable_told.get(client) != count:
                log(WARNING, "round %s (train): client %s cannot read %s images", number, client, count)
        self._unreadable_told |= found
        self.unreadable_images[number] = found
