import pytest

from fgl_app.config import parse_run_config
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
