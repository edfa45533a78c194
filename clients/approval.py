"""The owner's approval: prompts wait on the client until the owner has read and approved them."""

from __future__ import annotations

import getpass
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO
from pathlib import Path

from flwr.common.logger import log

from fgl_app.errors import ApprovalError
from fgl_app.files import cache_folder, canonical_json, read_json_lines, sha256, write_atomically, write_json
from fgl_app.prompts import PromptCount

_POLL_S = 1.0
_SAY_AGAIN_S = 3600.0
_APPROVED, _REJECTED = ".approved", ".rejected"
_DECISIONS = "decisions.jsonl"


@dataclass(frozen=True)
class Preview:
    """What waits for, or has had, its owner's decision."""

    name: str
    run: str
    """Name of the run that asks for the prompts."""
    asked: str
    """When the run last asked, local time."""
    until: str
    """When it stops waiting."""
    waits: bool
    """Whether that is still to come."""
    rounds: int
    """Rounds of the run in which the node would train and send its weights."""
    rows: Sequence[tuple[str, int, str]]
    """Class, images and prompt."""
    terms: str
    """Hash of the run's settings; empty in previews of older versions."""

    def summary(self) -> str:
        """Describe it in one line, without any prompt; its name comes first."""
        images = sum(count for _, count, _ in self.rows)
        waits = f"waits until {self.until}"
        if not self.waits:
            waits = f"stopped waiting at {self.until}; a yes holds for the next start of the run"
        return (
            f"{self.name}  run {self.run}, asked {self.asked}, {waits}: {len(self.rows):,} prompts of "
            f"{images:,} images, {self.rounds} rounds of training"
        )


def approvals_folder() -> Path:
    """Return the folder of this node's previews, which its owner alone can read."""
    folder = cache_folder() / "approvals"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def wait_for_approval(
    prompts: Sequence[PromptCount],
    class_names: Sequence[str],
    run_name: str,
    terms: str,
    folder: Path,
    timeout_s: float,
    num_rounds: int = 0,
) -> None:
    """Write what would be sent into a preview, say so in the log, and wait until its owner approves exactly that.

    What was approved once is not asked for again in the same run. The run is then one in which the node takes part;
    see :func:`check_approved`.

    Args:
        prompts: What would be sent.
        class_names: Names of the classes that the prompts' labels count.
        run_name: Tells the owner what it is for.
        terms: Hash of the run's settings: an approval does not hold for a run of this name with others.
        folder: Of the previews.
        timeout_s: Seconds to wait.
        num_rounds: Rounds in which the node will train and send its weights, which the approval covers, too.

    Raises:
        ApprovalError: If the owner rejects it, or does nothing in time.
    """
    rows = [[class_names[item.label], item.count, item.prompt, item.domain] for item in prompts]
    preview = folder / f"{sha256(canonical_json([run_name, terms, rows]))[:16]}.json"
    now, mark = time.time(), _mark_of_run(run_name, terms, folder)
    asked, until = _local_time(now), _local_time(now + timeout_s)
    content = {
        "run": run_name, "terms": terms, "asked": asked, "until": until, "until_s": now + timeout_s,
        "rounds": num_rounds, "prompts": rows,
    }  # fmt: skip
    write_json(preview, content, mode=0o600)
    end, say_at = time.monotonic() + timeout_s, time.monotonic()
    while not preview.with_suffix(_APPROVED).exists():
        if preview.with_suffix(_REJECTED).exists():
            mark.unlink(missing_ok=True)  # what else the owner approved of this run
            raise ApprovalError(f"The owner rejected the prompts in {str(preview)!r}.")
        if time.monotonic() > end:
            raise ApprovalError(
                f"Prompts must be approved before they are sent, but nobody did within {timeout_s:g} s. Read them in "
                f"{str(preview)!r}, then `fgl approve {preview.stem}` on this node."
            )
        if time.monotonic() >= say_at:
            log(
                INFO,
                "waiting for approval: run %s, %s prompts, until %s; read and decide with `fgl approve %s`",
                run_name,
                len(rows),
                until,
                preview.stem,
            )
            say_at += _SAY_AGAIN_S
        time.sleep(_POLL_S)
    write_atomically(mark, preview.stem.encode(), mode=0o600)


