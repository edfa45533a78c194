"""The environment of the processes that we start: chosen here, whatever the user's shell holds."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.request import url2pathname

from fgl_app.config import APP_FOLDER
from fgl_app.errors import ConfigError

_OWN_PACKAGES = ("fgl_app", "strategies", "clients")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_LOOPBACK = ("127.0.0.1", "localhost")
_LOGGER = logging.getLogger("flwr.environment")

_DROPPED = {
    "PYTHONINSPECT",  # a worker that goes on as an interactive session never ends
    "COLUMNS", "LINES", "FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
}  # fmt: skip
_KEPT = {
    "FLWR_HOME", "FLWR_LOG_LEVEL", "RAY_TMPDIR", "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE",
    "RAY_USE_MULTIPROCESSING_CPU_COUNT", "RAY_DISABLE_DOCKER_CPU_WARNING",
}  # fmt: skip
"""Of the variables of Flower and Ray, what a user may say of this machine, besides Ray's limits, whose names go on in
lower case. The others lead elsewhere: to a cluster or a database, to other ports, or into another job of Ray."""
_TO_A_CLUSTER = ("RAY_AUTH_", "RAY_TLS_", "RAY_USE_TLS")
"""What reaching the cluster of `ray-address` may need."""
_PATHS = (
    "FGL_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME",
    "XDG_DATA_HOME", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "MPLCONFIGDIR",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "TMPDIR",
)  # fmt: skip
"""Variables with a path, which the children would read in their own working directory."""

_RAY_PATH_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
"""What Ray appends to its temporary folder for the name of a socket."""
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
_HOME_PREFIX = "fgl-"


def child_environment(ray_address: str = "", **chosen: str) -> dict[str, str]:
    """Return the environment for a process of this application.

    The user's variables are passed on, but those that would make Flower, Ray or Python go astray are not: proxies are
    not asked for this machine's own addresses, our packages are found before others of the same names, relative paths
    are made absolute, and of Ray's and Flower's own variables those are left out that lead elsewhere.

    Args:
        ray_address: Of a cluster that the run names; what reaching it needs is passed on then.
        chosen: Variables that are set besides.
    """
    given = dict(os.environ)
    environment = {name: value for name, value in given.items() if _is_passed_on(name, value, ray_address)}
    for name in _PATHS:
        if environment.get(name):
            environment[name] = os.path.abspath(Path(environment[name]).expanduser())
    if uri := environment.get("MLFLOW_TRACKING_URI"):
        environment["MLFLOW_TRACKING_URI"] = _absolute(uri)
    own = [str(APP_FOLDER)]
    others = [os.path.abspath(entry) for entry in filter(None, given.get("PYTHONPATH", "").split(os.pathsep))]
    environment |= {
        "PYTHONPATH": os.pathsep.join(own + [entry for entry in others if entry not in own]),
        "PYTHONSAFEPATH": "1",  # nor is anything imported from the working directory
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": "utf-8",  # wins over PYTHONUTF8
        "NO_COLOR": "1",  # the number of a run is read off Flower's words
        # Flower starts its parts by bare name.
        "PATH": os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), given.get("PATH")])),
    }
    return environment | _no_proxy(given) | chosen


def use_proxies() -> None:
    """Have this process ask the proxies that can be used and no others, and say which those are."""
    for name, value in list(os.environ.items()):
        if name.lower() in _PROXIES and not _is_usable_proxy(value):
            del os.environ[name]  # its value may hold a password
            _LOGGER.warning(
                "The proxy of %s is not used: it needs a package that is not installed, or is of a kind that is not "
                "known; for socks5:// use pip install 'httpx[socks]'.",
                name,
            )
    os.environ.update(_no_proxy(os.environ))


def _is_passed_on(name: str, value: str, ray_address: str) -> bool:
    if name.startswith("RAY_"):
        to_cluster = bool(ray_address) and name.startswith(_TO_A_CLUSTER)
        return name in _KEPT or name[4:5].islower() or to_cluster
    if name.startswith("FLWR_"):
        return name in _KEPT
    if name.lower() in _PROXIES:
        return _is_usable_proxy(value)
    return name not in _DROPPED


def _absolute(uri: str) -> str:
    """Return where MLflow keeps its files, a folder or a database of SQLite, without the working directory's help."""
    database = "sqlite:///"
    if uri.startswith(database):
        return database + os.path.abspath(uri.removeprefix(database))
    if uri.startswith("file:"):
        path = uri.removeprefix("file:")
        return uri if path.startswith("/") else Path(url2pathname(path)).absolute().as_uri()
    return uri if ":" in uri or uri == "databricks" else os.path.abspath(uri)


