"""Read an experiment from its YAML file, check every run that it asks for, and refuse by file, line and key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fgl_app.errors import ConfigError
from fgl_app.experiments import Experiment, Figure, FigureKind, Measure, Ordering, Row, Run, settings_of
from fgl_app.settings import RunConfigValue
from fgl_app.user_files import NUMBERS_HINT, Document, Place, read_yaml

_SET_HERE = ("run-name", "output-dir", "store-dir", "seed", "num-clients")
_FILES = {"dataset", "caption-vocabulary"}
"""Keys that may name a file beside the experiment."""
_KEYS = ("title", "about", "clients", "seeds", "settings", "rows", "columns", "measure", "figures", "orderings")
_FIGURE_KEYS = ("name", "kind", "title", "rows", "columns", "x-label", "part")
_ORDERING_KEYS = ("name", "larger", "smaller", "margin")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAMED_KEY = re.compile(r"`([a-z-]+)`")


def read_experiment(path: Path) -> Any:
    """Read an experiment's file, which nothing but its syntax has been checked of.

    Files that lie beside it are named by their whole path, so that what is read can be written elsewhere.

    Raises:
        ConfigError: If it is no YAML file that can be read.
    """
    return _read(path).content


def load_experiment(path: Path) -> Experiment:
    """Read an experiment and check every run that it asks for.

    Raises:
        ConfigError: If the file is not well-formed, or one of its runs has a wrong configuration; it names file, line
            and key.
    """
    document = _read(path)
    experiment = _ExperimentReader(document).experiment()
    _RunChecks(document, experiment).check()
    return experiment


def _read(path: Path) -> Document:
    document = read_yaml(path, "experiment")
    content = document.content
    _keep_names(document)
    if isinstance(content, dict):
        groups = [content.get("settings"), *_values(content.get("rows")), *_values(content.get("columns"))]
        for settings in groups:
            for key in _FILES & set(settings if isinstance(settings, dict) else ()):
                if str(settings[key]).endswith((".yaml", ".yml", ".txt")):
                    settings[key] = str(path.resolve().parent / Path(settings[key]).expanduser())
    return document


def _keep_names(document: Document) -> None:
    """Put the names of rows and columns as they are written where others refer to them: 1e-2 is not called 0.01."""
    for place, text in document.spelled.items():
        of_figure = place[:1] in (("figures",), ("orderings",)) and isinstance(place[-1], int)
        if of_figure or (place[:1] == ("rows",) and place[2:] in (("of",), ("start-from", 0))):
            holder = document.content
            for part in place[:-1]:
                holder = holder[part]
            holder[place[-1]] = text


def _values(of: object) -> list[Any]:
    return list(of.values()) if isinstance(of, dict) else []


class _ExperimentReader:
    """Turns the content of an experiment's file into an :class:`Experiment`."""

    def __init__(self, document: Document) -> None:
        self._document = document

    def experiment(self) -> Experiment:
        content = self._mapping((), self._document.content, _KEYS)
        for key in ("title", "clients", "seeds", "rows", "columns"):
            if key not in content:
                raise self._error((), f"`{key}` is missing; see examples/ for experiments")
        columns = {
            name: self._settings(("columns", name), value or {})
            for name, value in self._mapping(("columns",), content["columns"]).items()
        }
        rows = tuple(self._row(name, value) for name, value in self._mapping(("rows",), content["rows"]).items())
        seeds = tuple(
            self._whole(("seeds", number), seed, 0)
            for number, seed in enumerate(self._list(("seeds",), content["seeds"]))
        )
        for key, values in (("seeds", seeds), ("rows", rows), ("columns", columns)):
            if not values:
                raise self._error((key,), "it must not be empty")
        if len(set(seeds)) < len(seeds):
            raise self._error(("seeds",), "each seed must stand there once")
        measure = content.get("measure", "final_accuracy")
        if measure not in get_args(Measure):
            raise self._error(("measure",), f"it must be one of {', '.join(get_args(Measure))}, but is {measure!r}")
        cells = {(row.name, column) for row in rows for column in columns}
        figures = tuple(
            self._figure(("figures", number), value, rows, columns)
            for number, value in enumerate(self._list(("figures",), content.get("figures", [])))
        )
        names = [figure.name.casefold() for figure in figures]  # some file systems take "A.png" for "a.png"
        for number, name in enumerate(names):
            if name in names[:number]:
                raise self._error(("figures", number, "name"), "figures must have different names, as files")
        return Experiment(
            title=self._text(("title",), content["title"]),
            about=self._text(("about",), content.get("about", "")),
            num_clients=self._whole(("clients",), content["clients"], 1),
            seeds=seeds,
            shared=self._settings(("settings",), content.get("settings") or {}),
            rows=rows,
            columns=columns,
            measure=measure,
            figures=figures,
            orderings=tuple(
                self._ordering(("orderings", number), value, cells)
                for number, value in enumerate(self._list(("orderings",), content.get("orderings", [])))
            ),
        )

    def _row(self, name: str, value: Any) -> Row:
        place: Place = ("rows", name)
        settings = dict(self._mapping(place, value or {}))
        of, server_round = settings.pop("of", None), settings.pop("round", None)
        start, every_column = settings.pop("start-from", None), settings.pop("every-column", True)
        if (of is None) != (server_round is None) or (of is not None and settings):
            raise self._error(place, "a row must have `of` and `round`, or settings")
        if of is not None:
            self._text((*place, "of"), of)
            self._whole((*place, "round"), server_round, 1)
        if start is not None:
            if type(start) is not list or len(start) != 2 or type(start[1]) is not int:
                raise self._error((*place, "start-from"), f"it must be [ROW, ROUND], but is {start!r}")
            start = (self._text((*place, "start-from", 0), start[0]), start[1])
        if type(every_column) is not bool:
            raise self._error((*place, "every-column"), f"it must be true or false, but is {every_column!r}")
        return Row(name, self._settings(place, settings), of, server_round, start, every_column)

    def _settings(self, place: Place, value: Any) -> dict[str, RunConfigValue]:
        settings = self._mapping(place, value)
        for key, item in settings.items():
            if not isinstance(item, bool | int | float | str):
                raise self._error((*place, key), f"it must be text, a number, true or false, but is {item!r}")
        return dict(settings)

    def _figure(self, place: Place, value: Any, rows: tuple[Row, ...], columns: Mapping[str, Any]) -> Figure:
        given = self._mapping(place, value, _FIGURE_KEYS)
        for key in ("name", "kind", "title"):
            if key not in given:
                raise self._error(place, f"`{key}` of a figure is missing")
        name = self._text((*place, "name"), given["name"])
        if not _FILE_NAME.fullmatch(name):
            raise self._error(
                (*place, "name"),
                f"the name of a file must be letters, digits, dots, hyphens and underscores, not {name!r}",
            )
        kind = given["kind"]
        if kind not in get_args(FigureKind):
            raise self._error((*place, "kind"), f"figure {name!r} must be one of {', '.join(get_args(FigureKind))}")
        figure = Figure(
            name=name,
            kind=kind,
            title=self._text((*place, "title"), given["title"]),
            rows=self._references((*place, "rows"), given, [row.name for row in rows]),
            columns=self._references((*place, "columns"), given, list(columns)),
            x_label=self._text((*place, "x-label"), given.get("x-label", "")),
            part=self._text((*place, "part"), given.get("part", "")),
        )
        if kind == "by-column" and not all(map(_is_number, figure.columns)):
            raise self._error(place, f"figure {name!r} needs columns that are named by numbers")
        if kind == "by-epsilon" and figure.part not in ("prompts", "rounds"):
            raise self._error(
                (*place, "part"), f"`part` of figure {name!r} must be prompts or rounds, but is {figure.part!r}"
            )
        earlier_rounds = {row.name for row in rows if row.server_round is not None}
        if kind == "by-epsilon" and figure.part == "rounds" and earlier_rounds & set(figure.rows):
            raise self._error(place, f"figure {name!r} must show last rounds only, because its epsilon is theirs")
        return figure

    def _references(self, place: Place, given: Mapping[str, Any], known: list[str]) -> tuple[str, ...]:
        key = str(place[-1])
        if key not in given:
            return tuple(known)
        named = self._list(place, given[key])
        for number, name in enumerate(named):
            if name not in known:
                raise self._error((*place, number), f"it must name one of the {key}, but names {name!r}")
        return tuple(named)

    def _ordering(self, place: Place, value: Any, cells: set[tuple[str, str]]) -> Ordering:
        given = self._mapping(place, value, _ORDERING_KEYS)
        for key in ("name", "larger", "smaller"):
            if key not in given:
                raise self._error(place, f"`{key}` of an ordering is missing")
        name = self._text((*place, "name"), given["name"])
        margin = given.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise self._error((*place, "margin"), f"it must be a number, but is {margin!r}. {NUMBERS_HINT}")
        found = []
        for key in ("larger", "smaller"):
            cell = tuple(self._list((*place, key), given[key]))
            if not all(isinstance(item, str) for item in cell) or cell not in cells:
                raise self._error(
                    (*place, key), f"ordering {name!r} must name a row and a column, but names {list(cell)}"
                )
            found.append((str(cell[0]), str(cell[1])))
        return Ordering(name, found[0], found[1], float(margin))

    def _mapping(self, place: Place, value: Any, known: tuple[str, ...] = ()) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._error(place, f"it must be a mapping of names to values, but is {value!r}")
        for key in value:
            if known and key not in known:
                raise self._error((*place, key), f"`{key}` is unknown. Use {', '.join(known)}")
        return value

    def _list(self, place: Place, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self._error(place, f"it must be a list, but is {value!r}")
        return value

    def _text(self, place: Place, value: Any) -> str:
        if not isinstance(value, str):
            raise self._error(place, f"it must be text, but is {value!r}. Put it in quotes")
        return value

    def _whole(self, place: Place, value: Any, least: int) -> int:
        if type(value) is not int or value < least:
            raise self._error(place, f"it must be a whole number from {least} on, but is {value!r}. {NUMBERS_HINT}")
        return value

    def _error(self, place: Place, reason: str) -> ConfigError:
        return ConfigError(f"In the experiment {self._document.where(place)}: {reason}.")


class _RunChecks:
    """Checks what the rows, columns and settings of an experiment come to together."""

    def __init__(self, document: Document, experiment: Experiment) -> None:
        self._document = document
        self._experiment = experiment

    def check(self) -> None:
        experiment = self._experiment
        own_runs = {row.name for row in experiment.rows if row.of is None}
        for number, row in enumerate(experiment.rows):
            if row.of is not None and row.of not in own_runs:
                raise self._error(
                    ("rows", row.name, "of"),
                    f"row {row.name!r} must be `of` a row with runs of its own, but names {row.of!r}",
                )
            earlier = own_runs & {item.name for item in experiment.rows[:number]}
            if row.start_from is not None and row.start_from[0] not in earlier:
                raise self._error(
                    ("rows", row.name, "start-from"),
                    f"row {row.name!r} must start from an earlier row with runs of its own, but names "
                    f"{row.start_from[0]!r}",
                )
        for place in (
            ("settings",),
            *(("columns", name) for name in experiment.columns),
            *(("rows", name) for name in own_runs),
        ):
            for key in _SET_HERE:
                if (*place, key) in self._document.lines:
                    raise self._error((*place, key), f"`{key}` is set by `fgl compare` itself and must not be given")
        names: dict[str, Run] = {}
        for run in experiment.runs(Path("/")):
            self._check_run(run)
            if run.name in names:
                raise self._error(
                    ("rows", run.row),
                    f"rows and columns must differ in letters or digits, but two runs are called {run.name!r}",
                )
            names[run.name] = run

    def _check_run(self, run: Run) -> None:
        rows = self._experiment.rows
        shown = [row.server_round for row in rows if row.of == run.row and row.server_round is not None]
        shown += [row.start_from[1] for row in rows if row.start_from and row.start_from[0] == run.row]
        try:
            settings = settings_of(run)
        except ConfigError as error:
            named = _NAMED_KEY.match(str(error))
            raise self._error(
                self._place_of(run, named[1] if named else ""),
                f"row {run.row!r}, column {run.column!r} is wrong: {error}".rstrip("."),
            ) from None
        rounds = settings.run.num_server_rounds
        if any(number > rounds for number in shown):
            raise self._error(
                ("rows", run.row),
                f"a row must not show or start from round {max(shown)} of {run.row!r}, which has {rounds}",
            )

    def _place_of(self, run: Run, key: str) -> Place:
        """Return where a run's key is set: by its row, its column or for all; the row where it is set nowhere."""
        if key == "run-name":  # made of their names
            return ("rows", run.row)
        places: tuple[Place, ...] = (("rows", run.row, key), ("columns", run.column, key), ("settings", key))
        return next((place for place in places if place in self._document.lines), ("rows", run.row))

    def _error(self, place: Place, reason: str) -> ConfigError:
        return ConfigError(f"In the experiment {self._document.where(place)}: {reason}.")


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
