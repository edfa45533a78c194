"""Merge the clients' prompts and decide how many images each one gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fgl_app.prompts.writing import PromptCount


@dataclass(frozen=True, order=True)
class PromptBudget:
    """One prompt and the number of images to draw from it."""

    label: int
    prompt: str
    num_images: int


def merge_prompts(clients: Iterable[Sequence[PromptCount]]) -> list[PromptCount]:
    """Take the union of all clients' prompts and add the counts of equal ones (FGL, Section 3.3).

    The result does not depend on the order of the clients and names none of them.
    """
    totals: Counter[tuple[int, str]] = Counter()
    for prompts in clients:
        for item in prompts:
            totals[item.label, item.prompt] += item.count
    return [PromptCount(label, prompt, count) for (label, prompt), count in sorted(totals.items())]


def spread_budget(prompts: Sequence[PromptCount], images_per_class: int) -> list[PromptBudget]:
    """Spread the images of each class over its prompts in proportion to their counts.

    Largest-remainder rounding, so that every class that has a prompt gets exactly ``images_per_class`` images; ties go
    to the prompt that sorts first.

    Args:
        prompts: Merged prompts, at most one entry per label and text.
        images_per_class: Images to draw per class, at least 1.

    Returns:
        Prompts with at least one image, ordered by label and text.
    """
    budget: list[PromptBudget] = []
    for label in sorted({item.label for item in prompts}):
        of_class = sorted(item for item in prompts if item.label == label)
        total = sum(item.count for item in of_class)
        shares = [divmod(item.count * images_per_class, total) for item in of_class]
        left = images_per_class - sum(whole for whole, _ in shares)
        by_remainder = sorted(range(len(shares)), key=lambda index: (-shares[index][1], index))
        extra = set(by_remainder[:left])
        budget += [
            PromptBudget(label, item.prompt, whole + (index in extra))
            for index, (item, (whole, _)) in enumerate(zip(of_class, shares, strict=True))
        ]
    return [item for item in budget if item.num_images > 0]
