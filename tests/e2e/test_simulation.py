"""Real `flwr run`s of the shipped models: real processes, real messages, real files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
from commands import ENVIRONMENT, FAST, fgl, results
from PIL import Image

from fgl_app.config import APP_FOLDER
from fgl_app.simulation import parse_overrides

pytestmark = pytest.mark.e2e

WHOLE = (*FAST, "seed=3", "model=resnet18", "images-per-class=64", "num-inference-steps=10", "server-finetune-epochs=1")


def left_behind(folder: Path) -> list[str]:
    """Command lines of the running processes that have `folder` in their environment, as all of a run's have."""
    running = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FGL_TEST_FOLDER") == str(folder):
                running.append(" ".join(process.cmdline()))
    return running


def hostile_environment(folder: Path) -> dict[str, str]:
    """What shells of clusters, desktops and hospitals hold, each of which ended or hung a run once."""
    deep = folder / ("a-temporary-folder-of-a-long-name" * 3)
    deep.mkdir()
    for name in ("strategies", "clients"):
        (folder / "theirs" / name).mkdir(parents=True)
        (folder / "theirs" / name / "__init__.py").write_text("")
    return {
        "http_proxy": "http://proxy.invalid:3128",
        "ALL_PROXY": "socks://proxy.invalid:1080",
        "no_proxy": "intranet.example,fe80::/10",
        "RAY_ADDRESS": "127.0.0.1:9",
        "FLWR_DATABASE": str(folder / "state.db"),
        "PYTHONPATH": os.pathsep.join([str(folder / "theirs"), str(APP_FOLDER)]),
        "TMPDIR": str(deep),
        "FORCE_COLOR": "1",
        "COLUMNS": "20",
        "PYTHONIOENCODING": "ascii",
    }


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """One run of the whole method in a hostile environment, and the processes that it left behind."""
    folder = tmp_path_factory.mktemp("out")
    surroundings = tmp_path_factory.mktemp("surroundings")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (hostile_environment(surroundings) | {"FGL_TEST_FOLDER": str(folder)}).items():
            patch.setitem(ENVIRONMENT, name, value)
        output = fgl("run", *WHOLE, f"output-dir={folder}", "run-name=a", "--clients", "3", cwd=folder)
    return folder, output, left_behind(folder)


def test_the_method_runs_from_prompts_to_results(first_run):
    folder, output, still_running = first_run
    run = folder / "a"
    found = results(run)

    assert still_running == []
    assert str(run) in output
    assert "image/s" in output
    assert [(row["round"], row["phase"]) for row in found["rounds"]] == [(1, "one-shot"), (2, "federated")]
    assert found["rounds"][0]["accuracy"] > 0.3  # chance is 0.1; the server saw no client's image
    assert found["final_accuracy"] == found["rounds"][-1]["accuracy"]
    assert found["paper_metric"] == max(row["accuracy"] for row in found["rounds"])
    assert found["synthesis"]["generated"] == found["synthesis"]["images"] == 640
    prompt_bytes = found["upload_bytes"]["prompts_per_client"]
    assert 0 < prompt_bytes["payload"] <= 229
    assert prompt_bytes["message"] > prompt_bytes["payload"]
    # ResNet-18 with a small stem and ten classes: 11.2 M parameters of four bytes.
    assert 44e6 < found["upload_bytes"]["model_per_client_per_round"] < 46e6
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "round-0001.safetensors",
        "round-0002.safetensors",
    ]
    assert (run / "prompts.jsonl").stat().st_mode & 0o777 == 0o600
    prompts = [json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in prompts} == {("label", "prompt", "count", "domain", "clients")}
    assert sum(row["count"] for row in prompts) == 838
    assert json.loads((run / "config.json").read_text())["run_config"]["seed"] == 3


def images_of(run):
    """Files of the store, each with the time at which it was written."""
    files = {path.name: path.stat().st_mtime_ns for path in (run / "synthetic").rglob("*.safetensors")}
    assert files
    return files


