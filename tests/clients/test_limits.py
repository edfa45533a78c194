"""What clients know of the run's limits: they keep to them, and say what they leave out."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.defences import CountedFilter, caption_filter
from clients.prompting import fit_limits, write_prompts
from fgl_app.cards import load_card
from fgl_app.checks import check_settings
from fgl_app.client_prompts import _limits_known
from fgl_app.config import parse_run_config
from fgl_app.data.images import ImageSet
from fgl_app.errors import PromptError
from fgl_app.privacy.prompt_leaks import public_words
from fgl_app.prompts import PromptCount, PromptLimits, class_prompts, instance_prompts, screen_prompts
from fgl_app.records import Upload, decode_prompts, encode_prompts, prompts_reply
from strategies.prompt_round import PromptRound

NAMES = load_card("digits").class_names()


def exchange_with(make_grid, settings_of, **overrides):
    """Ask real clients for their prompts, and accept what the run's settings say; return the exchange."""
    grid = make_grid(partition="iid", **overrides)
    policy = settings_of(grid.run_config).policy
    exchange = PromptRound(
        grid,
        PromptLimits(policy.max_prompts_per_client, policy.max_prompt_chars),
        class_names=NAMES,
        embedding_shape=(32, 64) if overrides["prompt_level"] == "embedding" else None,
        deadline_s=60.0,
    )
    exchange.ask(grid.get_node_ids())
    exchange.wait()
    return exchange


def test_a_lower_limit_of_characters_refuses_no_honest_client(make_grid):
    exchange = exchange_with(make_grid, parse_run_config, prompt_level="instance", max_prompt_chars=21)

    assert exchange.report()["refused"] == []
    prompts = exchange.merged().prompts
    assert sum(item.count for item in prompts) == 838
    assert max(len(item.prompt) for item in prompts) == 21


def test_names_of_embeddings_are_not_measured_by_the_characters_of_prompts(make_grid):
    exchange = exchange_with(
        make_grid, parse_run_config, prompt_level="embedding", embedding_summary="mean", max_prompt_chars=21
    )

    assert exchange.report()["refused"] == []
    assert exchange.num_used == 3


@pytest.mark.parametrize("summary", ["mean", "clusters"])
def test_embeddings_summarise_captions_that_could_not_be_sent_as_texts(make_grid, summary):
    exchange = exchange_with(
        make_grid, parse_run_config, prompt_level="embedding", embedding_summary=summary, embedding_clusters=1,
        max_prompts_per_client=10, blocked_words="zero",
    )  # fmt: skip

    assert exchange.report()["refused"] == []
    assert sum(item.count for item in exchange.merged().prompts) == 838


def test_of_too_many_embeddings_the_most_frequent_go_out_and_no_class_is_lost(make_grid, caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        exchange = exchange_with(
            make_grid, parse_run_config, prompt_level="embedding", embedding_summary="clusters", embedding_clusters=2,
            max_prompts_per_client=11,
        )  # fmt: skip

    assert exchange.report()["refused"] == []
    assert {item.label for item in exchange.merged().prompts} == set(range(10))
    assert 10 < len(exchange.merged().prompts) <= 33
    cut = [record.getMessage() for record in caplog.records if "more prompts than one" in record.getMessage()]
    assert len(cut) == 3


@given(st.text(), st.integers(4, 60))
def test_whatever_a_caption_holds_the_server_accepts_it_at_the_same_limit(caption, max_chars):
    prompts = instance_prompts([0], [caption], ["cat"], "{class}, {caption}", max_chars=max_chars)

    kept, refused = screen_prompts(
        decode_prompts(encode_prompts(Upload(prompts, ("cat",)))), PromptLimits(1, max_chars)
    )

    assert (len(kept), refused) == (1, {})


def test_a_prompt_of_a_class_name_is_not_cut():
    fits = class_prompts([0], ["tabby cat"], ["a photo of a {class}"], max_chars=22)

    assert fits == [PromptCount(0, "a photo of a tabby cat", 1)]
    with pytest.raises(PromptError, match="has 22 characters, and `max-prompt-chars` allows 21"):
        class_prompts([0], ["tabby cat"], ["a photo of a {class}"], max_chars=21)


@pytest.mark.parametrize(
    ("level", "longest"), [("class", len("a photo of a handwritten seven")), ("instance", len("seven,"))]
)
def test_a_limit_below_the_prompts_of_the_class_names_is_refused_before_the_run(run_config, level, longest):
    def check(max_chars):
        check_settings(parse_run_config(run_config | {"prompt-level": level, "max-prompt-chars": max_chars}))

    check(longest)
    with pytest.raises(PromptError, match=f"has {longest} characters, and `max-prompt-chars` allows {longest - 1}"):
        check(longest - 1)


def test_captions_are_cut_behind_the_defences_which_would_not_know_half_a_name(settings):
    data = ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]))
    defend = caption_filter(public_words(settings.public_texts(NAMES)), scrubbing="on", vocabulary_file="", max_words=0)

    (prompt,) = write_prompts(
        data, NAMES, form_of=settings.prompt_form, domains=(), num_prompts_per_class=1, defend=defend,
        captioner=lambda images: ["a digit that jane.doe@example.org wrote in blue"], max_chars=30,
    )  # fmt: skip

    assert prompt.prompt == "zero, a digit that wrote in bl"


