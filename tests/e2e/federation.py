"""A SuperLink and SuperNodes on this machine, each site with a folder of handwritten zeros and ones."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from commands import ENVIRONMENT, FAST
from PIL import Image
from processes import Processes

from fgl_app.cards import load_card
from fgl_app.config import APP_FOLDER
from fgl_app.data.division import divide
from fgl_app.data.readers import open_part
from fgl_app.simulation import free_port

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
DEFAULTS = {key: value for key, _, value in (word.partition("=") for word in FAST)} | {"dataset": "folder"}


def write_site(folder: Path, site: int, num_sites: int = 2) -> None:
    """Write a share of the private zeros and ones as PNG files, one folder per class."""
    card = load_card("digits")
    part = open_part(card, "train", "")
    train = divide(card, part.labels, seed=0)["train"]
    for label, name in ((0, "zero"), (1, "one")):
        (folder / name).mkdir(parents=True)
        rows = [row for row in train if part.labels[row] == label]
        for row in rows[site::num_sites]:
            part.image(row).resize((32, 32), Image.Resampling.BILINEAR).save(folder / name / f"{row}.png")


def is_healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
    except OSError:
        return False
    return True


class Federation:
    """Starts, breaks and asks the parts of a deployment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        home = folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(f'[superlink.site]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n')
        self._environment = ENVIRONMENT | QUIET | {"FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.processes = Processes(folder, self._environment)

    def start_superlink(self) -> None:
        command = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
        command += ["--host", "127.0.0.1", "--port", self.port, "--database", self.folder / "state.db"]
        self.processes.start("superlink", command)
        self.processes.wait_until(lambda: is_healthy(self.port), 60, "the SuperLink must start")

    def start_supernode(self, site: int, num_sites: int, node_config: str = "") -> None:
        images = self.folder / f"site{site}"
        if not images.exists():
            write_site(images, site, num_sites)
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", free_port()]
        command += ["--node-config", f'partition-id={site} data-path="{images}" {node_config}']
        # For `client_process`.
        self.processes.start(f"site{site}", command, FLWR_LOG_LEVEL="DEBUG")

    def submit(self, **settings: object) -> str:
        """Start a run and return its id."""
        named = {key.replace("_", "-"): value for key, value in settings.items()}
        config = DEFAULTS | {"output-dir": str(self.folder)} | named
        started = self._flwr("run", APP_FOLDER, "site", "--run-config", toml(config), "--format", "json")
        return str(json.loads(started)["run-id"])

    def log(self, run_id: str) -> str:
        return self._flwr("log", run_id, "site", "--show")

    def status(self, run_id: str) -> str:
        return json.loads(self._flwr("list", "site", "--run-id", run_id, "--format", "json"))["runs"][0]["status"]

    def wait_for(self, run_id: str, text: str, seconds: float = 300) -> None:
        self.processes.wait_until(lambda: text in self.log(run_id), seconds, f"the log must hold {text!r}", 3.0)

    def wait_for_round(self, number: int, run_name: str = "digits", seconds: float = 600) -> None:
        checkpoint = self.folder / run_name / "checkpoints" / f"round-{number:04}.safetensors"
        self.processes.wait_until(checkpoint.exists, seconds, f"round {number} must end")

    def wait_for_the_end(self, run_id: str, seconds: float = 400) -> str:
        self.processes.wait_until(lambda: self.status(run_id).startswith("finished"), seconds, "the run must end", 3.0)
        return self.status(run_id)

    def client_process(self, site: int, number: int) -> psutil.Process:
        """Wait until a site's ClientApp works on its message of this number, counted from 1, and return its process.

        A process that has just started has not taken its message yet: if it dies, another takes its place. With the
        message in hand Flower loads the ClientApp, and says so to those who debug.
        """
        log = self.processes.log_of(f"site{site}")
        self.processes.wait_until(
            lambda: log.read_text("utf-8", "replace").count("Start `ClientApp` Loading") >= number,
            300, f"site {site} must receive its message {number}",
        )  # fmt: skip
        running = self.processes.below(f"site{site}", "flwr-clientapp")
        assert running, f"site {site} was done with its message {number} already"
        return max(running, key=lambda process: process.create_time())

    def _flwr(self, *words: object) -> str:
        done = subprocess.run(
            ["flwr", *map(str, words)], env=self._environment, cwd=self.folder, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    made.start_superlink()
    yield made
    made.processes.stop()


def toml(settings: Mapping[str, object]) -> str:
    """Write settings as `flwr run --run-config` wants them."""
    return " ".join(f"{key}={_value(str(value))}" for key, value in settings.items())


def _value(text: str) -> str:
    number = text.replace(".", "", 1).lstrip("-").isdigit()
    return text if number or text in ("true", "false") else json.dumps(text)
