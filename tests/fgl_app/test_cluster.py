import contextlib
import dataclasses
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import actors
import psutil
import pytest
from plans import content_hash, plan_of, store_of

from fgl_app.config import APP_FOLDER
from fgl_app.errors import SynthesisError
from fgl_app.prompts import PromptBudget
from fgl_app.synthesis.cluster import plan_of_actor
from fgl_app.synthesis.plan import UNIT_SIZE, Plan
from fgl_app.synthesis.worker import work


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


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster that somebody started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false"]
    ray += [f"--port={port}", f"--temp-dir={tempfile.mkdtemp(prefix='ray-')}"]
    with subprocess.Popen(ray, cwd=APP_FOLDER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        wait_for(f"127.0.0.1:{port}")
        yield f"127.0.0.1:{port}"
        assert head.poll() is None  # it is not ours to end
        head.terminate()


def draw_on(cluster: str, plan: Plan, folder: Path, store: Path) -> subprocess.CompletedProcess[str]:
    plan.save(folder / "plan.json")
    command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(folder / "plan.json"), str(store)]
    command += ["--workers", "2", "--ray-address", cluster]
    return subprocess.run(command, cwd=APP_FOLDER, check=False, stderr=subprocess.PIPE, text=True, timeout=200)


@pytest.mark.e2e
def test_a_running_cluster_draws_what_one_process_draws(cluster, tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 40), PromptBudget(1, "one", 40))
    work(plan, tmp_path / "alone")

    assert draw_on(cluster, plan, tmp_path, tmp_path / "cluster").returncode == 0
    assert content_hash(plan, tmp_path / "alone") == content_hash(plan, tmp_path / "cluster")


@pytest.mark.e2e
def test_what_a_cluster_cannot_do_is_one_sentence(cluster, tmp_path):
    plan = plan_of(PromptBudget(0, "zero", 3))
    (tmp_path / "file").touch()

    on_gpus = draw_on(cluster, dataclasses.replace(plan, device="cuda"), tmp_path, tmp_path / "store")
    in_a_file = draw_on(cluster, plan, tmp_path, tmp_path / "file")
    absent = plan_of(PromptBudget(0, "zero", 3), generator="/absent")
    of_nothing = draw_on(cluster, absent, tmp_path, tmp_path / "store")

    assert (on_gpus.returncode, in_a_file.returncode, of_nothing.returncode) == (1, 1, 1)
    assert "error: `synthesis-workers` must be at most the number of GPUs that Ray has, 0, but is 2" in on_gpus.stderr
    assert "must be writable and have room" in in_a_file.stderr
    assert "error: `generator` must be" in of_nothing.stderr


def wait_for(address: str) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError("the cluster did not start")


def draw_with(actor: str, plan: Plan, folder: Path) -> subprocess.CompletedProcess[str]:
    plan.save(folder / "plan.json")
    command = [sys.executable, actors.__file__, actor, str(folder / "plan.json"), str(folder / "store"), "1"]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.e2e
def test_a_unit_that_kills_its_actors_is_named_when_all_others_are_drawn(tmp_path):
    plan = plan_of(*(PromptBudget(label, f"handwritten {label}", UNIT_SIZE) for label in range(4)))
    store = store_of(plan, tmp_path / "store")

    ended = draw_with("Mortal", plan, tmp_path)

    told = (tmp_path / "store.counts").read_text().splitlines()
    assert len(told) == 3
    assert set(told) <= {"(64, 64)", "(64, 0)"}  # 0 where an actor died before it had told of the unit before
    assert [store.has(unit.unit_id) for unit in plan.units()] == [True, False, True, True]
    deadly = list(plan.units())[1].unit_id
    assert f"but 3 died of 1 of them: {deadly}. All others are drawn. Memory ran out, or they " in ended.stderr
    assert "handwritten" not in ended.stderr
    assert work(plan, store.folder) == UNIT_SIZE


@pytest.mark.e2e
def test_what_an_actor_committed_is_not_drawn_again_where_it_died_before_it_could_say_so(tmp_path):
    plan = plan_of(*(PromptBudget(label, f"handwritten {label}", UNIT_SIZE) for label in range(2)))

    ended = draw_with("Speechless", plan, tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "store.counts").read_text() == "(64, 0)\n" * 2
    drawn = [line.split()[0] for line in (tmp_path / "store.drawn").read_text().splitlines()]
    assert sorted(drawn) == sorted(unit.unit_id for unit in plan.units())


@pytest.mark.e2e
def test_an_actor_that_cannot_start_is_one_sentence(tmp_path):
    ended = draw_with("Homeless", plan_of(PromptBudget(0, "zero", 3)), tmp_path)

    sentence = "A synthesis actor must be able to start, but: ModuleNotFoundError: No module named 'fgl_app'"
    assert sentence in ended.stderr


@pytest.mark.e2e
def test_actors_that_die_while_they_start_are_not_started_for_ever(tmp_path):
    ended = draw_with("Stillborn", plan_of(PromptBudget(0, "zero", 10 * UNIT_SIZE)), tmp_path)

    assert "but 6 died of 6 of them: " in ended.stderr
    assert "and others. So many died in a row that the rest was given up. " in ended.stderr
    assert len(list(tmp_path.glob("store-*"))) in (6, 7)  # Ray may begin one more


def test_an_actor_draws_the_same_identities_on_the_one_gpu_that_it_sees():
    second = dataclasses.replace(plan_of(PromptBudget(0, "zero", 3)), device="cuda:1")

    seen = plan_of_actor(second)

    assert seen.device == "cuda"
    assert list(seen.samples()) == list(second.samples())


def test_an_unreachable_cluster_is_one_sentence(tmp_path):
    with pytest.raises(SynthesisError, match="`ray-address` must be that of a running cluster"):
        work(plan_of(PromptBudget(0, "zero", 1)), tmp_path, num_workers=1, ray_address="127.0.0.1:1")
