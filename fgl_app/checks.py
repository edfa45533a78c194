"""What the settings name outside themselves, checked before anything is computed; the strategy that they come to."""

from __future__ import annotations

import importlib.util
import json
from logging import INFO, WARNING
from pathlib import Path

from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy

from fgl_app import tiny
from fgl_app.config import is_chosen
from fgl_app.data.adequacy import check_classes, warnings_of
from fgl_app.data.sources import client_rows, train_part
from fgl_app.errors import ConfigError
from fgl_app.files import checkpoint_file
from fgl_app.foundation_models import check_model_source, check_weights, text_shape
from fgl_app.image_folders import describe
from fgl_app.models import build_model, check_all_trained, check_draws_nothing, check_model, size_of
from fgl_app.phases import initial_arrays
from fgl_app.prompts import read_blocked_words
from fgl_app.prompts.rehearsal import check_class_prompts
from fgl_app.records import check_embeddings_fit
from fgl_app.reporting.earlier_start import DIVISION
from fgl_app.reporting.trackers import open_trackers
from fgl_app.settings import Settings
from fgl_app.synthesis.families import read_family
from fgl_app.synthesis.plan import UNIT_SIZE
from fgl_app.training import check_device
from strategies.differential_privacy import with_noise
from strategies.inner import build_inner
from strategies.participation import num_sampled


def inner_strategy(settings: Settings) -> Strategy:
    """Build the strategy of the rounds; see :func:`strategies.inner.build_inner` and :func:`with_noise`."""
    num_clients, training, privacy = settings.run.num_clients, settings.training, settings.privacy
    num_drawn = num_sampled(training.fraction_train, num_clients)
    inner = build_inner(
        training.strategy,
        training.strategy_options,
        num_selected=min(num_drawn, settings.policy.min_clients or num_clients),
        weighting=training.weighting,
        evaluate_on_clients=settings.own_folders,
    )
    if privacy.client_dp == "off":
        return inner
    return with_noise(
        inner,
        privacy.client_dp,
        noise_multiplier=privacy.client_dp_noise,
        clipping_norm=privacy.client_dp_clip,
        num_selected=num_drawn,
    )


