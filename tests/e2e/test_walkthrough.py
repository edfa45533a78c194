"""The commands of examples/deployment/README.md, as they stand there, on a server and three sites of their own."""

import configparser
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ENVIRONMENT, prompts, results
from hosts import Network, network
from processes import Processes

from fgl_app.config import APP_FOLDER

FOLDER = APP_FOLDER / "examples" / "deployment"
SITES = ("site0", "site1", "site2")
UNITS = {"fgl-superlink": "flower-superlink", "fgl-gate": "nginx", "fgl-supernode": "flower-supernode"}
PACKAGES = {"nginx": "nginx-light", "curl": "curl", "ssh-keygen": "openssh-client"}
"""Debian's packages of the programs that the walk-through calls."""
VENV = Path(sys.executable).parent


@dataclass(frozen=True)
class Block:
    hosts: tuple[str, ...]
    runs_on: bool
    text: str


def blocks() -> list[Block]:
    """Return the shell blocks of the walk-through: ```bash HOST... [runs-on]."""
    found = re.findall(r"^```bash ([^\n]+)\n(.*?)^```$", (FOLDER / "README.md").read_text("utf-8"), re.M | re.S)
    return [
        Block(tuple(word for word in words.split() if word != "runs-on"), "runs-on" in words, text)
        for words, text in found
    ]


class WalkThrough:
    """Four hosts whose files lie in folders of their own, as the edited `fgl.env` of each says."""

    def __init__(self, folder: Path, hosts: Network) -> None:
        self.folder, self.hosts = folder, hosts
        environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        self.processes = Processes(folder, environment)
        self._environment = environment
        (self.session, *_), self.rest = [block.text for block in blocks()], blocks()[1:]
        for number, host in enumerate(("server", *SITES)):
            for part in ("etc", "state", "home"):
                (folder / host / part).mkdir(parents=True)
            edited = (FOLDER / "fgl.env").read_text()
            for shipped, own in (
                ("/opt/fgl/venv/bin", VENV),
                ("/opt/fgl/app", APP_FOLDER),
                ("/etc/fgl", folder / host / "etc"),
                ("/var/lib/fgl", folder / host / "state"),
                ("/srv/images", folder / "images" / host),
                ("FGL_PARTITION=0", f"FGL_PARTITION={number - 1}"),
            ):
                assert shipped in edited
                edited = edited.replace(shipped, str(own))
            (folder / host / "etc" / "fgl.env").write_text(edited)

    def command(self, host: str, text: str) -> list[str]:
        home = self.folder / host
        given = (f"HOME={home / 'home'}", f"FGL_ENV={home / 'etc' / 'fgl.env'}")
        return self.hosts.on(host, "env", *given, "bash", "-euo", "pipefail", "-c", f"{self.session}\n{text}")

    def run(self, host: str, text: str) -> str:
        done = subprocess.run(
            self.command(host, text), env=self._environment, cwd=self.folder / host / "home", text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=580, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout[-6000:]}\n{self.processes.output()[-6000:]}"
        return done.stdout

    def next_block(self, start: str) -> str:
        """Execute the next block, of which one line begins with ``start``, on each of its hosts."""
        block = self.rest.pop(0)
        assert any(line.startswith(start) for line in block.text.splitlines()), block.text
        if block.runs_on:
            for host in block.hosts:
                self.processes.start(f"{start}-{host}", self.command(host, block.text))
            return ""
        return "".join(self.run(host, block.text) for host in block.hosts)

    def wait_until_it_says(self, text: str, pattern: str, count: int = 1) -> None:
        """Repeat a command on the server, as a person would, until its output is the expected one."""
        deadline = time.monotonic() + 120
        said = ""
        while len(re.findall(pattern, said)) < count:
            assert time.monotonic() < deadline, f"{said}\n{self.processes.output()[-6000:]}"
            said = self.run("server", f"({text}) || true")


