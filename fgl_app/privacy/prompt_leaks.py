"""What prompts say: contacts, numbers, names, places and rare words in them, and what they count.

The recognizers are lists and patterns of maintained packages (extra ``audit``) and need no model: they know what is
written like a name or a number, not what it means. A caption without a finding is not proven harmless.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fgl_app.errors import ConfigError
from fgl_app.privacy.lexicon import Lexicon
from fgl_app.prompts import PromptCount

KINDS = ("e-mail address", "link", "phone number", "number", "name", "place", "rare word")
"""In the order in which they claim a piece of text."""
COMMON_SHARE = 5e-6
"""A word that is more frequent than this in English is not taken for a name or a place by its letters alone."""
RARE_SHARE = 1e-7
"""A word that is less frequent than this, once in ten million words, is rare."""
NGRAM_WORDS = 3
"""Words of the phrases that are looked for in a single prompt."""
_REGION = "US"
"""Numbers with a leading + are those of any country; others are read as written in this one, by their length."""
_EMAIL = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}")
_LINK = re.compile(r"(?:https?://|www\.)\S+|\b(?:\d{1,3}\.){3}\d{1,3}\b")
_NUMBER = re.compile(r"\d(?:[\d.,:/-]*\d)+")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_TITLES = frozenset({
    "mr", "mrs", "ms", "miss", "dr", "prof", "professor", "sir", "madam", "captain", "nurse", "herr", "frau",
    "monsieur", "madame", "señor", "señora", "signor", "signora",
})  # fmt: skip
_LONGEST_PLACE = 4
"""Words of a place's name."""


@dataclass(frozen=True)
class Finding:
    """A piece of a text that may tell who or where somebody is."""

    kind: str
    """One of :data:`KINDS`."""
    start: int
    """First character."""
    end: int
    """One behind the last character."""


@dataclass(frozen=True)
class PromptAudit:
    """What a set of prompts reveals."""

    num_prompts: int
    """Distinct prompts."""
    num_images: int
    """Images that they stand for."""
    images_per_class: dict[int, int]
    """Exact number of images of each class, which the counts reveal; by label."""
    clients_per_class: dict[int, int]
    """Least number of clients that hold a class: of the prompt of it that most clients sent."""
    from_one_client: int
    """Prompts that a single client sent."""
    of_one_image: int
    """Prompts that stand for a single image."""
    single_phrases: tuple[str, ...]
    """Phrases of :data:`NGRAM_WORDS` words that occur in one prompt of one image only, sorted."""
    findings: tuple[tuple[PromptCount, Finding], ...]

    def prompts_with(self, kind: str) -> int:
        """Return how many prompts hold a finding of this kind."""
        return len({(item.label, item.prompt, item.domain) for item, found in self.findings if found.kind == kind})


def find_leaks(text: str, lexicon: Lexicon, public: frozenset[str] = frozenset()) -> list[Finding]:
    """Find what may identify somebody in a text.

    - e-mail addresses, links and internet addresses: by their form,
    - phone numbers: by the ``phonenumbers`` library, possible numbers of any country,
    - numbers: of two and more digits, such as dates, ages and records,
    - names: a title and a word; a given name and a surname, in capitals or both rare in English; a given name or a
      surname with a capital letter inside a sentence,
    - places: with a capital letter inside a sentence, of several words, or large and rare in English as a word,
    - rare words: see :data:`RARE_SHARE`.

    Args:
        text: A caption or a prompt.
        lexicon: Public lists.
        public: Words, in lower case, that anybody may know, such as those of class names and templates: they are never
            names, places or rare.

    Returns:
        Findings that do not overlap, in the order of the text.

    Raises:
        ConfigError: If the package phonenumbers is not installed.
    """
    spans = [("e-mail address", *found.span()) for found in _EMAIL.finditer(text)]
    spans += [("link", *found.span()) for found in _LINK.finditer(text)]
    spans += [("phone number", start, end) for start, end in _phone_numbers(text)]
    spans += [("number", *found.span()) for found in _NUMBER.finditer(text) if found.group() not in public]
    words = _words(text)
    places = _place_names(text, words, lexicon, public)
    spans += [
        ("name", start, end)
        for start, end in _person_names(words, lexicon, public)
        if not any(first <= start and end <= last and end - start < last - first for first, last in places)
    ]
    spans += [("place", start, end) for start, end in places]
    spans += [
        ("rare word", word.start, word.end)
        for word in words
        if len(word.lower) > 2 and word.lower not in public and _share(word.lower, lexicon) < RARE_SHARE
    ]
    return _without_overlaps(spans)


def audit_prompts(
    prompts: Sequence[PromptCount], lexicon: Lexicon, public: frozenset[str] = frozenset()
) -> PromptAudit:
    """Say what a set of prompts reveals: those of all clients merged, or those of one client.

    Args:
        prompts: Distinct prompts with their counts.
        lexicon: Public lists.
        public: Words that anybody may know; see :func:`public_words`.
    """
    images: Counter[int] = Counter()
    clients: Counter[int] = Counter()
    phrases: Counter[str] = Counter()
    for item in prompts:
        images[item.label] += item.count
        clients[item.label] = max(clients[item.label], item.clients)
        phrases.update(dict.fromkeys(_phrases(item.prompt, public), item.count))
    return PromptAudit(
        len(prompts),
        sum(images.values()),
        dict(sorted(images.items())),
        dict(sorted(clients.items())),
        sum(item.clients == 1 for item in prompts),
        sum(item.count == 1 for item in prompts),
        tuple(sorted(phrase for phrase, count in phrases.items() if count == 1)),
        tuple((item, found) for item in prompts for found in find_leaks(item.prompt, lexicon, public)),
    )


