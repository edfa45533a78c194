"""What a finished run left, read without touching it: the material of its report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgl_app.config import parse_run_config
from fgl_app.data.images import ImageSet, resize
from fgl_app.data.readers import open_part
from fgl_app.data.sources import client_rows, load_split, train_part
from fgl_app.errors import ConfigError, DataError, RunFolderError
from fgl_app.files import read_json_lines
from fgl_app.prompts import PromptCount
from fgl_app.reporting.earlier_start import DIVISION, require_finished
from fgl_app.reporting.figures import spread
from fgl_app.reporting.run_folder import forgotten_set, store_folder
from fgl_app.settings import Settings
from fgl_app.store import UnitStore, as_ids
from fgl_app.synthesis.plan import Plan

_NEEDED = (
    "method", "dataset", "seed", "num_clients", "rounds", "final_accuracy", "selected_accuracy", "selected_round",
    "one_shot_accuracy", "paper_metric", "upload_bytes", "synthesis", "seconds",
)  # fmt: skip
_NOT_UNDERSTOOD = "This version of the application does not understand the run's settings, or its card is gone."


@dataclass(frozen=True)
class FinishedRun:
    """The content of a run's folder."""

    path: Path
    config: Mapping[str, Any]
    """``config.json``."""
    results: Mapping[str, Any]
    """``results.json``."""
    settings: Settings | None
    """None if this version of the application does not understand them."""
    class_names: tuple[str, ...]
    confusion: Mapping[str, Any] | None
    """``confusion.json``; None where the clients evaluate on images of their own."""
    prompts: tuple[PromptCount, ...]
    """Empty for a method without prompts."""

    @property
    def divided_otherwise(self) -> bool:
        """Whether an earlier version held out other images than this one would."""
        partitioned = self.settings is not None and not self.settings.own_folders
        return partitioned and self.config["resolved"].get("division") != DIVISION

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        """Metrics of each round."""
        rows: Sequence[Mapping[str, Any]] = self.results["rounds"]
        return rows

    @property
    def synthesizes(self) -> bool:
        """Whether the run drew images."""
        return (self.path / "plan.json").exists() or forgotten_set(self.path) is not None


def read_run(path: Path) -> FinishedRun:
    """Read a run's folder.

    Raises:
        RunFolderError: If it holds no finished run, or a damaged one.
    """
    folder = path.expanduser()
    require_finished(folder)
    config, results = _read(folder, "config.json"), _read(folder, "results.json")
    described = all(isinstance(config.get(key), dict) for key in ("run_config", "resolved"))
    if not described or not all(key in results for key in _NEEDED):
        raise RunFolderError(
            f"{str(folder)!r} must be a run of this version of the application, but its config.json or results.json "
            "lacks what a report shows. Delete results.json and start the run again with the same `run-name`; what is "
            "finished is reused."
        )
    try:
        settings = parse_run_config(config["run_config"])
    except ConfigError:  # settings of another version, or a card that was moved
        settings = None
    confusion = _read(folder, "confusion.json") if (folder / "confusion.json").exists() else None
    class_names = settings.card.class_names() if settings is not None else ()
    if confusion is not None:
        class_names = tuple(confusion["class_names"])
    if (folder / "prompt_round.json").exists():  # of a run that united the classes of its clients
        class_names = tuple(_read(folder, "prompt_round.json")["class_names"])
    prompts = tuple(PromptCount(**row) for row in read_json_lines(folder / "prompts.jsonl"))
    return FinishedRun(folder, config, results, settings, class_names, confusion, prompts)


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        value: object = json.loads((folder / name).read_text("utf-8"))
    except OSError as error:
        raise RunFolderError(
            f"{str(folder)!r} must be the folder of a finished run, but its {name} cannot be read ({error.strerror}). "
            "Use OUTPUT-DIR/RUN-NAME of a run that has ended."
        ) from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunFolderError(
            f"{str(folder / name)!r} must be a JSON object, but is damaged. Delete results.json and "
            "start the run again, which writes it anew."
        )
    return value


