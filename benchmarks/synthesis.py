"""From prompts to stored, trainable images: ours against the authors' procedure, on the same model, steps and images.

The authors call the stock pipeline with ten prompts at a time and write PNG files. Ours are timed from the plan to the
images in memory, checked and ready to train on; theirs to the written files, which is to their advantage.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import stable_diffusion_2_1
from benchmarks.common import finish, parser, take_turns
from fgl_app.prompts import PromptBudget
from fgl_app.store import UnitStore, as_ids
from fgl_app.synthesis.generator import load_pipeline
from fgl_app.synthesis.latent_diffusion import LatentDiffusion
from fgl_app.synthesis.plan import DrawSettings, Plan
from fgl_app.synthesis.worker import UnitWorker

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "a photo of a handwritten {}"
AUTHORS_BATCH = 10
BALANCED_SHARE_OF_STEPS = 0.4


def authors_procedure(settings: DrawSettings, device: torch.device, images_per_class: int) -> Callable[[], int]:
    """Re-state the authors' script: ten images of one prompt per call, PNG files in a folder per class."""
    pipeline = load_pipeline(settings, device)

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            for name in CLASSES:
                (Path(folder) / name).mkdir()
                for start in range(0, images_per_class, AUTHORS_BATCH):
                    count = min(AUTHORS_BATCH, images_per_class - start)
                    drawn = pipeline(
                        [PROMPT.format(name)] * count,
                        num_inference_steps=settings.num_inference_steps,
                        guidance_scale=settings.guidance_scale,
                    ).images
                    for offset, image in enumerate(drawn):
                        image.save(Path(folder) / name / f"{start + offset}.png")
        return len(CLASSES) * images_per_class

    return run


def our_procedure(plan: Plan) -> Callable[[], int]:
    """Draw and commit a plan into a fresh store, and read it."""
    root = Path(tempfile.mkdtemp())
    worker = UnitWorker(plan, root)

    def run() -> int:
        shutil.rmtree(root)
        drawn = sum(worker.run_all(plan.units()))
        data = UnitStore(root, plan.settings.digest()).read(as_ids(sample.sample_id for sample in plan.samples()))
        assert len(data) == drawn == plan.num_images
        return drawn

    return run


def flop_per_image(settings: DrawSettings, device: torch.device) -> float:
    """Count the floating-point operations of one image, a multiply-add as two."""
    generator = LatentDiffusion(load_pipeline(settings, device), settings)
    conditions = generator.encode([(PROMPT.format("zero"), "")])
    with FlopCounterMode(display=False) as counter:
        generator.generate(conditions, [0])
    return float(counter.get_total_flops())


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--model", choices=["tiny", "sd21"], default="tiny", help="sd21: SD 2.1-base, random weights")
    options.add_argument("--images-per-class", type=int, default=64)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--guidance", type=float, default=1.0)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    generator = "tiny" if chosen.model == "tiny" else str(stable_diffusion_2_1(Path(tempfile.mkdtemp())))
    paper = DrawSettings(
        generator=generator, generator_revision="", lora="", decoder="", scheduler="own",
        num_inference_steps=chosen.steps, guidance_scale=chosen.guidance, guidance_start=0.0, guidance_stop=1.0,
        deep_cache_interval=1, safety_checker=False, filter="", filter_revision="", filter_attempts=0,
        generation_size=0, stored_size=256, seed=0,
    )  # fmt: skip
    balanced = dataclasses.replace(
        paper, scheduler="dpm-solver++", guidance_stop=0.5,
        num_inference_steps=max(1, round(BALANCED_SHARE_OF_STEPS * chosen.steps)),
    )  # fmt: skip
    budget = tuple(
        PromptBudget(label, PROMPT.format(name), chosen.images_per_class) for label, name in enumerate(CLASSES)
    )
    contenders = {"authors": authors_procedure(paper, device, chosen.images_per_class)}
    for name, settings in (("paper", paper), ("balanced", balanced)):
        plan = Plan(settings, budget, {"": ""}, CLASSES, "", chosen.device, chosen.batch_size)
        contenders[name] = our_procedure(plan)
    rates = take_turns(contenders, chosen.rounds)
    base = rates["authors"]["per_second"]
    for name, settings in (("authors", paper), ("paper", paper), ("balanced", balanced)):
        flop = flop_per_image(settings, device)
        rates[name] |= {
            "ratio": rates[name]["per_second"] / base,
            "gflop_per_image": flop / 1e9,
            "tflop_per_second": rates[name]["per_second"] * flop / 1e12,
        }
    finish(
        {
            "benchmark": "synthesis",
            "options": {key: str(value) for key, value in vars(chosen).items()},
            "unit": "images",
            "contenders": rates,
            "ratio": rates["paper"]["ratio"],
        },
        chosen.json,
    )


if __name__ == "__main__":
    main()
