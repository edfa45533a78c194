"""Divide a data set over clients, with the partitioners of flwr-datasets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

from fgl_app.errors import DataError
from fgl_app.rng import derive_seed

_MAX_DRAWS = 20


def partition_indices(
    labels: Sequence[int], num_partitions: int, scheme: str, beta: float, min_samples: int, seed: int
) -> list[list[int]]:
    """Divide the indices of a data set over clients; disjoint and complete.

    Args:
        labels: Label of each image, length N.
        num_partitions: Number of clients.
        scheme: ``iid`` or ``dirichlet``. The latter draws, for each class, the clients' shares from Dir(beta)
            (Hsu et al. 2019; FGL, Section 4.1).
        beta: Concentration of the Dirichlet distribution, > 0.
        min_samples: Draw again until every client has this many images.
        seed: Seed of the draw; every node derives the same division from it.

    Returns:
        For each partition id, sorted indices into ``labels``.

    Raises:
        DataError: If no draw gives every client ``min_samples`` images.
    """
    table = Dataset.from_dict({"index": list(range(len(labels))), "label": list(labels)})
    for attempt in range(_MAX_DRAWS):
        draw_seed = derive_seed(seed, "partition", attempt) % 2**32
        partitioner: Partitioner
        if scheme == "iid":
            partitioner = IidPartitioner(num_partitions)
        else:
            partitioner = DirichletPartitioner(
                num_partitions, "label", beta, min_partition_size=min_samples, self_balancing=False, seed=draw_seed
            )
        partitioner.dataset = table.shuffle(seed=draw_seed)
        try:
            with warnings.catch_warnings(action="ignore"):  # it warns of each draw that it repeats
                parts = [sorted(partitioner.load_partition(index)["index"]) for index in range(num_partitions)]
        except ValueError:  # the partitioner gives up after ten draws
            continue
        if min(map(len, parts)) >= min_samples:
            return parts
    raise DataError(
        f"Every client must have at least {min_samples} images, but no division of {len(labels)} images over "
        f"{num_partitions} clients was found. Use a larger `dirichlet-beta`, fewer clients or a smaller "
        "`min-samples-per-client`."
    )
