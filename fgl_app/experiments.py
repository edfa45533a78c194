"""Experiments: which methods are compared under which conditions with which seeds; ``experiment_reader`` reads them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fgl_app.config import default_run_config, parse_run_config
from fgl_app.files import checkpoint_file
from fgl_app.settings import RunConfigValue, Settings

EXPERIMENT_FILE = "experiment.yaml"
"""Copy of the experiment in the folder of its runs."""
Measure = Literal["final_accuracy", "selected_accuracy", "paper_metric", "validation_accuracy"]
FigureKind = Literal["bars", "by-round", "by-upload", "by-seconds", "by-column", "by-epsilon"]
Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""``results.json`` of every finished run of a row and column, in the order of the seeds."""


@dataclass(frozen=True)
class Row:
    """One method of a comparison."""

    name: str
    settings: Mapping[str, RunConfigValue]
    """Run configuration besides what all runs share."""
    of: str | None
    """Another row, of whose runs this row shows an earlier round; None if it has runs of its own."""
    server_round: int | None
    """That round."""
    start_from: tuple[str, int] | None
    """Another row and a round: each run starts from the weights that the other's run left after it."""
    every_column: bool
    """Whether each column needs a run of its own; else the first column's counts for all."""


@dataclass(frozen=True)
class Figure:
    """One figure of a comparison."""

    name: str
    """File name without its ending."""
    kind: FigureKind
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    x_label: str
    """Label of the x-axis, for ``by-column``, whose columns are named by numbers."""
    part: str
    """What the epsilon on the x-axis protects, ``prompts`` or ``rounds``, for ``by-epsilon``."""


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper: one accuracy is above another by some margin."""

    name: str
    larger: tuple[str, str]
    """Row and column."""
    smaller: tuple[str, str]
    margin: float
    """Least mean difference between runs of the same seed, 0 to 1; negative for "not worse by more than"."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    row: str
    column: str
    seed: int
    name: str
    """Its ``run-name``."""
    overrides: Mapping[str, RunConfigValue]
    after: str | None
    """The run that must be finished before, because this one starts from its weights."""


@dataclass(frozen=True)
class Experiment:
    """Methods x conditions x seeds."""

    title: str
    about: str
    """A sentence or two for the reader of the table."""
    num_clients: int
    seeds: tuple[int, ...]
    shared: Mapping[str, RunConfigValue]
    """Run configuration of all runs."""
    rows: tuple[Row, ...]
    columns: Mapping[str, Mapping[str, RunConfigValue]]
    measure: Measure
    """What the main table shows."""
    figures: tuple[Figure, ...]
    orderings: tuple[Ordering, ...]

    def runs(self, folder: Path, data_dir: Path | None = None) -> list[Run]:
        """Return the runs in the order of seed, column and row, so that a part of them is a smaller comparison.

        Args:
            folder: Where the runs and their common store of images lie.
            data_dir: Where the data set lies; None to let its library find or download it.
        """
        found = []
        for seed in self.seeds:
            for column, condition in self.columns.items():
                for row in self.rows:
                    if row.of is not None or (not row.every_column and column != next(iter(self.columns))):
                        continue
                    name, after = _run_name(row.name, column, seed), None
                    overrides = {**self.shared, **condition, **row.settings}
                    here: dict[str, RunConfigValue] = {
                        "run-name": name,
                        "output-dir": str(folder / "runs"),
                        "store-dir": str(folder / "store"),
                        "seed": seed,
                        "num-clients": self.num_clients,
                        **({} if data_dir is None else {"data-dir": str(data_dir)}),
                    }
                    if row.start_from is not None:
                        owner, number = row.start_from
                        after = _run_name(*self.cell(owner, column)[:2], seed)
                        here["initial-weights"] = str(checkpoint_file(folder / "runs" / after, number))
                    found.append(Run(row.name, column, seed, name, {**overrides, **here}, after))
        return found

    def cell(self, row: str, column: str) -> tuple[str, str, int | None]:
        """Return the row and column whose runs a cell of the table shows, and which round; None for the last."""
        chosen = next(item for item in self.rows if item.name == row)
        owner = next(item for item in self.rows if item.name == (chosen.of or row))
        return owner.name, column if owner.every_column else next(iter(self.columns)), chosen.server_round


def settings_of(run: Run) -> Settings:
    """Return the checked settings of a run."""
    return parse_run_config(default_run_config() | dict(run.overrides))


def accuracies(
    experiment: Experiment, results: Results, row: str, column: str, measure: Measure | None = None
) -> list[float]:
    """Return a cell's accuracy of each finished seed, 0 to 1."""
    return list(accuracy_by_seed(experiment, results, row, column, measure).values())


def accuracy_by_seed(
    experiment: Experiment, results: Results, row: str, column: str, measure: Measure | None = None
) -> dict[int, float]:
    """Return a cell's accuracy, 0 to 1, by the seed of each finished run."""
    owner, own_column, server_round = experiment.cell(row, column)
    chosen = measure or experiment.measure

    def of(item: Mapping[str, Any]) -> float:
        if chosen == "validation_accuracy":
            return float(item["rounds"][-1 if server_round is None else server_round - 1]["validation_accuracy"])
        if server_round is not None:  # an earlier round of a longer run: the other measures are its test accuracy
            return float(item["rounds"][server_round - 1]["accuracy"])
        return float(item[chosen])

    return {int(item["seed"]): of(item) for item in results.get((owner, own_column), [])}


def epsilon_of(experiment: Experiment, results: Results, row: str, column: str, part: str) -> float | None:
    """Return the mean epsilon of a cell's runs.

    Args:
        experiment: The experiment.
        results: Its finished runs.
        row: Of the cell.
        column: Of the cell.
        part: ``prompts`` or ``rounds``; where both images and clients are protected in it, images count.

    Returns:
        None without runs, and where nothing protects the part.
    """
    owner, own_column, _ = experiment.cell(row, column)
    found = []
    for item in results.get((owner, own_column), []):
        mechanisms = [one for one in (item["privacy"] or {"mechanisms": []})["mechanisms"] if one["part"] == part]
        found += [float(one["epsilon"]) for one in sorted(mechanisms, key=lambda one: str(one["unit"]))[-1:]]
    return statistics.fmean(found) if found else None


def cumulative_upload(experiment: Experiment, results: Results, row: str, column: str) -> float | None:
    """Return the mean number of bytes that all clients uploaded for a cell's result; None without runs."""
    owner, own_column, server_round = experiment.cell(row, column)
    sums = [
        sum(int(line["upload_bytes"]) for line in item["rounds"][:server_round])
        for item in results.get((owner, own_column), [])
    ]
    return sum(sums) / len(sums) if sums else None


def seconds_of(row: Mapping[str, Any]) -> float:
    """Return a round's wall-clock seconds; images that another run drew into the common store are charged again.

    NaN where the run keeps them secret, because they could tell which clients were drawn.
    """
    return float(row.get("seconds", "nan")) + float(row.get("reused_seconds", 0.0))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the latter is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _run_name(row: str, column: str, seed: int) -> str:
    return f"{_slug(row)}--{_slug(column)}--seed-{seed}"


def _slug(text: str) -> str:
    plain = text.replace("β", "beta").replace("α", "alpha")
    return re.sub(r"[^A-Za-z0-9.]+", "-", plain).strip("-.").lower() or "x"
