"""From prompts to stored, trainable images: ours against the authors' procedure, on the same model, steps and images.

The authors call the stock pipeline with ten prompts at a time, reduce the images and write PNG files. Ours are timed
from the plan to the images in memory, checked and ready to train on; theirs to the written files, which is to their
advantage.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import random_lora, stable_diffusion_2_1
from benchmarks.common import finish, matrix_peak, parser, take_turns
from benchmarks.plans import plan_of
from fgl_app.settings import RunConfigValue
from fgl_app.store import UnitStore, as_ids
from fgl_app.synthesis.families import read_family
from fgl_app.synthesis.generator import Generator, PipelineCall, load_generator, load_pipeline
from fgl_app.synthesis.plan import Plan
from fgl_app.synthesis.worker import UnitWorker

AUTHORS_BATCH = 10
FAST = ["balanced", "turbo"]


def authors_procedure(plan: Plan) -> Callable[[], int]:
    """Re-state the authors' script: ten images of one prompt per call, PNG files in a folder per class."""
    pipeline = load_pipeline(plan.settings, torch.device(plan.device))

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            for item in plan.budget:
                (Path(folder) / str(item.label)).mkdir()
                # Whole calls only: thousands of images per class hardly have a last one.
                for start in range(0, max(1, item.num_images // AUTHORS_BATCH) * AUTHORS_BATCH, AUTHORS_BATCH):
                    drawn = pipeline(
                        [item.prompt] * AUTHORS_BATCH,
                        num_inference_steps=plan.settings.num_inference_steps,
                        guidance_scale=plan.settings.guidance_scale,
                    ).images
                    for offset, image in enumerate(drawn):
                        image.thumbnail((plan.settings.stored_size,) * 2)
                        image.save(Path(folder) / str(item.label) / f"{start + offset}.png")
            return len(list(Path(folder).glob("*/*.png")))

    return run


def our_procedure(plan: Plan, root: Path) -> Callable[[], int]:
    """Draw and commit a plan into a fresh store at ``root``, and read it."""
    worker = UnitWorker(plan, root)

    def run() -> int:
        shutil.rmtree(root, ignore_errors=True)
        drawn = sum(count for _, count in worker.run_all(plan.units()))
        data = UnitStore(root, plan.settings.digest()).read(as_ids(sample.sample_id for sample in plan.samples()))
        assert len(data) == drawn == plan.num_images
        return drawn

    return run


def _flop_of_linear(values: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
    return 2 * math.prod(values) * out_shape[-1]


_PACKED_LAYERS = {torch.ops.mkldnn._linear_pointwise: _flop_of_linear}
"""What PyTorch's counter does not know; see ``fgl_app/synthesis/packing.py``."""


def flop_per_image(plan: Plan, stock: bool) -> float:
    """Count the floating-point operations of one image, a multiply-add as two: those of ``stock``, or ours."""
    device = torch.device(plan.device)
    generator: Generator
    if stock:
        family = read_family(plan.settings.generator, plan.settings.generator_revision, plan.settings.scheduler)
        generator = PipelineCall(load_pipeline(plan.settings, device), plan.settings, family)
    else:
        generator = load_generator(plan.settings, device)
    conditions = generator.encode([(plan.budget[0].prompt, "")])
    # The counter does not see into what is compiled.
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=_PACKED_LAYERS) as counter,
    ):
        generator.generate(conditions, [0])
    return float(counter.get_total_flops())


def trace(plan: Plan, path: Path) -> None:
    """Write what one batch of a plan spends its time on, kernel by kernel."""
    device = torch.device(plan.device)
    generator = load_generator(plan.settings, device)
    conditions = generator.encode([(plan.budget[0].prompt, "")] * plan.batch_size)
    seeds = list(range(plan.batch_size))
    generator.generate(conditions, seeds)  # warms up, and compiles
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        generator.generate(conditions, seeds)
        if on_gpu:
            torch.cuda.synchronize()
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, column))
    total = sum(getattr(row, column) for row in rows)
    lines = [f"{total / 1e6:.3f} s for {plan.batch_size} images; seconds, share, calls, kernel"]
    lines += [
        f"{getattr(row, column) / 1e6:9.4f} {getattr(row, column) / total:6.1%} {row.count:7} {row.key[:120]}"
        for row in rows[:60]
    ]
    path.write_text("\n".join(lines) + "\n")


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
    options.add_argument("--classes", type=int, help="that many of the card's classes")
    options.add_argument("--profiles", nargs="*", choices=FAST, default=FAST, help="beside paper")
    options.add_argument("--trace", type=Path, help="where the time of one batch goes, by kernel, is written here")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(chosen, Path(folder))


def measure(chosen: argparse.Namespace, folder: Path) -> None:
    """Time the contenders; models and stores lie in ``folder``."""
    device = torch.device(chosen.device)
    generator = "tiny" if chosen.model == "tiny" else str(stable_diffusion_2_1(folder / "generator", device))
    drawn: dict[str, RunConfigValue] = {
        "dataset": "digits" if chosen.model == "tiny" else "imagenette",
        "generator": generator,
        "num-inference-steps": chosen.steps,
        "synthesis-batch-size": chosen.batch_size,
        "device": chosen.device,
    }
    own = {name: {**drawn, "profile": name} for name in ("paper", *chosen.profiles)}
    if "turbo" in own:
        unet = load_pipeline(plan_of(1, drawn).settings, device).unet
        own["turbo"]["lora"] = str(random_lora(unet, folder / "lora"))  # as fast as a distilled one
    plans = {name: plan_of(chosen.images_per_class, settings, chosen.classes) for name, settings in own.items()}
    contenders = {"authors": authors_procedure(plans["paper"])}
    contenders |= {name: our_procedure(plan, folder / name) for name, plan in plans.items()}
    rates = take_turns(contenders, chosen.rounds)
    peak = matrix_peak(device)
    for name, rate in rates.items():
        flop = flop_per_image(plans.get(name, plans["paper"]), stock=name == "authors")
        rate |= {
            "ratio": rate["per_second"] / rates["authors"]["per_second"],
            "gflop_per_image": flop / 1e9,
            "tflop_per_second": rate["per_second"] * flop / 1e12,
            "share_of_peak": rate["per_second"] * flop / peak,
        }
    if chosen.trace is not None:
        trace(plans["paper"], chosen.trace)
    finish(
        "synthesis", "images", chosen, contenders=rates, ratio=rates["paper"]["ratio"],
        matrix_peak_tflop_per_second=peak / 1e12,
    )  # fmt: skip


if __name__ == "__main__":
    main()
