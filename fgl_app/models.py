"""Classifiers: torchvision's, with the usual stem for small images, and their way into Flower's records and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

import torch
import torchvision
from flwr.app import ArrayRecord
from safetensors.torch import load_file
from torch import nn

from fgl_app.errors import ConfigError, ModelError
from fgl_app.rng import derive_seed

SMALL_IMAGE_PX = 64
"""Below this side a ResNet's stem keeps the resolution (He et al. 2016, Section 4.2)."""


_MOST_CELLS = 8
"""Side of the feature map of a 32 px image, the largest that the CNN's dense layer takes as it is."""
_MCMAHANS_CELLS = 7
"""Side of the feature map of McMahan's own images, 28 px."""


class CNN(nn.Sequential):
    """Two 5 x 5 convolutions of 32 and 64 channels, each pooled, and a layer of 512 (McMahan et al. 2017, Section 3).

    It has no BatchNorm, and trains an order of magnitude faster than a ResNet: the model of large comparisons of small
    images. The dense layer would grow with the image, to 103 million weights at 224 px. Above 35 px the feature map is
    therefore averaged to that of a 28 px image, 7 x 7: the model then has 1.7 million weights, as McMahan's has.
    """

    def __init__(self, num_classes: int, image_size: int) -> None:
        """Make random weights for float images ``[N, 3, S, S]`` and ``num_classes`` logits."""
        cells = image_size // 4
        pool: nn.Module = nn.MaxPool2d(2)
        if cells > _MOST_CELLS:
            cells, pool = _MCMAHANS_CELLS, nn.Sequential(pool, nn.AdaptiveAvgPool2d(_MCMAHANS_CELLS))
        super().__init__(
            nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), pool,
            nn.Flatten(), nn.Linear(64 * cells**2, 512), nn.ReLU(), nn.Linear(512, num_classes),
        )  # fmt: skip


def check_model_name(name: str) -> None:
    """Check that there is a classifier of this name.

    Raises:
        ConfigError: If there is none.
    """
    known = ["cnn", *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["resnet18"]
        raise ConfigError(
            f"`model` must be cnn or a classifier of torchvision, but is {name!r}. Use {' or '.join(near)}."
        )


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


def check_all_trained(name: str, num_classes: int, image_size: int, key: str) -> None:
    """Check that the classifier has no arrays besides its trained weights, such as BatchNorm's statistics.

    Args:
        name: As for :func:`build_model`.
        num_classes: Number of classes.
        image_size: Side of the input, px.
        key: Key of the run configuration that wants it so.

    Raises:
        ConfigError: If it has some: neither clipping nor noise would cover what they say of single images.
    """
    model = build_model(name, num_classes, image_size, seed=0)
    untrained = sorted(set(model.state_dict()) - {own for own, _ in model.named_parameters()})
    if untrained:
        raise ConfigError(
            f"`model` must have no BatchNorm and no other array that is not trained where `{key}` is set, because "
            f"noise does not protect it, but {name} has {untrained[0]}. Use model=cnn."
        )


def check_draws_nothing(model: nn.Module, key: str) -> None:
    """Check that the classifier has no layer that draws random numbers in training, such as dropout.

    Args:
        model: The classifier.
        key: Key of the run configuration that wants it so.

    Raises:
        ConfigError: If it has some: PyTorch draws the masks of a whole batch at once, so that those of one image would
            depend on which other images are in it.
    """
    for layer in model.modules():
        if getattr(layer, "p", 0) and isinstance(
            layer, nn.modules.dropout._DropoutNd | torchvision.ops.StochasticDepth
        ):
            raise ConfigError(
                f"`{key}` needs a `model` without dropout, because the gradient of an image must depend on that image "
                f"alone, but this one has {type(layer).__name__}. Use model=cnn."
            )


def size_of(name: str, num_classes: int, image_size: int) -> tuple[int, int]:
    """Return how many trained weights a classifier has, and the bytes of its whole state dict, as clients send it."""
    with torch.device("meta"):
        model = build_model(name, num_classes, image_size, seed=0)
    weights = sum(weight.numel() for weight in model.parameters())
    return weights, sum(array.numel() * array.element_size() for array in model.state_dict().values())


def build_model(name: str, num_classes: int, image_size: int, seed: int, *, imagenet: bool = False) -> nn.Module:
    """Build a classifier with random or pretrained weights; the same seed gives the same weights.

    ResNets for images below 64 px get a 3 x 3 convolution of stride 1 as their stem and no max-pooling.

    Args:
        name: ``cnn``, or a name in torchvision, e.g. ``resnet18``.
        num_classes: Number of classes K.
        image_size: Side of the input, px.
        seed: Seed of the initial weights.
        imagenet: Start from torchvision's ImageNet weights; what does not fit, the last layer and the stem for small
            images, stays random.

    Returns:
        A module from float ``[N, 3, S, S]`` to logits ``[N, K]``.

    Raises:
        ConfigError: If there is no such classifier, or its ImageNet weights cannot be had.
    """
    check_model_name(name)
    if name == "cnn" and imagenet:
        raise ConfigError('`initial-weights` imagenet does not exist for model cnn. Use "random", or model resnet18.')
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(derive_seed(seed, "initial-weights"))
        if name == "cnn":
            return CNN(num_classes, image_size)
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, weights=None, **options)
        if isinstance(model, torchvision.models.ResNet) and image_size < SMALL_IMAGE_PX:
            model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
    if imagenet:
        _load_imagenet(name, model)
    return model


def imagenet_weights(name: str) -> dict[str, torch.Tensor]:
    """Return torchvision's default ImageNet weights of a classifier, from torch's cache or downloaded.

    They are not unpickled, as ``get_model(name, weights=...)`` would do with whatever the cached file holds.

    Raises:
        OSError: If they cannot be downloaded.
        ValueError: If the file holds anything but tensors, or is not torchvision's.
    """
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state: dict[str, torch.Tensor] = weights.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, ValueError, AttributeError):
        raise
    except Exception as error:  # a wrong hash, or what PyTorch raises at a file of anything but tensors
        raise ValueError(str(error)) from None
    # DenseNet's files are older than the names of its layers.
    return {_OF_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


_OF_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def _load_imagenet(name: str, model: nn.Module) -> None:
    try:
        pretrained = imagenet_weights(name)
    except (OSError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"`initial-weights` imagenet must be downloaded by torchvision for {name}, but cannot be "
            f'({type(error).__name__}). Use "random", or the path of a checkpoint.'
        ) from None
    own = model.state_dict()
    model.load_state_dict({key: pretrained[key] if _fits(pretrained, key, own) else own[key] for key in own})


def _fits(pretrained: Mapping[str, torch.Tensor], key: str, own: Mapping[str, torch.Tensor]) -> bool:
    return key in pretrained and pretrained[key].shape == own[key].shape


def load_checkpoint(path: str, model: nn.Module) -> nn.Module:
    """Load the weights that a run left below ``checkpoints/``.

    Raises:
        ConfigError: If the file cannot be read, or does not fit the model.
    """
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises an exception class of its own
        raise ConfigError(
            f"`initial-weights` must be random, imagenet or the absolute path of a checkpoint of the same `model` and "
            f"classes, but {path!r} cannot be loaded ({type(error).__name__})."
        ) from None
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
