import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from scipy.stats import norm

from clients.embedding import TextEncoder, calibrated_multiplier, embed_prompts
from fgl_app.checks import check_settings
from fgl_app.config import parse_run_config
from fgl_app.errors import ConfigError, ModelError
from fgl_app.prompts import PromptBudget, PromptCount
from fgl_app.records import check_embeddings_fit, embedding_name
from fgl_app.synthesis.engine import Engine
from fgl_app.synthesis.generator import load_generator
from fgl_app.synthesis.plan import DrawSettings, Plan, Unit

CPU = torch.device("cpu")
PROMPTS = [
    PromptCount(0, "a photo of a handwritten zero", 3),
    PromptCount(0, "zero", 1),
    PromptCount(1, "a handwritten one", 2),
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder("tiny", "", CPU)


def embed(encoder, prompts=PROMPTS, **changes):
    options = {"summary": "none", "num_clusters": 2, "clip_norm": 0.0, "epsilon": 0.0, "delta": 1e-5, "seed": 0}
    return embed_prompts(prompts, encoder, **(options | changes))


def test_embeddings_have_the_texts_tokens_and_no_padding(encoder):
    short, long = encoder(["zero", "a photo of a handwritten zero on paper"])

    assert len(short) < len(long) < encoder.context_length
    assert torch.equal(encoder(["zero"])[0], short)


def test_each_prompt_becomes_one_embedding_of_the_same_class_and_count(encoder):
    named, embeddings = embed(encoder)

    assert sorted((item.label, item.count) for item in named) == [(0, 1), (0, 3), (1, 2)]
    assert {item.prompt for item in named} == set(embeddings)
    assert all(name == embedding_name(tensor) for name, tensor in embeddings.items())
    assert {tensor.dtype for tensor in embeddings.values()} == {torch.float16}


def test_long_prompts_that_are_cut_to_the_same_become_one(encoder):
    prompts = [PromptCount(0, "zero " * 100 + end, 1) for end in ("left", "right")]

    named, embeddings = embed(encoder, prompts)

    assert [(item.label, item.count) for item in named] == [(0, 2)]
    assert len(embeddings) == 1


def test_the_mean_of_a_class_is_weighted_by_its_prompts_counts(encoder):
    named, embeddings = embed(encoder, summary="mean")

    assert [(item.label, item.count) for item in named] == [(0, 4), (1, 2)]
    first, second = encoder([PROMPTS[0].prompt, PROMPTS[1].prompt])
    # The shorter is continued by its end token.
    second = torch.cat([second, second[-1:].expand(len(first) - len(second), -1)])
    torch.testing.assert_close(embeddings[named[0].prompt].float(), 0.75 * first + 0.25 * second, atol=2e-3, rtol=2e-3)


def test_clusters_keep_the_counts_and_are_repeatable(encoder):
    prompts = [PromptCount(0, text, 1) for text in ("zero", "zero.", "a thin bold wide printed zero on paper")]

    first, second = (embed(encoder, prompts, summary="clusters") for _ in range(2))

    assert sorted(item.count for item in first[0]) == [1, 2]
    assert first[0] == second[0]


def test_clipping_bounds_the_norm(encoder):
    _, embeddings = embed(encoder, clip_norm=1.5)

    assert max(float(tensor.float().norm()) for tensor in embeddings.values()) == pytest.approx(1.5, abs=1e-2)


def test_noise_has_the_calibrated_size_and_hides_the_length(encoder):
    named, embeddings = embed(encoder, summary="mean", clip_norm=1.0, epsilon=2.0)

    assert {len(tensor) for tensor in embeddings.values()} == {encoder.context_length}
    # Class 0 has four images, so that replacing one prompt moves the mean by at most 2 / 4.
    expected = calibrated_multiplier(2.0, 1e-5) * 2 * 1.0 / 4
    noisy = embeddings[named[0].prompt].float()
    assert float(noisy.std()) == pytest.approx(expected, rel=0.1)
    again, _ = embed(encoder, summary="mean", clip_norm=1.0, epsilon=2.0)
    assert again != named  # a seed that the server knows would let it take the noise off


def test_noise_hides_the_length_even_beside_a_prompt_that_fills_the_context(encoder):
    prompts = [PromptCount(0, "zero " * 100, 1), PromptCount(0, "zero", 1)]

    _, embeddings = embed(encoder, prompts, clip_norm=1.0, epsilon=8.0)

    assert {len(tensor) for tensor in embeddings.values()} == {encoder.context_length}


def test_noised_embeddings_do_not_tell_how_many_images_share_a_prompt(encoder):
    two, three = PromptCount(0, "zero", 2), PromptCount(0, "zero", 3)
    other = PromptCount(0, "a photo of a handwritten zero", 1)

    equal, different = (embed(encoder, prompts, clip_norm=1.0, epsilon=2.0) for prompts in ([three], [two, other]))

    for named, embeddings in (equal, different):
        assert [(item.label, item.count) for item in named] == [(0, 1)] * 3
        assert {tuple(tensor.shape) for tensor in embeddings.values()} == {(encoder.context_length, 64)}
        # The order is that of the noised contents, whatever the order of the prompts.
        assert [item.prompt for item in named] == list(embeddings) == sorted(embeddings)
    assert len(save(equal[1])) == len(save(different[1]))


class Axes:
    """An encoder of single tokens: each text is a direction of its own, or the opposite of one."""

    context_length = 1
    width = 200_000

    def __call__(self, texts):
        return [self.vector(text)[None] for text in texts]

    def vector(self, text):
        vector = torch.zeros(self.width)
        vector["ab".find(text[-1])] = -5.0 if text.startswith("-") else 5.0
        return vector


@pytest.mark.parametrize(
    ("summary", "count", "epsilon", "delta"), [("none", 2, 0.7, 1e-6), ("mean", 3, 3.0, 1e-5), ("none", 3, 12.0, 1e-4)]
)
def test_replacing_a_prompt_in_any_small_set_is_as_private_as_it_should_be(summary, count, epsilon, delta):
    clip, encoder, texts = 0.5, Axes(), ("a", "-a", "b", "-b")

    def released(images):
        """What is noised, by hand: a row for each image, or their mean."""
        rows = torch.stack([encoder.vector(text)[:2] * clip / 5 for text in images])
        return rows if summary == "none" else rows.mean(0, keepdim=True)

    moved = max(
        float((released((*others, first)) - released((*others, second))).norm())
        for others in itertools.combinations_with_replacement(texts, count - 1)
        for first, second in itertools.permutations(texts, 2)
    )
    prompts = [PromptCount(0, text, number) for text, number in Counter(("a", "b", "b", "-b")[:count]).items()]
    named, embeddings = embed(encoder, prompts, summary=summary, clip_norm=clip, epsilon=epsilon, delta=delta)
    # All but the first two entries are noise alone.
    sd = torch.cat([tensor[:, 2:].float().flatten() for tensor in embeddings.values()]).std()
    s = float(sd) / moved

    # Balle & Wang 2018, Theorem 8.
    exact = norm.cdf(1 / (2 * s) - epsilon * s) - math.exp(epsilon) * norm.cdf(-1 / (2 * s) - epsilon * s)
    assert exact == pytest.approx(delta, rel=0.15)  # as sharp as the measured deviation
    assert [item.count for item in named] == ([1] * count if summary == "none" else [count])


def test_more_noised_embeddings_than_can_be_sent_are_refused_before_any_caption_is_written(run_config):
    private = {"prompt-level": "embedding", "embedding-clip": 10.0, "embedding-epsilon": 8.0}
    few = run_config | private | {"max-prompts-per-client": 100}

    with pytest.raises(ConfigError, match=r"at most 100 can be sent, but one has \d+ images.*embedding-summary=mean"):
        check_settings(parse_run_config(few))
    # 2 x 77 x 768 bytes each: 283 fill the 32 MiB that a client may upload.
    check_embeddings_fit(283, 77, 768, 100_000)
    with pytest.raises(ConfigError, match="at most 283 can be sent"):
        check_embeddings_fit(284, 77, 768, 100_000)


def test_as_many_noised_embeddings_as_fit_are_accepted():
    embeddings = {embedding_name(row): row for row in torch.randn(2000, 1, 8).half()}

    assert len(save(embeddings)) < len(embeddings) * (2 * 8 + 160)


def test_the_accountant_agrees_with_the_bound_of_the_gaussian_mechanism():
    # Balle & Wang 2018, Theorem 8: delta = Phi(1/(2s) - e s) - exp(e) Phi(-1/(2s) - e s) for sensitivity 1.
    epsilon, delta = 1.0, 1e-5
    s = calibrated_multiplier(epsilon, delta)
    exact = norm.cdf(1 / (2 * s) - epsilon * s) - 2.718281828459045**epsilon * norm.cdf(-1 / (2 * s) - epsilon * s)

    assert exact == pytest.approx(delta, rel=0.02)


def test_noise_without_a_bound_is_refused(encoder):
    with pytest.raises(ConfigError, match="embedding-clip"):
        embed(encoder, epsilon=1.0)


def test_a_generator_without_clips_encoder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`prompt-level` embedding needs a `generator`"):
        TextEncoder(str(tmp_path), "", CPU)


SETTINGS = DrawSettings(
    generator="tiny", generator_revision="", lora="", decoder="", scheduler="own", num_inference_steps=10,
    guidance_scale=1.0, guidance_start=0.0, guidance_stop=1.0, deep_cache_interval=1, safety_checker=False,
    filter="", filter_revision="", filter_attempts=2, generation_size=0, stored_size=256, seed=0,
)  # fmt: skip


def draw(prompts, embeddings):
    budget = tuple(PromptBudget(item.label, item.prompt, 8) for item in prompts)
    plan = Plan(SETTINGS, budget, {"": ""}, ("zero", "one"), "", "cpu", 8)
    engine = Engine(plan, load_generator(SETTINGS, CPU), embeddings, list, 8)
    # The noise derives from the prompt; here both must begin with the same noise.
    samples = (replace(sample, noise_seed=index) for index, sample in enumerate(plan.samples()))
    return engine.draw(Unit(tuple(samples))).tensors["image"].float()


@pytest.mark.parametrize("text", ["a photo of a handwritten seven", "three, a bold upright wide handwritten three"])
def test_embeddings_draw_the_images_of_their_words(encoder, text):
    prompts = [PromptCount(0, text, 1)]
    named, embeddings = embed(encoder, prompts)

    by_text = draw(prompts, {})
    by_embedding = draw(named, embeddings)

    # Padding is not uploaded, so that the images are near, not equal: the tolerance that the README states.
    assert (by_text - by_embedding).abs().mean() < 6
    assert (by_text[0] - by_text[1]).abs().mean() > 3 * (by_text - by_embedding).abs().mean()


@pytest.mark.parametrize("shape", [(4, 5), (400, 64)])
def test_embeddings_of_another_generator_are_refused(shape):
    with pytest.raises(ModelError, match="one `generator`"):
        draw([PromptCount(0, "e", 1)], {"e": torch.zeros(shape).half()})
