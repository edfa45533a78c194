"""The store of synthetic images: immutable, checksummed files that many processes may write, found by image.

``units/SETTINGS/UNIT.safetensors`` holds the images of a unit, ``UNIT.json`` beside it its manifest, with the
identity of every image. A unit exists if and only if its manifest exists and matches the file, so a crash at any moment
leaves whole units only. SETTINGS is a hash of all that the images depend on besides their prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fgl_app.data.images import ImageSet, resize
from fgl_app.errors import SynthesisError
from fgl_app.files import json_bytes, locked, sha256, staged, sync_folder

_SHARE_OF_MEMORY = 0.5
"""Of the memory that is free, which a set of images may take before it is mapped from a file."""

_HASHED_AT_ONCE = 65536
"""Images whose identities and digests are copied at a time."""

Ids = npt.NDArray[np.bytes_]
"""Identities of images, ``S16 [N]``."""


def as_ids(sample_ids: Iterable[bytes]) -> Ids:
    """Put identities of 16 bytes into an array."""
    return np.frombuffer(b"".join(sample_ids), dtype="S16")


class DamagedUnitsError(SynthesisError):
    """Files of the store are not what their manifests say."""

    def __init__(self, folder: Path, units: Sequence[str]) -> None:
        """Name the units."""
        self.units = list(units)
        super().__init__(
            f"The store {str(folder)!r} must hold what its manifests say, but is damaged at unit "
            f"{', '.join(self.units[:3])}{' and others' if len(self.units) > 3 else ''}. Repair it with "
            "`fgl store verify --repair`, then draw what is missing with `fgl synthesize` and the run's plan.json."
        )


@dataclass(frozen=True)
class SampleIndex:
    """Where each image of a store lies."""

    units: tuple[str, ...]
    """Names of the committed units."""
    manifests: Mapping[str, Mapping[str, Any]]
    """The units' manifests, without the identities."""
    ids: Ids
    """Identities of all images, sorted."""
    unit: npt.NDArray[np.int32]
    """Number of the unit of each of ``ids``; several units may hold the same image, of which one is named."""
    row: npt.NDArray[np.int32]
    """Row of each of ``ids`` in its unit; -1 where it was left out."""

    def find(self, wanted: Ids) -> npt.NDArray[np.int64]:
        """Return the position in :attr:`ids` of each identity, -1 where the store lacks it."""
        if len(self.ids) == 0:
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        return np.where(self.ids[at] == wanted, at, -1)

    def holds(self, wanted: Ids) -> npt.NDArray[np.bool_]:
        """Return for each identity whether the store has settled it: drawn, or found impossible to draw."""
        return np.asarray(self.find(wanted) >= 0)

    def within(self, wanted: Ids, unit_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return for each identity whether its image lies in one of the units named; all are in the store."""
        numbers = [self.units.index(unit_id) for unit_id in unit_ids]
        return np.isin(self.unit[self.find(wanted)], numbers)

    def left_out(self, wanted: Ids) -> Counter[str]:
        """Return the number of the images that were left out when they were drawn, by reason."""
        reasons = {
            bytes.fromhex(key): str(reason)
            for manifest in self.of(wanted)
            for key, reason in manifest["left_out"].items()
        }
        at = self.find(wanted)
        absent = self.ids[at[at >= 0]][self.row[at[at >= 0]] < 0].view("V16")
        return Counter(reasons[each.tobytes()] for each in absent)

    def batch_sizes(self, wanted: Ids) -> tuple[int, ...]:
        """Return how many images were drawn at a time in the units that hold any of the images, each number once.

        Older units do not tell.
        """
        return tuple(sorted({int(manifest["batch_size"]) for manifest in self.of(wanted) if "batch_size" in manifest}))

    def rejection_rates(self, wanted: Ids, labels: Sequence[int]) -> dict[str, float]:
        """Return which share of the drawn images was rejected, 0 to 1, by ``label`` or ``label:domain``.

        A unit counts for the classes that are wanted from it; others in it are those of a run that shares the store.

        Args:
            wanted: Identities of images.
            labels: Class of each.
        """
        at = self.find(wanted)
        of_held = np.asarray(labels)[at >= 0]
        judged: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        for unit_id, places in _by_unit(self, at[at >= 0]):
            classes = {str(label) for label in np.unique(of_held[places])}
            for group, (seen, refused) in self.manifests[unit_id].get("judged", {}).items():
                if group.partition(":")[0] in classes:
                    judged[group] += seen
                    rejected[group] += refused
        return {group: rejected[group] / seen for group, seen in judged.items() if seen}

    def of(self, wanted: Ids) -> list[Mapping[str, Any]]:
        """Return the manifests of the units that hold any of the images."""
        at = self.find(wanted)
        return [self.manifests[self.units[number]] for number in np.unique(self.unit[at[at >= 0]])]

    def seconds(self, wanted: Ids) -> float:
        """Return how long it took to draw those of the images that the store holds, s."""
        at = self.find(wanted)
        numbers, counts = np.unique(self.unit[at[at >= 0]], return_counts=True)
        return sum(
            float(manifest["seconds"]) * int(count) / max(1, int(manifest["num_images"]))
            for count, manifest in (
                (count, self.manifests[self.units[number]]) for number, count in zip(numbers, counts, strict=True)
            )
        )


class ContentHash:
    """SHA-256 over identities and pixels of images, in the order of their identities, whatever the order they come in.

    It does not depend on how the images are divided into units.
    """

    def __init__(self) -> None:
        """Begin without an image."""
        self._added = [np.zeros(0, [("sample_id", "S16"), ("pixels", "S64")])]

    def add(self, sample_ids: Ids, images: torch.Tensor) -> None:
        """Take in images, uint8 ``[B, 3, S, S]``, with their identities; one that was taken in counts once."""
        rows = np.zeros(len(sample_ids), self._added[0].dtype)
        rows["sample_id"] = sample_ids
        rows["pixels"] = [sha256(image.tobytes()) for image in images.numpy()]
        self._added.append(rows)

    def hexdigest(self) -> str:
        """Return the hash of what was taken in."""
        rows = np.concatenate(self._added)
        self._added = [rows]
        first = np.unique(rows["sample_id"], return_index=True)[1]
        digest = hashlib.sha256()
        for start in range(0, len(first), _HASHED_AT_ONCE):  # a copy of a part at a time
            digest.update(rows[first[start : start + _HASHED_AT_ONCE]].view(np.uint8).data)
        return digest.hexdigest()


class UnitStore:
    """Units of synthetic images of one choice of settings; many processes may write to it."""

    def __init__(self, folder: Path, settings_digest: str) -> None:
        """Open the store at ``folder``; folders are made when something is committed."""
        self.folder = folder
        self.units_folder = folder / "units" / settings_digest[:16]

    def commit(self, unit_id: str, tensors: Mapping[str, torch.Tensor], provenance: Mapping[str, Any]) -> None:
        """Write one unit: the images first, then the manifest that makes it exist. A unit that exists is left alone.

        Of several processes that commit it at once, one does: two graphics cards do not draw the same bytes, and the
        images of one would lie beside the manifest of the other.

        Args:
            unit_id: Name of the unit, hexadecimal.
            tensors: ``image`` uint8 ``[N, 3, H, W]``, ``label`` int64 ``[N]``, ``seed`` int64 ``[N]``, ``sample_id``
                uint8 ``[N, 16]``.
            provenance: What drew the unit, in how many ``seconds``; ``left_out`` maps the identities,
                hexadecimal, of images that could not be drawn to the reason.

        Raises:
            SynthesisError: If the files cannot be written; nothing is left of them.
        """
        if self.has(unit_id):
            return
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        manifest = {
            "unit_id": unit_id,
            "sha256": sha256(content),
            "num_bytes": len(content),
            "num_images": len(tensors["label"]),
            "sample_ids": tensors["sample_id"].numpy().tobytes().hex(),
            **provenance,
        }
        try:
            self.units_folder.mkdir(parents=True, exist_ok=True)
            with (
                staged(self._tensors_path(unit_id), content) as images,
                staged(self._manifest_path(unit_id), json_bytes(manifest)) as told,
                locked(self.folder),
            ):
                if not self.has(unit_id):
                    os.replace(images, self._tensors_path(unit_id))
                    os.replace(told, self._manifest_path(unit_id))
            sync_folder(self.units_folder)
        except OSError as error:
            raise SynthesisError(
                f"The store {str(self.folder)!r} must be writable and have room, but a unit of {len(content):,} bytes "
                f"cannot be written ({error.strerror}). Make room and start the run again with the same `run-name`."
            ) from None

    def has(self, unit_id: str) -> bool:
        """Return whether a unit is committed, as :meth:`index` sees it; its checksum is taken when it is read."""
        return self._manifest(unit_id) is not None

    def is_sound(self, unit_id: str, manifest: Mapping[str, Any]) -> bool:
        """Return whether the file of a unit is what its manifest says."""
        return self._load(unit_id, manifest) is not None

    def index(self) -> SampleIndex:
        """Read all manifests. Those that are damaged, or whose file is absent or of another size, are left out."""
        manifests: dict[str, dict[str, Any]] = {}
        ids: list[bytes] = []
        units: list[npt.NDArray[np.int32]] = []
        rows: list[npt.NDArray[np.int32]] = []
        for number, (unit_id, manifest) in enumerate(self._manifests()):
            drawn, failed = bytes.fromhex(manifest.pop("sample_ids")), bytes.fromhex("".join(manifest["left_out"]))
            manifests[unit_id] = manifest
            ids.append(drawn + failed)
            units.append(np.full(len(ids[-1]) // 16, number, np.int32))
            rows.append(np.concatenate([np.arange(len(drawn) // 16), np.full(len(failed) // 16, -1)]).astype(np.int32))
        if not manifests:
            nothing = np.zeros(0, np.int32)
            return SampleIndex((), {}, as_ids([]), nothing, nothing)
        every = as_ids(ids)
        sorted_ids, first = np.unique(every, return_index=True)
        return SampleIndex(
            tuple(manifests), manifests, sorted_ids, np.concatenate(units)[first], np.concatenate(rows)[first]
        )

    def read(
        self,
        wanted: Ids,
        index: SampleIndex | None = None,
        *,
        size: int = 0,
        backing: Path | None = None,
        content: ContentHash | None = None,
    ) -> ImageSet:
        """Read images and labels, in the order asked for, and check every file that is read against its checksum.

        Args:
            wanted: Identities; those that were left out when they were drawn are left out here.
            index: What :meth:`index` returned; None reads it anew.
            size: Side to which the images are resized, px; 0 for that of the store.
            backing: A file in which a set that does not fit into memory is mapped; its name is removed at once.
            content: Takes in the images as they are stored; None where nobody asks for their hash.

        Raises:
            DamagedUnitsError: If files are not what their manifests say.
            SynthesisError: If an image is absent.
        """
        index = index or self.index()
        at = index.find(wanted)
        if (at < 0).any():
            raise SynthesisError(
                f"The store {str(self.folder)!r} must hold every image of the plan, but lacks {int((at < 0).sum()):,} "
                f"of {len(wanted):,}. `fgl synthesize` with the run's plan.json draws what is missing."
            )
        at = at[index.row[at] >= 0]
        images: torch.Tensor | None = None
        labels = torch.zeros(len(at), dtype=torch.int64)
        damaged = []
        for unit_id, places in _by_unit(index, at):
            rows = index.row[at[places]]
            tensors = self._load(unit_id, index.manifests[unit_id])
            if tensors is None or tensors["sample_id"][rows].numpy().tobytes() != index.ids[at[places]].tobytes():
                damaged.append(unit_id)
                continue
            pixels = tensors["image"][rows]
            if content is not None:
                content.add(index.ids[at[places]], pixels)
            pixels = resize(pixels, size or pixels.shape[-1])
            if images is None:
                images = _allocate((len(at), *pixels.shape[1:]), backing)
            images[places] = pixels
            labels[places] = tensors["label"][rows]
        if damaged:
            raise DamagedUnitsError(self.folder, damaged)
        return ImageSet(torch.zeros(0, 3, 1, 1, dtype=torch.uint8) if images is None else images, labels)

    def discard(self, unit_ids: Iterable[str]) -> None:
        """Remove units, so that their images are drawn again; the manifest goes first."""
        for unit_id in unit_ids:
            self._manifest_path(unit_id).unlink(missing_ok=True)
            self._tensors_path(unit_id).unlink(missing_ok=True)

    def adopt(self, other: UnitStore, wanted: Ids) -> None:
        """Take over the units of another store that hold wanted images which this one lacks, as hard links.

        Where files cannot be linked, on another file system, nothing is taken over.
        """
        index = other.index()
        at = index.find(wanted[~self.index().holds(wanted)])
        for number in np.unique(index.unit[at[at >= 0]]):
            unit_id = index.units[number]
            try:
                self.units_folder.mkdir(parents=True, exist_ok=True)
                for source, target in (
                    (other._tensors_path(unit_id), self._tensors_path(unit_id)),
                    (other._manifest_path(unit_id), self._manifest_path(unit_id)),
                ):
                    if not target.exists():
                        os.link(source, target)
            except OSError:
                return

    def _load(self, unit_id: str, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a unit, or None if its file is not what the manifest says."""
        try:
            content = self._tensors_path(unit_id).read_bytes()
            return load(content) if sha256(content) == manifest["sha256"] else None
        except (OSError, SafetensorError):
            return None

    def _manifests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the sound manifests in the order of their names."""
        try:
            names = sorted(os.listdir(self.units_folder))
        except OSError:
            return
        for name in names:
            unit_id, dot, extension = name.partition(".")
            if dot + extension == ".json" and (manifest := self._manifest(unit_id)) is not None:
                yield unit_id, manifest

    def _manifest(self, unit_id: str) -> dict[str, Any] | None:
        """Read one manifest; None if it is absent, damaged, or its file is absent or of another size."""
        try:
            manifest: dict[str, Any] = json.loads(self._manifest_path(unit_id).read_text("utf-8"))
            sound = (
                manifest["unit_id"] == unit_id
                and manifest["num_bytes"] == self._tensors_path(unit_id).stat().st_size
                and len(bytes.fromhex(manifest["sample_ids"])) == 16 * manifest["num_images"]
                and all(len(bytes.fromhex(each)) == 16 for each in manifest.setdefault("left_out", {}))
                and isinstance(manifest["sha256"], str)
                and 0 <= float(manifest.setdefault("seconds", 0.0)) < float("inf")
                and all(0 <= rejected <= seen for seen, rejected in manifest.get("judged", {}).values())
                and int(manifest.get("batch_size", 1)) > 0
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None
        return manifest if sound else None

    def _tensors_path(self, unit_id: str) -> Path:
        return self.units_folder / f"{unit_id}.safetensors"

    def _manifest_path(self, unit_id: str) -> Path:
        return self.units_folder / f"{unit_id}.json"


def _allocate(shape: tuple[int, ...], backing: Path | None) -> torch.Tensor:
    """Return room for uint8 images: memory, or a mapped file where they would take most of it."""
    num_bytes = math.prod(shape)
    if backing is None or num_bytes < _SHARE_OF_MEMORY * psutil.virtual_memory().available:
        return torch.zeros(shape, dtype=torch.uint8)
    try:
        with backing.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a hole would end the process where the disk is full
    except OSError as error:
        backing.unlink(missing_ok=True)
        raise SynthesisError(
            f"{str(backing.parent)!r} must have room for the synthetic set, {num_bytes:,} bytes, because memory has "
            f"none, but has not ({error.strerror}). Make room, or use a smaller `image-size`."
        ) from None
    mapped = torch.from_file(str(backing), shared=True, size=num_bytes, dtype=torch.uint8).view(shape)
    backing.unlink()  # the mapping keeps the bytes until it goes
    return mapped


def _by_unit(index: SampleIndex, at: npt.NDArray[np.int64]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Group positions of an index by unit: name of the unit, places in ``at``."""
    numbers = index.unit[at]
    order = np.argsort(numbers, kind="stable")
    for places in np.split(order, np.nonzero(np.diff(numbers[order]))[0] + 1):
        if len(places):
            yield index.units[numbers[places[0]]], places