def check_settings(settings: Settings) -> Settings:
    """Check what the settings name outside themselves, before anything is computed.

    Raises:
        ConfigError: If the device is absent, the classifier is unknown or cannot take the images, the initial weights
            do not fit, the strategy does not exist, or a foundation model of the hub cannot be found.
        DataError: If the data set cannot be read or divided over the clients.
        PromptError: If prompts of the class names are longer than `max-prompt-chars`.
    """
    check_device(settings.run.device)
    names = settings.card.class_names() or ("", "")  # of a union of the clients' classes only the number will differ
    check_model(settings.training.model, len(names), settings.data.image_size)
    _check_private_rounds(settings, len(names))
    if settings.training.initial_weights != "random":
        initial_arrays(settings, names)
        _check_origin(settings)
    read_blocked_words(settings.policy.blocked_words, settings.policy.max_prompt_chars)
    if settings.synthesizes:
        check_class_prompts(settings)
    open_trackers(settings, None)
    prompts, synthesis = settings.prompts, settings.synthesis
    if settings.synthesizes:
        if UNIT_SIZE % synthesis.synthesis_batch_size:
            raise ConfigError(
                f"`synthesis-batch-size` must divide the {UNIT_SIZE} images of a unit, but is "
                f"{synthesis.synthesis_batch_size}. Use 1, 2, 4, 8, 16, 32 or 64."
            )
        if not (synthesis.ray_address or synthesis.synthesis_wait_s):
            check_device(synthesis.synthesis_device, "synthesis-device")
        check_model_source(
            "generator", synthesis.generator, synthesis.generator_revision, "model_index.json", tiny.DIFFUSION
        )
        _check_generator(settings)
        for key, value, revision, marker in (
            ("lora", synthesis.lora, "", "pytorch_lora_weights.safetensors"),
            ("decoder", synthesis.decoder, "", "config.json"),
            ("filter", synthesis.filter, synthesis.filter_revision, "config.json"),
        ):
            if value:
                check_model_source(key, value, revision, marker)
                if marker == "config.json":
                    check_weights(key, value, revision)
        if prompts.prompt_level == "embedding":
            text_shape(synthesis.generator, synthesis.generator_revision)
        # A folder with a captioner lies on the clients, which check it themselves.
        asked = not settings.prompts_from_server and prompts.prompt_level != "class"
        if asked and not prompts.captioner.startswith(("/", "~")):
            check_model_source(
                "captioner", prompts.captioner, prompts.captioner_revision, "config.json", tiny.CAPTIONER
            )
            if prompts.captioner != "tiny":
                check_weights("captioner", prompts.captioner, prompts.captioner_revision)
        if prompts.embedding_epsilon and importlib.util.find_spec("dp_accounting") is None:
            raise ConfigError(
                "`embedding-epsilon` needs the package dp-accounting on every client, and it is not installed here. "
                "Install the extra: pip install 'federated-generative-learning[privacy]'."
            )
        if settings.prompts_from_server and prompts.prompt_writer != "templates":
            check_model_source("prompt-writer", prompts.prompt_writer, prompts.prompt_writer_revision, "config.json")
            check_weights("prompt-writer", prompts.prompt_writer, prompts.prompt_writer_revision)
    if not settings.own_folders:
        card, data, run = settings.card, settings.data, settings.run
        check_classes(card, data, run.seed)
        if ignored := train_part(card, data).ignored:
            count = sum(ignored.values())
            log(WARNING, "%s: %s files of the training part are no images: %s", card.name, count, describe(ignored))
        for line in warnings_of(card, data, 0 if run.method == "centralized" else run.num_clients, run.seed):
            log(WARNING, "%s: %s", card.name, line)
        if prompts.noises_each_image and settings.synthesizes and run.method != "centralized":
            rows = client_rows(card, data, run.num_clients, run.seed)
            shape = text_shape(synthesis.generator, synthesis.generator_revision)
            check_embeddings_fit(max(map(len, rows)), *shape, settings.policy.max_prompts_per_client)
    _tell_size(settings, len(names))
    inner_strategy(settings)  # the last, because Flower's strategies log what they were told
    return settings