def class_counts(run: FinishedRun, max_clients: int) -> list[list[int]]:
    """Count the training images of each class on each of the first ``max_clients`` clients.

    Raises:
        DataError: With the reason in one sentence, if the server does not know the division.
    """
    settings = _settings(run)
    if settings.own_folders:
        raise DataError("Every client holds a folder of its own, and only the client knows what is in it.")
    _refuse_other_division(run)
    if settings.run.method == "centralized":
        raise DataError("All training images are in one place; there are no clients.")
    card, data = settings.card, settings.data
    divided = client_rows(card, data, settings.run.num_clients, settings.run.seed)
    labels = open_part(card, "train", data.data_dir).labels
    found = [Counter(labels[row] for row in rows) for rows in divided[:max_clients]]
    return [[of_client[label] for label in range(len(card.classes))] for of_client in found]


def drawn_set(run: FinishedRun) -> tuple[UnitStore, Iterable[tuple[bytes, int]]]:
    """Return the store of a run's images, and identity and label of each of them.

    Raises:
        SynthesisError: If the run has neither kept its plan nor what identifies its images.
    """
    folder = store_folder(run.path, str(run.config["run_config"].get("store-dir", "")))
    if (kept := forgotten_set(run.path)) is not None:
        ids = (each.tobytes() for each in kept.sample_ids)
        return UnitStore(folder, kept.settings_digest), zip(ids, kept.labels, strict=True)
    plan = Plan.load(run.path / "plan.json")
    return UnitStore(folder, plan.settings.digest()), ((each.sample_id, each.label) for each in plan.samples())


def synthetic_images(run: FinishedRun, num_classes: int, per_class: int, max_size_px: int) -> ImageSet:
    """Read some images of each of the first classes, because a whole set may be larger than the memory.

    Args:
        run: A run that drew images.
        num_classes: Classes that are read.
        per_class: Images of each class, spread evenly over its prompts.
        max_size_px: Larger images are reduced to this side.

    Raises:
        SynthesisError: If the plan or the store is absent or damaged.
    """
    store, samples = drawn_set(run)
    of_classes: list[list[bytes]] = [[] for _ in range(num_classes)]
    for sample_id, label in samples:
        if label < num_classes:
            of_classes[label].append(sample_id)
    chosen = store.read(as_ids(sample_id for of_class in of_classes for sample_id in spread(of_class, per_class)))
    size = min(chosen.images.shape[-1], max_size_px)
    return ImageSet(resize(chosen.images, size), chosen.labels)


def held_out_images(run: FinishedRun, size_px: int) -> ImageSet:
    """Load the validation images, on which no client trains.

    Raises:
        DataError: With the reason in one sentence, if the server has none or cannot load them.
    """
    settings = _settings(run)
    if settings.own_folders:
        raise DataError("The real ones never leave the clients.")
    _refuse_other_division(run)
    data = dataclasses.replace(settings.data, image_size=size_px)
    return load_split(settings.card, data, "validation", settings.run.seed)


def _refuse_other_division(run: FinishedRun) -> None:
    if run.divided_otherwise:
        raise DataError("An earlier version made this run and held out other images than this one would.")
    check_listing(run.config["resolved"], _settings(run))


def check_listing(resolved: Mapping[str, Any], settings: Settings) -> None:
    """Check that the image files are those that a run was made with; an earlier version did not say which.

    Args:
        resolved: What the run's settings came to.
        settings: The run's settings, with the place of the data on this machine.

    Raises:
        DataError: If files were added, removed or renamed, so that others would be held out than were.
    """
    kept = resolved.get("listing")
    if kept is not None and kept != train_part(settings.card, settings.data).listing():
        raise DataError("Image files were added, removed or renamed since the run, which divides them anew.")


def _settings(run: FinishedRun) -> Settings:
    if run.settings is None:
        raise DataError(_NOT_UNDERSTOOD)
    return run.settings
