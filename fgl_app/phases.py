"""The phases of a run as plain functions of its settings and folder; ``server_app`` puts them together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import INFO, WARNING
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from torch import nn

from fgl_app import tiny
from fgl_app.data.images import HeldOut, ImageSet
from fgl_app.data.sources import train_part
from fgl_app.foundation_models import content_of, identity_of
from fgl_app.models import build_model, from_arrays, load_checkpoint, to_arrays
from fgl_app.prompts import MergedPrompts, spread_budget
from fgl_app.prompts.expansion import LanguageModelWriter, PromptWriter, expand, write_from_templates
from fgl_app.reporting.earlier_start import DIVISION
from fgl_app.reporting.run_folder import RunFolder
from fgl_app.rng import torch_generator
from fgl_app.settings import Settings
from fgl_app.store import Ids
from fgl_app.synthesis.families import read_family
from fgl_app.synthesis.launch import SynthesisReport, synthesize
from fgl_app.synthesis.plan import DrawSettings, Plan, draw_batch_size
from fgl_app.training import Evaluation, evaluate, pick_device, train

_ALARMING_REJECTION_RATE = 0.5
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


def initial_arrays(settings: Settings, class_names: Sequence[str]) -> ArrayRecord:
    """Return the initial weights of the run; the same for every method of one seed.

    Raises:
        ConfigError: If ``initial-weights`` cannot be had, or do not fit the model.
    """
    chosen = settings.training.initial_weights
    training, size = settings.training, settings.data.image_size
    if chosen == "imagenet":
        return to_arrays(build_model(training.model, len(class_names), size, settings.run.seed, imagenet=True))
    model = _model(settings, class_names)
    return to_arrays(model if chosen == "random" else load_checkpoint(str(Path(chosen).expanduser()), model))


def in_model_order(settings: Settings, class_names: Sequence[str], arrays: ArrayRecord) -> ArrayRecord:
    """Return arrays in the order of the model, in which clients answer; a checkpoint has an order of its own.

    Flower's clipping goes by the arrays' places and not by their names.

    Raises:
        ModelError: If they do not fit the model.
    """
    return to_arrays(from_arrays(_model(settings, class_names), arrays))


def parameter_names(settings: Settings, class_names: Sequence[str]) -> frozenset[str]:
    """Return the names of the arrays that are trained, as against BatchNorm's statistics."""
    return frozenset(name for name, _ in _model(settings, class_names).named_parameters())


def resolve(settings: Settings) -> dict[str, str]:
    """Say what the settings come to on this machine, for ``config.json``."""
    synthesis, captioner = settings.synthesis, settings.prompts.captioner
    weights = {"lora": synthesis.lora, "decoder": synthesis.decoder, "filter": synthesis.filter}
    return {
        "output_dir": str(Path(settings.run.output_dir).expanduser()),
        "device": str(pick_device(settings.run.device)),
        "synthesis_device": str(drawn_on := synthesis_device(settings)),
        "synthesis_batch_size": str(draw_batch_size(str(drawn_on), synthesis.synthesis_batch_size)),
        "data_set": settings.card.title,
        "card": settings.card.digest(),
        "images": settings.card.images_digest(),
        "class_names": ",".join(settings.card.class_names()),
        "generator": _with_content(synthesis.generator, tiny.DIFFUSION),
        "captioner": _with_content(captioner, tiny.CAPTIONER),
        **{key: _with_content(value) for key, value in weights.items() if content_of(value)},
        **({} if settings.own_folders else {"division": DIVISION, **_listing(settings)}),
    }


def _listing(settings: Settings) -> dict[str, str]:
    if settings.card.kind != "folder":  # other sources are pinned, or lie with their own library
        return {}
    listing = train_part(settings.card, settings.data).listing()
    return {"listing": listing} if listing else {}


def _with_content(source: str, shipped: str | None = None) -> str:
    """Name a foundation model so that another one at its place has another name."""
    content = content_of(source)
    return f"{source} ({content})" if content else str(identity_of(source, shipped)[0])


def write_server_prompts(settings: Settings) -> MergedPrompts:
    """Expand the class names into prompts without asking any client (GPT-FL, Section 3.1)."""
    chosen, card = settings.prompts, settings.card
    write: PromptWriter = write_from_templates
    if chosen.prompt_writer != "templates":
        write = LanguageModelWriter(
            chosen.prompt_writer,
            revision=chosen.prompt_writer_revision,
            max_new_tokens=chosen.max_new_tokens,
            seed=settings.run.seed,
            device=pick_device(settings.run.device),
        )
    domains = [(name, settings.prompt_form(name)) for name in card.domains] or [("", settings.prompt_form())]
    prompts = expand([item.prompt for item in card.classes], domains, write, chosen.num_prompts_per_class)
    log(INFO, "the server wrote %s prompts for %s classes", len(prompts), len(card.classes))
    wanted = chosen.num_prompts_per_class * len(card.classes) * len(domains)
    if len(prompts) < wanted:
        log(
            WARNING,
            "`num-prompts-per-class` asks for %s prompts, but there are no more than %s different ones: the card may "
            "have more templates or styles, or `prompt-writer` name a language model",
            wanted,
            len(prompts),
        )
    return MergedPrompts(tuple(prompts), card.class_names())


def synthesis_device(settings: Settings) -> torch.device:
    """Return where images are drawn, which may be another machine's device."""
    named = settings.synthesis.synthesis_device
    return pick_device(settings.run.device if named == "auto" else named)


