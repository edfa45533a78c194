"""Experiments: a YAML file that says which methods are compared under which conditions with which seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fgl_app.config import default_run_config, parse_run_config
from fgl_app.errors import ConfigError
from fgl_app.files import checkpoint_file
from fgl_app.settings import RunConfigValue, Settings

Measure = Literal["final_accuracy", "selected_accuracy", "paper_metric"]
FigureKind = Literal["bars", "by-round", "by-upload", "by-seconds", "by-column", "by-epsilon"]
Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""``results.json`` of every finished run of a row and column, in the order of the seeds."""

_SET_HERE = ("run-name", "output-dir", "store-dir", "seed", "num-clients")
_FILES = {"dataset", "caption-vocabulary"}
"""Keys that may name a file beside the experiment."""


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
    """A claim of the paper: one mean is above another by some margin."""

    name: str
    larger: tuple[str, str]
    """Row and column."""
    smaller: tuple[str, str]
    margin: float
    """Least difference of the means, in points of accuracy, 0 to 1; negative for "not worse by more than"."""


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


def read_experiment(path: Path) -> Any:
    """Read an experiment's file, which nothing but its syntax has been checked of.

    Files that lie beside it are named by their whole path, so that what is read can be written elsewhere.

    Raises:
        ConfigError: If it is no YAML file that can be read.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"The experiment {str(path)!r} must be a file that can be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The experiment {str(path)!r} must be YAML, but is not: {' '.join(str(error).split())[:300]}."
        ) from None
    if isinstance(content, dict):
        groups = [content.get("settings"), *_values(content.get("rows")), *_values(content.get("columns"))]
        for settings in groups:
            for key in _FILES & set(settings if isinstance(settings, dict) else ()):
                if str(settings[key]).endswith((".yaml", ".yml", ".txt")):
                    settings[key] = str(path.resolve().parent / Path(settings[key]).expanduser())
    return content


def _values(of: object) -> list[Any]:
    return list(of.values()) if isinstance(of, dict) else []


def load_experiment(path: Path) -> Experiment:
    """Read an experiment and check every run that it asks for.

    Raises:
        ConfigError: If the file is not well-formed, or one of its runs has a wrong configuration.
    """
    content = read_experiment(path)
    try:
        experiment = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"The experiment {str(path)!r} must have title, clients, seeds, settings, rows and columns, as those in "
            f"examples/ have, but {what}."
        ) from None
    _check(experiment, path)
    return experiment


def settings_of(run: Run) -> Settings:
    """Return the checked settings of a run."""
    return parse_run_config(default_run_config() | dict(run.overrides))


def accuracies(
    experiment: Experiment, results: Results, row: str, column: str, measure: Measure | None = None
) -> list[float]:
    """Return a cell's accuracy of each finished seed, 0 to 1."""
    owner, own_column, server_round = experiment.cell(row, column)
    found = results.get((owner, own_column), [])
    if server_round is not None:  # an earlier round of a longer run: all measures are that round's accuracy
        return [float(item["rounds"][server_round - 1]["accuracy"]) for item in found]
    return [float(item[measure or experiment.measure]) for item in found]


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
    """Return a round's wall-clock seconds; images that another run drew into the common store are charged again."""
    return float(row["seconds"]) + float(row.get("reused_seconds", 0.0))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the latter is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _parse(content: Any) -> Experiment:
    known = {
        "title", "about", "clients", "seeds", "settings", "rows", "columns", "measure", "figures", "orderings",
    }  # fmt: skip
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"`{unknown[0]}` is unknown")
    rows = []
    for name, value in content["rows"].items():
        settings = dict(value or {})
        of, server_round = settings.pop("of", None), settings.pop("round", None)
        start = settings.pop("start-from", None)
        every_column = bool(settings.pop("every-column", True))
        if (of is None) != (server_round is None) or (of is not None and settings):
            raise ValueError(f"row {name!r} must have `of` and `round`, or settings")
        if server_round is not None and (type(server_round) is not int or server_round < 1):
            raise ValueError(f"`round` of row {name!r} must be a whole number from 1 on, but is {server_round!r}")
        if start is not None and (type(start) is not list or len(start) != 2 or type(start[1]) is not int):
            raise ValueError(f"`start-from` of row {name!r} must be [ROW, ROUND], but is {start!r}")
        rows.append(
            Row(name, settings, of, server_round, None if start is None else (start[0], start[1]), every_column)
        )
    columns = {str(name): dict(value or {}) for name, value in content["columns"].items()}
    names = tuple(row.name for row in rows)
    shared = dict(content.get("settings", {}))
    figures = tuple(
        Figure(
            name=value["name"],
            kind=value["kind"],
            title=value["title"],
            rows=tuple(value.get("rows", names)),
            columns=tuple(map(str, value.get("columns", columns))),
            x_label=value.get("x-label", ""),
            part=value.get("part", ""),
        )
        for value in content.get("figures", [])
    )
    orderings = tuple(
        Ordering(
            value["name"],
            (value["larger"][0], str(value["larger"][1])),
            (value["smaller"][0], str(value["smaller"][1])),
            float(value.get("margin", 0.0)),
        )
        for value in content.get("orderings", [])
    )
    return Experiment(
        title=content["title"],
        about=content.get("about", ""),
        num_clients=int(content["clients"]),
        seeds=tuple(map(int, content["seeds"])),
        shared=shared,
        rows=tuple(rows),
        columns=columns,
        measure=content.get("measure", "final_accuracy"),
        figures=figures,
        orderings=orderings,
    )


