"""Our own denoising loop for Stable Diffusion 1.x and 2.x, where nearly all of the method's work is done.

It computes what the pipeline of diffusers computes from the same noise, and spends less: one static batch, solver
coefficients tabulated once, each prompt encoded once, its keys and values computed once for all steps, time embeddings
shared by the batch, guidance only where it is asked for, deep features reused between steps (DeepCache), images reduced
on the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fgl_app.compilation import can_compile, reproducible
from fgl_app.errors import ModelError
from fgl_app.synthesis.packing import pack
from fgl_app.synthesis.plan import DrawSettings
from fgl_app.synthesis.solvers import tabulate
from fgl_app.synthesis.unet import PlainUNet

_DECODED_PIXELS = 8 * 512 * 512
"""Pixels decoded at a time: the decoder needs more memory per image than the UNet."""
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""On a GPU, the first that can; on a Hopper cuDNN's multiplies 1.6 times as much a second as PyTorch's first choice."""
_ENCODE_BATCH = 16
"""Prompts encoded at a time, padded, so that no embedding depends on its neighbours."""


class LatentDiffusion:
    """A generator of the Stable Diffusion 1.x and 2.x family."""

    def __init__(self, pipeline: Any, settings: DrawSettings) -> None:
        """Take over a pipeline whose family says that our own loop draws it.

        Args:
            pipeline: A loaded ``StableDiffusionPipeline``.
            settings: Steps, guidance and sizes.

        Raises:
            ModelError: If the solver cannot make so many steps, or the decoder no image of that size.
        """
        self._pipeline = pipeline
        self._settings = settings
        self._device = pipeline.device
        self._dtype = pipeline.unet.dtype
        self._solver = tabulate(pipeline.scheduler, settings.num_inference_steps)
        self._last_use = self._solver.last_use()
        # 0-d tensors: numbers would be compiled anew at every step, and copying them then would stop the GPU.
        self._timesteps = torch.tensor([step.timestep for step in self._solver.steps], device=self._device)
        factor = pipeline.vae_scale_factor
        self._side = settings.generation_size or pipeline.unet.config.sample_size * factor
        if self._side % factor:
            raise ModelError(
                f"`generation-size` must be a multiple of {factor} for this generator, but is {self._side}. Use "
                f"{self._side - self._side % factor} or {self._side - self._side % factor + factor}."
            )
        self._latent_shape = (1, pipeline.unet.config.in_channels, *[self._side // factor] * 2)
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        unet = PlainUNet(pipeline.unet)
        pipeline.unet = None  # of its layers, those that are used live on in ours
        pack(unet)
        pack(pipeline.vae)
        self._unet, self._full, self._shallow = unet, unet.full, unet.shallow
        # Engines on other threads share the tokenizer, which cannot pad for two of them at once.
        self._encoding = threading.Lock()
        if self._device.type == "cuda" and can_compile("synthesis", "cuda"):
            self._full, self._shallow = reproducible(unet.full), reproducible(unet.shallow)
            pipeline.vae.decoder.forward = reproducible(pipeline.vae.decoder.forward)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[tuple[str | torch.Tensor, str]]) -> list[torch.Tensor]:
        """Encode pairs of prompt and negative prompt.

        Args:
            prompts: A prompt is a text, or the embedding ``[T, D]`` that a client sent in its place.

        Returns:
            One tensor a pair, ``[2, L, D]``: negative, positive; ``[1, L, D]`` where nothing is guided.
        """
        guided = self._settings.guidance_scale > 1
        encoded = self._encode_texts(
            [prompt for prompt, _ in prompts if isinstance(prompt, str)] + [text for _, text in prompts if guided]
        )
        conditions = []
        for prompt, negative in prompts:
            positive = encoded[prompt] if isinstance(prompt, str) else complete_embedding(prompt, self._pipeline)
            conditions.append(torch.stack([encoded[negative], positive] if guided else [positive]))
        return conditions

    @torch.inference_mode()
    def generate(self, conditions: Sequence[torch.Tensor], noise_seeds: Sequence[int]) -> torch.Tensor:
        """Draw one image per condition.

        Args:
            conditions: What :meth:`encode` returned, B of them.
            noise_seeds: Seed of each image's noise.

        Returns:
            float32 ``[B, 3, S, S]``, 0 to 1, on the generator's device.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in noise_seeds]
        # On a CPU, where several threads draw, nothing is set: what is set holds for all of them.
        on_gpu = self._device.type == "cuda"
        with sdpa_kernel(_ATTENTION, set_priority=True) if on_gpu else contextlib.nullcontext():
            return self._decode(self._denoise(torch.stack(list(conditions), 1), generators))

    def _denoise(self, text: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        settings = self._settings
        count = len(self._solver.steps)
        both = self._unet.context(text.flatten(0, 1))
        conditional = [(key[-len(generators) :], value[-len(generators) :]) for key, value in both]
        latents = {0: self._noise(generators) * self._solver.initial_scale}
        outputs: dict[int, torch.Tensor] = {}
        deep = None
        for number, step in enumerate(self._solver.steps):
            guided = len(text) == 2 and settings.guidance_start <= number / count < settings.guidance_stop
            fed = (latents[number] * step.input_scale).to(self._dtype, memory_format=torch.channels_last)
            context, rows = (both, 2 * len(fed)) if guided else (conditional, len(fed))
            time = self._unet.time_embedding(self._timesteps[number])
            if deep is not None and len(deep) > rows:
                deep = deep[-rows:]
            if deep is None or len(deep) < rows or number % settings.deep_cache_interval == 0:
                output, deep = self._full(fed, time, context)
            else:
                output = self._shallow(fed, time, context, deep)
            if guided:
                negative, positive = output.float().chunk(2)
                output = negative + settings.guidance_scale * (positive - negative)
            outputs[number] = output.float()
            following = sum(value * latents[index] for index, value in step.latents.items()) + sum(
                value * outputs[index] for index, value in step.outputs.items()
            )
            assert isinstance(following, torch.Tensor)
            latents[number + 1] = following + step.noise * self._noise(generators) if step.noise else following
            for index in [index for index in outputs if self._last_use[index] <= number]:
                del latents[index], outputs[index]
        return latents[count]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype, memory_format=torch.channels_last)
        chunk = max(1, _DECODED_PIXELS // self._side**2)
        images = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in scaled.split(chunk)])
        return (images / 2 + 0.5).clamp(0, 1)

    def _noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Draw one latent of noise per image, from its own generator, float32 ``[B, 4, H, W]``."""
        drawn = torch.cat([torch.randn(self._latent_shape, generator=generator) for generator in generators])
        # From pinned memory, so that nobody waits until the device has done all that it was asked before.
        return drawn.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else drawn

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        distinct = sorted(set(texts))
        encoded: dict[str, torch.Tensor] = {}
        for start in range(0, len(distinct), _ENCODE_BATCH):
            batch = distinct[start : start + _ENCODE_BATCH]
            padded = batch + [""] * (_ENCODE_BATCH - len(batch))
            with self._encoding:
                states, _ = self._pipeline.encode_prompt(padded, self._device, 1, False)
            encoded |= dict(zip(batch, states, strict=False))
        return encoded


def complete_embedding(embedding: torch.Tensor, pipeline: Any) -> torch.Tensor:
    """Bring a client's embedding to the length of the pipeline's context by repeating its end token's row.

    The padding of a text's embedding depends on the text and is not uploaded; the end token's row comes nearest to it.

    Args:
        embedding: ``[T, D]``.
        pipeline: Whose tokenizer and text encoder give length and width.

    Returns:
        ``[L, D]`` on the pipeline's device, in its text encoder's arithmetic.

    Raises:
        ModelError: If the pipeline's text encoder is not as wide as the embedding.
    """
    length, width = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size
    if embedding.shape[1] != width or len(embedding) > length:
        raise ModelError(
            f"Embeddings must be at most [{length}, {width}] for this generator, "
            f"but one is {list(embedding.shape)}. All nodes must use one `generator`."
        )
    whole = torch.cat([embedding, embedding[-1:].expand(length - len(embedding), -1)])
    return whole.to(pipeline.device, pipeline.text_encoder.dtype)