def _no_proxy(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the hosts for which no proxy is asked: the user's, and this machine's own addresses.

    Networks of IPv6, and its addresses in brackets, are left out: httpx, with which Flower talks, fails at them. All
    hosts, ``*``, stay alone: beside others, urllib and requests do not understand it.
    """
    entries = [entry.strip() for name in ("no_proxy", "NO_PROXY") for entry in given.get(name, "").split(",")]
    usable = [entry for entry in entries if "://" in entry or not (":" in entry and ("[" in entry or "/" in entry))]
    hosts = "*" if "*" in usable else ",".join(dict.fromkeys(filter(None, [*usable, *_LOOPBACK])))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _is_usable_proxy(value: str) -> bool:
    """Return whether httpx can use a proxy; it fails at others even where no proxy is to be asked."""
    scheme = value.partition("://")[0].lower() if "://" in value else "http"
    if scheme in ("socks5", "socks5h"):
        return importlib.util.find_spec("socksio") is not None
    return scheme in ("http", "https")


def use_own_packages() -> None:
    """Have this process import our packages, whatever else ``PYTHONPATH`` and the working directory hold.

    Raises:
        ConfigError: If another package of the same name was imported already, or is found all the same.
    """
    own = str(APP_FOLDER)
    sys.path[:] = [own, *(entry for entry in sys.path if entry != own)]
    for name in _OWN_PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != APP_FOLDER:
            raise ConfigError(
                f"The package `{name}` must be the one in {own!r}, but Python finds "
                f"{'none' if origin is None else repr(str(origin.parent))}. Take that folder off PYTHONPATH, or start "
                "from another working directory."
            )


def short_temp_folder(below: int = 0) -> Path:
    """Return a folder for temporary files in which Ray can make its sockets: the system's, or a shorter one.

    Args:
        below: Bytes of the name of the folder that is made in it for Ray.

    Raises:
        ConfigError: If there is none that can be written.
    """
    longest = _SOCKET_PATH_BYTES - _RAY_PATH_BYTES - below
    for folder in _temp_folders():
        if len(os.fsencode(folder)) <= longest and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(
        f"A folder for temporary files is needed that can be written and whose path has at most {longest} bytes, which "
        f"the names of Ray's sockets leave, but TMPDIR is {os.environ.get('TMPDIR', '')!r} and /tmp cannot be written. "
        "Set TMPDIR to a shorter path."
    )


def _temp_folders() -> Iterator[Path]:
    if chosen := os.environ.get("RAY_TMPDIR"):
        yield Path(chosen).absolute()
    with contextlib.suppress(OSError):  # where nothing can be written, such as on a full disk
        yield Path(tempfile.gettempdir()).absolute()
    if os.name == "posix":
        yield from map(Path, ("/tmp", "/var/tmp"))  # nosec B108 -- folders with random names are made there


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """Make a folder for Flower's and Ray's files of one run, and delete it at the end."""
    place = short_temp_folder(below=len(f"/{_HOME_PREFIX}12345678"))
    with tempfile.TemporaryDirectory(prefix=_HOME_PREFIX, dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
