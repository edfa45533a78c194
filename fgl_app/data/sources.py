"""The one interface to data: which images a client trains on, and which ones measure the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.model_selection import train_test_split

from fgl_app.cards import Card, load_card
from fgl_app.data.division import divide, private_state
from fgl_app.data.folder import class_folders, decode_readable, load_folder, split_folder
from fgl_app.data.images import HeldOut, ImageSet, to_pixels
from fgl_app.data.partition import partition_indices
from fgl_app.data.readers import Part, open_part
from fgl_app.errors import DataError
from fgl_app.settings import DataSettings, RunConfigValue


@dataclass(frozen=True)
class ClientData:
    """What one client holds."""

    train: ImageSet
    """Its private training images."""
    held_out: Callable[[], HeldOut]
    """Loads the images that it evaluates on."""
    partition_id: int
    """Its place among the clients, 0 to M - 1."""
    class_names: tuple[str, ...]
    """What the labels count: the card's classes, or the client's own where the label space is not yet known."""
    num_unreadable: int = 0
    """Files among its images that could not be read and were left out."""


def load_client_data(
    card: Card,
    settings: DataSettings,
    node_config: Mapping[str, RunConfigValue],
    seed: int,
    class_names: Sequence[str] | None = None,
) -> ClientData:
    """Load the images of one client.

    Args:
        card: The data set.
        settings: The run's data settings.
        node_config: The SuperNode's configuration: ``partition-id`` and ``num-partitions`` for partitioned data. For a
            node's own: ``data-path``, a folder of images per class, or ``card``, and ``data-path`` where its data lie.
        seed: The run's seed, from which all clients derive the same division and partition.
        class_names: For folders: the run's label space; None for the client's own classes.

    Raises:
        DataError: If the node-config lacks what the data set needs, or the images cannot be used.
    """
    partition_id = node_config.get("partition-id", 0)
    if not isinstance(partition_id, int):
        raise DataError(f"`partition-id` in the node-config must be a whole number, but is {partition_id!r}.")
    if settings.dataset == "folder":
        named = class_names or card.class_names()
        if "card" in node_config:
            images, num_unreadable, names = _load_own_card(node_config, named, settings)
        else:
            path = node_config.get("data-path")
            if not isinstance(path, str):
                raise DataError(
                    "The node-config must hold `data-path` or `card`, e.g. --node-config 'data-path=\"/data/site0\"'."
                )
            folder = Path(path).expanduser()
            names = tuple(named or class_folders(folder))
            images, unreadable = load_folder(folder, names, settings.image_size)
            num_unreadable = len(unreadable)
        train, held_out = split_folder(images)
        return ClientData(train, lambda: held_out, partition_id, names, num_unreadable)
    num_partitions = node_config.get("num-partitions")
    if not isinstance(num_partitions, int) or not 0 <= partition_id < num_partitions:
        raise DataError(
            f"The node-config must hold partition-id 0 to num-partitions - 1, but holds {partition_id!r} and "
            f"{num_partitions!r}. Use for example --node-config 'partition-id=0 num-partitions=5'."
        )
    train = _partition(card, settings, num_partitions, partition_id, seed)
    return ClientData(train, functools.partial(load_held_out, card, settings, seed), partition_id, card.class_names())


def _load_own_card(
    node_config: Mapping[str, RunConfigValue], class_names: Sequence[str], settings: DataSettings
) -> tuple[ImageSet, int, tuple[str, ...]]:
    """Load the training part of a node's own card, whose classes are found in the run's by their names.

    Returns:
        The readable images, the number of unreadable files, and the run's classes, or the card's where the run has
        none yet.
    """
    card = load_card(str(node_config["card"]))
    names = tuple(class_names or card.class_names())
    absent = [name for name in card.class_names() if name not in names]
    if absent:
        raise DataError(
            f"The classes of the node's card {card.name} must be among {', '.join(names)}, but {absent[0]!r} is not. "
            "Rename it in the card or add it to `class-names`."
        )
    part = _open(card, "train", str(node_config.get("data-path", "")))
    images, unreadable = decode_readable(part, card.transforms, settings.image_size)
    numbers = torch.tensor([names.index(name) for name in card.class_names()])
    return ImageSet(images.images, numbers[images.labels]), len(unreadable), names


@functools.lru_cache(maxsize=8)  # decoding takes longer than an epoch of a small model
def _partition(card: Card, settings: DataSettings, num_partitions: int, partition_id: int, seed: int) -> ImageSet:
    return _decode(card, settings, "train", client_rows(card, settings, num_partitions, seed)[partition_id])


@functools.lru_cache(maxsize=4)  # one process answers many messages with the same division
def client_rows(card: Card, settings: DataSettings, num_partitions: int, seed: int) -> list[list[int]]:
    """Divide the training images over the clients: for each partition id, rows of the source's training part."""
    part = _open(card, "train", settings.data_dir)
    train = _limited(card, part, settings.max_train_images, seed)
    domains = None if part.domains is None else [part.domains[row] for row in train]
    chosen = divided(settings, [part.labels[row] for row in train], domains, num_partitions, seed)
    return [[train[index] for index in indices] for indices in chosen]


