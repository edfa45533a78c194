import math
import re
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.defences import (
    allow_words,
    cut_words,
    noise_counts,
    randomize_classes,
    read_vocabulary,
    scrub,
    withhold_counts,
)
from fgl_app.errors import ConfigError
from fgl_app.privacy.lexicon import LOCALES, load_lexicon
from fgl_app.privacy.prompt_leaks import find_leaks
from fgl_app.prompts import PromptCount

PUBLIC = frozenset({"cat", "photo"})


@pytest.fixture(scope="module")
def lexicon():
    return load_lexicon()


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("a cat on a sofa, call +1 212 555 0123", "a cat on a sofa, call"),
        ("a letter to Maria Gonzalez, on a table", "a letter to, on a table"),
        ("a sign that says jane.doe@example.org", "a sign that says"),
        ("a photo of a cat from 12.03.1975", "a photo of a cat from"),
        ("a cat with a tag that says Kowalski", "a cat with a tag that says"),
        ("a cat beside anna kowalski on a sofa", "a cat beside on a sofa"),
        ("a cat of nhật nguyễn", "a cat of"),
        ("a cat that mary brown holds", "a cat that mary brown holds"),  # the words are common ones
        ("a cat on a sofa", "a cat on a sofa"),
    ],
)
def test_what_identifies_somebody_is_removed(lexicon, caption, left):
    assert scrub(caption, lexicon, PUBLIC, strict=False) == left


@pytest.mark.parametrize("locale", LOCALES)
def test_every_list_of_names_is_read(lexicon, locale):
    """Languages do not call their lists alike: the men's surnames of Polish have one of their own."""
    provider = import_module(f"faker.providers.person.{locale}").Provider
    lists = [name for name in dir(provider) if re.search(r"(first|middle|last)_names", name)]
    names = {str(each).lower() for name in lists for each in getattr(provider, name)}

    assert {each for each in names if len(each) > 2} <= lexicon.given_names | lexicon.surnames


def test_strict_removes_rare_words_too(lexicon):
    caption = "a cat with a xylographic zzyzx collar"

    assert scrub(caption, lexicon, PUBLIC, strict=False) == caption
    assert scrub(caption, lexicon, PUBLIC, strict=True) == "a cat with a collar"


@given(st.text(max_size=80))
def test_nothing_is_found_in_what_was_scrubbed_of_contacts(caption):
    left = scrub(f"{caption} write to a.b@example.org now", load_lexicon(), PUBLIC, strict=True)

    assert "example.org" not in left
    assert not [found for found in find_leaks(left, load_lexicon(), PUBLIC) if found.kind == "e-mail address"]


def test_words_outside_the_vocabulary_are_removed(tmp_path):
    (tmp_path / "words.txt").write_text("A\ncat\non\nsofa\n")

    vocabulary = read_vocabulary(str(tmp_path / "words.txt"))

    assert allow_words("A striped cat, 7 years, on a sofa", vocabulary) == "A cat, on a sofa"
    with pytest.raises(ConfigError, match="`caption-vocabulary`"):
        read_vocabulary(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffA\ncat\non\nsofa",
        "\ufeffa\r\nCAT\r\n on \r\nsofa\r\n",
        "a c\u200dat o\u00adn\u00a0ｓｏｆａ",
        "a cat on sofa " + "w" * 2_000,
    ],
)
def test_a_vocabulary_is_read_however_it_was_saved(tmp_path, content):
    (tmp_path / "words.txt").write_bytes(content.encode())

    assert allow_words("A striped cat on a sofa", read_vocabulary(str(tmp_path / "words.txt"))) == "A cat on a sofa"


@pytest.mark.parametrize("word", ["sofa,", "U.S.", "#colours", "--", "\u200b", "a/b"])
def test_a_word_that_no_caption_can_hold_is_named_with_file_and_line(tmp_path, word):
    (tmp_path / "words.txt").write_text(f"cat\n{word}\n", "utf-8")

    with pytest.raises(ConfigError, match=r"words.txt', line 2: `caption-vocabulary` must hold words of letters"):
        read_vocabulary(str(tmp_path / "words.txt"))


def test_captions_are_cut_behind_a_number_of_words():
    assert cut_words("one two three", 2) == "one two"
    assert cut_words("one two three", 0) == "one two three"


def test_withheld_counts_are_one():
    assert withhold_counts([PromptCount(0, "a", 7), PromptCount(1, "b", 2)]) == [
        PromptCount(0, "a", 1),
        PromptCount(1, "b", 1),
    ]


def test_noised_counts_keep_the_prompts_of_many_images_and_drop_those_of_one():
    prompts = [PromptCount(0, "many", 1000), *(PromptCount(0, f"one {index}", 1) for index in range(2000))]

    kept = noise_counts(prompts, 1.0, 1e-3, np.random.default_rng(0))

    # With delta 0.001 some 2 of 2,000 prompts of one image are expected.
    assert 0 <= len(kept) - 1 <= 8
    assert abs({item.prompt: item.count for item in kept}["many"] - 1000) < 20


def test_the_noise_of_counts_has_the_ratio_of_its_epsilon():
    epsilon = 0.5
    sent = noise_counts([PromptCount(0, "p", 1000)] * 200_000, epsilon, 1e-5, np.random.default_rng(1))
    drawn = np.array([item.count for item in sent]) - 1000

    # P(X = x) is proportional to exp(-epsilon |x|): the variance is 2 q / (1 - q)^2 with q = exp(-epsilon).
    q = math.exp(-epsilon)
    assert drawn.var() == pytest.approx(2 * q / (1 - q) ** 2, rel=0.02)
    for x in range(3):
        ratio = (drawn == x + 1).sum() / (drawn == x).sum()
        assert ratio == pytest.approx(q, rel=0.05)


def test_randomized_response_tells_the_truth_as_often_as_its_epsilon_says():
    generator = np.random.default_rng(0)
    answers = [randomize_classes({1, 3}, 4, 1.0, generator) for _ in range(20_000)]

    shares = [np.mean([label in answer for answer in answers]) for label in range(4)]

    truth = math.e / (1 + math.e)  # 0.731
    assert shares == pytest.approx([1 - truth, truth, 1 - truth, truth], abs=0.01)
