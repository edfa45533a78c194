"""The ServerApp and composition root: settings, strategy, phases and run folder are put together here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from logging import ERROR, INFO
from typing import Any, cast

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fgl_app.config import Settings, check_model_source, parse_run_config
from fgl_app.data.images import ImageSet
from fgl_app.data.sources import class_names_of, digits_split, load_held_out
from fgl_app.errors import FGLError, RoundError
from fgl_app.models import check_model
from fgl_app.phases import Stopwatch, draw_plan, draw_synthetic_set, evaluator, initial_arrays, resolve, train_on_server
from fgl_app.prompts import PromptCount
from fgl_app.records import mean_evaluation
from fgl_app.reporting.results import summarize
from fgl_app.reporting.run_folder import RunFolder
from fgl_app.store import UnitStore
from fgl_app.synthesis.launch import SynthesisReport
from fgl_app.training import check_device
from strategies import FGL, CheckedRounds
from strategies.rounds import Traffic

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured method; an error ends the run as failed, with its sentence in the log."""
    try:
        run(grid, check_settings(parse_run_config(context.run_config)))
    except FGLError as error:
        log(ERROR, "error: %s", error)
        raise


def check_settings(settings: Settings) -> Settings:
    """Check what the settings name outside themselves, before anything is computed.

    Raises:
        ConfigError: If the device is absent, the classifier is unknown or cannot take the images, or the generator or
            a captioner of the hub cannot be found.
    """
    check_device(settings.run.device)
    check_model(settings.training.model, len(class_names_of(settings.data)), settings.data.image_size)
    prompts, synthesis = settings.prompts, settings.synthesis
    if settings.run.method == "fgl":
        check_model_source("generator", synthesis.generator, synthesis.generator_revision, "model_index.json")
        # A folder with a captioner lies on the clients, which check it themselves.
        if prompts.prompt_level == "instance" and not prompts.captioner.startswith(("/", "~")):
            check_model_source("captioner", prompts.captioner, prompts.captioner_revision, "config.json")
    return settings


def run(grid: Grid, settings: Settings) -> None:
    """Run one method from its settings to ``results.json``."""
    folder = RunFolder(settings, resolve(settings))
    log(INFO, "run folder: %s", folder.path)
    session = Session(settings, folder)
    if settings.run.method == "centralized":
        session.train_centrally()
    else:
        session.train_federated(grid)
    path = folder.write_results(session.results())
    log(INFO, "final accuracy %.4f; results: %s", session.rounds[-1]["accuracy"], path)


