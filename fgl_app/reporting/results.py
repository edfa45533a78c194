"""``results.json``: the numbers of one run, from the metrics of its rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fgl_app.data.images import HeldOut
from fgl_app.reporting.defences import defences_statement
from fgl_app.reporting.guarantees import privacy_statement
from fgl_app.settings import Settings
from fgl_app.synthesis.launch import SynthesisReport


def summarize(
    settings: Settings,
    rounds: Sequence[Mapping[str, Any]],
    *,
    releases: Sequence[Mapping[str, Any]],
    prompt_round: Mapping[str, Any] | None,
    synthesis: SynthesisReport | None,
    seconds: Mapping[str, float],
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Build the content of ``results.json``.

    ``final_accuracy`` is the test accuracy after the last round, ``selected_accuracy`` that of the round with the best
    validation accuracy (the earliest of equals), and ``paper_metric`` the best test accuracy of all rounds, which the
    papers report although it selects on the test set.

    Args:
        settings: The run's settings.
        rounds: Metrics of each round, at least one, with ``round``, ``phase``, ``accuracy``, ``loss``,
            ``validation_accuracy``, ``model_upload_bytes`` and ``upload_bytes``.
        releases: What left the clients: rows of :class:`fgl_app.reporting.ledger.ReleaseLedger`.
        prompt_round: What is known of the exchange of prompts, and under ``upload`` the bytes of the largest client's
            prompts, ``payload`` and whole ``message``, and of ``all_messages``, and under ``defences`` what those did;
            None if no client was asked.
        synthesis: What the synthesis phase did; None if this start needed none.
        seconds: Wall-clock seconds of each phase; see :func:`with_earlier_starts`.
        held_out: The common validation and test images; None where every client tests on images of its own.
    """
    selected = max(rounds, key=lambda row: (row["validation_accuracy"], -row["round"]))
    model_bytes = [row["model_upload_bytes"] for row in rounds if row["model_upload_bytes"]]
    partitioned = not settings.own_folders
    dirichlet = partitioned and settings.data.partition == "dirichlet"
    return {
        "method": settings.run.method,
        "strategy": None if settings.run.method == "centralized" else settings.training.strategy,
        "dataset": settings.data.dataset,
        "partition": settings.data.partition if partitioned else None,
        "dirichlet_beta": settings.data.dirichlet_beta if dirichlet else None,
        "seed": settings.run.seed,
        "num_clients": settings.run.num_clients,
        "num_validation_images": None if held_out is None else len(held_out.validation),
        "num_test_images": None if held_out is None else len(held_out.test),
        "num_unreadable_held_out_images": None if held_out is None else held_out.num_unreadable,
        "rounds": [dict(row) for row in rounds],
        "final_accuracy": rounds[-1]["accuracy"],
        "selected_accuracy": selected["accuracy"],
        "selected_round": selected["round"],
        "one_shot_accuracy": rounds[0]["accuracy"] if settings.synthesizes else None,
        "paper_metric": max(row["accuracy"] for row in rounds),
        "upload_bytes": {
            "prompts_per_client": prompt_round["upload"] if prompt_round is not None else None,
            "model_per_client_per_round": round(sum(model_bytes) / len(model_bytes)) if model_bytes else None,
            "total": sum(row["upload_bytes"] for row in rounds),
        },
        "prompt_round": None
        if prompt_round is None
        else {key: value for key, value in prompt_round.items() if key not in ("upload", "defences")},
        "privacy": _privacy(privacy_statement(settings, releases), defences_statement(settings, prompt_round)),
        "synthesis": None
        if synthesis is None
        else {
            "images": synthesis.images,
            "generated": synthesis.generated,
            "reused": synthesis.reused,
            "left_out": dict(synthesis.left_out),
            "rejection_rates": {group: round(rate, 6) for group, rate in synthesis.rejection_rates.items()},
            "seconds": round(synthesis.seconds, 3),
            "reused_seconds": round(synthesis.reused_seconds, 3),
            "images_per_second": round(synthesis.images_per_second, 3),
            "batch_sizes": list(synthesis.batch_sizes),
            "content_hash": synthesis.content_hash,
        },
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
    }


def _privacy(mechanisms: dict[str, Any] | None, defences: dict[str, Any] | None) -> dict[str, Any] | None:
    """Put the guarantees and the other defences of a run together; None if it had neither."""
    if mechanisms is None and defences is None:
        return None
    return {**(mechanisms or {"mechanisms": [], "total": []}), "defences": defences}


_OF_THE_DRAWING = ("generated", "reused", "seconds", "reused_seconds", "images_per_second")


def with_earlier_starts(found: dict[str, Any], earlier: Mapping[str, Any], *, worked: bool) -> dict[str, Any]:
    """Add what ``results.json`` told of the time of earlier starts, which a new start would overwrite.

    The seconds of the phases are added up over all starts that ended with results. What an interrupted start spent on a
    phase is not among them; the rounds that it finished have seconds of their own.

    Args:
        found: Of this start, as :func:`summarize` builds it.
        earlier: The content of ``results.json`` before this start; empty if there was none.
        worked: Whether this start did any round. One that found all rounds finished changes no number.
    """
    before: Mapping[str, float] = earlier.get("seconds") or {}
    drawn: dict[str, Any] | None = found["synthesis"]
    drawn_before: Mapping[str, Any] = earlier.get("synthesis") or {}
    if before and not worked:
        found["seconds"] = dict(before)
    else:
        now = found["seconds"]
        found["seconds"] = {phase: round(now.get(phase, 0) + before.get(phase, 0), 3) for phase in {**before, **now}}
    if drawn and not drawn["generated"] and drawn["content_hash"] == drawn_before.get("content_hash"):
        # How long they took is known from the start that drew them.
        found["synthesis"] = drawn | {key: drawn_before[key] for key in _OF_THE_DRAWING}
    return found