def test_a_second_start_says_that_the_run_is_finished_and_more_rounds_reuse_everything(first_run):
    folder, _, _ = first_run
    before = (folder / "a" / "results.json").read_bytes()
    command = ("run", *WHOLE, f"output-dir={folder}", "run-name=a", "--clients", "3")

    output = fgl(*command, cwd=folder)
    assert f"run a is finished: accuracy {results(folder / 'a')['final_accuracy']:.4f} after 2 rounds" in output
    assert len(output.splitlines()) == 1
    assert (folder / "a" / "results.json").read_bytes() == before
    drawn = images_of(folder / "a")

    fgl(*command, "num-server-rounds=3", cwd=folder)

    earlier, after = json.loads(before), results(folder / "a")
    assert images_of(folder / "a") == drawn
    assert after["synthesis"] == earlier["synthesis"]  # of the start that drew them
    assert after["rounds"][:2] == earlier["rounds"]
    assert len(after["rounds"]) == 3


def test_a_terminated_run_with_actors_of_its_own_stops_everything_and_is_resumed(tmp_path):
    environment = ENVIRONMENT | {"FGL_TEST_FOLDER": str(tmp_path)}
    # Two actors draw beside the simulation, whose clients hold every CPU of a Ray of their own.
    names = (f"output-dir={tmp_path}", "run-name=stopped", "synthesis-workers=2", "--clients", "2")
    with subprocess.Popen(["fgl", "run", *FAST, *names], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "round 1 (one-shot)" in line:
                running = left_behind(tmp_path)
                process.send_signal(signal.SIGTERM)
                break
        assert process.wait(60) == 128 + signal.SIGTERM
    assert len(running) > 1  # the check below can fail
    assert left_behind(tmp_path) == []
    drawn = images_of(tmp_path / "stopped")

    fgl("run", *FAST, *names, "num-server-rounds=3", cwd=tmp_path)  # it may have done two before it was stopped

    found = results(tmp_path / "stopped")
    assert found["synthesis"]["images"] == 320
    assert images_of(tmp_path / "stopped") == drawn
    assert [row["round"] for row in found["rounds"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("dirichlet-beta=0", "`dirichlet-beta` must be > 0"),
        ("generator=unknown", "`generator` must be"),
        ("sed=1", "Did you mean `seed`"),
        ("seed=1.5", "`seed` must be a whole number"),
    ],
)
def test_a_wrong_configuration_ends_at_once_with_one_sentence(tmp_path, override, named):
    output = fgl("run", override, f"output-dir={tmp_path}", cwd=tmp_path, expect=1)

    assert named in output
    assert len(output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_is_small_and_an_app_unpacked_from_it_runs(tmp_path):
    binaries = Path(sys.executable).parent
    subprocess.run([binaries / "flwr", "build", "--app", APP_FOLDER], cwd=tmp_path, check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "app")

    assert bundle.stat().st_size < 10 * 2**20
    assert {"fgl_app/tiny/diffusion.json", "fgl_app/tiny/captioner.json"} <= set(names)
    assert not [name for name in names if "test" in name]

    # The unpacked app alone: its own code is found first, and its models are unpacked anew.
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "app"),
        "FGL_CACHE": str(tmp_path / "cache"),
    }
    command = ["-m", "fgl_app.cli", "run", *FAST, "prompt-level=instance", f"output-dir={tmp_path}", "run-name=bundle"]
    done = subprocess.run(
        [sys.executable, *command, "--clients", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )

    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert results(tmp_path / "bundle")["rounds"][0]["accuracy"] > 0.3
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == [
        "captioner",
        "captions",
        "diffusion",
    ]


def test_overrides_become_typed_values():
    assert parse_overrides(["seed=3", "dirichlet-beta=0.5", "run-name=7"]) == {
        "seed": 3,
        "dirichlet-beta": 0.5,
        "run-name": "7",
    }


def test_the_contact_sheet_of_a_run_is_drawn(first_run, tmp_path):
    folder, _, _ = first_run
    script = APP_FOLDER / "examples" / "digits" / "contact_sheet.py"

    subprocess.run([sys.executable, script, folder / "a", tmp_path / "sheet.png"], check=True, capture_output=True)

    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 600
        assert len(set(picture.convert("L").tobytes())) > 100
