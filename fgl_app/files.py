"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger("flwr.files")
_UNSUPPORTED = {
    errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR,
    errno.ENOLCK,
}  # fmt: skip
"""How file systems of networks and of other systems say that they cannot do what a disk of Linux can."""


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
            _synchronize(file.fileno())
        set_mode(temporary, mode)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def set_mode(path: Path, mode: int) -> None:
    """Set the permission bits of a file, where its file system has them.

    Where it has none, or keeps others, the file is as readable as the folder is; that is said, once for each folder, if
    the file was to be its owner's alone.
    """
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    if os.name == "posix" and not mode & 0o077 and path.stat().st_mode & 0o077:
        _warn_once(
            f"The file system of {str(path.parent)!r} keeps no permissions of single files, so that others may read "
            "what should be its owner's alone, such as prompts. Restrict the folder, or use another file system."
        )


@functools.lru_cache(maxsize=256)
def _warn_once(sentence: str) -> None:
    _LOGGER.warning(sentence)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which no other process or thread has meanwhile; say it where there are no locks."""
    try:  # NFS locks only what is open for writing, which a folder cannot be
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError:  # another user's, of a folder that is shared
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl  # Windows has no such module

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except ImportError:
        warn_of_no_locks(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warn_of_no_locks(folder)


def try_lock(descriptor: int, folder: Path) -> bool:
    """Take the lock of an open file until it is closed or this process ends.

    Returns:
        False if another process has it. True where the file system has no locks, which is said in a warning.
    """
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        warn_of_no_locks(folder)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # the two by which POSIX says that another has it
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        warn_of_no_locks(folder)
    return True


def warn_of_no_locks(folder: Path) -> None:
    """Say once that nothing keeps other processes out of a folder."""
    _warn_once(
        f"The file system of {str(folder)!r} has no locks. Take care that no second process works in that folder at "
        "the same time, or use another file system."
    )


def sync_folder(folder: Path) -> None:
    """Make sure that files which were made or renamed in a folder are there after a crash, where that can be asked."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _synchronize(descriptor)
    finally:
        os.close(descriptor)


def _synchronize(descriptor: int) -> None:
    """Wait until the disk has what was written; go on where the file system knows no such request."""
    try:
        os.fsync(descriptor)
    except OSError as error:  # a full or broken disk is one of another number
        if error.errno not in _UNSUPPORTED:
            raise


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
