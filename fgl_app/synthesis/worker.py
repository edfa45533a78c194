"""The synthesis worker, a process of its own: ``python -m fgl_app.synthesis.worker PLAN STORE``.

It draws the units of the plan that the store lacks and ends. Started again after a crash, it draws what is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fgl_app.errors import FGLError
from fgl_app.store import UnitStore
from fgl_app.synthesis.plan import Plan, Unit


def work(plan: Plan, store: UnitStore) -> int:
    """Draw what ``store`` lacks of ``plan``.

    Returns:
        Number of images drawn.
    """
    units = plan.units()
    missing = [unit for unit in units if not store.has(unit.unit_id)]
    if not missing:
        return 0
    import diffusers

    from fgl_app.synthesis import generator  # seconds of import, and only where there is something to draw

    pipeline = generator.load_pipeline(
        plan.settings.generator, plan.settings.generator_revision, torch.device(plan.device), plan.settings.scheduler
    )
    embeddings = generator.load_embeddings(plan.embeddings, pipeline) if plan.embeddings else None
    provenance = {
        "settings_digest": plan.settings.digest(),
        "generator": plan.settings.generator,
        "generator_revision": plan.settings.generator_revision,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    total = sum(len(unit.samples) for unit in units)
    done = total - sum(len(unit.samples) for unit in missing)
    with tqdm(desc="synthesis", total=total, initial=done, unit="image", ascii=True, mininterval=1.0) as bar:
        for unit in missing:
            started = time.monotonic()
            images = generator.draw(pipeline, unit.samples, plan.settings, plan.batch_size, embeddings)
            seconds = round(time.monotonic() - started, 3)
            store.commit(unit.unit_id, _tensors(unit, images), {**provenance, "seconds": seconds})
            bar.update(len(unit.samples))
    return total - done


def _tensors(unit: Unit, images: torch.Tensor) -> dict[str, Any]:
    ids = b"".join(sample.sample_id for sample in unit.samples)
    return {
        "image": images,
        "label": torch.tensor([sample.label for sample in unit.samples], dtype=torch.int64),
        "seed": torch.tensor([sample.noise_seed for sample in unit.samples], dtype=torch.int64),
        "sample_id": torch.frombuffer(bytearray(ids), dtype=torch.uint8).reshape(-1, 16),
    }


def main() -> int:
    """Run the worker; 0 when the store holds the whole plan."""
    parser = argparse.ArgumentParser(prog="fgl_app.synthesis.worker", description="Draw a synthetic training set.")
    parser.add_argument("plan", type=Path, help="plan.json of a run")
    parser.add_argument("store", type=Path, help="folder of the store")
    arguments = parser.parse_args()
    try:
        work(Plan.load(arguments.plan), UnitStore(arguments.store))
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
