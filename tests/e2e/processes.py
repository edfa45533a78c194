"""Processes that a test starts, with a log file each, and that it stops in reverse order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import psutil


class Processes:
    """Running processes by name."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []

    def start(self, name: str, command: list[object], **environment: str) -> subprocess.Popen[bytes]:
        self._logs.append(self.log_of(name).open("ab"))
        self.running[name] = subprocess.Popen(
            [str(word) for word in command], env=self._environment | environment, cwd=self._folder,
            stdin=subprocess.DEVNULL, stdout=self._logs[-1], stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self.running[name]

    def log_of(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def output(self) -> str:
        return "\n".join(f"== {name}\n{self.log_of(name).read_text('utf-8', 'replace')}" for name in self.running)

    def below(self, name: str, word: str) -> list[psutil.Process]:
        """Return the descendants of a process whose command line holds ``word``."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.running[name].pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if word in " ".join(child.cmdline()):
                        found.append(child)
        return found

    def wait_until(self, condition: Callable[[], object], seconds: float, what: str, every_s: float = 0.2) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} within {seconds:g} s\n{self.output()[-8000:]}"
            time.sleep(every_s)

    def kill(self, name: str) -> None:
        """Kill a process and all below it, as a power cut would."""
        for process in [*self.below(name, ""), psutil.Process(self.running[name].pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.running[name].wait()

    def stop(self) -> None:
        for name in reversed(self.running):
            for child in self.below(name, ""):  # also those that a test has stopped
                with contextlib.suppress(psutil.Error):
                    child.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running[name].pid, signal.SIGTERM)
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()
