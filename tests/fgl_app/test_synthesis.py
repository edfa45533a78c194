import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from fgl_app.config import APP_FOLDER, parse_run_config
from fgl_app.errors import ModelError, SynthesisError
from fgl_app.phases import draw_plan
from fgl_app.prompts import MergedPrompts, PromptBudget, PromptCount
from fgl_app.store import UnitStore
from fgl_app.synthesis import generator
from fgl_app.synthesis.launch import synthesize
from fgl_app.synthesis.plan import UNIT_SIZE, DrawSettings, Plan
from fgl_app.synthesis.worker import work

SETTINGS = DrawSettings(
    generator="tiny", generator_revision="", scheduler="own", num_inference_steps=2, guidance_scale=2.0,
    generation_size=0, stored_size=256, seed=0,
)  # fmt: skip


def plan_of(*budget: PromptBudget, batch_size: int = 8, **changes: object) -> Plan:
    return Plan(dataclasses.replace(SETTINGS, **changes), budget, {"": ""}, "", "cpu", batch_size)


@pytest.fixture(scope="module")
def pipeline():
    return generator.load_pipeline("tiny", "", torch.device("cpu"))


def draw(pipeline, plan: Plan) -> dict[bytes, torch.Tensor]:
    samples = [sample for unit in plan.units() for sample in unit.samples]
    images = generator.draw(pipeline, samples, plan.settings, plan.batch_size)
    return {sample.sample_id: image for sample, image in zip(samples, images, strict=True)}


def test_a_plan_does_not_depend_on_the_order_of_prompts():
    budget = [PromptBudget(label, f"prompt {label}", 30) for label in range(4)]
    shuffled = random.Random(0).sample(budget, 4)

    assert plan_of(*budget).units() == plan_of(*shuffled).units()


def test_units_hold_every_sample_once():
    units = plan_of(PromptBudget(0, "a", 70), PromptBudget(1, "b", 60)).units()

    assert [len(unit.samples) for unit in units] == [UNIT_SIZE, UNIT_SIZE, 130 - 2 * UNIT_SIZE]
    assert len({sample.sample_id for unit in units for sample in unit.samples}) == 130
    assert len({sample.noise_seed for unit in units for sample in unit.samples}) == 130


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"guidance_scale": 1.0}, {"num_inference_steps": 3}, {"generator": "other"}]
)
def test_other_settings_give_other_identities(change):
    budget = PromptBudget(0, "a", 1)

    assert plan_of(budget).units()[0].unit_id != plan_of(budget, **change).units()[0].unit_id


def test_a_plan_survives_its_file_which_only_the_owner_reads(tmp_path):
    plan = plan_of(PromptBudget(0, "a", 3))

    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(SynthesisError, match="must be a synthesis plan"):
        Plan.load(tmp_path / "absent.json")


def test_no_image_depends_on_its_place_in_a_batch(pipeline):
    plan = plan_of(*(PromptBudget(label, f"a handwritten {label}", 10) for label in range(10)), num_inference_steps=8)
    samples = [sample for unit in plan.units() for sample in unit.samples]
    shuffled = random.Random(1).sample(range(len(samples)), len(samples))

    reference = generator.draw(pipeline, samples, plan.settings, plan.batch_size)

    again = generator.draw(pipeline, [samples[index] for index in shuffled], plan.settings, plan.batch_size)
    assert torch.equal(again, reference[shuffled])


def test_an_image_of_a_larger_set_is_that_of_a_smaller_one(pipeline):
    small = draw(pipeline, plan_of(PromptBudget(0, "zero", 3)))
    large = draw(pipeline, plan_of(PromptBudget(0, "zero", 6), PromptBudget(1, "one", 3)))

    assert all(torch.equal(large[key], small[key]) for key in small)


@pytest.mark.parametrize(
    "prompt", ["", "seven handwritten a", "qwxyz 東京 🦩 unknown words", "seven " * 200, "SEVEN", "7"]
)
def test_the_shipped_generator_draws_any_prompt(pipeline, prompt):
    images = draw(pipeline, plan_of(PromptBudget(0, prompt, 1)))

    (image,) = images.values()
    assert image.shape == (3, 32, 32)
    assert image.float().std() > 5  # something was drawn


def test_large_images_are_stored_smaller(pipeline):
    (image,) = draw(pipeline, plan_of(PromptBudget(0, "zero", 1), stored_size=16)).values()

    assert image.shape == (3, 16, 16)


def test_a_folder_saved_by_diffusers_draws_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    again = generator.load_pipeline(str(tmp_path / "saved"), "", torch.device("cpu"))
    plan = plan_of(PromptBudget(3, "three", 2))

    for ours, theirs in zip(draw(pipeline, plan).values(), draw(again, plan).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ModelError, match="`generator`"):
        generator.load_pipeline(str(tmp_path), "", torch.device("cpu"))


