"""One process at a time works in the folder of a run, or of a comparison; whoever comes second is told who is first."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from fgl_app.errors import RunFolderError
from fgl_app.files import try_lock

_POLL_S = 0.5


@contextlib.contextmanager
def held(folder: Path, instead: str) -> Iterator[None]:
    """Keep other processes out of a folder during the block; see :func:`keep_locked`."""
    file = keep_locked(folder, instead)
    try:
        yield
    finally:
        os.close(file)


def keep_locked(folder: Path, instead: str, timeout_s: float = 0.0) -> int:
    """Keep other processes out of a folder while this one lives, or until the file that is returned is closed.

    Args:
        folder: The folder.
        instead: What whoever comes second can do instead of waiting or of ending the other.
        timeout_s: Seconds to wait for one that is about to end.

    Raises:
        RunFolderError: If another process works in it.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + timeout_s
    while not try_lock(file, folder):
        if time.monotonic() > end:
            holder = _holder(file)
            os.close(file)
            raise RunFolderError(
                f"One process at a time may work in {str(folder)!r}, but another does{holder}. Wait until it has "
                f"ended, end it, or {instead}."
            )
        time.sleep(_POLL_S)
    told = {
        "host": platform.node(),
        "process": os.getpid(),
        "command": Path(sys.argv[0]).name,  # arguments may be secrets
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "started_by": os.environ.get("FGL_STARTED_BY", ""),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(told).encode(), 0)
    return file


def _holder(lock: int) -> str:
    """Return in words which process has a lock, from what it wrote into the file; empty if that is not known."""
    try:
        told = json.loads(os.pread(lock, 4096, 0))
        if told["host"] == platform.node() and not psutil.pid_exists(told["process"]):
            return ""  # an earlier one, which has ended
        started_by = f", started by {told['started_by']}" if told["started_by"] else ""
        return f": process {told['process']} ({told['command']}) on {told['host']} since {told['since']}{started_by}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
