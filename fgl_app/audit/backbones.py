"""Features of images for the search of replicas: pixels, the run's own classifier, or a pretrained backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from torch import nn

from fgl_app.data.images import ImageSet, resize
from fgl_app.errors import ConfigError, ModelError
from fgl_app.foundation_models import load_whole, locate, weights_variant
from fgl_app.models import imagenet_weights
from fgl_app.training import normalize

PIXELS_PX = 32
"""Side at which pixels are compared; larger images are averaged down to it, so that noise does not hide a copy."""
_BATCH = 64


@dataclass(frozen=True)
class Backbone:
    """Something that turns images into features."""

    name: str
    """How the report calls it."""
    size_px: int
    """Side of the images that it takes."""
    of_batch: Callable[[torch.Tensor], torch.Tensor]
    """From uint8 ``[B, 3, S, S]`` to float ``[B, D]``."""

    @torch.inference_mode()
    def __call__(self, data: ImageSet) -> npt.NDArray[np.float32]:
        """Return the features of all images, ``[N, D]``."""
        parts = [self.of_batch(resize(part, self.size_px)) for part in data.images.split(_BATCH)]
        return np.asarray(torch.cat(parts).float().cpu().numpy())


def open_backbone(
    source: str, classifier: Callable[[], nn.Module], image_size_px: int, device: torch.device
) -> Backbone:
    """Open a backbone.

    Args:
        source: ``pixels``; ``classifier``, the run's own; a classifier of torchvision by name, with its pretrained
            weights from torch's cache or its download; or a vision model of transformers by folder or hub id.
        classifier: Loads the run's last model.
        image_size_px: Side of its input.
        device: Where to run it.

    Raises:
        ConfigError: If there is no such backbone.
    """
    if source == "pixels":
        return Backbone(f"pixels at {PIXELS_PX} px", PIXELS_PX, lambda images: images.float().flatten(1))
    if source == "classifier":
        network = classifier().to(device)
        return Backbone(
            "last features of the run's classifier",
            image_size_px,
            _before_last_layer(network, lambda images: normalize(images.to(device))),
        )
    if source in torchvision.models.list_models(module=torchvision.models):
        return _of_torchvision(source, device)
    return _of_transformers(source, device)


def _of_torchvision(name: str, device: torch.device) -> Backbone:
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state = imagenet_weights(name)
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **options).eval().to(device)
        model.load_state_dict(state)
        if hasattr(model, "transform_input"):
            model.transform_input = True  # as these two were trained
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`--backbone` {name} must have its weights in torch's cache or be downloaded, but neither works "
            f"({type(error).__name__}). Use pixels, or the folder of a vision model."
        ) from None
    transform = weights.transforms()
    return Backbone(
        f"{name} of torchvision",
        transform.crop_size[0],
        _before_last_layer(model, lambda images: transform(images).to(device)),
    )


def _of_transformers(source: str, device: torch.device) -> Backbone:
    from transformers import AutoImageProcessor, AutoModel  # seconds of import, for few audits

    path, revision = locate(source, "")
    try:
        processor: Any = AutoImageProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
        model: Any = load_whole(
            AutoModel, path, spared="pooler", revision=revision, variant=weights_variant(path, revision),
            use_safetensors=True, trust_remote_code=False,
        )  # fmt: skip
        model.eval().to(device)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`--backbone` must be pixels, classifier, a classifier of torchvision, or a vision model of transformers "
            f"by folder or hub id, but {source!r} is none ({type(error).__name__}). Use pixels."
        ) from None

    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(device)
        if hasattr(model, "get_image_features"):  # CLIP, SigLIP
            found = model.get_image_features(pixel_values=pixels)
            return _tensor(getattr(found, "pooler_output", found))
        output = model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        return _tensor(pooled if pooled is not None else output.last_hidden_state.mean(dim=1)).flatten(1)

    size = processor.size
    side = int(size.get("height") or size.get("shortest_edge") or PIXELS_PX)
    return Backbone(f"{Path(source).name} of transformers", side, features)


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ModelError("`--backbone` must return one vector for an image, but does not. Use pixels.")
    return value


def _before_last_layer(
    model: nn.Module, prepare: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that gives what the model's last linear layer reads."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError("`--backbone` must end in a linear layer, but has none. Use pixels.")
    read: list[torch.Tensor] = []
    linear[-1].register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))

    def features(images: torch.Tensor) -> torch.Tensor:
        read.clear()
        model(prepare(images))
        return read[-1].flatten(1)

    return features
