"""The phases of a run as plain functions of its settings and folder; ``server_app`` puts them together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import INFO
from pathlib import Path

from flwr.app import ArrayRecord
from flwr.common.logger import log
from torch import nn

from fgl_app import tiny
from fgl_app.config import Settings
from fgl_app.data.images import HeldOut, ImageSet, resize
from fgl_app.data.sources import class_names_of
from fgl_app.models import build_model, from_arrays, to_arrays
from fgl_app.prompts import PromptCount, spread_budget
from fgl_app.reporting.run_folder import RunFolder
from fgl_app.rng import torch_generator
from fgl_app.synthesis.launch import SynthesisReport, synthesize
from fgl_app.synthesis.plan import CPU_BATCH_SIZE, DrawSettings, Plan
from fgl_app.training import Evaluation, evaluate, pick_device, train

SERVER_WEIGHT_DECAY = 2e-4
"""FGL, Appendix: the server's L2 penalty."""


@dataclass
class Stopwatch:
    """Wall-clock seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to ``phase``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


def initial_arrays(settings: Settings) -> ArrayRecord:
    """Return the random initial weights of the run; the same for every method of one seed."""
    return to_arrays(_model(settings))


def resolve(settings: Settings) -> dict[str, str]:
    """Say what the settings come to on this machine, for ``config.json``."""
    shipped = tiny.folder_of(tiny.DIFFUSION).name, tiny.folder_of(tiny.CAPTIONER).name
    return {
        "output_dir": str(Path(settings.run.output_dir).expanduser()),
        "device": str(pick_device(settings.run.device)),
        "class_names": ",".join(class_names_of(settings.data)),
        "generator": shipped[0] if settings.synthesis.generator == "tiny" else settings.synthesis.generator,
        "captioner": shipped[1] if settings.prompts.captioner == "tiny" else settings.prompts.captioner,
    }


def draw_plan(settings: Settings, prompts: Sequence[PromptCount]) -> Plan:
    """Decide what the worker shall draw for the merged prompts."""
    chosen = settings.synthesis
    shipped = chosen.generator == "tiny"
    device = pick_device(settings.run.device)
    return Plan(
        DrawSettings(
            generator=chosen.generator,
            generator_revision=tiny.folder_of(tiny.DIFFUSION).name if shipped else chosen.generator_revision,
            num_inference_steps=chosen.num_inference_steps,
            guidance_scale=chosen.guidance_scale,
            negative_prompt=chosen.negative_prompt,
            stored_size=chosen.stored_size,
            seed=settings.run.seed,
        ),
        tuple(spread_budget(prompts, chosen.images_per_class)),
        str(device),
        CPU_BATCH_SIZE if device.type == "cpu" else chosen.synthesis_batch_size,
    )


def draw_synthetic_set(plan: Plan, folder: RunFolder, image_size: int) -> tuple[ImageSet, SynthesisReport]:
    """Draw what is missing and return the synthetic set at the classifier's image size."""
    images, report = synthesize(plan, folder.synthetic, lambda line: log(INFO, "%s", line))
    log(INFO, "synthesis: %s images, %s drawn now, %s reused", report.images, report.generated, report.reused)
    return ImageSet(resize(images.images, image_size), images.labels), report


def train_on_server(
    settings: Settings, arrays: ArrayRecord, data: ImageSet, *, epochs: int, scope: tuple[str | int, ...]
) -> ArrayRecord:
    """Train weights on ``data`` with the server's SGD and return the new ones.

    Args:
        settings: Model, batch size, learning rate and augmentation.
        arrays: Weights to begin with.
        data: The synthetic set; for centralized training, all real training images.
        epochs: Passes over the data.
        scope: Names the random stream, e.g. ``("pretraining",)``.
    """
    model = from_arrays(_model(settings), arrays)
    started = time.monotonic()

    def report(epoch: int, loss: float) -> None:
        if epoch == epochs or epoch % 5 == 0:
            left = (time.monotonic() - started) / epoch * (epochs - epoch)
            log(INFO, "%s: epoch %s/%s, loss %.4f, %.0f s left", scope[0], epoch, epochs, loss, left)

    train(
        model,
        data,
        epochs=epochs,
        batch_size=settings.training.batch_size,
        learning_rate=settings.training.server_learning_rate,
        weight_decay=SERVER_WEIGHT_DECAY,
        augmentation=settings.training.augmentation,
        schedule=settings.training.server_schedule,
        generator=torch_generator(settings.run.seed, *scope),
        device=pick_device(settings.run.device),
        on_epoch=report,
    )
    return to_arrays(model)


def evaluator(settings: Settings, held_out: HeldOut) -> Callable[[ArrayRecord], tuple[Evaluation, Evaluation]]:
    """Return a function that evaluates weights on the validation and the test images."""
    device = pick_device(settings.run.device)

    def evaluate_arrays(arrays: ArrayRecord) -> tuple[Evaluation, Evaluation]:
        model = from_arrays(_model(settings), arrays)
        return evaluate(model, held_out.validation, device), evaluate(model, held_out.test, device)

    return evaluate_arrays


def _model(settings: Settings) -> nn.Module:
    classes = len(class_names_of(settings.data))
    return build_model(settings.training.model, classes, settings.data.image_size, settings.run.seed)
