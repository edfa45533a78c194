"""The README's commands are ones that exist and are valid."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

from fgl_app.config import APP_FOLDER, default_run_config, parse_run_config
from fgl_app.records import MAX_PAYLOAD_BYTES
from fgl_app.simulation import parse_overrides

README = (APP_FOLDER / "README.md").read_text("utf-8")
SYNTHESIS = (APP_FOLDER / "examples" / "synthesis" / "README.md").read_text("utf-8")
RUNS = [line for line in (README + SYNTHESIS).splitlines() if line.startswith("fgl run ")]


@pytest.mark.parametrize("line", RUNS)
def test_every_run_of_the_readme_is_a_valid_configuration(line):
    words = shlex.split(line)[2:]

    overrides = [word for word in words if "=" in word]

    settings = parse_run_config(default_run_config() | parse_overrides(overrides))
    assert settings.run.run_name in line


def test_the_readme_is_short_and_shows_runs():
    assert len(README.splitlines()) <= 200
    assert sum(line.startswith("fgl run ") for line in README.splitlines()) >= 6


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_every_file_that_a_page_names_exists(page):
    text = (APP_FOLDER / page).read_text("utf-8")
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    named = re.findall(r"`([\w*/]+\.(?:yaml|py))`", text) if page.startswith("examples") else []

    assert linked
    for target in linked + named:
        assert list((APP_FOLDER / page).parent.glob(target)) or (APP_FOLDER / target).exists(), target


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_commands_of_the_readme_are_targets(target):
    makefile = (APP_FOLDER / "Makefile").read_text()

    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert Path(APP_FOLDER / ".ci" / "run").stat().st_mode & 0o111


def test_what_the_defences_need_is_installed_wherever_the_application_is():
    project = tomllib.loads((APP_FOLDER / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    dockerfile = (APP_FOLDER / "docker" / "Dockerfile").read_text("utf-8")
    (script,) = re.findall(r'^RUN python3 -c "(.*?)" *(?:\\\n *)?> /requirements.txt$', dockerfile, re.M | re.S)

    done = subprocess.run(
        [sys.executable, "-c", script.replace("\\\n", "")], cwd=APP_FOLDER, capture_output=True, text=True, check=True
    )

    needed = ("audit", "pictures", "privacy")
    assert done.stdout.split("\n")[:-1] == project["dependencies"] + [line for name in needed for line in extras[name]]
    for page in ("Makefile", "examples/deployment/README.md"):
        (installed,) = re.findall(r"pip install.* --editable (?!'\.\[dev)(\S+)", (APP_FOLDER / page).read_text("utf-8"))
        assert installed.endswith("[audit,pictures,privacy]'"), page


def test_the_gate_lets_the_largest_message_of_a_client_through():
    gate = (APP_FOLDER / "examples" / "deployment" / "gate.conf").read_text("utf-8")
    (megabytes,) = re.findall(r"^ *client_max_body_size (\d+)m;$", gate, re.M)

    # Prompts and embeddings travel in one piece, weights in several.
    assert int(megabytes) * 2**20 > 2 * MAX_PAYLOAD_BYTES + FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def test_git_ignores_what_flower_builds():
    assert "*.fab" in (APP_FOLDER / ".gitignore").read_text("utf-8").splitlines()
