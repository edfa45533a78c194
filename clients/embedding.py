"""Prompts as embeddings (FGL v2): what the generator's text encoder makes of them, summarised, clipped and noised."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.cluster import KMeans
from transformers import AutoTokenizer, CLIPTextModel

from fgl_app import tiny
from fgl_app.errors import ConfigError, ModelError
from fgl_app.foundation_models import load_whole, locate, text_shape, weights_variant
from fgl_app.prompts import PromptCount
from fgl_app.records import embedding_name


class Encoder(Protocol):
    """Turns texts into embeddings."""

    context_length: int
    """Longest embedding, tokens."""

    def __call__(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return float32 ``[T, D]`` for each text, T its number of tokens without padding."""


class TextEncoder:
    """The text encoder of a Stable Diffusion 1.x or 2.x: CLIP's, and nothing else of the pipeline.

    Args:
        generator: ``tiny``, a folder that ``save_pretrained`` of the pipeline wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        device: Where to run it.

    Raises:
        ConfigError: If the generator has no such encoder.
        ModelError: If its files cannot be loaded, or lack a weight.
    """

    def __init__(self, generator: str, revision: str, device: torch.device) -> None:
        """Load tokenizer and encoder."""
        text_shape(generator, revision)
        path, pinned = locate(generator, revision, tiny.DIFFUSION)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                path, subfolder="tokenizer", revision=pinned, trust_remote_code=False
            )
            self._model: Any = load_whole(
                CLIPTextModel, path, subfolder="text_encoder", revision=pinned, dtype=torch.float32,
                variant=weights_variant(path, pinned, "text_encoder"), use_safetensors=True, trust_remote_code=False,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise ModelError(
                f"Embeddings need a `generator` at hand whose text encoder is CLIP's, as Stable Diffusion 1.x and 2.x "
                f"have it, but {generator!r} gives none ({type(error).__name__})."
            ) from None
        self._model.to(device).eval()
        self._device = device
        self.context_length: int = self.tokenizer.model_max_length

    @torch.inference_mode()
    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 ``[N, T, D]`` of the tokens ``ids``, int64 ``[N, T]``: what the pipeline is conditioned on."""
        hidden: torch.Tensor = self._model(ids.to(self._device)).last_hidden_state
        return hidden.float().cpu()

    def __call__(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return float32 ``[T, D]`` for each text, T its number of tokens, begin and end included."""
        embeddings = []
        for start in range(0, len(texts), 256):
            tokens = self.tokenizer(
                list(texts[start : start + 256]), padding="max_length", truncation=True, return_tensors="pt"
            )
            hidden = self.hidden_states(tokens.input_ids)
            # Padding may be the end token itself, so that the attention mask, not the ids, tells the length.
            lengths = tokens.attention_mask.sum(1).tolist()
            embeddings += [row[:length].clone() for row, length in zip(hidden, lengths, strict=True)]
        return embeddings


def embed_prompts(
    prompts: Sequence[PromptCount],
    encoder: Encoder,
    *,
    summary: str,
    num_clusters: int,
    clip_norm: float,
    epsilon: float,
    delta: float,
    seed: int,
) -> tuple[list[PromptCount], dict[str, torch.Tensor]]:
    """Turn a client's prompts into embeddings.

    Args:
        prompts: Distinct prompts of the client.
        encoder: The generator's text encoder.
        summary: ``none`` sends the embedding of each prompt, with noise that of each image; ``mean`` one mean per class
            and domain, weighted by the prompts' counts; ``clusters`` the centres of k-means per class and domain.
        num_clusters: k, at most; a class with fewer prompts has fewer.
        clip_norm: C: each prompt's embedding, as one vector, is scaled to at most this Euclidean norm; 0 for none.
        epsilon: Epsilon of the Gaussian mechanism; 0 for no noise. It protects what the prompt of one image says:
            replacing it by any other of the same class and domain moves that image's embedding by at most 2 C, and a
            mean over n images by 2 C / n. Noise of that standard deviation, times the multiplier that an accountant
            finds for (epsilon, delta), is added to every entry (Dwork & Roth 2014, Appendix A). How many images each
            class and domain has is not hidden by it. How many of them share a prompt is: each image has a row with
            noise of its own, and the rows are in the order of their names, which derive from what was noised.
        delta: Delta of the mechanism.
        seed: Seed of k-means. The noise has none: who knew its seed could take it off again.

    Returns:
        Prompts whose text is the name of an embedding, and the embeddings, float16 ``[T, D]``, by name.

    Raises:
        ConfigError: If noise is asked for and the accountant is not installed.
    """
    if epsilon > 0 and (clip_norm <= 0 or summary == "clusters"):
        raise ConfigError("Noise needs `embedding-clip` > 0 and `embedding-summary` none or mean.")
    groups: dict[tuple[int, str], list[tuple[torch.Tensor, int]]] = defaultdict(list)
    for item, embedding in zip(prompts, encoder([item.prompt for item in prompts]), strict=True):
        groups[item.label, item.domain].append((_clipped(embedding, clip_norm), item.count))
    noise_multiplier = calibrated_multiplier(epsilon, delta) if epsilon > 0 else 0.0
    named: Counter[tuple[int, str, str]] = Counter()
    embeddings: dict[str, torch.Tensor] = {}
    for (label, domain), members in sorted(groups.items(), key=lambda pair: pair[0]):
        # Noise hides nothing if the length tells what was said.
        length = encoder.context_length if epsilon > 0 else max(len(embedding) for embedding, _ in members)
        for embedding, count, sensitivity in _summarised(
            members, summary, num_clusters, length, clip_norm, seed, hide_length=epsilon > 0
        ):
            noisy = embedding
            if noise_multiplier:
                draw = np.random.default_rng().standard_normal(embedding.shape)
                noisy = embedding + torch.from_numpy(draw).float() * (noise_multiplier * sensitivity)
            half = noisy.clamp(-6e4, 6e4).half()
            name = embedding_name(half)
            embeddings[name] = half
            named[label, name, domain] += count  # long prompts that differ behind the context's end are one
    return [PromptCount(label, name, count, domain) for (label, name, domain), count in sorted(named.items())], dict(
        sorted(embeddings.items())
    )


def calibrated_multiplier(epsilon: float, delta: float) -> float:
    """Return the least noise, in multiples of the sensitivity, with which one release is (epsilon, delta)-private.

    Raises:
        ConfigError: If dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise ConfigError(
            "`embedding-epsilon` needs the package dp-accounting, which is not installed here. Install the extra: "
            "pip install 'federated-generative-learning[privacy]'."
        ) from None
    multiplier: float = dp_accounting.calibrate_dp_mechanism(
        PLDAccountant, dp_accounting.GaussianDpEvent, epsilon, delta
    )
    return multiplier


def _clipped(embedding: torch.Tensor, clip_norm: float) -> torch.Tensor:
    norm = float(embedding.norm())
    return embedding * min(1.0, clip_norm / norm) if clip_norm > 0 and norm > 0 else embedding


def _summarised(
    members: Sequence[tuple[torch.Tensor, int]],
    summary: str,
    num_clusters: int,
    length: int,
    clip_norm: float,
    seed: int,
    *,
    hide_length: bool,
) -> list[tuple[torch.Tensor, int, float]]:
    """Return embeddings with their counts and sensitivities to one image's prompt."""
    if summary == "none" and not hide_length:
        return [(embedding, count, 2 * clip_norm) for embedding, count in members]
    stacked = torch.stack([extended(embedding, length) for embedding, _ in members])  # [M, T, D]
    # Repeated end tokens make a clipped embedding longer: it is clipped again at its full length.
    stacked = torch.stack([_clipped(row, clip_norm) for row in stacked])
    counts = np.array([count for _, count in members])
    if summary == "none":  # a row for each distinct prompt would tell how many images share one
        return [(row, 1, 2 * clip_norm) for row in stacked.repeat_interleave(torch.from_numpy(counts), 0)]
    if summary == "mean":
        weights = torch.from_numpy(counts / counts.sum()).float()
        return [(torch.einsum("m,mtd->td", weights, stacked), int(counts.sum()), 2 * clip_norm / int(counts.sum()))]
    flat = stacked.reshape(len(stacked), -1).numpy()
    model = KMeans(min(num_clusters, len(np.unique(flat, axis=0))), n_init=4, random_state=seed % 2**32)
    assigned = model.fit_predict(flat, sample_weight=counts)
    centres = torch.from_numpy(model.cluster_centers_).float().reshape(-1, *stacked.shape[1:])
    return [(centres[index], int(counts[assigned == index].sum()), 0.0) for index in range(len(centres))]


def extended(embedding: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat the end token's row until the embedding ``[T, D]`` has ``length`` rows."""
    return torch.cat([embedding, embedding[-1:].expand(length - len(embedding), -1)])