@pytest.mark.e2e
def test_the_walk_through(tmp_path):
    if lacking := [package for program, package in PACKAGES.items() if shutil.which(program) is None]:
        pytest.skip(f"the walk-through needs more programs: apt-get install {' '.join(lacking)}")
    with network("server", *SITES) as hosts:
        walk = WalkThrough(tmp_path, hosts)
        walk.run("server", f'python "$FGL_APP/examples/deployment/write_sites.py" {tmp_path / "images"}')
        try:
            walk.next_block("fgl certificates")
            for site in SITES:  # the way that one trusts
                shutil.copytree(tmp_path / "server/home/fgl-certificates" / site, tmp_path / site / "home/fgl-keys")
            walk.next_block("install")
            walk.next_block("flower-superlink")
            walk.next_block("nginx")
            health = "curl --silent --cacert $FGL_ETC/ca.crt https://{}/{} --write-out %{{http_code}}"
            walk.wait_until_it_says(health.format("127.0.0.1:8000", "health"), "200")
            walk.wait_until_it_says(health.format("$FGL_SERVER:8443", "health"), "403")
            walk.next_block("cat")
            registered = walk.next_block("flwr supernode register")
            looked_at = walk.next_block("fgl check-data")
            assert looked_at.count("images can be used") >= 3
            assert all((tmp_path / site / "home/fgl-check/contact_sheet.png").exists() for site in SITES)
            walk.next_block("flower-supernode")
            walk.wait_until_it_says(walk.rest[0].text, r"\bonline\b", 3)
            walk.next_block("flwr supernode list")

            refused = walk.next_block("ssh-keygen")
            assert registered.count("registered successfully") == 3
            for line in ("stranger: refused", "plaintext: refused", "HTTP: 400", "Control API: 403"):
                assert line in refused.splitlines(), refused
            assert refused.count("Exit Code: 305") == 2, refused  # both were told, and did not wait in vain

            output = walk.next_block("flwr run")
            first = tmp_path / "server" / "state" / "runs" / "first"
            assert [row["round"] for row in results(first)["rounds"]] == [1, 2]
            assert results(first)["rounds"][1]["clients"] == 3
            assert "finished:completed" in walk.run("server", "flwr list site --format json")
            assert "finished:stopped" in walk.next_block("flwr run").replace("\n", "")
            walk.next_block("python3")
            assert walk.rest == []
            output += walk.processes.output()
        finally:
            walk.processes.stop()

    assert [prompt for prompt in prompts(first) if prompt in output] == []
    restored = tmp_path / "restored"
    restored.mkdir()
    backup = tmp_path / "server" / "home" / "fgl-backup.tar.gz"
    subprocess.run(["tar", "--extract", "--file", backup, "--directory", restored], check=True)
    (database,) = restored.rglob("state.backup.db")
    with sqlite3.connect(database) as state:
        assert state.execute("SELECT COUNT(*) FROM node").fetchone() == (3,)
    assert json.loads(next(restored.rglob("first/results.json")).read_text()) == results(first)


def test_the_walk_through_installs_the_programs_that_it_calls():
    (installed,) = re.findall(r"^apt-get install (.*)$", (FOLDER / "README.md").read_text("utf-8"), re.M)
    commands = "".join(block.text for block in blocks())

    assert all(re.search(rf"^{program} ", commands, re.M) for program in PACKAGES)
    assert set(PACKAGES.values()) <= set(installed.split())


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_start_what_the_walk_through_starts(unit):
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read_string((FOLDER / f"{unit}.service").read_text().replace("\\\n", ""))
    (started,) = [
        line for block in blocks() if block.runs_on
        for line in block.text.replace("\\\n", "").splitlines() if line.startswith(UNITS[unit])
    ]  # fmt: skip

    words = shlex.split(re.sub(r"\$(FGL_[A-Z]+)", r"${\1}", started))
    unit_words = shlex.split(parser["Service"]["ExecStart"])

    assert Path(unit_words[0]).name == words[0]
    assert unit_words[1:] == words[1:]
    named = set(re.findall(r"FGL_[A-Z]+", started))
    assert named <= set(re.findall(r"^(FGL_[A-Z]+)=", (FOLDER / "fgl.env").read_text(), re.M))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path):
    for unit in UNITS:
        text = (FOLDER / f"{unit}.service").read_text()
        text = text.replace("/opt/fgl/venv/bin", str(VENV)).replace("/usr/sbin/nginx", "/bin/true")
        (tmp_path / f"{unit}.service").write_text(text)

    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / f"{unit}.service") for unit in UNITS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
