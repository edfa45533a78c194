"""Start the synthesis worker and wait for it, passing its progress on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from fgl_app.config import APP_FOLDER
from fgl_app.data.images import ImageSet
from fgl_app.errors import SynthesisError
from fgl_app.store import UnitStore
from fgl_app.synthesis.plan import Plan

_PROGRESS_INTERVAL_S = 5.0


@dataclass(frozen=True)
class SynthesisReport:
    """What one synthesis phase did."""

    images: int
    """Size of the synthetic set."""
    generated: int
    """Images drawn now."""
    reused: int
    """Images that the store held already."""
    seconds: float
    """Wall-clock seconds, start of the worker included."""
    reused_seconds: float
    """What drawing the reused images took when they were drawn, by this run or by another that shares its store."""

    @property
    def images_per_second(self) -> float:
        """Rate of the images drawn now; 0 if there were none."""
        return self.generated / self.seconds if self.generated else 0.0


def synthesize(
    plan: Plan, folder: Path, run_folder: Path, report_progress: Callable[[str], None]
) -> tuple[ImageSet, SynthesisReport]:
    """Have a worker process draw what the store lacks, and read the whole set.

    Args:
        plan: What to draw.
        folder: The store.
        run_folder: Where the plan and the worker's log are written.
        report_progress: Called with a line of progress every few seconds; it names no prompt.

    Raises:
        SynthesisError: If the worker fails; the units it committed stay and are reused.
    """
    store = UnitStore(folder)
    plan.save(run_folder / "plan.json")
    units = plan.units()
    total = sum(len(unit.samples) for unit in units)
    held = [unit for unit in units if store.has(unit.unit_id)]
    missing = total - sum(len(unit.samples) for unit in held)
    reused_seconds = store.seconds([unit.unit_id for unit in held])
    started = time.monotonic()
    if missing:
        _run_worker(run_folder / "plan.json", folder, report_progress)
    images = store.read([unit.unit_id for unit in units])
    return images, SynthesisReport(total, missing, total - missing, time.monotonic() - started, reused_seconds)


def _run_worker(plan: Path, folder: Path, report_progress: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(plan), str(folder)]
    # An app that runs from an unpacked bundle is on sys.path of this process only.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(APP_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    log_path = plan.with_name("worker.log")  # warnings of libraries may quote prompts: for the owner's eyes only
    log_path.unlink(missing_ok=True)
    log_path.touch(mode=0o600)
    with (
        log_path.open("w") as log_file,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        ) as process,
    ):
        assert process.stderr is not None
        try:
            error = _pass_on(process.stderr, log_file, report_progress)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise SynthesisError(
            f"The synthesis worker must end with code 0, but ended with {process.returncode}. {error} Its log is "
            f"{str(log_path)!r}. Finished images are kept; start the run again with the same `run-name`."
        )


def _pass_on(stream: IO[bytes], log_file: TextIO, report_progress: Callable[[str], None]) -> str:
    """Read lines, and the carriage returns of a progress bar, until the worker ends; return its own error sentence."""
    buffer, error, reported = b"", "", 0.0
    while chunk := os.read(stream.fileno(), 4096):
        *lines, buffer = re.split(rb"[\r\n]+", buffer + chunk)
        for line in (raw.decode(errors="replace").strip() for raw in lines):
            if line.startswith("synthesis:"):
                if time.monotonic() - reported >= _PROGRESS_INTERVAL_S or "100%" in line:
                    report_progress(line)
                    reported = time.monotonic()
            elif line:
                log_file.write(line + "\n")
                error = line.removeprefix("error: ") if line.startswith("error: ") else error
    return error
