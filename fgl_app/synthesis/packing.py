"""Weights of linear layers in oneDNN's own layout, for CPUs.

A quarter of the engine's work on a CPU is products of small matrices. PyTorch leaves them to MKL, which uses half of
an AMD processor's vector width and rearranges the weights at every call; oneDNN uses all of it, on weights packed once.
"""

from __future__ import annotations

import torch
from torch import nn


class _PackedLinear(nn.Module):
    """``nn.Linear`` in fp32, for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, self._weight, self._bias, "none", [], "")
        return product


def pack(model: nn.Module) -> None:
    """Replace the linear layers of a frozen model in place, where oneDNN has kernels for them."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            # Subclasses may do more than multiply.
            if type(child) is nn.Linear and (child.weight.device.type, child.weight.dtype) == ("cpu", torch.float32):
                setattr(parent, name, _PackedLinear(child))
