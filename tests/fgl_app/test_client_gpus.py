import pytest

from fgl_app.config import parse_run_config
from fgl_app.errors import ConfigError
from fgl_app.simulation import check_client_gpus, simulate


@pytest.mark.parametrize(
    ("device", "client_gpus", "advice"),
    [
        ("cuda", 0.0, r"`--client-gpus` is 0\. Use device=auto.*--client-gpus 0\.5"),
        ("cuda:1", 0.0, r"`--client-gpus` is 0\."),
        ("cuda:1", 0.5, r"sees its GPU as cuda:0, but is cuda:1\. Use CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_a_gpu_that_the_simulated_clients_would_not_see_is_refused_before_anything_starts(device, client_gpus, advice):
    with pytest.raises(ConfigError, match=advice):
        simulate({"device": device}, num_clients=2, client_cpus=1, client_gpus=client_gpus)


@pytest.mark.parametrize(
    ("overrides", "client_gpus"),
    [
        ({}, 0.0),
        ({"device": "cpu"}, 0.0),
        ({"device": "cuda", "method": "centralized"}, 0.0),
        ({"device": "cuda:0"}, 1),
    ],
)
def test_other_devices_are_in_order(run_config, overrides, client_gpus):
    check_client_gpus(parse_run_config(run_config | overrides).run, client_gpus)
