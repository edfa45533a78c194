import dataclasses
import json
import random

import pytest
import torch
from plans import SETTINGS, plan_of

from fgl_app.config import parse_run_config
from fgl_app.errors import ConfigError, SynthesisError
from fgl_app.phases import draw_plan
from fgl_app.prompts import MergedPrompts, PromptBudget, PromptCount
from fgl_app.synthesis.plan import UNIT_SIZE, Plan
from fgl_app.synthesis.worker import work


def test_a_plan_does_not_depend_on_the_order_of_prompts():
    budget = [PromptBudget(label, f"prompt {label}", 30) for label in range(4)]
    shuffled = random.Random(0).sample(budget, 4)

    assert list(plan_of(*budget).units()) == list(plan_of(*shuffled).units())


def test_units_hold_every_sample_once():
    units = list(plan_of(PromptBudget(0, "a", 70), PromptBudget(1, "b", 60)).units())

    assert [len(unit.samples) for unit in units] == [UNIT_SIZE, UNIT_SIZE, 130 - 2 * UNIT_SIZE]
    assert len({sample.sample_id for unit in units for sample in unit.samples}) == 130
    assert len({sample.noise_seed for unit in units for sample in unit.samples}) == 130


def test_labels_are_in_the_order_of_the_samples():
    plan = plan_of(PromptBudget(1, "b", 3), PromptBudget(0, "c", 1), PromptBudget(1, "a", 2))

    assert plan.labels() == [sample.label for sample in plan.samples()] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"guidance_scale": 1.0}, {"num_inference_steps": 3}, {"generator": "other"}]
)
def test_other_settings_give_other_identities(change):
    budget = PromptBudget(0, "a", 1)

    assert next(plan_of(budget).samples()).noise_seed != next(plan_of(budget, **change).samples()).noise_seed


def test_images_of_the_shipped_generator_keep_their_identities():
    (sample,) = plan_of(PromptBudget(0, "zero", 1)).samples()

    assert SETTINGS.digest()[:16] == "ffa143e601d888f4"
    assert sample.sample_id.hex() == "b25d10f866eb86fdc2a69e95634efd6b"


def test_equal_prompts_of_different_domains_are_different_images():
    plan = plan_of(PromptBudget(0, "zero", 2, "ink"), PromptBudget(0, "zero", 2, "chalk"))

    assert len({sample.noise_seed for unit in plan.units() for sample in unit.samples}) == 4


def test_the_classes_between_which_a_filter_decides_are_part_of_the_identity(run_config, tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def digest(names, **changes):
        settings = parse_run_config(run_config | {"dataset": "folder", "class-names": ",".join(names)} | changes)
        prompts = MergedPrompts((PromptCount(0, "a cat", 1),), names)
        return draw_plan(settings, prompts, tmp_path / "none").settings.digest()

    assert digest(("cat", "dog")) == digest(("cat", "dog", "eel"))
    assert digest(("cat", "dog"), filter=str(tmp_path)) != digest(("cat", "dog", "eel"), filter=str(tmp_path))


@pytest.mark.parametrize("key", ["generator", "lora", "decoder", "filter"])
def test_a_retrained_model_at_the_same_place_draws_other_images(run_config, tmp_path, key):
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    settings = parse_run_config(run_config | {key: str(tmp_path)})
    prompts = MergedPrompts((PromptCount(0, "zero", 1),), ("zero", "one"))
    ids = []

    for content in (b"first", b"retrained"):
        weights.write_bytes(content)
        ids.append({sample.sample_id for sample in draw_plan(settings, prompts, tmp_path / "none").samples()})

    assert ids[0].isdisjoint(ids[1])


def test_images_drawn_at_another_shape_or_device_are_not_mixed_though_their_noise_is_the_same():
    budget = PromptBudget(0, "zero", 3)
    plan = plan_of(budget)

    for other in (plan_of(budget, batch_size=4), dataclasses.replace(plan, device="cuda")):
        pairs = list(zip(plan.samples(), other.samples(), strict=True))
        assert all(
            ours.sample_id != theirs.sample_id and ours.noise_seed == theirs.noise_seed for ours, theirs in pairs
        )


def test_a_plan_draws_on_the_device_that_is_named_for_it(run_config, tmp_path):
    prompts = MergedPrompts((PromptCount(0, "zero", 1),), ("zero", "one"))

    def plan(**changes):
        return draw_plan(parse_run_config(run_config | {"device": "cpu"} | changes), prompts, tmp_path / "none")

    assert (plan().device, plan().batch_size) == ("cpu", UNIT_SIZE)
    elsewhere = plan(**{"synthesis-device": "cuda", "synthesis-batch-size": 16})
    assert (elsewhere.device, elsewhere.batch_size) == ("cuda", 16)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="`synthesis-device` must be a device of this machine, but cuda is none"):
            work(elsewhere, tmp_path)


def test_what_the_card_says_of_prompts_is_overridden(run_config, tmp_path):
    own = {"class-prompt": "one {class}", "instance-prompt": "{class}: {caption}", "negative-prompt": "grey"}
    own |= {"guidance-scale": 2.0}
    settings = parse_run_config(run_config | own)
    prompts = MergedPrompts((PromptCount(0, "one zero", 1),), ("zero", "one"))

    form = settings.prompt_form()

    assert (form.class_templates, form.instance_template) == (("one {class}",), "{class}: {caption}")
    assert draw_plan(settings, prompts, tmp_path / "none").negatives == {"": "grey"}


def test_images_are_spread_over_prompts_as_the_settings_say(run_config, tmp_path):
    prompts = MergedPrompts((PromptCount(0, "zero", 9), PromptCount(0, "a zero", 1)), ("zero", "one"))

    def spread(kind):
        settings = parse_run_config(run_config | {"prompt-budget": kind, "images-per-class": 10})
        return {item.prompt: item.num_images for item in draw_plan(settings, prompts, tmp_path / "none").budget}

    assert spread("proportional") == {"zero": 9, "a zero": 1}
    assert spread("uniform") == {"zero": 5, "a zero": 5}


def test_on_a_cpu_the_batch_size_of_the_settings_changes_nothing(run_config, tmp_path):
    prompts = MergedPrompts((PromptCount(0, "zero", 1),), ("zero", "one"))

    plans = [
        draw_plan(
            parse_run_config(run_config | {"synthesis-batch-size": size, "device": "cpu"}), prompts, tmp_path / "none"
        )
        for size in (1, 50)
    ]

    assert plans[0] == plans[1]


def test_a_plan_survives_its_file_which_only_the_owner_reads(tmp_path):
    plan = plan_of(PromptBudget(0, "a", 3), filter="clip", filter_classes=("zero", "one"))
    plan = dataclasses.replace(plan, embeddings=str(tmp_path / "embeddings.safetensors"))
    (tmp_path / "mounted").mkdir()

    plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "mounted" / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan
    # Elsewhere the run's folder has another name.
    assert Plan.load(tmp_path / "mounted" / "plan.json").embeddings == str(
        tmp_path / "mounted" / "embeddings.safetensors"
    )
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(SynthesisError, match="must be a synthesis plan"):
        Plan.load(tmp_path / "absent.json")
