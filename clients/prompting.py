"""Write a client's prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from logging import WARNING

import torch
from flwr.common.logger import log

from clients.defences import CaptionFilter
from fgl_app.cards import PromptForm
from fgl_app.data.images import ImageSet
from fgl_app.errors import PromptError
from fgl_app.files import sha256
from fgl_app.prompts import (
    MAX_PROMPT_CHARS,
    PromptCount,
    PromptLimits,
    class_prompts,
    instance_prompts,
    printable,
    screen_prompts,
    visible,
)

Captioner = Callable[[torch.Tensor], list[str]]
"""From uint8 images ``[N, 3, S, S]`` to N captions."""


def write_prompts(
    data: ImageSet,
    class_names: Sequence[str],
    *,
    form_of: Callable[[str | None], PromptForm],
    domains: Sequence[str],
    num_prompts_per_class: int,
    captioner: Captioner | None,
    defend: CaptionFilter = str,
    max_chars: int = MAX_PROMPT_CHARS,
) -> list[PromptCount]:
    """Turn a client's images into distinct prompts with counts; no image and no file name is in them.

    Args:
        data: The client's training images.
        class_names: How prompts call the run's K classes.
        form_of: Gives the templates of a domain, or those of a data set without domains for None.
        domains: Names of the D domains; empty for a data set of one domain.
        num_prompts_per_class: Templates used per class at class level.
        captioner: Captions each image (instance level); None for class-level prompts.
        defend: Takes out of a caption what must not leave the client.
        max_chars: Longest prompt, characters. Captions are cut behind the defences, which might not know half a name.

    Raises:
        PromptError: If a prompt of a class name is longer.
    """
    # What hides from a defence in odd characters must not appear behind it, when the prompt is made printable.
    captions = (
        [defend(visible(printable(caption))) for caption in captioner(data.images)] if captioner is not None else None
    )
    prompts: list[PromptCount] = []
    present = sorted(set(data.domains.tolist())) if data.domains is not None else [None]
    for domain in present:
        rows = range(len(data)) if domain is None else torch.nonzero(data.domains == domain).flatten().tolist()
        labels = [int(data.labels[row]) for row in rows]
        name = None if domain is None else domains[domain]
        form = form_of(name)
        if captions is None:
            templates = form.class_templates[:num_prompts_per_class]
            prompts += class_prompts(labels, class_names, templates, name or "", max_chars)
        else:
            chosen = [captions[row] for row in rows]
            prompts += instance_prompts(labels, chosen, class_names, form.instance_template, name or "", max_chars)
    return sorted(prompts)


def fit_limits(
    prompts: Sequence[PromptCount],
    class_names: Sequence[str],
    limits: PromptLimits,
    *,
    known_classes: Sequence[str] = (),
    domains: Sequence[str] = (),
    embeddings: Collection[str] | None = None,
) -> list[PromptCount]:
    """Leave out what the server would refuse, and say so in the log, where the owner can read it.

    Args:
        prompts: Distinct prompts of the client.
        class_names: Names that are sent with them; labels index them.
        limits: What the server accepts of one client, as far as clients know it.
        known_classes: The run's classes; empty where the clients' are united.
        domains: The run's domains.
        embeddings: Names of the embeddings that the prompts then are; None for prompts of text.

    Returns:
        The prompts that the server accepts. Of too many, those that stand for most images, from every class one at
        least.

    Raises:
        PromptError: If the client has more classes than the run may have.
    """
    num_classes = len({item.label for item in prompts})
    if not known_classes and num_classes > limits.max_classes:
        raise PromptError(
            f"This client has images of {num_classes} classes, and `max-classes` allows a run {limits.max_classes}. "
            "Use a larger value, or fewer folders."
        )
    by_row = {(class_names[item.label], item.prompt, item.domain): item for item in _most_frequent_first(prompts)}
    rows = [[name, item.count, text, domain] for (name, text, domain), item in by_row.items()]
    kept, refused = screen_prompts(rows, limits, class_names=known_classes, domains=domains, embeddings=embeddings)
    for reason, count in sorted(refused.items()):
        log(
            WARNING, "%s of %s prompts are not sent, because the server would refuse them: %s", count, len(rows), reason
        )
    return sorted(by_row[item.class_name, item.prompt, item.domain] for item in kept)


def _most_frequent_first(prompts: Sequence[PromptCount]) -> list[PromptCount]:
    """Order prompts by their counts, the most frequent of each class before all others; a hash breaks ties."""
    ordered = sorted(prompts, key=lambda item: (-item.count, sha256(item.prompt.encode())))
    first: dict[int, PromptCount] = {}
    for item in ordered:
        first.setdefault(item.label, item)
    return [*first.values(), *(item for item in ordered if first[item.label] is not item)]
