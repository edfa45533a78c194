"""Solvers of the denoising as tables of coefficients, read off the schedulers of diffusers.

Every solver here is linear: its next latent is a fixed combination of the latents and the model's outputs so far, plus
noise for some. Stepping a scheduler on basis vectors instead of images yields the coefficients once, exactly as it
computes them, and the hot loop needs no scheduler.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from fgl_app.errors import ModelError
from fgl_app.synthesis.families import SOLVERS

SCHEDULERS: Mapping[str, Any] = {name: getattr(diffusers, kind) for name, kind in SOLVERS.items()}


@dataclass(frozen=True)
class Step:
    """One step from latent x_n to x_{n+1}.

    x_{n+1} = sum_k latents[k] x_k + sum_k outputs[k] f_k + noise z_n, where f_k is the model's output at step k and
    z_n standard normal.
    """

    timestep: float
    """What the model is told."""
    input_scale: float
    """The model is fed input_scale * x_n."""
    latents: Mapping[int, float]
    """Coefficients of the latents x_k, k <= n; zeros are left out."""
    outputs: Mapping[int, float]
    """Coefficients of the model's outputs f_k, k <= n; zeros are left out."""
    noise: float
    """Standard deviation of the fresh noise."""


@dataclass(frozen=True)
class Solver:
    """A whole trajectory."""

    initial_scale: float
    """x_0 is initial_scale times standard normal noise."""
    steps: tuple[Step, ...]

    def last_use(self) -> list[int]:
        """Return for every k the last step that reads x_k or f_k, so that the loop can drop them."""
        last = list(range(len(self.steps)))
        for number, step in enumerate(self.steps):
            for earlier in (*step.latents, *step.outputs):
                last[earlier] = number
        return last


def tabulate(scheduler: Any, num_inference_steps: int) -> Solver:
    """Read the coefficients off a scheduler of diffusers.

    Args:
        scheduler: One of :data:`SCHEDULERS` whose steps are linear, that is without clipping; it is not changed.
        num_inference_steps: Steps as its ``set_timesteps`` counts them; PNDM makes one more.

    Raises:
        ModelError: If it cannot make so many steps.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise ModelError(
            f"`num-inference-steps` must be a number of steps that {type(scheduler).__name__} can make, but is "
            f"{num_inference_steps} ({error}). Use fewer steps or another `scheduler`."
        ) from None
    count = len(scheduler.timesteps)
    # Component 2k of a vector is the coefficient of x_k, component 2k + 1 that of f_k.
    basis = torch.eye(2 * count)[:, None, :, None, None]
    steps = []
    for number, timestep in enumerate(scheduler.timesteps):
        latent, output = basis[2 * number], basis[2 * number + 1]
        scale = scheduler.scale_model_input(latent, timestep).flatten()[2 * number].item()
        row, noise = _probe(scheduler, timestep, latent, output)
        nonzero = {index: row[index].item() for index in row.nonzero().flatten().tolist()}
        steps.append(
            Step(
                timestep.item(),
                scale,
                {index // 2: value for index, value in nonzero.items() if index % 2 == 0},
                {index // 2: value for index, value in nonzero.items() if index % 2 == 1},
                noise,
            )
        )
    return Solver(float(scheduler.init_noise_sigma), tuple(steps))


def _probe(
    scheduler: Any, timestep: torch.Tensor, latent: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Step ``scheduler`` on basis vectors; return the coefficients and the standard deviation of the noise it adds."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return scheduler.step(output, timestep, latent, return_dict=False)[0].flatten(), 0.0
    # Two steps from the same state with two noises differ by the noise alone.
    twin = copy.deepcopy(scheduler)
    options: dict[str, Any] = {"return_dict": False}
    if "eta" in inspect.signature(scheduler.step).parameters:
        options["eta"] = 0.0  # as the pipelines call them
    noises = [torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    first, second = (
        each.step(output, timestep, latent, generator=torch.Generator().manual_seed(seed), **options)[0]
        for seed, each in enumerate((scheduler, twin))
    )
    difference = noises[0] - noises[1]
    noise = ((first - second) * difference).sum() / difference.square().sum()
    if noise.abs() < 1e-6:
        return first.flatten(), 0.0
    row = (first - noise * noises[0]).flatten()
    return torch.where(row.abs() < 1e-6, torch.zeros(()), row), noise.item()
