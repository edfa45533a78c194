"""Two runs that draw different clients leave folders that differ in nothing but what noise made."""

import json

import numpy as np
import pytest

from fgl_app.checks import check_settings
from fgl_app.config import parse_run_config
from fgl_app.errors import DataError
from fgl_app.files import read_json_lines
from fgl_app.reporting.report import write_report
from fgl_app.server_app import run

PRIVATE = {
    "weighting": "uniform", "fraction-train": 0.5, "partition": "iid", "min-samples-per-client": 0,
    "num-server-rounds": 2, "client-dp": "fixed", "client-dp-noise": 0.01,
}  # fmt: skip
NODES = {
    1000: {"partition-id": 0, "num-partitions": 2},
    1001: {"partition-id": 150, "num-partitions": 200},
    1002: {"partition-id": 1, "num-partitions": 20},
}
"""Clients of 419, 4 and 42 images, whose partition ids and numbers of images take one, two and three bytes."""
NOISED = {
    "accuracy", "loss", "validation_accuracy", "final_accuracy", "selected_accuracy", "selected_round", "paper_metric",
    "one_shot_accuracy",
}  # fmt: skip


@pytest.fixture
def draw(make_grid, run_config, tmp_path, monkeypatch):
    """Return a function that runs a federation, and returns its folder and whom it asked to train, by round."""
    seeded = np.random.default_rng

    def go(name, seed, unusable=(), **overrides):
        # The draw's seed is secret: the operating system's. Here it is chosen, so that the draws differ for certain.
        generator = seeded(seed)
        monkeypatch.setattr(np.random, "default_rng", lambda given=None: generator if given is None else seeded(given))
        changed = PRIVATE | overrides
        grid = make_grid(**{key.replace("-", "_"): value for key, value in changed.items()})
        grid.node_configs = dict(NODES)
        drawn = []
        answer = grid._call

        def answered(message):
            if message.metadata.message_type == "train":
                drawn.append(message.metadata.dst_node_id)
                grid.broken = set(unusable)
            return answer(message)

        monkeypatch.setattr(grid, "_call", answered)
        run(grid, check_settings(parse_run_config(run_config | changed | {"output-dir": str(tmp_path / name)})))
        return tmp_path / name / str(run_config["run-name"]), drawn

    return go


def told(folder):
    """Return what the files of a run say, without measures of the noised model, and the sizes of its weights."""

    def without_noise(value):
        if isinstance(value, dict):
            kept = value.keys() - NOISED - {"output-dir", "output_dir"}
            return {key: without_noise(value[key]) for key in kept}
        return [without_noise(each) for each in value] if isinstance(value, list) else value

    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = without_noise(read_json_lines(path))
        elif path.suffix == ".json" and path.name != "confusion.json":
            found[name] = without_noise(json.loads(path.read_text()))
        elif path.is_file():
            found[name] = path.stat().st_size if path.suffix == ".safetensors" else None
    return found


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "client-fixed", "client-adaptive"])
def test_the_folders_of_two_draws_are_alike(draw, kind):
    (one, first), (other, second) = (
        draw(name, seed, method="fedavg", **{"client-dp": kind}) for name, seed in (("one", 0), ("other", 5))
    )

    assert (len(first), len(second)) == (4, 4)  # two of three in each of two rounds
    assert [sorted(first[:2]), sorted(first[2:])] != [sorted(second[:2]), sorted(second[2:])]
    assert told(one) == told(other)


def test_the_folders_of_two_draws_are_alike_after_a_prompt_round(draw):
    small = {"min-clients-per-prompt": 2, "server-finetune-epochs": 1}
    (one, first), (other, second) = (draw(name, seed, **small) for name, seed in (("one", 0), ("other", 5)))

    assert len(first) == len(second) == 2
    assert sorted(first) != sorted(second)
    written, again = told(one), told(other)
    for found in (written, again):
        results = found["results.json"]
        assert {"prompts", "synthesis", "pretraining", "finetuning"} == set(results["seconds"])
        assert ["seconds" in row for row in results["rounds"]] == [True, False]
        # What the server does before anybody is drawn takes its time.
        del results["seconds"], results["synthesis"], results["rounds"][0]["seconds"]
        del found["metrics.jsonl"][0]["seconds"]
        for name in [name for name in found if name.startswith("synthetic/")]:
            del found[name]
        results["rounds"][0].pop("reused_seconds", None)
        found["metrics.jsonl"][0].pop("reused_seconds", None)
    assert written == again


def test_why_a_client_that_was_drawn_failed_is_told_to_the_log_alone(draw, caplog):
    folder, _ = draw("failed", 0, unusable=[1001], method="fedavg")

    text = (folder / "results.json").read_text()
    assert DataError.client_sentence not in text
    assert "The client failed" not in text
    refused = [item for row in json.loads(text)["rounds"] for item in row.get("refused", [])]
    assert refused
    assert {(item["client"], item["node"]) for item in refused} == {(None, None)}
    assert "because it could tell who was drawn" in write_report(folder).read_text()
    assert "The client failed; its own log holds the reason." in caplog.text


def test_the_size_that_is_told_is_that_of_the_weights_alone(draw):
    folder, _ = draw("sizes", 0, method="fedavg")

    weights = (folder / "checkpoints" / "round-0001.safetensors").stat().st_size
    for row in read_json_lines(folder / "metrics.jsonl"):
        assert row["upload_bytes"] == 2 * row["model_upload_bytes"]
        assert abs(row["model_upload_bytes"] - weights) < 4096  # headers of the two formats
