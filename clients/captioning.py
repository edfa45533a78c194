"""Caption images with BLIP-2. The only module that imports vision-language models."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from fgl_app import tiny
from fgl_app.errors import ModelError

_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
_LOGGER = logging.getLogger("flwr.fgl.captioning")


class Blip2Captioner:
    """A BLIP-2 model that captions batches of images.

    Args:
        source: ``tiny`` (shipped), a folder that ``save_pretrained`` wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        batch_size: Images captioned at a time.
        max_new_tokens: Longest caption, tokens.
        device: Where to run the model.

    Raises:
        ModelError: If the model cannot be loaded, or would not see the images.
    """

    def __init__(
        self, source: str, *, revision: str, batch_size: int, max_new_tokens: int, device: torch.device
    ) -> None:
        """Load processor and model."""
        path = str(tiny.folder_of(tiny.CAPTIONER)) if source == "tiny" else os.path.expanduser(source)
        pinned = revision if revision and source != "tiny" and not Path(path).is_dir() else None
        try:
            self._processor: Any = AutoProcessor.from_pretrained(path, revision=pinned)
            self._model: Any = Blip2ForConditionalGeneration.from_pretrained(
                path, revision=pinned, dtype=_DTYPES[device.type], use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`captioner` must be a BLIP-2 model that transformers loads, but {source!r} is not "
                f'({type(error).__name__}: {error}). Use "tiny" or Salesforce/blip2-opt-2.7b.'
            ) from None
        self._model.to(device).eval()
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._device = device

    def __call__(self, images: torch.Tensor) -> list[str]:
        """Caption images by greedy search.

        Args:
            images: uint8 ``[N, 3, S, S]``.

        Returns:
            N captions, blanks at the ends removed.
        """
        captions: list[str] = []
        with tqdm(total=len(images), desc="captioning", unit="image", ascii=True, mininterval=5.0) as bar:
            for start in range(0, len(images), self._batch_size):
                batch = images[start : start + self._batch_size]
                captions += self._caption(batch)
                bar.update(len(batch))
        return captions

    @torch.inference_mode()
    def _caption(self, batch: torch.Tensor) -> list[str]:
        inputs = self._processor(images=list(batch), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._device, self._model.dtype)
        # Without a text prompt the model itself puts its query tokens before the BOS token, so that it sees the image
        # whatever the processor's `num_query_tokens` says.
        ids = self._model.generate(pixel_values=pixels, max_new_tokens=self._max_new_tokens, do_sample=False)
        decoded: list[str] = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [caption.strip() for caption in decoded]
