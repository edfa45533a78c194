import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from flwr.app import ArrayRecord
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms

from fgl_app.data.images import ImageSet
from fgl_app.errors import ConfigError, ModelError
from fgl_app.models import build_model, from_arrays, imagenet_weights, load_checkpoint, to_arrays
from fgl_app.training import augment, evaluate, normalize, prefetched, taken_on_device, train

CPU = torch.device("cpu")


def two_classes(per_class: int = 16) -> ImageSet:
    """Dark and bright noise: separable by one threshold."""
    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 100, (per_class, 3, 8, 8), generator=generator)
    bright = torch.randint(150, 250, (per_class, 3, 8, 8), generator=generator)
    return ImageSet(torch.cat([dark, bright]).to(torch.uint8), torch.tensor([0] * per_class + [1] * per_class))


def fit(model, data, seed=0, **changes):
    options = {
        "epochs": 3, "batch_size": 8, "learning_rate": 0.01, "weight_decay": 0.0, "augmentation": "crop", "device": CPU,
    }  # fmt: skip
    return train(model, data, generator=torch.Generator().manual_seed(seed), **(options | changes))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_a_small_image_keeps_its_resolution_in_the_stem(name):
    model = build_model(name, 7, 16, seed=0).eval()

    assert model.conv1.stride == (1, 1)
    assert isinstance(model.maxpool, nn.Identity)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_a_large_image_keeps_the_stem_of_the_paper():
    assert build_model("resnet18", 7, 64, seed=0).conv1.kernel_size == (7, 7)


def test_any_classifier_of_torchvision_is_built_by_name():
    assert build_model("squeezenet1_1", 5, 64, seed=0).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()

    first, same, other = (build_model("resnet18", 3, 8, seed).fc.weight for seed in (1, 1, 2))

    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_and_integer_buffers_survive_a_record():
    model = build_model("resnet18", 3, 8, seed=0)
    model.bn1.num_batches_tracked += 5

    copy = from_arrays(build_model("resnet18", 3, 8, seed=1), to_arrays(model))

    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values(), strict=True))
    assert copy.bn1.num_batches_tracked.dtype == torch.int64


def test_arrays_of_another_model_are_refused():
    with pytest.raises(ModelError, match="must fit the model"):
        from_arrays(build_model("resnet18", 3, 8, seed=0), ArrayRecord({"weight": torch.zeros(1)}))


def test_training_learns_and_is_repeatable():
    data = two_classes()
    model, again, other = (build_model("resnet18", 2, 8, seed=0) for _ in range(3))
    before = evaluate(model, data, CPU)
    # At a constant step size the end of so few steps is a matter of the last bits.
    options = {"epochs": 12, "batch_size": 16, "schedule": "cosine"}

    loss = fit(model, data, **options)

    assert evaluate(model, data, CPU).accuracy > max(0.9, before.accuracy)
    assert fit(again, data, **options) == loss
    assert fit(other, data, seed=1, **options) != loss
    assert torch.equal(model.fc.weight, again.fc.weight)


def test_a_last_batch_of_one_image_trains():
    data = two_classes(8).take([0, 1, 2, 3, 4, 5, 6, 7, 8])

    assert fit(build_model("resnet18", 2, 8, seed=0), data) > 0


def test_the_loss_is_the_mean_over_images():
    model = build_model("resnet18", 2, 8, seed=0)
    data = two_classes(3)
    # As torchvision normalizes for its pretrained weights.
    pixels = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(data.images.float() / 255)
    logits = model.eval()(pixels)

    expected = nn.functional.cross_entropy(logits, data.labels).item()

    assert evaluate(model, data, CPU).loss == pytest.approx(expected, rel=1e-5)


def ramps(count, side=16):
    """Images that grow from left to right."""
    return torch.linspace(0, 255, side).to(torch.uint8).expand(count, 3, side, side)


def test_each_image_gets_a_crop_of_its_own(generator):
    images = ramps(8)

    cropped = augment(images, "crop", generator)

    assert len({tuple(row.flatten().tolist()) for row in cropped}) == 8
    # A crop of a ramp stays a ramp: never mirrored, never beyond the original's values.
    assert (cropped.diff(dim=-1) >= -1e-6).all()
    whole = normalize(images)
    assert cropped.min() >= whole.min() - 1e-6
    assert cropped.max() <= whole.max() + 1e-6


def test_about_half_of_the_images_are_flipped(generator):
    flipped = augment(ramps(200), "crop-flip", generator).diff(dim=-1).mean((1, 2, 3)) < 0

    assert 70 < int(flipped.sum()) < 130


