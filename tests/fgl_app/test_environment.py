"""What the user's shell holds must not lead astray what we start: every test asks a real child process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgl_app.config import APP_FOLDER
from fgl_app.environment import child_environment, short_temp_folder, temporary_home
from fgl_app.errors import ConfigError


def said_by(code: str, environment: dict[str, str], cwd: Path, *options: str) -> list[str]:
    """Run Python code as a child and return the lines that it printed."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def foreign(folder: Path, *names: str) -> Path:
    """Make packages of these names that are not ours."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    return folder


# What httpx, with which Flower's processes talk, makes of a desktop's or a hospital's proxies.
PROXIES = [
    {"http_proxy": "http://proxy.invalid:3128", "no_proxy": "intranet.example,10.0.0.1"},
    {"HTTP_PROXY": "http://proxy.invalid:3128", "HTTPS_PROXY": "http://proxy.invalid:3128", "no_proxy": ""},
    {"all_proxy": "socks://127.0.0.1:1080/", "http_proxy": "http://proxy.invalid:3128", "NO_PROXY": "fe80::/10,[::1]"},
]


@pytest.mark.parametrize("proxies", PROXIES)
def test_no_proxy_is_asked_for_this_machine_and_all_others_are_as_before(monkeypatch, tmp_path, proxies):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    code = (
        "import httpx; client = httpx.Client()\n"
        "for url in ('http://127.0.0.1:20000', 'http://localhost:20000', 'http://hub.example', 'http://10.0.0.1'):\n"
        "    pool = client._transport_for_url(httpx.URL(url))._pool\n"
        "    print(type(pool).__name__)"
    )

    pools = said_by(code, child_environment(), tmp_path)

    assert pools[:3] == ["ConnectionPool", "ConnectionPool", "HTTPProxy"]
    assert pools[3] == ("ConnectionPool" if "10.0.0.1" in proxies.get("no_proxy", "") else "HTTPProxy")


def test_a_proxy_that_cannot_be_used_is_named_once_and_the_command_itself_goes_on_without(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    code = (
        "import sys; sys.modules['socksio'] = None\n"  # as where it is not installed
        "sys.argv = ['fgl', 'run', 'generator=owner/name', 'run-name=none']; import fgl_app.cli; fgl_app.cli.main()"
    )
    # A hub that nobody answers for: what counts is that it was asked.
    environment = child_environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HOME=str(tmp_path))
    environment |= {"ALL_PROXY": "socks5://name:secret@proxy.invalid:1080", "NO_PROXY": "fe80::/10"}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip

    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "error: `generator` must be a model that the hub or its local cache has" in done.stderr
    assert said.count("The proxy of ALL_PROXY is not used") == said.count("pip install 'httpx[socks]'") == 1
    assert "Traceback" not in said
    assert "secret" not in said


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_all_hosts_without_a_proxy_stay_all_hosts_for_urllib_and_requests(monkeypatch, tmp_path, name):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv(name, " * ")
    code = (
        "import urllib.request, requests\n"
        "print(bool(urllib.request.proxy_bypass('hub.example')))\n"
        "print(requests.utils.get_environ_proxies('https://hub.example'))"
    )

    assert said_by(code, child_environment(), tmp_path) == ["True", "{}"]


def test_our_packages_are_found_before_others_of_their_names(monkeypatch, tmp_path):
    theirs = foreign(tmp_path / "theirs", "strategies", "clients", "fgl_app", "their_own")
    here = foreign(tmp_path / "here", "strategies", "fgl_app")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"theirs{os.pathsep}{APP_FOLDER}")
    names = "clients, fgl_app, strategies, their_own"
    code = f"import {names}\nfor module in ({names}): print(module.__file__)"

    *ours, other = (Path(line).parent.parent for line in said_by(code, child_environment(), here))

    assert set(ours) == {APP_FOLDER}
    assert other == theirs


def test_the_command_itself_uses_our_packages_or_names_those_that_it_found(monkeypatch, tmp_path):
    theirs = foreign(tmp_path, "strategies", "clients")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(theirs), str(APP_FOLDER)])}
    then = "import strategies; print(strategies.__file__)"

    (found,) = said_by(f"from fgl_app.environment import use_own_packages as use; use(); {then}", environment, tmp_path)
    assert Path(found).parent.parent == APP_FOLDER

    code = "import strategies\nfrom fgl_app.environment import use_own_packages as use\n"
    (sentence,) = said_by(f"{code}try: use()\nexcept Exception as error: print(error)", environment, tmp_path)
    assert sentence.startswith(f"The package `strategies` must be the one in {str(APP_FOLDER)!r}")
    assert str(theirs / "strategies") in sentence


def test_a_ray_of_ours_starts_where_another_is_named_and_the_temporary_folder_is_deep(tmp_path):
    deep = tmp_path / ("a-temporary-folder-of-a-long-name" * 3)
    deep.mkdir()
    environment = os.environ | {
        "RAY_ADDRESS": "127.0.0.1:9",
        "RAY_NAMESPACE": "theirs",
        "TMPDIR": str(deep),
        "PYTHONPATH": str(APP_FOLDER),
    }
    code = (
        "from fgl_app.synthesis.cluster import draw_on_cluster\n"
        "from fgl_app.synthesis.plan import Plan\n"
        "import dataclasses, pathlib, types\n"
        "plan = types.SimpleNamespace(device='cpu')\n"
        "print(list(draw_on_cluster(plan, pathlib.Path('.'), iter(()), 0, '')))"
    )

    assert said_by(code, environment, tmp_path) == ["[]"]


def test_variables_that_lead_elsewhere_are_left_out(monkeypatch):
    theirs = {
        "RAY_ADDRESS": "ray://head:10001", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_AUTH_MODE": "token",
        "FLWR_DATABASE": "/home/theirs/state.db", "FLWR_LOCAL_CONTROL_API_PORT": "1", "FLWR_HOME": "/home/theirs",
        "PYTHONINSPECT": "1", "FORCE_COLOR": "1", "COLUMNS": "20",
    }  # fmt: skip
    kept = {"RAY_memory_usage_threshold": "0.9", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "3", "THEIR_OWN": "x"}
    for name, value in (theirs | kept).items():
        monkeypatch.setenv(name, value)

    environment = child_environment(FLWR_HOME="/ours")

    assert {name: environment[name] for name in kept} == kept
    assert environment["FLWR_HOME"] == "/ours"
    assert not (set(theirs) - {"FLWR_HOME"}) & set(environment)
    assert child_environment("head:6379")["RAY_AUTH_MODE"] == "token"  # the run's own cluster may ask for it


def test_relative_paths_keep_their_meaning_in_another_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", "models")
    monkeypatch.setenv("FGL_CACHE", "~/cache")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")

    environment = child_environment()

    assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'mlflow.db'}"

    assert environment["HF_HOME"] == str(tmp_path / "models")
    assert environment["FGL_CACHE"] == str(Path.home() / "cache")


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("file:./mlruns", "mlruns"),
        ("file:mlruns", "mlruns"),
        ("file:../my%20runs", "../my runs"),
        ("./mlruns", "mlruns"),
    ],
)
def test_mlflow_keeps_its_files_where_a_relative_address_led(monkeypatch, tmp_path, uri, meant):
    (tmp_path / "here").mkdir()
    (tmp_path / "deep" / "elsewhere").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    code = "import mlflow; print(mlflow.MlflowClient().create_experiment('one'))"

    said_by(code, child_environment(), tmp_path / "deep" / "elsewhere")

    assert list((tmp_path / "here" / meant).resolve().glob("*/meta.yaml"))
    assert os.listdir(tmp_path / "deep" / "elsewhere") == []


@pytest.mark.parametrize(
    "uri", ["file:///data/mlruns", "file:/data/mlruns", "https://host/a", "sqlite:////data/a.db", "databricks"]
)
def test_other_addresses_of_mlflow_stay_as_they_are(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    assert child_environment()["MLFLOW_TRACKING_URI"] == uri


def test_a_home_leaves_room_for_the_names_of_sockets(monkeypatch, tmp_path):
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)

    with temporary_home() as home:
        socket = home / "ray" / "session_2026-11-28_21-20-52_123456_4194304" / "sockets" / "plasma_store"
        assert len(str(socket)) <= (103 if sys.platform == "darwin" else 107)
        assert home.is_dir()
    assert not home.exists()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="Set TMPDIR to a shorter path"):
        short_temp_folder()
