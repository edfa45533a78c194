"""Divide a data set over clients, with the partitioners of flwr-datasets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)

from fgl_app.errors import DataError
from fgl_app.rng import derive_seed

_MAX_DRAWS = 20
_REMEDIES = {
    "iid": "fewer clients",
    "dirichlet": "fewer clients, a larger `dirichlet-beta`",
    "pathological": "fewer clients, a smaller `classes-per-client`",
    "shards": "fewer clients, a smaller `shards-per-client`",
    "domain": "data with more images of each domain",
}
"""What makes a division of each scheme possible."""


def partition_indices(
    labels: Sequence[int],
    domains: Sequence[int] | None,
    num_partitions: int,
    scheme: str,
    *,
    beta: float,
    classes_per_client: int,
    shards_per_client: int,
    min_samples: int,
    seed: int,
) -> list[list[int]]:
    """Divide the indices of a data set over clients.

    No two clients share an image. Left out are classes that nobody is given, and what remains when shards are dealt
    out evenly.

    Args:
        labels: Label of each image, length N.
        domains: Domain of each image, length N, for the scheme ``domain``.
        num_partitions: Number of clients M.
        scheme: ``iid``; ``dirichlet`` draws, for each class, the clients' shares from Dir(beta) (Hsu et al. 2019; FGL,
            Section 4.1); ``pathological`` gives each client some classes (Li et al. 2022); ``shards`` deals out shards
            of the images sorted by class (McMahan et al. 2017); ``domain`` gives each client one domain.
        beta: Concentration of the Dirichlet distribution, > 0.
        classes_per_client: Classes of each client (``pathological``).
        shards_per_client: Shards of each client (``shards``).
        min_samples: Draw again until every client has this many images.
        seed: Seed of the draw; every node derives the same division from it.

    Returns:
        For each partition id, sorted indices into ``labels``.

    Raises:
        DataError: If the images are too few for the division, no draw gives every client ``min_samples`` images, or
            there are not as many domains as clients.
    """
    if scheme == "domain" and (found := len(set(domains or ()))) != num_partitions:
        raise DataError(f"`num-clients` must be the number of domains, {found}, but is {num_partitions}.")
    _check_possible(
        labels,
        num_partitions,
        min_samples,
        classes_per_client=classes_per_client if scheme == "pathological" else 1,
        shards_per_client=shards_per_client if scheme == "shards" else 1,
    )
    columns = {"index": list(range(len(labels))), "label": list(labels)}
    table = Dataset.from_dict(columns | ({} if domains is None else {"domain": list(domains)}))
    reason = ""
    for attempt in range(_MAX_DRAWS):
        draw_seed = derive_seed(seed, "partition", attempt) % 2**32
        partitioner: Partitioner
        if scheme == "iid":
            partitioner = IidPartitioner(num_partitions)
        elif scheme == "dirichlet":
            partitioner = DirichletPartitioner(
                num_partitions, "label", beta, min_partition_size=min_samples, self_balancing=False, seed=draw_seed
            )
        elif scheme == "pathological":
            partitioner = PathologicalPartitioner(
                num_partitions, "label", classes_per_client, class_assignment_mode="first-deterministic", seed=draw_seed
            )
        elif scheme == "shards":
            partitioner = ShardPartitioner(
                num_partitions, "label", num_shards_per_partition=shards_per_client, seed=draw_seed
            )
        else:
            partitioner = NaturalIdPartitioner("domain")
        partitioner.dataset = table if scheme == "domain" else table.shuffle(seed=draw_seed)
        try:
            with warnings.catch_warnings(action="ignore"):  # it warns of each draw that it repeats
                parts = [sorted(partitioner.load_partition(index)["index"]) for index in range(num_partitions)]
        except ValueError as error:  # after ten draws of its own, or for a division that cannot be
            reason = f" ({error})"
            continue
        if min(map(len, parts)) >= min_samples:
            return parts
    raise DataError(
        f"Every client must have at least {min_samples} images, but no {scheme} division of {len(labels)} images over "
        f"{num_partitions} clients was found{reason}. Use {_REMEDIES[scheme]} or a smaller `min-samples-per-client`."
    )


def _check_possible(
    labels: Sequence[int], num_partitions: int, min_samples: int, *, classes_per_client: int, shards_per_client: int
) -> None:
    """Refuse what no draw can fulfil, which the partitioners answer with errors of their own or with none."""
    num_images, num_classes = len(labels), len(set(labels))
    if num_images < num_partitions * max(1, min_samples):
        raise DataError(
            f"There are {num_images} images to train on, too few for {num_partitions} clients with at least "
            f"{max(1, min_samples)} each. Use fewer clients or a smaller `min-samples-per-client`."
        )
    if classes_per_client > num_classes:
        raise DataError(
            f"`classes-per-client` is {classes_per_client}, but the images to train on have {num_classes} "
            f"{'class' if num_classes == 1 else 'classes'}. Use at most {num_classes}."
        )
    if num_partitions * shards_per_client > num_images:
        raise DataError(
            f"`shards-per-client` is {shards_per_client}, so {num_partitions} clients need "
            f"{num_partitions * shards_per_client} shards, but there are {num_images} images to train on. Use at most "
            f"{num_images // num_partitions}."
        )
