"""Start the synthesis worker and wait for it, passing its progress on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TextIO

import numpy as np

from fgl_app.data.images import ImageSet
from fgl_app.environment import child_environment
from fgl_app.errors import SynthesisError
from fgl_app.files import set_mode
from fgl_app.store import ContentHash, DamagedUnitsError, Ids, UnitStore, as_ids
from fgl_app.synthesis.plan import Plan

_PROGRESS_INTERVAL_S = 5.0
_POLL_S = 2.0
_POLLS_APART = 20
"""Times that reading the index takes, between two reads: some seconds where the store holds millions of images."""
_READ_ATTEMPTS = 3
"""Times that damaged units are drawn again before the disk is blamed."""


@dataclass(frozen=True)
class SynthesisReport:
    """What one synthesis phase did."""

    images: int
    """Size of the synthetic set: what the plan asks for, less what was left out."""
    content_hash: str
    """Of the synthetic set, see :class:`fgl_app.store.ContentHash`."""
    generated: int
    """Images drawn by this start of the run, those that were left out in the end among them."""
    reused: int
    """Images of the plan that the store held already, those that it has settled to leave out among them."""
    left_out: Mapping[str, int]
    """Number of images of the plan that are not in the set, by reason."""
    rejection_rates: Mapping[str, float]
    """Share of the drawn images that the filter rejected, 0 to 1, by ``label`` or ``label:domain``."""
    seconds: float
    """Wall-clock seconds, start of the worker included."""
    reused_seconds: float
    """What drawing the reused images took when they were drawn, by this run or by another that shares its store."""
    batch_sizes: tuple[int, ...] = ()
    """Images drawn at a time, each number once: smaller ones than the plan's where memory ran out."""
    drawn: Ids = field(default_factory=lambda: as_ids([]), repr=False, compare=False)
    """Identities of the images that this start drew."""

    @property
    def images_per_second(self) -> float:
        """Rate of the images drawn now; 0 if there were none."""
        return self.generated / self.seconds if self.generated else 0.0


def synthesize(
    plan: Plan,
    folder: Path,
    run_folder: Path,
    report_progress: Callable[[str], None],
    *,
    size: int = 0,
    num_workers: int = 0,
    ray_address: str = "",
    wait_s: float = 0.0,
    drawn_before: Ids | None = None,
) -> tuple[ImageSet, SynthesisReport]:
    """Have the store filled with what it lacks, and read the whole set.

    Args:
        plan: What to draw.
        folder: The store.
        run_folder: Where the plan and the worker's log are written.
        report_progress: Called with a line of progress every few seconds; it names no prompt.
        size: Side to which the images are resized when they are read, px; 0 for that of the store.
        num_workers: Actors of Ray that draw; 0 is one worker process without Ray.
        ray_address: Of a cluster; empty for actors on this machine.
        wait_s: If positive, start no worker, but wait until ``fgl synthesize``, started elsewhere, has filled the
            store; give up when nothing was added for so many seconds.
        drawn_before: Identities of images that this start of the run drew for an earlier plan: they are counted as
            drawn now, and not as reused. None for none.

    Raises:
        SynthesisError: If the worker fails; the units it committed stay and are reused.
    """
    store = UnitStore(folder, plan.settings.digest())
    plan.save(run_folder / "plan.json")
    wanted = as_ids(sample.sample_id for sample in plan.samples())
    _adopt_from_neighbours(store, run_folder, wanted)
    index = store.index()
    held = index.holds(wanted)
    started = time.monotonic()
    for attempt in range(_READ_ATTEMPTS):
        if not held.all():
            if wait_s > 0:
                _wait(store, wanted, wait_s, report_progress)
            else:
                _run_worker(run_folder / "plan.json", folder, num_workers, ray_address, report_progress)
            index = store.index()
        try:
            content = ContentHash()
            images = store.read(wanted, index, size=size, backing=folder / f".images-{os.getpid()}", content=content)
            break
        except DamagedUnitsError as damaged:
            if attempt + 1 == _READ_ATTEMPTS:
                raise
            report_progress(f"synthesis: drawing again, because damaged: {', '.join(damaged.units)}")
            store.discard(damaged.units)
            held &= ~index.within(wanted, damaged.units)
    if len(images) == 0:
        raise SynthesisError(
            f"At least one image must be kept, but all {len(wanted):,} were left out: "
            f"{dict(index.left_out(wanted))}. Look at `filter`, `safety-checker` and `generator`."
        )
    drawn = wanted[~held] if drawn_before is None else np.union1d(drawn_before, wanted[~held])
    reused = wanted[held & ~np.isin(wanted, drawn)]
    return images, SynthesisReport(
        len(images),
        content.hexdigest(),
        len(drawn),
        len(reused),
        index.left_out(wanted),
        index.rejection_rates(wanted, plan.labels()),
        time.monotonic() - started,
        index.seconds(reused),
        index.batch_sizes(wanted),
        drawn,
    )


