"""Start the command `fgl` as a user does, and read what a run left."""

import json
import os
import subprocess
import sys
from pathlib import Path

FAST = (
    *("model=cnn", "images-per-class=32", "num-inference-steps=8", "server-epochs=5", "local-epochs=1"),
    *("server-finetune-epochs=0", "num-server-rounds=2", "image-size=8", "batch-size=16", "server-learning-rate=0.05"),
)
"""Settings with which a run spends most of its time starting."""

ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def fgl(*arguments: object, cwd: Path, expect: int = 0, timeout_s: float = 900) -> str:
    """Run `fgl` and return all that it said; any other exit code than `expect` fails the test."""
    done = subprocess.run(
        ["fgl", *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s,
        check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == expect, output[-6000:]
    return output


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def prompts(folder: Path) -> set[str]:
    """Return the prompts of a run's images, of which there must be some; none of them may be logged."""
    found = {json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text("utf-8").splitlines()}
    assert found
    return found
