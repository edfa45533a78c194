"""The README's commands are ones that exist and are valid."""

import re
import shlex
from pathlib import Path

import pytest

from fgl_app.config import APP_FOLDER, default_run_config, parse_run_config
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


def test_every_file_that_the_readme_names_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (APP_FOLDER / target).exists(), target


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_commands_of_the_readme_are_targets(target):
    makefile = (APP_FOLDER / "Makefile").read_text()

    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert Path(APP_FOLDER / ".ci" / "run").stat().st_mode & 0o111