def check_approved(run_name: str, terms: str, folder: Path) -> None:
    """Check that the owner approved this run's prompts, before anything else is computed for it.

    Raises:
        ApprovalError: If it has sent none that its owner approved, or the owner has rejected them since.
    """
    mark = _mark_of_run(run_name, terms, folder)
    if not mark.exists() or not (folder / f"{mark.read_text('utf-8')}{_APPROVED}").exists():
        raise ApprovalError(
            f"This node takes part only in runs whose prompts its owner approved, but no prompts for {run_name!r} "
            "with these settings were."
        )


def _mark_of_run(run_name: str, terms: str, folder: Path) -> Path:
    return folder / f"{sha256(canonical_json([run_name, terms]))[:16]}.run"


def pending(folder: Path) -> list[str]:
    """Return the names of the previews that wait for a decision."""
    return sorted(
        path.stem
        for path in folder.glob("*.json")
        if not path.with_suffix(_APPROVED).exists() and not path.with_suffix(_REJECTED).exists()
    )


def read_preview(name: str, folder: Path) -> Preview:
    """Read a preview by its name.

    Raises:
        ApprovalError: If there is none of this name.
    """
    path = folder / f"{name}.json"
    if not name.isalnum() or not path.exists():
        waiting = ", ".join(pending(folder)) or "nothing waits for approval"
        raise ApprovalError(f"There must be a preview of this name, but {name!r} is none. Use one of these: {waiting}.")
    content = json.loads(path.read_text("utf-8"))
    rows = [(str(row[0]), int(row[1]), str(row[2])) for row in content["prompts"]]
    asked, until = (str(content.get(key, "an unknown time")) for key in ("asked", "until"))  # of older versions
    waits = time.time() < float(content.get("until_s", math.inf))
    num_rounds, terms = int(content.get("rounds", 0)), str(content.get("terms", ""))
    return Preview(name, str(content["run"]), asked, until, waits, num_rounds, rows, terms)


def decide(name: str, folder: Path, *, approve: bool) -> None:
    """Approve or reject a preview; a later decision takes the place of an earlier one, and both stay in the log.

    It decides whether the node takes part in the run, too, even where another preview of the run was approved before.

    Raises:
        ApprovalError: If there is none of this name.
    """
    preview = read_preview(name, folder)
    row = {
        "date": _local_time(time.time()), "user": _user(), "run": preview.run, "preview": name,
        "decision": "approved" if approve else "rejected", "prompts": len(preview.rows), "rounds": preview.rounds,
    }  # fmt: skip
    # Before the decision has its effect: nothing leaves the node that the log does not know of.
    with os.fdopen(os.open(folder / _DECISIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    marks = {True: _APPROVED, False: _REJECTED}
    (folder / f"{name}{marks[not approve]}").unlink(missing_ok=True)
    (folder / f"{name}{marks[approve]}").touch(mode=0o600)
    mark = _mark_of_run(preview.run, preview.terms, folder)
    if not approve:
        mark.unlink(missing_ok=True)
    elif preview.terms:
        write_atomically(mark, name.encode(), mode=0o600)


def decisions(folder: Path) -> list[str]:
    """Return all decisions that were made on this node, the first one first, one line each."""
    return [
        f"{row['date']}  {row['decision']} by {row['user']}: preview {row['preview']} of run {row['run']}, "
        f"{row['prompts']:,} prompts, {row['rounds']} rounds of training"
        for row in read_json_lines(folder / _DECISIONS)
    ]


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds)).strip()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"user {os.getuid()}"
