"""Judges of drawn images: does a picture show its class, and may it be shown at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from fgl_app.errors import ModelError
from fgl_app.foundation_models import load_whole, locate, weights_variant

_ZERO_SHOT_TEMPLATE = "a photo of a {}"
"""CLIP's own (Radford et al. 2021, Section 3.1.4)."""


class Judge(Protocol):
    """Accepts or rejects images."""

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return bool ``[B]`` for uint8 images ``[B, 3, S, S]`` on the CPU and int64 labels ``[B]``."""


class LabelJudge:
    """Accepts an image if a classifier finds its label the likeliest of the run's classes.

    Args:
        source: Hub id or folder of an image classifier whose labels include the class names, or of a zero-shot model
            such as CLIP or SigLIP.
        revision: Git revision of a hub id; empty for the newest.
        class_names: The run's K classes, in the order of their labels.
        device: Where to run it.

    Raises:
        ModelError: If it cannot be loaded, or does not know a class.
    """

    def __init__(self, source: str, revision: str, class_names: Sequence[str], device: torch.device) -> None:
        """Load the model."""
        path, pinned = locate(source, revision)
        self._device = device
        try:
            config = AutoConfig.from_pretrained(path, revision=pinned, trust_remote_code=False)
            self._zero_shot = hasattr(config, "text_config")
            kind = AutoModelForZeroShotImageClassification if self._zero_shot else AutoModelForImageClassification
            self._model: Any = load_whole(
                kind, path, revision=pinned, variant=weights_variant(path, pinned), use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
            self._model.to(device).eval()
            self._processor: Any = (AutoProcessor if self._zero_shot else AutoImageProcessor).from_pretrained(
                path, revision=pinned, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`filter` must be an image classifier or a zero-shot model that transformers loads, but {source!r} is "
                f"not ({type(error).__name__}). Use a folder or hub id with safetensors weights."
            ) from None
        if self._zero_shot:
            # Tokenized once, because threads share this judge and a tokenizer serves one at a time.
            self._texts: Any = self._processor(
                text=[_ZERO_SHOT_TEMPLATE.format(name) for name in class_names],
                return_tensors="pt", padding="max_length", truncation=True,
            ).to(device)  # fmt: skip
            self._processor = self._processor.image_processor
        else:
            known = {_plain(name): int(index) for index, name in self._model.config.id2label.items()}
            unknown = [number for number, name in enumerate(class_names) if _plain(name) not in known]
            if unknown:  # its number, because a name may be a client's text
                raise ModelError(
                    f"`filter` must know every class, but {source!r} does not know number {unknown[0]}, counted from "
                    "0. Use a classifier of these classes or a zero-shot model."
                )
            self._columns = [known[_plain(name)] for name in class_names]

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return whether the likeliest class of each image is its label; see :class:`Judge`."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        if self._zero_shot:
            scores = self._model(**self._texts, **inputs).logits_per_image
        else:
            scores = self._model(**inputs).logits[:, self._columns]
        accepted: torch.Tensor = scores.argmax(1).cpu() == labels
        return accepted


class SafetyJudge:
    """Rejects what the safety checker of Stable Diffusion 1.x flags."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        """Take the checker of a loaded pipeline.

        Raises:
            ModelError: If it has none.
        """
        if getattr(pipeline, "safety_checker", None) is None:
            raise ModelError(
                "`safety-checker` needs a generator that has one, as Stable Diffusion 1.x does, but this one has none. "
                "Use safety-checker=false."
            )
        self._checker, self._processor, self._device = pipeline.safety_checker, pipeline.feature_extractor, device

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return whether nothing was flagged; see :class:`Judge`."""
        inputs = self._processor(list(images), return_tensors="pt").pixel_values
        # The checker blackens what it flags in the second argument: a copy, which nobody sees.
        dtype = next(self._checker.parameters()).dtype
        _, flagged = self._checker(clip_input=inputs.to(self._device, dtype), images=images.float().numpy().copy())
        return ~torch.tensor(flagged)


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").strip()
