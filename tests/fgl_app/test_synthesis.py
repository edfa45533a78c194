import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from fgl_app.config import APP_FOLDER, parse_run_config
from fgl_app.errors import ConfigError, ModelError, SynthesisError
from fgl_app.phases import draw_plan
from fgl_app.prompts import MergedPrompts, PromptBudget, PromptCount
from fgl_app.store import UnitStore, as_ids
from fgl_app.synthesis.cluster import plan_of_actor
from fgl_app.synthesis.engine import Engine
from fgl_app.synthesis.generator import load_generator, load_pipeline
from fgl_app.synthesis.launch import _pass_on, synthesize
from fgl_app.synthesis.plan import UNIT_SIZE, DrawSettings, Plan, Unit
from fgl_app.synthesis.worker import shuffled, work

SETTINGS = DrawSettings(
    generator="tiny", generator_revision="", lora="", decoder="", scheduler="own", num_inference_steps=2,
    guidance_scale=2.0, guidance_start=0.0, guidance_stop=1.0, deep_cache_interval=1, safety_checker=False,
    filter="", filter_revision="", filter_attempts=2, generation_size=0, stored_size=256, seed=0,
)  # fmt: skip
CPU = torch.device("cpu")


def plan_of(*budget: PromptBudget, batch_size: int = 8, **changes: object) -> Plan:
    return Plan(dataclasses.replace(SETTINGS, **changes), budget, {"": ""}, ("zero", "one"), "", "cpu", batch_size)


def ids_of(plan: Plan):
    return as_ids(sample.sample_id for sample in plan.samples())


def store_of(plan: Plan, folder: Path) -> UnitStore:
    return UnitStore(folder, plan.settings.digest())


def engine_of(plan: Plan) -> Engine:
    return Engine(
        plan, load_generator(plan.settings, CPU), {}, lambda: load_generator(plan.settings, CPU), plan.batch_size
    )


def draw(plan: Plan, engine: Engine | None = None) -> dict[bytes, torch.Tensor]:
    engine = engine or engine_of(plan)
    images: dict[bytes, torch.Tensor] = {}
    for unit in plan.units():
        drawn = engine.draw(unit).tensors
        images |= {row.numpy().tobytes(): image for row, image in zip(drawn["sample_id"], drawn["image"], strict=True)}
    return images


def test_a_plan_does_not_depend_on_the_order_of_prompts():
    budget = [PromptBudget(label, f"prompt {label}", 30) for label in range(4)]
    shuffled = random.Random(0).sample(budget, 4)

    assert list(plan_of(*budget).units()) == list(plan_of(*shuffled).units())


def test_workers_visit_every_unit_once_each_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr("fgl_app.synthesis.worker._SHUFFLED_UNITS", 8)
    units = list(plan_of(PromptBudget(0, "a", 40 * UNIT_SIZE)).units())

    one, other = (list(shuffled(iter(units))) for _ in range(2))

    assert {unit.unit_id for unit in one} == {unit.unit_id for unit in other} == {unit.unit_id for unit in units}
    assert len(one) == len(units)
    assert one != other
    assert max(place - units.index(unit) for place, unit in enumerate(one)) >= 0
    assert max(units.index(unit) - place for place, unit in enumerate(one)) < 8


def test_the_classes_between_which_a_filter_decides_are_part_of_the_identity(run_config, tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def digest(names, **changes):
        settings = parse_run_config(run_config | {"dataset": "folder", "class-names": ",".join(names)} | changes)
        prompts = MergedPrompts((PromptCount(0, "a cat", 1),), names)
        return draw_plan(settings, prompts, tmp_path / "none").settings.digest()

    assert digest(("cat", "dog")) == digest(("cat", "dog", "eel"))
    assert digest(("cat", "dog"), filter=str(tmp_path)) != digest(("cat", "dog", "eel"), filter=str(tmp_path))


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


def test_units_hold_every_sample_once():
    units = list(plan_of(PromptBudget(0, "a", 70), PromptBudget(1, "b", 60)).units())

    assert [len(unit.samples) for unit in units] == [UNIT_SIZE, UNIT_SIZE, 130 - 2 * UNIT_SIZE]
    assert len({sample.sample_id for unit in units for sample in unit.samples}) == 130
    assert len({sample.noise_seed for unit in units for sample in unit.samples}) == 130


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"guidance_scale": 1.0}, {"num_inference_steps": 3}, {"generator": "other"}]
)
def test_other_settings_give_other_identities(change):
    budget = PromptBudget(0, "a", 1)

    assert next(plan_of(budget).samples()).noise_seed != next(plan_of(budget, **change).samples()).noise_seed


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


