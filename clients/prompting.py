"""Write a client's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fgl_app.data.images import ImageSet
from fgl_app.prompts import PromptCount, class_prompts, instance_prompts

Captioner = Callable[[torch.Tensor], list[str]]
"""From uint8 images ``[N, 3, S, S]`` to N captions."""


def write_prompts(
    data: ImageSet,
    class_names: Sequence[str],
    *,
    class_template: str,
    instance_template: str,
    captioner: Captioner | None,
) -> list[PromptCount]:
    """Turn a client's images into distinct prompts with counts; no image and no file name is in them.

    Args:
        data: The client's training images.
        class_names: The run's K class names.
        class_template: Template of class-level prompts.
        instance_template: Template of instance-level prompts.
        captioner: Captions each image (instance level); None for class-level prompts.
    """
    labels = data.labels.tolist()
    if captioner is None:
        return class_prompts(labels, class_names, class_template)
    return instance_prompts(labels, captioner(data.images), class_names, instance_template)