@dataclass
class Session:
    """One start of a run: what earlier starts left, and what this one adds."""

    settings: Settings
    folder: RunFolder
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of the finished rounds."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    synthesis: SynthesisReport | None = None
    store_hash: str | None = None
    prompts_upload: dict[str, int] | None = None

    def __post_init__(self) -> None:
        """Find the finished rounds of earlier starts."""
        self.rounds = self.folder.finished_rounds()[: self.settings.run.num_server_rounds]
        self._round_started = time.monotonic()
        if self.rounds:
            log(INFO, "resuming: %s rounds of this run are finished", len(self.rounds))

    def train_centrally(self) -> None:
        """Baseline: each round is ``local-epochs`` epochs on all real training images in one place."""
        data = digits_split(self.settings.data, "train")
        evaluate = evaluator(self.settings, load_held_out(self.settings.data))
        arrays = self._first_arrays()
        for number in range(len(self.rounds) + 1, self.settings.run.num_server_rounds + 1):
            arrays = train_on_server(
                self.settings, arrays, data, epochs=self.settings.training.local_epochs, scope=("centralized", number)
            )
            validation, test = evaluate(arrays)
            self._finish_round(
                number, "centralized", arrays, test.accuracy, test.loss, validation.accuracy, model_upload_bytes=0
            )

    def train_federated(self, grid: Grid) -> None:
        """Run FedAvg rounds, for method ``fgl`` after the prompt round and the server's phase."""
        run_settings = self.settings.run
        fgl = run_settings.method == "fgl"
        done = len(self.rounds)
        central = self.settings.data.dataset == "digits"
        inner = FedAvg(
            fraction_evaluate=0.0 if central else 1.0,
            min_train_nodes=run_settings.num_clients,
            min_evaluate_nodes=0 if central else run_settings.num_clients,
            min_available_nodes=run_settings.num_clients,
            evaluate_metrics_aggr_fn=mean_evaluation,
        )
        strategy = self._fgl(inner, done) if fgl else self._checked(inner, done)
        # FGL counts its own rounds from 1; the loop of plain rounds counts from the first one that is left.
        offset = 0 if fgl else done
        self._round_started = time.monotonic()
        with self.stopwatch.measure("total"):
            strategy.start(
                grid=grid,
                initial_arrays=self._first_arrays(),
                num_rounds=run_settings.num_server_rounds - offset,
                timeout=run_settings.round_timeout_s,
                evaluate_fn=self._evaluate_fn(strategy, offset),
            )

    def results(self) -> dict[str, Any]:
        """Build the content of ``results.json``."""
        return summarize(
            self.settings,
            self.rounds,
            prompts_upload=self.prompts_upload,
            synthesis=self.synthesis,
            store_hash=self.store_hash,
            seconds=self.stopwatch.seconds,
        )

    def _first_arrays(self) -> ArrayRecord:
        return self.folder.load_arrays(len(self.rounds)) if self.rounds else initial_arrays(self.settings)

    def _checked(self, inner: FedAvg, done: int) -> CheckedRounds:
        return CheckedRounds(
            inner,
            num_clients=self.settings.run.num_clients,
            connect_timeout_s=self.settings.run.connect_timeout_s,
            rounds_done=done,
        )

    def _fgl(self, inner: FedAvg, done: int) -> FGL:
        earlier = self.folder.load_prompts()
        if earlier is not None:
            prompts, self.prompts_upload = earlier
            log(INFO, "resuming: %s distinct prompts of this run are reused", len(prompts))
        training = self.settings.training
        strategy = FGL(
            inner,
            num_classes=len(class_names_of(self.settings.data)),
            num_clients=self.settings.run.num_clients,
            synthesize=self._synthesize,
            pretrain=self._pretrain,
            finetune=self._finetune if training.server_finetune_epochs else None,
            prompts=earlier[0] if earlier is not None else None,
            on_prompts=lambda merged: self._keep_prompts(merged, strategy.traffic),
            connect_timeout_s=self.settings.run.connect_timeout_s,
            rounds_done=done,
        )
        return strategy

    def _keep_prompts(self, merged: Sequence[PromptCount], traffic: Traffic) -> None:
        self.stopwatch.seconds["prompts"] = time.monotonic() - self._round_started
        self.prompts_upload = {
            "payload": max(traffic.prompt_payload_bytes),
            "message": max(traffic.prompt_bytes),
            "clients_asked": traffic.num_asked_for_prompts,
            "clients_used": len(traffic.prompt_bytes),
        }
        self.folder.save_prompts(merged, self.prompts_upload)

    def _synthesize(self, prompts: Sequence[PromptCount]) -> ImageSet:
        plan = draw_plan(self.settings, prompts)
        with self.stopwatch.measure("synthesis"):
            images, self.synthesis = draw_synthetic_set(plan, self.folder, self.settings.data.image_size)
        self.store_hash = UnitStore(self.folder.synthetic).content_hash([unit.unit_id for unit in plan.units()])
        return images

    def _pretrain(self, arrays: ArrayRecord, images: ImageSet) -> ArrayRecord:
        with self.stopwatch.measure("pretraining"):
            return train_on_server(
                self.settings, arrays, images, epochs=self.settings.training.server_epochs, scope=("pretraining",)
            )

    def _finetune(self, server_round: int, arrays: ArrayRecord, images: ImageSet) -> ArrayRecord:
        with self.stopwatch.measure("finetuning"):
            return train_on_server(
                self.settings,
                arrays,
                images,
                epochs=self.settings.training.server_finetune_epochs,
                scope=("finetuning", server_round),
            )

    def _evaluate_fn(self, strategy: CheckedRounds, offset: int) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        """Return Flower's ``evaluate_fn``: measure a finished round and keep it; ``offset`` rounds are not counted."""
        central = None
        if self.settings.data.dataset == "digits":
            central = evaluator(self.settings, load_held_out(self.settings.data))

        def evaluate(counted: int, arrays: ArrayRecord) -> MetricRecord | None:
            number = offset + counted
            if number <= len(self.rounds):  # round 0, or the last round of an earlier start
                return None
            if central is not None:
                validation, test = central(arrays)
                accuracy, loss, validation_accuracy = test.accuracy, test.loss, validation.accuracy
            else:
                metrics = strategy.client_metrics[number]
                accuracy, loss = cast(float, metrics["accuracy"]), cast(float, metrics["loss"])
                validation_accuracy = cast(float, metrics["validation_accuracy"])
            phase = "one-shot" if self.settings.run.method == "fgl" and number == 1 else "fedavg"
            sizes = strategy.traffic.model_bytes
            self._finish_round(
                number, phase, arrays, accuracy, loss, validation_accuracy,
                model_upload_bytes=round(sum(sizes) / len(sizes)) if sizes else 0,
            )  # fmt: skip
            return MetricRecord({"accuracy": accuracy, "loss": loss, "validation_accuracy": validation_accuracy})

        return evaluate

    def _finish_round(
        self,
        number: int,
        phase: str,
        arrays: ArrayRecord,
        accuracy: float,
        loss: float,
        validation_accuracy: float,
        *,
        model_upload_bytes: int,
    ) -> None:
        if not math.isfinite(loss):
            raise RoundError(
                f"The loss after round {number} must be finite, but is {loss}. Use a smaller `learning-rate` or "
                "`server-learning-rate`."
            )
        now = time.monotonic()
        if phase != "one-shot":  # whose parts are prompts, synthesis and pretraining
            self.stopwatch.seconds["rounds"] = self.stopwatch.seconds.get("rounds", 0.0) + now - self._round_started
        row = {
            "round": number,
            "phase": phase,
            "accuracy": accuracy,
            "loss": loss,
            "validation_accuracy": validation_accuracy,
            "model_upload_bytes": model_upload_bytes,
            "seconds": round(now - self._round_started, 3),
        }
        self._round_started = now
        self.folder.save_round(row, arrays)
        self.rounds.append(row)
        log(INFO, "round %s (%s): accuracy %.4f, loss %.4f", number, phase, accuracy, loss)
