"""Run the application on a SuperLink of its own: private ports and folders, nothing left behind.

``flwr run`` alone ends with code 0 when a run fails, and shares one local SuperLink, with the working directory and
environment of whoever started it first. Here each run starts its SuperLink, checks how the run ended, and stops it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgl_app import supervisor, tiny
from fgl_app.config import APP_FOLDER, default_run_config, parse_run_config
from fgl_app.environment import child_environment, temporary_home
from fgl_app.errors import ConfigError, FGLError
from fgl_app.foundation_models import check_model_source
from fgl_app.reporting.earlier_start import run_path, say_if_finished
from fgl_app.resources import check_client_resources, machine_resources
from fgl_app.settings import RunConfigValue, RunSettings

_START_TIMEOUT_S = 60.0


class RunFailedError(FGLError):
    """Flower reports that the run did not complete."""


@dataclass(frozen=True)
class _SuperLink:
    """A SuperLink of one run."""

    environment: dict[str, str]
    """With which Flower's commands reach it."""
    process: subprocess.Popen[bytes]
    log_path: Path

    def log_tail(self) -> str:
        return self.log_path.read_text("utf-8", "replace")[-2000:]

    def require_running(self) -> None:
        """Raise an error with the end of its log if it has ended, which it does by itself at a fault alone."""
        if self.process.poll() is not None:
            raise RunFailedError(
                "The SuperLink must run until the end of the run, but ended before. What was finished is kept; once "
                "the reason is gone, the same command goes on from there. The SuperLink's log ends:\n"
                f"{self.log_tail()}"
            )


def simulate(
    overrides: Mapping[str, RunConfigValue],
    *,
    num_clients: int,
    client_cpus: int,
    client_gpus: float,
) -> None:
    """Run the application with ``num_clients`` simulated clients and wait for its end.

    A run that an earlier start has finished is left as it is; a sentence says so.

    Args:
        overrides: Run configuration that differs from the defaults.
        num_clients: Simulated clients.
        client_cpus: CPU cores per client.
        client_gpus: Share of a GPU per client.

    Raises:
        ConfigError: If the configuration is wrong; nothing is started then.
        RunFolderError: If the run's folder belongs to a run with other settings; nothing is started then.
        RunFailedError: If the run did not complete.
    """
    if os.name != "posix":
        raise ConfigError("Simulations need Linux or macOS. On Windows, use the Windows Subsystem for Linux (WSL).")
    chosen = dict(overrides) | {"num-clients": num_clients}
    settings = parse_run_config(default_run_config() | chosen)
    check_client_gpus(settings.run, client_gpus)
    if (answer := say_if_finished(settings)) is not None:
        sys.stdout.write(f"{answer}\n")
        return
    check_client_resources(client_cpus, client_gpus, *machine_resources())
    from clients.defences import read_vocabulary
    from fgl_app.checks import check_settings  # seconds of import, which a misspelt key does not wait for
    from fgl_app.data.sources import forget
    from fgl_app.phases import resolve
    from fgl_app.reporting.run_folder import refuse_other_start

    with _unsaid():
        check_settings(settings)
    forget()  # server and clients are other processes, and this one only waits for them, for hours
    if (run_path(settings) / "config.json").exists():
        refuse_other_start(settings, resolve(settings))
    if settings.prompts.prompt_level != "class":  # the clients are on this machine
        check_model_source(
            "captioner", settings.prompts.captioner, settings.prompts.captioner_revision, "config.json", tiny.CAPTIONER
        )
        if settings.privacy.caption_vocabulary:
            read_vocabulary(settings.privacy.caption_vocabulary)
    run_config = " ".join(f"{key}={_toml(value)}" for key, value in chosen.items())
    federation = (
        f"num-supernodes={num_clients} client-resources-num-cpus={client_cpus} client-resources-num-gpus={client_gpus}"
    )
    with temporary_home() as home, _superlink(home, settings.synthesis.ray_address) as link:
        command = ["flwr", "run", str(APP_FOLDER), "fgl", "--stream"]
        command += ["--run-config", run_config, "--federation-config", federation]
        code, run_id = _stream(command, link.environment)
        link.require_running()
        status = _status(run_id, link) if run_id else "never started"
    if code != 0 or status != "finished:completed":
        raise RunFailedError(
            f"Flower must report the run as finished:completed, but reports {status}. The log above has the reason. "
            "What was finished is kept; once the reason is gone, the same command goes on from there."
        )


