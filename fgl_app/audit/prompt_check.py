"""The audit's third part: what the prompts of a run, or of one client, say."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load

from fgl_app.audit.check import Check
from fgl_app.audit.encoders import MAX_INVERTED, invert_embeddings
from fgl_app.audit.figures import noise_figure
from fgl_app.audit.material import Material
from fgl_app.errors import RunFolderError
from fgl_app.privacy.inversion import CERTAIN_ERROR
from fgl_app.privacy.lexicon import load_lexicon
from fgl_app.privacy.prompt_leaks import KINDS, NGRAM_WORDS, PromptAudit, audit_prompts, public_words
from fgl_app.prompts import PromptCount
from fgl_app.reporting.figures import spread
from fgl_app.settings import Settings
from fgl_app.user_files import read_user_text

_MAX_EXAMPLES = 200
"""Texts of each kind of finding that are kept."""


def check_prompts(material: Material) -> Check:
    """Read the merged prompts of a run, in which no client is named; of embeddings, what can be read out of them.

    Raises:
        ConfigError: If the extra ``audit`` is not installed.
    """
    run, settings = material.run, material.settings
    if not run.prompts:
        return Check([f"The {'run has kept' if settings.synthesizes else 'method has'} no prompts."])
    if all(item.clients == 0 for item in run.prompts):
        return Check(["The server wrote the prompts from the class names alone; they say nothing of any client."])
    public = public_words(settings.public_texts(run.class_names))
    if settings.prompts.prompt_level == "embedding":
        return _check_embeddings(material, public)
    return _described(audit_prompts(run.prompts, load_lexicon(), public), run.class_names, "The clients", settings)


def check_captions(file: Path) -> Check:
    """Read one client's own captions or prompts, at its side.

    Args:
        file: A client's file of captions (JSON lines ``[image, caption]``), a preview of ``require-approval``, which
            has classes and counts, a ``prompts.jsonl``, or one text a line.

    Raises:
        RunFolderError: If it cannot be read, or labels or counts in it are no numbers.
        ConfigError: If the extra ``audit`` is not installed.
    """
    prompts, class_names = read_captions(file)
    audited = audit_prompts(prompts, load_lexicon(), public_words(class_names))
    check = _described(audited, class_names, "This client's file")
    if not class_names:
        return check
    held = ", ".join(f"{class_names[label]} ({count:,})" for label, count in audited.images_per_class.items())
    return Check([*check.findings, f"It names the classes that this client holds, and counts: {held}."], check.content)


def read_captions(file: Path) -> tuple[list[PromptCount], tuple[str, ...]]:
    """Read a client's captions or prompts; see :func:`check_captions`.

    Returns:
        Prompts, those of captions with the label 0; and the names of their classes, where the file has them.
    """
    try:
        text = read_user_text(file.expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{str(file)!r} must be a text file of captions or prompts, but cannot be read ({type(error).__name__})."
        ) from None
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, RecursionError):
        rows = [(str(row[0]), int(row[1]), str(row[2]), str(row[3])) for row in json.loads(text)["prompts"]]
        names = sorted({row[0] for row in rows})
        return [PromptCount(names.index(name), text, count, domain) for name, count, text, domain in rows], tuple(names)
    counts: Counter[tuple[int, str, str]] = Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = line
        if isinstance(value, dict) and "prompt" in value:
            label, count = value.get("label", 0), value.get("count", 1)
            if not (type(label) is type(count) is int and label >= 0 and count >= 1):
                raise RunFolderError(
                    "`label` beside a prompt must be a whole number from 0 on and `count` one from 1 on, as in a "
                    f"prompts.jsonl, but in line {number} of {str(file)!r} they are not. Correct or omit them."
                )
            counts[label, str(value["prompt"]), str(value.get("domain", ""))] += count
        elif isinstance(value, list) and len(value) == 2:
            counts[0, str(value[1]), ""] += 1
        else:
            counts[0, line, ""] += 1
    return [PromptCount(label, prompt, count, domain) for (label, prompt, domain), count in sorted(counts.items())], ()


def _check_embeddings(material: Material, public: frozenset[str]) -> Check:
    run, settings = material.run, material.settings
    file = run.path / "embeddings.safetensors"
    embeddings = load(file.read_bytes()) if file.exists() else {}
    chosen = spread([item for item in run.prompts if item.prompt in embeddings], MAX_INVERTED)
    if not chosen:
        counted = _counts_sentence(_images_per_class(run.prompts), run.class_names, settings)
        return Check(["The run has not kept its embeddings.", counted])
    found = invert_embeddings(
        [embeddings[item.prompt] for item in chosen],
        settings.synthesis.generator,
        settings.synthesis.generator_revision,
        settings.run.device,
        settings.run.seed,
    )
    certain = [error < CERTAIN_ERROR for error in found.errors]
    read = [
        (PromptCount(item.label, text, item.count, item.domain, item.clients), sure)
        for item, text, sure in zip(chosen, found.texts, certain, strict=True)
        if text
    ]
    guesses = sum(not sure for _, sure in read)
    sentences = [
        f"The clients sent {len(run.prompts):,} embeddings. The words of {sum(certain) or 'none'} of {len(certain)} "
        "embeddings that were tried could be read back with certainty, by the generator's own text encoder"
        f"{found.limits}."
    ]
    if guesses:
        sentences.append(
            f"What was read of {guesses} others are guesses, which may be right word for word: noise, a mean or a cut "
            "makes them uncertain, which does not show that it hides the words."
        )
    figures = {}
    if found.shares:
        figures["noise"] = noise_figure(found.scales, found.shares)
        sentences.append(
            "What Gaussian noise would leave of those words: with a standard deviation of "
            + ", ".join(f"{scale:g}" for scale in found.scales)
            + " times the root mean square of an embedding's entries, inversion finds "
            + ", ".join(f"{100 * share:.0f} %" for share in found.shares)
            + " of the words."
        )
    content: dict[str, Any] = {
        "embeddings": {
            "tried": len(certain),
            "certain": sum(certain),
            "errors": list(found.errors),
            "texts": list(found.texts),
            "noise_scales": list(found.scales),
            "words_found": list(found.shares),
        }
    }
    if not read:
        counted = _counts_sentence(_images_per_class(run.prompts), run.class_names, settings)
        return Check([*sentences, counted], content, figures)
    audited = audit_prompts([item for item, _ in read], load_lexicon(), public)
    described = _described(
        dataclasses.replace(audited, images_per_class=_images_per_class(run.prompts)),  # of those not tried, too
        run.class_names,
        "Those that were read, guesses among them," if guesses else "Those that could be read",
        settings,
        frozenset(item for item, sure in read if sure),
    )
    if guesses:
        sentences.append(
            "What follows holds of the words that were read: what a guess shows may not have been said, and what it "
            "does not show may have been; audit.json tells which is which."
        )
    return Check([*sentences, *described.findings], {**described.content, **content}, figures)


def _described(
    audited: PromptAudit,
    class_names: Sequence[str],
    who: str,
    settings: Settings | None = None,
    certain: frozenset[PromptCount] | None = None,
) -> Check:
    exact = settings is None or settings.privacy.prompt_counts == "exact"
    sentences = [
        f"{who} gave {audited.num_prompts:,} distinct prompts, {audited.from_one_client:,} of them sent by a single "
        f"client{f' and {audited.of_one_image:,} made of a single image' if exact else ''}.",
        _counts_sentence(audited.images_per_class, class_names, settings),
    ]
    held = {kind: audited.prompts_with(kind) for kind in KINDS}
    named = [
        f"{count:,} {'holds' if count == 1 else 'hold'} {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        for kind, count in held.items()
        if count
    ]
    absent = [kind for kind, count in held.items() if not count]
    if named:
        sentences.append(f"Of the prompts, {', '.join(named)}; audit.json lists them.")
    if absent:
        sentences.append(f"No prompt holds a word or number that is written like: {', '.join(absent)}.")
    if audited.single_phrases and exact:
        sentences.append(
            f"{len(audited.single_phrases):,} phrases of {NGRAM_WORDS} words occur in the prompt of one image only."
        )
    examples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for item, found in audited.findings:
        if len(examples[found.kind]) < _MAX_EXAMPLES:
            shown = item.prompt[found.start : found.end]
            example = {"label": item.label, "found": shown, "prompt": item.prompt}
            examples[found.kind].append(example if certain is None else example | {"certain": item in certain})
    content = {
        "num_prompts": audited.num_prompts,
        "num_images": audited.num_images,
        "from_one_client": audited.from_one_client,
        "of_one_image": audited.of_one_image,
        "images_per_class": {str(label): count for label, count in audited.images_per_class.items()},
        "clients_per_class": {str(label): count for label, count in audited.clients_per_class.items()},
        "prompts_with": held,
        "examples": {kind: each for kind, each in examples.items() if each},
        "single_phrases": list(audited.single_phrases[:_MAX_EXAMPLES]),
    }
    return Check(sentences, content)


def _counts_sentence(
    images_per_class: dict[int, int], class_names: Sequence[str], settings: Settings | None = None
) -> str:
    """Say what counts and classes reveal; without settings they are taken to be as they were counted."""
    held = f"{len(images_per_class)}{f' of {len(class_names)}' if class_names else ''}"
    counts = "exact" if settings is None else settings.privacy.prompt_counts
    classes = f"which classes are held ({held})"
    if settings is not None and settings.privacy.classes_epsilon > 0:
        classes = f"of {held} classes that some client holds them, or drew them at random to hide which it holds,"
    if counts == "withheld":
        return f"They say {classes} and not how many images there are of each."
    how = "exactly how many images" if counts == "exact" else "with noise how many images"
    lowest, highest = min(images_per_class.values()), max(images_per_class.values())
    return f"Their counts say {classes} and {how} of each, from {lowest:,} to {highest:,}."


def _images_per_class(prompts: Sequence[PromptCount]) -> dict[int, int]:
    images: Counter[int] = Counter()
    for item in prompts:
        images[item.label] += item.count
    return dict(images)
