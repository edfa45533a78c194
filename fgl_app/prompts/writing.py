"""Turn labels, and captions of images, into prompts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fgl_app.errors import PromptError

MAX_PROMPT_CHARS = 1_000
"""Longest prompt where the run's ``max-prompt-chars`` is not passed on, characters."""

JOINERS = "\u200c\u200d"
"""Invisible characters that decide how their neighbours are written."""
_UNSEEN = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""What Unicode calls Default_Ignorable_Code_Point."""


@dataclass(frozen=True, order=True)
class PromptCount:
    """One distinct prompt of one class and how many images it stands for."""

    label: int
    """Index of the class in the run's class names, 0 to K - 1."""
    prompt: str
    """What the generator is asked for; for an embedding, the name that :func:`embedding_name` gives it."""
    count: int
    """Number of images that gave this prompt, at least 1."""
    domain: str = ""
    """Domain of the images, as the card names it; empty for a data set of one domain."""
    clients: int = 1
    """Number of clients that sent it; 0 if the server wrote it."""


def fill(template: str, class_name: str, caption: str = "") -> str:
    """Fill the placeholders ``{class}``, ``{a class}`` (the name with its article) and ``{caption}`` of a template."""
    article = "an" if class_name[:1].lower() in "aeiou" else "a"
    named = template.replace("{a class}", f"{article} {class_name}").replace("{class}", class_name)
    return named.replace("{caption}", caption.strip())


def class_prompts(
    labels: Sequence[int],
    class_names: Sequence[str],
    templates: Sequence[str],
    domain: str = "",
    max_chars: int = MAX_PROMPT_CHARS,
) -> list[PromptCount]:
    """Write the prompts of each class that is held (FGL, Section 3.2: class-level prompts).

    Args:
        labels: Label of each image, 0 to K - 1.
        class_names: How prompts call the K classes.
        templates: Texts with the placeholder ``{class}``, e.g. ``"A photo of a {class}"``.
        domain: Domain of the images.
        max_chars: Longest prompt, characters.

    Returns:
        Distinct prompts, ordered by label and text; ``count`` is the number of images of the class.

    Raises:
        PromptError: If a prompt is longer: cut, it could lose the name of its class.
    """
    named = ((label, fill(template, class_names[label])) for label in labels for template in templates)
    prompts = _count(named, domain)
    longest = max((len(item.prompt) for item in prompts), default=0)
    if longest > max_chars:
        raise PromptError(
            f"A class prompt has {longest} characters, and `max-prompt-chars` allows {max_chars}. Use a shorter "
            "template or class name, or a larger `max-prompt-chars`."
        )
    return prompts


def instance_prompts(
    labels: Sequence[int],
    captions: Sequence[str],
    class_names: Sequence[str],
    template: str,
    domain: str = "",
    max_chars: int = MAX_PROMPT_CHARS,
) -> list[PromptCount]:
    """Write one prompt per image from its label and its caption (FGL, Section 3.2: instance-level prompts).

    Args:
        labels: Label of each image, 0 to K - 1; length N.
        captions: Caption of each image; length N.
        class_names: How prompts call the K classes.
        template: Text with the placeholders ``{class}`` and ``{caption}``.
        domain: Domain of the images.
        max_chars: Longest prompt, characters; a longer one is cut.

    Returns:
        Distinct prompts with their counts, ordered by label and text.
    """
    return _count(
        ((label, fill(template, class_names[label], caption)) for label, caption in zip(labels, captions, strict=True)),
        domain,
        max_chars,
    )


def _count(pairs: Iterable[tuple[int, str]], domain: str, max_chars: int | None = None) -> list[PromptCount]:
    cleaned = Counter((label, printable(prompt)[:max_chars].strip()) for label, prompt in pairs)
    return [PromptCount(label, prompt, count, domain) for (label, prompt), count in sorted(cleaned.items())]


def printable(text: str) -> str:
    """Make one line of printable characters of any text, in Unicode's normal form NFKC."""
    normal = unicodedata.normalize("NFKC", text)
    return "".join(character for character in " ".join(normal.split()) if is_printable(character)).strip()


def visible(text: str) -> str:
    """Leave out what nobody sees, such as joiners and variation selectors, which could part a word."""
    return _UNSEEN.sub("", text)


def comparable(text: str) -> str:
    """Return the form in which words are compared: NFKC, nothing that nobody sees, single blanks, no case."""
    seen = visible(unicodedata.normalize("NFKC", text))
    return " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())


def is_printable(character: str) -> bool:
    """Return whether a prompt may hold this character.

    Refused are the Unicode categories Cc, Cf, Cs, Co, Cn, Zl and Zp: control, direction changes, lone surrogates, ends
    of lines and paragraphs, and what no caption holds; the two joiners that Persian, Indian scripts and emoji need are
    allowed.
    """
    category = unicodedata.category(character)
    return character in JOINERS or not (category[0] == "C" or category in ("Zl", "Zp"))
