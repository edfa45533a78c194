"""Tables of audits: one run with its intervals, and many runs grouped by method over their seeds (FGL, Table 3)."""

from __future__ import annotations

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from fgl_app.audit.labels import data_name, model_name
from fgl_app.privacy.membership import SIGNS
from fgl_app.reporting.audit_section import interval
from fgl_app.reporting.earlier_start import FREE_KEYS

_IGNORED = FREE_KEYS | {"seed", "run-name"}
"""What does not change a model, or differs between the runs of one method."""
# What no one-shot model has seen.
_AFTER_ONE_SHOT = {
    "local-epochs", "learning-rate", "server-finetune-epochs", "weighting", "strategy", "strategy-options",
    "fraction-train",
}  # fmt: skip
_LEVEL = 0.95


@dataclass(frozen=True)
class _Group:
    """Models of one method on the same data, one for each seed."""

    data: str
    name: str
    settings: Mapping[str, Any]
    measures: Mapping[int, Mapping[str, Any]]
    """``measures`` of ``audit.json`` by seed."""

    def values(self, read: Callable[[Mapping[str, Any]], float], measure: str) -> list[float]:
        return [read(each[measure]) for each in self.measures.values() if measure in each]


def membership_rows(content: Mapping[str, Any]) -> list[str]:
    """Write one run's membership inference as a Markdown table with bootstrap intervals.

    Args:
        content: The part ``membership`` of ``audit.json``.
    """
    lines = [
        "| model | measure | gap of the means | AUC | found at 1 % false alarms | at 0.1 % |",
        "|---|---|---|---|---|---|",
    ]
    for model in content["models"]:
        for measure, found in model["measures"].items():
            cells = [interval(found["gap"]), interval(found["auc"])]
            cells += [f"{interval(found['tpr'][rate], 100, 1)} %" for rate in ("0.01", "0.001")]
            lines.append("| " + " | ".join([model["name"], measure, *cells]) + " |")
    return lines


def comparison(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write Table 3 of many audits as Markdown: mean ± standard deviation over the seeds of each method.

    Args:
        results: ``audit.json`` of each run; those whose members could not be attacked are left out.

    Returns:
        Lines: the gaps, the areas under the curve, the true-positive rates, and for each method whether its gaps are
        smaller than those of FedAvg on the same data; empty if there is nothing to compare.
    """
    groups = _groups(results)
    if not groups:
        return []
    seeds = max(len(group.measures) for group in groups)
    lines = [
        "# Membership inference",
        "",
        "Absolute difference of the means over members and non-members (FGL, Table 3); small is private. "
        + (
            f"Mean ± standard deviation of {seeds} seeds, in brackets the 95 % interval of the mean by Student's t."
            if seeds > 1
            else "One seed."
        ),
        "",
        *_table(groups, lambda found: float(found["gap"]["value"]), tuple(SIGNS), 3),
        "",
        "Area under the ROC curve of a threshold on each measure; 0.5 is guessing.",
        "",
        *_table(groups, lambda found: float(found["auc"]["value"]), _measures(groups), 3),
        "",
    ]
    for rate in ("0.01", "0.001"):
        lines += [
            f"Members found at {100 * float(rate):g} % false alarms, %; guessing finds {100 * float(rate):g} %.",
            "",
            *_table(groups, functools.partial(_percent_found, rate), _measures(groups), 1),
            "",
        ]
    return lines + _verdicts(groups)


def _percent_found(rate: str, found: Mapping[str, Any]) -> float:
    return 100 * float(found["tpr"][rate]["value"])


def _groups(results: Sequence[Mapping[str, Any]]) -> list[_Group]:
    measures: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    settings: dict[tuple[str, ...], tuple[str, str, dict[str, Any]]] = {}
    for result in results:
        flat, models = result["run"]["run_config"], result["membership"].get("models", [])
        for model in models:
            name = model_name(flat, model["round"], max(each["round"] for each in models))
            ignored = _IGNORED | (_AFTER_ONE_SHOT if name.endswith("one-shot") else set())
            kept = {key: value for key, value in flat.items() if key not in ignored}
            if kept["initial-weights"] not in ("random", "imagenet"):
                kept["initial-weights"] = "checkpoint"  # a file of its own for each seed
            key = (data_name(flat), name, *map(str, kept.values()))
            settings[key] = (data_name(flat), name, kept)
            measures[key].setdefault(int(result["run"]["seed"]), model["measures"])
    groups = [_Group(*settings[key], dict(sorted(of_seed.items()))) for key, of_seed in measures.items()]
    return sorted((_distinguished(group, groups) for group in groups), key=lambda group: group.data)


def _distinguished(group: _Group, groups: Sequence[_Group]) -> _Group:
    """Name the settings in which a group differs from others of the same name."""
    namesakes = [each for each in groups if (each.data, each.name) == (group.data, group.name)]
    differing = [
        f"{key} = {value}"
        for key, value in group.settings.items()
        if any(each.settings.get(key) != value for each in namesakes)
    ]
    name = f"{group.name} ({', '.join(differing)})" if differing else group.name
    return _Group(group.data, name, group.settings, group.measures)


def _measures(groups: Sequence[_Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for each in group.measures.values() for name in each))


def _table(
    groups: Sequence[_Group], read: Callable[[Mapping[str, Any]], float], measures: Sequence[str], digits: int
) -> list[str]:
    lines = [f"| data | method | {' | '.join(measures)} |", "|---" * (len(measures) + 2) + "|"]
    for group in groups:
        cells = [_mean(group.values(read, measure), digits) for measure in measures]
        lines.append("| " + " | ".join([group.data, group.name, *cells]) + " |")
    return lines


def _mean(values: Sequence[float], digits: int) -> str:
    """Mean, standard deviation and Student's interval of the mean; nothing that is shown can be negative."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    deviation = statistics.stdev(values)
    half = float(student.ppf((1 + _LEVEL) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} [{max(0.0, mean - half):.{digits}f}, {mean + half:.{digits}f}]"


def _verdicts(groups: Sequence[_Group]) -> list[str]:
    """Compare each method that draws images with FedAvg on the same data, measure by measure."""

    def gap(found: Mapping[str, Any]) -> float:
        return float(found["gap"]["value"])

    lines = []
    for baseline in groups:
        if not baseline.name.startswith("FedAvg"):
            continue
        for group in groups:
            if group.data != baseline.data or not group.name.startswith(("FGL", "GPT-FL")):
                continue
            smaller = [
                measure
                for measure in SIGNS
                if statistics.fmean(group.values(gap, measure)) < statistics.fmean(baseline.values(gap, measure))
            ]
            larger = [measure for measure in SIGNS if measure not in smaller]
            exceptions = f"; not on {', '.join(larger)}" if larger else ""
            lines.append(
                f"- {group.data}: the mean gaps of {group.name} are below those of {baseline.name} on {len(smaller)} "
                f"of {len(SIGNS)} measures{exceptions}."
            )
    return [*lines, ""] if lines else []
