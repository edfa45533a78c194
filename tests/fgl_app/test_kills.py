"""Whoever is killed while images are drawn, and whenever: the store is completed to the same bytes.

No image is drawn twice after its commit: committed files stay the files that they were, and a new start draws what is
missing and nothing else. One kill of each in the middle; at night, 20 of each at random moments.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import actors
import psutil
import pytest
from plans import content_hash, ids_of, plan_of, store_of

from fgl_app.config import APP_FOLDER
from fgl_app.prompts import PromptBudget
from fgl_app.store import UnitStore
from fgl_app.synthesis.plan import UNIT_SIZE
from fgl_app.synthesis.worker import work

pytestmark = pytest.mark.e2e

NUM_UNITS = 10
VICTIMS = ["worker", "actor", "server", "server of actors"]
SERVER = """
import sys
from pathlib import Path
from fgl_app.synthesis.launch import synthesize
from fgl_app.synthesis.plan import Plan

folder = Path(sys.argv[1])
plan = Plan.load(folder / "plan.json")
synthesize(plan, folder / "store", folder, lambda line: None, num_workers=int(sys.argv[2]))
"""
"""What the ServerApp does while images are drawn: it starts the worker and waits for it."""


def command_of(victim: str, folder: Path) -> list[str]:
    plan, store = str(folder / "plan.json"), str(folder / "store")
    if victim == "worker":
        return ["-m", "fgl_app.synthesis.worker", plan, store]
    if victim == "actor":
        return [actors.__file__, "Noting", plan, store, "2"]
    return ["-c", SERVER, str(folder), "2" if victim == "server of actors" else "0"]


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FGL_TEST_FOLDER") == str(folder):
                found.append(process)
    return found


def committed(store: UnitStore) -> dict[str, tuple[int, int]]:
    """Inode and time of change, ns, of each file of a committed unit."""
    manifests = list(store.units_folder.glob("*.json"))
    files = [*manifests, *(file.with_suffix(".safetensors") for file in manifests)]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def processes_to_kill(victim: str, process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        if victim != "actor":
            return [psutil.Process(process.pid)]
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ray::Noting" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def kill_at(
    moment: int, delay: float, victim: str, folder: Path, store: UnitStore
) -> dict[str, tuple[int, int]] | None:
    """Kill ``delay`` seconds after so many units are committed.

    Returns:
        What was committed when it was killed; None if what there was to kill had ended.
    """
    environment = os.environ | {"FGL_TEST_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command_of(victim, folder)]
    before = None
    process = subprocess.Popen(command, cwd=APP_FOLDER, env=environment, stdout=subprocess.DEVNULL)
    try:
        given_up = time.monotonic() + 200
        while process.poll() is None and not (
            len(committed(store)) >= 2 * moment and processes_to_kill(victim, process)
        ):
            assert time.monotonic() < given_up
            time.sleep(0.01)
        time.sleep(delay)
        with contextlib.suppress(psutil.Error):
            for found in processes_to_kill(victim, process)[:1]:
                there = committed(store)
                found.kill()
                before = there
        process.wait(timeout=200)
        # What it had started ends by itself; Ray's own agents may look for the rest of Ray for a minute.
        _, alive = psutil.wait_procs(processes_of(folder), timeout=200)
    finally:
        for left in processes_of(folder):
            left.kill()
    assert not alive, alive
    if victim == "actor":  # another one has gone on in its place
        assert process.returncode == 0
    elif process.returncode != -signal.SIGKILL:
        assert process.returncode == 0
        return None
    return before


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    budget = (PromptBudget(label, f"handwritten {label}", UNIT_SIZE) for label in range(NUM_UNITS))
    plan = plan_of(*budget, num_inference_steps=4)
    folder = tmp_path_factory.mktemp("undisturbed")
    work(plan, folder)
    return plan, content_hash(plan, folder)


def kill_and_complete(victim: str, moment: int, delay: float, undisturbed, folder: Path) -> None:
    plan, expected = undisturbed
    for attempt in range(4):  # on a busy machine the kill may come too late
        trial = folder / str(attempt)
        trial.mkdir()
        plan.save(trial / "plan.json")
        store = store_of(plan, trial / "store")
        before = kill_at(moment // 2**attempt, delay / 2**attempt, victim, trial, store)
        if before is not None:
            break
    else:
        raise AssertionError("every victim ended before it could be killed")
    assert len(before) >= 2 * (moment // 2**attempt)
    wanted, after = ids_of(plan), committed(store)
    missing = int((~store.index().holds(wanted)).sum())

    if victim == "actor":
        assert missing == 0
        drawn = [line.split() for line in (trial / "store.drawn").read_text().splitlines()]
        assert NUM_UNITS <= len(drawn) <= NUM_UNITS + 1
        assert all(int(begun) < after[f"{unit}.json"][1] for unit, begun in drawn)
    assert work(plan, store.folder) == missing

    assert content_hash(plan, store.folder) == expected
    assert before.items() <= after.items() <= committed(store).items()
    held = [json.loads(file.read_text())["num_images"] for file in store.units_folder.glob("*.json")]
    assert sum(held) == NUM_UNITS * UNIT_SIZE


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_in_the_middle_changes_nothing_and_costs_no_committed_image(victim, undisturbed, tmp_path):
    kill_and_complete(victim, NUM_UNITS // 3, 0.0, undisturbed, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("trial", range(20))
def test_so_does_one_at_any_moment(trial, victim, undisturbed, tmp_path):
    chance = random.Random(f"{trial} {victim}")
    if trial % 4 == 0:  # in the seconds in which it starts, before the first commit
        moment, delay = 0, chance.uniform(0, 8)
    else:
        moment, delay = chance.randrange(1, NUM_UNITS), chance.uniform(0, 1)
    kill_and_complete(victim, moment, delay, undisturbed, tmp_path)
