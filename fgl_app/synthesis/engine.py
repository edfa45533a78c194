"""Draw units: batches of one shape, memory that runs out, images that are no numbers or show something else."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fgl_app.data.images import resize
from fgl_app.errors import SynthesisError
from fgl_app.rng import derive_seed
from fgl_app.synthesis.generator import Generator
from fgl_app.synthesis.judges import Judge
from fgl_app.synthesis.plan import Plan, Sample, Unit

NOT_FINITE, REJECTED = "not finite", "rejected"
"""Why an image is left out: no number in fp32 either; rejected by a judge every time."""
_KEPT_CONDITIONS = 256
"""Encoded prompts that are kept, 80 MB of Stable Diffusion's."""


@dataclass(frozen=True)
class DrawnUnit:
    """What became of a unit's samples."""

    tensors: dict[str, torch.Tensor]
    """Of the images that are kept, as the store holds them."""
    left_out: dict[str, str]
    """Identities, hexadecimal, of those that are not, with the reason."""
    judged: dict[str, tuple[int, int]]
    """Numbers of images that were judged and rejected, by ``label`` or ``label:domain``."""
    seconds: float
    """Wall-clock seconds of drawing."""
    batch_size: int
    """Images drawn at a time in the end: less than the plan's where memory ran out."""


