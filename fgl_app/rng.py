"""Random numbers: every stream derives from a seed and a scope, nothing seeds globally."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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
    return int.from_bytes(_digest(seed, scope)[:8], "big") >> 1


def torch_generator(seed: int, *scope: str | int) -> torch.Generator:
    """Return a CPU generator of PyTorch for one stream."""
    return torch.Generator().manual_seed(derive_seed(seed, *scope))


def numpy_generator(seed: int, *scope: str | int) -> np.random.Generator:
    """Return a generator of NumPy for one stream."""
    return np.random.default_rng(derive_seed(seed, *scope))


def secret_generator(secret: int, *scope: str | int) -> np.random.Generator:
    """Return a generator of NumPy for numbers that nobody may guess, such as the noise of differential privacy.

    All 256 bits of the digest seed it. PyTorch's CPU generator keeps 32 bits of its seed: whoever tries all of them
    finds the noise and takes it off.

    Args:
        secret: At least 128 random bits of the operating system.
        scope: As in :func:`derive_seed`.
    """
    return np.random.default_rng(int.from_bytes(_digest(secret, scope), "big"))


def _digest(seed: int, scope: Iterable[str | int]) -> bytes:
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in scope)])
    return hashlib.sha256(text.encode()).digest()
