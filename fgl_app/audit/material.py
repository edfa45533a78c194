"""What an audit needs of a run: its models, the images that the clients trained on, and images that nobody did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fgl_app.data.folder import load_own, open_folder
from fgl_app.data.images import ImageSet
from fgl_app.data.sources import client_rows, load_rows, load_split, train_labels
from fgl_app.errors import ConfigError, DataError, RunFolderError
from fgl_app.files import checkpoint_file
from fgl_app.models import build_model, load_checkpoint
from fgl_app.privacy.membership import balanced
from fgl_app.reporting.finished_run import FinishedRun, check_listing, read_run
from fgl_app.rng import numpy_generator
from fgl_app.settings import Settings

MAX_IMAGES = 10_000
"""Members, and as many others, that are attacked."""


@dataclass(frozen=True)
class Material:
    """A finished run whose settings are understood, and where its real images lie."""

    run: FinishedRun
    settings: Settings
    data_paths: tuple[Path, ...]
    """Folders of the clients, for a run on folders of their own."""

    @property
    def last_round(self) -> int:
        """Number of the last round."""
        return int(self.run.rounds[-1]["round"])

    def audited_rounds(self) -> list[int]:
        """Return the rounds whose models are audited: the last, and before it the one-shot model where there is one."""
        return sorted({1, self.last_round}) if self.settings.synthesizes else [self.last_round]

    def model(self, server_round: int) -> nn.Module:
        """Load the weights after a round.

        Raises:
            RunFolderError: If the run has not kept them.
        """
        settings, path = self.settings, checkpoint_file(self.run.path, server_round)
        network = build_model(
            settings.training.model, len(self.run.class_names), settings.data.image_size, settings.run.seed
        )
        try:
            return load_checkpoint(str(path), network).eval()
        except ConfigError:
            raise RunFolderError(
                f"{str(path)!r} must hold the weights after round {server_round}, but cannot be loaded. Start the run "
                "again with the same `run-name`."
            ) from None


@dataclass(frozen=True)
class RealImages:
    """Real images of a run, at one size."""

    members: ImageSet
    """The clients' training images, or some of them."""
    others: ImageSet
    """Test images, on which nobody trained."""
    rest: ImageSet | None = None
    """Training images that are none of ``members``; None for none, or where they were not asked for."""


def open_material(path: Path, data_dir: Path | None, data_paths: Sequence[Path]) -> Material:
    """Read a run's folder.

    Args:
        path: Folder of a finished run.
        data_dir: Where the card's data lie on this machine; None for where the run found them.
        data_paths: Folders of the clients, for a run on folders of their own.

    Raises:
        RunFolderError: If it holds no finished run.
        ConfigError: If this version does not understand the run's settings.
        DataError: If the card's data are not here, or are other files than the run was made with.
    """
    run = read_run(path)
    if run.settings is None:
        raise ConfigError(
            f"The settings of {str(run.path)!r} must be those of this version, and its card must be where it was, but "
            "they are not. Audit the run with the version that made it."
        )
    if run.divided_otherwise:
        raise ConfigError(
            f"{str(run.path)!r} was run by a version that held out the same test images for every seed. This version "
            "divides the images by `seed` and would take some test images for members. Audit the run with the version "
            "that made it."
        )
    # The audit may run on another machine than the run.
    settings = dataclasses.replace(run.settings, run=dataclasses.replace(run.settings.run, device="auto"))
    if data_dir is not None:
        moved = dataclasses.replace(settings.data, data_dir=str(data_dir.expanduser().absolute()))
        settings = dataclasses.replace(settings, data=moved)
    check_listing(run.config["resolved"], settings)
    return Material(run, settings, tuple(data_paths))


def attacked_images(material: Material, with_rest: bool = False) -> RealImages:
    """Load as many members as non-members of every class, at the classifier's image size.

    A member is an image of a client's training set, whether or not the client was drawn in any round.

    Args:
        material: The run.
        with_rest: Load the members that are not attacked, too.

    Raises:
        DataError: If the real images are not on this machine.
    """
    settings, generator = material.settings, numpy_generator(material.settings.run.seed, "audit", "balance")
    if settings.own_folders:
        held = _own_folders(material, settings.data.image_size)
        members, others = balanced(held.members.labels.tolist(), held.others.labels.tolist(), MAX_IMAGES, generator)
        rest = sorted(set(range(len(held.members))) - set(members)) if with_rest else []
        return RealImages(
            held.members.take(members), held.others.take(others), held.members.take(rest) if rest else None
        )
    rows = _member_rows(settings)
    labels = train_labels(settings.card, settings.data)
    test = load_split(settings.card, settings.data, "test", settings.run.seed)
    while True:
        members, others = balanced([labels[row] for row in rows], test.labels.tolist(), MAX_IMAGES, generator)
        chosen = [rows[index] for index in members]
        loaded = load_rows(settings.card, settings.data, chosen)
        if not loaded.unreadable:
            break
        lost = set(chosen) - set(loaded.rows)
        rows = [row for row in rows if row not in lost]  # others of their classes take their places
    rest = sorted(set(rows) - set(chosen)) if with_rest else []
    return RealImages(
        loaded.images,
        test.take(others),
        load_rows(settings.card, settings.data, rest).images if rest else None,
    )


def all_real_images(material: Material, size_px: int) -> RealImages:
    """Load all training images of the clients and all test images, at any size.

    Raises:
        DataError: If the real images are not on this machine.
    """
    settings = material.settings
    if settings.own_folders:
        return _own_folders(material, size_px)
    data = dataclasses.replace(settings.data, image_size=size_px)
    test = load_split(settings.card, data, "test", settings.run.seed)
    return RealImages(load_rows(settings.card, data, _member_rows(settings)).images, test)


def _member_rows(settings: Settings) -> list[int]:
    """Return the rows that some client trains on, or all of them where one place holds them."""
    num_clients = 1 if settings.run.method == "centralized" else settings.run.num_clients
    data = settings.data
    if settings.run.method == "centralized":
        data = dataclasses.replace(data, partition="iid", min_samples_per_client=0)
    return sorted(row for rows in client_rows(settings.card, data, num_clients, settings.run.seed) for row in rows)


def _own_folders(material: Material, size_px: int) -> RealImages:
    if not material.data_paths:
        raise DataError(
            "The images of this run lie with its clients. Where one of them is, give its folder: --data-path FOLDER."
        )
    members, others = [], []
    for path in material.data_paths:
        names = material.run.class_names
        train, held_out, _ = load_own(open_folder(path.expanduser(), names), names, size_px)
        members.append(train)
        others.append(held_out.test)
    return RealImages(_joined(members), _joined(others))


def _joined(sets: Sequence[ImageSet]) -> ImageSet:
    return ImageSet(torch.cat([each.images for each in sets]), torch.cat([each.labels for each in sets]))
