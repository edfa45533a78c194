import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fgl_app.config import default_run_config, parse_run_config
from fgl_app.environment import child_environment
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


def test_mlflow_without_an_address_keeps_its_files_in_the_runs_folder_and_goes_on_there(run_config, tmp_path):
    """Each start is a process with a working directory of its own that is deleted, as the ServerApp's."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path; from fgl_app.config import default_run_config, parse_run_config\n"
        "from fgl_app.reporting.trackers import open_trackers\n"
        "settings = parse_run_config(default_run_config() | {'trackers': 'mlflow', 'output-dir': '/nowhere'})\n"
        "open_trackers(settings, None)\n"
        "(tracker,) = open_trackers(settings, Path(sys.argv[1]))\n"
        "tracker.log(int(sys.argv[2]), {'accuracy': int(sys.argv[2]) / 4, 'clients': 3})\n"
        "tracker.close()"
    )
    environment = child_environment()
    environment.pop("MLFLOW_TRACKING_URI", None)
    for number in (1, 2):
        with tempfile.TemporaryDirectory(dir=tmp_path) as home:
            done = subprocess.run(
                [sys.executable, "-c", code, folder, str(number)], env=environment, cwd=home, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            assert os.listdir(home) == []

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("federated-generative-learning").experiment_id])
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(item.step, item.value) for item in history] == [(1, 0.25), (2, 0.5)]
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith(folder.as_uri())
    assert len(run.data.params) == len(default_run_config())


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("given", [{}, {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}])
def test_the_check_of_mlflow_leaves_the_environment_as_it_was(run_config, tmp_path, monkeypatch, is_there, given):
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/a.db" if is_there else "http://127.0.0.1:9")
    before = dict(os.environ)

    with contextlib.nullcontext() if is_there else pytest.raises(ConfigError, match="`trackers` mlflow"):
        open_trackers(parse_run_config(run_config | {"trackers": "mlflow"}), None)

    assert {name: value for name, value in os.environ.items() if "REQUEST" in name} == {
        name: value for name, value in before.items() if "REQUEST" in name
    }


def test_a_tracker_that_fails_in_the_middle_of_a_run_is_named_once_and_the_others_go_on(
    run_config, tmp_path, monkeypatch, caplog
):
    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    settings = parse_run_config(run_config | {"trackers": "mlflow,tensorboard"})
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)

    trackers = open_trackers(settings, tmp_path)
    for number in (1, 2, 3):
        for tracker in trackers:
            tracker.log(number, {"accuracy": number / 4})
        database.write_bytes(b"a disk that fails " * 4096)
    for tracker in trackers:
        tracker.close()

    said = [record.getMessage() for record in caplog.records if record.name == "flwr.trackers"]
    assert len(said) == 1
    assert re.match(r"The tracker mlflow has failed \(\w+\); the run goes on without it", said[0])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("accuracy")] == [0.25, 0.5, 0.75]


def test_mlflow_begins_anew_where_the_run_of_an_earlier_start_is_gone(run_config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'another.db'}")
    (tmp_path / "mlflow-run.txt").write_text("0123456789abcdef0123456789abcdef")
    settings = parse_run_config(run_config | {"trackers": "mlflow"})

    (tracker,) = open_trackers(settings, tmp_path)
    tracker.log(1, {"accuracy": 0.5})
    tracker.close()

    kept = (tmp_path / "mlflow-run.txt").read_text()
    assert mlflow.MlflowClient().get_run(kept).data.metrics == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("tracker", "surroundings", "sentence"),
    [
        ("wandb", {}, "`trackers` wandb needs a login, .* WANDB_MODE=offline.*"),
        (
            "wandb",
            {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
            "`trackers` wandb cannot be used: .* WANDB_MODE=offline.*",
        ),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "`trackers` mlflow cannot be used: .*127.0.0.1.*"),
        ("wandb", {"WANDB_MODE": "offline"}, r"\[\]"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_named_before_anything_is_made(tmp_path, tracker, surroundings, sentence):
    (tmp_path / "home").mkdir()
    environment = {
        name: value for name, value in child_environment().items() if not name.startswith(("WANDB_", "MLFLOW_"))
    }
    environment |= {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc")} | surroundings

    code = (
        "import sys\n"
        "from fgl_app.config import default_run_config, parse_run_config\n"
        "from fgl_app.errors import FGLError\n"
        "from fgl_app.reporting.trackers import open_trackers\n"
        "settings = parse_run_config(default_run_config() | {'trackers': sys.argv[1]})\n"
        "try: print(open_trackers(settings, None))\n"
        "except FGLError as error: print(error)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, tracker], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert re.fullmatch(sentence, done.stdout.splitlines()[-1]), done.stdout
    assert list(tmp_path.rglob("*.db")) == []


def test_wandb_goes_on_with_its_run_after_a_restart_and_is_sent_no_output(run_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = parse_run_config(run_config | {"trackers": "wandb"})

    for number in (1, 2):
        (tracker,) = open_trackers(settings, tmp_path)
        tracker.log(number, {"accuracy": number / 4})
        sys.stdout.write("a word of a library\n")
        tracker.close()

    run_id = (tmp_path / "wandb-run.txt").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-*/run-{run_id}.wandb"))
    deadline = time.monotonic() + 120  # another process writes them
    while not all(b"accuracy" in path.read_bytes() for path in files) and time.monotonic() < deadline:
        time.sleep(0.5)
    first, second = (path.read_bytes() for path in files)
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
