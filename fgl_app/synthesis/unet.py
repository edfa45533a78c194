"""The UNet of Stable Diffusion 1.x and 2.x as two static functions: all of it, and its shallow end alone.

It computes what the modules of diffusers compute, less what they compute again and again: the keys and values of a
text, which are the same at every step; and under guidance everything up to the first cross-attention, which is the same
for both texts. Nothing is copied between memory layouts.

DeepCache (Ma et al. 2024, arXiv 2312.00858): between neighbouring steps the deep features hardly change, so that some
steps evaluate the outermost layers only, on the deep features of an earlier step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

Context = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of a text, ``[R, heads, L, D / heads]``, for every cross-attention in the order of evaluation."""

M = TypeVar("M", bound=nn.Module)

_PLAIN = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "center_input_sample": False,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "attention_type": "default",
    "cross_attention_norm": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "time_embedding_type": "positional",
}
"""What the configuration of a UNet of the family says; anything else takes another way through its forward pass."""
_PLAIN_BLOCKS = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    None,
}


def is_plain(config: Mapping[str, Any]) -> bool:
    """Return whether a ``UNet2DConditionModel`` is of the family: conditioned on a timestep and a text, nothing else.

    Args:
        config: Its configuration; what an older file leaves out is as in the family.
    """
    blocks = {
        *config.get("down_block_types", ["CrossAttnDownBlock2D"]),
        config.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
        *config.get("up_block_types", ["CrossAttnUpBlock2D"]),
    }
    return (
        all(config.get(name, value) == value for name, value in _PLAIN.items())
        and blocks <= _PLAIN_BLOCKS
        and any("CrossAttn" in str(name) for name in blocks)
    )


