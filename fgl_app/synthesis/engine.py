"""Draw units: batches of one shape, memory that runs out, images that are no numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fgl_app.data.images import resize
from fgl_app.errors import SynthesisError
from fgl_app.synthesis.generator import Generator
from fgl_app.synthesis.plan import Plan, Sample, Unit


@dataclass(frozen=True)
class DrawnUnit:
    """What became of a unit's samples."""

    tensors: dict[str, torch.Tensor]
    """Of the sound images, as the store holds them."""
    quarantined: list[str]
    """Identities, hexadecimal, of those that were not finite in fp32 either."""
    seconds: float
    """Wall-clock seconds of drawing."""


@dataclass
class Engine:
    """Draws the units of one plan with one generator."""

    plan: Plan
    generator: Generator
    embeddings: Mapping[str, torch.Tensor]
    """``[T, D]`` by the name that stands in the place of a prompt; empty where prompts are texts."""
    load_exact: Callable[[], Generator]
    """Loads the generator in fp32, for images that are not finite otherwise."""
    batch_size: int
    """Images at a time, at first the plan's; halved when memory runs out."""
    _exact: Generator | None = None
    _encoded: dict[tuple[str, str], Any] = field(default_factory=dict)

    def draw(self, unit: Unit) -> DrawnUnit:
        """Draw the samples of a unit.

        Raises:
            SynthesisError: If not even one image fits into memory.
        """
        started = time.monotonic()
        images, finite = self._generate(self.generator, unit.samples)
        broken = [place for place in range(len(unit.samples)) if not finite[place]]
        if broken:
            if self._exact is None:
                self._exact = self.load_exact()
            again, sound = self._generate(self._exact, [unit.samples[place] for place in broken])
            images[broken], finite[broken] = again, sound
        kept = [sample for sample, sound in zip(unit.samples, finite.tolist(), strict=True) if sound]
        ids = bytearray(b"".join(sample.sample_id for sample in kept))
        tensors = {
            "image": images[finite],
            "label": torch.tensor([sample.label for sample in kept], dtype=torch.int64),
            "seed": torch.tensor([sample.noise_seed for sample in kept], dtype=torch.int64),
            "sample_id": (
                torch.frombuffer(ids, dtype=torch.uint8) if ids else torch.zeros(0, dtype=torch.uint8)
            ).reshape(-1, 16),
        }
        lost = [
            sample.sample_id.hex() for sample, sound in zip(unit.samples, finite.tolist(), strict=True) if not sound
        ]
        return DrawnUnit(tensors, lost, round(time.monotonic() - started, 3))

    def _generate(self, generator: Generator, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 ``[N, 3, S, S]`` on the CPU, and bool ``[N]``: whether the image is finite."""
        conditions = self._encode(generator, samples)
        parts, finite = [], []
        start = 0
        while start < len(samples):
            # The last batch is padded, so that every image is computed at one static shape.
            places = [min(start + offset, len(samples) - 1) for offset in range(self.batch_size)]
            try:
                drawn = generator.generate(
                    [conditions[place] for place in places], [samples[place].noise_seed for place in places]
                )
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise SynthesisError(
                        "The generator must fit into memory with one image at a time, but does not. Use a larger "
                        "device, a smaller `generation-size` or another `generator`."
                    ) from None
                self.batch_size //= 2
                torch.cuda.empty_cache()
                continue
            drawn = drawn[: len(samples) - start]
            finite.append(drawn.flatten(1).isfinite().all(1).cpu())
            parts.append(to_uint8(drawn, self.plan.settings.stored_size).cpu())
            start += len(drawn)
        return torch.cat(parts), torch.cat(finite)

    def _encode(self, generator: Generator, samples: Sequence[Sample]) -> list[Any]:
        """Encode each distinct prompt once; units are sorted by prompt, so that only the last unit's are kept."""
        keys = [(sample.prompt, sample.negative) for sample in samples]
        if generator is not self.generator:
            return generator.encode([(self.embeddings.get(prompt, prompt), negative) for prompt, negative in keys])
        new = [key for key in dict.fromkeys(keys) if key not in self._encoded]
        fresh = generator.encode([(self.embeddings.get(prompt, prompt), negative) for prompt, negative in new])
        self._encoded = {key: self._encoded[key] for key in keys if key in self._encoded} | dict(
            zip(new, fresh, strict=True)
        )
        return [self._encoded[key] for key in keys]


def to_uint8(images: torch.Tensor, stored_size: int) -> torch.Tensor:
    """Float ``[N, C, H, W]`` in 0 to 1 to uint8 ``[N, 3, S, S]``: centre square, at most ``stored_size`` px."""
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    square = images[..., top : top + side, left : left + side].float().nan_to_num().clamp(0, 1)
    pixels = (square * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return resize(pixels.contiguous(), min(side, stored_size))
