"""A server and three sites on network stacks of their own: TLS, authenticated SuperNodes, and a cable that is cut."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from hosts import Network, network
from processes import Processes

from fgl_app.certificates import make_certificates
from fgl_app.config import APP_FOLDER

pytestmark = pytest.mark.e2e

SITES = ("site0", "site1", "site2")
SERVER = "server.example.org"
RUN_CONFIG = (
    'dataset="folder" num-clients=3 min-clients=2 connect-timeout-s=20 num-server-rounds=200 image-size=8 model="cnn"'
    " images-per-class=24 num-inference-steps=6 server-epochs=4 local-epochs=1 server-finetune-epochs=0 batch-size=16"
    ' output-dir="{output}"'
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


def test_a_run_outlives_a_cut_cable_and_a_dead_supernode_and_takes_both_sites_back(tmp_path, flwr):
    images = [sys.executable, APP_FOLDER / "examples" / "deployment" / "write_sites.py", tmp_path / "images"]
    environment = ENVIRONMENT | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(APP_FOLDER), os.environ.get("PYTHONPATH", "")]),
    }
    processes = Processes(tmp_path, environment)
    with network("server", *SITES) as hosts:
        subprocess.run(images, env=environment, check=True)
        make_certificates(tmp_path / "certificates", [SERVER], SITES, days=1)
        try:
            start_server(hosts, processes, tmp_path)
            for number, site in enumerate(SITES):
                flwr(hosts, "supernode", "register", tmp_path / "certificates" / site / "supernode.pub", "site")
                start_site(hosts, processes, tmp_path, number)
            for site in SITES:
                connected = processes.log_of(site)
                processes.wait_until(lambda log=connected: "SuperNode ID" in log.read_text(), 60, f"{site} connects")
            config = RUN_CONFIG.format(output=tmp_path)
            started = flwr(hosts, "run", APP_FOLDER, "site", "--run-config", config, "--format", "json")
            run_id = json.loads(started)["run-id"]

            metrics = tmp_path / "digits" / "metrics.jsonl"

            def wait_for_round(after: int, clients: int, what: str) -> int:
                """Wait until so many clients trained in a round after that one, and return its number."""

                def found() -> list[int]:
                    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
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
            output = flwr(hosts, "log", run_id, "site", "--show") + processes.output()
        finally:
            processes.stop()

    rounds = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert (rounds[0]["phase"], rounds[0]["clients"]) == ("one-shot", 0)
    assert rounds[0]["upload_bytes"] > 0
    assert re.search(r"round \d+ \(train\): 1 of 3 failed", output)
    assert not re.search(r"a photo of a handwritten (zero|one|nine)", output)  # prompts are never logged
