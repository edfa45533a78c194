"""Inversion of embeddings: which words did the generator's text encoder read?

A text encoder that reads from left to right, as CLIP's does, makes row t of an embedding from the tokens up to t. Who
knows the encoder finds them one after the other: the token whose row comes nearest, given those found before. Morris et
al. 2023 ("Text Embeddings Reveal (Almost) As Much As Text") do the like for sentence embeddings; here no model has to
be trained, because every row is known by itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EncodeTokens = Callable[[torch.Tensor], torch.Tensor]
"""From token ids, int64 ``[N, T]``, to embeddings, float32 ``[N, T, D]``."""

CERTAIN_ERROR = 0.01
"""Below this error the text that was found is the one that was sent: half precision alone costs 0.001. Above it the
text is a guess, which may be right: noise of a tenth of the root mean square of the entries makes an error of 0.1, and
leaves most of what the shipped encoder read legible."""
_BATCH = 512


@dataclass(frozen=True)
class Inverted:
    """Tokens found in an embedding."""

    ids: tuple[int, ...]
    """Ids, begin and end left out."""
    error: float
    """Distance of the embedding from that of the tokens found, at the best scale, as a share of its norm; 0 to 1."""


class Inverter:
    """Finds the tokens of embeddings of one encoder.

    Args:
        encode: The text encoder; it must read from left to right.
        begin: Id of the token that begins every text.
        end: Id of the token that ends every text.
        candidates: Ids that are tried at each position, int64 ``[C]``; what is none of them is not found.
    """

    def __init__(self, encode: EncodeTokens, begin: int, end: int, candidates: torch.Tensor) -> None:
        """Keep what is known of the encoder."""
        self._encode, self._begin, self._end = encode, begin, end
        self._tried = torch.cat([candidates, torch.tensor([end])])

    def __call__(self, embedding: torch.Tensor) -> Inverted:
        """Find the tokens of an embedding, float ``[T, D]``, whatever its scale."""
        rows = embedding.float()
        ids = [self._begin]
        for position in range(1, len(rows)):
            encoded = self._following(ids)
            ids.append(int(self._tried[F.cosine_similarity(encoded, rows[position], dim=1).argmax()]))
            if ids[-1] == self._end:
                break
        found = self._encode(torch.tensor([ids]))[0]
        # Behind the end, embeddings of a common length repeat its row.
        found = torch.cat([found, found[-1:].expand(len(rows) - len(found), -1)])
        cosine = float(F.cosine_similarity(found.flatten().double(), rows.flatten().double(), dim=0))
        error = math.sqrt(max(0.0, 1 - cosine**2)) if cosine > 0 else 1.0
        return Inverted(tuple(each for each in ids[1:] if each != self._end), error)

    def _following(self, ids: Sequence[int]) -> torch.Tensor:
        """Encode ``ids`` and each candidate behind them; the row of the last, ``[C, D]``."""
        texts = torch.cat([torch.tensor(ids).expand(len(self._tried), -1), self._tried[:, None]], dim=1)  # [C, t + 1]
        return torch.cat([self._encode(part)[:, -1] for part in texts.split(_BATCH)])


def recovered_share(sent: str, found: str) -> float:
    """Return the share of the words of ``sent`` that ``found`` holds, each as often as it occurs, 0 to 1."""
    wanted, held = (Counter(re.findall(r"\w+", text.lower())) for text in (sent, found))
    return (wanted & held).total() / max(1, wanted.total())


def noise_curve(
    embeddings: Sequence[torch.Tensor],
    texts: Sequence[str],
    invert: Callable[[torch.Tensor], str],
    scales: Sequence[float],
    generator: torch.Generator,
) -> list[float]:
    """Measure what Gaussian noise on embeddings buys: the mean share of words that inversion still finds.

    Args:
        embeddings: Embeddings without noise, float ``[T, D]`` each.
        texts: What they say.
        invert: From an embedding to the text found.
        scales: Standard deviations of the noise, as multiples of the root mean square of the embedding's entries.
        generator: CPU generator of the noise.

    Returns:
        The share for each of ``scales``, 0 to 1.
    """
    shares = []
    for scale in scales:
        noisy = [
            each.float() + scale * each.float().square().mean().sqrt() * torch.randn(each.shape, generator=generator)
            for each in embeddings
        ]
        found = [recovered_share(text, invert(each)) for text, each in zip(texts, noisy, strict=True)]
        shares.append(sum(found) / max(1, len(found)))
    return shares
