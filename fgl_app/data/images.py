"""Labelled images in memory, the one form that training, captioning and synthesis share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from fgl_app.data.decoding import to_rgb


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
    num_unreadable: int = 0
    """Images of both that could not be decoded and were left out."""


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


def to_pixels(
    picture: Image.Image, transforms: Sequence[tuple[str, int]], image_size: int, fit: str = "crop"
) -> torch.Tensor:
    """Turn a picture of any size and mode into uint8 ``[3, image_size, image_size]``.

    Args:
        picture: As its library decoded it; :mod:`fgl_app.data.decoding` says what becomes of its mode.
        transforms: The card's steps: ``resize`` (shorter side), ``pad`` (each side, with zeros), ``center-crop``; px.
        image_size: Side of the square, px.
        fit: How a picture that is not square becomes one. ``crop``: its shorter side is scaled to ``image_size`` and
            the centre square is kept; ``pad``: its longer side is scaled, and black fills what is missing on both
            sides; ``squash``: both sides are scaled, each by its own factor.
    """
    pixels = TF.pil_to_tensor(to_rgb(picture))
    for name, size in transforms:
        if name == "resize":
            pixels = TF.resize(_not_too_long(pixels), [size], antialias=True)
        elif name == "pad":
            pixels = TF.pad(pixels, [size])
        else:
            pixels = TF.center_crop(pixels, [size, size])
    if fit == "crop":
        pixels = TF.resize(_not_too_long(pixels), [image_size], antialias=True)
    else:
        longer = max(pixels.shape[-2:])
        sides = [max(1, round(side * image_size / longer)) for side in pixels.shape[-2:]]
        pixels = TF.resize(pixels, sides if fit == "pad" else [image_size, image_size], antialias=True)
    square: torch.Tensor = TF.center_crop(pixels, [image_size, image_size])  # which pads with zeros what is smaller
    return square


_LONGEST = 8
"""A longer side of more than so many shorter ones is cut at both ends before the shorter one is scaled: 20,000 px of
one row, a file of 138 bytes, would become 20,000 times as many pixels as the square that is kept."""


def _not_too_long(pixels: torch.Tensor) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    longest = _LONGEST * min(height, width)
    return (
        pixels if max(height, width) <= longest else TF.center_crop(pixels, [min(height, longest), min(width, longest)])
    )
