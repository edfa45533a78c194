"""Every benchmark runs, on next to nothing, and says what its ratio compares."""

import json
import subprocess
import sys

import pytest

from fgl_app.config import APP_FOLDER

SMALL = {
    "synthesis": ["--images-per-class", "2", "--steps", "3"],
    "training": ["--model", "pool", "--images", "8", "--size", "32", "--batch-size", "4"],
    "captioning": ["--images", "2", "--batch-size", "2", "--max-new-tokens", "2"],
    "overhead": ["--model", "cnn", "--clients", "2", "--num-rounds", "1"],
    "scaling": ["--clients", "3", "--plan-images", "640", "--draw-images", "20", "--workers", "1"],
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_writes_its_contenders_and_the_machine(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", "1", "--json", str(tmp_path / "out.json")]

    done = subprocess.run(
        [*command, *SMALL[name]], cwd=APP_FOLDER, capture_output=True, text=True, check=False, timeout=500
    )

    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["benchmark"] == name
    assert found["machine"]["versions"]["torch"]
    if name == "scaling":
        assert found["plans"][0]["resume"]["peak_bytes"] > 0
        assert found["prompt_round"]["3"]["seconds"] > 0
        assert found["workers"]["1"]["seconds"] > 0
    else:
        assert found["ratio"] > 0
        assert all(contender["per_second"] > 0 for contender in found["contenders"].values())
