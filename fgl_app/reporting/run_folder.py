"""The folder of one run: configuration, prompts, checkpoints, metrics and results; a second start resumes from it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from safetensors.torch import load, save

from fgl_app.errors import RunFolderError
from fgl_app.files import (
    checkpoint_file,
    read_json_lines,
    sha256,
    write_atomically,
    write_json,
    write_json_lines,
)
from fgl_app.prompts import MergedPrompts, PromptCount
from fgl_app.reporting.earlier_start import earlier_config, is_other_listing, refuse_other_content, run_path
from fgl_app.reporting.folder_lock import keep_locked
from fgl_app.reporting.ledger import ReleaseLedger
from fgl_app.settings import Settings
from fgl_app.store import Ids, as_ids
from fgl_app.synthesis.plan import arithmetic_of, draw_batch_size

IDENTITIES = ("card", "generator", "captioner", "lora", "decoder", "filter")
"""What is known by its content: a run does not go on, nor counts in a comparison, with another. The last three are
resolved where they are folders."""
_PACKAGES = ("flwr", "flwr-datasets", "torch", "torchvision", "diffusers", "transformers", "scikit-learn", "numpy")
_CHECKPOINT = re.compile(r"round-(\d{4})\.safetensors")


_DRAWN_SET = "drawn_set.json"
_LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class DrawnSet:
    """Which images a run has drawn, without what they were drawn from."""

    settings_digest: str
    """Of the synthesis; names the units of the store."""
    sample_ids: Ids
    """Identity of each image: hashes that settings, label, prompt and index go into."""
    labels: tuple[int, ...]
    """Class of each image."""


def forgotten_set(folder: Path) -> DrawnSet | None:
    """Return what a run kept of its synthetic set when it deleted its prompts; None if it did not."""
    path = folder / _DRAWN_SET
    if not path.exists():
        return None
    kept = json.loads(path.read_text("utf-8"))
    return DrawnSet(kept["settings_digest"], as_ids([bytes.fromhex(kept["sample_ids"])]), tuple(kept["labels"]))


def refuse_other_start(settings: Settings, resolved: Mapping[str, Any]) -> None:
    """Check that these settings, and what they come to on this machine, can go on with the run of an earlier start.

    Raises:
        RunFolderError: If they cannot.
    """
    if (found := earlier_config(settings)) is None:
        return
    earlier, was = found
    path = run_path(settings)
    if was.get("division") != resolved.get("division"):
        raise RunFolderError(
            f"`run-name` {path.name} was begun by a version that held out the same test images for every seed. This "
            "version divides the images by `seed` and would train on some of them. Use another `run-name`."
        )
    if is_other_listing(was, resolved):
        raise RunFolderError(
            f"`run-name` {path.name} must be resumed with the image files that it began with, but some of them were "
            "added, removed or renamed since, so that all would be divided anew and test images trained on. Put the "
            "files back or use another `run-name`."
        )
    for key in IDENTITIES:
        refuse_other_content(settings, key, was, resolved)
    if (path / "plan.json").exists():
        drawn, now = _arithmetic(earlier, was), _arithmetic(settings.flat(), resolved)
        if drawn != now:
            raise RunFolderError(
                f"`run-name` {path.name} must be resumed on the kind of device, and on a GPU with the "
                f"`synthesis-batch-size`, that its images are drawn with, but that was {drawn} and is {now} now. Use "
                "what it was or another `run-name`."
            )


class RunFolder:
    """``OUTPUT-DIR/RUN-NAME/``; opening it with the settings of an earlier start resumes that run.

    Raises:
        RunFolderError: If the folder cannot be written, or belongs to a run with other settings.
    """

    def __init__(self, settings: Settings, resolved: Mapping[str, Any]) -> None:
        """Open or make the folder of these settings; ``resolved`` is what they came to on this machine."""
        self.path = run_path(settings)
        self.synthetic = store_folder(self.path, settings.run.store_dir)
        self._checkpoints = self.path / "checkpoints"
        self._settings = settings
        config = {
            "run_config": settings.flat(),
            "resolved": dict(resolved),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
            "seeds": {"seed": settings.run.seed, "derivation": "sha256(seed, scope); see fgl_app/rng.py"},
        }
        try:
            for folder in (self.path, self._checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            keep_locked(self.path, "use another `run-name`", _LOCK_TIMEOUT_S)
            refuse_other_start(settings, resolved)
            write_json(self.path / "config.json", config)
        except OSError as error:
            raise RunFolderError(
                f"`output-dir` must be a folder that can be read and written, but {str(self.path)!r} cannot "
                f"({error.strerror}). Use for example ~/fgl-runs."
            ) from None

    def save_prompts(self, merged: MergedPrompts, exchange: Mapping[str, Any] | None) -> None:
        """Keep the merged prompts, readable by the owner alone, and what is known of the exchange; None without one."""
        # A crash must not leave labels beside the names of other classes: without prompts they are collected again.
        (self.path / "prompts.jsonl").unlink(missing_ok=True)
        write_json(
            self.path / "prompt_round.json",
            {"class_names": list(merged.class_names), "exchange": None if exchange is None else dict(exchange)},
        )
        if merged.embeddings:
            write_atomically(self.embeddings, save(dict(merged.embeddings)), mode=0o600)
        write_json_lines(self.path / "prompts.jsonl", [asdict(item) for item in merged.prompts], mode=0o600)

    def forget_prompts(self, drawn: DrawnSet) -> None:
        """Delete the prompts for good, and keep the identities of the images that were drawn from them."""
        content = {
            "settings_digest": drawn.settings_digest,
            "sample_ids": drawn.sample_ids.tobytes().hex(),
            "labels": list(drawn.labels),
        }
        write_json(self.path / _DRAWN_SET, content)
        # The kept file decides: a crash in between only leaves files that are deleted when the run goes on.
        for path in (self.path / "prompts.jsonl", self.embeddings, self.path / "plan.json", self.path / "worker.log"):
            for part in (path, *self.path.glob(f".{path.name}.*")):  # a kill leaves what was written of a new one
                part.unlink(missing_ok=True)

    def load_prompts(self) -> tuple[MergedPrompts, dict[str, Any] | None] | None:
        """Return the merged prompts of an earlier start and what is known of the exchange, or None."""
        rows = read_json_lines(self.path / "prompts.jsonl")
        if not rows and forgotten_set(self.path) is None:
            return None
        kept: dict[str, Any] = json.loads((self.path / "prompt_round.json").read_text("utf-8"))
        embeddings = load(self.embeddings.read_bytes()) if self.embeddings.exists() else {}
        merged = MergedPrompts(tuple(PromptCount(**row) for row in rows), tuple(kept["class_names"]), embeddings)
        return merged, kept["exchange"]

    def save_round(
        self, row: Mapping[str, Any], arrays: ArrayRecord, memory: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Keep a finished round: first its metrics, then the checkpoint that makes it count as finished.

        Args:
            row: The round's metrics.
            arrays: The weights after it.
            memory: What the strategy remembers besides them.
        """
        number = int(row["round"])
        for later in self._checkpoint_numbers():  # of a run whose earlier checkpoint was deleted
            if later >= number:
                self._checkpoint(later).unlink()
        rows = [earlier for earlier in read_json_lines(self._metrics) if earlier["round"] < number]
        write_json_lines(self._metrics, [*rows, dict(row)])
        if memory:
            write_atomically(self._memory(number), _save_tensors(memory))
        else:
            self._memory(number).unlink(missing_ok=True)
        write_atomically(self._checkpoint(number), _save_tensors(arrays.to_torch_state_dict()))

    def finished_rounds(self) -> list[dict[str, Any]]:
        """Return the metrics of the rounds that have both metrics and a checkpoint, from round 1 on without a gap."""
        rows = {row["round"]: row for row in read_json_lines(self._metrics)}
        saved = self._checkpoint_numbers()
        finished: list[dict[str, Any]] = []
        while (number := len(finished) + 1) in rows and number in saved:
            finished.append(rows[number])
        return finished

    def open_ledger(self) -> ReleaseLedger:
        """Open the ledger of what left the clients, in this start and all earlier ones.

        Raises:
            RunFolderError: If it is damaged.
        """
        return ReleaseLedger(
            self.path / "releases.jsonl",
            read_json_lines(self._metrics),
            named=self._settings.privacy.example_dp_noise > 0,
        )

    def load_arrays(self, number: int) -> ArrayRecord:
        """Load the weights after round ``number``.

        Raises:
            RunFolderError: If the checkpoint is damaged.
        """
        return ArrayRecord(_load_tensors(self._checkpoint(number), self._checkpoint(number)))

    def load_memory(self, number: int) -> dict[str, torch.Tensor]:
        """Load what the strategy remembered after round ``number``; empty if nothing.

        Raises:
            RunFolderError: If the file is damaged.
        """
        path = self._memory(number)
        return _load_tensors(path, self._checkpoint(number)) if path.exists() else {}

    def load_results(self) -> dict[str, Any]:
        """Return the content of ``results.json`` of earlier starts; empty if there is none, or it is damaged."""
        try:
            found: dict[str, Any] = json.loads((self.path / "results.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Write ``results.json`` and return its path."""
        path = self.path / "results.json"
        write_json(path, dict(results))
        return path

    def _checkpoint_numbers(self) -> set[int]:
        names = os.listdir(self._checkpoints)
        return {int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)) is not None}

    def _checkpoint(self, number: int) -> Path:
        return checkpoint_file(self.path, number)

    def _memory(self, number: int) -> Path:
        return self._checkpoint(number).with_suffix(".strategy.safetensors")

    def save_confusion(self, class_names: Sequence[str], confusion: Sequence[Sequence[int]], server_round: int) -> None:
        """Keep how often images of each class (rows) were predicted as each class (columns) after a round."""
        value = {"round": server_round, "class_names": list(class_names), "confusion": [list(r) for r in confusion]}
        write_json(self.path / "confusion.json", value)

    @property
    def embeddings(self) -> Path:
        """File of the clients' embeddings."""
        return self.path / "embeddings.safetensors"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"


