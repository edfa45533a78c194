"""Shadow models: the same federation once more on other halves of the attacked images, run in this process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clients.local_training import train_locally
from fgl_app.audit.material import Material
from fgl_app.data.images import ImageSet
from fgl_app.data.sources import divided
from fgl_app.errors import ConfigError
from fgl_app.models import from_arrays
from fgl_app.phases import initial_arrays, train_on_server
from fgl_app.privacy.lira import random_halves
from fgl_app.rng import derive_seed, numpy_generator, torch_generator
from fgl_app.settings import Settings
from fgl_app.training import pick_device

LEAST_SHADOW_MODELS = 4
"""Every image must be left out by two models at least."""


def check_number(shadow_models: int) -> None:
    """Check the number of shadow models.

    Raises:
        ConfigError: If it is neither 0 nor even and large enough.
    """
    if shadow_models and (shadow_models < LEAST_SHADOW_MODELS or shadow_models % 2):
        raise ConfigError(
            f"`--shadow-models` must be 0 or an even number from {LEAST_SHADOW_MODELS} on, because each pair of models "
            f"divides the images between them, but is {shadow_models}. Use for example 16."
        )


def train_shadows(
    material: Material, pool: ImageSet, rest: ImageSet | None, number: int
) -> tuple[list[nn.Module], torch.Tensor]:
    """Train shadow models of a run on random halves of a pool of real images, and all on the members beside it.

    The members that are not attacked make a shadow model's training set as large as the run's: a model of fewer images
    remembers each of them better and is less sure of others, so that the attack would find less than it can. Carlini et
    al. 2022 draw shadow sets of that size from the distribution; that the attacker here knows those members makes it
    stronger, if anything, than theirs.

    Each is trained like the run's last model: from the same weights (of a run that draws images those of its one-shot
    model, which no real image has touched), with the run's rounds, local epochs, step sizes and partition of its
    images over as many clients. The mean is FedAvg's whatever the run's strategy, all clients take part in every round,
    and fine-tuning on synthetic images and differential privacy are left out.

    Args:
        material: The run.
        pool: Attacked members and others together, N images.
        rest: Members that are not attacked; None for none.
        number: Shadow models, even.

    Returns:
        The models, and whether each was trained on each image, bool ``[S, N]``.

    Raises:
        DataError: If a training set cannot be divided over the clients as the run's images were.
    """
    settings = material.settings
    inside = random_halves(len(pool), number, numpy_generator(settings.run.seed, "audit", "halves"))
    train_shadow = _train_centrally if settings.run.method == "centralized" else _train_federated
    trained = [
        train_shadow(material, training_set(pool, half, rest), index).eval() for index, half in enumerate(inside)
    ]
    return trained, torch.from_numpy(inside)


def training_set(pool: ImageSet, half: npt.NDArray[np.bool_], rest: ImageSet | None) -> ImageSet:
    """Return what a shadow model is trained on: its half of the pool, bool ``[N]``, and the members beside the pool."""
    chosen = pool.take(half.nonzero()[0].tolist())
    return chosen if rest is None else joined(chosen, rest)


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """Put two sets of images into one, in this order."""
    domains = None
    if first.domains is not None and second.domains is not None:
        domains = torch.cat([first.domains, second.domains])
    return ImageSet(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]), domains)


def _train_centrally(material: Material, data: ImageSet, index: int) -> nn.Module:
    settings, class_names = material.settings, material.run.class_names
    arrays = initial_arrays(settings, class_names)
    for number in range(1, material.last_round + 1):
        arrays = train_on_server(
            settings,
            class_names,
            arrays,
            data,
            epochs=settings.training.local_epochs,
            scope=("audit", "shadow", index, number),
        )
    return from_arrays(material.model(material.last_round), arrays)


def _train_federated(material: Material, data: ImageSet, index: int) -> nn.Module:
    settings = material.settings
    seed = derive_seed(settings.run.seed, "audit", "shadow", index)
    if settings.synthesizes:
        network = material.model(1)
    else:
        network = from_arrays(material.model(material.last_round), initial_arrays(settings, material.run.class_names))
    parts = [data.take(rows) for rows in _partition(settings, data, seed) if rows]
    rounds = max(1, material.last_round - settings.synthesizes)
    uniform = settings.training.weighting == "uniform"
    for number in range(1, rounds + 1):
        states, weights = [], []
        for client, part in enumerate(parts):
            local = copy.deepcopy(network)
            train_locally(
                local,
                part,
                local_epochs=settings.training.local_epochs,
                batch_size=settings.training.batch_size,
                learning_rate=settings.training.learning_rate,
                augmentation=settings.training.augmentation,
                generator=torch_generator(seed, number, client),
                device=pick_device(settings.run.device),
            )
            states.append(local.state_dict())
            weights.append(1.0 if uniform else float(len(part)))
        network.load_state_dict(_mean(states, weights))
    return network


def _partition(settings: Settings, data: ImageSet, seed: int) -> list[list[int]]:
    chosen = settings.data
    if settings.own_folders:
        chosen = dataclasses.replace(chosen, partition="iid", min_samples_per_client=0)
    domains = None if data.domains is None else data.domains.tolist()
    return divided(chosen, data.labels.tolist(), domains, settings.run.num_clients, seed)


def _mean(states: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """McMahan et al. 2017, Algorithm 1: the weighted mean of each array; integers stay integers."""
    total = sum(weights)
    return {
        name: torch.stack(
            [state[name].double() * (weight / total) for state, weight in zip(states, weights, strict=True)]
        )
        .sum(dim=0)
        .to(first.dtype)
        for name, first in states[0].items()
    }
