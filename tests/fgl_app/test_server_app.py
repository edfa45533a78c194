import json

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import load_file

from fgl_app.config import parse_run_config
from fgl_app.phases import initial_arrays
from fgl_app.server_app import check_settings, run


@pytest.fixture
def train_rounds(make_grid, run_config, tmp_path):
    """Return a function that starts a run, or goes on with it, and returns its folder."""

    def go(name, rounds, **overrides):
        changed = {key.replace("_", "-"): value for key, value in overrides.items()}
        config = run_config | changed | {"run-name": name, "num-server-rounds": rounds}
        run(make_grid(**overrides), check_settings(parse_run_config(config)))
        return tmp_path / "runs" / name

    return go


def test_a_server_optimizer_goes_on_after_a_restart_as_if_nothing_had_happened(train_rounds):
    adam = {"method": "fedavg", "strategy": "FedAdam", "strategy_options": "eta=0.01"}

    whole = train_rounds("whole", 3, **adam)
    train_rounds("halves", 2, **adam)
    halves = train_rounds("halves", 3, **adam)

    for name in ("round-0003.safetensors", "round-0003.strategy.safetensors"):
        assert (halves / "checkpoints" / name).read_bytes() == (whole / "checkpoints" / name).read_bytes()


def test_private_rounds_state_their_epsilon_and_a_resumed_run_counts_those_of_the_earlier_start(train_rounds):
    private = {
        "method": "fedavg", "weighting": "uniform", "client_dp": "adaptive", "example_dp_noise": 2.0,
        "batch_size": 16,
    }  # fmt: skip

    whole = json.loads((train_rounds("whole", 3, **private) / "results.json").read_text())["privacy"]
    first = train_rounds("halves", 1, **private)
    norm = first / "checkpoints" / "round-0001.strategy.safetensors"
    reached = load_file(norm)["clipping_norm"].item()
    once = json.loads((first / "results.json").read_text())["privacy"]
    folder = train_rounds("halves", 3, **private)
    found = json.loads((folder / "results.json").read_text())

    assert reached != 1.0
    assert found["privacy"] == whole  # epsilon depends on no draw, but on the rounds and the numbers of images alone
    for before, after in zip(once["mechanisms"], found["privacy"]["mechanisms"], strict=True):
        assert before["epsilon"] < after["epsilon"]
    assert [row["drawn"] for row in found["rounds"]] == [[3, 3]] * 3
    assert "gradient_diversity" not in found["rounds"][0]


def test_clients_that_train_privately_withhold_their_losses(make_grid, settings):
    grid = make_grid(example_dp_noise=1.0)
    content = RecordDict(
        {
            "arrays": initial_arrays(settings, settings.card.class_names()),
            "config": ConfigRecord({"server-round": 1}),
        }
    )

    (reply,) = grid.send_and_receive([Message(content, dst_node_id=1000, message_type="train")])

    assert reply.content["metrics"]["loss"] == 0.0
    assert reply.content["metrics"]["train_loss"] == 0.0
