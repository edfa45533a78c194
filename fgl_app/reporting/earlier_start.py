"""What an earlier start of a run left, read within a moment: no library of the method is imported for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgl_app.config import default_run_config
from fgl_app.errors import RunFolderError
from fgl_app.files import checkpoint_file
from fgl_app.settings import Settings

# A run may go on with other values of these: they change where, how fast or how long it runs, not what it computes.
# Only the kind of device, and the batch size on a GPU, stay what they were once images are drawn: they decide rounding.
FREE_KEYS = {
    "output-dir", "store-dir", "trackers", "num-server-rounds", "device", "synthesis-device",
    "synthesis-batch-size", "synthesis-workers", "ray-address", "synthesis-wait-s", "captioning-batch-size", "data-dir",
    "min-clients", "connect-timeout-s", "prompt-deadline-s", "round-deadline-s",
}  # fmt: skip

DIVISION = "the run's seed"
"""What the private images are divided by, kept in ``config.json``: a run that an earlier version divided by the card
alone must not go on with another division, which would train on its test images."""


def run_path(settings: Settings) -> Path:
    """Return the folder of a run."""
    return Path(settings.run.output_dir).expanduser() / settings.run.run_name


def earlier_config(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the run configuration of an earlier start and what it came to, or None if there was none.

    Raises:
        RunFolderError: If they were other settings, with which this run cannot go on, or the file is damaged.
    """
    file = run_path(settings) / "config.json"
    if not file.exists():
        return None
    try:
        written: dict[str, Any] = json.loads(file.read_text("utf-8"))
        # A key that is newer than the run had the effect of its default.
        earlier, resolved = default_run_config() | written["run_config"], dict(written["resolved"])
    except (ValueError, KeyError, TypeError):
        raise RunFolderError(
            f"{str(file)!r} must be a run's configuration, but is damaged. Use another `run-name`."
        ) from None
    for key, value in settings.flat().items():
        if key not in FREE_KEYS and earlier.get(key) != value:
            raise RunFolderError(
                f"`run-name` {settings.run.run_name} must be resumed with the settings it began with, but `{key}` was "
                f"{earlier.get(key)!r} and is {value!r} now. Use another `run-name`."
            )
    return earlier, resolved


def refuse_other_content(settings: Settings, key: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a RunFolderError if what a key names by its content is another than it was."""
    if was.get(key) != now.get(key):
        raise RunFolderError(
            f"`run-name` {settings.run.run_name} must be resumed with the {key} it began with, but its content has "
            "changed since. Use another `run-name`."
        )


def is_other_listing(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two starts found other image files; a run of a version that did not say so passes."""
    return "listing" in was and was["listing"] != now.get("listing")


def say_if_finished(settings: Settings) -> str | None:
    """Return a sentence if an earlier start has finished this run, and None if something is left to do.

    Raises:
        RunFolderError: If the folder belongs to a run with other settings or another card, or its configuration is
            damaged.
    """
    if (found := earlier_config(settings)) is None:
        return None
    refuse_other_content(settings, "card", found[1], {"card": settings.card.digest()})
    path, rounds = run_path(settings), settings.run.num_server_rounds
    try:
        results: dict[str, Any] = json.loads((path / "results.json").read_text("utf-8"))
        done, accuracy = len(results["rounds"]), float(results["final_accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if done != rounds or not checkpoint_file(path, rounds).exists():
        return None
    goes_on = settings.own_folders or found[1].get("division") == DIVISION
    more = ", or a larger num-server-rounds to go on" if goes_on else ""
    return (
        f"run {settings.run.run_name} is finished: accuracy {accuracy:.4f} after {rounds} rounds; results: "
        f"{path / 'results.json'}. Use another run-name for another run{more}."
    )


def require_finished(folder: Path) -> None:
    """Check that a folder holds a finished run, before the libraries are imported that read it.

    Raises:
        RunFolderError: If it does not.
    """
    for name in ("config.json", "results.json"):
        if not (folder.expanduser() / name).is_file():
            raise RunFolderError(
                f"{str(folder)!r} must be the folder of a finished run, but holds no {name}. Use OUTPUT-DIR/RUN-NAME "
                "of a run that has ended."
            )
