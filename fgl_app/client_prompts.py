"""What a client sends before the first round: prompts of its images, with every defence that the run asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from clients.defences import (
    CaptionFilter,
    CountedFilter,
    caption_filter,
    noise_counts,
    randomize_classes,
    withhold_counts,
)
from clients.prompting import Captioner, fit_limits, write_prompts
from fgl_app import tiny
from fgl_app.data.sources import ClientData
from fgl_app.errors import PromptError
from fgl_app.foundation_models import identity_of, text_shape
from fgl_app.privacy.prompt_leaks import public_words
from fgl_app.prompts import PromptCount, PromptLimits, class_prompts, limits_of
from fgl_app.records import Upload, check_embeddings_fit
from fgl_app.settings import RunConfigValue, Settings
from fgl_app.training import pick_device

if TYPE_CHECKING:
    from clients.embedding import Encoder


@dataclass(frozen=True)
class WrittenPrompts:
    """A client's prompts, as its owner would approve them."""

    prompts: list[PromptCount]
    defended: CountedFilter
    """Counts what the defences did to captions."""
    encoder: Encoder | None
    """The generator's text encoder, where embeddings are sent."""


def write_own_prompts(
    data: ClientData, settings: Settings, node_config: Mapping[str, RunConfigValue]
) -> WrittenPrompts:
    """Write the prompts of a client's training images.

    Raises:
        PromptError: If none is left to send.
        ConfigError: If there would be more embeddings than one message can carry, or the generator's text encoder
            cannot be used.
    """
    by_caption = settings.prompts.prompt_level != "class"
    called = settings.card.prompt_names(data.class_names)
    if settings.prompts.noises_each_image:
        shape = text_shape(settings.synthesis.generator, settings.synthesis.generator_revision)
        check_embeddings_fit(len(data.train), *shape, settings.policy.max_prompts_per_client)
    # Captioning may take hours: what stands in the way of the embeddings is known before.
    encoder = _text_encoder(settings) if settings.prompts.prompt_level == "embedding" else None
    defend = CountedFilter(_caption_filter(settings, data.class_names) if by_caption else str)
    written = write_prompts(
        data.train,
        called,
        form_of=settings.prompt_form,
        domains=settings.card.domains,
        num_prompts_per_class=settings.prompts.num_prompts_per_class,
        captioner=_captioner(settings, node_config) if by_caption else None,
        defend=defend,
        max_chars=settings.policy.max_prompt_chars,
    )
    written = _with_private_counts(written, settings, called)
    written = fit_limits(
        written,
        data.class_names,
        _limits_known(settings, len(written)),
        known_classes=settings.card.class_names(),
        domains=settings.card.domains,
    )
    _require_some(written)
    return WrittenPrompts(written, defend, encoder)


def to_upload(written: WrittenPrompts, settings: Settings, data: ClientData) -> Upload:
    """Turn a client's prompts into what is uploaded: at the level of embeddings, these in their place.

    Raises:
        PromptError: If the server would refuse all of it.
    """
    upload = Upload(written.prompts, data.class_names)
    if written.encoder is not None:
        upload = _embedded(written.prompts, settings, data, written.encoder)
    defend = written.defended
    if settings.prompts.prompt_level != "class" and _tells_what_was_changed(settings):
        upload = dataclasses.replace(upload, defended=(defend.captions, defend.changed, defend.emptied))
    return upload


def _require_some(prompts: Sequence[PromptCount]) -> None:
    if not prompts:
        raise PromptError(
            "No prompt is left to send: the noise on counts, or what the server refuses, left none. The lines above "
            "say what was refused; otherwise use a larger epsilon."
        )


def _tells_what_was_changed(settings: Settings) -> bool:
    """Whether the server is told how many captions the defences changed, which depends on what each caption says."""
    return settings.privacy.prompt_counts == "exact" and not settings.prompts.embedding_epsilon


def _limits_known(settings: Settings, num_prompts: int) -> PromptLimits:
    """Return what the server accepts of the prompts that one client writes, as far as the client knows it.

    A file of blocked words lies at the server. Where embeddings are sent, the server sees no text, and its limits are
    those of the embeddings; with noise, how many were sent would even tell what was left out for what it says.
    """
    limits = limits_of(settings.policy, of_server=False)
    if settings.prompts.prompt_level != "embedding":
        return limits
    return dataclasses.replace(limits, max_prompts=num_prompts, blocked_words=())


def _caption_filter(settings: Settings, class_names: Sequence[str]) -> CaptionFilter:
    privacy = settings.privacy
    return caption_filter(
        public_words(settings.public_texts(class_names)),
        scrubbing=privacy.scrub,
        vocabulary_file=privacy.caption_vocabulary,
        max_words=privacy.max_caption_words,
    )


def _with_private_counts(
    written: list[PromptCount], settings: Settings, class_names: Sequence[str]
) -> list[PromptCount]:
    privacy = settings.privacy
    generator = np.random.default_rng()  # from the operating system: who knew its seed could take the noise off again
    if privacy.classes_epsilon:
        labels = randomize_classes(
            {item.label for item in written}, len(class_names), privacy.classes_epsilon, generator
        )
        templates = settings.prompt_form().class_templates[: settings.prompts.num_prompts_per_class]
        written = class_prompts(labels, class_names, templates, max_chars=settings.policy.max_prompt_chars)
    if privacy.prompt_counts == "noised":
        return noise_counts(written, privacy.counts_epsilon, privacy.counts_delta, generator)
    return withhold_counts(written) if privacy.prompt_counts == "withheld" else written


def _captioner(settings: Settings, node_config: Mapping[str, RunConfigValue]) -> Captioner:
    from clients.captioning import CachedCaptioner, HubCaptioner, resolved_dtype  # seconds of import

    source = str(node_config.get("captioner", settings.prompts.captioner))
    prompts = settings.prompts
    return CachedCaptioner(
        lambda: HubCaptioner(
            source,
            revision=prompts.captioner_revision,
            dtype=prompts.captioner_dtype,
            max_new_tokens=prompts.max_new_tokens,
            device=pick_device(settings.run.device),
        ),
        identity=(
            *identity_of(source, tiny.CAPTIONER),
            prompts.captioner_revision,
            resolved_dtype(prompts.captioner_dtype, pick_device(settings.run.device)),
            prompts.max_new_tokens,
        ),
        batch_size=prompts.captioning_batch_size,
    )


def _text_encoder(settings: Settings) -> Encoder:
    from clients.embedding import TextEncoder  # seconds of import

    return TextEncoder(settings.synthesis.generator, settings.synthesis.generator_revision, torch.device("cpu"))


def _embedded(written: Sequence[PromptCount], settings: Settings, data: ClientData, encoder: Encoder) -> Upload:
    from clients.embedding import embed_prompts  # seconds of import

    prompts = settings.prompts
    prompts_of, embeddings = embed_prompts(
        written,
        encoder,
        summary=prompts.embedding_summary,
        num_clusters=prompts.embedding_clusters,
        clip_norm=prompts.embedding_clip,
        epsilon=prompts.embedding_epsilon,
        delta=prompts.embedding_delta,
        seed=settings.run.seed,
    )
    prompts_of = fit_limits(
        prompts_of,
        data.class_names,
        limits_of(settings.policy, of_server=False),
        known_classes=settings.card.class_names(),
        domains=settings.card.domains,
        embeddings=embeddings,
    )
    _require_some(prompts_of)
    sent = {item.prompt for item in prompts_of}
    return Upload(prompts_of, data.class_names, {name: embeddings[name] for name in embeddings if name in sent})
