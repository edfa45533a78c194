"""Draw units with restartable actors of Ray, on this machine or on a cluster that shares the store's folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from fgl_app.errors import SynthesisError
from fgl_app.synthesis.plan import Plan, Unit
from fgl_app.synthesis.worker import UnitWorker

_CONNECT_TIMEOUT_S = 10.0
_MAX_RETRIES = 5
"""Times that a unit is drawn again after the death of its actor."""


def plan_of_actor(plan: Plan) -> Plan:
    """Return the plan as an actor draws it: Ray shows it one GPU alone, which is ``cuda``, whatever its number."""
    return replace(plan, device=torch.device(plan.device).type)


class SynthesisActor:
    """Draws units in a process of its own; only numbers of images come back."""

    def __init__(self, plan: Plan, folder: str) -> None:
        """Load the generator."""
        torch.set_num_threads(1)
        self._worker = UnitWorker(plan_of_actor(plan), Path(folder), num_threads=1)

    def run(self, unit: Unit) -> tuple[int, int]:
        """Draw and commit a unit; see :meth:`UnitWorker.run`."""
        return self._worker.run(unit)


def draw_on_cluster(
    plan: Plan, folder: Path, units: Iterator[Unit], num_workers: int, ray_address: str
) -> Iterator[tuple[int, int]]:
    """Draw units and yield of each, as it is committed, its number of images and how many of them were drawn.

    Every actor has one unit in work and one waiting. Ray starts a dead actor again and hands it its units, of which
    those that were committed are not drawn again.

    Args:
        plan: What to draw.
        folder: Of the store, the same on every machine.
        units: What the store lacks.
        num_workers: Number of actors; each has a GPU where the plan's device is one.
        ray_address: Of a cluster; empty for actors on this machine.

    Raises:
        SynthesisError: If a unit's actor dies again and again, or the cluster cannot be reached or has too few GPUs.
    """
    on_gpu = torch.device(plan.device).type == "cuda"
    try:
        _check_reachable(ray_address)
        # Actors ask for no CPU: beside Flower's simulation every CPU is taken by its clients.
        ray.init(address=ray_address or "local", log_to_driver=False, include_dashboard=None if ray_address else False)
    except (RayError, ConnectionError, OSError) as error:
        raise SynthesisError(
            f"`ray-address` must be that of a running cluster of Ray, or empty, but {ray_address!r} cannot be reached "
            f"({type(error).__name__})."
        ) from None
    try:
        if on_gpu:
            _check_gpus(num_workers)
        remote: Any = ray.remote(SynthesisActor)
        options = {"num_cpus": 0, "num_gpus": int(on_gpu), "max_restarts": -1, "max_task_retries": _MAX_RETRIES}
        actors = [remote.options(**options).remote(plan, str(folder.resolve())) for _ in range(num_workers)]
        running: dict[Any, tuple[int, Unit]] = {}

        def give(number: int, unit: Unit) -> None:
            running[actors[number].run.remote(unit)] = number, unit

        for _ in range(2):
            for number in range(num_workers):
                if (unit := next(units, None)) is not None:
                    give(number, unit)
        while running:
            (finished,), _ = ray.wait(list(running), num_returns=1)
            number, unit = running.pop(finished)
            try:
                counts = ray.get(finished)
            except RayTaskError as error:  # what the unit itself raised: a full disk, no memory
                raise error.cause from None
            except RayActorError as error:
                if "creation task" in str(error):
                    raise SynthesisError(
                        f"A synthesis actor must be able to start, but: {str(error).strip().splitlines()[-1]}"
                    ) from None
                raise SynthesisError(
                    f"A synthesis actor must survive its unit, but {_MAX_RETRIES + 1} died of unit {unit.unit_id}: out "
                    "of memory, or killed. Finished units are kept."
                ) from None
            if (following := next(units, None)) is not None:
                give(number, following)
            yield counts
    finally:
        ray.shutdown()


def _check_gpus(num_workers: int) -> None:
    """Refuse actors for which Ray would wait for ever."""
    there = int(cast(Any, ray).cluster_resources().get("GPU", 0))
    if there < num_workers:
        raise SynthesisError(
            f"`synthesis-workers` must be at most the number of GPUs that Ray has, {there}, but is {num_workers}. Use "
            "fewer, another `ray-address`, or synthesis-device=cpu."
        )


def _check_reachable(ray_address: str) -> None:
    """Try to connect to ``host:port`` once, because Ray itself would try for minutes."""
    host, _, port = ray_address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S):
            pass
