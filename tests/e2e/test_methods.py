"""Real runs of what differs between methods: domains, prompts of the server, baselines, comparisons."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ENVIRONMENT, FAST, fgl, results

from fgl_app.config import APP_FOLDER

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    script = APP_FOLDER / "examples" / "domains" / "make_domains.py"
    subprocess.run([sys.executable, script, folder], env=ENVIRONMENT | {"PYTHONPATH": str(APP_FOLDER)}, check=True)
    return folder


def test_six_domains_one_per_client(domains, tmp_path):
    card = APP_FOLDER / "examples" / "domains" / "six_domains.yaml"
    names = (f"dataset={card}", f"data-dir={domains}", "partition=domain", f"output-dir={tmp_path}", "run-name=six")

    fgl("run", *FAST, *names, "--clients", 6, cwd=tmp_path)

    last = results(tmp_path / "six")["rounds"][-1]
    assert set(last["domain_accuracy"]) == {"plain", "bold", "thin", "slanted", "noisy", "negative"}
    assert last["accuracy_macro"] == pytest.approx(sum(last["domain_accuracy"].values()) / 6)
    prompts = [json.loads(line) for line in (tmp_path / "six" / "prompts.jsonl").read_text().splitlines()]
    assert {(row["domain"], row["prompt"]) for row in prompts} >= {
        ("bold", "a bold handwritten seven"),
        ("plain", "a photo of a handwritten seven"),
    }


def test_a_comparison_runs_what_is_missing_and_writes_table_and_figures(tmp_path):
    settings = {key: _value(value) for key, value in (word.split("=") for word in FAST)}
    gpt_fl = {
        "method": "gpt-fl", "num-prompts-per-class": 4, "strategy": "FedAdam", "strategy-options": "eta=0.01 tau=0.01",
        "trackers": "tensorboard",
    }  # fmt: skip
    experiment = {
        "title": "Small",
        "clients": 4,
        "seeds": [0],
        "settings": settings | {"fraction-train": 0.5},
        "columns": {"IID": {"partition": "iid"}},
        "rows": {
            "FedAvg": {"method": "fedavg", "num-server-rounds": 1},
            "GPT-FL": gpt_fl,
            "One-shot": {"of": "GPT-FL", "round": 1},
            "Fine-tuned": {"method": "centralized", "num-server-rounds": 1, "start-from": ["GPT-FL", 1]},
        },
        "figures": [{"name": "rounds", "kind": "by-round", "title": "Accuracy per round"}],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))

    first = fgl("compare", "small.yaml", "--jobs", 2, "--output-dir", "out", cwd=tmp_path, timeout_s=1500)
    runs = tmp_path / "out" / "runs"
    fedavg, drawn, tuned = (runs / f"{name}--iid--seed-0" for name in ("fedavg", "gpt-fl", "fine-tuned"))
    (drawn / "results.json").unlink()
    second = fgl("compare", "small.yaml", "--output-dir", "out", cwd=tmp_path)
    page, table = (tmp_path / "out" / name for name in ("comparison.html", "table.md"))
    written, tables = page.read_bytes(), table.read_bytes()
    page.unlink()
    again = fgl("report", "out", cwd=tmp_path)

    assert "3 runs, 0 finished, 3 to do" in first
    assert "3 runs, 2 finished, 1 to do" in second
    assert again.strip() == str(page)
    assert (page.read_bytes(), table.read_bytes()) == (written, tables)
    assert "| FedAvg |" in tables.decode()
    assert "—" not in tables.decode()
    assert (tmp_path / "out" / "rounds.png").stat().st_size > 5_000
    for folder, method, phase in (
        (fedavg, "fedavg", "federated"),
        (drawn, "gpt-fl", "one-shot"),
        (tuned, "centralized", "centralized"),
    ):
        found = results(folder)
        assert (found["method"], found["rounds"][0]["phase"]) == (method, phase)
        assert (found["synthesis"] is None) == (method != "gpt-fl")
    found = results(drawn)
    assert found["synthesis"]["generated"] == 0
    # The server wrote the prompts: no client was asked for any, and half of them train in a round.
    assert len((drawn / "prompts.jsonl").read_text().splitlines()) == 40
    assert found["upload_bytes"]["prompts_per_client"] is None
    assert found["rounds"][0]["upload_bytes"] == 0
    assert found["rounds"][1]["clients"] == 2
    assert found["rounds"][1]["gradient_diversity"] > 0
    assert list((drawn / "tensorboard").iterdir())
    # One epoch more on real images starts where the one-shot model was, and not from random weights.
    assert results(tuned)["rounds"][0]["accuracy"] > found["rounds"][0]["accuracy"] - 0.1


def test_a_comparison_names_the_run_that_failed_and_does_the_others(tmp_path):
    folder = {"dataset": "folder", "class-names": "cat,dog", "connect-timeout-s": 60.0}  # without any folder
    experiment = {
        "title": "Fails",
        "clients": 2,
        "seeds": [0],
        "settings": {"num-server-rounds": 1, "model": "cnn"},
        "columns": {"all": {}},
        "rows": {"FGL": folder, "Centralized": {"method": "centralized"}},
    }
    (tmp_path / "fails.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))

    output = fgl("compare", "fails.yaml", "--output-dir", "out", cwd=tmp_path, expect=1)

    runs = tmp_path / "out" / "runs"
    log = runs / "fgl--all--seed-0.log"
    assert "1 of 2 failed: fgl--all--seed-0. Their logs" in output
    assert str(runs) in output
    assert "2 of 2 failed: The client has no usable images" in log.read_text()
    assert not log.with_suffix("").joinpath("results.json").exists()
    assert results(runs / "centralized--all--seed-0")["final_accuracy"] > 0.5
    assert "| FGL | — |" in (tmp_path / "out" / "table.md").read_text()


def _value(text: str) -> int | float | str:
    return int(text) if text.isdigit() else float(text) if text[0].isdigit() else text
