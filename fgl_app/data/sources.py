"""The one interface to data: which images a client trains on, and which ones measure the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fgl_app.config import DataSettings, RunConfigValue, class_name_list
from fgl_app.data import digits
from fgl_app.data.folder import load_folder, split_folder
from fgl_app.data.images import HeldOut, ImageSet, resize
from fgl_app.data.partition import partition_indices
from fgl_app.errors import DataError

SHOWN_SIZE_PX = 32
"""Side at which the digits are shown to people and models, px."""


@dataclass(frozen=True)
class ClientData:
    """What one client holds."""

    train: ImageSet
    """Its private training images."""
    held_out: HeldOut
    """Images that it evaluates on."""
    partition_id: int
    """Its place among the clients, 0 to M - 1."""


def class_names_of(settings: DataSettings) -> tuple[str, ...]:
    """Return the run's K class names, as they appear in prompts."""
    return digits.CLASS_NAMES if settings.dataset == "digits" else tuple(class_name_list(settings.class_names))


def load_client_data(settings: DataSettings, node_config: Mapping[str, RunConfigValue], seed: int) -> ClientData:
    """Load the images of one client.

    Args:
        settings: The run's data settings.
        node_config: The SuperNode's configuration: ``partition-id`` and ``num-partitions`` for partitioned data,
            ``data-path`` for a folder of images per class.
        seed: The run's seed, from which all clients derive the same partition.

    Raises:
        DataError: If the node-config lacks what the data set needs, or the images cannot be used.
    """
    partition_id = node_config.get("partition-id", 0)
    if not isinstance(partition_id, int):
        raise DataError(f"`partition-id` in the node-config must be a whole number, but is {partition_id!r}.")
    if settings.dataset == "folder":
        path = node_config.get("data-path")
        if not isinstance(path, str):
            raise DataError("The node-config must hold `data-path`, e.g. --node-config 'data-path=\"/data/site0\"'.")
        train, held_out = split_folder(
            load_folder(Path(path).expanduser(), class_names_of(settings), settings.image_size)
        )
        return ClientData(train, held_out, partition_id)
    num_partitions = node_config.get("num-partitions")
    if not isinstance(num_partitions, int) or not 0 <= partition_id < num_partitions:
        raise DataError(
            f"The node-config must hold partition-id 0 to num-partitions - 1, but holds {partition_id!r} and "
            f"{num_partitions!r}. Use for example --node-config 'partition-id=0 num-partitions=5'."
        )
    train = digits_split(settings, "train")
    parts = partition_indices(
        train.labels.tolist(), num_partitions, settings.partition, settings.dirichlet_beta,
        settings.min_samples_per_client, seed,
    )  # fmt: skip
    return ClientData(train.take(parts[partition_id]), load_held_out(settings), partition_id)


def load_held_out(settings: DataSettings) -> HeldOut:
    """Load the common validation and test images of a partitioned data set."""
    return HeldOut(digits_split(settings, "validation"), digits_split(settings, "test"))


def digits_split(settings: DataSettings, part: str) -> ImageSet:
    """Load ``public``, ``train``, ``validation`` or ``test`` of the digits at the run's image size."""
    images, labels = digits.load()
    rows = digits.split_indices(labels)[part]
    # A scan of 8 x 8 is first shown at 32 x 32, as synthetic images are, so that both come to the classifier alike.
    shown = resize(torch.from_numpy(images[rows])[:, None].expand(-1, 3, -1, -1).contiguous(), SHOWN_SIZE_PX)
    return ImageSet(resize(shown, settings.image_size), torch.from_numpy(labels[rows]))
