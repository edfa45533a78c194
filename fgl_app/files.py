"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return where unpacked models and downloaded data lie: ``$FGL_CACHE``, or a folder of the user's cache."""
    return Path(os.environ.get("FGL_CACHE", "~/.cache/federated-generative-learning")).expanduser()


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``content``; after a crash it holds the old bytes or the new, never a part.

    Args:
        path: The file; its folder must exist.
        content: All of its bytes.
        mode: Permission bits; 0o600 for files that hold prompts.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write ``value`` as indented JSON, atomically, keys in the order given."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(), mode)


def write_json_lines(path: Path, rows: list[dict[str, Any]], mode: int = 0o644) -> None:
    """Write one JSON object a line, atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), mode)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read what :func:`write_json_lines` wrote; an absent file is empty."""
    if not path.exists():
        return []
    # Not splitlines(): JSON's strings may hold characters that it takes for ends of lines.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no blanks, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_file(run: Path, server_round: int) -> Path:
    """Return where the run in folder ``run`` keeps the weights after a round."""
    return run / "checkpoints" / f"round-{server_round:04d}.safetensors"