def test_the_worker_draws_what_is_missing_and_nothing_else(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", UNIT_SIZE), PromptBudget(1, "one", 5))
    store = store_of(plan, tmp_path)

    assert work(plan, tmp_path) == UNIT_SIZE + 5
    assert work(plan, tmp_path) == 0
    store.discard([list(plan.units())[1].unit_id])
    assert work(plan, tmp_path) == 5


def test_a_larger_plan_draws_only_the_images_that_a_smaller_one_did_not(tmp_path):
    small = plan_of(PromptBudget(0, "zero", 5), PromptBudget(1, "one", 5))
    large = plan_of(PromptBudget(0, "zero", 9), PromptBudget(1, "one", 6))
    work(small, tmp_path / "shared")

    assert work(large, tmp_path / "shared") == 5
    work(large, tmp_path / "fresh")
    hashes = [store_of(large, tmp_path / name).content_hash(ids_of(large)) for name in ("shared", "fresh")]
    assert hashes[0] == hashes[1]


def test_runs_of_one_folder_never_draw_an_image_twice(tmp_path):
    first, second = plan_of(PromptBudget(0, "zero", 4)), plan_of(PromptBudget(0, "zero", 6))
    for name in "ab":
        (tmp_path / name).mkdir()

    synthesize(first, tmp_path / "a" / "synthetic", tmp_path / "a", print)
    _, report = synthesize(second, tmp_path / "b" / "synthetic", tmp_path / "b", print)

    assert (report.generated, report.reused) == (2, 4)
    shutil.rmtree(tmp_path / "a")  # links, so that each folder stands alone
    assert len(store_of(second, tmp_path / "b" / "synthetic").read(ids_of(second))) == 6


def test_a_set_of_which_nothing_is_left_is_one_sentence(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 2))
    work(plan, tmp_path / "store")
    store = store_of(plan, tmp_path / "store")
    (unit,) = plan.units()
    drawn = engine_of(plan).draw(unit)
    store.discard([unit.unit_id])
    nothing = {name: tensor[:0] for name, tensor in drawn.tensors.items()}
    left_out = {sample.sample_id.hex(): "rejected" for sample in unit.samples}
    store.commit(unit.unit_id, nothing, {"left_out": left_out, "seconds": 1.0, "batch_size": 8})

    with pytest.raises(SynthesisError, match=r"all 2 were left out: \{'rejected': 2\}"):
        synthesize(plan, tmp_path / "store", tmp_path, print)


@pytest.mark.parametrize("kind", ["manifest", "images"])
def test_a_unit_that_lost_a_part_of_a_file_is_drawn_again(tmp_path, kind):
    plan = plan_of(PromptBudget(0, "zero", 2))
    work(plan, tmp_path / "store")
    store = store_of(plan, tmp_path / "store")
    before = store.content_hash(ids_of(plan))
    (file,) = store.units_folder.glob("*.json" if kind == "manifest" else "*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])

    images, report = synthesize(plan, tmp_path / "store", tmp_path, print)

    assert (len(images), report.generated) == (2, 2)
    assert store.content_hash(ids_of(plan)) == before


def test_a_damaged_unit_is_named_and_drawn_again(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 3))
    before, _ = synthesize(plan, tmp_path / "store", tmp_path, print)
    (file,) = store_of(plan, tmp_path / "store").units_folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    lines: list[str] = []

    after, report = synthesize(plan, tmp_path / "store", tmp_path, lines.append)

    assert torch.equal(after.images, before.images)
    assert (report.generated, report.reused) == (3, 0)
    assert any(file.stem in line for line in lines)


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


def test_images_that_this_start_drew_for_other_prompts_are_not_reused(tmp_path):
    early = plan_of(PromptBudget(0, "zero", 5), PromptBudget(1, "one", 2))
    late = plan_of(PromptBudget(0, "zero", 1), PromptBudget(1, "one", 3))

    _, before = synthesize(early, tmp_path / "store", tmp_path, print)
    _, report = synthesize(late, tmp_path / "store", tmp_path, print, drawn_before=before.drawn)
    _, again = synthesize(late, tmp_path / "store", tmp_path, print)

    assert (report.images, report.generated, report.reused, report.reused_seconds) == (4, 7 + 1, 0, 0.0)
    assert (again.images, again.generated, again.reused) == (4, 0, 4)
    assert again.reused_seconds > 0


def test_images_that_were_left_out_are_not_counted_as_part_of_the_set(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 3))
    (unit,) = plan.units()
    bad, *good = unit.samples
    drawn = engine_of(plan).draw(Unit(tuple(good)))
    others = {bad.sample_id.hex(): "not finite", (b"\0" * 16).hex(): "of another plan"}
    store_of(plan, tmp_path / "store").commit(
        unit.unit_id, drawn.tensors, {"left_out": others, "seconds": 1.0, "batch_size": 4}
    )

    images, report = synthesize(plan, tmp_path / "store", tmp_path, print)

    assert len(images) == report.images == 2
    assert (report.reused, report.left_out, report.batch_sizes) == (3, {"not finite": 1}, (4,))


