"""Prompts that the server writes from the class names (GPT-FL, Section 3.1), by templates or a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fgl_app.cards import PromptForm
from fgl_app.errors import ModelError
from fgl_app.foundation_models import load_whole, locate, weights_variant
from fgl_app.prompts.writing import PromptCount, fill, printable
from fgl_app.rng import derive_seed

_REQUEST = 'Write one short and specific image caption that begins like "{opening}". Answer with the caption only.'
_ATTEMPTS = 20

PromptWriter = Callable[[str, PromptForm, int], list[str]]
"""From a class name, the form of its prompts and a number to as many different prompts, or all that there are."""


def write_from_templates(class_name: str, form: PromptForm, number: int) -> list[str]:
    """Take the first of a card's prompts."""
    return _openings(class_name, form)[:number]


def _openings(class_name: str, form: PromptForm) -> list[str]:
    """Fill the class templates, as they are and then in each style."""
    plain = [fill(template, class_name) for template in form.class_templates]
    return plain + [f"{text}, {style}" for style in form.styles for text in plain]


class LanguageModelWriter:
    """A causal language model of transformers that expands a class name into many different prompts.

    A model with a chat template is asked for captions that begin like the card's filled templates, plain and in each
    style; any other continues them, e.g. "a photo of a cat, at night". Each prompt is sampled from a seed of its own;
    one that does not name its class gets the name in front.

    Args:
        source: Hub id, or a folder that ``save_pretrained`` wrote.
        revision: Git revision of a hub id; empty for the newest.
        max_new_tokens: Longest continuation, tokens.
        seed: The run's seed.
        device: Where to run the model.

    Raises:
        ModelError: If the model cannot be loaded.
    """

    def __init__(self, source: str, *, revision: str, max_new_tokens: int, seed: int, device: torch.device) -> None:
        """Load tokenizer and model."""
        from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds of import, for few runs

        path, pinned = locate(source, revision)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=pinned, trust_remote_code=False)
            self._model: Any = load_whole(
                AutoModelForCausalLM, path, revision=pinned,
                dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                variant=weights_variant(path, pinned), use_safetensors=True, trust_remote_code=False,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`prompt-writer` must be templates or a causal language model that transformers loads, but {source!r} "
                f"is not ({type(error).__name__}: {error})."
            ) from None
        self._model.to(device).eval()
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._device = device

    def __call__(self, class_name: str, form: PromptForm, number: int) -> list[str]:
        """Write up to ``number`` different prompts of a class; fewer if the model repeats itself."""
        openings = _openings(class_name, form)
        prompts: dict[str, None] = {}
        for attempt in range(number + _ATTEMPTS):
            if len(prompts) == number:
                break
            text = printable(self._sample(class_name, openings[attempt % len(openings)], attempt))
            if class_name.lower() not in text.lower():
                text = printable(f"{class_name}, {text}")
            prompts[text] = None
        return list(prompts)

    @torch.inference_mode()
    def _sample(self, class_name: str, opening: str, attempt: int) -> str:
        chat = getattr(self._tokenizer, "chat_template", None) is not None
        asked = opening
        if chat:
            asked = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": _REQUEST.replace("{opening}", opening)}],
                tokenize=False,
                add_generation_prompt=True,
            )
        # A chat's template writes its own first token.
        inputs = self._tokenizer(asked, return_tensors="pt", add_special_tokens=not chat).to(self._device)
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.random.manual_seed(derive_seed(self._seed, "prompt-writer", class_name, opening, attempt))
            ids = self._model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=self._max_new_tokens,
                do_sample=True,
                top_p=0.95,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )
        said: str = self._tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        first_line = next((line for line in said.splitlines() if line.strip()), "")
        return first_line.strip("\"' ") if chat else f"{opening} {first_line}"


def expand(
    class_names: Sequence[str],
    domains: Sequence[tuple[str, PromptForm]],
    write: PromptWriter,
    number: int,
) -> list[PromptCount]:
    """Expand every class name into prompts, for each domain.

    Args:
        class_names: How prompts call the K classes.
        domains: Name (empty for none) and prompt form of each domain.
        write: Writes the prompts of one class in one domain.
        number: Prompts per class and domain.

    Returns:
        Distinct prompts with equal counts, ordered by label and text.
    """
    prompts: set[PromptCount] = set()
    with tqdm(total=len(domains) * len(class_names), desc="prompts", unit="class", ascii=True, mininterval=5.0) as bar:
        for domain, form in domains:
            for label, name in enumerate(class_names):
                prompts |= {PromptCount(label, text, 1, domain, clients=0) for text in write(name, form, number)}
                bar.update()
    return sorted(prompts)
