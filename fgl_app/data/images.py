"""Labelled images in memory, the one form that training, captioning and synthesis share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as TF


@dataclass(frozen=True)
class ImageSet:
    """N labelled images of one size."""

    images: torch.Tensor
    """Colour images, uint8 ``[N, 3, S, S]``."""
    labels: torch.Tensor
    """Class of each image, int64 ``[N]``, 0 to K - 1."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at ``indices``, in that order."""
        rows = torch.as_tensor(list(indices), dtype=torch.int64)
        return ImageSet(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class HeldOut:
    """Images that are never trained on."""

    validation: ImageSet
    """Chooses the reported round."""
    test: ImageSet
    """Gives the reported accuracy."""


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize square images to ``size`` px, bilinear with antialiasing.

    Args:
        images: uint8 ``[N, 3, S, S]``.
        size: New side, px.

    Returns:
        uint8 ``[N, 3, size, size]``.
    """
    if images.shape[-1] == size:
        return images
    resized: torch.Tensor = TF.resize(images, [size, size], antialias=True)
    return resized
