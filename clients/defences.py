"""What a client takes out of its prompts before anything leaves it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from fgl_app.errors import ConfigError
from fgl_app.privacy.lexicon import Lexicon, load_lexicon
from fgl_app.privacy.prompt_leaks import find_leaks
from fgl_app.prompts import PromptCount, printable, visible
from fgl_app.user_files import read_user_text

CaptionFilter = Callable[[str], str]
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*")
_BEFORE_MARK = re.compile(r"\s+([,.;:!?])")


def caption_filter(
    public: frozenset[str], *, scrubbing: Literal["off", "on", "strict"], vocabulary_file: str, max_words: int
) -> CaptionFilter:
    """Return the defences that each caption goes through, one after the other.

    Args:
        public: Words in lower case that anybody may know; they always stay.
        scrubbing: What :func:`scrub` removes.
        vocabulary_file: File of the words that may leave the client; empty for any.
        max_words: Words of a caption at most; 0 for any number.

    Raises:
        ConfigError: If the vocabulary cannot be read, or the extra ``audit``, which scrubbing needs, is missing.
    """
    lexicon = load_lexicon() if scrubbing != "off" else None
    vocabulary = read_vocabulary(vocabulary_file) | public if vocabulary_file else None

    def defend(caption: str) -> str:
        if lexicon is not None:
            caption = scrub(caption, lexicon, public, strict=scrubbing == "strict")
        if vocabulary is not None:
            caption = allow_words(caption, vocabulary)
        return cut_words(caption, max_words)

    return defend


class CountedFilter:
    """Applies defences to captions, and counts what they did."""

    def __init__(self, defend: CaptionFilter) -> None:
        """Begin with no captions."""
        self._defend = defend
        self.captions = self.changed = self.emptied = 0

    def __call__(self, caption: str) -> str:
        """Return what may leave the client of a caption."""
        left = self._defend(caption)
        self.captions += 1
        self.changed += _tidy(left) != _tidy(caption)  # blanks and lone marks that go tell of no word
        self.emptied += bool(caption) and not left
        return left


def scrub(caption: str, lexicon: Lexicon, public: frozenset[str], *, strict: bool) -> str:
    """Remove what may identify somebody: contacts, numbers, names and places.

    Args:
        caption: A caption.
        lexicon: Public lists.
        public: Words in lower case that anybody may know, such as the class names; they stay.
        strict: Remove rare words, too.
    """
    kept, end = [], 0
    for found in find_leaks(caption, lexicon, public):
        if strict or found.kind != "rare word":
            kept.append(caption[end : found.start])
            end = found.end
    return _tidy("".join([*kept, caption[end:]]))


def allow_words(caption: str, vocabulary: Collection[str]) -> str:
    """Remove every word and number that is not in ``vocabulary``, which is in lower case."""
    return _tidy(_TOKEN.sub(lambda found: found.group() if found.group().lower() in vocabulary else "", caption))


def cut_words(caption: str, max_words: int) -> str:
    """Cut a caption behind its first ``max_words`` words; 0 cuts nothing."""
    words = caption.split()
    return " ".join(words[:max_words]) if max_words else caption


def read_vocabulary(path: str) -> frozenset[str]:
    """Read a list of words, in the form in which :func:`allow_words` meets the words of captions.

    Raises:
        ConfigError: If the file cannot be read, holds no words, or one that could never be a word of a caption.
    """
    try:
        lines = read_user_text(Path(path).expanduser()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`caption-vocabulary` must be a text file in UTF-8 with one word per line on every client, but {path!r} "
            f"cannot be read ({type(error).__name__})."
        ) from None
    words = set()
    for number, line in enumerate(lines, 1):
        for word in map(visible, map(printable, line.split())):
            if not _TOKEN.fullmatch(word):
                raise ConfigError(
                    f"{path!r}, line {number}: `caption-vocabulary` must hold words of letters and digits, with "
                    f"apostrophes or hyphens only inside, but {word!r} can never be a word of a caption."
                )
            words.add(word.lower())
    if not words:
        raise ConfigError(f"`caption-vocabulary` must hold words, but {path!r} is empty. Leave it empty for any word.")
    return frozenset(words)


def withhold_counts(prompts: Sequence[PromptCount]) -> list[PromptCount]:
    """Report one image for every prompt."""
    return [replace(item, count=1) for item in prompts]


def noise_counts(
    prompts: Sequence[PromptCount], epsilon: float, delta: float, generator: np.random.Generator
) -> list[PromptCount]:
    """Add noise to the counts, and leave out prompts whose noised count is small.

    The stability-based histogram (Bun, Nissim & Stemmer 2016, Section 3.1) is (epsilon, delta)-private for adding or
    removing one image, and (2 epsilon, 2 delta)-private for replacing one, which changes two counts. Discrete Laplace
    noise X with P(X = x) proportional to exp(-epsilon |x|) is added to each count of at least one, and only counts of
    at least 1 + t are sent, where P(X >= t) <= delta, so that the prompt of a single image is sent with probability
    delta at most. What no image gave is never sent.

    Args:
        prompts: Distinct prompts; one image must stand behind one prompt only.
        epsilon: Privacy loss, > 0.
        delta: Probability of failure, 0 to 1.
        generator: Of random numbers that the server must not know.
    """
    # P(X >= t) = exp(-epsilon t) / (1 + exp(-epsilon)) for t >= 1.
    threshold = max(1, math.ceil(-math.log(delta * (1 + math.exp(-epsilon))) / epsilon))
    share = -math.expm1(-epsilon)
    noise = generator.geometric(share, len(prompts)) - generator.geometric(share, len(prompts))
    noised = [item.count + int(draw) for item, draw in zip(prompts, noise, strict=True)]
    return [replace(item, count=count) for item, count in zip(prompts, noised, strict=True) if count >= 1 + threshold]


def randomize_classes(
    held: Collection[int], num_classes: int, epsilon: float, generator: np.random.Generator
) -> list[int]:
    """Answer for each class whether it is held, with randomized response (Warner 1965).

    The truth is told with probability e^epsilon / (1 + e^epsilon), so that each answer is epsilon-private. Adding or
    removing one image changes one answer at most, replacing one two, and another client's images all K.

    Args:
        held: Labels of the classes that the client holds.
        num_classes: K.
        epsilon: Privacy loss per class, > 0.
        generator: Of random numbers that the server must not know.

    Returns:
        The labels that are reported, in order.
    """
    truth = np.isin(np.arange(num_classes), sorted(held))
    lies = generator.random(num_classes) >= 1 / (1 + math.exp(-epsilon))
    return [int(label) for label in np.flatnonzero(truth ^ lies)]


def _tidy(text: str) -> str:
    """Take out the blanks that removed words leave, and marks that stand before nothing."""
    joined = _BEFORE_MARK.sub(r"\1", " ".join(text.split()))
    return re.sub(r"([,;:])(?:\s*[,;:.])+", r"\1", joined).strip(" ,;:")