@dataclass
class Engine:
    """Draws the units of one plan with one generator."""

    plan: Plan
    generator: Generator
    embeddings: Mapping[str, torch.Tensor]
    """``[T, D]`` by the name that stands in the place of a prompt; empty where prompts are texts."""
    load_exact: Callable[[], Generator]
    """Gives the generator in fp32, for images that are not finite otherwise."""
    batch_size: int
    """Images at a time, at first the plan's; halved when memory runs out."""
    judges: Sequence[Judge] = ()
    """Whoever rejects an image has it drawn again from other noise."""
    _encoded: dict[tuple[str, str], Any] = field(default_factory=dict)
    _exact: Generator | None = None

    def draw(self, unit: Unit) -> DrawnUnit:
        """Draw the samples of a unit.

        Raises:
            SynthesisError: If not even one image fits into memory.
        """
        started = time.monotonic()
        samples = list(unit.samples)
        images, finite = self._draw_finite(samples)
        judged: Counter[str] = Counter()
        rejections: Counter[str] = Counter()
        places = [place for place in range(len(samples)) if finite[place]] if self.judges else []
        for attempt in range(1, self.plan.settings.filter_attempts + 2):
            rejected = [
                place for place, kept in zip(places, self._judge(images, samples, places), strict=True) if not kept
            ]
            judged.update(_group(samples[place]) for place in places)
            rejections.update(_group(samples[place]) for place in rejected)
            places = rejected
            if not places or attempt > self.plan.settings.filter_attempts:
                break
            for place in places:
                seed = derive_seed(0, "again", unit.samples[place].noise_seed, attempt)
                samples[place] = replace(unit.samples[place], noise_seed=seed)
            images[places], finite[places] = self._draw_finite([samples[place] for place in places])
            places = [place for place in places if finite[place]]
        reasons = {place: NOT_FINITE for place in range(len(samples)) if not finite[place]} | dict.fromkeys(
            places, REJECTED
        )
        kept = [place for place in range(len(samples)) if place not in reasons]
        ids = np.frombuffer(b"".join(samples[place].sample_id for place in kept), np.uint8)
        tensors = {
            "image": images[kept],
            "label": torch.tensor([samples[place].label for place in kept], dtype=torch.int64),
            "seed": torch.tensor([samples[place].noise_seed for place in kept], dtype=torch.int64),
            "sample_id": torch.tensor(ids).reshape(-1, 16),
        }
        return DrawnUnit(
            tensors,
            {samples[place].sample_id.hex(): reason for place, reason in reasons.items()},
            {group: (count, rejections[group]) for group, count in sorted(judged.items())},
            round(time.monotonic() - started, 3),
            self.batch_size,
        )

    def _judge(self, images: torch.Tensor, samples: Sequence[Sample], places: Sequence[int]) -> list[bool]:
        """Return whether every judge accepts the images at ``places``; fewer at a time where memory runs out."""
        labels = torch.tensor([samples[place].label for place in places], dtype=torch.int64)
        kept: list[bool] = []
        at_a_time = max(1, len(places))
        while len(kept) < len(places):
            part = slice(len(kept), len(kept) + at_a_time)
            of_part = images[list(places[part])]
            try:
                accepted = [judge(of_part, labels[part]) for judge in self.judges]
            except torch.OutOfMemoryError:
                if at_a_time == 1:
                    raise SynthesisError(
                        "`filter` must fit into memory beside the generator with one image at a time, but does not. "
                        "Use a larger device or a smaller `filter`."
                    ) from None
                at_a_time //= 2
                torch.cuda.empty_cache()
                continue
            kept += torch.stack(accepted).all(0).tolist()
        return kept

    def _draw_finite(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw images; what is not finite is drawn once more in fp32, where that fits into memory.

        Returns:
            uint8 ``[N, 3, S, S]`` on the CPU, and bool ``[N]``: whether the image is finite.
        """
        images, finite, self.batch_size = self._generate(self.generator, samples, self.batch_size)
        broken = [place for place in range(len(samples)) if not finite[place]]
        if broken:
            # With memory for fewer at a time in fp32, the others are drawn at the batch size that they had.
            with contextlib.suppress(torch.OutOfMemoryError):
                self._exact = self._exact or self.load_exact()
                images[broken], finite[broken], _ = self._generate(
                    self._exact, [samples[place] for place in broken], self.batch_size
                )
        return images, finite

    def _generate(
        self, generator: Generator, samples: Sequence[Sample], batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return images and whether they are finite, and how many were drawn at a time in the end."""
        conditions = self._encode(generator, samples)
        parts, finite = [], []
        start = 0
        while start < len(samples):
            # The last batch is padded, so that every image is computed at one static shape.
            places = [min(start + offset, len(samples) - 1) for offset in range(batch_size)]
            try:
                drawn = generator.generate(
                    [conditions[place] for place in places], [samples[place].noise_seed for place in places]
                )
            except torch.OutOfMemoryError:
                if self._exact is not None and generator is self.generator:
                    self._exact = None  # loaded anew for the next image that needs it: all others keep their batch
                    gc.collect()
                    torch.cuda.empty_cache()
                    continue
                if batch_size == 1:
                    if generator is not self.generator:
                        raise
                    raise SynthesisError(
                        "The generator must fit into memory with one image at a time, but does not. Use a larger "
                        "device, a smaller `generation-size` or another `generator`."
                    ) from None
                batch_size //= 2
                torch.cuda.empty_cache()
                continue
            drawn = drawn[: len(samples) - start]
            finite.append(drawn.flatten(1).isfinite().all(1))
            parts.append(to_uint8(drawn, self.plan.settings.stored_size))
            start += len(drawn)
        # Copied at the end: a GPU need not be waited for in between.
        return torch.cat(parts).cpu(), torch.cat(finite).cpu(), batch_size

    def _encode(self, generator: Generator, samples: Sequence[Sample]) -> list[Any]:
        """Encode each distinct prompt once, as long as it is among the last :data:`_KEPT_CONDITIONS`."""
        keys = [(sample.prompt, sample.negative) for sample in samples]
        if generator is not self.generator:
            return generator.encode([(self.embeddings.get(prompt, prompt), negative) for prompt, negative in keys])
        new = [key for key in dict.fromkeys(keys) if key not in self._encoded]
        fresh = generator.encode([(self.embeddings.get(prompt, prompt), negative) for prompt, negative in new])
        used = {key: self._encoded.pop(key) for key in dict.fromkeys(keys) if key in self._encoded}
        used |= zip(new, fresh, strict=True)
        self._encoded = dict(list((self._encoded | used).items())[-_KEPT_CONDITIONS:])
        return [used[key] for key in keys]


def _group(sample: Sample) -> str:
    return f"{sample.label}:{sample.domain}" if sample.domain else str(sample.label)


def to_uint8(images: torch.Tensor, stored_size: int) -> torch.Tensor:
    """Float ``[N, C, H, W]`` in 0 to 1 to uint8 ``[N, 3, S, S]``: centre square, at most ``stored_size`` px."""
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    square = images[..., top : top + side, left : left + side].float().nan_to_num().clamp(0, 1)
    pixels = (square * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return resize(pixels.contiguous(), min(side, stored_size))
