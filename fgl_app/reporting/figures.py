"""Figures of a run: pure functions from data to a Matplotlib figure that can be read in grey, and its two encodings.

Matplotlib takes a second to import and is needed where a page is drawn only; no state of ``pyplot`` is touched.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fgl_app.data.images import ImageSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

# Lines and bars differ in colour, dashes, markers and hatches, so that they can be told apart in grey, too.
# Okabe & Ito's palette for the colour-blind, without its yellow, which is lost on white.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
_LEGEND_CLASSES = 20
"""With more classes a legend is longer than the figure; a colour bar counts them instead."""
_NUMBERED_CLASSES = 20
"""With more classes the counts in a confusion matrix do not fit their cells."""
_NAMED_CLASSES = 40
"""With more classes their names do not fit beside the rows."""
_MAX_NAME_CHARS = 24
_CELL_IN = 0.46
"""Side of an image on a contact sheet, inches."""


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str) -> Figure:
    """Draw lines that differ in colour, dashes and markers.

    Args:
        series: Points (x, y) of each line, by the line's name in the legend.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(series.items()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=_plain(name),
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            markevery=max(1, math.ceil(len(points) / 20)),
            fillstyle="none" if number % 2 else "full",
        )
    axes.set(xlabel=_plain(x_label), ylabel=_plain(y_label))
    places = {float(x) for points in series.values() for x, _ in points}
    if all(x.is_integer() for x in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(places) == 1:  # around a single point Matplotlib would show fractions of a round
        axes.set_xlim(min(places) - 1, max(places) + 1)
    axes.grid(color="0.85", linewidth=0.6)
    # Outside the axes it hides no point.
    figure.legend(loc="outside upper left", ncols=min(3, max(1, len(series))), frameon=False, fontsize=9)
    return figure


def confusion_chart(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw how often images of each class were predicted as each class; dark is frequent among its row.

    Args:
        confusion: Counts, K rows (true class) of K columns (predicted class).
        class_names: Names of the K classes.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, dtype=np.int64).reshape(len(class_names), len(class_names))
    shares = 100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(9.0, 2.2 + 0.42 * len(class_names))
    figure = Figure(figsize=(side + 1.4, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Greys", vmin=0, vmax=100)
    if len(class_names) <= _NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 50 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    step = math.ceil(len(class_names) / _NAMED_CLASSES)
    ticks = list(range(0, len(class_names), step))
    names = [_short(class_names[index]) for index in ticks]
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class, %")
    return figure


def partition_chart(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw one stacked bar for each client: how many training images of each class it holds.

    Args:
        counts: For each client the images of each of the K classes.
        class_names: Names of the K classes.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    table = np.asarray(counts, dtype=np.int64).reshape(-1, len(class_names))
    listed = len(class_names) <= _LEGEND_CLASSES
    figure = Figure(figsize=(min(11.0, 4.4 + 0.28 * len(table)), 4.2 if listed else 3.8), layout="constrained")
    axes = figure.subplots()
    # Lightness rises steadily along this map, so that the order of a stack is that of the legend in grey, too.
    scale = matplotlib.colormaps["cividis"]
    # One step function for each class, with gaps between the clients: a patch for each bar is slow with many classes.
    edges = (np.arange(len(table))[:, None] + [-0.4, 0.4]).ravel()
    floor = np.zeros(len(edges) - 1)
    for label, name in enumerate(class_names):
        images = np.full(len(edges) - 1, np.nan)
        images[::2] = np.where(table[:, label] > 0, table[:, label], np.nan)
        axes.stairs(
            floor + images,
            edges,
            baseline=floor.copy(),
            fill=True,
            label=_short(name),
            facecolor=scale(label / max(1, len(class_names) - 1)),
            edgecolor="white" if label < len(class_names) / 2 else "0.25",
            hatch=HATCHES[label % len(HATCHES)] if listed else "",
            linewidth=0.4 if listed else 0,
        )
        floor[::2] += table[:, label]
    axes.set(xlabel="client", ylabel="training images", xlim=(-0.6, len(table) - 0.4), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    if listed:
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1], names[::-1], loc="outside right upper", title="class", frameon=False, fontsize=8,
            handleheight=1.3,
        )  # fmt: skip
    else:
        colours = ScalarMappable(Normalize(0, len(class_names) - 1), scale)
        figure.colorbar(colours, ax=axes, label="class number")
    return figure


def contact_sheet(panels: Mapping[str, ImageSet], class_names: Sequence[str], per_class: int = 8) -> Figure:
    """Draw images beside each other: one panel for each set, one row for each class.

    Args:
        panels: Sets of images by the title of their panel; a class that a set lacks leaves its row grey.
        class_names: Names of the classes whose rows are drawn, in the order of their labels.
        per_class: Images of each class in each panel, spread evenly over those that a set holds.
    """
    from matplotlib.figure import Figure

    rows = len(class_names)
    names = [_short(name) for name in class_names]
    margin = 0.35 + 0.085 * max(map(len, names))
    size = (margin + len(panels) * (per_class * _CELL_IN + 0.25), rows * _CELL_IN + 0.45)
    figure = Figure(figsize=size, layout="constrained")
    for index, (axes, (title, data)) in enumerate(zip(_row_of_axes(figure, len(panels)), panels.items(), strict=True)):
        axes.imshow(_grid(data, rows, per_class), extent=(0, per_class, rows, 0))
        axes.set_title(_plain(title), fontsize=10, loc="left")
        axes.set_xticks([])
        axes.set_yticks([row + 0.5 for row in range(rows)] if index == 0 else [], names if index == 0 else [])
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
    return figure


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most ``most`` of the items, evenly spread over them, in their order."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def to_svg(figure: Figure) -> str:
    """Encode a figure as one ``<svg>`` element, letters as outlines: it needs no font, and equal figures are equal."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fgl"}):
        # Without a date and a creator; the keys are those of Matplotlib.
        text = _saved(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()
    return text[text.index("<svg") :]


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """Encode a figure as PNG."""
    return _saved(figure, format="png", dpi=dpi)


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may be written in a script that the font lacks; the page's tables show them in the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _row_of_axes(figure: Figure, number: int) -> list[Axes]:
    return list(figure.subplots(1, number, squeeze=False)[0])


def _grid(data: ImageSet, rows: int, per_class: int) -> np.ndarray[Any, Any]:
    """Lay out images of side S, a grey gap G around each, one row a class; uint8 ``[K (S + 2 G), N (S + 2 G), 3]``."""
    side = data.images.shape[-1]
    gap = max(1, side // 24)
    pitch = side + 2 * gap
    canvas = np.full((rows * pitch, per_class * pitch, 3), 200, dtype=np.uint8)
    for label in range(rows):
        found = (data.labels == label).nonzero().flatten().tolist()
        for column, index in enumerate(spread(found, per_class)):
            top, left = label * pitch + gap, column * pitch + gap
            canvas[top : top + side, left : left + side] = data.images[index].permute(1, 2, 0).numpy()
    return canvas


def _short(name: str) -> str:
    return _plain(name if len(name) <= _MAX_NAME_CHARS else name[: _MAX_NAME_CHARS - 1] + "…")


def _plain(text: str) -> str:
    """Keep Matplotlib from reading dollar signs as formulae."""
    return text.replace("$", r"\$")
