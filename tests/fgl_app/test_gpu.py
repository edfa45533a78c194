"""What only a GPU does: compiled synthesis in half precision, replayed training steps. Skipped where there is none."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plans import SETTINGS, content_hash, ids_of, plan_of, store_of

from fgl_app.compilation import can_compile
from fgl_app.config import APP_FOLDER
from fgl_app.data.images import ImageSet
from fgl_app.models import build_model
from fgl_app.prompts import PromptBudget
from fgl_app.synthesis.families import read_family
from fgl_app.synthesis.generator import PipelineCall, load_generator, load_pipeline
from fgl_app.synthesis.latent_diffusion import LatentDiffusion
from fgl_app.synthesis.plan import Plan
from fgl_app.training import evaluate, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
PROMPTS = [("a photo of a handwritten seven", ""), ("zero, handwritten", "bold")]


@pytest.mark.parametrize("scheduler", ["own", "pndm"])
def test_the_compiled_loop_draws_what_the_pipeline_draws(scheduler, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = dataclasses.replace(SETTINGS, scheduler=scheduler, num_inference_steps=7, guidance_stop=0.5)
    ours = load_generator(settings, GPU, torch.float32)
    whole = dataclasses.replace(settings, guidance_stop=1.0)
    guided = load_generator(whole, GPU, torch.float32)
    theirs = PipelineCall(load_pipeline(whole, GPU, torch.float32), whole, read_family(whole.generator, ""))

    images = [(each.generate(each.encode(PROMPTS), [5, 6]) * 255).round() for each in (guided, theirs, ours)]

    assert can_compile("synthesis", "cuda")
    assert isinstance(guided, LatentDiffusion)
    assert images[1].std() > 30
    assert (images[0] - images[1]).abs().max() <= 1
    assert 0 < (images[2] - images[1]).abs().mean() < 30  # guided in the first half of the steps


def test_two_processes_that_compile_for_themselves_draw_the_same_bytes(tmp_path):
    plan = dataclasses.replace(plan_of(PromptBudget(0, "zero", 40), PromptBudget(1, "one", 40)), device="cuda")
    plan.save(tmp_path / "plan.json")

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fgl_app.synthesis.worker", str(tmp_path / "plan.json"), str(tmp_path / name)]
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{name}"), "PYTHONPATH": path}
        return subprocess.Popen(command, env=os.environ | caches)

    path = os.pathsep.join([str(APP_FOLDER), os.environ.get("PYTHONPATH", "")])
    codes = [process.wait(500) for process in [start("first"), start("second")]]

    assert codes == [0, 0]
    first, second = (hash_of(plan, tmp_path / name) for name in ("first", "second"))
    assert first == second


def hash_of(plan: Plan, folder: Path) -> str:
    assert len(store_of(plan, folder).read(ids_of(plan))) == 80
    return content_hash(plan, folder)


def trained(compiled: bool, epochs: int = 3) -> tuple[float, float]:
    """Loss over the last epoch, and accuracy afterwards, on two classes that a few epochs tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(72) % 2
    images = torch.randint(128, (72, 3, 32, 32), dtype=torch.uint8, generator=generator) + 100 * labels[
        :, None, None, None
    ].to(torch.uint8)
    data = ImageSet(images, labels)
    model = build_model("resnet18", 2, 32, 0)
    loss = train(
        model, data, epochs=epochs, batch_size=16, learning_rate=0.01, weight_decay=1e-4, augmentation="crop-flip",
        generator=generator, device=GPU, compiled=compiled,
    )  # fmt: skip
    return loss, evaluate(model, data, GPU).accuracy


def test_replayed_steps_learn_what_plain_ones_learn():
    loss, accuracy = trained(compiled=True)  # 72 images: the last of five batches has another shape

    plain_loss, plain_accuracy = trained(compiled=False)

    assert accuracy == plain_accuracy == 1.0
    assert loss == pytest.approx(plain_loss, rel=0.2, abs=0.05)


def test_images_that_do_not_fit_are_copied_batch_by_batch_and_teach_the_same(monkeypatch):
    resident = trained(compiled=False, epochs=1)
    monkeypatch.setattr("fgl_app.training._SHARE_OF_MEMORY", 0.0)

    copied = trained(compiled=False, epochs=1)

    assert copied[0] == pytest.approx(resident[0], rel=0.05)
