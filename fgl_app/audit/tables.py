"""Tables of audits: one run with its intervals, and many runs grouped by method over their seeds (FGL, Table 3)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fgl_app.audit.check import AuditedRun
from fgl_app.audit.labels import data_name, model_name
from fgl_app.intervals import Interval
from fgl_app.privacy.gap_intervals import Scored, Statistic, area, gap, over_images
from fgl_app.privacy.membership import FALSE_POSITIVE_RATES, SIGNS, guessing_rate
from fgl_app.reporting.audit_section import interval
from fgl_app.reporting.earlier_start import FREE_KEYS

_IGNORED = FREE_KEYS | {"seed", "run-name"}
"""What does not change a model, or differs between the runs of one method."""
# What no one-shot model has seen.
_AFTER_ONE_SHOT = {
    "local-epochs", "learning-rate", "server-finetune-epochs", "weighting", "strategy", "strategy-options",
    "fraction-train",
}  # fmt: skip
_OVER_IMAGES = (
    "in brackets a 95 % interval over images, of which one that several seeds share counts once; it takes the seeds as "
    "they are"
)


@dataclass(frozen=True)
class _Model:
    """One attacked model."""

    measures: Mapping[str, Any]
    """Of ``audit.json``."""
    scores: Mapping[str, Scored]
    one_shot: Mapping[str, Scored] | None
    """The same images under a one-shot model of the same seed, which has seen none of them; None without one."""


@dataclass(frozen=True)
class _Group:
    """Models of one method on the same data, one for each seed."""

    data: str
    name: str
    settings: Mapping[str, Any]
    models: Mapping[int, _Model]
    """By seed."""

    @property
    def is_one_shot(self) -> bool:
        return self.name.partition(" (")[0].endswith("one-shot")

    def scored(self, measure: str) -> list[Scored]:
        return [model.scores[measure] for model in self.models.values() if measure in model.scores]


def membership_rows(content: Mapping[str, Any]) -> list[str]:
    """Write one run's membership inference as a Markdown table with bootstrap intervals.

    Args:
        content: The part ``membership`` of ``audit.json``.
    """
    guessing = {rate: f"{100 * float(share):.2f} %" for rate, share in content["guessing"].items()}
    lines = [
        f"| model | measure | signed gap | minus one-shot's | AUC | found at 1 % false alarms (guessing: "
        f"{guessing['0.01']}) | at 0.1 % (guessing: {guessing['0.001']}) |",
        "|---" * 7 + "|",
    ]
    for model in content["models"]:
        for measure, found in model["measures"].items():
            above = found["gap_above_one_shot"]
            cells = [interval(found["gap"]), "—" if above is None else interval(above), interval(found["auc"])]
            cells += [f"{interval(found['tpr'][rate], 100, 1)} %" for rate in ("0.01", "0.001")]
            lines.append("| " + " | ".join([model["name"], measure, *cells]) + " |")
    return lines


def comparison(audits: Sequence[AuditedRun]) -> list[str]:
    """Write Table 3 of many audits as Markdown, each method over its seeds.

    Args:
        audits: Audits of runs; those whose members could not be attacked are left out.

    Returns:
        Lines: the signed gaps minus those of one-shot, the papers' absolute gaps, the areas under the curve, the
        true-positive rates beside those of guessing, and on which measures a method gives away less than FedAvg;
        empty if there is nothing to compare.
    """
    groups = _groups(audits)
    if not groups:
        return []
    seeds = max(len(group.models) for group in groups)
    mean = f"Mean ± standard deviation of {seeds} seeds, " if seeds > 1 else "One seed; "
    every = tuple(dict.fromkeys(name for group in groups for model in group.models.values() for name in model.scores))
    lines = [
        "# Membership inference",
        "",
        "## Signed gaps, minus one-shot's",
        "",
        "Difference of the means over members and others, positive where members look trained on (lower entropy, loss "
        "and modified entropy, higher confidence), minus that of the one-shot model of the same seed on the same "
        "images. One-shot has seen neither side: its rows show its own gap, which is a difference between the two sets "
        f"and no leak. {mean}{_OVER_IMAGES}.",
        "",
        *_table(groups, tuple(SIGNS), _above_one_shot),
        "",
        "## Absolute gaps, as the paper reports them",
        "",
        f"Absolute difference of the means (FGL, Table 3). {mean}without an interval: it is above zero "
        "without any leak.",
        "",
        *_table(groups, tuple(SIGNS), _absolute_gap),
        "",
        "## Areas under the ROC curve",
        "",
        f"Of a threshold on each measure; 0.5 is guessing. {mean}{_OVER_IMAGES}.",
        "",
        *_table(groups, every, lambda group, measure: _estimated(group.scored(measure), None, area)),
        "",
    ]
    for rate in FALSE_POSITIVE_RATES:
        lines += [
            f"## Members found at {100 * rate:g} % false alarms, %",
            "",
            f"{mean}without an interval. Guessing finds (k + 1) / (M + 1) of the members, where k false alarms are "
            "allowed among M others.",
            "",
            *_table(groups, every, _found(rate), ("guessing", _guessed(rate))),
            "",
        ]
    return lines + _verdicts(groups)


def _above_one_shot(group: _Group, measure: str) -> str:
    if group.is_one_shot:
        return _estimated(group.scored(measure), None, gap)
    pairs = [(model.scores[measure], model.one_shot[measure]) for model in group.models.values() if model.one_shot]
    if len(pairs) < len(group.models):
        return f"{_estimated(group.scored(measure), None, gap)}, not subtracted"
    return _estimated([first for first, _ in pairs], [second for _, second in pairs], gap)


def _estimated(
    models: Sequence[Scored],
    references: Sequence[Scored] | None,
    statistic: Statistic,
) -> str:
    """Write mean, standard deviation over seeds and interval over images of a statistic, or of its differences."""
    if not models:
        return ""
    found = over_images(models, references, statistic)
    single = [
        over_images([model], None if references is None else [references[index]], statistic).value
        for index, model in enumerate(models)
    ]
    spread = f" ± {statistics.stdev(single):.3f}" if len(single) > 1 else ""
    return f"{found.value:.3f}{spread} [{found.low:.3f}, {found.high:.3f}]"


def _absolute_gap(group: _Group, measure: str) -> str:
    return _spread([abs(float(model.measures[measure]["gap"]["value"])) for model in group.models.values()], 3)


def _found(rate: float) -> Callable[[_Group, str], str]:
    def cell(group: _Group, measure: str) -> str:
        models = [model for model in group.models.values() if measure in model.measures]
        return _spread([100 * float(model.measures[measure]["tpr"][f"{rate:g}"]["value"]) for model in models], 1)

    return cell


def _guessed(rate: float) -> Callable[[_Group], str]:
    def cell(group: _Group) -> str:
        scored = [next(iter(model.scores.values())) for model in group.models.values()]
        shares = [guessing_rate(rate, len(each.ids) - each.num_members) for each in scored]
        return f"{100 * statistics.fmean(shares):.2f}"

    return cell


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _groups(audits: Sequence[AuditedRun]) -> list[_Group]:
    models: dict[tuple[str, ...], dict[int, _Model]] = defaultdict(dict)
    settings: dict[tuple[str, ...], tuple[str, str, dict[str, Any]]] = {}
    for audit in audits:
        flat, attacked = audit.content["run"]["run_config"], audit.content["membership"].get("models", [])
        for model in attacked:
            name = model_name(flat, model["round"], max(each["round"] for each in attacked))
            ignored = _IGNORED | (_AFTER_ONE_SHOT if name.endswith("one-shot") else set())
            kept = {key: value for key, value in flat.items() if key not in ignored}
            if kept["initial-weights"] not in ("random", "imagenet"):
                kept["initial-weights"] = "checkpoint"  # a file of its own for each seed
            key = (data_name(flat), name, *map(str, kept.values()))
            settings[key] = (data_name(flat), name, kept)
            scores = audit.scores[model["round"]]
            found = _Model(model["measures"], scores, _one_shot(audit, audits))
            models[key].setdefault(int(audit.content["run"]["seed"]), found)
    groups = [_Group(*settings[key], dict(sorted(of_seed.items()))) for key, of_seed in models.items()]
    return sorted((_distinguished(group, groups) for group in groups), key=lambda group: group.data)


def _one_shot(audit: AuditedRun, audits: Sequence[AuditedRun]) -> Mapping[str, Scored] | None:
    """Return the scores of the run's own one-shot model, or of another run's that was attacked on the same images."""
    (attacked, *_) = audit.scores.values()
    for other in (audit, *audits):
        flat, same_seed = (
            other.content["run"]["run_config"],
            other.content["run"]["seed"] == audit.content["run"]["seed"],
        )
        untouched = flat["method"] in ("fgl", "gpt-fl") and flat["initial-weights"] in ("random", "imagenet")
        if untouched and same_seed and 1 in other.scores and _same_images(other.scores[1], attacked):
            return other.scores[1]
    return None


def _same_images(first: Mapping[str, Scored], second: Mapping[str, Scored]) -> bool:
    one, other = first["loss"], second["loss"]
    return one.num_members == other.num_members and np.array_equal(one.ids, other.ids)


def _distinguished(group: _Group, groups: Sequence[_Group]) -> _Group:
    """Name the settings in which a group differs from others of the same name."""
    namesakes = [each for each in groups if (each.data, each.name) == (group.data, group.name)]
    differing = [
        f"{key} = {value}"
        for key, value in group.settings.items()
        if any(each.settings.get(key) != value for each in namesakes)
    ]
    return replace(group, name=f"{group.name} ({', '.join(differing)})") if differing else group


def _table(
    groups: Sequence[_Group],
    measures: Sequence[str],
    cell: Callable[[_Group, str], str],
    first: tuple[str, Callable[[_Group], str]] | None = None,
) -> list[str]:
    more = [] if first is None else [first[0]]
    lines = [f"| {' | '.join(['data', 'method', *more, *measures])} |", "|---" * (len(measures) + len(more) + 2) + "|"]
    for group in groups:
        cells = [] if first is None else [first[1](group)]
        cells += [cell(group, measure) for measure in measures]
        lines.append("| " + " | ".join([group.data, group.name, *cells]) + " |")
    return lines


def _verdicts(groups: Sequence[_Group]) -> list[str]:
    """Compare each method that draws images with FedAvg of the same seeds and data, measure by measure."""
    lines = []
    for baseline in groups:
        if not baseline.name.startswith("FedAvg"):
            continue
        for group in groups:
            if group.data != baseline.data or not group.name.startswith(("FGL", "GPT-FL")) or group.is_one_shot:
                continue
            seeds = [
                seed
                for seed, model in group.models.items()
                if seed in baseline.models and _same_images(model.scores, baseline.models[seed].scores)
            ]
            if seeds:
                lines.append(_verdict(group, baseline, seeds))
    if not lines:
        return []
    about = (
        "Signed gaps of the same seeds and images, minus FedAvg's, with an interval as above; what one-shot's gap is "
        "cancels. FedAvg with as many rounds on real images is the fair one to compare with."
    )
    return ["## Against FedAvg", "", about, "", *lines, ""]


def _verdict(group: _Group, baseline: _Group, seeds: Sequence[int]) -> str:
    parts: dict[str, list[str]] = {"smaller": [], "larger": [], "not told apart": []}
    for measure in SIGNS:
        models, references = ([each.models[seed].scores[measure] for seed in seeds] for each in (group, baseline))
        found: Interval = over_images(models, references, gap)
        said = f"{measure} ({found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}])"
        parts["smaller" if found.high < 0 else "larger" if found.low > 0 else "not told apart"].append(said)
    return (
        f"- {group.data}: {group.name} against {baseline.name}: "
        + "; ".join(f"{word} on {', '.join(found)}" for word, found in parts.items() if found)
        + "."
    )
