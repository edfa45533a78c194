"""Small plans of the shipped generator, and what they draw."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from fgl_app.prompts import PromptBudget
from fgl_app.store import ContentHash, UnitStore, as_ids
from fgl_app.synthesis.engine import Engine
from fgl_app.synthesis.generator import load_generator
from fgl_app.synthesis.plan import DrawSettings, Plan, Sample, Unit

SETTINGS = DrawSettings(
    generator="tiny", generator_revision="", lora="", decoder="", scheduler="own", num_inference_steps=2,
    guidance_scale=2.0, guidance_start=0.0, guidance_stop=1.0, deep_cache_interval=1, safety_checker=False,
    filter="", filter_revision="", filter_attempts=2, generation_size=0, stored_size=256, seed=0,
)  # fmt: skip
CPU = torch.device("cpu")


def plan_of(*budget: PromptBudget, batch_size: int = 8, **changes: object) -> Plan:
    return Plan(dataclasses.replace(SETTINGS, **changes), budget, {"": ""}, ("zero", "one"), "", "cpu", batch_size)


def ids_of(plan: Plan):
    return as_ids(sample.sample_id for sample in plan.samples())


def store_of(plan: Plan, folder: Path) -> UnitStore:
    return UnitStore(folder, plan.settings.digest())


def content_hash(plan: Plan, folder: Path) -> str:
    content = ContentHash()
    store_of(plan, folder).read(ids_of(plan), content=content)
    return content.hexdigest()


def commit(plan: Plan, folder: Path, samples: Sequence[Sample] = (), **provenance: object) -> None:
    """Put images of a plan, all of them or some, into a store as one unit, of one pixel each."""
    unit = Unit(tuple(samples or plan.samples()))
    kept = [sample for sample in unit.samples if sample.sample_id.hex() not in provenance.get("left_out", {})]
    ids = [list(sample.sample_id) for sample in kept]
    tensors = {
        "image": torch.zeros(len(kept), 3, 1, 1, dtype=torch.uint8),
        "label": torch.tensor([sample.label for sample in kept]),
        "seed": torch.tensor([sample.noise_seed for sample in kept]),
        "sample_id": torch.tensor(ids, dtype=torch.uint8),
    }
    store_of(plan, folder).commit(unit.unit_id, tensors, {"seconds": 1.0} | provenance)


def engine_of(plan: Plan) -> Engine:
    return Engine(
        plan, load_generator(plan.settings, CPU), {}, lambda: load_generator(plan.settings, CPU), plan.batch_size
    )


def draw(plan: Plan, engine: Engine | None = None) -> dict[bytes, torch.Tensor]:
    engine = engine or engine_of(plan)
    images: dict[bytes, torch.Tensor] = {}
    for unit in plan.units():
        drawn = engine.draw(unit).tensors
        images |= {row.numpy().tobytes(): image for row, image in zip(drawn["sample_id"], drawn["image"], strict=True)}
    return images
