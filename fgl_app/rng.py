"""Random numbers: every stream derives from a seed and a scope, nothing seeds globally."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *scope: str | int) -> int:
    """Derive the seed of one stream.

    Args:
        seed: The run's seed.
        scope: Names and numbers that say what the stream is for, e.g. ``"local-training", server_round, partition_id``.

    Returns:
        A seed in 0 to 2**63 - 1: the first eight bytes of the SHA-256 of seed and scope.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in scope)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *scope: str | int) -> torch.Generator:
    """Return a CPU generator of PyTorch for one stream."""
    return torch.Generator().manual_seed(derive_seed(seed, *scope))


def numpy_generator(seed: int, *scope: str | int) -> np.random.Generator:
    """Return a generator of NumPy for one stream."""
    return np.random.default_rng(derive_seed(seed, *scope))
