import itertools
import statistics

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel

from clients.embedding import TextEncoder, calibrated_multiplier, embed_prompts, extended
from fgl_app import tiny
from fgl_app.audit.encoders import NOISE_SCALES, invert_embeddings
from fgl_app.cards import load_card
from fgl_app.privacy.inversion import CERTAIN_ERROR, Inverter, noise_curve, recovered_share
from fgl_app.prompts import PromptCount

TEXTS = ["seven, a bold left leaning narrow handwritten seven", "ankle boot, dark, woven", "eight, ask anna kowalski"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder("tiny", "", torch.device("cpu"))


def sent(encoder, texts=TEXTS, **options) -> list[torch.Tensor]:
    """Embed texts as a client does, in their order."""
    chosen = {"summary": "none", "num_clusters": 0, "clip_norm": 0.0, "epsilon": 0.0, "delta": 1e-5, "seed": 0}
    return [
        next(iter(embed_prompts([PromptCount(0, text, 1)], encoder, **(chosen | options))[1].values()))
        for text in texts
    ]


def read(embeddings):
    return invert_embeddings(embeddings, "tiny", "", "cpu", seed=0)


@pytest.fixture(scope="module")
def readings(encoder):
    return read(sent(encoder))


def test_the_words_of_an_embedding_are_read_back(readings):
    assert [recovered_share(text, guess) for text, guess in zip(TEXTS, readings.texts, strict=True)] == [1, 1, 1]
    assert all(error < CERTAIN_ERROR for error in readings.errors)
    assert readings.limits == ""


def test_more_noise_leaves_fewer_words(readings):
    assert list(readings.scales) == list(NOISE_SCALES)
    assert readings.shares[0] == 1
    assert readings.shares[-1] < 0.5


def test_clipping_hides_nothing_and_noise_does(encoder):
    clipped = read(sent(encoder, TEXTS[1:2], clip_norm=1.0))
    noisy = read(sent(encoder, clip_norm=20.0, epsilon=8.0))

    assert clipped.errors[0] < CERTAIN_ERROR
    assert recovered_share(TEXTS[1], clipped.texts[0]) == 1
    assert min(noisy.errors) > 0.5
    # Nonsense holds right words by chance, the more of them the longer it is: of all that is read few are right.
    right = [recovered_share(guess, text) for text, guess in zip(TEXTS, noisy.texts, strict=True)]
    assert sum(right) / len(right) < 0.5
    assert noisy.shares == []


STYLES = (("thin", "medium", "bold"), ("left leaning", "upright", "right leaning"), ("narrow", "regular", "wide"))


def test_who_knows_how_captions_are_built_finds_most_words_whatever_the_noise(encoder):
    """The numbers that SECURITY.md names; the noise is drawn here, so that one seed gives one number."""
    generator, clip, epsilon = torch.Generator().manual_seed(0), 20.0, 8.0
    # Replacing an embedding of norm C by another moves it by 2 C at most.
    deviation = 2 * clip * calibrated_multiplier(epsilon, 1e-5)
    with_noise, from_the_prior, without_noise = [], [], []
    for name in (item.prompt for item in load_card("digits").classes):  # the class is sent in clear
        texts = [f"{name}, a {' '.join(words)} handwritten {name}" for words in itertools.product(*STYLES)]
        known = torch.stack([extended(each, encoder.context_length).flatten() for each in encoder(texts)])
        known *= (clip / known.norm(dim=1, keepdim=True)).clamp(max=1)
        shares = [[recovered_share(sent, guess) for guess in texts] for sent in texts]
        for row, embedding in enumerate(known):
            noisy = embedding + deviation * torch.randn(embedding.shape, generator=generator)
            with_noise.append(shares[row][int((known - noisy).norm(dim=1).argmin())])
            without_noise.append(shares[row][int((known - embedding).norm(dim=1).argmin())])
            from_the_prior.append(max(map(statistics.fmean, zip(*shares, strict=True))))

    assert statistics.fmean(without_noise) == 1
    assert statistics.fmean(with_noise) == pytest.approx(0.74, abs=0.02)
    assert statistics.fmean(from_the_prior) == pytest.approx(0.74, abs=0.005)


def test_a_token_that_is_not_tried_is_not_found_and_the_error_tells():
    folder = tiny.folder_of(tiny.DIFFUSION)
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    model = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32).eval()

    @torch.inference_mode()
    def encode(ids):
        return model(ids).last_hidden_state

    ids = tokenizer("a handwritten seven").input_ids
    embedding = encode(torch.tensor([ids]))[0]
    known = torch.tensor(ids[1:3])

    found = Inverter(encode, tokenizer.bos_token_id, tokenizer.eos_token_id, known)(embedding)
    whole = Inverter(encode, tokenizer.bos_token_id, tokenizer.eos_token_id, torch.arange(len(tokenizer)))(embedding)

    assert found.ids[:2] == tuple(ids[1:3])
    assert found.error > CERTAIN_ERROR
    assert whole.ids == tuple(ids[1:-1])
    assert whole.error < 1e-3


def test_noise_without_scale_changes_nothing():
    embeddings = [torch.ones(3, 4)]

    shares = noise_curve(
        embeddings, ["a b"], lambda each: "b a" if torch.equal(each, embeddings[0]) else "", [0.0, 1.0],
        torch.Generator().manual_seed(0),
    )  # fmt: skip

    assert shares == [1, 0]


def test_words_are_counted_as_often_as_they_occur():
    assert recovered_share("a b a", "a c") == pytest.approx(1 / 3)
    assert recovered_share("a, B", "b a a") == 1
