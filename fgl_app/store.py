"""The store of synthetic images: one immutable, checksummed file per unit of work, committed atomically.

``units/<unit_id>.safetensors`` holds the images, ``units/<unit_id>.json`` its manifest. A unit exists if and only if
its manifest exists and matches the file, so a crash at any moment leaves whole units only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fgl_app.data.images import ImageSet
from fgl_app.errors import SynthesisError
from fgl_app.files import sha256, write_atomically, write_json


class UnitStore:
    """Units of synthetic images below one folder; many processes may write to it."""

    def __init__(self, folder: Path) -> None:
        """Open the store at ``folder``, which is made if absent."""
        self.folder = folder
        self._units = folder / "units"
        self._units.mkdir(parents=True, exist_ok=True)

    def commit(self, unit_id: str, tensors: Mapping[str, torch.Tensor], provenance: Mapping[str, Any]) -> None:
        """Write one unit: the images first, then the manifest that makes it exist.

        Args:
            unit_id: Name of the unit, hexadecimal.
            tensors: ``image`` uint8 ``[N, 3, H, W]``, ``label`` int64 ``[N]``, ``seed`` int64 ``[N]``, ``sample_id``
                uint8 ``[N, 16]``.
            provenance: What drew the unit, and in how many ``seconds``: generator, settings, versions.
        """
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_atomically(self._tensors_path(unit_id), content)
        manifest = {"unit_id": unit_id, "sha256": sha256(content), "num_images": len(tensors["label"]), **provenance}
        write_json(self._manifest_path(unit_id), manifest)

    def has(self, unit_id: str) -> bool:
        """Return whether the unit is committed and its file is what the manifest says."""
        manifest = self._manifest(unit_id)
        if manifest is None:
            return False
        try:
            return bool(sha256(self._tensors_path(unit_id).read_bytes()) == manifest["sha256"])
        except OSError:
            return False

    def read(self, unit_ids: Sequence[str]) -> ImageSet:
        """Read the images and labels of committed units, in the order given.

        Raises:
            SynthesisError: If a unit is absent or damaged.
        """
        images, labels = [], []
        for unit_id in unit_ids:
            if not self.has(unit_id):
                raise SynthesisError(
                    f"The store {str(self.folder)!r} must hold unit {unit_id}, but it is absent or damaged. "
                    "Start the run again with the same `run-name`; it draws what is missing."
                )
            tensors = load(self._tensors_path(unit_id).read_bytes())
            images.append(tensors["image"])
            labels.append(tensors["label"])
        return ImageSet(torch.cat(images), torch.cat(labels))

    def content_hash(self, unit_ids: Sequence[str]) -> str:
        """SHA-256 over the ids and file checksums of committed units, in the order of their ids."""
        digest = hashlib.sha256()
        for unit_id in sorted(unit_ids):
            manifest = self._manifest(unit_id)
            digest.update(f"{unit_id}:{manifest['sha256'] if manifest else 'absent'}\n".encode())
        return digest.hexdigest()

    def seconds(self, unit_ids: Sequence[str]) -> float:
        """Return how long it took to draw committed units, s."""
        return sum(float((self._manifest(unit_id) or {}).get("seconds", 0.0)) for unit_id in unit_ids)

    def _manifest(self, unit_id: str) -> dict[str, Any] | None:
        try:
            manifest: dict[str, Any] = json.loads(self._manifest_path(unit_id).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) and "sha256" in manifest else None

    def _tensors_path(self, unit_id: str) -> Path:
        return self._units / f"{unit_id}.safetensors"

    def _manifest_path(self, unit_id: str) -> Path:
        return self._units / f"{unit_id}.json"
