"""Run a command and end all that came of it, also when the process that asked for it is killed.

``python -m fgl_app.supervisor FOLDER COMMAND...`` with ``FLWR_HOME=FOLDER`` in its environment. It holds the other end
of a pipe to whoever started it, which the system closes however that one goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_GRACE_S = 5.0
"""Seconds in which the command may end by itself."""


def start(command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a supervisor and the command below it, in the folder that ``FLWR_HOME`` of the environment names.

    Returns:
        The supervisor. It ends with the command, and ends the command when its standard input is closed.
    """
    home = environment["FLWR_HOME"]
    with log_path.open("wb") as log_file:
        return subprocess.Popen(
            [sys.executable, "-m", "fgl_app.supervisor", home, *command], env=dict(environment), cwd=home,
            stdin=subprocess.PIPE, stdout=log_file, stderr=log_file, start_new_session=True,
        )  # fmt: skip


def stop(supervisor: subprocess.Popen[bytes], home: Path) -> None:
    """End what :func:`start` started and everything below it, such as Ray's processes and the synthesis worker."""
    assert supervisor.stdin is not None
    supervisor.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        supervisor.wait(6 * _GRACE_S)
    supervisor.kill()
    supervisor.wait()
    end_processes(home)  # where the supervisor was killed


def end_processes(home: Path) -> None:
    """Kill all processes of a run but this one.

    They are known by the ``FLWR_HOME`` in their environment, which is this run's alone: Flower and Ray start sessions
    of their own, and orphans have other parents.
    """
    for _ in range(20):  # until no killed process had just started another
        members = [member for member in psutil.process_iter() if _belongs_to(member, home)]
        if not members:
            break
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(members, timeout=2)


def _belongs_to(process: psutil.Process, home: Path) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        return bool(process.environ().get("FLWR_HOME") == str(home)) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main() -> int:
    """Run the command; return its code when nothing of it runs any more."""
    home = Path(sys.argv[1])
    process = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    closed = threading.Event()

    def end() -> None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        process.kill()

    def end_when_closed() -> None:
        os.read(0, 1)
        closed.set()
        end()

    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end).start())
    threading.Thread(target=end_when_closed, daemon=True).start()
    code = process.wait()
    end_processes(home)
    if closed.is_set():  # the one that made the folder may be gone
        shutil.rmtree(home, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
