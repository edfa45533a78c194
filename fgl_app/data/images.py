"""Labelled images in memory, the one form that training, captioning and synthesis share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image


@dataclass(frozen=True)
class ImageSet:
    """N labelled images of one size."""

    images: torch.Tensor
    """Colour images, uint8 ``[N, 3, S, S]``."""
    labels: torch.Tensor
    """Class of each image, int64 ``[N]``, 0 to K - 1."""
    domains: torch.Tensor | None = None
    """Domain of each image, int64 ``[N]``, 0 to D - 1; None for a data set of one domain."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at ``indices``, in that order."""
        rows = torch.as_tensor(list(indices), dtype=torch.int64)
        return ImageSet(self.images[rows], self.labels[rows], None if self.domains is None else self.domains[rows])


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


def to_pixels(picture: Image.Image, transforms: Sequence[tuple[str, int]], image_size: int) -> torch.Tensor:
    """Turn a picture of any size and mode into uint8 ``[3, image_size, image_size]``.

    Args:
        picture: As its library decoded it.
        transforms: The card's steps: ``resize`` (shorter side), ``pad`` (each side, with zeros), ``center-crop``; px.
        image_size: The picture is scaled to this shorter side and cropped to the centre square, px.
    """
    pixels = TF.pil_to_tensor(picture.convert("RGB"))
    for name, size in transforms:
        if name == "resize":
            pixels = TF.resize(pixels, [size], antialias=True)
        elif name == "pad":
            pixels = TF.pad(pixels, [size])
        else:
            pixels = TF.center_crop(pixels, [size, size])
    square: torch.Tensor = TF.center_crop(TF.resize(pixels, [image_size], antialias=True), [image_size, image_size])
    return square
