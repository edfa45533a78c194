"""Real processes: what a run starts ends with it, however it goes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fgl_app import simulation
from fgl_app.environment import child_environment, temporary_home

# A command that ignores being terminated and starts another in a session of its own, as Flower and Ray do.
COMMAND = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""
# What `fgl run` does with it, in a process that can be killed.
PARENT = f"""
import sys, time
from pathlib import Path
from fgl_app import supervisor
from fgl_app.environment import child_environment
home = Path(sys.argv[1])
supervisor._GRACE_S = 0.5
process = supervisor.start([sys.executable, "-c", {COMMAND!r}], child_environment(FLWR_HOME=str(home)), home / "log")
while "up" not in (home / "log").read_text():
    time.sleep(0.1)
print("up", flush=True)
sys.stdin.read(1)
supervisor.stop(process, home)
"""


def running(home: Path) -> int:
    """Number of the processes that have the folder in their environment."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += process.environ().get("FLWR_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE
    return found


@pytest.fixture
def parent(tmp_path):
    """A process that has started a supervisor; it is killed at the end, if it still is there."""
    (tmp_path / "home").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path / "home"], env=child_environment(), cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"up\n"
        assert running(tmp_path / "home") == 3  # the supervisor, the command and what that started
        yield process
        process.kill()


def test_everything_ends_when_the_process_that_started_it_is_killed(parent, tmp_path):
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    deadline = time.monotonic() + 60
    while (running(tmp_path / "home") or (tmp_path / "home").exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(tmp_path / "home") == 0
    assert not (tmp_path / "home").exists()  # nobody else would delete it


def test_everything_ends_in_good_order_and_where_the_supervisor_was_killed(parent, tmp_path):
    (supervisor,) = psutil.Process(parent.pid).children()
    supervisor.kill()
    parent.communicate(b"\n")

    assert parent.returncode == 0
    assert running(tmp_path / "home") == 0


def test_a_run_of_a_comparison_ends_in_good_order_when_the_comparison_is_killed(tmp_path):
    command = [sys.executable, "-m", "fgl_app.cli", "run", "--with-parent", "--", f"output-dir={tmp_path}"]
    with subprocess.Popen(command, env=child_environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdin.close()  # as the system does for one that was killed
        assert run.wait(120) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_a_superlink_that_has_ended_is_named_at_once_with_the_end_of_its_log():
    with temporary_home() as home, simulation._superlink(home, "") as link:
        for process in psutil.Process(link.process.pid).children():
            process.kill()
        link.process.wait(60)
        with link.log_path.open("a") as log:
            log.write("the disk of the database is full\n")

        for ask in (link.require_running, lambda: simulation._status("1234567", link)):
            with pytest.raises(simulation.RunFailedError, match=r"ended before(.|\n)*database is full"):
                ask()