def divided(
    settings: DataSettings, labels: Sequence[int], domains: Sequence[int] | None, num_partitions: int, seed: int
) -> list[list[int]]:
    """Divide images over clients as the run's settings say; see :func:`fgl_app.data.partition.partition_indices`."""
    return partition_indices(
        labels,
        domains,
        num_partitions,
        settings.partition,
        beta=settings.dirichlet_beta,
        classes_per_client=settings.classes_per_client,
        shards_per_client=settings.shards_per_client,
        min_samples=settings.min_samples_per_client,
        seed=seed,
    )


@functools.lru_cache(maxsize=2)
def load_held_out(card: Card, settings: DataSettings, seed: int) -> HeldOut:
    """Load the common validation and test images of a partitioned data set."""
    return HeldOut(load_split(card, settings, "validation", seed), load_split(card, settings, "test", seed))


def load_split(card: Card, settings: DataSettings, name: str, seed: int) -> ImageSet:
    """Load ``public``, ``train``, ``validation`` or ``test`` of a data set at the run's image size.

    Args:
        card: The data set.
        settings: The run's data settings.
        name: Which part.
        seed: The run's seed, which divides all but the public images and the parts that the source has itself.
    """
    if name in card.splits and name != "train":
        part = _open(card, name, settings.data_dir)
        return _decode(card, settings, name, range(len(part.labels)))
    train = _open(card, "train", settings.data_dir)
    limit = settings.max_train_images
    rows = _limited(card, train, limit, seed) if name == "train" else _division(card, train, seed)[name]
    return _decode(card, settings, "train", rows)


def load_rows(card: Card, settings: DataSettings, rows: Sequence[int]) -> ImageSet:
    """Load rows of the source's training part, as :func:`client_rows` numbers them, at the run's image size."""
    return _decode(card, settings, "train", rows)


def train_labels(card: Card, settings: DataSettings) -> Sequence[int]:
    """Return the class of each row of the source's training part, without decoding an image."""
    return _open(card, "train", settings.data_dir).labels


@functools.lru_cache(maxsize=4)
def _open(card: Card, name: str, data_dir: str) -> Part:
    return open_part(card, name, data_dir)


@functools.lru_cache(maxsize=4)
def _division(card: Card, part: Part, seed: int) -> dict[str, list[int]]:
    return divide(card, _strata(card, part), seed)


def _strata(card: Card, part: Part) -> list[int]:
    if part.domains is None:
        return list(part.labels)
    return [domain * len(card.classes) + label for label, domain in zip(part.labels, part.domains, strict=True)]


def _limited(card: Card, part: Part, limit: int, seed: int) -> list[int]:
    """Return the training rows, or the seed's choice of ``limit`` of them that keeps the classes' proportions."""
    rows = _division(card, part, seed)["train"]
    if not 0 < limit < len(rows):
        return rows
    strata = _strata(card, part)
    state = private_state(card, seed, "max-train-images")
    kept, _ = train_test_split(rows, train_size=limit, random_state=state, stratify=[strata[row] for row in rows])
    return sorted(kept)


def _decode(card: Card, settings: DataSettings, name: str, rows: Sequence[int]) -> ImageSet:
    part = _open(card, name, settings.data_dir)
    size = settings.image_size
    images = [to_pixels(part.image(row), card.transforms, size) for row in rows]
    domains = None if part.domains is None else torch.tensor([part.domains[row] for row in rows], dtype=torch.int64)
    return ImageSet(
        torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8),
        torch.tensor([part.labels[row] for row in rows], dtype=torch.int64),
        domains,
    )