def test_no_augmentation_changes_nothing(generator):
    images = ramps(2)

    assert torch.equal(augment(images, "none", generator), normalize(images))


def test_crops_do_not_depend_on_how_many_are_cropped_at_a_time(monkeypatch):
    images = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8)

    together = augment(images, "crop-flip", torch.Generator().manual_seed(1))
    monkeypatch.setattr("fgl_app.training._CACHED_VALUES", 2 * 3 * 12 * 12)
    in_pairs = augment(images, "crop-flip", torch.Generator().manual_seed(1))

    assert torch.equal(together, in_pairs)


def test_half_precision_moves_no_crop():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)

    exact = augment(images, "crop-flip", torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        half = augment(images, "crop-flip", torch.Generator().manual_seed(1))

    assert half.dtype == torch.float32
    assert torch.equal(half, exact)


def test_a_cosine_schedule_ends_with_small_steps():
    def last_movement(schedule):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
        seen = []

        def keep(epoch, loss):
            seen.append(model[1].weight.detach().clone())

        with torch.no_grad():
            model[1].weight.zero_()
        fit(model, two_classes(), epochs=10, schedule=schedule, on_epoch=keep)
        return (seen[-1] - seen[-2]).norm()

    assert last_movement("cosine") < 0.2 * last_movement("constant")


def test_the_cnn_is_mcmahans():
    model = build_model("cnn", 10, 28, seed=0)

    # Two 5 x 5 convolutions, 512 units and the classes: McMahan's 1,663,370 for grey images, and 2 more input channels.
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_663_370 + 2 * 25 * 32
    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 10)


def test_imagenet_weights_are_loaded_where_they_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    pretrained = torchvision.models.resnet18().state_dict()
    torch.save(pretrained, folder / weights.url.rsplit("/", 1)[1])

    model = build_model("resnet18", 7, 16, seed=0, imagenet=True)

    assert torch.equal(model.layer1[0].conv1.weight, pretrained["layer1.0.conv1.weight"])
    assert model.fc.weight.shape == (7, 512)  # stays random, like the small stem
    assert torch.equal(model.conv1.weight, build_model("resnet18", 7, 16, seed=0).conv1.weight)


def test_densenets_weights_have_the_old_names_of_its_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / torchvision.models.DenseNet121_Weights.DEFAULT.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    pretrained = torchvision.models.densenet121().state_dict()
    torch.save(
        {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): pretrained[key] for key in pretrained}, file
    )

    found = imagenet_weights("densenet121")

    assert found.keys() == pretrained.keys()
    torch.save(Path("executed"), file)  # a pickle of something else than tensors
    with pytest.raises(ConfigError, match="`initial-weights`"):
        build_model("densenet121", 7, 32, seed=0, imagenet=True)


def test_imagenet_weights_that_cannot_be_had_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    for name in ("resnet18", "cnn"):
        with pytest.raises(ConfigError, match="`initial-weights`"):
            build_model(name, 7, 16, seed=0, imagenet=True)


def test_a_runs_checkpoint_is_loaded_and_a_wrong_one_refused(tmp_path):
    model = build_model("cnn", 3, 8, seed=1)
    save_file(model.state_dict(), tmp_path / "round-0001.safetensors")

    loaded = load_checkpoint(str(tmp_path / "round-0001.safetensors"), build_model("cnn", 3, 8, seed=0))

    assert torch.equal(loaded[0].weight, model[0].weight)
    for path, other in ((tmp_path / "absent", model), (tmp_path / "round-0001.safetensors", nn.Linear(1, 1))):
        with pytest.raises(ConfigError, match="`initial-weights`"):
            load_checkpoint(str(path), other)


def test_batches_from_a_mapped_file_are_those_from_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    mapped = torch.from_file(str(tmp_path / "images"), shared=True, size=images.numel(), dtype=torch.uint8).view(
        images.shape
    )
    mapped.copy_(images)
    labels = torch.arange(23)
    order = torch.randperm(23, generator=generator).split(5)

    near = list(taken_on_device(ImageSet(images, labels), order))
    far = list(prefetched(ImageSet(mapped, labels), order, torch.device("cpu")))

    assert all(torch.equal(a, b) for one, other in zip(near, far, strict=True) for a, b in zip(one, other, strict=True))
    assert list(prefetched(ImageSet(mapped, labels), [], torch.device("cpu"))) == []
