"""Merge the clients' prompts and decide how many images each one gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fgl_app.prompts.writing import PromptCount


@dataclass(frozen=True)
class MergedPrompts:
    """What the generator shall draw, once all clients have said what they hold."""

    prompts: tuple[PromptCount, ...]
    """Distinct prompts with the counts of all clients; no client is named."""
    class_names: tuple[str, ...]
    """The run's K classes, in the order of their labels."""
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """At the level of embeddings: float16 ``[T, D]`` by the name that stands in the place of a prompt's text."""


@dataclass(frozen=True, order=True)
class PromptBudget:
    """One prompt and the number of images to draw from it."""

    label: int
    prompt: str
    num_images: int
    domain: str = ""


def merge_prompts(clients: Iterable[Sequence[PromptCount]]) -> list[PromptCount]:
    """Take the union of all clients' prompts; add up the counts and the senders of equal ones (FGL, Section 3.3).

    The result does not depend on the order of the clients and names none of them.
    """
    totals: Counter[tuple[int, str, str]] = Counter()
    senders: Counter[tuple[int, str, str]] = Counter()
    for prompts in clients:
        sent: Counter[tuple[int, str, str]] = Counter()
        for item in prompts:
            sent[item.label, item.prompt, item.domain] += item.count
        totals.update(sent)
        senders.update(sent.keys())
    return [
        PromptCount(label, prompt, count, domain, senders[label, prompt, domain])
        for (label, prompt, domain), count in sorted(totals.items())
    ]


def spread_budget(prompts: Sequence[PromptCount], images_per_class: int, uniform: bool = False) -> list[PromptBudget]:
    """Spread the images of each class over its prompts, in proportion to their counts or evenly.

    Largest-remainder rounding, so that every class that has a prompt gets exactly ``images_per_class`` images; ties go
    to the prompt that sorts first.

    Args:
        prompts: Merged prompts, at most one entry per label and text.
        images_per_class: Images to draw per class, at least 1.
        uniform: Give every prompt of a class the same number of images.

    Returns:
        Prompts with at least one image, ordered by label and text.
    """
    budget: list[PromptBudget] = []
    for label in sorted({item.label for item in prompts}):
        of_class = sorted(item for item in prompts if item.label == label)
        weights = [1 if uniform else item.count for item in of_class]
        shares = [divmod(weight * images_per_class, sum(weights)) for weight in weights]
        left = images_per_class - sum(whole for whole, _ in shares)
        by_remainder = sorted(range(len(shares)), key=lambda index: (-shares[index][1], index))
        extra = set(by_remainder[:left])
        budget += [
            PromptBudget(label, item.prompt, whole + (index in extra), item.domain)
            for index, (item, (whole, _)) in enumerate(zip(of_class, shares, strict=True))
        ]
    return [item for item in budget if item.num_images > 0]
