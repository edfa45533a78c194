"""Load a text-to-image pipeline and draw labelled images with it. The only module that imports diffusers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image

from fgl_app import tiny
from fgl_app.data.images import resize
from fgl_app.errors import ModelError, SynthesisError
from fgl_app.synthesis.plan import DrawSettings, Sample

# SD 2.1's attention overflows in fp16, so that bf16 is the half precision on a GPU.
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def load_pipeline(generator: str, revision: str, device: torch.device) -> Any:
    """Load any text-to-image pipeline of diffusers, without its safety checker, which would blacken images.

    Args:
        generator: ``tiny``, a folder that ``save_pretrained`` wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        device: Where to run it.

    Returns:
        A diffusers pipeline.

    Raises:
        ModelError: If it cannot be loaded.
    """
    source = str(tiny.folder_of(tiny.DIFFUSION)) if generator == "tiny" else os.path.expanduser(generator)
    pinned = revision if revision and generator != "tiny" and not Path(source).is_dir() else None
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
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw(pipeline: Any, samples: Sequence[Sample], settings: DrawSettings, batch_size: int) -> torch.Tensor:
    """Draw one image per sample.

    Each sample has its own CPU generator, seeded by the sample's identity, so that its noise does not depend on the
    batch; the last batch is padded, so that every image is computed at one static shape.

    Args:
        pipeline: What :func:`load_pipeline` returned.
        samples: What to draw, at least one.
        settings: Steps, guidance, negative prompt and stored size.
        batch_size: Images per call of the pipeline.

    Returns:
        uint8 ``[N, 3, S, S]``, in the order of ``samples``.

    Raises:
        SynthesisError: If the pipeline returns numbers that are not finite.
    """
    # Some pipelines have no negative prompt at all.
    steering = {"negative_prompt": [settings.negative_prompt] * batch_size} if settings.negative_prompt else {}
    parts = []
    for start in range(0, len(samples), batch_size):
        batch = list(samples[start : start + batch_size])
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        output = pipeline(
            prompt=[sample.prompt for sample in padded],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(sample.noise_seed) for sample in padded],
            output_type="pt",
            **steering,
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
