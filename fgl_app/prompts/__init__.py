"""Prompts: writing them from labels and captions, merging them over clients, spreading the image budget."""

from fgl_app.prompts.aggregation import (
    MergedPrompts,
    PromptBudget,
    limit_shares,
    merge_prompts,
    require_senders,
    spread_budget,
)
from fgl_app.prompts.screening import NamedPrompt, PromptLimits, limits_of, read_blocked_words, screen_prompts
from fgl_app.prompts.writing import (
    MAX_PROMPT_CHARS,
    PromptCount,
    class_prompts,
    fill,
    instance_prompts,
    is_printable,
    printable,
    visible,
)

__all__ = [
    "MAX_PROMPT_CHARS",
    "MergedPrompts",
    "NamedPrompt",
    "PromptBudget",
    "PromptCount",
    "PromptLimits",
    "class_prompts",
    "fill",
    "instance_prompts",
    "is_printable",
    "limit_shares",
    "limits_of",
    "merge_prompts",
    "printable",
    "read_blocked_words",
    "require_senders",
    "screen_prompts",
    "spread_budget",
    "visible",
]
