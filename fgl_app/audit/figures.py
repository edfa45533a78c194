"""The figures of an audit; they can be read in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgl_app.reporting.figures import COLOURS, LINES

Floats = npt.NDArray[np.floating]

_UNITS = {"entropy": "nats", "loss": "nats", "confidence": "probability", "modified entropy": "nats"}
_BINS = 40


def roc_figure(curves: Mapping[str, tuple[Floats, Floats]], least_fpr: float, title: str) -> Figure:
    """Draw ROC curves on logarithmic axes, so that few false alarms can be seen (Carlini et al. 2022, Figure 1).

    Args:
        curves: False- and true-positive rates by the name of the model.
        least_fpr: Smallest rate above zero that the non-members resolve; the axes begin there.
        title: What the score is.
    """
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    floor = least_fpr / 2
    axes.plot([floor, 1], [floor, 1], color="0.6", linewidth=1, label="guessing")
    for number, (name, (fpr, tpr)) in enumerate(curves.items()):
        axes.plot(
            np.maximum(fpr, floor), np.maximum(tpr, floor), label=name, drawstyle="steps-post", linewidth=1.4,
            color=COLOURS[number % len(COLOURS)], linestyle=LINES[number % len(LINES)],
        )  # fmt: skip
    for rate in (0.001, 0.01):
        if rate >= floor:
            axes.axvline(rate, color="0.8", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1), title=title,
        xlabel="false-positive rate (share of non-members)", ylabel="true-positive rate (share of members)",
    )  # fmt: skip
    axes.grid(color="0.9", linewidth=0.5)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def distributions_figure(values: Mapping[str, Mapping[str, tuple[Floats, Floats]]]) -> Figure:
    """Draw histograms of each measure over members and non-members, one row for each model (FGL, Figures 8, 12-14).

    Args:
        values: For each model and measure the values of members and of non-members.
    """
    measures = list(next(iter(values.values())))
    figure = Figure(figsize=(2.9 * len(measures), 2.3 * len(values) + 0.5), layout="constrained")
    grid = figure.subplots(len(values), len(measures), squeeze=False)
    for row, (model, of_model) in zip(grid, values.items(), strict=True):
        for axes, measure in zip(row, measures, strict=True):
            members, others = of_model[measure]
            top = 1.0 if measure == "confidence" else float(np.quantile(np.concatenate([members, others]), 0.995))
            edges = np.linspace(0, top or 1.0, _BINS + 1)
            _histogram(axes, members, edges, "members", COLOURS[2])
            _histogram(axes, others, edges, "non-members")
            axes.set(yscale="log", ylim=(0.01, 150), xlabel=f"{measure}, {_UNITS[measure]}")
            axes.grid(color="0.9", linewidth=0.5)
            axes.set_axisbelow(True)
        row[0].set_ylabel(f"{model}\nimages, %")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def similarity_figure(synthetic: Floats, baseline: Floats, threshold: float, features: str) -> Figure:
    """Draw how near synthetic and held-out real images come to their nearest training image.

    Args:
        synthetic: Similarity of each synthetic image, -1 to 1.
        baseline: The same of each held-out real image.
        threshold: Similarity from which on an image is a near-copy.
        features: What was compared.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(min(synthetic.min(), baseline.min()), max(1.0, synthetic.max(), baseline.max()), _BINS + 1)
    _histogram(axes, synthetic, edges, "synthetic", COLOURS[1])
    _histogram(axes, baseline, edges, "real, held out")
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="near-copies to the right")
    axes.set(xlabel=f"cosine similarity to the nearest training image\n({features})", ylabel="images, %")
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def pairs_figure(pairs: Sequence[tuple[torch.Tensor, torch.Tensor, float]], columns: int = 5) -> Figure:
    """Draw synthetic images beside their nearest training images (FGL, Figure 7).

    Args:
        pairs: Synthetic and real image, uint8 ``[3, S, S]``, and their similarity, the most similar first.
        columns: Pairs in a row.
    """
    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(1.9 * columns, 1.25 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (synthetic, real, similarity) in zip(grid.flat, pairs, strict=False):
        side = max(synthetic.shape[-1], real.shape[-1])
        both = [torch.nn.functional.interpolate(each[None], size=(side, side))[0] for each in (synthetic, real)]
        axes.imshow(torch.cat(both, dim=2).permute(1, 2, 0).numpy(), extent=(0, 2, 0, 1))
        axes.axvline(1, color="white", linewidth=1.5)
        axes.set_title(f"{similarity:.3f}", fontsize=8, pad=2)
    figure.suptitle("synthetic | nearest training image, by cosine similarity", fontsize=10)
    return figure


def noise_figure(scales: Sequence[float], shares: Sequence[float]) -> Figure:
    """Draw the share of words that inversion finds against the noise on embeddings.

    Args:
        scales: Standard deviation of the noise, as multiples of the root mean square of an embedding's entries.
        shares: Share of the words that were found, 0 to 1.
    """
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(scales, [100 * share for share in shares], color="black", marker="o", markersize=5)
    axes.set(
        xlabel="standard deviation of the noise / root mean square of the entries", ylabel="words found, %",
        ylim=(0, 105),
    )  # fmt: skip
    axes.set_xscale("symlog", linthresh=max(1e-6, min((each for each in scales if each), default=1.0)))
    axes.grid(color="0.9", linewidth=0.5)
    return figure


def _histogram(axes: Axes, values: Floats, edges: Floats, label: str, colour: str = "") -> None:
    """Draw the shares of the values, filled with a colour or as a black outline; what is above counts as the last."""
    shares = 100 * np.histogram(np.minimum(values, edges[-1]), edges)[0] / len(values)
    if colour:
        axes.stairs(shares, edges, label=label, color=colour, alpha=0.4, fill=True, linewidth=0)
    else:
        axes.stairs(shares, edges, label=label, color="black", linewidth=1.2)
