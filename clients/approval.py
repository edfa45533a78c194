"""The owner's approval: prompts wait on the client until the owner has read and approved them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from fgl_app.errors import ApprovalError
from fgl_app.files import cache_folder, canonical_json, sha256, write_atomically, write_json
from fgl_app.prompts import PromptCount

_POLL_S = 1.0
_APPROVED, _REJECTED = ".approved", ".rejected"


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
) -> None:
    """Write what would be sent into a preview, and wait until its owner approves exactly that.

    What was approved once is not asked for again in the same run. The run is then one in which the node takes part;
    see :func:`check_approved`.

    Args:
        prompts: What would be sent.
        class_names: Names of the classes that the prompts' labels count.
        run_name: Tells the owner what it is for.
        terms: Hash of the run's settings: an approval does not hold for a run of this name with others.
        folder: Of the previews.
        timeout_s: Seconds to wait.

    Raises:
        ApprovalError: If the owner rejects it, or does nothing in time.
    """
    rows = [[class_names[item.label], item.count, item.prompt, item.domain] for item in prompts]
    preview = folder / f"{sha256(canonical_json([run_name, terms, rows]))[:16]}.json"
    write_json(preview, {"run": run_name, "prompts": rows}, mode=0o600)
    end = time.monotonic() + timeout_s
    while not preview.with_suffix(_APPROVED).exists():
        if preview.with_suffix(_REJECTED).exists():
            raise ApprovalError(f"The owner rejected the prompts in {str(preview)!r}.")
        if time.monotonic() > end:
            raise ApprovalError(
                f"Prompts must be approved before they are sent, but nobody did within {timeout_s:g} s. Read them in "
                f"{str(preview)!r}, then `fgl approve {preview.stem}` on this node."
            )
        time.sleep(_POLL_S)
    write_atomically(_mark_of_run(run_name, terms, folder), preview.stem.encode(), mode=0o600)


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


def read_preview(name: str, folder: Path) -> tuple[str, list[tuple[str, int, str]]]:
    """Return the run that a preview is for, and its rows of class, count and prompt.

    Raises:
        ApprovalError: If there is none of this name.
    """
    path = folder / f"{name}.json"
    if not name.isalnum() or not path.exists():
        waiting = ", ".join(pending(folder)) or "nothing waits for approval"
        raise ApprovalError(f"There must be a preview of this name, but {name!r} is none. Use one of these: {waiting}.")
    content = json.loads(path.read_text("utf-8"))
    return str(content["run"]), [(str(row[0]), int(row[1]), str(row[2])) for row in content["prompts"]]


def decide(name: str, folder: Path, *, approve: bool) -> None:
    """Approve or reject a preview; a later decision takes the place of an earlier one.

    Raises:
        ApprovalError: If there is none of this name.
    """
    read_preview(name, folder)
    marks = {True: _APPROVED, False: _REJECTED}
    (folder / f"{name}{marks[not approve]}").unlink(missing_ok=True)
    (folder / f"{name}{marks[approve]}").touch(mode=0o600)
