"""What the synthesis worker shall draw: pure functions from prompts and settings to samples, seeds and units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fgl_app.errors import SynthesisError
from fgl_app.files import canonical_json, write_json
from fgl_app.prompts import PromptBudget
from fgl_app.rng import derive_seed

UNIT_SIZE = 64
"""Images per unit: what a crash can cost at most."""

UNJUDGED_ATTEMPTS = 3
"""``filter_attempts`` of settings without a judge, whatever the user says: the value that it has by default."""
LARGE_ENOUGH = 256
"""``stored_size`` of settings whose images are not larger, whatever the user says: the value that it has by default."""

CPU_BATCH_SIZE = UNIT_SIZE
"""Images drawn at a time on a CPU, whatever the settings say: at another shape the same noise gives pixels that round
differently, one in some 20,000, by one level."""


def draw_batch_size(device: str, asked: int) -> int:
    """Return the number of images drawn at a time on a device, where the settings ask for ``asked``."""
    return CPU_BATCH_SIZE if device == "cpu" else asked


def arithmetic_of(device: str, batch_size: int) -> str:
    """Name what rounding depends on, the kind of device and the shape: images drawn otherwise are not mixed."""
    return f"{device.partition(':')[0]}/{batch_size}"


@dataclass(frozen=True)
class DrawSettings:
    """Everything besides the prompt that an image depends on."""

    generator: str
    """Folder or hub id; ``tiny`` stays ``tiny``, wherever it is unpacked."""
    generator_revision: str
    """Revision of a hub id, or the checksum of the shipped model; empty for the newest."""
    lora: str
    """Folder or hub id of LoRA weights that are fused into the generator; empty for none."""
    decoder: str
    """Folder or hub id of a small decoder in the place of the generator's; empty for none."""
    scheduler: str
    """Solver of the denoising; ``own``: the pipeline's."""
    num_inference_steps: int
    guidance_scale: float
    guidance_start: float
    """Share of the steps before guidance begins, 0 to 1."""
    guidance_stop: float
    """Share of the steps after which guidance ends, 0 to 1 (limited-interval guidance, arXiv 2404.07724)."""
    deep_cache_interval: int
    """The deep layers are evaluated at every so manieth step; 1 for every step."""
    safety_checker: bool
    """Whether the generator's own safety checker rejects images."""
    filter: str
    """Folder or hub id of the model that rejects images which do not show their class; empty for none."""
    filter_revision: str
    """Revision of a hub id; empty for the newest."""
    filter_attempts: int
    """Times that a rejected image is drawn again, from other noise, before it is left out."""
    generation_size: int
    """Side at which images are drawn, px; 0 for the pipeline's own."""
    stored_size: int
    """Larger images are reduced to this side, px."""
    seed: int
    """The run's seed."""
    contents: str = ""
    """Hash of the content of the folders among generator, LoRA, decoder and filter; empty if none is a folder."""
    filter_classes: tuple[str, ...] = ()
    """Classes between which the filter decides; empty without one."""
    call: str = ""
    """In what the pipeline is called otherwise than that of Stable Diffusion, see :class:`~.families.Family`."""

    def digest(self) -> str:
        """Hash that is equal for equal settings."""
        # An image from hub ids or shipped models keeps the identity that it had before there were these three.
        later = ("contents", "filter_classes", "call")
        told = {key: value for key, value in asdict(self).items() if key not in later or value}
        return hashlib.sha256(canonical_json(told)).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One image to draw."""

    label: int
    prompt: str
    negative: str
    """What the generator is steered away from."""
    sample_id: bytes
    """Identity, 16 bytes: hash of settings, arithmetic, label, prompt and index; no client appears in it."""
    noise_seed: int
    """Seed of the initial noise, derived from settings, label, prompt and index alone."""
    domain: str
    """Empty for a data set without domains."""


@dataclass(frozen=True)
class Unit:
    """Samples that are drawn and committed together."""

    samples: tuple[Sample, ...]

    @property
    def unit_id(self) -> str:
        """Name in the store: a hash of the samples' identities."""
        return hashlib.sha256(b"".join(sample.sample_id for sample in self.samples)).hexdigest()[:32]


@dataclass(frozen=True)
class Plan:
    """A whole synthetic training set."""

    settings: DrawSettings
    budget: tuple[PromptBudget, ...]
    negatives: dict[str, str]
    """Negative prompt by domain; ``""`` is a data set without domains."""
    class_names: tuple[str, ...]
    """The run's K classes as prompts name them, in the order of their labels."""
    embeddings: str
    """File of the embeddings that the budget names; empty where it holds texts."""
    device: str
    """``cpu``, ``cuda`` or ``cuda:N``."""
    batch_size: int
    """Images drawn at a time: the static shape at which every image of the plan is computed."""

    @property
    def num_images(self) -> int:
        """Size of the synthetic set."""
        return sum(item.num_images for item in self.budget)

    def samples(self) -> Iterator[Sample]:
        """Yield every sample, in the order of label, prompt and index."""
        digest = self.settings.digest()
        arithmetic = arithmetic_of(self.device, self.batch_size).encode()
        for item in sorted(self.budget):
            negative = self.negatives.get(item.domain, "")
            # Equal prompts of different domains are different images.
            of_prompt = hashlib.sha256(canonical_json([digest, item.label, item.prompt, negative, item.domain]))
            for index in range(item.num_images):
                identity = of_prompt.copy()
                identity.update(index.to_bytes(8, "big"))
                seed = derive_seed(0, "noise", identity.hexdigest())
                identity.update(arithmetic)
                yield Sample(item.label, item.prompt, negative, identity.digest()[:16], seed, item.domain)

    def labels(self) -> list[int]:
        """Return the class of every sample, in the order of :meth:`samples`."""
        return [item.label for item in sorted(self.budget) for _ in range(item.num_images)]

    def units(self) -> Iterator[Unit]:
        """Divide the samples into units of :data:`UNIT_SIZE`, one at a time: a plan may hold millions."""
        samples = self.samples()
        while part := tuple(islice(samples, UNIT_SIZE)):
            yield Unit(part)

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
            settings = value["settings"]
            return Plan(
                DrawSettings(**settings | {"filter_classes": tuple(settings.get("filter_classes", ()))}),
                tuple(PromptBudget(**item) for item in value["budget"]),
                value["negatives"],
                tuple(value["class_names"]),
                # Another machine may know the folder, which holds both files, by another name.
                str(path.with_name(Path(value["embeddings"]).name)) if value["embeddings"] else "",
                value["device"],
                value["batch_size"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SynthesisError(
                f"{str(path)!r} must be a synthesis plan, but is none ({type(error).__name__})."
            ) from None
