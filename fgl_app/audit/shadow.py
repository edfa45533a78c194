"""Shadow models: the same federation once more on other halves of the real images, run in this process."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from clients.local_training import train_locally
from fgl_app.audit.material import Material, RealImages
from fgl_app.data.images import ImageSet
from fgl_app.data.partition import partition_indices
from fgl_app.errors import ConfigError
from fgl_app.models import from_arrays
from fgl_app.phases import SERVER_WEIGHT_DECAY, initial_arrays
from fgl_app.privacy.membership import random_halves
from fgl_app.rng import derive_seed, numpy_generator, torch_generator
from fgl_app.settings import Settings
from fgl_app.training import pick_device, train

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


def train_shadows(material: Material, pool: ImageSet, number: int) -> tuple[list[nn.Module], torch.Tensor]:
    """Train shadow models of a run on random halves of a pool of real images.

    Each is trained like the run's last model: from the same weights (of a run that draws images those of its one-shot
    model, which no real image has touched), with the run's rounds, local epochs, step sizes and partition of the half
    over as many clients. The mean is FedAvg's whatever the run's strategy, all clients take part in every round, and
    fine-tuning on synthetic images and differential privacy are left out.

    Args:
        material: The run.
        pool: Members and others together, N images.
        number: Shadow models, even.

    Returns:
        The models, and whether each was trained on each image, bool ``[S, N]``.

    Raises:
        DataError: If a half cannot be divided over the clients as the run's images were.
    """
    settings = material.settings
    inside = random_halves(len(pool), number, numpy_generator(settings.run.seed, "audit", "halves"))
    trained = []
    for index in range(number):
        half = pool.take(inside[index].nonzero()[0].tolist())
        seed = derive_seed(settings.run.seed, "audit", "shadow", index)
        network = _start(material)
        if settings.run.method == "centralized":
            _train_centrally(settings, network, half, material.last_round, seed)
        else:
            rounds = material.last_round - settings.synthesizes
            _train_federated(settings, network, half, max(1, rounds), seed)
        trained.append(network.eval())
    return trained, torch.from_numpy(inside)


def pool_of(images: RealImages) -> ImageSet:
    """Put members and others into one set, members first."""
    members, others = images.members, images.others
    domains = None
    if members.domains is not None and others.domains is not None:
        domains = torch.cat([members.domains, others.domains])
    return ImageSet(torch.cat([members.images, others.images]), torch.cat([members.labels, others.labels]), domains)


def _start(material: Material) -> nn.Module:
    settings = material.settings
    network = material.model(1 if settings.synthesizes else material.last_round)
    if not settings.synthesizes:
        from_arrays(network, initial_arrays(settings, material.run.class_names))
    return network


def _train_centrally(settings: Settings, network: nn.Module, data: ImageSet, rounds: int, seed: int) -> None:
    for number in range(1, rounds + 1):
        train(
            network,
            data,
            epochs=settings.training.local_epochs,
            batch_size=settings.training.batch_size,
            learning_rate=settings.training.server_learning_rate,
            weight_decay=SERVER_WEIGHT_DECAY,
            augmentation=settings.training.augmentation,
            schedule=settings.training.server_schedule,
            generator=torch_generator(seed, number),
            device=pick_device(settings.run.device),
        )


def _train_federated(settings: Settings, network: nn.Module, data: ImageSet, rounds: int, seed: int) -> None:
    parts = [data.take(rows) for rows in _partition(settings, data, seed) if rows]
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


def _partition(settings: Settings, data: ImageSet, seed: int) -> list[list[int]]:
    chosen = settings.data
    return partition_indices(
        data.labels.tolist(),
        None if data.domains is None else data.domains.tolist(),
        settings.run.num_clients,
        "iid" if settings.own_folders else chosen.partition,
        beta=chosen.dirichlet_beta,
        classes_per_client=chosen.classes_per_client,
        shards_per_client=chosen.shards_per_client,
        min_samples=0 if settings.own_folders else chosen.min_samples_per_client,
        seed=seed,
    )


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
