"""What each part of an audit hands over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Check:
    """The result of one part of an audit."""

    findings: Sequence[str]
    """Plain sentences, one for each finding; no prompt's text is in them."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """Its numbers, for ``audit.json``; may hold prompts."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """By file name without ending."""
