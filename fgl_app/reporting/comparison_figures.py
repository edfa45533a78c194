"""The figures of a comparison: accuracy against rounds, bytes, seconds, conditions or epsilon, and bars; PNG, SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator

from fgl_app.experiments import Experiment, Figure, Results, accuracies, epsilon_of, mean_and_sd, seconds_of
from fgl_app.reporting.figures import COLOURS, HATCHES, LINES, MARKERS, to_png, to_svg

_X_LABELS = {
    "by-round": "round",
    "by-upload": "uploaded by all clients together, MB",
    "by-seconds": "time since the start, s",
    "by-epsilon": "ε",
}
_OF_ALL_COLUMNS = ("by-column", "by-epsilon")
"""Kinds whose curves have one point for each column."""
_LOGARITHMIC = ("by-upload", "by-epsilon")


def draw(experiment: Experiment, results: Results) -> dict[str, bytes]:
    """Draw every figure that has data; content by file name, each as PNG and as SVG."""
    files: dict[str, bytes] = {}
    for figure in experiment.figures:
        if not any(accuracies(experiment, results, row, column) for row in figure.rows for column in figure.columns):
            continue
        canvas = _bars(experiment, results, figure) if figure.kind == "bars" else _curves(experiment, results, figure)
        files[f"{figure.name}.png"] = to_png(canvas, dpi=150)
        files[f"{figure.name}.svg"] = to_svg(canvas).encode()
    return files


def _bars(experiment: Experiment, results: Results, figure: Figure) -> Canvas:
    canvas = Canvas(figsize=(1.6 + 1.6 * len(figure.columns), 3.4), layout="constrained")
    axis = canvas.subplots()
    width = 0.8 / len(figure.rows)
    for number, row in enumerate(figure.rows):
        cells = [accuracies(experiment, results, row, column) for column in figure.columns]
        means = [100 * mean_and_sd(values)[0] if values else np.nan for values in cells]
        deviations = [100 * mean_and_sd(values)[1] if values else 0.0 for values in cells]
        places = np.arange(len(figure.columns)) + (number - (len(figure.rows) - 1) / 2) * width
        bars = axis.bar(
            places, means, width, yerr=deviations, label=row, capsize=2, edgecolor="black", linewidth=0.6,
            color=COLOURS[number % len(COLOURS)], alpha=0.75, hatch=HATCHES[number % len(HATCHES)],
        )  # fmt: skip
        axis.bar_label(bars, ["" if np.isnan(mean) else f"{mean:.1f}" for mean in means], fontsize=7, padding=2)
    axis.set_xticks(range(len(figure.columns)), list(figure.columns))
    if figure.x_label:
        axis.set_xlabel(figure.x_label)
    _finish(canvas, axis, figure, experiment.measure == "validation_accuracy")
    return canvas


def _curves(experiment: Experiment, results: Results, figure: Figure) -> Canvas:
    panels: Sequence[Sequence[str]] = (
        [list(figure.columns)] if figure.kind in _OF_ALL_COLUMNS else [[column] for column in figure.columns]
    )
    canvas = Canvas(figsize=(0.8 + 3.6 * len(panels), 3.4), layout="constrained")
    axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, columns in zip(axes, panels, strict=True):
        for number, row in enumerate(figure.rows):
            if figure.kind in _OF_ALL_COLUMNS:
                points = _column_points(experiment, results, row, columns, figure)
            else:
                points = _round_points(experiment, results, row, columns[0], figure.kind)
            if not len(points):
                continue
            colour, line, marker = (styles[number % len(styles)] for styles in (COLOURS, LINES, MARKERS))
            x, mean, sd = points.T
            if figure.kind in _LOGARITHMIC and not x.any():  # no place on a logarithmic axis: a level to compare with
                axis.axhline(mean[-1], linestyle=line, color=colour, linewidth=1, label=row)
                continue
            # A single point, such as the one-shot model, would hide among the curves that begin in it.
            shape = {"markersize": 9, "markerfacecolor": "none", "zorder": 5} if len(x) == 1 else {"markersize": 4}
            axis.plot(x, mean, line, color=colour, marker=marker, markevery=max(1, len(x) // 12), label=row, **shape)
            axis.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
            if figure.kind in _LOGARITHMIC:
                axis.set_xscale("log")
            if figure.kind == "by-epsilon":
                axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter("")
        if figure.kind == "by-round":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(figure.x_label or _X_LABELS.get(figure.kind, ""))
        if len(panels) > 1:
            axis.set_title(columns[0], fontsize=10)
        axis.grid(alpha=0.3)
    _finish(canvas, axes[0], figure, experiment.measure == "validation_accuracy", titled=len(panels) == 1)
    if len(panels) > 1:
        canvas.suptitle(figure.title, fontsize=11)
    return canvas


def _column_points(
    experiment: Experiment, results: Results, row: str, columns: Sequence[str], figure: Figure
) -> np.ndarray[Any, Any]:
    """Return x, mean and standard deviation over the seeds in each column; x is 0 for a run without epsilon."""
    points = []
    for column in columns:
        values = accuracies(experiment, results, row, column)
        if not values:
            continue
        mean, sd = mean_and_sd(values)
        if figure.kind == "by-epsilon":
            x = epsilon_of(experiment, results, row, column, figure.part) or 0.0
        else:
            x = float(column.replace(",", ""))
        points.append((x, 100 * mean, 100 * sd))
    return np.array(sorted(points))


def _round_points(experiment: Experiment, results: Results, row: str, column: str, kind: str) -> np.ndarray[Any, Any]:
    """Return x, mean and standard deviation over the seeds after each round, up to the round that the row shows."""
    owner, own_column, last = experiment.cell(row, column)
    found = [item["rounds"][:last] for item in results.get((owner, own_column), [])]
    if not found:
        return np.empty((0, 3))
    points, chosen = [], "validation_accuracy" if experiment.measure == "validation_accuracy" else "accuracy"
    for index in range(min(map(len, found))):
        values = [float(rounds[index][chosen]) for rounds in found]
        x = float(np.mean([_x(rounds, index, kind) for rounds in found]))
        mean, sd = mean_and_sd(values)
        points.append((x, 100 * mean, 100 * sd))
    return np.array(points)


def _x(rounds: Sequence[Mapping[str, Any]], index: int, kind: str) -> float:
    done = rounds[: index + 1]
    if kind == "by-upload":
        return sum(int(line["upload_bytes"]) for line in done) / 1e6
    if kind == "by-seconds":
        return sum(map(seconds_of, done))
    return float(done[-1]["round"])


def _finish(canvas: Canvas, axis: Axes, figure: Figure, validation: bool, titled: bool = True) -> None:
    axis.set_ylabel("validation accuracy, %" if validation else "test accuracy, %")
    axis.set_ylim(0, 105)
    axis.set_yticks(range(0, 101, 20))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    canvas.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    if titled:
        axis.set_title(figure.title, fontsize=11)
