"""A server and three sites on network stacks of their own: TLS, authenticated SuperNodes, and a cable that is cut."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, prompts, results
from hosts import Network, network
from processes import Processes

from fgl_app.certificates import make_certificates
from fgl_app.config import APP_FOLDER

pytestmark = pytest.mark.e2e

SITES = ("site0", "site1", "site2")
SERVER = "server.example.org"
RUN_CONFIG = (
    'dataset="folder" num-clients=3 min-clients=2 connect-timeout-s=20 image-size=8 model="cnn"'
    " images-per-class=24 num-inference-steps=6 server-epochs=4 local-epochs=1 server-finetune-epochs=0 batch-size=16"
    ' prompt-level="instance" output-dir="{output}"'
)


def start_server(hosts: Network, processes: Processes, folder: Path) -> None:
    keys = folder / "certificates" / "server"
    command = ["flower-superlink", "--host", "0.0.0.0", "--port", "8000", "--database", folder / "state.db"]
    command += ["--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "server.pem"]
    command += ["--ssl-keyfile", keys / "server.key", "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation"]
    processes.start("server", hosts.on("server", *command), FLWR_HOME=str(folder / "server"))
    look = f"import urllib.request as r; r.urlopen('https://{SERVER}:8000/health')"
    ask = hosts.on("server", sys.executable, "-c", look)
    environment = ENVIRONMENT | {"SSL_CERT_FILE": str(keys / "ca.crt")}
    processes.wait_until(
        lambda: subprocess.run(ask, env=environment, capture_output=True, check=False).returncode == 0,
        60, "the SuperLink must start",
    )  # fmt: skip


def start_site(hosts: Network, processes: Processes, folder: Path, number: int) -> None:
    site = SITES[number]
    keys = folder / "certificates" / site
    command = ["flower-supernode", "--superlink", f"{SERVER}:8000", "--root-certificates", keys / "ca.crt"]
    command += ["--auth-supernode-private-key", keys / "supernode.key"]
    command += ["--node-config", f'partition-id={number} data-path="{folder / "images" / site}"']
    processes.start(site, hosts.on(site, *command), FLWR_HOME=str(folder / site))


@pytest.fixture
def flwr(tmp_path):
    """Flower's commands, as an operator gives them on the server."""
    home = tmp_path / "operator"
    home.mkdir()
    authority = tmp_path / "certificates" / "server" / "ca.crt"
    (home / "config.toml").write_text(
        f'[superlink.site]\naddress = "{SERVER}:8000"\nroot-certificates = "{authority}"\n'
    )

    def run(hosts: Network, *words: object) -> str:
        done = subprocess.run(
            hosts.on("server", "flwr", *words), env=ENVIRONMENT | {"FLWR_HOME": str(home)}, cwd=home,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def processes(tmp_path):
    environment = ENVIRONMENT | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(APP_FOLDER), os.environ.get("PYTHONPATH", "")]),
    }
    write = [sys.executable, APP_FOLDER / "examples" / "deployment" / "write_sites.py", tmp_path / "images"]
    subprocess.run(write, env=environment, check=True)
    return Processes(tmp_path, environment)


@contextlib.contextmanager
def federation(processes, folder, flwr, num_rounds):
    """Connect the sites with the server, start a run, and yield the hosts and the run's id."""
    with network("server", *SITES) as hosts:
        make_certificates(folder / "certificates", [SERVER], SITES, days=1)
        try:
            start_server(hosts, processes, folder)
            for number, site in enumerate(SITES):
                flwr(hosts, "supernode", "register", folder / "certificates" / site / "supernode.pub", "site")
                start_site(hosts, processes, folder, number)
            for site in SITES:
                connected = processes.log_of(site)
                processes.wait_until(lambda log=connected: "SuperNode ID" in log.read_text(), 60, f"{site} connects")
            config = RUN_CONFIG.format(output=folder) + f" num-server-rounds={num_rounds}"
            started = flwr(hosts, "run", APP_FOLDER, "site", "--run-config", config, "--format", "json")
            yield hosts, json.loads(started)["run-id"]
        finally:
            processes.stop()


def rounds_of(folder):
    metrics = folder / "digits" / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def test_a_run_outlives_a_cut_cable(tmp_path, processes, flwr):
    with federation(processes, tmp_path, flwr, num_rounds=2) as (hosts, run_id):
        processes.wait_until(lambda: rounds_of(tmp_path), 300, "round 1 must end")
        hosts.plug("site2", "down")
        processes.wait_until((tmp_path / "digits" / "results.json").exists, 600, "the run must end")
        output = flwr(hosts, "log", run_id, "site", "--show") + processes.output()

    assert [(row["round"], row["phase"], row["clients"]) for row in rounds_of(tmp_path)] == [
        (1, "one-shot", 0),
        (2, "federated", 2),
    ]
    assert results(tmp_path / "digits")["upload_bytes"]["prompts_per_client"]["payload"] > 0
    assert "round 2 (train): 1 of 3 failed" in output
    assert [prompt for prompt in prompts(tmp_path / "digits") if prompt in output] == []


@pytest.mark.nightly
def test_a_site_takes_part_again_when_its_cable_or_its_supernode_is_back(tmp_path, processes, flwr):
    with federation(processes, tmp_path, flwr, num_rounds=200) as (hosts, run_id):

        def wait_for_round(after: int, clients: int, what: str) -> int:
            """Wait until so many clients trained in a round after that one, and return its number."""

            def found() -> list[int]:
                rows = rounds_of(tmp_path)
                return [row["round"] for row in rows if row["round"] > after and row["clients"] == clients]

            processes.wait_until(found, 300, what)
            return found()[0]

        begun = wait_for_round(1, 3, "all sites must train")
        hosts.plug("site2", "down")
        alone = wait_for_round(begun, 2, "a round must end without the site whose cable is cut")
        hosts.plug("site2", "up")
        again = wait_for_round(alone, 3, "the site must train again when its cable is back")
        processes.kill("site1")
        alone = wait_for_round(again, 2, "a round must end without the site whose SuperNode died")
        start_site(hosts, processes, tmp_path, 1)
        wait_for_round(alone, 3, "the site must train again when its SuperNode is back")
        flwr(hosts, "stop", run_id, "site")
