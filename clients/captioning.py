"""Caption images with BLIP-2 or another vision-language model. The only module that imports such models."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from fgl_app import tiny
from fgl_app.errors import ModelError
from fgl_app.files import cache_folder, canonical_json, set_mode
from fgl_app.foundation_models import load_whole, locate, weights_variant

_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "4bit": torch.bfloat16,
}  # fmt: skip
_INSTRUCTION = "Describe this image in one short sentence."
"""What a captioner that follows instructions is asked."""
_TASK = "<CAPTION>"
"""What Florence-2 calls captioning."""


class HubCaptioner:
    """A model that captions batches of images: BLIP, BLIP-2, Florence-2, SmolVLM and whatever answers like them.

    What it is asked depends on its processor: a request where it has a chat template, its task where it names one of
    captioning, else nothing.

    Args:
        source: ``tiny`` (shipped), a folder that ``save_pretrained`` wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16`` or ``4bit`` (weights of 4 bits: by bitsandbytes,
            which needs a GPU to be fast, or else by torchao, which keeps each in a byte).
        max_new_tokens: Longest caption, tokens.
        device: Where to run the model.

    Raises:
        ModelError: If the model cannot be loaded, needs a package that is missing, or does not see the images.
    """

    def __init__(self, source: str, *, revision: str, dtype: str, max_new_tokens: int, device: torch.device) -> None:
        """Load processor and model."""
        path, pinned = locate(source, revision, tiny.CAPTIONER)
        chosen = resolved_dtype(dtype, device)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(path, revision=pinned, trust_remote_code=False)
            self._model: Any = load_whole(
                AutoModelForImageTextToText, path, revision=pinned, dtype=_DTYPES[chosen], use_safetensors=True,
                variant=weights_variant(path, pinned), trust_remote_code=False, **_quantization(chosen, device),
            )  # fmt: skip
            self._text = self._prompt()
        except ModelError as error:
            raise ModelError(f"`captioner` cannot be used. {error}") from None
        except ImportError as error:  # its text names the package
            raise ModelError(f"`captioner` {source!r} in {chosen} needs a package that is missing: {error}") from None
        except Exception as error:  # a foreign folder fails in any way: a file cut short, other shapes, a template
            raise ModelError(
                f"`captioner` must be an image-to-text model that transformers loads, but {source!r} is not "
                f'({type(error).__name__}: {error}). Use "tiny" or Salesforce/blip2-opt-2.7b.'
            ) from None
        if chosen != "4bit":
            self._model.to(device)
        self._model.eval()
        self._max_new_tokens = max_new_tokens
        self._device = device
        self._require_sight(source)

    def __call__(self, images: torch.Tensor) -> list[str]:
        """Caption images by the model's own search: greedy, or with the beams that its folder asks for; never sampled.

        Args:
            images: uint8 ``[N, 3, S, S]``.

        Returns:
            N captions, blanks at the ends removed.
        """
        inputs = self._inputs(images)
        ids = self._generate(inputs, max_new_tokens=self._max_new_tokens)
        if "input_ids" in inputs and not self._model.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]  # they come first in the output of a decoder
        decoded: list[str] = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [caption.strip() for caption in decoded]

    def _inputs(self, images: torch.Tensor) -> Any:
        text: dict[str, Any] = {}
        if self._text is not None:
            text = {"text": [self._text] * len(images), "padding": True}
            bos = self._processor.tokenizer.bos_token
            if bos and self._text.startswith(bos):
                text["add_special_tokens"] = False  # the template wrote the BOS token; the model has never seen two
        pictures = [[image] for image in images] if self._text_holds_images() else list(images)
        inputs = self._processor(images=pictures, return_tensors="pt", **text).to(self._device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self._model.dtype)
        return inputs

    @torch.inference_mode()
    def _generate(self, inputs: Any, **options: Any) -> Any:
        return self._model.generate(**inputs, do_sample=False, **options)

    def _require_sight(self, source: str) -> None:
        """Raise unless the logits of the first token differ between two images, before a client's images are captioned.

        Some models fail without a text of their own kind (InstructBLIP, PaliGemma), a BLIP-2 whose text lacks image
        tokens answers without looking, and half precision may overflow to NaN.
        """
        ramp = torch.arange(0, 256, 8).to(torch.uint8).expand(3, 32, 32)  # not flat: Pix2Struct subtracts the mean
        try:
            inputs = self._inputs(torch.stack([ramp, ramp.mT // 2]))
            options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
            logits = self._generate(inputs, **options).logits[0]  # [2 * beams, vocabulary]
        except Exception as error:  # whatever the model misses first
            raise ModelError(
                "`captioner` must caption an image without being asked, or have a chat template, but "
                f"{source!r} fails in {self._model.dtype} ({type(error).__name__}: {error})."
            ) from None
        if torch.equal(logits[0], logits[-1]) or bool(logits.isnan().any()):
            raise ModelError(
                f"`captioner` must see the images, but {source!r} in {self._model.dtype} answers two different ones "
                "alike or with NaN. Use another captioner or `captioner-dtype`."
            )

    def _prompt(self) -> str | None:
        """Return the text beside each image: None for BLIP and BLIP-2, which caption without being asked.

        Without a text BLIP-2 itself puts its query tokens before the BOS token, so that it sees the image whatever the
        processor's ``num_query_tokens`` says.
        """
        if _TASK in getattr(self._processor, "task_prompts_without_inputs", ()):
            return _TASK
        if self._text_holds_images():
            content = [{"type": "image"}, {"type": "text", "text": _INSTRUCTION}]
            prompt: str = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            return prompt
        return None

    def _text_holds_images(self) -> bool:
        return getattr(self._processor, "chat_template", None) is not None


def resolved_dtype(dtype: str, device: torch.device) -> str:
    """Say what ``auto`` comes to on a device."""
    return ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype


class CachedCaptioner:
    """Captions images once: each caption is kept on this node under the image's hash, so that an interruption resumes.

    Args:
        load: Loads the captioner; called only if a caption is missing.
        identity: Everything besides the image that a caption depends on.
        batch_size: Images captioned, and then kept, at a time; halved when memory runs out.
        folder: Where captions are kept, readable by the owner alone; by default in the cache.
    """

    def __init__(
        self,
        load: Callable[[], Callable[[torch.Tensor], list[str]]],
        *,
        identity: tuple[str | int, ...],
        batch_size: int,
        folder: Path | None = None,
    ) -> None:
        """Open the captions of earlier runs."""
        self._load = load
        self._batch_size = batch_size
        folder = folder or cache_folder() / "captions"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / f"{hashlib.sha256(canonical_json(list(identity))).hexdigest()[:16]}.jsonl"
        self._known = _read(self._path)

    def __call__(self, images: torch.Tensor) -> list[str]:
        """Caption images, uint8 ``[N, 3, S, S]``; equal images get one caption."""
        keys = [hashlib.sha256(f"{tuple(i.shape)}".encode() + i.numpy().tobytes()).hexdigest() for i in images]
        row_of = {key: row for row, key in enumerate(keys)}
        todo = [row for key, row in row_of.items() if key not in self._known]
        if todo:
            captioner = self._load()
            with tqdm(total=len(todo), desc="captioning", unit="image", ascii=True, mininterval=5.0) as bar:
                while todo:
                    rows = todo[: self._batch_size]
                    try:
                        captions = captioner(images[rows])
                    except torch.OutOfMemoryError:
                        if self._batch_size == 1:
                            raise ModelError(
                                "The captioner must fit into memory with one image at a time, but does not. Use a "
                                "smaller `captioner`, `captioner-dtype=4bit` or another device."
                            ) from None
                        self._batch_size //= 2
                        torch.cuda.empty_cache()
                        continue
                    todo = todo[len(rows) :]
                    self._keep({keys[row]: caption for row, caption in zip(rows, captions, strict=True)})
                    bar.update(len(rows))
        return [self._known[key] for key in keys]

    def _keep(self, captions: dict[str, str]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        set_mode(self._path, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            # A line begins with its newline, so that it stays whole behind one that a crash cut short.
            file.write(
                "".join("\n" + json.dumps([key, caption], ensure_ascii=False) for key, caption in captions.items())
            )
        self._known |= captions


def _read(path: Path) -> dict[str, str]:
    """Read kept captions; a line that is none, as one that a crash cut short, is passed over."""
    known: dict[str, str] = {}
    # Not splitlines(): captions may hold characters that it takes for ends of lines.
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(line):
                case [str(key), str(caption)]:
                    known[key] = caption
    return known


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _quantization(dtype: str, device: torch.device) -> dict[str, Any]:
    if dtype != "4bit":
        return {}
    if _installed("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    elif _installed("torchao"):
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        # Its packed format, two values in a byte, needs kernels of its own for each kind of GPU; this runs everywhere.
        int4 = torch.int4  # type: ignore[attr-defined]  # torch's own annotations lack it
        config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32)))
    else:
        raise ImportError("4 bits need bitsandbytes or torchao. Use for example pip install bitsandbytes.")
    return {"quantization_config": config, "device_map": {"": device}}  # such a model cannot be moved once it is loaded
