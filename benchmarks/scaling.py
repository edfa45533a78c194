"""How time and memory grow: clients in the prompt round, a plan of millions of samples, workers side by side."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Callable
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
from fgl_app.store import UnitStore, as_ids
from fgl_app.synthesis.worker import missing_units, work
from strategies.prompt_round import PromptRound

NUM_CLASSES = 10
"""Of the digits, whose card the plans follow."""


def measure(function: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of a call, and the peak memory of the process so far, bytes."""
    started = time.perf_counter()
    function()
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def plan_and_resume(num_images: int) -> dict[str, Any]:
    """Build a plan, fill a store with one pixel per image, find nothing missing, and check every file."""
    folder = Path(tempfile.mkdtemp())
    plan = plan_of(num_images // NUM_CLASSES, {"device": "cpu"})
    store = UnitStore(folder, plan.settings.digest())
    try:
        built = measure(lambda: sum(1 for _ in plan.units()))
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
        resumed = measure(lambda: sum(1 for _ in missing_units(plan, store)))
        verified = measure(lambda: store.read(as_ids(sample.sample_id for sample in plan.samples())))
    finally:
        shutil.rmtree(folder)
    return {"images": num_images, "build": built, "resume": resumed, "read_and_verify": verified}


def prompt_round(num_clients: int) -> dict[str, float]:
    """Ask clients for class-level prompts and merge them; above 100 clients several hold the same images."""
    run_config = default_run_config() | {"num-clients": num_clients, "partition": "iid", "min-samples-per-client": 0}
    settings = parse_run_config(run_config)
    policy = settings.policy
    grid = cast(Grid, OneProcess(run_config, num_clients, min(num_clients, 100)))
    exchange = PromptRound(
        grid,
        PromptLimits(policy.max_prompts_per_client, policy.max_prompt_chars),
        class_names=settings.card.class_names(),
    )

    def ask_and_merge() -> None:
        exchange.ask(grid.get_node_ids())
        exchange.wait()
        exchange.merged()

    return measure(ask_and_merge)


def workers(num_images: int, num_workers: int) -> dict[str, float]:
    """Draw a plan with actors of Ray, start of the cluster included."""
    folder = Path(tempfile.mkdtemp())
    try:
        return measure(lambda: work(plan_of(num_images // NUM_CLASSES, {}), folder, num_workers))
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1_000])
    options.add_argument("--plan-images", type=int, nargs="+", default=[20_000, 200_000, 2_000_000])
    options.add_argument("--draw-images", type=int, default=1_280)
    options.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    chosen = options.parse_args()
    identify_process()
    clients = {str(count): prompt_round(count) for count in chosen.clients}
    plans = [plan_and_resume(count) for count in chosen.plan_images]
    drawn = {str(count): workers(chosen.draw_images, count) for count in chosen.workers}
    found: dict[str, Any] = {"prompt_round": clients, "plans": plans, "workers": drawn}
    if len(chosen.workers) > 1:
        first, last = (drawn[str(chosen.workers[place])]["seconds"] for place in (0, -1))
        found["ratio"] = first / last
    finish("scaling", "seconds", chosen, **found)


if __name__ == "__main__":
    main()