def public_words(texts: Iterable[str]) -> frozenset[str]:
    """Return the words and numbers of public texts, in lower case."""
    return frozenset(
        found.group().lower() for text in texts for pattern in (_WORD, _NUMBER) for found in pattern.finditer(text)
    )


@dataclass(frozen=True)
class _Word:
    start: int
    end: int
    lower: str
    capital: bool
    """Whether it begins with a capital letter and no sentence does so with it."""
    opening: bool
    """Whether it begins with a capital letter and a sentence, too."""
    gap: str
    """What stands between it and the word before."""


def _words(text: str) -> list[_Word]:
    words: list[_Word] = []
    for found in _WORD.finditer(text):
        before = text[: found.start()].rstrip("\"'( ")
        starts, upper = not before or before[-1] in ".!?:", found.group()[0].isupper()
        lower = re.sub(r"['’]s$", "", found.group().lower())
        gap = text[words[-1].end if words else 0 : found.start()]
        words.append(_Word(*found.span(), lower, upper and not starts, upper and starts, gap))
    return words


def _person_names(words: Sequence[_Word], lexicon: Lexicon, public: frozenset[str]) -> list[tuple[int, int]]:
    spans = []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else None
        adjacent = following is not None and following.gap in (" ", ". ")
        if following is not None and adjacent and word.lower in _TITLES and following.lower not in public:
            known = following.lower in lexicon.surnames or following.lower in lexicon.given_names
            if following.capital or following.opening or (known and _is_proper(following, lexicon)):
                spans.append((word.start, following.end))
                continue
        if word.lower in public or len(word.lower) < 3:
            continue
        given, written = word.lower in lexicon.given_names, word.capital or word.opening
        if following is not None and following.gap == " " and given and following.lower not in public:
            both_capital = written and following.capital
            both_proper = (
                following.lower in lexicon.surnames and _is_proper(word, lexicon) and _is_proper(following, lexicon)
            )
            if both_capital or both_proper:
                spans.append((word.start, following.end))
                continue
        if (given or word.lower in lexicon.surnames) and (
            (word.capital and (given or _is_proper(word, lexicon)))
            or (word.opening and given and _is_proper(word, lexicon))
        ):
            spans.append((word.start, word.end))
    return spans


def _place_names(text: str, words: Sequence[_Word], lexicon: Lexicon, public: frozenset[str]) -> list[tuple[int, int]]:
    spans = []
    for index, first in enumerate(words):
        for length in range(min(_LONGEST_PLACE, len(words) - index), 0, -1):
            last = words[index + length - 1]
            name = text[first.start : last.end].lower()
            if name not in lexicon.places or all(word.lower in public for word in words[index : index + length]):
                continue
            capital = first.capital or (first.opening and _is_proper(first, lexicon))
            large = name in lexicon.large_places and (length > 1 or _is_proper(first, lexicon))
            if len(name) > 2 and (capital or large):
                spans.append((first.start, last.end))
                break
    return spans


def _phone_numbers(text: str) -> list[tuple[int, int]]:
    try:
        from phonenumbers import Leniency, PhoneNumberMatcher
    except ImportError:
        raise ConfigError(
            "Reading prompts for phone numbers needs the package phonenumbers, which is not installed here. Install "
            "the extra: pip install 'federated-generative-learning[audit]'."
        ) from None
    return [(found.start, found.end) for found in PhoneNumberMatcher(text, _REGION, leniency=Leniency.POSSIBLE)]


def _is_proper(word: _Word, lexicon: Lexicon) -> bool:
    """Whether a word is too rare in English to be an ordinary one, as names are that are not words as well."""
    return _share(word.lower, lexicon) < COMMON_SHARE


def _share(word: str, lexicon: Lexicon) -> float:
    """Share of English text; of a compound with a hyphen or an apostrophe, that of its rarest long part."""
    if word in lexicon.frequency:
        return lexicon.frequency[word]
    parts = [part for part in re.split(r"['’-]", word) if len(part) > 2]
    return min((lexicon.frequency.get(part, 0.0) for part in parts), default=1.0)


def _phrases(prompt: str, public: frozenset[str]) -> set[str]:
    words = [found.group().lower() for found in _WORD.finditer(prompt)]
    grams = [words[start : start + NGRAM_WORDS] for start in range(len(words) - NGRAM_WORDS + 1)]
    return {" ".join(gram) for gram in grams if not public.issuperset(gram)}


def _without_overlaps(spans: Sequence[tuple[str, int, int]]) -> list[Finding]:
    """Keep, of spans that overlap, that of the kind that comes first."""
    kept: list[Finding] = []
    for kind, start, end in sorted(spans, key=lambda span: (KINDS.index(span[0]), span[1])):
        if all(end <= other.start or start >= other.end for other in kept):
            kept.append(Finding(kind, start, end))
    return sorted(kept, key=lambda found: found.start)
