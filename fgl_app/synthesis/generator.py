"""Load a text-to-image pipeline and run it behind one small interface."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import AutoencoderTiny, AutoPipelineForText2Image

from fgl_app import tiny
from fgl_app.errors import ModelError
from fgl_app.foundation_models import locate
from fgl_app.synthesis.judges import Judge, LabelJudge, SafetyJudge
from fgl_app.synthesis.latent_diffusion import LatentDiffusion, complete_embedding
from fgl_app.synthesis.plan import DrawSettings, Plan
from fgl_app.synthesis.solvers import SCHEDULERS

# SD 2.1's attention overflows in fp16, so that bf16 is the half precision on a GPU.
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


class Generator(Protocol):
    """A frozen text-to-image model with its settings."""

    def encode(self, prompts: Sequence[tuple[str | torch.Tensor, str]]) -> list[Any]:
        """Encode pairs of prompt and negative prompt, once each; a prompt is a text or its embedding ``[L, D]``."""

    def generate(self, conditions: Sequence[Any], noise_seeds: Sequence[int]) -> torch.Tensor:
        """Draw one image per condition from the noise of its seed: float32 ``[B, 3, H, W]``, 0 to 1, any device."""


class PipelineCall:
    """Any pipeline of diffusers (SDXL, SD 3, Flux, Sana, PixArt…) through its own ``__call__``."""

    def __init__(self, pipeline: Any, settings: DrawSettings) -> None:
        """Take over a loaded pipeline."""
        self._pipeline = pipeline
        self._settings = settings
        self._of_thread = threading.local()

    def encode(self, prompts: Sequence[tuple[str | torch.Tensor, str]]) -> list[tuple[str | torch.Tensor, str]]:
        """Return the pairs: the pipeline encodes them itself."""
        return list(prompts)

    def generate(
        self, conditions: Sequence[tuple[str | torch.Tensor, str]], noise_seeds: Sequence[int]
    ) -> torch.Tensor:
        """Call the pipeline once; see :class:`Generator`."""
        settings, pipeline = self._settings, self._own_pipeline()
        size = settings.generation_size
        asked: dict[str, Any] = {"height": size, "width": size} if size else {}
        embeddings = [prompt for prompt, _ in conditions if isinstance(prompt, torch.Tensor)]
        if embeddings:
            asked["prompt_embeds"] = torch.stack([complete_embedding(item, pipeline) for item in embeddings])
        else:
            asked["prompt"] = [prompt for prompt, _ in conditions]
        if any(negative for _, negative in conditions):  # some pipelines have no negative prompt at all
            asked["negative_prompt"] = [negative for _, negative in conditions]
        images: torch.Tensor = pipeline(
            **asked,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in noise_seeds],
            output_type="pt",
        ).images
        return images.float()

    def _own_pipeline(self) -> Any:
        """Return this thread's pipeline: a call changes its solver and tokenizers; the weights are shared."""
        if not hasattr(self._of_thread, "pipeline"):
            own = copy.copy(self._pipeline)
            for name, part in own.components.items():
                if part is not None and not isinstance(part, torch.nn.Module):
                    setattr(own, name, copy.deepcopy(part))
            self._of_thread.pipeline = own
        return self._of_thread.pipeline


def load_generator(settings: DrawSettings, device: torch.device, dtype: torch.dtype | None = None) -> Generator:
    """Load the generator that ``settings`` name, and choose the faster way to run it.

    Args:
        settings: What to load, and how to draw.
        device: Where to run it.
        dtype: Arithmetic; None for bf16 on a GPU, fp32 on a CPU.

    Raises:
        ModelError: If it cannot be loaded.
    """
    pipeline = load_pipeline(settings, device, dtype)
    return (
        LatentDiffusion(pipeline, settings) if LatentDiffusion.supports(pipeline) else PipelineCall(pipeline, settings)
    )


def load_judges(plan: Plan, device: torch.device) -> list[Judge]:
    """Load whoever may reject images.

    Raises:
        ModelError: If a judge cannot be loaded, or does not know a class.
    """
    judges: list[Judge] = []
    settings = plan.settings
    if settings.safety_checker:
        judges.append(SafetyJudge(load_pipeline(settings, device, checked=True), device))
    if settings.filter:
        judges.append(LabelJudge(settings.filter, settings.filter_revision, plan.class_names, device))
    return judges


def load_pipeline(
    settings: DrawSettings, device: torch.device, dtype: torch.dtype | None = None, checked: bool = False
) -> Any:
    """Load any text-to-image pipeline of diffusers, with the solver, LoRA and decoder that ``settings`` ask for.

    Args:
        settings: What to load.
        device: Where to run it.
        dtype: Arithmetic; None for bf16 on a GPU, fp32 on a CPU.
        checked: Keep its safety checker, which would blacken images.

    Raises:
        ModelError: If it cannot be loaded.
    """
    chosen = dtype or _DTYPES[device.type]
    source, pinned = locate(settings.generator, settings.generator_revision, tiny.DIFFUSION)
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(
            source, revision=pinned, dtype=chosen, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`generator` must be a text-to-image pipeline that diffusers loads, but {settings.generator!r} is not "
            f'({type(error).__name__}: {error}). Use "tiny" or a folder or hub id with safetensors weights.'
        ) from None
    if settings.scheduler != "own":
        pipeline.scheduler = with_solver(pipeline.scheduler, settings.scheduler)
    if settings.lora:
        _fuse_lora(pipeline, settings.lora)
    if settings.decoder:
        pipeline.vae = _load_decoder(settings.decoder, chosen)
    if getattr(pipeline, "safety_checker", None) is not None and not checked:
        pipeline.safety_checker = None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def with_solver(scheduler: Any, name: str) -> Any:
    """Return the solver ``name`` with the noise schedule of a pipeline's own.

    Raises:
        ModelError: If the pipeline matches flows, as SD 3 and Flux do: these solvers would take its output for noise.
    """
    if type(scheduler).__name__.startswith("FlowMatch"):
        raise ModelError(
            f"`scheduler` must be own for a generator that matches flows, as this one does, but is {name}. Use "
            "scheduler=own, and with profile=balanced set num-inference-steps, too."
        )
    return SCHEDULERS[name].from_config(scheduler.config)


def _fuse_lora(pipeline: Any, lora: str) -> None:
    try:
        pipeline.load_lora_weights(locate(lora, "")[0], use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"`lora` must be a folder or hub id of LoRA weights for the generator, and needs the package peft, but "
            f"{lora!r} cannot be loaded ({type(error).__name__}: {error})."
        ) from None
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def _load_decoder(decoder: str, dtype: torch.dtype) -> Any:
    try:
        return AutoencoderTiny.from_pretrained(locate(decoder, "")[0], dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`decoder` must be a folder or hub id of an AutoencoderTiny such as madebyollin/taesd, but {decoder!r} is "
            f"none ({type(error).__name__})."
        ) from None
