import os
import re
import shutil
import threading
import time

import pytest
import torch
from plans import commit, content_hash, engine_of, ids_of, plan_of, store_of

from fgl_app.errors import SynthesisError
from fgl_app.prompts import PromptBudget
from fgl_app.synthesis.launch import _pass_on, synthesize
from fgl_app.synthesis.plan import UNIT_SIZE, Plan, Unit
from fgl_app.synthesis.worker import UnitWorker, shuffled, work


def test_workers_visit_every_unit_once_each_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr("fgl_app.synthesis.worker._SHUFFLED_UNITS", 8)
    units = list(plan_of(PromptBudget(0, "a", 40 * UNIT_SIZE)).units())

    one, other = (list(shuffled(iter(units))) for _ in range(2))

    assert {unit.unit_id for unit in one} == {unit.unit_id for unit in other} == {unit.unit_id for unit in units}
    assert len(one) == len(units)
    assert one != other
    assert max(units.index(unit) - place for place, unit in enumerate(one)) < 8


def test_the_worker_draws_what_is_missing_and_nothing_else(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", UNIT_SIZE), PromptBudget(1, "one", 5))
    store = store_of(plan, tmp_path)

    assert work(plan, tmp_path) == UNIT_SIZE + 5
    assert work(plan, tmp_path) == 0
    store.discard([list(plan.units())[1].unit_id])
    assert work(plan, tmp_path) == 5


def test_a_unit_that_another_worker_committed_meanwhile_is_not_drawn(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 3))
    (unit,) = plan.units()
    first, second = (UnitWorker(plan, tmp_path, num_threads=1) for _ in range(2))

    assert first.run(unit) == (3, 3)
    assert second.run(unit) == (3, 0)


def test_a_larger_plan_draws_only_the_images_that_a_smaller_one_did_not(tmp_path):
    small = plan_of(PromptBudget(0, "zero", 5), PromptBudget(1, "one", 5))
    large = plan_of(PromptBudget(0, "zero", 9), PromptBudget(1, "one", 6))
    work(small, tmp_path / "shared")

    assert work(large, tmp_path / "shared") == 5
    work(large, tmp_path / "fresh")
    hashes = [content_hash(large, tmp_path / name) for name in ("shared", "fresh")]
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
    before = content_hash(plan, store.folder)
    (file,) = store.units_folder.glob("*.json" if kind == "manifest" else "*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])

    images, report = synthesize(plan, tmp_path / "store", tmp_path, print)

    assert (len(images), report.generated) == (2, 2)
    assert content_hash(plan, store.folder) == before


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
    assert any("5/5" in line and re.search("image/s|s/image", line) for line in lines)
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


def test_the_share_of_rejections_is_that_of_all_units_that_hold_images_of_the_class(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 4), PromptBudget(1, "one", 4, "ink"))
    zeros, ones = tuple(plan.samples())[:4], tuple(plan.samples())[4:]
    commit(plan, tmp_path / "store", zeros[:1] + ones[:1], judged={"0": [10, 8], "1:ink": [3, 2]})
    commit(plan, tmp_path / "store", zeros[1:] + ones[1:], judged={"0": [30, 2], "1:ink": [3, 1]})

    _, report = synthesize(plan, tmp_path / "store", tmp_path, print)

    assert report.rejection_rates == {"0": 10 / 40, "1:ink": 3 / 6}


def test_rejections_among_classes_of_another_run_that_shares_the_store_are_not_counted(tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 2), PromptBudget(1, "one", 2))
    other = plan_of(PromptBudget(0, "zero", 2), PromptBudget(1, "a cat", 2), PromptBudget(2, "a dog", 2))
    commit(other, tmp_path / "store", judged={"0": [4, 1], "1": [9, 8], "2": [7, 7]})
    commit(plan, tmp_path / "store", tuple(plan.samples())[2:], judged={"1": [5, 0]})

    _, report = synthesize(plan, tmp_path / "store", tmp_path, print)

    assert report.rejection_rates == {"0": 1 / 4, "1": 0.0}


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
