"""Write a client's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from clients.defences import CaptionFilter
from fgl_app.cards import PromptForm
from fgl_app.data.images import ImageSet
from fgl_app.prompts import PromptCount, class_prompts, instance_prompts, printable, visible

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
            prompts += class_prompts(labels, class_names, templates, name or "")
        else:
            chosen = [captions[row] for row in rows]
            prompts += instance_prompts(labels, chosen, class_names, form.instance_template, name or "")
    return sorted(prompts)
