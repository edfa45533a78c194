"""Screen what clients send as prompts: each row by itself, so that an honest client loses only what breaks a rule."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fgl_app.errors import ConfigError
from fgl_app.prompts.writing import MAX_PROMPT_CHARS, comparable, is_printable, printable
from fgl_app.settings import PolicySettings
from fgl_app.user_files import read_user_text

MAX_NAME_CHARS = 100
"""Longest name of a class or a domain, characters."""
NAMED = f"names of at most {MAX_NAME_CHARS} printable characters in Unicode's normal form NFKC"
"""What :func:`name_fault` asks for."""
MAX_COUNT = 10**9
"""Most images that one prompt may stand for."""


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt as it arrives: its class by name, not yet a label."""

    class_name: str
    prompt: str
    count: int
    domain: str


@dataclass(frozen=True)
class PromptLimits:
    """What the server accepts of one client."""

    max_prompts: int
    """Distinct prompts; what comes behind them is refused."""
    max_chars: int
    """Characters of one prompt; the names of embeddings have a length of their own."""
    blocked_words: tuple[str, ...] = ()
    """Words and phrases that no prompt may hold, whatever their case."""
    max_classes: int = 1000
    """Classes of a label space that is formed of the clients' class names."""


def screen_prompts(
    rows: Sequence[object],
    limits: PromptLimits,
    *,
    class_names: Collection[str] = (),
    domains: Collection[str] = (),
    embeddings: Collection[str] | None = None,
) -> tuple[list[NamedPrompt], Counter[str]]:
    """Keep the rows of one client's upload that keep every rule.

    Args:
        rows: What the client sent for rows ``[class name, count, prompt(, domain)]``; anything at all.
        limits: What is accepted of one client.
        class_names: The run's classes; empty where the clients' are united.
        domains: The run's domains.
        embeddings: Names of the embeddings that came along, which prompts must then be; None for prompts of text.

    Returns:
        The prompts that are kept, in their order, and how many rows were refused for which reason. No reason quotes
        a prompt.
    """
    kept: dict[tuple[str, str, str], NamedPrompt] = {}
    refused: Counter[str] = Counter()
    blocked = _pattern(limits.blocked_words)
    for row in rows:
        found = _read_row(row)
        if found is None:
            refused["a prompt that is not [class, count, text] with a domain or without"] += 1
            continue
        if class_names and found.class_name not in class_names:
            reason = "a class that is none of the run's"
        elif found.domain and found.domain not in domains:
            reason = "a domain that is none of the run's"
        elif not 1 <= found.count <= MAX_COUNT:
            reason = "a count out of range"
        elif not found.prompt or (embeddings is None and len(found.prompt) > limits.max_chars):
            reason = "an empty or too long prompt"
        elif fault := _text_fault(found.class_name) or _text_fault(found.prompt):
            reason = fault
        elif blocked is not None and any(
            blocked.search(comparable(text)) for text in (found.prompt, *(() if class_names else (found.class_name,)))
        ):
            reason = "a blocked word"
        elif embeddings is not None and found.prompt not in embeddings:
            reason = "a prompt without its embedding"
        elif (key := (found.class_name, found.prompt, found.domain)) in kept:
            reason = "a prompt that was sent before"
        elif len(kept) >= limits.max_prompts:
            reason = "more prompts than one client may send"
        else:
            kept[key] = found
            continue
        refused[reason] += 1
    return list(kept.values()), refused


def name_fault(name: str) -> str | None:
    """Return why no prompt of a class with this name is accepted, as :func:`screen_prompts` says it; None if it is."""
    return _text_fault(name) if 1 <= len(name) <= MAX_NAME_CHARS else f"{len(name)} characters"


def _text_fault(text: str) -> str | None:
    if not all(map(is_printable, text)):
        return "characters that control the output or change its direction"
    if not unicodedata.is_normalized("NFKC", text):
        return "text that is not in Unicode's normal form NFKC"
    return None


def limits_of(policy: PolicySettings, *, of_server: bool = True) -> PromptLimits:
    """Return what a run's server accepts of one client.

    Args:
        policy: The run's policy.
        of_server: Whether this is the server's machine; a file of blocked words lies there alone.

    Raises:
        ConfigError: If that file cannot be read, or holds a word that could never be found.
    """
    elsewhere = not of_server and policy.blocked_words.startswith(("/", "~"))
    return PromptLimits(
        policy.max_prompts_per_client,
        policy.max_prompt_chars,
        () if elsewhere else read_blocked_words(policy.blocked_words, policy.max_prompt_chars),
        policy.max_classes,
    )


def read_blocked_words(value: str, max_chars: int = MAX_PROMPT_CHARS) -> tuple[str, ...]:
    """Return the words of ``blocked-words``: separated by commas, or the lines of a file by its absolute path.

    Args:
        value: Of the key.
        max_chars: Longest prompt that is accepted, characters.

    Raises:
        ConfigError: If the file cannot be read, or a word could never be found in a prompt.
    """
    if not value.startswith(("/", "~")):
        if value.endswith(".txt"):
            raise ConfigError(f"`blocked-words` must name a file by its absolute path, but is {value!r}.")
        return tuple(_findable(word, "`blocked-words`", max_chars) for word in value.split(",") if word.strip())
    path = Path(value).expanduser()
    try:
        lines = read_user_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`blocked-words` must be words separated by commas, or a text file in UTF-8 with one word or phrase per "
            f'line, but {value!r} cannot be read ({type(error).__name__}). Use for example "".'
        ) from None
    return tuple(
        _findable(line, f"{value!r}, line {number} of `blocked-words`,", max_chars)
        for number, line in enumerate(lines, 1)
        if line.strip()
    )


def _findable(word: str, where: str, max_chars: int) -> str:
    """Return a word in the form that is searched for, if a prompt that is nothing but this word would be found."""
    form = comparable(word)
    too_long = len(form) > max(max_chars, MAX_NAME_CHARS)  # names of classes are searched, too
    if not form or too_long or not cast(re.Pattern[str], _pattern([form])).search(comparable(printable(word))):
        raise ConfigError(
            f"{where} must hold words that a prompt can hold, but {word!r} can never be found. Correct or remove it."
        )
    return form


def _read_row(row: object) -> NamedPrompt | None:
    match row:
        case [str(name), int(count), str(prompt), *rest] if not isinstance(count, bool):
            match rest:
                case []:
                    domain = ""
                case [str(domain)]:
                    pass
                case _:
                    return None
        case _:
            return None
    if not 1 <= len(name) <= MAX_NAME_CHARS or len(domain) > MAX_NAME_CHARS:
        return None
    return NamedPrompt(name, prompt, count, domain)


def _pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    if not words:
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(comparable(word)) for word in words)})(?!\w)")
