"""The one interface to data: which images a client trains on, and which ones measure the result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.common.logger import log

from fgl_app.cards import Card, load_card
from fgl_app.data.decoding import Unreadable
from fgl_app.data.division import divide, private_state, stratified
from fgl_app.data.findings import Decoded, Findings, decode_readable, findings_of, listed
from fgl_app.data.folder import class_folders, load_own, open_folder
from fgl_app.data.images import HeldOut, ImageSet
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
    findings: Findings
    """What was found where its images lie."""

    @property
    def num_unreadable(self) -> int:
        """Number of its images that could not be read and were left out."""
        return len(self.findings.unreadable)


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
            own, part, names = open_own_card(str(node_config["card"]), str(node_config.get("data-path", "")), named)
            train, held_out, findings = load_own(part, names, settings.image_size, of_card=own)
        else:
            path = node_config.get("data-path")
            if not isinstance(path, str):
                raise DataError(
                    "The node-config must hold `data-path` or `card`, e.g. --node-config 'data-path=\"/data/site0\"'."
                )
            folder = Path(path).expanduser()
            names = tuple(named or class_folders(folder))
            train, held_out, findings = load_own(open_folder(folder, names), names, settings.image_size)
        return ClientData(train, lambda: held_out, partition_id, names, findings)
    num_partitions = node_config.get("num-partitions")
    if not isinstance(num_partitions, int) or not 0 <= partition_id < num_partitions:
        raise DataError(
            f"The node-config must hold partition-id 0 to num-partitions - 1, but holds {partition_id!r} and "
            f"{num_partitions!r}. Use for example --node-config 'partition-id=0 num-partitions=5'."
        )
    train, findings = _partition(card, settings, num_partitions, partition_id, seed)
    common = functools.partial(load_held_out, card, settings, seed)
    return ClientData(train, common, partition_id, card.class_names(), findings)


def open_own_card(place: str, data_path: str, class_names: Sequence[str]) -> tuple[Card, Part, tuple[str, ...]]:
    """Open the training part of a node's own card, whose classes are found in the run's by their names.

    Args:
        place: The card's file or name.
        data_path: Where its data lie; empty for where the card says.
        class_names: The run's classes; empty where it has none yet.

    Returns:
        The card, its training images, and the run's classes, or the card's where the run has none yet.

    Raises:
        DataError: If the data cannot be opened, or have a class that the run has not.
    """
    card = load_card(place)
    names = tuple(class_names or card.class_names())
    absent = [name for name in card.class_names() if name not in names]
    if absent:
        raise DataError(
            f"The classes of the node's card {card.name} must be among {', '.join(names)}, but {absent[0]!r} is not. "
            "Rename it in the card or add it to `class-names`."
        )
    return card, _open(card, "train", data_path), names


@functools.lru_cache(maxsize=8)  # decoding takes longer than an epoch of a small model
def _partition(
    card: Card, settings: DataSettings, num_partitions: int, partition_id: int, seed: int
) -> tuple[ImageSet, Findings]:
    rows = client_rows(card, settings, num_partitions, seed)[partition_id]
    decoded = _decode(card, settings, "train", rows)
    # What was passed over belongs to the source, and to no client of it; the server says it.
    part = dataclasses.replace(train_part(card, settings), ignored={}, empty_classes={})
    return decoded.images, findings_of(decoded, part, rows, card.class_names())


@functools.lru_cache(maxsize=4)  # one process answers many messages with the same division
def client_rows(card: Card, settings: DataSettings, num_partitions: int, seed: int) -> list[list[int]]:
    """Divide the training images over the clients: for each partition id, rows of the source's training part."""
    part, train = train_part(card, settings), train_rows(card, settings, seed)
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
    (validation, lost), (test, lost_of_test) = (_load(card, settings, name, seed) for name in ("validation", "test"))
    return HeldOut(validation, test, len(lost) + len(lost_of_test))


def forget() -> None:
    """Free the memory of all data that this process has opened; what is asked for again is opened again."""
    for kept in (load_held_out, _partition, client_rows, _division, _open):
        kept.cache_clear()


def load_split(card: Card, settings: DataSettings, name: str, seed: int) -> ImageSet:
    """Load ``public``, ``train``, ``validation`` or ``test`` of a data set at the run's image size.

    Images that cannot be decoded are left out, and listed in the log.

    Args:
        card: The data set.
        settings: The run's data settings.
        name: Which part.
        seed: The run's seed, which divides all but the public images and the parts that the source has itself.
    """
    return _load(card, settings, name, seed)[0]


def _load(card: Card, settings: DataSettings, name: str, seed: int) -> tuple[ImageSet, tuple[Unreadable, ...]]:
    if name in card.splits and name != "train":
        part = _open(card, name, settings.data_dir)
        decoded = _decode(card, settings, name, range(len(part.labels)))
    else:
        rows = train_rows(card, settings, seed) if name == "train" else _division(card, settings, seed)[name]
        decoded = _decode(card, settings, "train", rows)
    for line in listed(decoded.unreadable):
        log(WARNING, "%s part of %s: %s", name, card.name, line)
    return decoded.images, decoded.unreadable


def load_rows(card: Card, settings: DataSettings, rows: Sequence[int]) -> Decoded:
    """Load rows of the source's training part, as :func:`client_rows` numbers them, at the run's image size.

    Those that cannot be decoded are left out, as the clients leave them out.
    """
    return _decode(card, settings, "train", rows)


def train_labels(card: Card, settings: DataSettings) -> Sequence[int]:
    """Return the class of each row of the source's training part, without decoding an image."""
    return train_part(card, settings).labels


def train_part(card: Card, settings: DataSettings) -> Part:
    """Open the source's training part, without decoding an image."""
    return _open(card, "train", settings.data_dir)


@functools.lru_cache(maxsize=4)
def _open(card: Card, name: str, data_dir: str) -> Part:
    return open_part(card, name, data_dir)


@functools.lru_cache(maxsize=4)
def _division(card: Card, settings: DataSettings, seed: int) -> dict[str, list[int]]:
    return divide(card, _strata(card, train_part(card, settings)), seed)


def _strata(card: Card, part: Part) -> list[int]:
    if part.domains is None:
        return list(part.labels)
    return [domain * len(card.classes) + label for label, domain in zip(part.labels, part.domains, strict=True)]


def train_rows(card: Card, settings: DataSettings, seed: int) -> list[int]:
    """Return the training rows, or the seed's choice of ``max-train-images`` that keeps the classes' proportions.

    Raises:
        DataError: If there are too few images for that.
    """
    rows, limit = _division(card, settings, seed)["train"], settings.max_train_images
    if not 0 < limit < len(rows):
        return rows
    strata = np.asarray(_strata(card, train_part(card, settings)))
    num_strata = len(np.unique(strata[rows]))
    if not num_strata <= limit <= len(rows) - num_strata:
        raise DataError(
            f"`max-train-images` cannot be {limit}: a choice of the {len(rows)} training images that keeps the "
            f"proportions of {num_strata} classes has {num_strata} to {len(rows) - num_strata}. Use 0 for all of them."
        )
    state = private_state(card, seed, "max-train-images")
    kept, _ = stratified(card, rows, strata, len(rows) - limit, state, "left")
    return sorted(kept)


def _decode(card: Card, settings: DataSettings, name: str, rows: Sequence[int]) -> Decoded:
    part = _open(card, name, settings.data_dir)
    return decode_readable(part, rows, card.transforms, settings.image_size, card.fit)
