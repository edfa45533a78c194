"""What the synthesis worker shall draw: pure functions from prompts and settings to samples, seeds and units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fgl_app.errors import SynthesisError
from fgl_app.files import canonical_json, write_json
from fgl_app.prompts import PromptBudget
from fgl_app.rng import derive_seed

CPU_BATCH_SIZE = 32
"""Images drawn at a time on a CPU, whatever the settings say: at another shape the same noise gives pixels that round
differently, one in some 20,000, by one level."""

UNIT_SIZE = 64
"""Images per unit: what a crash can cost at most."""


@dataclass(frozen=True)
class DrawSettings:
    """Everything besides the prompt that an image depends on."""

    generator: str
    """Folder or hub id; ``tiny`` stays ``tiny``, wherever it is unpacked."""
    generator_revision: str
    """Revision of a hub id, or the checksum of the shipped model; empty for the newest."""
    scheduler: str
    """Solver of the denoising; ``own``: the pipeline's."""
    num_inference_steps: int
    guidance_scale: float
    generation_size: int
    """Side at which images are drawn, px; 0 for the pipeline's own."""
    stored_size: int
    """Larger images are reduced to this side, px."""
    seed: int
    """The run's seed."""

    def digest(self) -> str:
        """Hash that is equal for equal settings."""
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One image to draw."""

    label: int
    prompt: str
    negative: str
    """What the generator is steered away from."""
    sample_id: bytes
    """Identity, 16 bytes: hash of settings, label, prompt and index; no client appears in it."""
    noise_seed: int
    """Seed of the initial noise, derived from the identity alone."""


@dataclass(frozen=True)
class Unit:
    """Samples that are drawn and committed together."""

    unit_id: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Plan:
    """A whole synthetic training set."""

    settings: DrawSettings
    budget: tuple[PromptBudget, ...]
    negatives: dict[str, str]
    """Negative prompt by domain; ``""`` is a data set without domains."""
    embeddings: str
    """File of the embeddings that the budget names; empty where it holds texts."""
    device: str
    """``cpu``, ``cuda`` or ``cuda:N``."""
    batch_size: int
    """Images drawn at a time: the static shape at which every image of the plan is computed."""

    def units(self) -> list[Unit]:
        """Divide the samples, in the order of label, prompt and index, into units of :data:`UNIT_SIZE`."""
        digest = self.settings.digest()
        # Rounding depends on the kind of device and on the shape: units drawn otherwise are not mixed with these.
        arithmetic = f"{self.device.partition(':')[0]}/{self.batch_size}"
        samples = [
            _sample(digest, item, self.negatives.get(item.domain, ""), index)
            for item in sorted(self.budget)
            for index in range(item.num_images)
        ]
        return [
            Unit(_unit_id(arithmetic, samples[start : start + UNIT_SIZE]), tuple(samples[start : start + UNIT_SIZE]))
            for start in range(0, len(samples), UNIT_SIZE)
        ]

    def save(self, path: Path) -> None:
        """Write the plan for the worker; readable by the owner alone, because it holds prompts."""
        write_json(path, asdict(self), mode=0o600)

    @staticmethod
    def load(path: Path) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            SynthesisError: If the file is no plan.
        """
        try:
            value: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return Plan(
                DrawSettings(**value["settings"]),
                tuple(PromptBudget(**item) for item in value["budget"]),
                value["negatives"],
                value["embeddings"],
                value["device"],
                value["batch_size"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SynthesisError(
                f"{str(path)!r} must be a synthesis plan, but is none ({type(error).__name__})."
            ) from None


def _sample(settings_digest: str, item: PromptBudget, negative: str, index: int) -> Sample:
    # Equal prompts of different domains are different images.
    identity = canonical_json([settings_digest, item.label, item.prompt, negative, index, *filter(None, [item.domain])])
    sample_id = hashlib.sha256(identity).digest()[:16]
    return Sample(item.label, item.prompt, negative, sample_id, derive_seed(0, "noise", sample_id.hex()))


def _unit_id(arithmetic: str, samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256(arithmetic.encode() + b"".join(sample.sample_id for sample in samples))
    return digest.hexdigest()[:32]
