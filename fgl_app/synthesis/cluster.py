"""Draw units with restartable actors of Ray, on this machine or on a cluster that shares the store's folder."""

from __future__ import annotations

import functools
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from fgl_app.environment import short_temp_folder
from fgl_app.errors import SynthesisError
from fgl_app.synthesis.plan import Plan, Unit
from fgl_app.synthesis.worker import UnitWorker

_CONNECT_TIMEOUT_S = 10.0
_ATTEMPTS = 3
"""Actors that may die of a unit before it is given up."""
_DEATHS_IN_A_ROW = 6
"""Deaths for each actor asked for, without a unit finished in between, after which all is given up."""


def plan_of_actor(plan: Plan) -> Plan:
    """Return the plan as an actor draws it: Ray shows it one GPU alone, which is ``cuda``, whatever its number."""
    return replace(plan, device=torch.device(plan.device).type)


class SynthesisActor:
    """Draws units in a process of its own; only numbers of images come back."""

    def __init__(self, plan: Plan, folder: str) -> None:
        """Remember what to draw."""
        self._plan, self._folder = plan_of_actor(plan), Path(folder)

    @functools.cached_property
    def _worker(self) -> UnitWorker:
        # Loaded by the first unit: what fails there reaches the driver as the error that it is.
        torch.set_num_threads(1)
        return UnitWorker(self._plan, self._folder, num_threads=1)

    def run(self, unit: Unit) -> tuple[int, int]:
        """Draw and commit a unit; see :meth:`UnitWorker.run`."""
        return self._worker.run(unit)


def draw_on_cluster(
    plan: Plan,
    folder: Path,
    units: Iterator[Unit],
    num_workers: int,
    ray_address: str,
    actor: type[SynthesisActor] = SynthesisActor,
) -> Iterator[tuple[int, int]]:
    """Draw units and yield of each, as it is committed, its number of images and how many of them were drawn.

    Args:
        plan: What to draw.
        folder: Of the store, the same on every machine.
        units: What the store lacks.
        num_workers: Number of actors; each has a GPU where the plan's device is one.
        ray_address: Of a cluster; empty for actors on this machine.
        actor: What draws.

    Raises:
        SynthesisError: If actors die of a unit again and again, which is told when all others are drawn, or cannot
            start, or the cluster cannot be reached or has too few GPUs.
    """
    on_gpu = torch.device(plan.device).type == "cuda"
    try:
        _check_reachable(ray_address)
        # Actors ask for no CPU: beside Flower's simulation every CPU is taken by its clients.
        if ray_address:
            ray.init(address=ray_address, log_to_driver=False)
        else:
            temporary = str(short_temp_folder() / "ray")
            ray.init(address="local", log_to_driver=False, include_dashboard=False, _temp_dir=temporary)
    except (RayError, ConnectionError, OSError) as error:
        if not ray_address:
            raise SynthesisError(
                f"Ray must be able to start on this machine for `synthesis-workers`, but does not ({error}). Use "
                "synthesis-workers=0, which draws without Ray."
            ) from None
        raise SynthesisError(
            f"`ray-address` must be that of a running cluster of Ray, or empty, but {ray_address!r} cannot be reached "
            f"({type(error).__name__})."
        ) from None
    try:
        if on_gpu:
            _check_gpus(num_workers)
        remote = cast(Any, ray.remote(actor)).options(num_cpus=0, num_gpus=int(on_gpu))
        yield from _hand_out(units, num_workers, lambda: remote.remote(plan, str(folder.resolve())))
    finally:
        ray.shutdown()


def _hand_out(units: Iterator[Unit], num_workers: int, start: Callable[[], Any]) -> Iterator[tuple[int, int]]:
    """Give every actor one unit to draw and one that waits; see :func:`draw_on_cluster`.

    A dead actor is replaced. Its units are begun again after all others, and are not drawn if they were committed.
    """
    actors = [start() for _ in range(num_workers)]
    queues: list[deque[tuple[Any, Unit]]] = [deque() for _ in actors]
    again: deque[Unit] = deque()
    deaths: Counter[Unit] = Counter()
    in_a_row = 0
    while True:
        for length in (1, 2):
            for actor, queue in zip(actors, queues, strict=True):
                unit = (next(units, None) or (again and again.popleft())) if len(queue) < length else None
                if unit:
                    queue.append((actor.run.remote(unit), unit))
        running = {queue[0][0]: number for number, queue in enumerate(queues) if queue}
        if not running:
            break
        (finished,), _ = ray.wait(list(running), num_returns=1)
        number = running[finished]
        _, unit = queues[number].popleft()
        try:
            counts = ray.get(finished)
        except RayTaskError as error:  # what the unit itself raised: no such generator, a full disk, no memory
            raise error.cause from None
        except (RayActorError, NodeDiedError, OutOfMemoryError) as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise SynthesisError(
                    f"A synthesis actor must be able to start, but: {str(error).strip().splitlines()[-1]}"
                ) from None
            in_a_row += 1
            deaths[unit] += 1
            if in_a_row == _DEATHS_IN_A_ROW * num_workers:
                break
            again.extend(waiting for _, waiting in queues[number])
            if deaths[unit] < _ATTEMPTS:
                again.append(unit)
            queues[number].clear()
            ray.kill(actors[number])  # one that cannot be reached may still live
            actors[number] = start()
        else:
            in_a_row = 0
            deaths.pop(unit, None)
            yield counts
    if deaths:
        names = [unit.unit_id for unit in deaths]
        raise SynthesisError(
            f"Synthesis actors must survive their units, but {deaths.total()} died of {len(deaths)} of them: "
            f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}. "
            f"{'So many died in a row that the rest was given up' if running else 'All others are drawn'}. Memory ran "
            "out, or they were killed: use fewer `synthesis-workers`, or machines with more memory, and start again."
        )


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
