import pytest

from fgl_app.comparison import compare
from fgl_app.config import APP_FOLDER, parse_run_config
from fgl_app.errors import ConfigError
from fgl_app.resources import check_client_resources, machine_resources
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


@pytest.mark.parametrize(
    ("client_cpus", "client_gpus", "num_cpus", "num_gpus", "sentence"),
    [
        (3, 0.0, 2, 0, r"`--client-cpus` is 3, but this machine has 2, .* Use at most --client-cpus 2\."),
        (1, 0.25, 8, 0, r"`--client-gpus` is 0.25, but PyTorch finds no GPU"),
        (1, 2.0, 8, 1, r"`--client-gpus` is 2, but this machine has 1, .* Use at most --client-gpus 1\."),
        (1, 1.5, 8, 2, r"`--client-gpus` is 1.5, but a client .* Use --client-gpus 1\."),
        (1, float("nan"), 8, 2, r"`--client-gpus` is nan"),
    ],
)
def test_clients_of_which_none_could_start_are_refused(client_cpus, client_gpus, num_cpus, num_gpus, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_client_resources(client_cpus, client_gpus, num_cpus, num_gpus)


def test_clients_may_have_all_that_there_is():
    check_client_resources(2, 0.0, 2, 0)
    check_client_resources(1, 2.0, 16, 2)
    check_client_resources(1, 0.3, 16, 1)


def test_this_machine_is_asked_before_anything_starts(tmp_path):
    num_cpus, num_gpus = machine_resources()
    experiment = APP_FOLDER / "examples" / "digits" / "table1.yaml"

    with pytest.raises(ConfigError, match=f"`--client-cpus` is {num_cpus + 1}, but this machine has {num_cpus},"):
        simulate({"output-dir": str(tmp_path)}, num_clients=2, client_cpus=num_cpus + 1, client_gpus=0)
    with pytest.raises(ConfigError, match="`--client-gpus` is"):
        compare(
            experiment, tmp_path, data_dir=None, jobs=1, client_cpus=1, client_gpus=num_gpus + 1.0, say=lambda _: None
        )
    assert list(tmp_path.iterdir()) == []