def test_the_worker_draws_what_is_missing_and_nothing_else(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", UNIT_SIZE), PromptBudget(1, "one", 5))
    store = UnitStore(tmp_path)

    assert work(plan, store) == UNIT_SIZE + 5
    assert work(plan, store) == 0
    (tmp_path / "units" / f"{plan.units()[1].unit_id}.json").unlink()
    assert work(plan, store) == 5


def test_the_worker_process_reports_progress_and_its_store_is_read_back(tmp_path):
    lines: list[str] = []
    plan = plan_of(PromptBudget(4, "four", 3), PromptBudget(7, "seven", 2))

    images, report = synthesize(plan, tmp_path / "store", tmp_path, lines.append)

    assert images.labels.tolist() == [4, 4, 4, 7, 7]
    assert (report.images, report.generated, report.reused) == (5, 5, 0)
    assert report.reused_seconds == 0

    _, again = synthesize(plan, tmp_path / "store", tmp_path, lines.append)

    assert (again.generated, again.reused) == (0, 5)
    assert 0 < again.reused_seconds < report.seconds  # what drawing took, without the start of the worker
    assert any("5/5" in line and "image/s" in line for line in lines)
    assert synthesize(plan, tmp_path / "store", tmp_path, lines.append)[1].generated == 0


def test_a_failing_worker_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(SynthesisError, match=r"ended with 1\. `generator`"):
        synthesize(plan_of(PromptBudget(0, "zero", 1), generator=str(tmp_path / "absent")), tmp_path, tmp_path, print)


@pytest.mark.e2e
def test_a_worker_killed_in_the_middle_leaves_a_store_that_is_completed_to_the_same_bytes(tmp_path):
    plan = plan_of(*(PromptBudget(label, f"handwritten {label}", 40) for label in range(10)), num_inference_steps=8)
    ids = [unit.unit_id for unit in plan.units()]
    undisturbed = UnitStore(tmp_path / "undisturbed")
    work(plan, undisturbed)
    store = UnitStore(tmp_path / "killed")
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(tmp_path / "plan.json"), str(store.folder)]

    process = subprocess.Popen(command, cwd=APP_FOLDER, stderr=subprocess.DEVNULL)
    while sum(map(store.has, ids)) < 2 and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    committed = sum(map(store.has, ids))

    assert 0 < committed < len(ids)
    assert work(plan, store) == 400 - committed * UNIT_SIZE
    assert store.content_hash(ids) == undisturbed.content_hash(ids)


def test_on_a_cpu_the_batch_size_of_the_settings_changes_nothing(run_config, tmp_path):
    prompts = MergedPrompts((PromptCount(0, "zero", 1),), ("zero", "one"))

    plans = [
        draw_plan(
            parse_run_config(run_config | {"synthesis-batch-size": size, "device": "cpu"}), prompts, tmp_path / "none"
        )
        for size in (1, 50)
    ]

    assert plans[0] == plans[1]


def test_units_drawn_at_another_shape_or_device_are_not_mixed():
    budget = PromptBudget(0, "zero", 3)
    plan = plan_of(budget)
    others = [plan_of(budget, batch_size=4), dataclasses.replace(plan, device="cuda")]

    assert all(other.units()[0].unit_id != plan.units()[0].unit_id for other in others)
    assert all(other.units()[0].samples == plan.units()[0].samples for other in others)


@pytest.mark.parametrize("scheduler", ["own", "ddim", "pndm", "dpm-solver++", "unipc", "euler"])
def test_every_scheduler_draws_digits_from_the_same_noise(scheduler):
    chosen = generator.load_pipeline("tiny", "", torch.device("cpu"), scheduler)
    budget = [PromptBudget(label, f"a photo of a handwritten {name}", 4) for label, name in ((0, "zero"), (1, "one"))]
    plan = plan_of(*budget, num_inference_steps=12, guidance_scale=1.0, scheduler=scheduler)

    images = torch.stack(list(draw(chosen, plan).values())).float()

    # A zero is hollow and a one is not, whatever solves the equation.
    hollow = images[:, 0, 14:18, 14:18].mean((1, 2)) - images[:, 0].mean((1, 2))
    assert hollow[:4].mean() < hollow[4:].mean() - 30


def test_a_negative_prompt_and_a_size_reach_the_pipeline(pipeline):
    budget = PromptBudget(3, "three", 2, "photo")
    plain, steered = (
        dataclasses.replace(plan_of(budget), negatives={"photo": negative}) for negative in ("", "bold wide")
    )
    sizes = {image.shape for image in draw(pipeline, plan_of(budget, generation_size=64)).values()}

    assert sizes == {(3, 64, 64)}
    assert set(draw(pipeline, plain)).isdisjoint(draw(pipeline, steered))  # other negatives, other identities
    samples = [unit.samples[0] for plan in (plain, steered) for unit in plan.units()]
    same_noise = [dataclasses.replace(sample, noise_seed=1) for sample in samples]
    first, second = (generator.draw(pipeline, [sample], SETTINGS, 1) for sample in same_noise)
    assert not torch.equal(first, second)


def test_equal_prompts_of_different_domains_are_different_images():
    plan = plan_of(PromptBudget(0, "zero", 2, "ink"), PromptBudget(0, "zero", 2, "chalk"))

    assert len({sample.noise_seed for unit in plan.units() for sample in unit.samples}) == 4
