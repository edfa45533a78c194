"""The synthesis worker, a process of its own: ``python -m fgl_app.synthesis.worker PLAN STORE``.

It draws what the store lacks of the plan and ends. Started again after a crash, it draws what is missing. With
``--workers N`` it hands the units to N actors of Ray, on this machine or on a cluster that shares the store's folder.
"""

from __future__ import annotations

import argparse
import functools
import os
import queue
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from fgl_app.errors import FGLError
from fgl_app.store import SampleIndex, UnitStore, as_ids
from fgl_app.synthesis.plan import Plan, Unit
from fgl_app.training import check_device

_SHUFFLED_UNITS = 512
"""Units out of which the next one is drawn by lot."""


class UnitWorker:
    """Draws units of one plan and commits them, several at a time.

    On a CPU every core draws a unit of its own with one thread: the layers of small models do not fill more, and no
    image depends on the number of cores. On a GPU one thread draws while the other commits.
    """

    def __init__(self, plan: Plan, folder: Path, num_threads: int = 0) -> None:
        """Load the generator that the plan names.

        Args:
            plan: What to draw.
            folder: Of the store.
            num_threads: Units in work at a time; 0 for one per thread of PyTorch, or two on a GPU.
        """
        import diffusers

        from fgl_app.synthesis.engine import Engine
        from fgl_app.synthesis.generator import load_generator, load_judges

        self._store = UnitStore(folder, plan.settings.digest())
        check_device(plan.device, "synthesis-device")
        device = torch.device(plan.device)
        generator = load_generator(plan.settings, device)
        load_exact = functools.partial(load_generator, plan.settings, device, torch.float32)
        judges = load_judges(plan, device)
        embeddings = load_file(plan.embeddings) if plan.embeddings else {}
        on_cpu = device.type == "cpu"
        self.num_threads = num_threads or (torch.get_num_threads() if on_cpu else 2)
        # Whoever draws holds an engine; a GPU has one, so that the other thread commits meanwhile.
        self._engines: queue.SimpleQueue[Engine] = queue.SimpleQueue()
        for _ in range(self.num_threads if on_cpu else 1):
            self._engines.put(Engine(plan, generator, embeddings, load_exact, plan.batch_size, judges))
        self._provenance = {
            "settings_digest": plan.settings.digest(),
            "generator": plan.settings.generator,
            "generator_revision": plan.settings.generator_revision,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }

    def run(self, unit: Unit) -> tuple[int, int]:
        """Draw and commit one unit, unless another worker has.

        Returns:
            Its number of images, and how many of them were drawn here.
        """
        if self._store.has(unit.unit_id):
            return len(unit.samples), 0
        engine = self._engines.get()
        try:
            drawn = engine.draw(unit)
        finally:
            self._engines.put(engine)
        provenance = {
            **self._provenance,
            "seconds": drawn.seconds,
            "batch_size": drawn.batch_size,
            "left_out": drawn.left_out,
            "judged": drawn.judged,
        }
        self._store.commit(unit.unit_id, drawn.tensors, provenance)
        return len(unit.samples), len(unit.samples)

    def run_all(self, units: Iterator[Unit]) -> Iterator[tuple[int, int]]:
        """Draw and commit many units, and yield of each, as it is committed, what :meth:`run` returns."""
        with ThreadPoolExecutor(self.num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = {pool.submit(self.run, unit) for unit in islice(units, self.num_threads)}
            try:
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    running |= {pool.submit(self.run, unit) for unit in islice(units, len(finished))}
                    yield from (future.result() for future in finished)
            finally:
                pool.shutdown(cancel_futures=True)


def missing_units(plan: Plan, index: SampleIndex) -> Iterator[Unit]:
    """Yield what a store lacks, one unit at a time: of each unit of the plan the samples that are not settled."""
    for unit in plan.units():
        held = index.holds(as_ids(sample.sample_id for sample in unit.samples))
        if not held.all():
            yield Unit(tuple(sample for sample, there in zip(unit.samples, held, strict=True) if not there))


def shuffled(units: Iterator[Unit]) -> Iterator[Unit]:
    """Yield units in a random order, each out of the next :data:`_SHUFFLED_UNITS`.

    Workers that share a store skip what another has committed: where all walk alike, those that meet draw the same from
    then on.
    """
    chance = secrets.SystemRandom()
    waiting = list(islice(units, _SHUFFLED_UNITS))
    while waiting:
        place = chance.randrange(len(waiting))
        waiting[place], waiting[-1] = waiting[-1], waiting[place]
        yield waiting.pop()
        waiting += islice(units, 1)


def work(plan: Plan, folder: Path, num_workers: int = 0, ray_address: str = "") -> int:
    """Draw what the store lacks of ``plan``, with a progress bar.

    Args:
        plan: What to draw.
        folder: Of the store.
        num_workers: Actors of Ray; 0 draws in this process, without Ray.
        ray_address: Of a cluster; empty for actors on this machine.

    Returns:
        Number of images drawn, without those of other workers on the same store.
    """
    store = UnitStore(folder, plan.settings.digest())
    index = store.index()
    sizes = [len(unit.samples) for unit in missing_units(plan, index)]
    missing = sum(sizes)
    if not missing:
        return 0
    # Workers that share a store begin at different places.
    first = secrets.randbelow(len(sizes))
    units = shuffled(chain(islice(missing_units(plan, index), first, None), islice(missing_units(plan, index), first)))
    if num_workers:
        from fgl_app.synthesis.cluster import draw_on_cluster

        counts = draw_on_cluster(plan, folder, units, num_workers, ray_address)
    else:
        counts = UnitWorker(plan, folder).run_all(units)
    done = plan.num_images - missing
    with tqdm(desc="synthesis", total=plan.num_images, initial=done, unit="image", ascii=True, mininterval=1.0) as bar:
        total = 0
        for num_images, num_drawn in counts:
            bar.update(num_images)
            total += num_drawn
    return total


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it went: its end of the pipe closes with it."""
    os.read(0, 1)
    os._exit(1)


def main() -> int:
    """Run the worker; 0 when the store holds the whole plan."""
    parser = argparse.ArgumentParser(prog="fgl_app.synthesis.worker", description="Draw a synthetic training set.")
    parser.add_argument("plan", type=Path, help="plan.json of a run")
    parser.add_argument("store", type=Path, help="folder of the store")
    parser.add_argument("--workers", type=int, default=0, help="actors of Ray; 0 draws in this process")
    parser.add_argument("--ray-address", default="", help="of a cluster; empty for this machine")
    parser.add_argument("--with-parent", action="store_true", help="end when the standard input is closed")
    arguments = parser.parse_args()
    if arguments.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(Plan.load(arguments.plan), arguments.store, arguments.workers, arguments.ray_address)
    except FGLError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except Exception as error:
        # Its text may quote a prompt: only the worker's log, for the owner's eyes, holds it.
        sys.stderr.write(f"{traceback.format_exc()}\nerror: {type(error).__name__} in the generator.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
