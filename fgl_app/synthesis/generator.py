"""Load a text-to-image pipeline and draw labelled images with it. The only module that imports diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file

from fgl_app import tiny
from fgl_app.data.images import resize
from fgl_app.errors import ModelError, SynthesisError
from fgl_app.foundation_models import locate
from fgl_app.synthesis.plan import DrawSettings, Sample

# SD 2.1's attention overflows in fp16, so that bf16 is the half precision on a GPU.
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
_SCHEDULERS: Mapping[str, Any] = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


def load_pipeline(generator: str, revision: str, device: torch.device, scheduler: str = "own") -> Any:
    """Load any text-to-image pipeline of diffusers, without its safety checker, which would blacken images.

    Args:
        generator: ``tiny``, a folder that ``save_pretrained`` wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        device: Where to run it.
        scheduler: ``own``, or the solver that takes the place of the pipeline's with the same noise schedule.

    Returns:
        A diffusers pipeline.

    Raises:
        ModelError: If it cannot be loaded.
    """
    source, pinned = locate(generator, revision, tiny.DIFFUSION)
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(
            source, revision=pinned, dtype=_DTYPES[device.type], use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`generator` must be a text-to-image pipeline that diffusers loads, but {generator!r} is not "
            f'({type(error).__name__}: {error}). Use "tiny" or a folder or hub id with safetensors weights.'
        ) from None
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    if scheduler != "own":
        pipeline.scheduler = _SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_embeddings(path: str, pipeline: Any) -> dict[str, torch.Tensor]:
    """Load embeddings and bring each to the length of the pipeline's context by repeating its end token's row.

    The padding of a text's embedding depends on the text and is not uploaded; the end token's row comes nearest to it.

    Args:
        path: A safetensors file of float16 ``[T, D]``.
        pipeline: Whose tokenizer gives the length.

    Returns:
        float32 ``[L, D]`` by name.

    Raises:
        ModelError: If the pipeline's text encoder is not as wide as the embeddings.
    """
    length, width = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size
    embeddings = {}
    for name, short in load_file(path).items():
        if short.shape[1] != width or len(short) > length:
            raise ModelError(
                f"Embeddings must be at most [{length}, {width}] for this generator, "
                f"but one is {list(short.shape)}. All nodes must use one `generator`."
            )
        embeddings[name] = torch.cat([short, short[-1:].expand(length - len(short), -1)]).float()
    return embeddings


def draw(
    pipeline: Any,
    samples: Sequence[Sample],
    settings: DrawSettings,
    batch_size: int,
    embeddings: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draw one image per sample.

    Each sample has its own CPU generator, seeded by the sample's identity, so that its noise does not depend on the
    batch; the last batch is padded, so that every image is computed at one static shape.

    Args:
        pipeline: What :func:`load_pipeline` returned.
        samples: What to draw, at least one.
        settings: Steps, guidance and sizes.
        batch_size: Images per call of the pipeline.
        embeddings: What the samples' prompts name, float32 ``[L, D]``; None if they are texts.

    Returns:
        uint8 ``[N, 3, S, S]``, in the order of ``samples``.

    Raises:
        SynthesisError: If the pipeline returns numbers that are not finite.
    """
    size = settings.generation_size
    options = {"height": size, "width": size} if size else {}
    parts = []
    for start in range(0, len(samples), batch_size):
        batch = list(samples[start : start + batch_size])
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        asked: dict[str, Any] = {"prompt": [sample.prompt for sample in padded]}
        if embeddings is not None:
            stacked = torch.stack([embeddings[sample.prompt] for sample in padded])
            asked = {"prompt_embeds": stacked.to(pipeline.device, pipeline.text_encoder.dtype)}
        if any(sample.negative for sample in padded):  # some pipelines have no negative prompt at all
            asked["negative_prompt"] = [sample.negative for sample in padded]
        output = pipeline(
            **asked,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(sample.noise_seed) for sample in padded],
            output_type="pt",
            **options,
        ).images[: len(batch)]
        if not torch.isfinite(output).all():
            raise SynthesisError(
                "The generator must return finite images, but returned NaN. Use fp32 or other settings."
            )
        parts.append(_to_uint8(output, settings.stored_size))
    return torch.cat(parts)


def _to_uint8(images: torch.Tensor, stored_size: int) -> torch.Tensor:
    """Float ``[N, C, H, W]`` in 0 to 1 to uint8 ``[N, 3, S, S]`` on the CPU, centre square, at most ``stored_size``."""
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    square = images[..., top : top + side, left : left + side].float().clamp(0, 1)
    pixels = (square * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).cpu()
    return resize(pixels.contiguous(), min(side, stored_size))