def store_of_run(folder: Path) -> Path:
    """Return where the run in ``folder`` keeps its images, from its configuration if it is there."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return store_folder(folder, config.get("run_config", {}).get("store-dir", ""))


def store_folder(run: Path, store_dir: str) -> Path:
    """Return the folder of a run's store: ``store-dir``, or one in the run's own."""
    return Path(store_dir).expanduser() if store_dir else run / "synthetic"


def _arithmetic(run_config: Mapping[str, Any], resolved: Mapping[str, Any]) -> str:
    device = str(resolved.get("synthesis_device", resolved["device"]))
    return arithmetic_of(device, draw_batch_size(device, int(run_config["synthesis-batch-size"])))


def _save_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialize tensors with a checksum, which safetensors lacks, of their bytes."""
    return save(dict(tensors), {"sha256": _checksums(save(dict(tensors)))[1]})


def _load_tensors(path: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        content = path.read_bytes()
        tensors: dict[str, torch.Tensor] = load(content)
        told, found = _checksums(content)
        if told != found:
            raise ValueError("its checksum is another")
    except Exception as error:  # safetensors raises an exception class of its own
        raise RunFolderError(
            f"{str(path)!r} must be a checkpoint, but cannot be read ({type(error).__name__}). Delete "
            f"{checkpoint.name}; the run then goes on from the round before."
        ) from None
    return tensors


def _checksums(content: bytes) -> tuple[str | None, str]:
    """Return the checksum that a file of safetensors tells, and that of its tensors' bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]).get("__metadata__", {}).get("sha256"), sha256(memoryview(content)[start:])
