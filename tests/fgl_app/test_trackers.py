import sys

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fgl_app.config import parse_run_config
from fgl_app.errors import ConfigError
from fgl_app.reporting.trackers import open_trackers


def test_tensorboard_receives_every_metric_of_every_round(run_config, tmp_path):
    settings = parse_run_config(run_config | {"trackers": "tensorboard"})

    (tracker,) = open_trackers(settings, tmp_path)
    for number in (1, 2):
        tracker.log(number, {"accuracy": number / 4, "loss": 1.0})
    tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [(1, 0.25), (2, 0.5)]
    assert {"accuracy", "loss"} <= set(events.Tags()["scalars"])


def test_mlflow_goes_on_with_its_run_after_a_restart(run_config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder instead of a server or a database

    for number, rounds in ((1, 5), (2, 8)):  # the second start asks for more rounds
        settings = parse_run_config(run_config | {"trackers": "mlflow", "num-server-rounds": rounds})
        (tracker,) = open_trackers(settings, tmp_path)
        tracker.log(number, {"accuracy": number / 4})
        tracker.close()

    (run,) = mlflow.search_runs(experiment_names=["federated-generative-learning"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "accuracy")
    assert [(item.step, item.value) for item in history] == [(1, 0.25), (2, 0.5)]
    assert run.data.params["num-server-rounds"] == "5"


def test_wandb_goes_on_with_its_run_after_a_restart_and_is_sent_no_output(run_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = parse_run_config(run_config | {"trackers": "wandb"})

    for number in (1, 2):
        (tracker,) = open_trackers(settings, tmp_path)
        tracker.log(number, {"accuracy": number / 4})
        sys.stdout.write("a word of a library\n")
        tracker.close()

    run_id = (tmp_path / "wandb-run.txt").read_text()
    first, second = (path.read_bytes() for path in sorted((tmp_path / "wandb").glob(f"offline-*/run-{run_id}.wandb")))
    assert b"accuracy\x82\x01\x040.25" in first  # a name, a tag and the length of a text, in the format of the file
    assert b"accuracy\x82\x01\x030.5" in second
    assert b"num-server-rounds" in first
    assert b"a word of a library" not in first + second


def test_an_unknown_tracker_is_refused(run_config):
    with pytest.raises(ConfigError, match="`trackers` must list tensorboard, wandb, mlflow"):
        parse_run_config(run_config | {"trackers": "tensorboard, excel"})


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # whether it is installed or not, it cannot be imported now

    with pytest.raises(ConfigError, match="pip install mlflow"):
        open_trackers(parse_run_config(run_config | {"trackers": "mlflow"}), None)