def test_warnings_of_the_worker_are_passed_on_between_reports_of_progress(tmp_path):
    bar, warning = "synthesis:  40%|####      | 2/5", "synthesis: warning: the UNet runs uncompiled"
    lines: list[str] = []
    with (tmp_path / "stderr").open("w+b") as stream, (tmp_path / "log").open("w") as log:
        stream.write(f"{bar}\r{warning}\n{bar}\rwarning: of a library\n".encode())
        stream.flush()
        os.lseek(stream.fileno(), 0, os.SEEK_SET)

        _pass_on(stream, log, lines.append)

    assert lines == [bar, warning]
    assert (tmp_path / "log").read_text() == "warning: of a library\n"


def test_a_failing_worker_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(SynthesisError, match=r"ended with 1\. `generator`"):
        synthesize(plan_of(PromptBudget(0, "zero", 1), generator=str(tmp_path / "absent")), tmp_path, tmp_path, print)


@pytest.mark.e2e
def test_a_worker_killed_in_the_middle_leaves_a_store_that_is_completed_to_the_same_bytes(tmp_path):
    plan = plan_of(*(PromptBudget(label, f"handwritten {label}", 40) for label in range(10)), num_inference_steps=8)
    wanted = ids_of(plan)
    work(plan, tmp_path / "undisturbed")
    store = store_of(plan, tmp_path / "killed")
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(tmp_path / "plan.json"), str(store.folder)]

    process = subprocess.Popen(command, cwd=APP_FOLDER, stderr=subprocess.DEVNULL)
    while store.index().holds(wanted).sum() < 2 * UNIT_SIZE and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    committed = int(store.index().holds(wanted).sum())

    assert 0 < committed < 400
    assert work(plan, store.folder) == 400 - committed
    assert store.content_hash(wanted) == store_of(plan, tmp_path / "undisturbed").content_hash(wanted)


@pytest.mark.e2e
def test_the_worker_ends_with_the_process_that_started_it_even_if_that_was_killed(tmp_path):
    plan = plan_of(*(PromptBudget(label, f"handwritten {label}", 400) for label in range(10)), num_inference_steps=20)
    plan.save(tmp_path / "plan.json")
    program = (
        "from pathlib import Path; from fgl_app.synthesis.launch import synthesize; "
        "from fgl_app.synthesis.plan import Plan; folder = Path({folder!r}); "
        "synthesize(Plan.load(folder / 'plan.json'), folder / 'store', folder, print)"
    )
    command = [sys.executable, "-c", program.format(folder=str(tmp_path))]

    with subprocess.Popen(command, cwd=APP_FOLDER, stdout=subprocess.DEVNULL, start_new_session=True) as parent:
        while not (workers := psutil.Process(parent.pid).children()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()

    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_on_a_cpu_the_batch_size_of_the_settings_changes_nothing(run_config, tmp_path):
    prompts = MergedPrompts((PromptCount(0, "zero", 1),), ("zero", "one"))

    plans = [
        draw_plan(
            parse_run_config(run_config | {"synthesis-batch-size": size, "device": "cpu"}), prompts, tmp_path / "none"
        )
        for size in (1, 50)
    ]

    assert plans[0] == plans[1]


def test_images_of_the_shipped_generator_keep_their_identities():
    (sample,) = plan_of(PromptBudget(0, "zero", 1)).samples()

    assert SETTINGS.digest()[:16] == "ffa143e601d888f4"
    assert sample.sample_id.hex() == "b25d10f866eb86fdc2a69e95634efd6b"


@pytest.mark.parametrize("key", ["generator", "lora", "decoder", "filter"])
def test_a_retrained_model_at_the_same_place_draws_other_images(run_config, tmp_path, key):
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
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


def test_equal_prompts_of_different_domains_are_different_images():
    plan = plan_of(PromptBudget(0, "zero", 2, "ink"), PromptBudget(0, "zero", 2, "chalk"))

    assert len({sample.noise_seed for unit in plan.units() for sample in unit.samples}) == 4


@pytest.mark.e2e
def test_actors_of_ray_draw_the_same_images_and_survive_the_death_of_one(tmp_path):
    plan = plan_of(*(PromptBudget(label, f"handwritten {label}", 40) for label in range(10)), num_inference_steps=8)
    plan.save(tmp_path / "plan.json")
    wanted = ids_of(plan)
    work(plan, tmp_path / "alone")
    store = store_of(plan, tmp_path / "cluster")
    command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(tmp_path / "plan.json"), str(store.folder)]

    with subprocess.Popen([*command, "--workers", "2"], cwd=APP_FOLDER, stderr=subprocess.DEVNULL) as process:
        while store.index().holds(wanted).sum() < UNIT_SIZE and process.poll() is None:
            time.sleep(0.05)
        actors = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "SynthesisActor" in " ".join(child.cmdline())
        ]
        actors[0].kill()

    assert len(actors) == 2
    assert process.returncode == 0
    assert store.content_hash(wanted) == store_of(plan, tmp_path / "alone").content_hash(wanted)
    held = [json.loads(file.read_text())["num_images"] for file in store.units_folder.glob("*.json")]
    assert sum(held) == 400  # no image was drawn twice


