import dataclasses
import random
import weakref

import pytest
import torch
from plans import CPU, SETTINGS, draw, engine_of, plan_of

from fgl_app.errors import ConfigError, SynthesisError
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
    with pytest.raises(ConfigError, match="`generator`"):
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


class OutOfMemory:
    """The shipped generator on a device with room for some images at a time."""

    def __init__(self, generator, room: int) -> None:
        self.generator, self.room, self.encode = generator, room, generator.encode

    def generate(self, conditions, noise_seeds):
        if len(conditions) > self.room:
            raise torch.OutOfMemoryError
        return self.generator.generate(conditions, noise_seeds)


def test_out_of_memory_halves_the_batch_and_goes_on():
    plan = plan_of(PromptBudget(0, "zero", 11))
    engine = Engine(plan, OutOfMemory(load_generator(plan.settings, CPU), 3), {}, list, 8)

    (unit,) = plan.units()
    assert engine.draw(unit).batch_size == 2  # the store is told
    drawn = draw(plan, engine)

    assert engine_of(plan).draw(unit).batch_size == plan.batch_size
    largest = max((drawn[key].float() - image.float()).abs().max() for key, image in draw(plan).items())
    assert largest <= 1
    with pytest.raises(SynthesisError, match="one image at a time"):
        draw(plan, Engine(plan, OutOfMemory(load_generator(plan.settings, CPU), 0), {}, list, 8))


class Poisoned:
    """The shipped generator with a NaN in the images of some noise seeds."""

    def __init__(self, generator, seeds: set[int]) -> None:
        self.generator, self.seeds, self.encode = generator, seeds, generator.encode

    def generate(self, conditions, noise_seeds):
        drawn = self.generator.generate(conditions, noise_seeds).clone()
        for row, seed in enumerate(noise_seeds):
            if seed in self.seeds:
                drawn[row, 0, 0, 0] = torch.nan
        return drawn


def test_an_image_that_is_no_number_is_drawn_again_in_fp32_and_then_left_out():
    plan = plan_of(PromptBudget(0, "zero", 5))
    (unit,) = plan.units()
    sound = load_generator(plan.settings, CPU)
    once, always = (unit.samples[index].noise_seed for index in (1, 3))
    engine = Engine(plan, Poisoned(sound, {once, always}), {}, lambda: Poisoned(sound, {always}), 8)

    drawn = engine.draw(unit)

    assert drawn.left_out == {unit.samples[3].sample_id.hex(): "not finite"}
    assert drawn.tensors["seed"].tolist() == [
        sample.noise_seed for sample in unit.samples if sample.noise_seed != always
    ]
    expected = engine_of(plan).draw(unit).tensors["image"]
    assert torch.equal(drawn.tensors["image"], expected[[0, 1, 2, 4]])


def test_where_fp32_has_less_room_the_other_images_keep_their_batch():
    plan = plan_of(PromptBudget(0, "zero", 5))
    (unit,) = plan.units()
    sound = load_generator(plan.settings, CPU)
    broken = unit.samples[1].noise_seed

    for room, left_out in ((1, {}), (0, {unit.samples[1].sample_id.hex(): "not finite"})):
        exact = OutOfMemory(sound, room)
        drawn = Engine(plan, Poisoned(sound, {broken}), {}, lambda exact=exact: exact, 8).draw(unit)

        assert (drawn.batch_size, drawn.left_out) == (8, left_out)


def test_where_the_fp32_generator_takes_the_room_of_the_other_it_goes_and_the_batch_stays():
    plan = plan_of(PromptBudget(0, "zero", 5))
    (unit,) = plan.units()
    sound = load_generator(plan.settings, CPU)
    poisoned = Poisoned(sound, {unit.samples[1].noise_seed})
    loaded = weakref.WeakSet()

    class Crowded(OutOfMemory):
        """Room for a whole batch as long as no other generator is there."""

        def generate(self, conditions, noise_seeds):
            self.room = 0 if len(loaded) else 8
            return super().generate(conditions, noise_seeds)

    def load_exact():
        exact = OutOfMemory(sound, 8)
        loaded.add(exact)
        return exact

    engine = Engine(plan, Crowded(poisoned, 8), {}, load_exact, 8)

    for _ in range(2):
        drawn = engine.draw(unit)
        assert (drawn.batch_size, drawn.left_out) == (8, {})


def test_a_judge_without_memory_for_all_judges_fewer_at_a_time():
    plan = plan_of(PromptBudget(0, "zero", 5), filter_attempts=0)
    (unit,) = plan.units()
    seen = []

    def judge(images, labels, room=2):
        if len(images) > room:
            raise torch.OutOfMemoryError
        seen.append(len(images))
        return torch.ones(len(images), dtype=torch.bool)

    engine = engine_of(plan)
    engine.judges = [judge]
    assert engine.draw(unit).left_out == {}
    assert seen == [2, 2, 1]
    engine.judges = [lambda images, labels: judge(images, labels, 0)]
    with pytest.raises(SynthesisError, match="`filter` must fit into memory"):
        engine.draw(unit)
