"""Plans as a run makes them, so that a benchmark measures the profiles that users get."""

from __future__ import annotations

from pathlib import Path

from fgl_app.config import default_run_config, parse_run_config
from fgl_app.phases import draw_plan
from fgl_app.prompts import MergedPrompts, PromptCount
from fgl_app.settings import RunConfigValue
from fgl_app.synthesis.plan import Plan


def plan_of(images_per_class: int, overrides: dict[str, RunConfigValue], num_classes: int | None = None) -> Plan:
    """Return the plan of a run with one prompt per class of its card, or the first few, and these settings."""
    settings = parse_run_config(default_run_config() | {"images-per-class": images_per_class} | overrides)
    template = settings.prompt_form().class_templates[0]
    prompts = [
        PromptCount(label, template.replace("{class}", item.prompt), 1)
        for label, item in enumerate(settings.card.classes[:num_classes])
    ]
    return draw_plan(settings, MergedPrompts(tuple(prompts), settings.card.class_names()), Path())
