"""Classifiers: torchvision's, with the usual stem for small images, and their way into Flower's records and back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
import torchvision
from flwr.app import ArrayRecord
from torch import nn

from fgl_app.errors import ConfigError, ModelError
from fgl_app.rng import derive_seed

SMALL_IMAGE_PX = 64
"""Below this side a ResNet's stem keeps the resolution (He et al. 2016, Section 4.2)."""


def check_model_name(name: str) -> None:
    """Check that torchvision has a classifier of this name.

    Raises:
        ConfigError: If it has none.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["resnet18"]
        raise ConfigError(f"`model` must be a classifier of torchvision, but is {name!r}. Use {' or '.join(near)}.")


def check_model(name: str, num_classes: int, image_size: int) -> None:
    """Check that torchvision has the classifier and that it trains on images of this size.

    Raises:
        ConfigError: If it has none, or the images are too small for it.
    """
    model = build_model(name, num_classes, image_size, seed=0).train()
    try:
        with torch.no_grad():
            model(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError):
        raise ConfigError(
            f"`model` {name} must take images of `image-size` {image_size} px, but cannot. Use resnet18, or the "
            "size that the model was made for, e.g. 224."
        ) from None


def build_model(name: str, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Build a classifier with random weights; the same seed gives the same weights.

    ResNets for images below 64 px get a 3 x 3 convolution of stride 1 as their stem and no max-pooling.

    Args:
        name: Name in torchvision, e.g. ``resnet18``.
        num_classes: Number of classes K.
        image_size: Side of the input, px.
        seed: Seed of the initial weights.

    Returns:
        A module from float ``[N, 3, S, S]`` to logits ``[N, K]``.

    Raises:
        ConfigError: If torchvision has no such classifier.
    """
    check_model_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(derive_seed(seed, "initial-weights"))
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, weights=None, **options)
        if isinstance(model, torchvision.models.ResNet) and image_size < SMALL_IMAGE_PX:
            model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
    return model


def to_arrays(model: nn.Module) -> ArrayRecord:
    """Copy the whole state dict, BatchNorm statistics included, into a Flower record."""
    return ArrayRecord({name: value.detach().cpu() for name, value in model.state_dict().items()})


def from_arrays(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Load a Flower record into ``model``.

    Raises:
        ModelError: If names or shapes do not fit the model.
    """
    state: Mapping[str, torch.Tensor] = arrays.to_torch_state_dict()
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise ModelError(
            "The arrays received must fit the model, but names or shapes differ. All nodes must use the same `model`, "
            "`image-size` and class names."
        ) from None
    return model