def _check(experiment: Experiment, path: Path) -> None:
    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"In the experiment {str(path)!r} {reason}.")

    if experiment.measure not in get_args(Measure):
        raise refuse(f"`measure` must be one of {', '.join(get_args(Measure))}, but is {experiment.measure!r}")
    if not experiment.seeds or not experiment.rows or not experiment.columns:
        raise refuse("`seeds`, `rows` and `columns` must not be empty")
    own_runs = {row.name for row in experiment.rows if row.of is None}
    for row in experiment.rows:
        if row.of is not None and row.of not in own_runs:
            raise refuse(f"row {row.name!r} must be `of` a row with runs of its own, but names {row.of!r}")
        earlier = own_runs & {item.name for item in experiment.rows[: experiment.rows.index(row)]}
        if row.start_from is not None and row.start_from[0] not in earlier:
            raise refuse(
                f"row {row.name!r} must start from an earlier row with runs of its own, but names {row.start_from[0]!r}"
            )
    cells = {(row.name, column) for row in experiment.rows for column in experiment.columns}
    for ordering in experiment.orderings:
        for cell in (ordering.larger, ordering.smaller):
            if cell not in cells:
                raise refuse(f"ordering {ordering.name!r} must name a row and a column, but names {list(cell)}")
    for figure in experiment.figures:
        if figure.kind not in get_args(FigureKind):
            raise refuse(f"figure {figure.name!r} must be one of {', '.join(get_args(FigureKind))}")
        strangers = [(r, c) for r in figure.rows for c in figure.columns if (r, c) not in cells]
        if strangers:
            raise refuse(f"figure {figure.name!r} must name rows and columns, but names {list(strangers[0])}")
        if figure.kind == "by-column" and not all(map(_is_number, figure.columns)):
            raise refuse(f"figure {figure.name!r} needs columns that are named by numbers")
        if figure.kind == "by-epsilon" and figure.part not in ("prompts", "rounds"):
            raise refuse(f"`part` of figure {figure.name!r} must be prompts or rounds, but is {figure.part!r}")
        earlier_rounds = {row.name for row in experiment.rows if row.server_round is not None}
        if figure.kind == "by-epsilon" and figure.part == "rounds" and earlier_rounds & set(figure.rows):
            raise refuse(f"figure {figure.name!r} must show last rounds only, because its epsilon is theirs")
    names: dict[str, Run] = {}
    for run in experiment.runs(Path("/")):
        for key in _SET_HERE:
            row = next(item for item in experiment.rows if item.name == run.row)
            if key in {**experiment.shared, **experiment.columns[run.column], **row.settings}:
                raise refuse(f"`{key}` is set by `fgl compare` itself and must not be given")
        shown = [row.server_round for row in experiment.rows if row.of == run.row and row.server_round is not None]
        shown += [row.start_from[1] for row in experiment.rows if row.start_from and row.start_from[0] == run.row]
        rounds = run.overrides.get("num-server-rounds", default_run_config()["num-server-rounds"])
        if any(number > int(rounds) for number in shown):
            raise refuse(f"a row must not show or start from round {max(shown)} of {run.row!r}, which has {rounds}")
        try:
            settings_of(run)
        except ConfigError as error:
            raise refuse(f"row {run.row!r}, column {run.column!r} is wrong: {error}".rstrip(".")) from None
        if run.name in names:
            raise refuse(f"rows and columns must differ in letters or digits, but two runs are called {run.name!r}")
        names[run.name] = run


def _run_name(row: str, column: str, seed: int) -> str:
    return f"{_slug(row)}--{_slug(column)}--seed-{seed}"


def _slug(text: str) -> str:
    plain = text.replace("β", "beta").replace("α", "alpha")
    return re.sub(r"[^A-Za-z0-9.]+", "-", plain).strip("-.").lower() or "x"


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
