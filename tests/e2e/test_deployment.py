"""A real deployment on one machine: a SuperLink and two SuperNodes with folders of images, by the README's commands."""

import json
import re
import shlex
import subprocess

import pytest
from commands import ENVIRONMENT
from federation import DEFAULTS, is_healthy, toml, write_site
from processes import Processes, free_port

from fgl_app.config import APP_FOLDER

pytestmark = pytest.mark.e2e

README = (APP_FOLDER / "README.md").read_text("utf-8")
SETTINGS = {key: value for key, value in DEFAULTS.items() if key not in ("dataset", "num-server-rounds")}


def command(start: str) -> str:
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    return line


def test_two_sites_with_folders_of_images_train_together(tmp_path):
    port = free_port()
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.site]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = ENVIRONMENT | {"FLWR_HOME": str(home)}
    processes = Processes(tmp_path, environment)
    try:
        processes.start("superlink", shlex.split(command("flower-superlink").replace("18000", str(port))))
        processes.wait_until(lambda: is_healthy(port), 60, "the SuperLink must start")
        for site in (0, 1):
            write_site(tmp_path / f"site{site}", site)
            line = command(f"flower-supernode --insecure --superlink 127.0.0.1:18000 --port 1810{site}")
            line = line.replace("18000", str(port)).replace(f"1810{site}", str(free_port()))
            processes.start(
                f"site{site}", shlex.split(line.replace(f"/data/site{site}", str(tmp_path / f"site{site}")))
            )
        words = shlex.split(command("flwr run . site"))
        words[2] = str(APP_FOLDER)
        words[-1] += f' {toml(SETTINGS)} output-dir="{tmp_path}"'
        done = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=True
        )
    finally:
        processes.stop()

    assert "Exit Code" not in done.stdout, done.stdout[-4000:]
    found = json.loads((tmp_path / "digits" / "results.json").read_text())
    assert [row["round"] for row in found["rounds"]] == [1, 2]
    # Zeros and ones, drawn from two prompts, tell the clients' own held-out images apart.
    assert found["rounds"][0]["accuracy"] > 0.7
    assert found["upload_bytes"]["prompts_per_client"]["payload"] < 229
    output = processes.output()
    assert not re.search(r"a photo of a handwritten (zero|one)", output + done.stdout)  # prompts are never logged
