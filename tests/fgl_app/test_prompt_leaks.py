from itertools import pairwise, product

import pytest

from fgl_app.cards import load_card
from fgl_app.privacy.lexicon import load_lexicon
from fgl_app.privacy.prompt_leaks import KINDS, audit_prompts, find_leaks, public_words
from fgl_app.prompts import PromptCount, fill

LEXICON = load_lexicon()
DIGITS, CLOTHES = load_card("digits"), load_card("fashion-mnist")
ORDINARY = [
    "a man riding a wave on top of a surfboard", "a cat laying on a couch next to a remote control",
    "a group of people standing around a kitchen", "a red double decker bus driving down a street",
    "a pizza with cheese and tomatoes on a wooden table", "a rose in a glass of water", "a bird sitting on a branch",
    "Two dogs playing in the snow.", "A woman holds an umbrella in the rain", "a t-shirt with a picture of a dog",
    "the x-ray shows both lungs", "a church with a tall spire", "a close up of a slice of orange on a white plate",
    "a golf ball sitting on top of green grass", "an old chain saw on the ground", "a turkey on a plate",
]  # fmt: skip


def kinds_in(text: str, public: frozenset[str] = frozenset()) -> dict[str, str]:
    return {found.kind: text[found.start : found.end] for found in find_leaks(text, LEXICON, public)}


def test_a_planted_leak_is_flagged():
    found = kinds_in("seven, thick strokes, call Anna Kowalski at +49 30 1234567 or anna.k@example.org")

    assert found == {"name": "Anna Kowalski", "phone number": "+49 30 1234567", "e-mail address": "anna.k@example.org"}


@pytest.mark.parametrize(
    ("text", "kind", "piece"),
    [
        ("portrait of maria garcia", "name", "maria garcia"),
        ("dr miller in a white coat", "name", "dr miller"),
        ("a scan of Mrs. Jones", "name", "Mrs. Jones"),
        ("a photo of John on a bike", "name", "John"),
        ("a shop with the sign call (555) 010-9999", "phone number", "(555) 010-9999"),
        ("patient born 12/03/1986", "number", "12/03/1986"),
        ("man aged 47", "number", "47"),
        ("visit www.example.org today", "link", "www.example.org"),
        ("the host 192.168.0.12", "link", "192.168.0.12"),
        ("a dog in a park in berlin", "place", "berlin"),
        ("a french bulldog in New York City", "place", "New York City"),
        ("a beach in Nice", "place", "Nice"),
        ("lungs with pneumothorax", "rare word", "pneumothorax"),
    ],
)
def test_each_kind_is_recognised(text, kind, piece):
    assert kinds_in(text).get(kind) == piece


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_captions_are_not_flagged(text):
    assert kinds_in(text) == {}


def shipped_captions() -> list[str]:
    """All captions that the shipped captioner learnt to say, and the prompts that they become."""
    written = product(
        ("thin", "medium", "bold"), ("left leaning", "upright", "right leaning"), ("narrow", "regular", "wide"),
        ("handwritten", "printed"), (item.prompt for item in DIGITS.classes),
    )  # fmt: skip
    worn = product(
        ("dark", "grey", "light"), ("plain", "woven", "patterned"), ("narrow", "regular", "wide"),
        (item.prompt for item in CLOTHES.classes),
    )  # fmt: skip
    captions = [f"a {' '.join(words)}" for words in (*written, *worn)]
    return [
        fill(card.form.instance_template, item.prompt, caption)
        for card in (DIGITS, CLOTHES)
        for item in card.classes
        for caption in captions
        if caption.endswith(f" {item.prompt}")
    ]


def test_no_caption_of_the_shipped_captioner_is_flagged():
    """The false-positive rate is zero, even if class names and templates are not known to be public."""
    captions = shipped_captions()

    flagged = [caption for caption in captions if kinds_in(caption)]

    assert len(set(captions)) >= 810
    assert flagged == []


def test_findings_do_not_overlap_and_lie_in_the_text():
    text = "Dr. Anna Kowalski, New York, +1 212 555 0100, anna@example.org, 12/03/1986, www.example.org/anna Kowalskix"

    found = find_leaks(text, LEXICON)

    assert {each.kind for each in found} == set(KINDS)
    assert all(first.end <= second.start for first, second in pairwise(found))
    assert all(0 <= each.start < each.end <= len(text) for each in found)


def test_words_of_class_names_and_templates_are_no_findings():
    public = public_words(["Boeing 737", "a photo of a {class} in Berlin"])

    assert kinds_in("boeing 737 in Berlin", public) == {}
    assert kinds_in("boeing 747 in Paris", public) == {"number": "747", "place": "Paris"}


def test_counts_classes_and_unique_prompts_are_told():
    prompts = [
        PromptCount(0, "zero, a thin upright handwritten zero", 5, clients=2),
        PromptCount(0, "zero, a bold upright handwritten zero", 1, clients=1),
        PromptCount(3, "three, seen by Anna Kowalski", 1, clients=1),
    ]

    audited = audit_prompts(prompts, LEXICON, public_words(["zero", "three", "handwritten"]))

    assert (audited.num_prompts, audited.num_images) == (3, 7)
    assert audited.images_per_class == {0: 6, 3: 1}
    assert audited.clients_per_class == {0: 2, 3: 1}
    assert (audited.from_one_client, audited.of_one_image) == (2, 2)
    assert {kind: audited.prompts_with(kind) for kind in KINDS if audited.prompts_with(kind)} == {"name": 1}
    # "thin upright handwritten" stands for five images, and "upright handwritten zero" occurs twice.
    assert "a bold upright" in audited.single_phrases
    assert "seen by anna" in audited.single_phrases
    assert not {"a thin upright", "upright handwritten zero"} & set(audited.single_phrases)
