"""Faults of the server: wherever it is interrupted, the next start ends with the bytes of an undisturbed run."""

import contextlib
import shutil
import signal
import subprocess

import psutil
import pytest
from commands import ENVIRONMENT, FAST, fgl, results

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

SETTINGS = (*FAST, "server-epochs=10", "num-server-rounds=3", "prompt-level=instance", "images-per-class=64")


def names(folder, run_name):
    return (f"output-dir={folder}", f"run-name={run_name}", "--clients", "2")


def same_end(run, undisturbed):
    return (
        all(
            (run / file).read_bytes() == (undisturbed / file).read_bytes()
            for file in ("checkpoints/round-0003.safetensors", "prompts.jsonl", "confusion.json")
        )
        and results(run)["synthesis"]["content_hash"] == results(undisturbed)["synthesis"]["content_hash"]
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    fgl("run", *SETTINGS, *names(folder, "whole"), cwd=folder)
    return folder / "whole"


def kill_server(folder):
    """Kill the process of the ServerApp, and nothing else of the run."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # A process that is about to end has no command line.
            if _has(process, folder) and "flwr-simulation" in "".join(process.cmdline()[1:2]):
                process.kill()


@pytest.mark.parametrize(
    "moment", ["asking 2 clients for prompts", "image/s", "pretraining: epoch 5/10", "round 2 (federated)"]
)
def test_a_killed_server_goes_on_where_it_was(undisturbed, tmp_path, moment):
    command = ["fgl", "run", *SETTINGS, *names(tmp_path, "killed")]
    environment = ENVIRONMENT | {"FGL_TEST_FOLDER": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        seen = False
        for line in run.stdout:
            if moment in line and not seen:
                seen = True
                kill_server(tmp_path)
        assert seen
        assert run.wait(200) == 1
    assert not (tmp_path / "killed" / "results.json").exists()

    fgl("run", *SETTINGS, *names(tmp_path, "killed"), cwd=tmp_path)

    assert same_end(tmp_path / "killed", undisturbed)


def test_a_corrupt_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "whole")
    last = tmp_path / "whole" / "checkpoints" / "round-0003.safetensors"
    last.write_bytes(last.read_bytes()[:-100])

    output = fgl("run", *SETTINGS, *names(tmp_path, "whole"), "num-server-rounds=4", cwd=tmp_path, expect=1)
    assert f"Delete {last.name}; the run then goes on from the round before" in output

    last.unlink()
    fgl("run", *SETTINGS, *names(tmp_path, "whole"), cwd=tmp_path)
    assert same_end(tmp_path / "whole", undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_ends_the_run_with_a_sentence_and_loses_nothing(small_disk, tmp_path):
    (small_disk / "ballast").write_bytes(bytes(19 * 2**20))

    output = fgl("run", *SETTINGS, *names(small_disk, "full"), cwd=tmp_path, expect=1)

    assert "No space left on device" in output
    assert "start the run again with the same `run-name`" in output
    hidden = {path.name for path in (small_disk / "full").rglob(".*") if path.is_file()}
    assert hidden <= {".lock"}  # nothing half-written

    (small_disk / "ballast").unlink()
    fgl("run", *SETTINGS, *names(small_disk, "full"), cwd=tmp_path)
    assert len(results(small_disk / "full")["rounds"]) == 3


def test_an_interrupt_during_the_start_leaves_nothing(tmp_path):
    environment = ENVIRONMENT | {"FGL_TEST_FOLDER": str(tmp_path)}
    # What a shell starts in the background is deaf to it, and so are all tests there.
    command = ["env", "--default-signal=INT", "fgl", "run", *SETTINGS, *names(tmp_path, "early")]
    with subprocess.Popen(command, env=environment) as run:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(15)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) != 0
    assert not [p for p in psutil.process_iter() if _has(p, tmp_path)]


def _has(process, folder):
    with contextlib.suppress(psutil.Error):
        return process.environ().get("FGL_TEST_FOLDER") == str(folder)
    return False
