"""Prompts: writing them from labels and captions, merging them over clients, spreading the image budget."""

from fgl_app.prompts.aggregation import MergedPrompts, PromptBudget, merge_prompts, spread_budget
from fgl_app.prompts.writing import (
    MAX_PROMPT_CHARS,
    PromptCount,
    class_prompts,
    fill,
    instance_prompts,
    is_printable,
    printable,
)

__all__ = [
    "MAX_PROMPT_CHARS",
    "MergedPrompts",
    "PromptBudget",
    "PromptCount",
    "class_prompts",
    "fill",
    "instance_prompts",
    "is_printable",
    "merge_prompts",
    "printable",
    "spread_budget",
]