class PlainUNet(nn.Module):
    """Evaluates a UNet for which :func:`is_plain` holds; its layers are those of diffusers, put together anew."""

    def __init__(self, unet: Any) -> None:
        """Take over a UNet of diffusers."""
        super().__init__()
        self.time_proj, self.time_mlp = unet.time_proj, unet.time_embedding
        self.conv_in, self.conv_out = unet.conv_in, unet.conv_out
        self.norm_out, self.act_out = unet.conv_norm_out, unet.conv_act
        self.down = _listed(_Stage(block, block.downsamplers) for block in unet.down_blocks)
        self.mid = None if unet.mid_block is None else _Stage(unet.mid_block, None)
        self.up = _listed(_Stage(block, block.upsamplers) for block in unet.up_blocks)
        self._attentions = [module for module in self.modules() if isinstance(module, _CrossAttention)]
        for place, attention in enumerate(self._attentions):
            attention.place = place

    def time_embedding(self, timestep: torch.Tensor) -> torch.Tensor:
        """Embed one timestep, a 0-d tensor, as ``[1, E]``; all images of a batch share it."""
        embedding: torch.Tensor = self.time_mlp(self.time_proj(timestep[None]).to(self.conv_in.weight.dtype))
        return embedding

    def context(self, text: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values of hidden states of the text encoder, ``[R, L, D]``, for all steps."""
        return [attention.keys_and_values(text) for attention in self._attentions]

    def full(self, latents: torch.Tensor, time: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate the whole UNet.

        Args:
            latents: ``[B, 4, H, W]``.
            time: What :meth:`time_embedding` returned, ``[1, E]``.
            context: What :meth:`context` returned for R rows of text: B, or 2B to evaluate two texts per latent, the
                second half of them after the first.

        Returns:
            The output ``[R, 4, H, W]``, and the deep features ``[R, C, H, W]`` that :meth:`shallow` takes.
        """
        # Sides that the UNet cannot halve often enough need the exact size of each skip connection.
        halvings = 2 ** sum(stage.sampler is not None for stage in self.up)
        forward_size = any(side % halvings for side in latents.shape[-2:])
        hidden = self.conv_in(latents)
        skips = [hidden]
        for stage in self.down:
            for layer in stage.layers:
                hidden = layer(hidden, time, context)
                skips.append(hidden)
            if stage.sampler is not None:
                hidden = stage.sampler(hidden)
                skips.append(hidden)
        for layer in () if self.mid is None else self.mid.layers:
            hidden = layer(hidden, time, context)
        layers = [(stage, layer) for stage in self.up for layer in stage.layers]
        for (stage, layer), (following, _) in pairwise(layers):
            hidden = layer(_join(hidden, skips.pop()), time, context)
            if stage is not following:
                hidden = _enlarge(stage.sampler, hidden, skips[-1].shape[2:] if forward_size else None)
        return self._end(hidden, skips[0], time, context), hidden

    def shallow(self, latents: torch.Tensor, time: torch.Tensor, context: Context, deep: torch.Tensor) -> torch.Tensor:
        """Evaluate the first and the last layers on the deep features ``[R, C, H, W]`` of an earlier step."""
        return self._end(deep, self.conv_in(latents), time, context)

    def _end(self, hidden: torch.Tensor, skip: torch.Tensor, time: torch.Tensor, context: Context) -> torch.Tensor:
        hidden = self.up[-1].layers[-1](_join(hidden, skip), time, context)
        if self.norm_out is not None:
            hidden = self.act_out(self.norm_out(hidden))
        output: torch.Tensor = self.conv_out(hidden)
        return output


class _Stage(nn.Module):
    """The layers at one resolution, and what leads to the next."""

    def __init__(self, block: Any, samplers: Any) -> None:
        super().__init__()
        attentions = list(getattr(block, "attentions", []))
        attentions += [None] * (len(block.resnets) - len(attentions))  # the middle block ends with a residual layer
        self.layers = _listed(map(_Layer, block.resnets, attentions))
        self.sampler: Any = samplers[0] if samplers else None


class _Layer(nn.Module):
    """A residual layer, with the transformer behind it where it has one."""

    def __init__(self, resnet: Any, transformer: Any) -> None:
        super().__init__()
        self.resnet = _Residual(resnet)
        self.transformer = None if transformer is None else _Transformer(transformer)

    def forward(self, hidden: torch.Tensor, time: torch.Tensor, context: Context) -> torch.Tensor:
        hidden = self.resnet(hidden, time)
        output: torch.Tensor = hidden if self.transformer is None else self.transformer(hidden, context)
        return output


class _Residual(nn.Module):
    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.norm1, self.conv1, self.time = resnet.norm1, resnet.conv1, resnet.time_emb_proj
        self.norm2, self.conv2, self.shortcut = resnet.norm2, resnet.conv2, resnet.conv_shortcut

    def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        update = self.conv1(F.silu(self.norm1(hidden), inplace=True))
        update += self.time(F.silu(time))[:, :, None, None]
        update = self.conv2(F.silu(self.norm2(update), inplace=True))
        output: torch.Tensor = update.add_(hidden if self.shortcut is None else self.shortcut(hidden))
        return output


class _Transformer(nn.Module):
    """Blocks of self-attention, cross-attention and a small network, on pixels as tokens."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.blocks = _listed(map(_Block, transformer.transformer_blocks))

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        batch, _, height, width = hidden.shape
        on_pixels = isinstance(self.proj_in, nn.Conv2d)  # 1.x projects pixels, 2.x tokens
        tokens = self.norm(hidden)
        if on_pixels:
            tokens = self.proj_in(tokens)
        tokens = tokens.permute(0, 2, 3, 1).reshape(batch, height * width, -1)  # channels last: no copy
        if not on_pixels:
            tokens = self.proj_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, context)
        if not on_pixels:
            tokens = self.proj_out(tokens)
        pixels = tokens.reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2)
        if on_pixels:
            pixels = self.proj_out(pixels)
        output: torch.Tensor = pixels + _as_many(hidden, len(pixels))
        return output


class _Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.ff = block.norm1, block.norm2, block.norm3, block.ff
        self.attn1, self.attn2 = _SelfAttention(block.attn1), _CrossAttention(block.attn2)

    def forward(self, tokens: torch.Tensor, context: Context) -> torch.Tensor:
        tokens = tokens + self.attn1(self.norm1(tokens))
        attended = self.attn2(self.norm2(tokens), context)
        tokens = attended + _as_many(tokens, len(attended))
        output: torch.Tensor = tokens + self.ff(self.norm3(tokens))
        return output


class _SelfAttention(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = attention.heads
        self.to_qkv, self.to_out = _fused(attention.to_q, attention.to_k, attention.to_v), attention.to_out[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = (_heads(part, self.heads) for part in self.to_qkv(tokens).chunk(3, -1))
        output: torch.Tensor = self.to_out(_attend(query, key, value))
        return output


class _CrossAttention(nn.Module):
    place: int
    """Of its keys and values in the context."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = attention.heads
        self.to_q, self.to_out = attention.to_q, attention.to_out[0]
        self.to_kv = _fused(attention.to_k, attention.to_v)

    def keys_and_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (_heads(part, self.heads).contiguous() for part in self.to_kv(text).chunk(2, -1))
        return key, value

    def forward(self, tokens: torch.Tensor, context: Context) -> torch.Tensor:
        key, value = context[self.place]
        query = _as_many(self.to_q(tokens), len(key))
        output: torch.Tensor = self.to_out(_attend(_heads(query, self.heads), key, value))
        return output


def _listed(modules: Iterable[M]) -> Sequence[M]:
    return cast(Sequence[M], nn.ModuleList(modules))


def _fused(*linears: nn.Linear) -> nn.Linear:
    """Return one layer whose output is that of several, side by side."""
    bias = linears[0].bias is not None
    fused = nn.Linear(linears[0].in_features, sum(each.out_features for each in linears), bias=bias, device="meta")
    for name in ("weight", "bias") if bias else ("weight",):
        parts = [getattr(each, name).detach() for each in linears]
        setattr(fused, name, nn.Parameter(torch.cat(parts), requires_grad=False))
    return fused


def _heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    batch, count, width = tokens.shape
    return tokens.view(batch, count, heads, width // heads).transpose(1, 2)  # [R, heads, N, C / heads]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _as_many(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat the rows of what no text has reached yet."""
    return rows if len(rows) == count else torch.cat([rows] * (count // len(rows)))


def _join(hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    return torch.cat([hidden, _as_many(skip, len(hidden))], 1)


def _enlarge(sampler: Any, hidden: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
    """Double the sides, or bring them to ``size``; the sampler's own forward pass would leave the memory layout."""
    scale = 2.0 if size is None else None
    output: torch.Tensor = sampler.conv(F.interpolate(hidden, size=size, scale_factor=scale, mode="nearest"))
    return output
