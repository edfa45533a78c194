"""Prompts: writing them from labels and captions, merging them over clients, spreading the image budget."""

from fgl_app.prompts.aggregation import PromptBudget, merge_prompts, spread_budget
from fgl_app.prompts.writing import PromptCount, class_prompts, instance_prompts

__all__ = ["PromptBudget", "PromptCount", "class_prompts", "instance_prompts", "merge_prompts", "spread_budget"]
