"""Look at a store as a whole: is every file what it should be, and what do they hold."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fgl_app.errors import SynthesisError
from fgl_app.store import DamagedUnitsError, UnitStore

_OF_A_UNIT = re.compile(r"[0-9a-f]+\.(json|safetensors)")
_TEMPORARY = re.compile(rf"\.{_OF_A_UNIT.pattern}\.\w+")
_MAY_BE_WRITTEN_S = 600.0
"""Age below which an unfinished file may be a worker's that is at work."""


@dataclass(frozen=True)
class Finding:
    """A file of a store that is not a sound unit's."""

    path: Path
    kind: str
    """``damaged``: not what its manifest says; ``unfinished``: left by a crash; ``foreign``: not of a store."""


@dataclass(frozen=True)
class Contents:
    """What the sound units of one choice of settings hold."""

    settings: str
    """First half of the settings' hash: the name of the folder."""
    generator: str
    num_units: int
    num_images: int
    num_bytes: int
    num_left_out: int
    """Images that could not be drawn."""
    seconds: float
    """That the drawing took."""
    size_px: int
    """Side of the images."""
    per_label: dict[int, int]
    """Number of images by label."""
    batch_sizes: tuple[int, ...]
    """Images drawn at a time, each number once; more than one where memory ran out, or where runs drew otherwise."""


def stores_of(folder: Path) -> list[UnitStore]:
    """Return the stores, one for each choice of settings, of a store's or a run's folder.

    Raises:
        SynthesisError: If there is none.
    """
    for root in (folder, folder / "synthetic"):
        if (root / "units").is_dir():
            return [UnitStore(root, path.name) for path in sorted((root / "units").iterdir()) if path.is_dir()]
    raise SynthesisError(
        f"{str(folder)!r} must be the folder of a store or of a run that drew images, but holds no `units`."
    )


def verify(store: UnitStore) -> Iterator[Finding]:
    """Read every file of a store and yield those that are not a sound unit's."""
    paths = sorted(store.units_folder.iterdir())  # before the index: what a worker commits meanwhile is not looked at
    index = store.index()
    sound = {unit_id for unit_id in index.units if store.is_sound(unit_id, index.manifests[unit_id])}
    for path in paths:
        unit_id, _, extension = path.name.partition(".")
        committed_meanwhile = unit_id not in index.manifests and store.has(unit_id)
        if (unit_id in sound or committed_meanwhile) and extension in ("json", "safetensors"):
            continue
        if _TEMPORARY.fullmatch(path.name):
            yield Finding(path, "unfinished")
        elif not _OF_A_UNIT.fullmatch(path.name):
            yield Finding(path, "foreign")
        elif extension == "safetensors" and not path.with_suffix(".json").exists():
            yield Finding(path, "unfinished")
        else:
            yield Finding(path, "damaged")


def repair(findings: list[Finding]) -> int:
    """Remove what is damaged or unfinished, so that it is drawn again; return the number of files removed.

    Unfinished files of the last ten minutes stay: a worker may be writing them.
    """
    # The manifest goes first: a unit without one does not exist.
    concerned = sorted(
        (item for item in findings if item.kind != "foreign"), key=lambda item: item.path.suffix != ".json"
    )
    removed = 0
    for item in concerned:
        with contextlib.suppress(FileNotFoundError):
            if item.kind == "damaged" or time.time() - item.path.stat().st_mtime > _MAY_BE_WRITTEN_S:
                item.path.unlink()
                removed += 1
    return removed


def contents(store: UnitStore) -> Contents:
    """Count what the manifests and labels of a store say; the pixels are not read.

    Raises:
        DamagedUnitsError: If a file cannot be read.
    """
    index = store.index()
    manifests: list[dict[str, Any]] = [dict(manifest) for manifest in index.manifests.values()]
    labels: Counter[int] = Counter()
    size = 0
    for unit_id in index.units:
        try:
            with safe_open(store.units_folder / f"{unit_id}.safetensors", "pt") as file:
                labels.update(file.get_tensor("label").tolist())
                size = file.get_slice("image").get_shape()[-1]
        except (OSError, SafetensorError):
            raise DamagedUnitsError(store.folder, [unit_id]) from None
    return Contents(
        store.units_folder.name,
        str(manifests[0].get("generator", "")) if manifests else "",
        len(manifests),
        sum(manifest["num_images"] for manifest in manifests),
        sum(manifest["num_bytes"] for manifest in manifests),
        sum(len(manifest["left_out"]) for manifest in manifests),
        sum(float(manifest.get("seconds", 0.0)) for manifest in manifests),
        size,
        dict(sorted(labels.items())),
        index.batch_sizes(index.ids),
    )