def check_client_gpus(run: RunSettings, client_gpus: float) -> None:
    """Check that simulated clients will find the device that they are told to train on.

    Ray shows each client the GPU of its share alone, as ``cuda:0``, and none without a share.

    Args:
        run: The method, and the device of server and clients.
        client_gpus: Share of a GPU per client.

    Raises:
        ConfigError: If ``device`` names a GPU that no client will see.
    """
    kind, _, number = run.device.partition(":")
    if kind != "cuda" or run.method == "centralized":
        return
    if client_gpus == 0:
        raise ConfigError(
            f"`device` {run.device} needs clients that have a GPU, but `--client-gpus` is 0. Use device=auto, which "
            "leaves the GPU to the server, or for example --client-gpus 0.5."
        )
    if int(number or 0):
        raise ConfigError(
            f"`device` must be auto, cpu or cuda where clients are simulated, because each sees its GPU as cuda:0, but "
            f"is {run.device}. Use CUDA_VISIBLE_DEVICES={number} and device=cuda."
        )


def parse_overrides(overrides: Sequence[str]) -> dict[str, RunConfigValue]:
    """Turn ``KEY=VALUE`` words into typed values: true, false, whole numbers, numbers, and text for the rest.

    Raises:
        ConfigError: If a word has no ``=``.
    """
    values: dict[str, RunConfigValue] = {}
    defaults = default_run_config()
    for word in overrides:
        key, mark, text = word.partition("=")
        if not mark or not key:
            raise ConfigError(f"A setting must be KEY=VALUE, but is {word!r}. Use for example dirichlet-beta=0.5.")
        if key == "num-clients":
            raise ConfigError("`num-clients` must be given as --clients here, which starts as many, but is a setting.")
        values[key] = text if isinstance(defaults.get(key), str) else _value(text)
    return values


def _value(text: str) -> RunConfigValue:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _toml(value: RunConfigValue) -> str:
    # JSON's strings, numbers and booleans are TOML's, too.
    return json.dumps(value, ensure_ascii=False)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Log errors only: the server checks the same a minute later, and its lines are those that are kept."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _superlink(home: Path, ray_address: str) -> Iterator[_SuperLink]:
    """Start a SuperLink for simulations below ``home``; yield it; stop all of it."""
    port = free_port()
    environment = child_environment(
        ray_address,
        FLWR_HOME=str(home),
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        FLWR_TELEMETRY_ENABLED="0",
        RAY_DEDUP_LOGS="0",
        RAY_TMPDIR=str(home),
        FGL_STARTED_BY=f"`fgl run`, process {os.getpid()}",
    )
    (home / "config.toml").write_text(f'[superlink.fgl]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', "utf-8")
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log_path = home / "superlink.log"
    link = _SuperLink(environment, supervisor.start(command, environment, log_path), log_path)
    try:
        _wait_until_healthy(link, port)
        yield link
    finally:
        _stop(link.process, home)


def _wait_until_healthy(link: _SuperLink, port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and link.process.poll() is None:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as connection,
        ):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        time.sleep(0.2)
    raise RunFailedError(
        f"The SuperLink must start within {_START_TIMEOUT_S:g} s, but did not. Its log ends:\n{link.log_tail()}"
    )


def _stream(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str | None]:
    """Run ``flwr run``, pass its output on, and find the run's id in it."""
    run_id = None
    with subprocess.Popen(
        command, env=environment, cwd=environment["FLWR_HOME"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                if run_id is None and (match := re.search(r"[Rr]un (?:ID:? ?)?(\d{6,})", line)):
                    run_id = match[1]
        except BaseException:
            process.kill()
            raise
    return process.returncode, run_id


def _status(run_id: str, link: _SuperLink) -> str:
    """Ask Flower how the run ended; the log's stream can end a moment before the status is set."""
    status = "unknown"
    for _ in range(60):
        listing = subprocess.run(
            ["flwr", "list", "fgl", "--run-id", run_id, "--format", "json"],
            env=link.environment, cwd=link.environment["FLWR_HOME"], stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", check=False,
        )  # fmt: skip
        with contextlib.suppress(ValueError, KeyError, IndexError):
            status = json.loads(listing.stdout)["runs"][0]["status"]
        if status.startswith("finished"):
            break
        link.require_running()
        time.sleep(1.0)
    return status


def _stop(process: subprocess.Popen[bytes], home: Path) -> None:
    """End the SuperLink and everything that it started; the cleanup itself is not interrupted, and takes seconds."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # simulations run on Linux and macOS alone
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        supervisor.stop(process, home)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def free_port() -> int:
    """Return a port that is free, and that no system gives to others by itself before it is bound, as Ray's."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = 20_000 + secrets.randbelow(12_000)
            probe.bind(("127.0.0.1", port))
            return port
