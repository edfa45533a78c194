"""From prompts to stored, trainable images: ours against the authors' procedure, on the same model, steps and images.

The authors call the stock pipeline with ten prompts at a time and write PNG files. Ours are timed from the plan to the
images in memory, checked and ready to train on; theirs to the written files, which is to their advantage.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import random_lora, stable_diffusion_2_1
from benchmarks.common import finish, parser, take_turns
from benchmarks.plans import plan_of
from fgl_app.settings import RunConfigValue
from fgl_app.store import UnitStore, as_ids
from fgl_app.synthesis.generator import load_generator, load_pipeline
from fgl_app.synthesis.plan import Plan
from fgl_app.synthesis.worker import UnitWorker

AUTHORS_BATCH = 10


def authors_procedure(plan: Plan) -> Callable[[], int]:
    """Re-state the authors' script: ten images of one prompt per call, PNG files in a folder per class."""
    pipeline = load_pipeline(plan.settings, torch.device(plan.device))

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            for item in plan.budget:
                (Path(folder) / str(item.label)).mkdir()
                for start in range(0, item.num_images, AUTHORS_BATCH):
                    drawn = pipeline(
                        [item.prompt] * min(AUTHORS_BATCH, item.num_images - start),
                        num_inference_steps=plan.settings.num_inference_steps,
                        guidance_scale=plan.settings.guidance_scale,
                    ).images
                    for offset, image in enumerate(drawn):
                        image.save(Path(folder) / str(item.label) / f"{start + offset}.png")
        return plan.num_images

    return run


def our_procedure(plan: Plan) -> Callable[[], int]:
    """Draw and commit a plan into a fresh store, and read it."""
    root = Path(tempfile.mkdtemp())
    worker = UnitWorker(plan, root)

    def run() -> int:
        shutil.rmtree(root)
        drawn = sum(count for _, count in worker.run_all(plan.units()))
        data = UnitStore(root, plan.settings.digest()).read(as_ids(sample.sample_id for sample in plan.samples()))
        assert len(data) == drawn == plan.num_images
        return drawn

    return run


def _flop_of_linear(values: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
    return 2 * math.prod(values) * out_shape[-1]


_PACKED_LAYERS = {torch.ops.mkldnn._linear_pointwise: _flop_of_linear}
"""What PyTorch's counter does not know; see ``fgl_app/synthesis/packing.py``."""


def flop_per_image(plan: Plan) -> float:
    """Count the floating-point operations of one image, a multiply-add as two."""
    generator = load_generator(plan.settings, torch.device(plan.device))
    conditions = generator.encode([(plan.budget[0].prompt, "")])
    with FlopCounterMode(display=False, custom_mapping=_PACKED_LAYERS) as counter:
        generator.generate(conditions, [0])
    return float(counter.get_total_flops())


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument(
        "--model", choices=["tiny", "sd21"], default="tiny",
        help="tiny: shipped, as the digits' card draws; sd21: SD 2.1-base, random weights, as imagenette's card draws",
    )  # fmt: skip
    options.add_argument("--images-per-class", type=int, default=64)
    options.add_argument("--steps", type=int, default=0, help="0 for each profile's")
    options.add_argument("--batch-size", type=int, default=32, help="on a GPU")
    chosen = options.parse_args()
    drawn: dict[str, RunConfigValue] = {
        "dataset": "digits" if chosen.model == "tiny" else "imagenette",
        "generator": "tiny" if chosen.model == "tiny" else str(stable_diffusion_2_1(Path(tempfile.mkdtemp()))),
        "num-inference-steps": chosen.steps,
        "synthesis-batch-size": chosen.batch_size,
        "device": chosen.device,
    }
    plans = {name: plan_of(chosen.images_per_class, {**drawn, "profile": name}) for name in ("paper", "balanced")}
    unet = load_pipeline(plans["paper"].settings, torch.device("cpu")).unet
    distilled = str(random_lora(unet, Path(tempfile.mkdtemp())))  # as fast as a real one
    plans["turbo"] = plan_of(chosen.images_per_class, {**drawn, "profile": "turbo", "lora": distilled})
    contenders = {"authors": authors_procedure(plans["paper"])}
    contenders |= {name: our_procedure(plan) for name, plan in plans.items()}
    rates = take_turns(contenders, chosen.rounds)
    for name, rate in rates.items():
        flop = flop_per_image(plans.get(name, plans["paper"]))
        rate |= {
            "ratio": rate["per_second"] / rates["authors"]["per_second"],
            "gflop_per_image": flop / 1e9,
            "tflop_per_second": rate["per_second"] * flop / 1e12,
        }
    finish("synthesis", "images", chosen, contenders=rates, ratio=rates["paper"]["ratio"])


if __name__ == "__main__":
    main()
