"""A real deployment on one machine: a SuperLink and two SuperNodes with folders of images, by the README's commands."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from fgl_app.cards import load_card
from fgl_app.config import APP_FOLDER
from fgl_app.data.division import divide
from fgl_app.data.readers import open_part

pytestmark = pytest.mark.e2e

README = (APP_FOLDER / "README.md").read_text("utf-8")
OVERRIDES = (
    " images-per-class=64 num-inference-steps=10 batch-size=16 server-epochs=8 local-epochs=1"
    " server-finetune-epochs=0 image-size=8"
)


def command(start: str) -> str:
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    return line


def write_site(folder: Path, site: int) -> None:
    """Write every second private zero and one as PNG files, one folder per class."""
    card = load_card("digits")
    part = open_part(card, "train", "")
    train = divide(card, part.labels)["train"]
    for label, name in ((0, "zero"), (1, "one")):
        (folder / name).mkdir(parents=True)
        rows = [row for row in train if part.labels[row] == label]
        for row in rows[site::2]:
            part.image(row).resize((32, 32), Image.Resampling.BILINEAR).save(folder / name / f"{row}.png")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the SuperLink did not start")


def test_two_sites_with_folders_of_images_train_together(tmp_path):
    port = free_port()
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.site]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    processes, logs = [], []

    def start(line: str) -> None:
        log = (tmp_path / f"{len(processes)}.log").open("wb")
        logs.append(log)
        processes.append(subprocess.Popen(shlex.split(line), env=environment, cwd=tmp_path, stdout=log, stderr=log))

    try:
        start(command("flower-superlink").replace("18000", str(port)))
        wait_until_healthy(port)
        for site in (0, 1):
            write_site(tmp_path / f"site{site}", site)
            line = command(f"flower-supernode --insecure --superlink 127.0.0.1:18000 --port 1810{site}")
            line = line.replace("18000", str(port)).replace(f"1810{site}", str(free_port()))
            start(line.replace(f"/data/site{site}", str(tmp_path / f"site{site}")))
        line = command("flwr run . site").replace("num-server-rounds=2", f"num-server-rounds=2{OVERRIDES}")
        words = shlex.split(line.replace(OVERRIDES, f'{OVERRIDES} output-dir="{tmp_path}"'))
        words[2] = str(APP_FOLDER)
        done = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=True
        )
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)
        for log in logs:
            log.close()

    assert "Exit Code" not in done.stdout, done.stdout[-4000:]
    found = json.loads((tmp_path / "digits" / "results.json").read_text())
    assert [row["round"] for row in found["rounds"]] == [1, 2]
    # Zeros and ones, drawn from two prompts, tell the clients' own held-out images apart.
    assert found["rounds"][0]["accuracy"] > 0.7
    assert found["upload_bytes"]["prompts_per_client"]["payload"] < 229
    output = "".join((tmp_path / f"{index}.log").read_text("utf-8", "replace") for index in range(3))
    assert not re.search(r"a photo of a handwritten (zero|one)", output + done.stdout)  # prompts are never logged
