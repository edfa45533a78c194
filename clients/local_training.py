"""Local training and evaluation of the global model on one client's images."""

from __future__ import annotations

import torch
from torch import nn

from fgl_app.data.images import HeldOut, ImageSet
from fgl_app.training import Evaluation, evaluate, train

WEIGHT_DECAY = 1e-4
"""FGL, Appendix: the clients' L2 penalty."""


def train_locally(
    model: nn.Module,
    data: ImageSet,
    *,
    local_epochs: int,
    batch_size: int,
    learning_rate: float,
    augmentation: str,
    proximal_mu: float = 0.0,
    generator: torch.Generator,
    device: torch.device,
    compiled: bool = False,
) -> float:
    """Run ``local_epochs`` epochs of SGD with a new optimizer (McMahan et al. 2017, Algorithm 1: ClientUpdate).

    With ``proximal_mu`` > 0 the loss is that of FedProx (Li et al. 2020, Eq. 2): F(w) + mu/2 ||w - w_t||^2, where w_t
    are the weights received.

    Returns:
        Mean loss over the last epoch, nats.
    """
    return train(
        model,
        data,
        epochs=local_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=WEIGHT_DECAY,
        augmentation=augmentation,
        proximal_mu=proximal_mu,
        generator=generator,
        device=device,
        compiled=compiled,
    )


def evaluate_held_out(model: nn.Module, held_out: HeldOut, device: torch.device) -> tuple[Evaluation, Evaluation]:
    """Evaluate on the client's validation and test images, in this order."""
    return evaluate(model, held_out.validation, device), evaluate(model, held_out.test, device)
