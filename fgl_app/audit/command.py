"""Audit finished runs and write what was found into their folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fgl_app.audit.check import AuditedRun, Check
from fgl_app.audit.labels import data_name, model_name
from fgl_app.audit.material import Material, open_material
from fgl_app.audit.membership_check import check_membership
from fgl_app.audit.prompt_check import check_captions, check_prompts
from fgl_app.audit.replication_check import check_replication
from fgl_app.audit.shadow import check_number
from fgl_app.audit.tables import membership_rows
from fgl_app.errors import ConfigError, DataError, FGLError, ModelError, RunFolderError, SynthesisError
from fgl_app.files import write_atomically, write_json
from fgl_app.reporting.figures import to_png

HEADINGS = {
    "membership": "Membership inference",
    "replication": "Replication of private images",
    "prompts": "What the prompts say",
}


def audit_run(
    path: Path, *, data_dir: Path | None, data_paths: Sequence[Path], backbone: str, shadow_models: int
) -> AuditedRun:
    """Audit one run and write ``audit/`` in its folder, readable by its owner alone.

    A part that cannot be done, because images, models or packages are not on this machine, is replaced by a sentence
    that says why.

    Args:
        path: Folder of a finished run.
        data_dir: Where the card's data lie; None for where the run found them.
        data_paths: Folders of the clients, for a run on folders of their own.
        backbone: Features of the search for replicas.
        shadow_models: Shadow models of the likelihood-ratio attack; 0 for none.

    Returns:
        The content of ``audit.json``, and the scores of single images.

    Raises:
        RunFolderError: If the folder holds no finished run, or cannot be written.
        ConfigError: If an option is wrong, or this version does not understand the run's settings.
    """
    material = open_material(path, data_dir, data_paths)
    checks = {
        "membership": _done(lambda: check_membership(material, shadow_models)),
        "replication": _done(lambda: check_replication(material, backbone))
        if material.settings.synthesizes
        else Check(["The run drew no images."]),
        "prompts": _done(lambda: check_prompts(material), ConfigError),  # the extra may be absent
    }
    result = {"run": _identity(material)} | {
        name: {"findings": list(check.findings), **check.content} for name, check in checks.items()
    }
    _write(material.run.path / "audit", f"Audit of run {material.run.path.resolve().name}", result, checks)
    return AuditedRun(result, checks["membership"].scores)


def check_runs(paths: Sequence[Path], shadow_models: int) -> None:
    """Check runs and options before the first run is audited, which may take minutes each.

    Raises:
        RunFolderError: If a folder holds no finished run.
        ConfigError: If the number of shadow models is wrong, or this version does not understand a run's settings.
    """
    check_number(shadow_models)
    for path in paths:
        open_material(path, None, ())


def audit_captions(file: Path, target: Path) -> list[str]:
    """Audit one client's captions or prompts at its side; returns the findings, without any text of a caption.

    Args:
        file: See :func:`fgl_app.audit.prompt_check.check_captions`.
        target: Folder for ``audit.json`` and ``audit.md``.

    Raises:
        RunFolderError: If the file cannot be read, or the folder not be written.
        ConfigError: If the extra ``audit`` is not installed.
    """
    check = check_captions(file)
    result = {"prompts": {"findings": list(check.findings), **check.content}}
    _write(target, f"Audit of {file.name}", result, {"prompts": check})
    return list(check.findings)


def findings_of(result: Mapping[str, Any]) -> list[str]:
    """Return all sentences of an audit, in the order of its parts."""
    return [sentence for name in HEADINGS if name in result for sentence in result[name]["findings"]]


def _done(check: Callable[[], Check], *excused: type[FGLError]) -> Check:
    try:
        return check()
    except FGLError as error:
        if not isinstance(error, (DataError, ModelError, SynthesisError, RunFolderError, *excused)):
            raise
        return Check([f"This part could not be done. {error}"])


def _identity(material: Material) -> dict[str, Any]:
    flat = material.run.config["run_config"]
    return {
        "name": material.run.path.resolve().name,
        "seed": material.settings.run.seed,
        "data": data_name(flat),
        "model": model_name(flat, material.last_round, material.last_round),
        "run_config": dict(flat),
    }


def _write(folder: Path, title: str, result: dict[str, Any], checks: dict[str, Check]) -> None:
    """Write JSON, Markdown and figures; all for the owner alone: they hold prompts and private images."""
    lines = [f"# {title}", ""]
    for name, check in checks.items():
        lines += [f"## {HEADINGS[name]}", "", *(f"- {sentence}" for sentence in check.findings), ""]
        if name == "membership" and check.content:
            lines += [*membership_rows(check.content), ""]
        lines += [f"![{each}]({each}.png)" for each in check.figures]
        lines += [""] if check.figures else []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for check in checks.values():
            for name, figure in check.figures.items():
                write_atomically(folder / f"{name}.png", to_png(figure, dpi=150), mode=0o600)
        write_atomically(folder / "audit.md", "\n".join(lines).encode(), mode=0o600)
        write_json(folder / "audit.json", result, mode=0o600)
    except OSError as error:
        raise RunFolderError(
            f"{str(folder)!r} must be a folder that can be written, but is not ({error.strerror}). Use a copy."
        ) from None
