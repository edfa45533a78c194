import unicodedata
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgl_app.errors import ConfigError, PromptError
from fgl_app.prompts import PromptCount, PromptLimits, limit_shares, read_blocked_words, screen_prompts
from fgl_app.records import decode_prompts

LIMITS = PromptLimits(max_prompts=3, max_chars=40, blocked_words=("secret plan", "ärger"))
GOOD = ["cat", 2, "a cat on a sofa"]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)
nearly_right = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["cat", "dog", "c" * 101, ""]),
            st.integers(-1, 10**10),
            st.text(max_size=50) | st.just("a secret PLAN"),
        ).map(list),
        st.tuples(st.just("cat"), st.just(1), st.text(max_size=5), st.sampled_from(["sketch", "photo", 3])).map(list),
        anything,
    ),
    max_size=8,
)


@given(nearly_right)
def test_whatever_arrives_only_prompts_that_keep_every_rule_are_kept(rows):
    kept, refused = screen_prompts(rows, LIMITS, class_names=["cat"], domains=["sketch"])

    assert len(kept) + sum(refused.values()) == len(rows)
    assert len(kept) <= 3
    assert len({(item.class_name, item.prompt, item.domain) for item in kept}) == len(kept)
    for item in kept:
        assert (item.class_name, item.domain in ("", "sketch")) == ("cat", True)
        assert 1 <= len(item.prompt) <= 40
        assert 1 <= item.count <= 10**9
        assert item.prompt == unicodedata.normalize("NFKC", item.prompt)
        assert all(character.isprintable() or character in "\u200c\u200d\u3000 " for character in item.prompt)
        assert len(item.prompt.splitlines()) == 1
        assert "secret plan" not in item.prompt.lower()


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(zlib.compress)))
def test_whatever_bytes_arrive_they_are_a_list_or_refused(payload):
    try:
        found = decode_prompts(payload)
    except PromptError:
        return
    assert isinstance(found, list)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("no row", "not [class"),
        (["cat", 1], "not [class"),
        ([0, 1, "class is no name"], "not [class"),
        (["", 1, "class without a name"], "not [class"),
        (["c" * 101, 1, "name too long"], "not [class"),
        (["cat", True, "count is no number"], "not [class"),
        (["cat", 1.5, "count is no whole number"], "not [class"),
        (["cat", 1, "domain is no name", 3], "not [class"),
        (["cat", 1, "too much", "sketch", "more"], "not [class"),
        (["dog", 1, "unknown class"], "class that is none"),
        (["cat", 1, "unknown domain", "photo"], "domain that is none"),
        (["cat", 0, "count too small"], "count out of range"),
        (["cat", 10**10, "count too large"], "count out of range"),
        (["cat", 1, ""], "empty or too long"),
        (["cat", 1, "x" * 41], "empty or too long"),
        (["cat", 1, "line\nbreak"], "control the output"),
        (["cat", 1, "right to left \u202e override"], "control the output"),
        (["cat", 1, "lone surrogate \ud800"], "control the output"),
        (["cat", 1, "line\u2028separator"], "control the output"),
        (["cat", 1, "paragraph\u2029separator"], "control the output"),
        (["cat", 1, "ﬁne ligature"], "NFKC"),
        (["cat", 1, "the Secret Plan, again"], "blocked word"),
        (["cat", 1, "viel ÄRGER"], "blocked word"),
        (["cat", 1, "sec\u200dret plan"], "blocked word"),
        (["cat", 1, "sec\ufe0fret plan"], "blocked word"),
        (["cat", 1, "secret\u034f plan"], "blocked word"),
        (GOOD, "sent before"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused_alone_and_not_quoted(row, reason):
    kept, refused = screen_prompts([GOOD, row], LIMITS, class_names=["cat"], domains=["sketch"])

    assert [item.prompt for item in kept] == ["a cat on a sofa"]
    ((found, count),) = refused.items()
    assert reason in found
    assert count == 1
    assert not isinstance(row, list) or not any(str(text) in found for text in row if len(str(text)) > 5)


@pytest.mark.parametrize(("name", "reason"), [("secret plan", "blocked word"), ("cafe\u0301", "NFKC")])
def test_names_of_classes_that_clients_bring_are_screened_like_prompts(name, reason):
    kept, refused = screen_prompts([[name, 1, "a picture"]], LIMITS)

    assert kept == []
    assert reason in next(iter(refused))


def test_a_blocked_word_inside_another_word_is_none():
    kept, _ = screen_prompts([["cat", 1, "verärgert, a secret planet"]], LIMITS)

    assert len(kept) == 1


def test_what_a_client_sends_beyond_its_number_of_prompts_is_refused():
    kept, refused = screen_prompts([["cat", 1, f"cat {index}"] for index in range(10)], LIMITS)

    assert [item.prompt for item in kept] == ["cat 0", "cat 1", "cat 2"]
    assert refused == {"more prompts than one client may send": 7}


def test_blocked_words_come_from_the_setting_or_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("one\n\n two words \n")

    assert read_blocked_words("a, b c,") == ("a", "b c")
    assert read_blocked_words(str(tmp_path / "words.txt")) == ("one", "two words")
    with pytest.raises(ConfigError, match="`blocked-words`"):
        read_blocked_words(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffsecret plan\nother",  # Windows' Notepad
        "\ufeffsecret plan\r\nother\r\n",
        "other\n\ufeffsecret plan\n",  # two files put together
        "sec\u200dret\u00a0plan\t\n",
        "SECRET   plan ",
        "ｓｅｃｒｅｔ plan",  # full width
    ],
)
def test_a_blocked_word_is_found_however_its_file_was_saved(tmp_path, content):
    (tmp_path / "words.txt").write_bytes(content.encode())
    limits = PromptLimits(9, 99, read_blocked_words(str(tmp_path / "words.txt")))

    kept, refused = screen_prompts(
        [["cat", 1, f"the {text}, again"] for text in SPELLINGS], limits, class_names=["cat"]
    )

    assert (kept, refused) == ([], {"a blocked word": len(SPELLINGS)})


