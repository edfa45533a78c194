"""The UNet of Stable Diffusion 1.x and 2.x as two static functions: all of it, and its shallow end alone.

DeepCache (Ma et al. 2024, arXiv 2312.00858): between neighbouring steps the deep features hardly change, so that some
steps evaluate the outermost layers only, on the deep features of an earlier step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PLAIN = {
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "center_input_sample": False,
}
"""What the configuration of a UNet of the family says; anything else takes another way through its forward pass."""


def is_plain(unet: Any) -> bool:
    """Return whether ``unet`` is of the family: conditioned on a timestep and a text, nothing else."""
    return type(unet).__name__ == "UNet2DConditionModel" and all(
        unet.config.get(name) == value for name, value in _PLAIN.items()
    )


class PlainUNet(nn.Module):
    """Evaluates a UNet for which :func:`is_plain` holds; it shares the modules of diffusers and owns no weights."""

    def __init__(self, unet: Any) -> None:
        """Take over a UNet of diffusers."""
        super().__init__()
        self.unet = unet

    def time_embedding(self, timestep: torch.Tensor) -> torch.Tensor:
        """Embed one timestep, a 0-d tensor, as ``[1, E]``; all images of a batch share it."""
        unet = self.unet
        embedding: torch.Tensor = unet.time_embedding(unet.time_proj(timestep[None]).to(unet.dtype))
        return embedding

    def full(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate the whole UNet.

        Args:
            latents: ``[B, 4, H, W]``.
            time: What :meth:`time_embedding` returned, ``[1, E]``.
            text: Hidden states of the text encoder, ``[B, L, D]``.

        Returns:
            The output ``[B, 4, H, W]``, and the deep features ``[B, C, H, W]`` that :meth:`shallow` takes.
        """
        unet = self.unet
        # Sides that the UNet cannot halve often enough need the exact size of each skip connection.
        halvings = 2 ** sum(block.upsamplers is not None for block in unet.up_blocks)
        forward_size = any(side % halvings for side in latents.shape[-2:])
        hidden = unet.conv_in(latents)
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, states = block(hidden, time, **_attended(block, text))
            skips += states
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, time, **_attended(unet.mid_block, text))
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            states, skips = tuple(skips[-count:]), skips[:-count]
            size = skips[-1].shape[2:] if forward_size else None
            hidden = block(hidden, states, time, upsample_size=size, **_attended(block, text))
        last = unet.up_blocks[-1]
        for index in range(len(last.resnets) - 1):
            hidden = _layer(last, index, torch.cat([hidden, skips.pop()], 1), time, text)
        return self._end(hidden, skips[0], time, text), hidden

    def shallow(
        self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor, deep: torch.Tensor
    ) -> torch.Tensor:
        """Evaluate the first and the last layers on the deep features ``[B, C, H, W]`` of an earlier step."""
        return self._end(deep, self.unet.conv_in(latents), time, text)

    def _end(self, hidden: torch.Tensor, skip: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        unet = self.unet
        hidden = _layer(unet.up_blocks[-1], -1, torch.cat([hidden, skip], 1), time, text)
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        output: torch.Tensor = unet.conv_out(hidden)
        return output


def _attended(block: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


def _layer(block: Any, index: int, hidden: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """One residual layer of an up block, with its attention where it has one."""
    hidden = block.resnets[index](hidden, time)
    if getattr(block, "has_cross_attention", False):
        hidden = block.attentions[index](hidden, encoder_hidden_states=text, return_dict=False)[0]
    return hidden
