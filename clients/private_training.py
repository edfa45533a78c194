"""Local training by DP-SGD, which protects each single image of the client: by Opacus, with secret randomness."""

from __future__ import annotations

import secrets

import numpy as np
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from clients.local_training import WEIGHT_DECAY
from fgl_app.data.images import ImageSet
from fgl_app.errors import ConfigError
from fgl_app.models import check_draws_nothing
from fgl_app.privacy.accounting import poisson_schedule
from fgl_app.rng import secret_generator
from fgl_app.training import MOMENTUM, NUMBERS_PER_CROP, augment_by

_IMAGES_AT_A_TIME = 32
"""Each has gradients of its own in memory, as large as the model; a step adds up as many such parts as it needs."""


def train_privately(
    model: nn.Module,
    data: ImageSet,
    *,
    local_epochs: int,
    batch_size: int,
    learning_rate: float,
    augmentation: str,
    proximal_mu: float = 0.0,
    noise_multiplier: float,
    clipping_norm: float,
    device: torch.device,
    secret: int | None = None,
) -> None:
    """Run DP-SGD (Abadi et al. 2016, Algorithm 1) in the place of :func:`clients.local_training.train_locally`.

    Each step draws each image by itself with rate q, scales each gradient g_i to a norm of at most C, and moves the
    weights by momentum SGD along (sum_i g_i + N(0, (z C)^2)) / (q n), where z is ``noise_multiplier``, C is
    ``clipping_norm`` and n the number of images; :func:`fgl_app.privacy.accounting.poisson_schedule` gives q and the
    number of steps. Weight decay and FedProx's term are added behind the noise, because they do not depend on images.
    No loss is returned: it would tell of the images without noise.

    Args:
        model: From float ``[N, 3, S, S]`` to logits ``[N, K]``, without BatchNorm; trained in place.
        data: At least one image.
        local_epochs: Epochs, of ceil(n / ``batch_size``) steps each.
        batch_size: Expected images of a step, q n.
        learning_rate: Step size.
        augmentation: ``none``, ``crop`` or ``crop-flip``.
        proximal_mu: Weight of FedProx's term; see :func:`clients.local_training.train_locally`.
        noise_multiplier: z >= 0; 0 clips only and protects nothing.
        clipping_norm: C > 0.
        device: Where to train.
        secret: Seed of the draw, the crops and the noise, which nobody else may know; the run's seed would not do,
            because the server and the clients know it. None for a new one.

    Raises:
        ConfigError: If Opacus has no gradients of single images for the model, or the model draws random numbers.
    """
    check_draws_nothing(model, "example-dp-noise")
    secret = secrets.randbits(128) if secret is None else secret
    try:
        wrapped = GradSampleModule(model.to(device).train(), loss_reduction="mean", strict=True)
    except NotImplementedError as error:
        raise ConfigError(
            f"`model` must be one that Opacus can train where `example-dp-noise` is set, but is not: "
            f"{' '.join(str(error).split())[:200]}. Use model=cnn."
        ) from None
    rate, steps = poisson_schedule(len(data), batch_size, local_epochs)
    expected = rate * len(data)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
        noise_multiplier=0.0,  # Opacus's noise comes from a generator of PyTorch; see `secret_generator`
        max_grad_norm=clipping_norm,
        expected_batch_size=expected,  # a divisor, which need not be whole
    )
    anchor = [weight.detach().clone() for weight in model.parameters()]
    source = secret_generator(secret, "noise")

    def add_noise(step: DPOptimizer) -> None:
        for weight, first in zip(model.parameters(), anchor, strict=True):
            assert weight.grad is not None
            noise = torch.from_numpy(source.standard_normal(weight.shape, dtype=np.float32))
            weight.grad.add_(noise.to(device), alpha=noise_multiplier * clipping_norm / expected)
            weight.grad.add_(weight.detach() - first, alpha=proximal_mu)

    optimizer.attach_step_hook(add_noise)
    for step in range(steps):
        drawn, numbers = draw_images(secret, step, len(data), rate)
        parts = list(zip(drawn.split(_IMAGES_AT_A_TIME), numbers.split(_IMAGES_AT_A_TIME), strict=True))
        for number, (rows, of_crops) in enumerate(parts, 1):
            optimizer.zero_grad(set_to_none=True)
            if len(rows):
                pixels = augment_by(data.images[rows].to(device), augmentation, of_crops)
                # Opacus 1.6 gives wrong gradients of convolutions, without a word, for channels-last images; its
                # hooks on the first layer want images with a gradient.
                pixels = pixels.contiguous().requires_grad_()
                F.cross_entropy(wrapped(pixels), data.labels[rows].to(device)).backward()
            else:  # nobody was drawn: a step of noise alone
                for weight in model.parameters():  # Opacus keeps its gradients there, beside torch's own
                    weight.grad_sample = torch.zeros(0, *weight.shape, device=device)  # type: ignore[attr-defined]
            optimizer.signal_skip_step(do_skip=number < len(parts))
            optimizer.step()
    wrapped.to_standard_module().to("cpu")


def draw_images(secret: int, step: int, num_images: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the images of a step, each by itself, and the random numbers of their crops.

    What is drawn for an image depends on the secret, the step and the image's index alone. Amplification by sampling
    needs that: if whether one image is drawn moved the crops of the others, the sum of the gradients would tell more of
    it than its own clipped gradient, which is all that the accountant counts.

    Args:
        secret: What nobody else may know.
        step: Number of the step.
        num_images: n.
        rate: q, the probability of each image.

    Returns:
        Indices of the drawn images, in order, int64 ``[M]``, and their numbers for
        :func:`fgl_app.training.augment_by`, float32 ``[M, 5]``.
    """
    # One row of numbers for each image, drawn or not. Of a larger set the first rows are the same.
    numbers = torch.from_numpy(secret_generator(secret, "images", step).random((num_images, 1 + NUMBERS_PER_CROP)))
    drawn = torch.nonzero(numbers[:, 0] < rate).flatten()
    return drawn, numbers[drawn, 1:].float()
