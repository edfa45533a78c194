import logging

import pytest
import torch
from torch import nn

from fgl_app.checks import check_settings
from fgl_app.config import parse_run_config
from fgl_app.models import build_model, size_of, to_arrays
from fgl_app.rng import derive_seed


def mcmahans(side, num_classes=10):
    """Count weights: two convolutions of 5 x 5, a layer from 64 maps of ``side`` x ``side`` to 512, and one to K."""
    return (3 * 25 + 1) * 32 + (32 * 25 + 1) * 64 + (64 * side**2 + 1) * 512 + 513 * num_classes


@pytest.mark.parametrize(("size", "side"), [(8, 2), (16, 4), (28, 7), (32, 8), (35, 8), (36, 7), (64, 7), (224, 7)])
def test_the_cnn_does_not_grow_with_large_images(size, side):
    model = build_model("cnn", 10, size, seed=0)

    assert sum(weight.numel() for weight in model.parameters()) == mcmahans(side)
    assert list(model.state_dict()) == [f"{layer}.{kind}" for layer in (0, 3, 7, 9) for kind in ("weight", "bias")]
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_the_cnn_of_small_images_is_as_it_was_to_the_last_bit(size):
    model = build_model("cnn", 10, size, seed=3)

    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(derive_seed(3, "initial-weights"))
        plain = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(images), model(images))


@pytest.mark.parametrize("name", ["cnn", "resnet18", "shufflenet_v2_x0_5", "googlenet"])
def test_the_size_of_a_model_is_that_of_what_clients_send(name):
    model = build_model(name, 7, 32, seed=0)

    weights, num_bytes = size_of(name, 7, 32)

    assert weights == sum(weight.numel() for weight in model.parameters())
    assert num_bytes == sum(array.numpy().nbytes for array in to_arrays(model).values())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        # 1,664,970 weights of 4 bytes are 6.66 MB; 3 clients x 4 rounds after the prompt round: 79.9 MB.
        (
            {"model": "cnn", "image-size": 224, "num-server-rounds": 5},
            "model cnn: 1,664,970 weights, 6.7 MB; sent back by 3 clients x 4 rounds: 80 MB",
        ),
        # 2 of 3 clients are drawn in each of 50 rounds: 100 x 2.33 MB.
        (
            {"image-size": 16, "num-server-rounds": 50, "method": "fedavg", "fraction-train": 0.5},
            "model cnn: 583,626 weights, 2.3 MB; sent back by 2 clients x 50 rounds: 233 MB",
        ),
        ({"image-size": 16, "num-server-rounds": 1}, "model cnn: 583,626 weights, 2.3 MB"),
        ({"image-size": 16, "num-server-rounds": 9, "method": "centralized"}, "model cnn: 583,626 weights, 2.3 MB"),
    ],
)
def test_a_start_says_how_large_the_model_is_and_what_its_rounds_send(run_config, caplog, overrides, told):
    with caplog.at_level(logging.INFO, "flwr"):
        check_settings(parse_run_config(run_config | overrides))

    assert [record.getMessage() for record in caplog.records if "model cnn" in record.getMessage()] == [told]
