"""Which defences a finished run had on, and what they did, for ``results.json`` and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fgl_app.config import default_run_config
from fgl_app.reporting.page import Section, Table
from fgl_app.settings import Settings

_OF_PROMPTS = (
    "scrub", "caption-vocabulary", "max-caption-words", "prompt-counts", "classes-epsilon", "require-approval",
    "min-clients-per-prompt", "retain-prompts", "embedding-summary", "embedding-clip", "embedding-epsilon",
    "blocked-words", "max-client-share",
)  # fmt: skip
_OF_ROUNDS = ("client-dp", "example-dp-noise", "max-update-norm")


def defences_statement(settings: Settings, prompt_round: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """State which defences were on, and how many captions and prompts they changed.

    Args:
        settings: The run's settings.
        prompt_round: What is known of the exchange of prompts, with what was counted in it under ``defences``; None if
            no client was asked.

    Returns:
        ``settings``: the keys that are not at their defaults, which are off, with their values; beside them what
        :meth:`strategies.prompt_round.PromptRound.report` counted. None if no defence was on.
    """
    by_embedding = settings.prompts.prompt_level == "embedding"
    keys: list[str] = []
    if settings.synthesizes and not settings.prompts_from_server:
        keys += [key for key in _OF_PROMPTS if by_embedding or not key.startswith("embedding-")]
    if settings.run.method != "centralized" and settings.run.num_server_rounds > settings.synthesizes:
        keys += _OF_ROUNDS
    flat, off = settings.flat(), default_run_config()
    chosen = {key: flat[key] for key in keys if flat[key] != off[key]}
    if not chosen:
        return None
    return {"settings": chosen, **((prompt_round or {}).get("defences") or {})}


def defences_sections(statement: Mapping[str, Any] | None) -> list[Section]:
    """Return the part of a run's report that shows what :func:`defences_statement` states; none without defences."""
    if not statement:
        return []
    text = []
    if captions := statement.get("captions"):
        text.append(
            f"{captions['clients']} clients wrote {captions['written']:,} captions. Their defences changed "
            f"{captions['changed']:,} of them, and left nothing of {captions['emptied']:,}."
        )
    if replaced := statement.get("prompts_replaced"):
        images = statement.get("images_replaced")  # not known where counts are withheld or have noise
        of_images = "" if images is None else f", of {images:,} images,"
        text.append(f"{replaced:,} prompts{of_images} were replaced, because too few clients sent them.")
    if cut := statement.get("prompts_cut"):
        text.append(f"{cut:,} prompts count for less, or not at all, because one client claimed too much of a class.")
    rows = [[key, str(value)] for key, value in statement["settings"].items()]
    return [Section("Defences", text, tables=[Table("Settings.", ["Key", "Value"], rows, numbers=False)])]
