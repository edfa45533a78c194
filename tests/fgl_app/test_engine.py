import dataclasses
import random

import pytest
import torch
from plans import CPU, SETTINGS, draw, engine_of, plan_of

from fgl_app.errors import ModelError
from fgl_app.prompts import PromptBudget
from fgl_app.synthesis.engine import Engine
from fgl_app.synthesis.generator import load_generator, load_pipeline
from fgl_app.synthesis.plan import Unit


def test_no_image_depends_on_its_place_in_a_batch():
    plan = plan_of(*(PromptBudget(label, f"a handwritten {label}", 10) for label in range(10)), num_inference_steps=8)
    samples = list(plan.samples())
    shuffled = random.Random(1).sample(range(len(samples)), len(samples))
    engine = engine_of(plan)

    reference = engine.draw(Unit(tuple(samples))).tensors["image"]

    again = engine_of(plan).draw(Unit(tuple(samples[index] for index in shuffled))).tensors["image"]
    assert torch.equal(again, reference[shuffled])


def test_an_image_of_a_larger_set_is_that_of_a_smaller_one():
    small = draw(plan_of(PromptBudget(0, "zero", 3)))
    large = draw(plan_of(PromptBudget(0, "zero", 6), PromptBudget(1, "one", 3)))

    assert all(torch.equal(large[key], small[key]) for key in small)


@pytest.mark.parametrize(
    "prompt", ["", "seven handwritten a", "qwxyz 東京 🦩 unknown words", "seven " * 200, "SEVEN", "7"]
)
def test_the_shipped_generator_draws_any_prompt(prompt):
    images = draw(plan_of(PromptBudget(0, prompt, 1)))

    (image,) = images.values()
    assert image.shape == (3, 32, 32)
    assert image.float().std() > 5  # something was drawn


class Counting:
    """The shipped generator, which notes what it encodes."""

    def __init__(self, generator) -> None:
        self.generator, self.generate = generator, generator.generate
        self.encoded: list[tuple] = []

    def encode(self, prompts):
        self.encoded += prompts
        return self.generator.encode(prompts)


def test_each_prompt_is_encoded_once_for_all_batches_units_and_further_attempts():
    plan = dataclasses.replace(
        plan_of(
            PromptBudget(0, "zero", 30), PromptBudget(1, "one", 50), PromptBudget(1, "one", 20, "ink"),
            filter_attempts=1,
        ),
        negatives={"": "", "ink": "chalk"},
    )  # fmt: skip
    generator = Counting(load_generator(plan.settings, CPU))
    engine = Engine(plan, generator, {}, list, plan.batch_size)
    engine.judges = [lambda images, labels: torch.arange(len(images)) % 4 > 0]  # the others are drawn again

    drawn = [engine.draw(unit) for unit in plan.units()]

    assert [sum(count for count, _ in unit.judged.values()) for unit in drawn] == [64 + 16, 36 + 9]
    assert sorted(generator.encoded) == [("one", ""), ("one", "chalk"), ("zero", "")]


def test_of_many_prompts_those_used_last_stay_encoded(monkeypatch):
    monkeypatch.setattr("fgl_app.synthesis.engine._KEPT_CONDITIONS", 2)
    plan = plan_of(*(PromptBudget(0, prompt, 1) for prompt in "abc"))
    generator = Counting(load_generator(plan.settings, CPU))
    engine = Engine(plan, generator, {}, list, plan.batch_size)
    samples = {sample.prompt: sample for sample in plan.samples()}

    for prompts in ("ab", "ac", "a", "b", "abc"):
        engine.draw(Unit(tuple(samples[prompt] for prompt in prompts)))

    assert "".join(prompt for prompt, _ in generator.encoded) == "ab" + "c" + "b" + "c"


def test_large_images_are_stored_smaller():
    (image,) = draw(plan_of(PromptBudget(0, "zero", 1), stored_size=16)).values()

    assert image.shape == (3, 16, 16)


def test_a_folder_saved_by_diffusers_draws_the_same(tmp_path):
    load_pipeline(SETTINGS, CPU).save_pretrained(tmp_path / "saved")
    plan = plan_of(PromptBudget(3, "three", 2))
    saved = Engine(
        plan, load_generator(dataclasses.replace(SETTINGS, generator=str(tmp_path / "saved")), CPU), {}, list, 8
    )

    assert all(map(torch.equal, draw(plan).values(), draw(plan, saved).values()))


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ModelError, match="`generator`"):
        load_pipeline(dataclasses.replace(SETTINGS, generator=str(tmp_path)), CPU)


def test_a_negative_prompt_and_a_size_reach_the_generator():
    budget = PromptBudget(3, "three", 2, "photo")
    plain, steered = (
        dataclasses.replace(plan_of(budget), negatives={"photo": negative}) for negative in ("", "bold wide")
    )
    sizes = {image.shape for image in draw(plan_of(budget, generation_size=64)).values()}

    assert sizes == {(3, 64, 64)}
    assert set(draw(plain)).isdisjoint(draw(steered))  # other negatives, other identities
    same_noise = [dataclasses.replace(next(plan.samples()), noise_seed=1) for plan in (plain, steered)]
    first, second = (engine_of(plain).draw(Unit((sample,))).tensors["image"] for sample in same_noise)
    assert not torch.equal(first, second)
