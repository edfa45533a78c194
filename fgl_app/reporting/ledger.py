"""``releases.jsonl``: what clients were asked for, written before they are asked, so that no start of a run forgets it.

Kept rounds would not do: what a client sent has left it whether or not its reply came in time, was used, or the round
was ever finished. The accountant (:mod:`fgl_app.reporting.guarantees`) therefore counts what stands here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fgl_app.errors import RunFolderError
from fgl_app.files import read_json_lines, write_json_lines

PROMPTS, TRAIN = "prompts", "train"
"""Values of ``asked``: what a row says that clients were asked for."""


class ReleaseLedger:
    """Rows are only ever added. One row says that clients were asked, or which numbers of images they told."""

    def __init__(self, path: Path, rounds: Sequence[Mapping[str, Any]], *, named: bool) -> None:
        """Open the ledger of a run.

        Args:
            path: ``releases.jsonl``; need not exist.
            rounds: Metrics of the kept rounds, which stand in for a ledger that an older version did not write.
            named: Whether rows say which clients were drawn, and the numbers of images that they told. Amplification by
                sampling counts on the former not being known, and DP-SGD needs both.

        Raises:
            RunFolderError: If the file is damaged.
        """
        self._path = path
        self._named = named
        self.rows: list[dict[str, Any]] = _read(path) if path.exists() else _of_kept_rounds(rounds)

    def asked_for_prompts(self) -> None:
        """Note that clients are about to be asked for their prompts, or one of them once more than any before."""
        self._add({"asked": PROMPTS})

    def asked_to_train(self, server_round: int, drawn: tuple[int, int], places: Collection[int] | None) -> None:
        """Note that clients are about to be asked to train; see :class:`strategies.rounds.Ledger`."""
        row: dict[str, Any] = {"asked": TRAIN, "round": server_round, "drawn": list(drawn)}
        if places is not None and self._named:
            row["places"] = sorted(places)
        self._add(row)

    def told(self, num_examples: Collection[int]) -> None:
        """Note the numbers of training images that clients told; whose they are does not matter."""
        known = {number for row in self.rows for number in row.get("num_examples", [])}
        if self._named and (new := sorted(set(num_examples) - known)):
            self._add({"num_examples": new})

    def _add(self, row: dict[str, Any]) -> None:
        # Replaced as a whole, and synchronized with the disk: a crash leaves no half row.
        write_json_lines(self._path, [*self.rows, row], mode=0o600)
        self.rows.append(row)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_json_lines(path)
    except ValueError:
        rows = []
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise RunFolderError(
            f"{str(path)!r} must say what left the clients, but is damaged, and epsilon cannot be stated without it. "
            "Restore it from a backup, or use another `run-name`."
        )
    return rows


def _of_kept_rounds(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kept in rounds:
        if kept["phase"] != "federated":
            continue
        row: dict[str, Any] = {"asked": TRAIN, "round": kept["round"]}
        if "drawn" in kept:
            count, population = kept["drawn"]
            row["drawn"] = [count, count if "refused" in kept else population]  # refusals named who was drawn
        if "num_examples" in kept:
            row["num_examples"] = sorted(set(kept["num_examples"].values()))
        rows.append(row)
    return rows
