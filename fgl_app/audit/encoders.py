"""Read embeddings back with the generator's own text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fgl_app.privacy.inversion import CERTAIN_ERROR, Inverter, noise_curve
from fgl_app.privacy.lexicon import load_lexicon
from fgl_app.rng import torch_generator
from fgl_app.training import pick_device

MAX_INVERTED = 16
"""Embeddings of a run that are read back."""
NOISE_SCALES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Standard deviations of the noise that is tried, as multiples of the root mean square of an embedding's entries."""
_NUM_NOISED = 4
_WHOLE_VOCABULARY = 4_096
_COMMON_WORDS = 3_000


@dataclass(frozen=True)
class Readings:
    """What was read out of embeddings."""

    texts: Sequence[str]
    """What each says; may be wrong."""
    errors: Sequence[float]
    """How far the embedding of that text is from the one that was sent, as a share of its norm."""
    scales: Sequence[float]
    shares: Sequence[float]
    """Share of the words that are still found under each of the scales of noise; empty if no embedding was read."""
    limits: str
    """What restricts the attack, as the end of a sentence; empty for nothing."""


def invert_embeddings(
    embeddings: Sequence[torch.Tensor], generator: str, revision: str, device_name: str, seed: int
) -> Readings:
    """Read embeddings back, and measure what noise on them would hide.

    All tokens are tried where the vocabulary is small or there is a GPU; else those of the most frequent English words,
    which finds less than an attacker with more time would.

    Args:
        embeddings: Float ``[T, D]`` each, T at most the encoder's context.
        generator: ``tiny``, a folder or a hub id of the text-to-image pipeline.
        revision: Git revision of a hub id; empty for the newest.
        device_name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: Seed of the noise.

    Raises:
        ModelError: If the generator's text encoder is not CLIP's.
    """
    from clients.embedding import TextEncoder  # seconds of import, for audits of embeddings only

    device = pick_device(device_name)
    encoder = TextEncoder(generator, revision, device)
    tokenizer = encoder.tokenizer
    whole = len(tokenizer) <= _WHOLE_VOCABULARY or device.type == "cuda"
    candidates = torch.arange(len(tokenizer)) if whole else _common_tokens(tokenizer)
    inverter = Inverter(encoder.hidden_states, tokenizer.bos_token_id, tokenizer.eos_token_id, candidates)

    def read(embedding: torch.Tensor) -> tuple[str, float]:
        found = inverter(embedding)
        return str(tokenizer.decode(list(found.ids))).strip(), found.error

    readings = [read(embedding) for embedding in embeddings]
    known = [index for index, (_, error) in enumerate(readings) if error < CERTAIN_ERROR][:_NUM_NOISED]
    shares: list[float] = []
    if known:
        shares = noise_curve(
            [embeddings[index] for index in known],
            [readings[index][0] for index in known],
            lambda embedding: read(embedding)[0],
            NOISE_SCALES,
            torch_generator(seed, "audit", "noise"),
        )
    return Readings(
        [text for text, _ in readings],
        [error for _, error in readings],
        NOISE_SCALES if shares else (),
        shares,
        "" if whole else f" (only the tokens of the {_COMMON_WORDS:,} most frequent words were tried)",
    )


def _common_tokens(tokenizer: Any) -> torch.Tensor:
    frequency = load_lexicon().frequency
    words = sorted(frequency, key=lambda word: -frequency[word])[:_COMMON_WORDS]
    ids = {
        token for word in [*words, *"0123456789,.-"] for token in tokenizer(word, add_special_tokens=False).input_ids
    }
    return torch.tensor(sorted(ids))
