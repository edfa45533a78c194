"""Replication, on arithmetic and on a generator that was really over-fitted on ten private images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from fgl_app.audit.backbones import open_backbone
from fgl_app.audit.material import all_real_images, open_material
from fgl_app.audit.replication_check import check_replication, verdict
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.data.images import ImageSet, resize
from fgl_app.data.sources import load_split
from fgl_app.errors import ConfigError, DataError
from fgl_app.models import build_model
from fgl_app.phases import draw_plan
from fgl_app.privacy.replication import find_replicas, top_pairs
from fgl_app.prompts import MergedPrompts
from fgl_app.synthesis.generator import load_pipeline

CPU = torch.device("cpu")
DRAWN = {"num-inference-steps": 20, "images-per-class": 4, "guidance-scale": 1.0}


def features(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, 20)).astype(np.float32)


def test_copies_are_found_beside_what_real_images_are_to_each_other():
    train, held_out, fresh = features(200, 0), features(100, 1), features(50, 2)
    copies = train[:5] + 0.05 * features(5, 3)

    found = find_replicas(np.concatenate([fresh, copies]), train, held_out)

    assert found.near_copies >= 5
    assert found.nearest[-5:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.replicates
    assert not find_replicas(fresh, train, held_out).replicates
    assert found.threshold == pytest.approx(np.quantile(found.baseline, 0.99))
    assert (found.similarity[:, 0] >= found.similarity[:, 1]).all()


def test_a_few_exact_copies_among_thousands_are_told():
    """Fifteen of 2,000 are less than the one in a hundred held-out images that are near-copies by definition."""
    train, held_out = features(200, 0), features(300, 1)
    found = find_replicas(np.concatenate([features(1985, 2), train[:15]]), train, held_out)

    said = verdict(found, "pixels")

    assert not found.more_near_copies
    assert found.replicates
    assert (found.near_identical, found.usual_identical) == (15, 0)
    assert found.beyond_baseline >= 15
    assert "do not replicate" not in said
    assert said.startswith("Some synthetic images are all but identical to private training images")
    assert " and 15 all but identical to a training image (0.999 and more), as are 0 of those 300 real images." in said


def test_duplicates_within_a_data_set_are_no_copies_of_the_generator():
    train, fresh = features(200, 0), features(100, 1)
    held_out = np.concatenate([fresh, train[:5]])

    same = find_replicas(np.concatenate([features(400, 2), train[:19]]), train, held_out)
    more = find_replicas(np.concatenate([features(400, 2), train[:21]]), train, held_out)

    # 5 of 105 held-out images are in the training set: as large a share as 20 of 420.
    assert (same.near_identical, same.copies) == (19, False)
    assert verdict(same, "pixels").startswith("The synthetic images do not replicate private training images: ")
    assert more.copies


def test_the_search_is_exact_and_knows_no_scale():
    train, queries = features(50, 0), features(10, 1)
    centred, asked = train - train.mean(axis=0), queries - train.mean(axis=0)
    cosines = (asked / np.linalg.norm(asked, axis=1, keepdims=True)) @ (
        centred / np.linalg.norm(centred, axis=1, keepdims=True)
    ).T

    found = find_replicas(queries, train, queries, num_neighbours=3)

    assert np.array_equal(found.nearest, np.argsort(-cosines, axis=1)[:, :3])
    assert np.allclose(found.similarity[:, 0], cosines.max(axis=1), atol=1e-5)
    assert np.allclose(find_replicas(7 * queries, 7 * train, queries).similarity, found.similarity[:, :2], atol=1e-5)


def test_a_training_image_is_shown_once():
    train = features(20, 0)
    found = find_replicas(np.concatenate([train[:2], train[:1] * 1.01]), train, features(10, 1))

    pairs = top_pairs(found, 5)

    assert sorted(real for _, real, _ in pairs) == [0, 1]
    assert pairs[0][2] >= pairs[1][2]


@pytest.mark.parametrize("name", ["cnn", "resnet18", "mobilenet_v3_small"])
def test_the_features_of_a_classifier_are_what_its_last_layer_reads(name):
    model = build_model(name, 10, 16, seed=0).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    backbone = open_backbone("classifier", lambda: model, 16, CPU)

    found = backbone(ImageSet(images, torch.zeros(3, dtype=torch.int64)))

    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    assert found.shape == (3, last.in_features)
    assert len(np.unique(found, axis=0)) == 3


def test_a_vision_model_of_a_folder_gives_features(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)

    found = open_backbone(str(tmp_path), lambda: torch.nn.Identity(), 16, CPU)(ImageSet(images, torch.zeros(3)))

    assert found.shape == (3, 16)
    assert len(np.unique(found, axis=0)) == 3


def test_a_classifier_of_torchvision_gives_the_features_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), file)
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)

    found = open_backbone("resnet18", lambda: torch.nn.Identity(), 16, CPU)(ImageSet(images, torch.zeros(3)))

    model.fc = torch.nn.Identity()
    with torch.inference_mode():
        expected = model(torchvision.models.ResNet18_Weights.DEFAULT.transforms()(resize(images, 224)))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_a_backbone_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`--backbone` must be pixels"):
        open_backbone(str(tmp_path), lambda: torch.nn.Identity(), 16, CPU)


@pytest.fixture(scope="module")
def over_fitted(tmp_path_factory):
    """The shipped generator, trained on for sixty steps on nothing but one private image of each class."""
    chosen = parse_run_config(default_run_config() | {"image-size": 32})
    train, names = load_split(chosen.card, chosen.data, "train", 0), chosen.card.class_names()
    rows = [int((train.labels == label).nonzero()[3]) for label in range(10)]
    plan = draw_plan(chosen, MergedPrompts((), names), tmp_path_factory.mktemp("none"))
    pipeline = load_pipeline(plan.settings, CPU)
    with torch.no_grad():
        clean = pipeline.vae.encode(train.images[rows].float() / 127.5 - 1).latent_dist.mean
        clean *= pipeline.vae.config.scaling_factor
        asked = [f"a handwritten {name}" for name in names]
        tokens = pipeline.tokenizer(asked, padding="max_length", truncation=True, return_tensors="pt")
        hidden = pipeline.text_encoder(tokens.input_ids).last_hidden_state
    steps, which, generator = 60, torch.arange(20) % 10, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        timesteps = torch.randint(0, 1000, (len(which),), generator=generator)
        noise = torch.randn(len(which), *clean.shape[1:], generator=generator)
        noisy = pipeline.scheduler.add_noise(clean[which], noise, timesteps)
        target = pipeline.scheduler.get_velocity(clean[which], noise, timesteps)
        loss = F.mse_loss(pipeline.unet(noisy, timesteps, hidden[which]).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    folder = tmp_path_factory.mktemp("over-fitted")
    pipeline.save_pretrained(folder)
    return folder


def test_an_over_fitted_generator_replicates(make_run, over_fitted):
    material = open_material(make_run(**DRAWN, generator=str(over_fitted), **{"run-name": "over-fitted"}), None, [])

    check = check_replication(material, "pixels")

    assert check.content["replicates"]
    assert check.content["near_copies"] > 0.8 * check.content["num_synthetic"]
    assert check.findings[0].startswith("The synthetic images replicate private training images: ")
    # Each of the ten private images is the nearest of some synthetic one.
    assert min(check.content["top_similarities"][:10]) > check.content["threshold"]


def test_the_shipped_generator_does_not(make_run):
    material = open_material(make_run(**DRAWN), None, [])

    check = check_replication(material, "pixels")

    assert not check.content["replicates"]
    assert check.content["near_copies"] <= 0.05 * check.content["num_synthetic"]
    assert check.findings[0].startswith("The synthetic images do not replicate private training images: ")
    assert set(check.figures) == {"similarity", "pairs"}


def test_members_are_the_clients_training_images_and_others_the_test(make_run, settings):
    material = open_material(make_run(), None, [])

    real = all_real_images(material, 8)

    assert torch.equal(real.members.images, load_split(settings.card, settings.data, "train", 0).images)
    assert torch.equal(real.others.images, load_split(settings.card, settings.data, "test", 0).images)


def test_images_that_never_left_the_clients_are_asked_for(make_fedavg, tmp_path):
    run = make_fedavg(**{"dataset": "folder", "class-names": "cat,dog", "run-name": "own"})

    with pytest.raises(DataError, match="--data-path FOLDER"):
        all_real_images(open_material(run, None, []), 8)

    for name in ("cat", "dog"):
        (tmp_path / "site" / name).mkdir(parents=True)
        for number in range(10):
            pixels = torch.full((3, 9, 9), 20 * number, dtype=torch.uint8)
            torchvision.io.write_png(pixels, str(tmp_path / "site" / name / f"{number}.png"))
    real = all_real_images(open_material(run, None, [tmp_path / "site"]), 8)
    assert (len(real.members), len(real.others)) == (14, 4)
