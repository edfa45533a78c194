"""What each part of an audit hands over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from fgl_app.privacy.gap_intervals import Scored


@dataclass(frozen=True)
class Check:
    """The result of one part of an audit."""

    findings: Sequence[str]
    """Plain sentences, one for each finding; no prompt's text is in them."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """Its numbers, for ``audit.json``; may hold prompts."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """By file name without ending."""
    scores: Mapping[int, Mapping[str, Scored]] = field(default_factory=dict)
    """Scores of single images by round and measure, which tables of several runs need; they are not written."""


@dataclass(frozen=True)
class AuditedRun:
    """One run's audit."""

    content: Mapping[str, Any]
    """What ``audit.json`` holds."""
    scores: Mapping[int, Mapping[str, Scored]]
    """See :attr:`Check.scores`; empty if its members could not be attacked."""
