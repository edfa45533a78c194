"""Merge the clients' prompts and decide how many images each one gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fgl_app.files import sha256
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


def require_senders(
    clients: Sequence[Sequence[PromptCount]], min_clients: int, class_prompt: Callable[[int, str], str]
) -> list[list[PromptCount]]:
    """Use a text only if at least k clients sent it (k-anonymity, Sweeney 2002).

    A text that fewer sent becomes its normal form, without case, digits and punctuation, if k clients sent texts of
    that form; otherwise the class's own prompt, which tells nothing but the class, takes its place.

    Args:
        clients: Distinct prompts of each client.
        min_clients: k; 1 leaves everything as it is.
        class_prompt: The prompt of a label and a domain that the server knows by itself.

    Returns:
        The same clients' prompts, distinct again, with the counts of those that became equal added up.
    """
    if min_clients <= 1:
        return [list(prompts) for prompts in clients]
    exact: Counter[tuple[int, str, str]] = Counter()
    normal: Counter[tuple[int, str, str]] = Counter()
    for prompts in clients:
        exact.update({(item.label, item.domain, item.prompt) for item in prompts})
        normal.update({(item.label, item.domain, _normal_form(item.prompt)) for item in prompts})

    def shown(item: PromptCount) -> str:
        form = _normal_form(item.prompt)
        if exact[item.label, item.domain, item.prompt] >= min_clients:
            return item.prompt
        if form and normal[item.label, item.domain, form] >= min_clients:
            return form
        return class_prompt(item.label, item.domain)

    changed = []
    for prompts in clients:
        counts: Counter[tuple[int, str, str]] = Counter()
        for item in prompts:
            counts[item.label, shown(item), item.domain] += item.count
        changed.append([PromptCount(label, text, count, domain) for (label, text, domain), count in counts.items()])
    return changed


def _normal_form(text: str) -> str:
    return " ".join("".join(each if each.isalpha() else " " for each in text.casefold()).split())


def limit_shares(
    clients: Sequence[Sequence[PromptCount]], max_share: float, uniform: bool = False
) -> list[list[PromptCount]]:
    """Cut what single clients claim of a class, so that none of them claims more than its share of the images.

    Within each class a client's weight w_k is the sum of its counts, or its number of prompts where the budget is
    spread evenly. It is cut to min(w_k, s T) with T = sum_k min(w_k, s T), where s is ``max_share``, or 1/n where n
    clients hold the class and that is more: a class that one client holds alone stays its own.

    Args:
        clients: Distinct prompts of each client.
        max_share: Largest share of a class's images, > 0 and at most 1; 1 cuts nothing.
        uniform: Whether every prompt of a class gets the same number of images.

    Returns:
        The same clients' prompts, with counts reduced in proportion, or with fewer prompts where ``uniform``; nothing
        is rounded up, so that a prompt whose count falls below 1 goes.
    """
    cut: list[list[PromptCount]] = [[] for _ in clients]
    for label in sorted({item.label for prompts in clients for item in prompts}):
        of_class = [sorted(item for item in prompts if item.label == label) for prompts in clients]
        weights = [len(items) if uniform else sum(item.count for item in items) for items in of_class]
        limit = _largest_weight([weight for weight in weights if weight], max_share)
        for kept, items, weight in zip(cut, of_class, weights, strict=True):
            if weight <= limit:
                kept += items
            elif uniform:  # in an order that a client cannot choose by what its prompts begin with
                kept += sorted(items, key=lambda item: sha256(item.prompt.encode()))[: max(1, int(limit))]
            else:
                reduced = [replace(item, count=int(item.count * limit / weight)) for item in items]
                kept += [item for item in reduced if item.count] or [replace(items[0], count=1)]
    return [sorted(items) for items in cut]


def _largest_weight(weights: Sequence[int], max_share: float) -> float:
    """Solve L = s T, T = sum_k min(w_k, L) for the limit L; infinite if no weight exceeds it."""
    share = max(max_share, 1 / len(weights))
    ordered = sorted(weights, reverse=True)
    if ordered[0] <= share * sum(ordered):
        return float("inf")
    cut, limit = 0, 0.0
    while ordered[cut] > limit:  # the `cut` largest are cut to the limit: T = cut L + the others
        cut += 1
        limit = share * sum(ordered[cut:]) / (1 - cut * share)
        if cut == len(ordered) - 1:
            break
    return limit


def spread_budget(prompts: Sequence[PromptCount], images_per_class: int, uniform: bool = False) -> list[PromptBudget]:
    """Spread the images of each class over its prompts, in proportion to their counts or evenly.

    Largest-remainder rounding, so that every class that has a prompt gets exactly ``images_per_class`` images; ties are
    broken by a hash, because of more prompts than images the last of the alphabet would never be drawn.

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
        ties = [sha256(item.prompt.encode()) for item in of_class]
        by_remainder = sorted(range(len(shares)), key=lambda index: (-shares[index][1], ties[index]))
        extra = set(by_remainder[:left])
        budget += [
            PromptBudget(label, item.prompt, whole + (index in extra), item.domain)
            for index, (item, (whole, _)) in enumerate(zip(of_class, shares, strict=True))
        ]
    return [item for item in budget if item.num_images > 0]
