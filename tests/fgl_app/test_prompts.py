from hypothesis import given
from hypothesis import strategies as st

from fgl_app.prompts import (
    MAX_PROMPT_CHARS,
    PromptBudget,
    PromptCount,
    PromptLimits,
    class_prompts,
    instance_prompts,
    merge_prompts,
    require_senders,
    screen_prompts,
    spread_budget,
)
from fgl_app.records import Upload, decode_prompts, encode_prompts, label_prompts

counts = st.builds(PromptCount, st.integers(0, 3), st.sampled_from("abcdefg"), st.integers(1, 50))


def test_class_prompts_are_distinct_with_counts():
    assert class_prompts([1, 0, 1], ["cat", "dog"], ["A photo of a {class}"]) == [
        PromptCount(0, "A photo of a cat", 1),
        PromptCount(1, "A photo of a dog", 2),
    ]


def test_instance_prompts_join_label_and_caption():
    prompts = instance_prompts(
        [0, 0, 0], ["a tabby ", "asleep", "asleep"], ["cat"], "{class}, {caption}, high resolution"
    )

    assert prompts == [
        PromptCount(0, "cat, a tabby, high resolution", 1),
        PromptCount(0, "cat, asleep, high resolution", 2),
    ]


def test_a_placeholder_in_a_caption_stays_text():
    assert instance_prompts([0], ["{class} {0}"], ["cat"], "{class}, {caption}")[0].prompt == "cat, {class} {0}"


@given(st.lists(st.lists(counts, max_size=8), max_size=4), st.randoms())
def test_merging_ignores_the_order_of_clients_and_keeps_every_count(clients, random):
    shuffled = random.sample(clients, len(clients))

    merged = merge_prompts(clients)

    assert merged == merge_prompts(shuffled)
    assert sum(item.count for item in merged) == sum(item.count for client in clients for item in client)
    assert all(
        item.clients == sum((item.label, item.prompt) in {(p.label, p.prompt) for p in client} for client in clients)
        for item in merged
    )
    assert len({(item.label, item.prompt) for item in merged}) == len(merged)


@given(st.lists(counts, min_size=1, max_size=20), st.integers(1, 40))
def test_every_class_gets_exactly_its_images(prompts, images_per_class):
    budget = spread_budget(merge_prompts([prompts]), images_per_class)

    for label in {item.label for item in prompts}:
        assert sum(item.num_images for item in budget if item.label == label) == images_per_class


def test_images_are_spread_in_proportion_to_counts():
    prompts = [PromptCount(0, "a", 3), PromptCount(0, "b", 1), PromptCount(0, "c", 1)]

    # 10 x 3/5 = 6, 10 x 1/5 = 2 and 2.
    assert spread_budget(prompts, 10) == [PromptBudget(0, "a", 6), PromptBudget(0, "b", 2), PromptBudget(0, "c", 2)]


def test_what_a_captioner_says_becomes_one_printable_line():
    prompts = instance_prompts([0, 0], ["a dog\n\ton a sofa\x00", "x" * 2000], ["cat"], "{class}, {caption}")

    assert prompts[0].prompt == "cat, a dog on a sofa"
    assert len(prompts[1].prompt) == MAX_PROMPT_CHARS


@given(st.text())
def test_whatever_a_caption_holds_the_server_accepts_the_prompt(caption):
    prompts = instance_prompts([0], [caption], ["cat"], "{class}, {caption}")

    kept, refused = screen_prompts(
        decode_prompts(encode_prompts(Upload(prompts, ("cat",)))), PromptLimits(1, MAX_PROMPT_CHARS)
    )

    assert label_prompts(kept, ["cat"]) == prompts
    assert not refused


def test_several_templates_give_several_prompts_of_each_class():
    prompts = class_prompts([0, 0], ["owl"], ["a photo of {a class}", "{class}, sketch"])

    assert [(item.prompt, item.count) for item in prompts] == [("a photo of an owl", 2), ("owl, sketch", 2)]


def test_images_can_be_spread_evenly_whatever_the_counts():
    prompts = [PromptCount(0, "a", 97), PromptCount(0, "b", 2), PromptCount(0, "c", 1)]

    # 10 / 3 = 3 each, and the remainder goes to the prompt that a hash draws.
    assert sorted(item.num_images for item in spread_budget(prompts, 10, uniform=True)) == [3, 3, 4]


def test_of_more_prompts_than_images_the_alphabet_does_not_choose():
    prompts = [PromptCount(0, f"{number:03}", 1) for number in range(400)]

    chosen = {int(item.prompt) for item in spread_budget(prompts, 100)}

    assert len(chosen) == 100
    assert 30 < sum(number >= 200 for number in chosen) < 70


def test_prompts_of_different_domains_stay_apart():
    merged = merge_prompts([[PromptCount(0, "a cat", 2, "sketch")], [PromptCount(0, "a cat", 3, "photo")]])

    assert [(item.domain, item.count) for item in merged] == [("photo", 3), ("sketch", 2)]


def test_a_text_is_used_only_if_enough_clients_sent_it():
    clients = [
        [PromptCount(0, "cat, on a sofa", 2), PromptCount(0, "cat, of Maria Gonzalez", 1), PromptCount(1, "dog, 3", 1)],
        [PromptCount(0, "cat, on a sofa", 3), PromptCount(1, "Dog, 4!", 5)],
    ]

    shown = require_senders(clients, 2, lambda label, domain: ["a photo of a cat", "a photo of a dog"][label])

    assert merge_prompts(shown) == [
        PromptCount(0, "a photo of a cat", 1, clients=1),
        PromptCount(0, "cat, on a sofa", 5, clients=2),
        PromptCount(1, "dog", 6, clients=2),
    ]
    assert require_senders(clients, 1, lambda label, domain: "") == clients
