"""What needs nothing of Linux works where Linux's modules are absent; a clone is the same whatever ends its lines."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from fgl_app.config import APP_FOLDER
from fgl_app.environment import child_environment

# Our own packages find neither the modules nor the names that Windows lacks; other libraries have loaded theirs before.
AS_ON_WINDOWS = """
import builtins, os, signal, sys
import flwr.app, flwr.serverapp, datasets, matplotlib.pyplot, psutil, sklearn.metrics, torchvision, transformers
real = builtins.__import__
def refuse(name, globals=None, *rest, **named):
    owner = (globals or {}).get("__name__", "").partition(".")[0]
    if owner in ("fgl_app", "clients", "strategies") and name in ("fcntl", "pwd", "grp", "resource", "termios"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *rest, **named)
builtins.__import__ = refuse
sys.modules.pop("fcntl", None)
for module, names in (
    (signal, ("SIGHUP", "SIGKILL", "pthread_kill")),
    (os, ("geteuid", "getuid", "fork", "setsid", "killpg", "pread", "pwrite", "sched_getaffinity", "statvfs")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""


def run_as_on_windows(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS + code, *map(str, arguments)], env=child_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_reports_exports_and_checks_of_sites_work_where_linux_modules_are_absent(make_fedavg):
    run = make_fedavg()
    code = """
import importlib
for name in ("fgl_app.reporting.export", "fgl_app.reporting.finished_run", "fgl_app.store_inspection",
             "fgl_app.audit.command", "clients.approval", "fgl_app.certificates", "fgl_app.data.sources",
             "fgl_app.comparison", "fgl_app.client_app"):
    importlib.import_module(name)
from fgl_app.cli import main
sys.argv = ["fgl", "report", sys.argv[1]]
main()
"""
    done = run_as_on_windows(code, run)

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 1000


def test_a_clone_with_windows_line_ends_keeps_scripts_and_shipped_models(tmp_path):
    if not (APP_FOLDER / ".git").exists():
        pytest.skip("not a clone")
    made = tmp_path / "repository"
    # What stands in the working tree now, committed or not.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=APP_FOLDER, check=True,
        capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    kinds = (".sh", ".json", ".py", ".png", ".yaml", ".gitattributes", "/run")
    checked = [name for name in listed if name.endswith(kinds)]
    for name in checked:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes((APP_FOLDER / name).read_bytes())

    def git(*words: object) -> None:
        author = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        subprocess.run(["git", *author, *map(str, words)], cwd=made, check=True, capture_output=True)

    git("init")
    git("-c", "core.autocrlf=false", "add", "--all", "--force")
    git("commit", "--message", "all")
    git("clone", "--config", "core.autocrlf=true", made, tmp_path / "clone")

    def digest(folder: Path, name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    assert {"docker/operate.sh", "fgl_app/tiny/diffusion.json", ".ci/run"} <= set(checked)
    assert [name for name in checked if digest(made, name) != digest(tmp_path / "clone", name)] == []
