"""Load a text-to-image pipeline and run it behind one small interface."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny, AutoPipelineForText2Image

from fgl_app import tiny
from fgl_app.errors import ModelError
from fgl_app.foundation_models import load_whole, locate, weights_variant
from fgl_app.synthesis.families import Family, read_family
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

    def __init__(self, pipeline: Any, settings: DrawSettings, family: Family) -> None:
        """Take over a loaded pipeline of that family."""
        self._pipeline = pipeline
        self._settings = settings
        self._family = family
        self._of_thread = threading.local()

    def encode(self, prompts: Sequence[tuple[str | torch.Tensor, str]]) -> list[tuple[str | torch.Tensor, str]]:
        """Return the pairs: the pipeline encodes them itself."""
        return list(prompts)

    def generate(
        self, conditions: Sequence[tuple[str | torch.Tensor, str]], noise_seeds: Sequence[int]
    ) -> torch.Tensor:
        """Draw as the pipeline does; see :class:`Generator`.

        Some pipelines take no negative prompt for another thing than an empty one, and in a batch all or none have one.
        """
        steered = torch.tensor([bool(negative) for _, negative in conditions])
        if steered.any() and not steered.all():
            with_one, without = (self._call(conditions, noise_seeds, asked) for asked in (True, False))
            return torch.where(steered[:, None, None, None].to(with_one.device), with_one, without)
        return self._call(conditions, noise_seeds, bool(steered.all()))

    def _call(
        self, conditions: Sequence[tuple[str | torch.Tensor, str]], noise_seeds: Sequence[int], with_negative: bool
    ) -> torch.Tensor:
        settings, family, pipeline = self._settings, self._family, self._own_pipeline()
        asked = family.options(settings)
        embeddings = [prompt for prompt, _ in conditions if isinstance(prompt, torch.Tensor)]
        if embeddings:
            asked["prompt_embeds"] = torch.stack([complete_embedding(item, pipeline) for item in embeddings])
        else:
            asked["prompt"] = [prompt for prompt, _ in conditions]
        if family.takes_negative and family.is_guided(settings) and (with_negative or family.needs_negative):
            asked["negative_prompt"] = [negative for _, negative in conditions]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in noise_seeds]
        images: torch.Tensor = pipeline(**asked, generator=generators).images
        size = settings.generation_size
        if size and tuple(images.shape[-2:]) != (size, size):
            raise ModelError(
                f"`generation-size` must be a side at which {family.name} draws, but asked for {size} px it draws "
                f"{images.shape[-1]} x {images.shape[-2]}. Use a multiple of 32, or 0 for its own size."
            )
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
    family = read_family(settings.generator, settings.generator_revision, settings.scheduler)
    windowed = (settings.guidance_start, settings.guidance_stop, settings.deep_cache_interval) != (0.0, 1.0, 1)
    if settings.call != family.call or (windowed and not family.own_loop):
        raise ModelError(
            f"A plan must hold no setting that {family.name} ignores, such as a guidance window, but this one does. "
            "Start the run again with this version of the application."
        )
    pipeline = load_pipeline(settings, device, dtype)
    return LatentDiffusion(pipeline, settings) if family.own_loop else PipelineCall(pipeline, settings, family)


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
    family = read_family(settings.generator, settings.generator_revision, settings.scheduler)
    source, pinned = locate(settings.generator, settings.generator_revision, tiny.DIFFUSION)
    try:
        parts = _load_parts(family, source, pinned, chosen)
        pipeline = AutoPipelineForText2Image.from_pretrained(
            source, revision=pinned, dtype=chosen, use_safetensors=True, trust_remote_code=False, **parts
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`generator` must be a text-to-image pipeline that diffusers loads, but {settings.generator!r} is not "
            f'({type(error).__name__}: {error}). Use "tiny" or a folder or hub id with safetensors weights.'
        ) from None
    family.check_solver(settings.scheduler, settings.num_inference_steps)
    if settings.scheduler != "own":
        pipeline.scheduler = SCHEDULERS[settings.scheduler].from_config(pipeline.scheduler.config)
    if settings.lora:
        _fuse_lora(pipeline, settings.lora)
    if settings.decoder:
        pipeline.vae = _load_decoder(settings.decoder, chosen)
    if getattr(pipeline, "safety_checker", None) is not None and not checked:
        pipeline.safety_checker = None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _load_parts(family: Family, source: str, pinned: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Load the parts of a pipeline one by one, each with all of its weights, in half precision where there is no other.

    The pipeline itself would draw weights that its files lack at random.
    """
    parts: dict[str, Any] = {}
    homes = {"diffusers": diffusers, "transformers": transformers}
    for name, (library, named) in family.components.items():
        # A safety checker is a class of its pipeline's package.
        kind = getattr(homes.get(library) or getattr(diffusers.pipelines, library, None), named, None)
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            parts[name] = load_whole(
                kind, source, subfolder=name, revision=pinned, dtype=dtype, use_safetensors=True,
                variant=weights_variant(source, pinned, name),
            )  # fmt: skip
    return parts


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
        path, pinned = locate(decoder, "")
        return load_whole(
            AutoencoderTiny, path, dtype=dtype, use_safetensors=True, variant=weights_variant(path, pinned)
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`decoder` must be a folder or hub id of an AutoencoderTiny such as madebyollin/taesd, but {decoder!r} is "
            f"none ({type(error).__name__})."
        ) from None