def draw_plan(settings: Settings, merged: MergedPrompts, embeddings_file: Path) -> Plan:
    """Decide what the worker shall draw for the merged prompts.

    Settings that the generator's pipeline ignores are left out, so that no image's noise depends on them.
    """
    chosen = settings.synthesis
    family = read_family(chosen.generator, chosen.generator_revision, chosen.scheduler)
    shipped = chosen.generator == "tiny"
    device = synthesis_device(settings)
    class_names = tuple(settings.card.prompt_names(merged.class_names))
    asked = DrawSettings(
        generator=chosen.generator,
        generator_revision=tiny.folder_of(tiny.DIFFUSION).name
        if shipped
        else _revision_of_hub(chosen.generator, chosen.generator_revision),
        lora=chosen.lora,
        decoder=chosen.decoder,
        scheduler=chosen.scheduler,
        num_inference_steps=chosen.num_inference_steps,
        guidance_scale=chosen.guidance_scale,
        guidance_start=chosen.guidance_start,
        guidance_stop=chosen.guidance_stop,
        deep_cache_interval=chosen.deep_cache_interval,
        safety_checker=chosen.safety_checker,
        filter=chosen.filter,
        filter_revision=_revision_of_hub(chosen.filter, chosen.filter_revision),
        filter_attempts=chosen.filter_attempts,
        generation_size=chosen.generation_size,
        stored_size=chosen.stored_size,
        seed=settings.run.seed,
        contents=content_of(chosen.generator, chosen.lora, chosen.decoder, chosen.filter),
        filter_classes=class_names if chosen.filter else (),
    )
    negatives = {name: settings.prompt_form(name or None).negative for name in ("", *settings.card.domains)}
    return Plan(
        family.effective(asked),
        tuple(spread_budget(merged.prompts, chosen.images_per_class, chosen.prompt_budget == "uniform")),
        family.negatives(asked, negatives),
        class_names,
        str(embeddings_file) if merged.embeddings else "",
        str(device),
        draw_batch_size(str(device), chosen.synthesis_batch_size),
    )


def _revision_of_hub(source: str, revision: str) -> str:
    return "" if content_of(source) else revision  # a folder has none


def draw_synthetic_set(
    settings: Settings, plan: Plan, folder: RunFolder, listen: Callable[[], None], drawn_before: Ids
) -> tuple[ImageSet, SynthesisReport]:
    """Draw what is missing and return the synthetic set at the classifier's image size.

    Args:
        settings: The run's settings.
        plan: What to draw.
        folder: Of the run.
        listen: Called every few seconds meanwhile.
        drawn_before: What this start drew already, for the prompts that were there before those of a late client.
    """

    def report_progress(line: str) -> None:
        log(WARNING if "warning:" in line else INFO, "%s", line)
        listen()

    images, report = synthesize(
        plan,
        folder.synthetic,
        folder.path,
        report_progress,
        size=settings.data.image_size,
        num_workers=settings.synthesis.synthesis_workers,
        ray_address=settings.synthesis.ray_address,
        wait_s=settings.synthesis.synthesis_wait_s,
        drawn_before=drawn_before,
    )
    log(INFO, "synthesis: %s images, %s drawn now, %s reused", report.images, report.generated, report.reused)
    if (smallest := min(report.batch_sizes, default=plan.batch_size)) < plan.batch_size:
        log(
            WARNING,
            "synthesis: memory ran out: some images were drawn %s at a time, not %s, and on a GPU rounded otherwise "
            "than with more memory; a new run with `synthesis-batch-size` %s can be repeated to the last bit",
            smallest,
            plan.batch_size,
            smallest,
        )
    for reason, count in report.left_out.items():
        log(WARNING, "synthesis: %s images are left out: %s", count, reason)
    chosen = settings.synthesis
    judges = ["safety checker"] * chosen.safety_checker + ["filter"] * bool(chosen.filter)
    for group, rate in report.rejection_rates.items():
        if rate > _ALARMING_REJECTION_RATE:
            label, _, domain = group.partition(":")
            log(
                WARNING,
                "synthesis: %.0f %% of the images of class %s%s were rejected (%s): the generator may not know it",
                100 * rate,
                # Names that clients brought are their text, and not logged.
                plan.class_names[int(label)] if settings.card.classes else f"number {label}",
                f" in domain {domain}" if domain else "",
                ", ".join(judges),
            )
    return images, report


def train_on_server(
    settings: Settings,
    class_names: Sequence[str],
    arrays: ArrayRecord,
    data: ImageSet,
    *,
    epochs: int,
    scope: tuple[str | int, ...],
) -> ArrayRecord:
    """Train weights on ``data`` with the server's SGD and return the new ones.

    Args:
        settings: Model, batch size, learning rate and augmentation.
        class_names: The run's K classes.
        arrays: Weights to begin with.
        data: The synthetic set; for centralized training, all real training images.
        epochs: Passes over the data.
        scope: Names the random stream, e.g. ``("pretraining",)``.
    """
    model = from_arrays(_model(settings, class_names), arrays)
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
        compiled=settings.training.compile_training,
        on_epoch=report,
    )
    return to_arrays(model)


def evaluator(
    settings: Settings, class_names: Sequence[str], held_out: HeldOut
) -> Callable[[ArrayRecord], tuple[Evaluation, Evaluation]]:
    """Return a function that evaluates weights on the validation and the test images."""
    device = pick_device(settings.run.device)

    def evaluate_arrays(arrays: ArrayRecord) -> tuple[Evaluation, Evaluation]:
        model = from_arrays(_model(settings, class_names), arrays)
        return evaluate(model, held_out.validation, device), evaluate(model, held_out.test, device)

    return evaluate_arrays


def _model(settings: Settings, class_names: Sequence[str]) -> nn.Module:
    return build_model(settings.training.model, len(class_names), settings.data.image_size, settings.run.seed)
