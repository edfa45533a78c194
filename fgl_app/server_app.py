"""The ServerApp and composition root: settings, strategy, phases and run folder are put together here."""

from __future__ import annotations

import dataclasses
import errno
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import ERROR, INFO
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from sklearn.metrics import confusion_matrix

from fgl_app.checks import check_settings, inner_strategy
from fgl_app.config import parse_run_config
from fgl_app.data.images import HeldOut, ImageSet
from fgl_app.data.sources import load_held_out, load_split
from fgl_app.environment import use_proxies
from fgl_app.errors import FGLError, RoundError, RunFolderError
from fgl_app.foundation_models import text_shape
from fgl_app.phases import (
    Stopwatch,
    draw_plan,
    draw_synthetic_set,
    evaluator,
    in_model_order,
    initial_arrays,
    parameter_names,
    resolve,
    train_on_server,
    write_server_prompts,
)
from fgl_app.prompts import MergedPrompts, fill, limits_of
from fgl_app.reporting.results import summarize, with_earlier_starts
from fgl_app.reporting.run_folder import DrawnSet, RunFolder, forgotten_set
from fgl_app.reporting.trackers import OpenedTracker, open_trackers
from fgl_app.settings import Settings
from fgl_app.store import ContentHash, UnitStore, as_ids
from fgl_app.synthesis.launch import SynthesisReport
from fgl_app.synthesis.plan import Plan
from fgl_app.training import Evaluation, accuracy_by_domain
from strategies import FGL, CheckedRounds
from strategies.guarded_grid import guarded
from strategies.prompt_round import PromptRound

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured method; an error ends the run as failed, with its sentence in the log."""
    use_proxies()
    try:
        run(grid, check_settings(parse_run_config(context.run_config)))
    except FGLError as error:
        log(ERROR, "error: %s", error)
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        failure = RunFolderError(
            f"The disk of `output-dir` must take what the run writes, but does not ({error.strerror}). Make room; what "
            "is finished is kept: start the run again with the same `run-name`."
        )
        log(ERROR, "error: %s", failure)
        raise failure from error


def run(grid: Grid, settings: Settings) -> None:
    """Run one method from its settings to ``results.json``."""
    folder = RunFolder(settings, resolve(settings))
    log(INFO, "run folder: %s", folder.path)
    session = Session(settings, folder)
    try:
        if settings.run.method == "centralized":
            session.train_centrally()
        else:
            session.train_federated(guarded(grid))
        path = folder.write_results(session.results())
    finally:
        for tracker in session.trackers:
            tracker.close()
    log(INFO, "final accuracy %.4f; results: %s", session.rounds[-1]["accuracy"], path)


@dataclass
class Session:
    """One start of a run: what earlier starts left, and what this one adds."""

    settings: Settings
    folder: RunFolder
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of the finished rounds."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    trackers: list[OpenedTracker] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    """The run's K classes; empty until the clients have said theirs, if the run unites them."""
    synthesis: SynthesisReport | None = None
    _plan: Plan | None = None
    """What was drawn, if this start has seen it."""
    prompt_round: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Find the finished rounds of earlier starts, and what left the clients in them and in unfinished ones."""
        self.class_names = self.settings.card.class_names()
        self.rounds = self.folder.finished_rounds()[: self.settings.run.num_server_rounds]
        self._finished_before = len(self.rounds)
        self.ledger = self.folder.open_ledger()
        self.trackers = open_trackers(self.settings, self.folder.path)
        self._round_started = time.monotonic()
        if self.rounds:
            log(INFO, "resuming: %s rounds of this run are finished", len(self.rounds))

    def train_centrally(self) -> None:
        """Baseline: each round is ``local-epochs`` epochs on all real training images in one place."""
        data = load_split(self.settings.card, self.settings.data, "train", self.settings.run.seed)
        evaluate = evaluator(self.settings, self.class_names, self._held_out())
        arrays = self._first_arrays()
        for number in range(len(self.rounds) + 1, self.settings.run.num_server_rounds + 1):
            arrays = train_on_server(
                self.settings,
                self.class_names,
                arrays,
                data,
                epochs=self.settings.training.local_epochs,
                scope=("centralized", number),
            )
            self._finish_round(number, "centralized", arrays, self._measured(number, *evaluate(arrays)), {})

    def train_federated(self, grid: Grid) -> None:
        """Run the inner strategy's rounds, for ``fgl`` and ``gpt-fl`` after the server's phase."""
        run_settings = self.settings.run
        done = len(self.rounds)
        fgl = self.settings.synthesizes
        strategy = self._fgl(done) if fgl else self._checked(done)
        if done:
            strategy.restore(self.folder.load_memory(done))
        # FGL counts its own rounds from 1; the loop of plain rounds counts from the first one that is left.
        offset = 0 if fgl else done
        self._round_started = time.monotonic()
        with self.stopwatch.measure("total"):
            strategy.start(
                grid=grid,
                initial_arrays=self._first_arrays(),
                num_rounds=run_settings.num_server_rounds - offset,
                timeout=self.settings.policy.round_deadline_s,
                evaluate_fn=self._evaluate_fn(strategy, offset),
            )
        if self._secret_draw:  # a slow client that was drawn makes them long
            for phase in ("rounds", "total"):
                self.stopwatch.seconds.pop(phase, None)

    def results(self) -> dict[str, Any]:
        """Build the content of ``results.json``."""
        found = summarize(
            self.settings,
            self.rounds,
            releases=self.ledger.rows,
            prompt_round=self.prompt_round,
            synthesis=self.synthesis,
            seconds=self.stopwatch.seconds,
            held_out=None if self.settings.own_folders else self._held_out(),
        )
        return with_earlier_starts(found, self.folder.load_results(), worked=len(self.rounds) > self._finished_before)

    def _held_out(self) -> HeldOut:
        return load_held_out(self.settings.card, self.settings.data, self.settings.run.seed)

    def _first_arrays(self) -> ArrayRecord:
        if self.rounds:
            return in_model_order(self.settings, self.class_names, self.folder.load_arrays(len(self.rounds)))
        # The classes may be known only after the prompt round; the server's phase then makes the first weights.
        return initial_arrays(self.settings, self.class_names) if self.class_names else ArrayRecord()

    def _common(self, done: int) -> dict[str, Any]:
        return {
            "num_clients": self.settings.run.num_clients,
            "class_names": self.class_names,
            "fraction_train": self.settings.training.fraction_train,
            # Privacy by sampling holds only while nobody can know who was drawn.
            "seed": self.settings.run.seed if self.settings.privacy.client_dp == "off" else None,
            "parameters": parameter_names(self.settings, self.class_names or ("", "")),
            "connect_timeout_s": self.settings.policy.connect_timeout_s,
            "min_clients": self.settings.policy.min_clients,
            "max_update_norm": self.settings.policy.max_update_norm,
            "rounds_done": done,
            "ledger": self.ledger,
            "accept_extras": self._tells_of_clients,
        }

    def _checked(self, done: int) -> CheckedRounds:
        return CheckedRounds(inner_strategy(self.settings), **self._common(done))

    def _fgl(self, done: int) -> FGL:
        merged = None
        if (earlier := self.folder.load_prompts()) is not None:
            merged, self.prompt_round = earlier
            self.class_names = merged.class_names
            log(INFO, "resuming: %s distinct prompts of this run are reused", len(merged.prompts))
        elif self.settings.prompts_from_server:
            with self.stopwatch.measure("prompts"):
                merged = write_server_prompts(self.settings)
            self.folder.save_prompts(merged, None)
        return FGL(
            inner_strategy(self.settings),
            prompt_round=self._ask_for_prompts,
            synthesize=self._synthesize,
            pretrain=self._pretrain,
            finetune=self._finetune if self.settings.training.server_finetune_epochs else None,
            prompts=merged,
            on_prompts=self._keep_prompts,
            **self._common(done),
        )

    def _ask_for_prompts(self, grid: Grid) -> PromptRound:
        policy, prompts, synthesis = self.settings.policy, self.settings.prompts, self.settings.synthesis
        by_embedding = prompts.prompt_level == "embedding"
        return PromptRound(
            grid,
            limits_of(policy),
            class_names=self.class_names,
            domains=self.settings.card.domains,
            embedding_shape=text_shape(synthesis.generator, synthesis.generator_revision) if by_embedding else None,
            max_client_share=policy.max_client_share,
            uniform=synthesis.prompt_budget == "uniform",
            min_senders=self.settings.privacy.min_clients_per_prompt,
            class_prompt=self._class_prompt,
            deadline_s=policy.prompt_deadline_s,
            approved_by_owners=self.settings.privacy.require_approval,
            exact_counts=self.settings.privacy.prompt_counts == "exact",
            before_asking=self.ledger.asked_for_prompts,
        )

    def _class_prompt(self, class_name: str, domain: str) -> str:
        template = self.settings.prompt_form(domain or None).class_templates[0]
        return fill(template, *self.settings.card.prompt_names([class_name]))

    def _keep_prompts(self, merged: MergedPrompts, exchange: PromptRound) -> None:
        self.stopwatch.seconds.setdefault("prompts", time.monotonic() - self._round_started)
        self.class_names = merged.class_names
        self.prompt_round = {
            **exchange.report(),
            "upload": {
                "payload": max(exchange.payload_bytes),
                "message": max(exchange.message_bytes),
                "all_messages": sum(exchange.message_bytes),
            },
        }
        self.folder.save_prompts(merged, self.prompt_round)

    def _synthesize(self, merged: MergedPrompts, listen: Callable[[], None]) -> ImageSet:
        if (kept := forgotten_set(self.folder.path)) is not None:
            return self._read_again(kept)
        plan = draw_plan(self.settings, merged, self.folder.embeddings)
        drawn_before = self.synthesis.drawn if self.synthesis else as_ids([])  # without the prompts of a late client
        with self.stopwatch.measure("synthesis"):
            images, report = draw_synthetic_set(self.settings, plan, self.folder, listen, drawn_before)
        self.synthesis = dataclasses.replace(report, seconds=self.stopwatch.seconds["synthesis"])
        self._plan = plan
        return images

    def _read_again(self, drawn: DrawnSet) -> ImageSet:
        """Read the synthetic set of an earlier start that has deleted its prompts since."""
        self.folder.forget_prompts(drawn)
        store = UnitStore(self.folder.synthetic, drawn.settings_digest)
        content = ContentHash()
        images = store.read(drawn.sample_ids, size=self.settings.data.image_size, content=content)
        index, ids = store.index(), drawn.sample_ids
        self.synthesis = SynthesisReport(
            len(images),
            content.hexdigest(),
            0,
            len(ids),
            index.left_out(ids),
            index.rejection_rates(ids, drawn.labels),
            0.0,
            index.seconds(ids),
            index.batch_sizes(ids),
        )
        return images

    def _pretrain(self, arrays: ArrayRecord, images: ImageSet) -> ArrayRecord:
        if self._plan is not None and not self.settings.privacy.retain_prompts:
            sample_ids = as_ids(sample.sample_id for sample in self._plan.samples())
            self.folder.forget_prompts(DrawnSet(self._plan.settings.digest(), sample_ids, tuple(self._plan.labels())))
        with self.stopwatch.measure("pretraining"):
            return train_on_server(
                self.settings,
                self.class_names,
                arrays if len(arrays) else initial_arrays(self.settings, self.class_names),
                images,
                epochs=self.settings.training.server_epochs,
                scope=("pretraining",),
            )

    def _finetune(self, server_round: int, arrays: ArrayRecord, images: ImageSet) -> ArrayRecord:
        with self.stopwatch.measure("finetuning"):
            return train_on_server(
                self.settings,
                self.class_names,
                arrays,
                images,
                epochs=self.settings.training.server_finetune_epochs,
                scope=("finetuning", server_round),
            )

    def _evaluate_fn(self, strategy: CheckedRounds, offset: int) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        """Return Flower's ``evaluate_fn``: measure a finished round and keep it; ``offset`` rounds are not counted."""
        central = None
        if not self.settings.own_folders:
            central = evaluator(self.settings, self.class_names, self._held_out())

        def evaluate(counted: int, arrays: ArrayRecord) -> MetricRecord | None:
            number = offset + counted
            if number <= len(self.rounds):  # round 0, or the last round of an earlier start
                return None
            private = self.settings.privacy.client_dp != "off"
            if central is not None:
                measured = self._measured(number, *central(arrays))
            else:
                metrics = strategy.client_metrics[number]
                measured = {key: cast(float, metrics[key]) for key in ("accuracy", "loss", "validation_accuracy")}
                if self._tells_of_clients:
                    measured["client_accuracy"] = strategy.client_accuracy[number]
            phase = "one-shot" if self.settings.synthesizes and number == 1 else "federated"
            sizes = strategy.model_bytes.get(number, [])
            prompts_upload = self.prompt_round["upload"]["all_messages"] if self.prompt_round and number == 1 else 0
            refused = strategy.refusals[number].rows(named=not self._secret_draw) if number in strategy.refusals else []
            unreadable = {} if self._secret_draw else strategy.unreadable_images.get(number, {})
            reused = self.synthesis.reused_seconds if phase == "one-shot" and self.synthesis else 0.0
            sent = {
                **({"reused_seconds": round(reused, 3)} if reused else {}),
                "model_upload_bytes": round(sum(sizes) / len(sizes)) if sizes else 0,
                "upload_bytes": sum(sizes) + prompts_upload,
                "clients": len(sizes),
                **({"refused": refused} if refused else {}),
                **({"unreadable_images": unreadable} if unreadable else {}),
                **strategy.update_metrics.get(number, {}),
                **({"client_metrics": more} if (more := strategy.extra_metrics.get(number)) else {}),
                **({"drawn": list(strategy.draws[number])} if private and number in strategy.draws else {}),
            }
            self._finish_round(number, phase, arrays, measured, sent, strategy.memory())
            return MetricRecord({key: cast(float, measured[key]) for key in ("accuracy", "loss")})

        return evaluate

    @property
    def _tells_of_clients(self) -> bool:
        """Whether what clients tell beside weights may be accepted and kept: no defence would cover it."""
        privacy = self.settings.privacy
        return privacy.client_dp == "off" and not privacy.example_dp_noise and privacy.prompt_counts == "exact"

    @property
    def _secret_draw(self) -> bool:
        """Whether differential privacy relies on nobody's learning who was drawn: nothing written may tell."""
        return self.settings.privacy.client_dp != "off" and self.settings.training.fraction_train < 1

    def _measured(self, number: int, validation: Evaluation, test: Evaluation) -> dict[str, Any]:
        """Return the measures of a round on the common held-out images, and keep its confusion matrix."""
        data = self._held_out().test
        labels = range(len(self.class_names))
        confusion = confusion_matrix(data.labels.numpy(), test.predictions.numpy(), labels=list(labels))
        self.folder.save_confusion(self.class_names, confusion.tolist(), number)
        measured: dict[str, Any] = {
            "accuracy": test.accuracy,
            "loss": test.loss,
            "validation_accuracy": validation.accuracy,
        }
        if by_domain := accuracy_by_domain(test.predictions, data, self.settings.card.domains):
            measured["accuracy_macro"] = sum(by_domain.values()) / len(by_domain)
            measured["domain_accuracy"] = by_domain
        return measured

    def _finish_round(
        self,
        number: int,
        phase: str,
        arrays: ArrayRecord,
        measured: Mapping[str, Any],
        sent: Mapping[str, Any],
        memory: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if not math.isfinite(measured["loss"]):
            raise RoundError(
                f"The loss after round {number} must be finite, but is {measured['loss']}. Use a smaller "
                "`learning-rate` or `server-learning-rate`."
            )
        now = time.monotonic()
        if phase != "one-shot":  # whose parts are prompts, synthesis and pretraining
            self.stopwatch.seconds["rounds"] = self.stopwatch.seconds.get("rounds", 0.0) + now - self._round_started
        row = {
            "round": number,
            "phase": phase,
            **measured,
            **{"model_upload_bytes": 0, "upload_bytes": 0, **sent},
            **({} if self._secret_draw and phase != "one-shot" else {"seconds": round(now - self._round_started, 3)}),
        }
        self._round_started = now
        self.folder.save_round(row, arrays, memory)
        self.rounds.append(row)
        for tracker in self.trackers:
            tracker.log(number, {key: value for key, value in row.items() if isinstance(value, int | float)})
        log(INFO, "round %s (%s): accuracy %.4f, loss %.4f", number, phase, measured["accuracy"], measured["loss"])