def test_an_actor_draws_the_same_identities_on_the_one_gpu_that_it_sees():
    second = dataclasses.replace(plan_of(PromptBudget(0, "zero", 3)), device="cuda:1")

    seen = plan_of_actor(second)

    assert seen.device == "cuda"
    assert list(seen.samples()) == list(second.samples())


def test_an_unreachable_cluster_is_one_sentence(tmp_path):
    with pytest.raises(SynthesisError, match="`ray-address` must be that of a running cluster"):
        work(plan_of(PromptBudget(0, "zero", 1)), tmp_path, num_workers=1, ray_address="127.0.0.1:1")


SERVER = """
import sys
from pathlib import Path
from fgl_app.synthesis.launch import synthesize
from fgl_app.synthesis.plan import Plan

folder = Path(sys.argv[1])
synthesize(Plan.load(folder / "plan.json"), folder / "killed", folder, lambda line: None)
"""
"""What the ServerApp does while images are drawn: it starts the worker and waits for it."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    plan = plan_of(*(PromptBudget(label, f"handwritten {label}", 64) for label in range(10)), num_inference_steps=4)
    folder = tmp_path_factory.mktemp("undisturbed")
    work(plan, folder)
    return plan, store_of(plan, folder).content_hash(ids_of(plan))


@pytest.mark.e2e
@pytest.mark.nightly
@pytest.mark.parametrize("victim", ["worker", "actor", "server"])
@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_any_moment_changes_nothing_and_costs_no_committed_image(tmp_path, undisturbed, trial, victim):
    plan, expected = undisturbed
    plan.save(tmp_path / "plan.json")
    wanted, store = ids_of(plan), store_of(plan, tmp_path / "killed")
    command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(tmp_path / "plan.json"), str(store.folder)]
    if victim == "server":
        command = [sys.executable, "-c", SERVER, str(tmp_path)]
    elif victim == "actor":
        command += ["--workers", "2"]
    moment = random.Random(trial).uniform(0, 640)

    with subprocess.Popen(command, cwd=APP_FOLDER, stderr=subprocess.DEVNULL) as process:
        while store.index().holds(wanted).sum() < moment - UNIT_SIZE and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(trial).uniform(0, 0.5))
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if victim == "actor":  # the driver goes on without it
            actors = [child for child in family if "SynthesisActor" in " ".join(child.cmdline())]
            random.Random(trial).choice(actors).kill() if actors else None
        else:
            process.kill()
    _, alive = psutil.wait_procs(family, timeout=30)  # the worker of a killed server ends by itself
    assert not alive, [child.cmdline() for child in alive]
    committed = {file.name: file.stat().st_mtime_ns for file in store.units_folder.glob("*.json")}
    subprocess.run(command, cwd=APP_FOLDER, stderr=subprocess.DEVNULL, check=True)

    assert store.content_hash(wanted) == expected
    held = [json.loads(file.read_text())["num_images"] for file in store.units_folder.glob("*.json")]
    assert sum(held) == 640
    assert all((store.units_folder / name).stat().st_mtime_ns == then for name, then in committed.items())


def test_a_server_that_waits_takes_what_a_worker_elsewhere_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("fgl_app.synthesis.launch._POLL_S", 0.1)
    plan = plan_of(PromptBudget(0, "zero", 5))
    lines: list[str] = []

    def draw_elsewhere() -> None:
        while not (tmp_path / "plan.json").exists():
            time.sleep(0.05)
        work(Plan.load(tmp_path / "plan.json"), tmp_path / "store")

    elsewhere = threading.Thread(target=draw_elsewhere)
    elsewhere.start()
    images, report = synthesize(plan, tmp_path / "store", tmp_path, lines.append, wait_s=120.0)
    elsewhere.join()

    assert len(images) == 5
    assert report.generated == 5
    assert "0 of 5 images are there" in lines[0]
    assert "5 of 5 images are there" in lines[-1]


def test_a_server_that_waits_in_vain_says_what_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr("fgl_app.synthesis.launch._POLL_S", 0.05)

    with pytest.raises(SynthesisError, match=r"nothing was added for 0\.2 s and 5 images are missing.*fgl synthesize"):
        synthesize(plan_of(PromptBudget(0, "zero", 5)), tmp_path / "store", tmp_path, print, wait_s=0.2)