def test_what_the_defences_do_to_captions_is_counted():
    defend = CountedFilter(lambda caption: caption.replace("Maria", "").strip())

    assert [defend(caption) for caption in ("a cat", "Maria", "a cat of Maria", "")] == ["a cat", "", "a cat of", ""]
    assert (defend.captions, defend.changed, defend.emptied) == (4, 2, 1)


@pytest.mark.parametrize(("scrubbing", "max_words"), [("on", 0), ("strict", 0), ("off", 3)])
def test_a_caption_that_was_only_tidied_is_not_counted_as_changed(scrubbing, max_words):
    defend = CountedFilter(caption_filter(frozenset(), scrubbing=scrubbing, vocabulary_file="", max_words=max_words))

    assert defend("  a  cat ,") in ("a cat", "a cat ,")
    assert (defend.captions, defend.changed, defend.emptied) == (1, 0, 0)
    assert defend("a cat at 555 0123") in ("a cat at", "a cat at 0123")
    assert (defend.captions, defend.changed, defend.emptied) == (2, 1, 0)


def test_of_too_many_prompts_the_most_frequent_go_out_and_no_class_is_lost(caplog):
    prompts = [PromptCount(0, f"cat {number}", 10 + number) for number in range(5)] + [PromptCount(1, "dog", 1)]

    with caplog.at_level(logging.WARNING, "flwr"):
        kept = fit_limits(prompts, ("cat", "dog"), PromptLimits(3, 100), known_classes=("cat", "dog"))

    assert kept == [PromptCount(0, "cat 3", 13), PromptCount(0, "cat 4", 14), PromptCount(1, "dog", 1)]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("3 of 6 prompts are not sent")
    assert line.endswith("more prompts than one client may send")


def test_what_the_server_would_refuse_stays_on_the_client_and_is_named_in_its_log(caplog):
    prompts = [PromptCount(0, "cat", 1), PromptCount(0, "cat with a secret", 1), PromptCount(0, "cat", 2, "sketch")]

    with caplog.at_level(logging.WARNING, "flwr"):
        kept = fit_limits(prompts, ("cat",), PromptLimits(9, 100, ("secret",)), domains=("sketch",))

    assert kept == [prompts[0], prompts[2]]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "1 of 3 prompts are not sent, because the server would refuse them: a blocked word"


def test_a_client_with_too_many_classes_says_so_before_it_sends_anything():
    prompts = [PromptCount(label, "a photo", 1) for label in range(3)]

    with pytest.raises(PromptError, match="images of 3 classes, and `max-classes` allows a run 2"):
        fit_limits(prompts, ("cat", "dog", "eel"), PromptLimits(9, 100, max_classes=2))
    assert fit_limits(prompts, NAMES, PromptLimits(9, 100, max_classes=2), known_classes=NAMES) == prompts


def test_nothing_is_left_out_for_what_it_says_where_noise_hides_what_a_prompt_says(run_config):
    noised = {
        "prompt-level": "embedding", "embedding-summary": "mean", "embedding-clip": 20.0, "embedding-epsilon": 8.0,
        "blocked-words": "secret", "max-prompts-per-client": 2,
    }  # fmt: skip
    prompts = [PromptCount(0, text, 1) for text in ("zero, a", "zero, b", "zero, secret")]

    for epsilon in (8.0, 0.0):  # without noise, too: the server sees no text
        limits = _limits_known(parse_run_config(run_config | noised | {"embedding-epsilon": epsilon}), len(prompts))
        assert fit_limits(prompts, NAMES, limits, known_classes=NAMES) == prompts
    open_ = _limits_known(parse_run_config(run_config | {"blocked-words": "secret"}), len(prompts))
    assert len(fit_limits(prompts, NAMES, open_, known_classes=NAMES)) == 2


def test_an_upload_that_the_server_would_not_unpack_is_refused_by_the_client():
    rows = [PromptCount(0, f"{number:05}{'x' * 995}", 1) for number in range(33_500)]  # 1,010 bytes each
    wide = {f"embedding:{number}": torch.zeros(77, 768, dtype=torch.float16) for number in range(284)}

    assert encode_prompts(Upload(rows[:33_000], ("cat",)))
    with pytest.raises(
        PromptError, match=r"prompts of this client take 33,[0-9,]* bytes, and the server accepts 33,554"
    ):
        encode_prompts(Upload(rows, ("cat",)))
    with pytest.raises(PromptError, match=r"embeddings of this client take 33,[0-9,]* bytes"):
        prompts_reply(Upload(rows[:1], ("cat",), wide), 1, 0)