def _check_origin(settings: Settings) -> None:
    """Refuse weights of a run that may have trained on what this run holds out.

    The seed divides the images of a card. Weights of another seed's rounds have therefore seen some of this run's
    validation and test images; those of its one-shot model have seen synthetic images only.
    """
    checkpoint = Path(settings.training.initial_weights).expanduser()
    try:
        origin = json.loads((checkpoint.parent.parent / "config.json").read_text("utf-8"))
        flat, resolved = dict(origin["run_config"]), dict(origin["resolved"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # no run's checkpoint
    here = (settings.run.seed, DIVISION)
    held_out_here = not settings.own_folders and settings.card.validation + settings.card.test > 0
    same_images = resolved.get("images") == settings.card.images_digest()
    if "images" not in resolved:  # of an older version
        same_images = resolved.get("card") == settings.card.digest()
    synthetic_only = (
        flat.get("method") in ("fgl", "gpt-fl")
        and checkpoint == checkpoint_file(checkpoint.parent.parent, 1)
        and flat.get("initial-weights", "random") in ("random", "imagenet")
    )
    if held_out_here and same_images and not synthetic_only and (flat.get("seed"), resolved.get("division")) != here:
        raise ConfigError(
            f"`initial-weights` {str(checkpoint)!r} were trained with seed {flat.get('seed')}, which divides "
            f"{settings.card.name} otherwise: they may have seen test images of seed {settings.run.seed}. Use weights "
            "of a run of this version with the same `seed`, or of a one-shot model."
        )


def _tell_size(settings: Settings, num_classes: int) -> None:
    """Log how large the classifier is, and what its rounds come to."""
    run, training = settings.run, settings.training
    weights, num_bytes = size_of(training.model, num_classes, settings.data.image_size)
    told = f"model {training.model}: {weights:,} weights, {num_bytes / 1e6:,.1f} MB"
    num_rounds = run.num_server_rounds - settings.synthesizes  # the first one is the prompt round
    if run.method != "centralized" and num_rounds:
        drawn = num_sampled(training.fraction_train, run.num_clients)
        uploaded = drawn * num_rounds * num_bytes / 1e6
        told += f"; sent back by {drawn} clients x {num_rounds} rounds: {uploaded:,.0f} MB"
    log(INFO, "%s", told)


def _check_generator(settings: Settings) -> None:
    """Check that the generator can be loaded, and refuse settings of the user's that its pipeline would ignore."""
    chosen = settings.synthesis
    family = read_family(chosen.generator, chosen.generator_revision, chosen.scheduler)
    family.check_solver(chosen.scheduler, chosen.num_inference_steps)
    if chosen.generator != "tiny":
        check_weights("generator", chosen.generator, chosen.generator_revision, list(family.components))
    parts = {name: kind for name, (_, kind) in family.components.items()}
    here, unguided = f"on this generator, a {family.name}", "where `guidance-scale` is at most 1"
    is_guided = family.is_embedded or chosen.guidance_scale > 1
    of_own_loop = {
        "guidance-start": (chosen.guidance_start, 0.0),
        "guidance-stop": (chosen.guidance_stop, 1.0),
        "deep-cache-interval": (chosen.deep_cache_interval, 1),
    }
    ignored: list[tuple[str, object, object, str]] = [
        (key, value, neutral, unguided if family.own_loop else here)
        for key, (value, neutral) in of_own_loop.items()
        if value != neutral and is_chosen(settings, key)
        if not family.own_loop or not (is_guided or key == "deep-cache-interval")
    ]
    if not family.guidance and chosen.guidance_scale != 1 and is_chosen(settings, "guidance-scale"):
        ignored.append(("guidance-scale", chosen.guidance_scale, 1.0, here))
    if chosen.negative_prompt not in ("card", "") and not (family.takes_negative and is_guided):
        ignored.append(("negative-prompt", "not empty", '""', unguided if family.takes_negative else here))
    if chosen.safety_checker and parts.get("safety_checker") != "StableDiffusionSafetyChecker":
        ignored.append(("safety-checker", "true", "false", here))
    if chosen.decoder and parts.get("vae") != "AutoencoderKL":
        ignored.append(("decoder", repr(chosen.decoder), '""', here))
    for key, value, neutral, where in ignored:
        raise ConfigError(
            f"`{key}` has no effect {where}, but is {value}. Leave it at {neutral}, so that no setting changes the "
            "noise of images and nothing else."
        )
    if chosen.generation_size % family.size_factor:
        lower = chosen.generation_size - chosen.generation_size % family.size_factor
        raise ConfigError(
            f"`generation-size` must be a multiple of {family.size_factor} for this generator, but is "
            f"{chosen.generation_size}. Use {lower or family.size_factor} or {lower + family.size_factor}."
        )


def _check_private_rounds(settings: Settings, num_classes: int) -> None:
    """Check that the model and the installation can do the differential privacy that the rounds are to have."""
    privacy = settings.privacy
    for key, asked, packages in (
        ("client-dp", privacy.client_dp != "off", ("dp_accounting",)),
        ("example-dp-noise", privacy.example_dp_noise > 0, ("dp_accounting", "opacus")),
    ):
        if not asked:
            continue
        name, image_size = settings.training.model, settings.data.image_size
        check_all_trained(name, num_classes, image_size, key)
        if key == "example-dp-noise":
            check_draws_nothing(build_model(name, num_classes, image_size, seed=0), key)
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"`{key}` needs the package {missing[0].replace('_', '-')} on the server and on every client, and it "
                "is not installed here. Install the extra: pip install 'federated-generative-learning[privacy]'."
            )
