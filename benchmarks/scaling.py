"""How time and memory grow: clients in the prompt round, a plan of millions of samples, workers side by side."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.serverapp import Grid

from benchmarks.common import finish, parser
from benchmarks.one_process import OneProcess, identify_process
from benchmarks.plans import plan_of
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.prompts import PromptLimits
from fgl_app.store import ContentHash, UnitStore, as_ids
from fgl_app.synthesis.worker import missing_units, work
from strategies.prompt_round import PromptRound

NUM_CLASSES = 10
"""Of the digits, whose card the plans follow."""


def measure(function: Callable[..., object], *arguments: object) -> dict[str, float]:
    """Call a function in a process of its own.

    Returns:
        Its seconds, and the peak memory of the process in bytes, which held ``baseline_bytes`` after the imports.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_timed, function, *arguments).result()


def _timed(function: Callable[..., object], *arguments: object) -> dict[str, float]:
    baseline, started = _peak_bytes(), time.perf_counter()
    function(*arguments)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "peak_bytes": _peak_bytes(), "baseline_bytes": baseline}


def _peak_bytes() -> int:
    # Not getrusage(), whose peak a new process takes over from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def plan_and_resume(num_images: int) -> dict[str, Any]:
    """Build a plan, fill a store with one pixel per image, find nothing missing, and check every file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = measure(build, num_images)
        fill(num_images, folder)
        resumed, verified = measure(resume, num_images, folder), measure(read_and_verify, num_images, folder)
    return {"images": num_images, "build": built, "resume": resumed, "read_and_verify": verified}


def build(num_images: int) -> None:
    """Make a plan and go through all of it."""
    for _ in plan_of(num_images // NUM_CLASSES, {"device": "cpu"}).units():
        pass


def fill(num_images: int, folder: Path) -> None:
    """Commit one pixel for each image of a plan."""
    plan = plan_of(num_images // NUM_CLASSES, {"device": "cpu"})
    store = UnitStore(folder, plan.settings.digest())
    for unit in plan.units():
        ids = np.frombuffer(b"".join(sample.sample_id for sample in unit.samples), np.uint8)
        count = len(unit.samples)
        store.commit(
            unit.unit_id,
            {
                "image": torch.zeros(count, 3, 1, 1, dtype=torch.uint8),
                "label": torch.tensor([sample.label for sample in unit.samples]),
                "seed": torch.tensor([sample.noise_seed for sample in unit.samples]),
                "sample_id": torch.tensor(ids).reshape(-1, 16),
            },
            {"seconds": 0.0},
        )


def resume(num_images: int, folder: Path) -> None:
    """Find that nothing is missing."""
    plan = plan_of(num_images // NUM_CLASSES, {"device": "cpu"})
    assert not any(True for _ in missing_units(plan, UnitStore(folder, plan.settings.digest()).index()))


def read_and_verify(num_images: int, folder: Path) -> None:
    """Read the whole set, each file against its checksum, and take its content hash, as a run does."""
    plan = plan_of(num_images // NUM_CLASSES, {"device": "cpu"})
    ids = as_ids(sample.sample_id for sample in plan.samples())
    store = UnitStore(folder, plan.settings.digest())
    content = ContentHash()
    assert len(store.read(ids, content=content)) == num_images
    content.hexdigest()


def prompt_round(num_clients: int) -> None:
    """Ask clients for class-level prompts and merge them; above 100 clients several hold the same images."""
    identify_process()
    run_config = default_run_config() | {"num-clients": num_clients, "partition": "iid", "min-samples-per-client": 0}
    settings = parse_run_config(run_config)
    policy = settings.policy
    grid = cast(Grid, OneProcess(run_config, num_clients, min(num_clients, 100)))
    exchange = PromptRound(
        grid,
        PromptLimits(policy.max_prompts_per_client, policy.max_prompt_chars),
        class_names=settings.card.class_names(),
    )
    exchange.ask(grid.get_node_ids())
    exchange.wait()
    exchange.merged()


def draw(num_images: int, num_workers: int) -> None:
    """Draw a plan with actors of Ray, start of the cluster included."""
    with tempfile.TemporaryDirectory() as folder:
        work(plan_of(num_images // NUM_CLASSES, {}), Path(folder), num_workers)


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1_000])
    options.add_argument("--plan-images", type=int, nargs="+", default=[20_000, 200_000, 2_000_000])
    options.add_argument("--draw-images", type=int, default=1_280)
    options.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    chosen = options.parse_args()
    clients = {str(count): measure(prompt_round, count) for count in chosen.clients}
    plans = [plan_and_resume(count) for count in chosen.plan_images]
    drawn = {str(count): measure(draw, chosen.draw_images, count) for count in chosen.workers}
    found: dict[str, Any] = {"prompt_round": clients, "plans": plans, "workers": drawn}
    if len(chosen.workers) > 1:
        first, last = (drawn[str(chosen.workers[place])]["seconds"] for place in (0, -1))
        found["ratio"] = first / last
    finish("scaling", "seconds", chosen, **found)


if __name__ == "__main__":
    main()