def _adopt_from_neighbours(store: UnitStore, run_folder: Path, wanted: Ids) -> None:
    """Link what other runs of the same output folder have drawn with the same settings."""
    for neighbour in sorted(run_folder.parent.glob("*/synthetic")):
        other = UnitStore(neighbour, store.units_folder.name)
        if other.units_folder != store.units_folder and other.units_folder.is_dir():
            store.adopt(other, wanted)


def _wait(store: UnitStore, wanted: Ids, wait_s: float, report_progress: Callable[[str], None]) -> None:
    held, changed = -1, time.monotonic()
    while held < len(wanted):
        began = time.monotonic()
        now = int(store.index().holds(wanted).sum())
        pause_s = max(_POLL_S, _POLLS_APART * (time.monotonic() - began))
        if now != held:
            held, changed = now, time.monotonic()
            report_progress(f"synthesis: waiting for a worker elsewhere, {held:,} of {len(wanted):,} images are there")
        elif time.monotonic() - changed > wait_s:
            raise SynthesisError(
                f"A worker elsewhere must fill the store {str(store.folder)!r}, but nothing was added for {wait_s:g} s "
                f"and {len(wanted) - held:,} images are missing. Start `fgl synthesize` with the run's plan.json, then "
                "start the run again with the same `run-name`."
            )
        time.sleep(min(pause_s, wait_s))


def _run_worker(
    plan: Path, folder: Path, num_workers: int, ray_address: str, report_progress: Callable[[str], None]
) -> None:
    command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(plan), str(folder)]
    command += ["--workers", str(num_workers), "--ray-address", ray_address, "--with-parent"]
    # An app that runs from an unpacked bundle is on sys.path of this process only.
    environment = child_environment(ray_address)
    log_path = plan.with_name("worker.log")  # warnings of libraries may quote prompts: for the owner's eyes only
    log_path.unlink(missing_ok=True)
    log_path.touch(mode=0o600)
    set_mode(log_path, 0o600)
    with (
        log_path.open("w") as log_file,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
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
    """Read lines, and the carriage returns of a progress bar, until the worker ends; return its own error sentence.

    Only lines of our own are passed on, progress and warnings: those of libraries may quote prompts.
    """
    buffer, error, reported = b"", "", 0.0
    while chunk := os.read(stream.fileno(), 4096):
        *lines, buffer = re.split(rb"[\r\n]+", buffer + chunk)
        for line in (raw.decode(errors="replace").strip() for raw in lines):
            if line.startswith("synthesis:"):
                is_bar = "%|" in line
                if not is_bar or time.monotonic() - reported >= _PROGRESS_INTERVAL_S or "100%" in line:
                    report_progress(line)
                    reported = time.monotonic() if is_bar else reported
            elif line:
                log_file.write(line + "\n")
                error = line.removeprefix("error: ") if line.startswith("error: ") else error
    return error