SPELLINGS = ["secret plan", "Secret Plan", "secret  plan", "sec\u200dret plan", "secret\ufe0f plan"]


@pytest.mark.parametrize(("word", "written"), [("Straße", "STRASSE"), ("ﬁne", "fine"), ("ΌΣΟΣ", "όσος")])
def test_case_is_that_of_unicode(word, written):
    kept, _ = screen_prompts([["cat", 1, written]], PromptLimits(9, 99, (word,)), class_names=["cat"])

    assert kept == []


def test_words_of_class_and_prompt_are_not_read_as_one_phrase():
    kept, _ = screen_prompts([["plan", 1, "a secret"], ["secret", 1, "plan"]], LIMITS)

    assert len(kept) == 2


@pytest.mark.parametrize("word", ["\u200b", "bell\x07", "x" * 2_000, "private \ue000"])
def test_a_word_that_no_prompt_can_hold_is_named_with_file_and_line(tmp_path, word):
    (tmp_path / "words.txt").write_text(f"one\n\n{word}\n", "utf-8")

    with pytest.raises(ConfigError, match=r"words.txt', line 3 of `blocked-words`, .*can never be found"):
        read_blocked_words(str(tmp_path / "words.txt"))


@pytest.mark.parametrize("content", ["secret".encode("utf-16"), "ärger".encode("latin-1")])
def test_words_that_are_not_utf_8_are_refused(tmp_path, content):
    (tmp_path / "words.txt").write_bytes(content)

    with pytest.raises(ConfigError, match=r"`blocked-words` must be .*UTF-8"):
        read_blocked_words(str(tmp_path / "words.txt"))
    with pytest.raises(ConfigError, match="`blocked-words` must name a file by its absolute path"):
        read_blocked_words("words.txt")


def counts(clients):
    return [[item.count for item in prompts] for prompts in clients]


def test_no_client_claims_more_than_its_share_of_a_class():
    honest = [PromptCount(0, "a", 6), PromptCount(0, "b", 4)]
    greedy = [PromptCount(0, "c", 900), PromptCount(0, "d", 100), PromptCount(1, "e", 500)]

    cut = limit_shares([honest, greedy], 0.5)

    # Class 0: T = 10 + 10, of which the greedy one has 9 + 1; class 1 is its own.
    assert counts(cut) == [[6, 4], [9, 1, 500]]
    assert limit_shares([honest, greedy], 1.0) == [honest, greedy]


def test_several_greedy_clients_are_cut_alike():
    cut = limit_shares([[PromptCount(0, "a", 10)], [PromptCount(0, "b", 500)], [PromptCount(0, "c", 900)]], 0.4)

    # L = 0.4 T and T = 10 + 2 L: L = 20.
    assert counts(cut) == [[10], [20], [20]]


def test_where_prompts_share_evenly_a_client_keeps_fewer_of_them():
    flood = [PromptCount(0, f"{index:03}", 1) for index in range(500)]

    honest, kept = limit_shares([[PromptCount(0, "a", 300), PromptCount(0, "b", 1)], flood], 0.5, uniform=True)

    assert len(honest) == len(kept) == 2
    assert set(kept) < set(flood)


@given(
    st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=4), min_size=1, max_size=5),
    st.floats(0.05, 1.0),
)
def test_shares_hold_for_any_counts(weights, share):
    clients = [
        [PromptCount(0, f"{client}-{index}", count) for index, count in enumerate(row)]
        for client, row in enumerate(weights)
    ]

    cut = limit_shares(clients, share)

    totals = [sum(item.count for item in prompts) for prompts in cut]
    assert all(0 < after <= before for after, before in zip(totals, map(sum, weights), strict=True))
    allowed = max(share, 1 / len(weights)) * sum(totals)
    assert max(totals) <= allowed + 4 * len(weights)  # counts are whole numbers, rounded down
