"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
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
    with staged(path, content, mode) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def staged(path: Path, content: bytes, mode: int = 0o644) -> Iterator[Path]:
    """Write ``content`` to a hidden file beside ``path``, ready to be renamed; it goes at the end if it was not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which no other process has meanwhile, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make sure that files which were made or renamed in a folder are there after a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as indented JSON with a line's end, keys in the order given."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write ``value`` as indented JSON, atomically, keys in the order given."""
    write_atomically(path, json_bytes(value), mode)


def write_json_lines(path: Path, rows: list[dict[str, Any]], mode: int = 0o644) -> None:
    """Write one JSON object a line, atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), mode)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read what :func:`write_json_lines` wrote; an absent file is empty."""
    if not path.exists():
        return []
    # Not splitlines(): JSON's strings may hold characters that it takes for ends of lines.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def sha256(content: bytes | memoryview) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no blanks, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def checkpoint_file(run: Path, server_round: int) -> Path:
    """Return where the run in folder ``run`` keeps the weights after a round."""
    return run / "checkpoints" / f"round-{server_round:04d}.safetensors"
