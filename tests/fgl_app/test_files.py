"""Shares of networks and other systems: what they refuse is gone without where that is harmless, or said once."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgl_app.environment import child_environment
from fgl_app.files import locked, sync_folder, write_atomically

# A process whose system calls answer as such a file system does: which call, with which error.
REFUSING = """
import errno, fcntl, os, sys
from pathlib import Path
def refuse(module, name, number, folders_only=False):
    real = getattr(module, name)
    def call(target, *arguments):
        if folders_only and not os.path.isdir(f"/proc/self/fd/{target}" if isinstance(target, int) else target):
            return real(target, *arguments)
        raise OSError(number, os.strerror(number))
    setattr(module, name, call)
folder = Path(sys.argv[1])
"""
WRITE = """
from fgl_app.files import write_atomically
for name in ("a", "b"):
    write_atomically(folder / name, b"new", mode=0o600)
print((folder / "a").read_bytes(), sorted(path.name for path in folder.iterdir()))
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSING + code, folder], env=child_environment(), cwd=folder, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "EPERM"])
def test_a_folder_that_cannot_be_synchronized_is_written_all_the_same(tmp_path, number):
    done = run(f"refuse(os, 'fsync', errno.{number}, folders_only={number == 'EINVAL'})" + WRITE, tmp_path)

    assert done.stdout == "b'new' ['a', 'b']\n", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("number", ["EIO", "ENOSPC"])
def test_a_disk_that_fails_is_no_such_folder(tmp_path, number):
    done = run(f"refuse(os, 'fsync', errno.{number})" + WRITE, tmp_path)

    assert done.returncode == 1
    assert os.strerror(getattr(errno, number)) in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("makes_private", [True, False])
def test_private_files_that_cannot_be_made_private_are_said_once(tmp_path, makes_private):
    # Such file systems refuse permissions, or take them and show those of the mount.
    shown = "" if makes_private else "real = os.open; os.open = lambda p, f, mode=0o777, **k: real(p, f, 0o644, **k)\n"
    done = run(shown + "refuse(os, 'chmod', errno.EPERM)" + WRITE, tmp_path)

    assert done.stdout == "b'new' ['a', 'b']\n", done.stderr
    assert done.stderr.count("keeps no permissions of single files") == (0 if makes_private else 1)
    assert ("new" in done.stderr) is False


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP"])
def test_a_run_on_a_file_system_without_locks_says_so_and_goes_on(tmp_path, number):
    code = f"""
refuse(fcntl, "lockf", errno.{number}); refuse(fcntl, "flock", errno.{number})
from fgl_app.files import locked, try_lock
print(try_lock(os.open(folder / "lock", os.O_RDWR | os.O_CREAT), folder))
with locked(folder):
    print("in")
"""
    done = run(code, tmp_path)

    assert done.stdout == "True\nin\n", done.stderr
    assert done.stderr.count("has no locks") == 1


def test_a_folder_of_another_user_is_locked_all_the_same(tmp_path):
    with locked(tmp_path):
        code = "real = os.open\n"
        code += "def refusing(path, flags, *rest):\n"
        code += "    if flags & os.O_RDWR: raise PermissionError(13, 'no')\n"
        code += "    return real(path, flags, *rest)\n"
        code += "os.open = refusing; import fcntl\n"
        code += "real_flock = fcntl.flock; fcntl.flock = lambda fd, how: real_flock(fd, how | fcntl.LOCK_NB)\n"
        code += "from fgl_app.files import locked\n"
        code += "try:\n    with locked(folder): print('in')\nexcept BlockingIOError: print('kept out')"
        assert run(code, tmp_path).stdout == "kept out\n"
    assert run(code, tmp_path).stdout == "in\n"


def test_a_real_disk_keeps_what_is_private(tmp_path):
    write_atomically(tmp_path / "a", b"x", mode=0o600)
    sync_folder(tmp_path)

    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
