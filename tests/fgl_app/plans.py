"""Small plans of the shipped generator, and what they draw."""

import dataclasses
from pathlib import Path

import torch

from fgl_app.prompts import PromptBudget
from fgl_app.store import UnitStore, as_ids
from fgl_app.synthesis.engine import Engine
from fgl_app.synthesis.generator import load_generator
from fgl_app.synthesis.plan import DrawSettings, Plan

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
