"""The part of a run's page that shows what ``fgl audit`` left in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgl_app.reporting.page import Picture, Section, Table

HEADING = "What the run gives away"
_PARTS = ("membership", "replication", "prompts")
_FIGURES = {
    "roc": ("ROC curves on logarithmic axes", "Members that an attack finds against its false alarms."),
    "distributions": (
        "Histograms of four measures",
        "Entropy, loss, confidence and modified entropy of the clients' training images and of test images.",
    ),
    "similarity": (
        "Histograms of similarities",
        "Similarity of synthetic, and of held-out real, images to the nearest training image. The nearest pairs are "
        "in audit/pairs.png, because they show private images.",
    ),
    "noise": ("Words found against noise", "Words that can be read out of embeddings under Gaussian noise."),
}
_SHOWN_EXAMPLES = 50


def audit_sections(folder: Path, class_names: tuple[str, ...]) -> list[Section]:
    """Return the section of a run's audit; none if it was not audited.

    Args:
        folder: The run's folder.
        class_names: Names of the run's classes, by label.
    """
    try:
        audit = json.loads((folder / "audit" / "audit.json").read_text("utf-8"))
        text = [sentence for part in _PARTS for sentence in audit[part]["findings"]]
        tables = [*_membership(audit["membership"]), *_leaks(audit["prompts"], class_names)]
        pictures = [
            Picture.of_png((folder / "audit" / f"{name}.png").read_bytes(), alternative, caption)
            for name, (alternative, caption) in _FIGURES.items()
            if (folder / "audit" / f"{name}.png").exists()
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Section(HEADING, [f"audit/audit.json cannot be read ({type(error).__name__}). Audit the run again."])]
    return [Section(HEADING, text, pictures, tables)]


def _membership(part: Mapping[str, Any]) -> list[Table]:
    def row(model: Mapping[str, Any], measure: str, found: Mapping[str, Any]) -> list[str]:
        above = found["gap_above_one_shot"]
        gaps = [interval(found["gap"]), "—" if above is None else interval(above)]
        rates = [interval(found["tpr"][rate], 100, 1) for rate in ("0.01", "0.001")]
        return [model["name"], measure, *gaps, interval(found["auc"]), *rates]

    models = part.get("models", [])
    rows = [row(model, measure, found) for model in models for measure, found in model["measures"].items()]
    if not rows:
        return []
    guessing = {rate: f"{100 * float(share):.2f}" for rate, share in part["guessing"].items()}
    head = ["Model", "Measure", "Signed gap of the means", "Minus one-shot's", "AUC"]
    head += [f"Found at {label} false alarms, %" for label in ("1 %", "0.1 %")]
    caption = (
        "Membership inference; in brackets intervals of 95 %. A gap is positive where members look trained on; "
        f"one-shot has seen neither side. Guessing finds {guessing['0.01']} % and {guessing['0.001']} % of the members."
    )
    return [Table(caption, head, rows)]


def _leaks(part: Mapping[str, Any], class_names: tuple[str, ...]) -> list[Table]:
    found = [
        [
            kind,
            class_names[each["label"]] if each["label"] < len(class_names) else "",
            each["found"],
            each["prompt"] if each.get("certain", True) else f"{each['prompt']} (a guess)",
        ]
        for kind, examples in part.get("examples", {}).items()
        for each in examples
    ]
    if not found:
        return []
    caption = f"The first {_SHOWN_EXAMPLES} of {len(found):,}" if len(found) > _SHOWN_EXAMPLES else "All"
    caption += " pieces of prompts that may tell who or where somebody is."
    return [Table(caption, ["Looks like", "Class", "Text", "Prompt"], found[:_SHOWN_EXAMPLES], numbers=False)]


def interval(estimate: Mapping[str, float], scale: float = 1.0, digits: int = 3) -> str:
    """Write an estimate with its interval, each times ``scale``."""
    value, low, high = (scale * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
