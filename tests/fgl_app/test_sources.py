import itertools
import struct

import datasets
import numpy as np
import pytest
import torch
from data_sets import (
    DOMAINNET_IDS,
    DOMAINS,
    HUB,
    encoded,
    picture,
    told,
    write_hub,
    write_hub_card,
    write_tree,
)
from PIL import Image
from torchvision.datasets import Imagenette

from fgl_app.cards import load_card
from fgl_app.config import parse_run_config
from fgl_app.data.sources import load_client_data, load_split
from fgl_app.errors import DataError


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")  # read when it was imported


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def load(run_config, source):
    """Loads the three parts that a run uses, at 8 px."""

    def load(dataset):
        settings = parse_run_config(run_config | {"dataset": str(dataset), "data-dir": str(source)})
        parts = [load_split(settings.card, settings.data, name, 0) for name in ("train", "validation", "test")]
        for part in parts:
            assert part.images.shape == (len(part), 3, 8, 8)
            assert part.images.dtype == torch.uint8
            assert part.labels.dtype == torch.int64
            assert sorted(part.labels.unique().tolist()) == list(range(len(settings.card.classes)))
        return parts

    return load


def ids_of(card, part):
    return [card.classes[label].source_id for label in part.labels.tolist()]


@pytest.mark.parametrize("name", [name for name in HUB if name != "domainnet10"])
def test_hub_data_are_read_without_foreign_classes(name, load, source):
    card = load_card(name)
    image, label, num_classes, parts = HUB[name]
    ids = [item.source_id for item in card.classes]
    foreign = [*sorted(set(range(num_classes)) - set(ids))[-2:], -1]  # -1: without a label
    counts = {"train": 10, "validation": 2, "test": 2}
    for part, split in parts.items():
        rows = [(number,) for number in [*foreign, *ids] * counts[part]]
        write_hub(source, split, [image, label], rows, {label: datasets.ClassLabel(num_classes=num_classes)})

    train, validation, test = load(name)

    given = 10 * len(ids)  # a tenth of train is for validation, unless the source has a part for it
    own = "validation" in parts
    assert [len(train), len(validation), len(test)] == (
        [given, 2 * len(ids), 2 * len(ids)] if own else [given * 9 // 10, given // 10, 2 * len(ids)]
    )
    for part in (train, validation, test):
        assert told(part)[0] == ids_of(card, part)


def test_domainnet_is_read_with_its_domains(load, source):
    card = load_card("domainnet10")
    image, label, num_classes, parts = HUB["domainnet10"]
    features = {
        label: datasets.ClassLabel(num_classes=num_classes),
        "domain": datasets.ClassLabel(names=[*reversed(DOMAINS), "photo"]),  # names count, not their order
    }
    for part, split in parts.items():
        rows = list(itertools.product([0, *DOMAINNET_IDS], range(7))) * (10 if part == "train" else 2)
        write_hub(source, split, [image, label, "domain"], rows, features)

    train, validation, test = load("domainnet10")

    assert [len(train), len(validation), len(test)] == [540, 60, 120]
    for part in (train, validation, test):
        numbers, domains = told(part)
        assert numbers == ids_of(card, part)
        assert [5 - domain for domain in domains] == part.domains.tolist()
        assert set(part.domains.tolist()) == set(range(6))


@pytest.mark.parametrize("feature", [datasets.Value("string"), datasets.ClassLabel(names=["dog", "ant", "cat"])])
def test_classes_of_the_hub_may_be_known_by_name(feature, load, source, tmp_path):
    path = write_hub_card(tmp_path, [{"name": "kitty", "id": "cat"}, {"name": "doggy", "id": "dog"}])
    label = {"cat": 2, "dog": 0, "ant": 1}
    names = ["ant", "cat", "dog"]
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"image": [encoded(label[name]) for name in names] * 4, "label": names * 4})
        table = table.cast_column("image", datasets.Image()).cast_column("label", feature)
        table.to_parquet(str(source / f"{split}.parquet"))

    train, validation, test = load(path)

    assert [len(train), len(validation), len(test)] == [6, 2, 8]
    assert told(test)[0] == [2, 0] * 4
    assert test.labels.tolist() == [0, 1] * 4


def test_domains_of_the_hub_that_the_card_does_not_name_are_refused_by_name(load, source, tmp_path):
    path = write_hub_card(tmp_path, ["cat", "dog"], domains={"real": None}, columns={"domain": "style"})
    rows = [(0, 1), (1, 1)] * 4
    features = {"label": datasets.Value("int64"), "style": datasets.ClassLabel(names=["ink", "oil"])}
    write_hub(source, "train", ["image", "label", "style"], rows, features)

    with pytest.raises(DataError, match=r"but has oil\. Correct `domains`"):
        load(path)


def test_mnist_is_read_from_torchvisions_files(load, source):
    raw = source / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = {"train": np.tile(np.arange(10, dtype=np.uint8), 10), "t10k": np.arange(10, dtype=np.uint8)}
    for part, values in labels.items():
        images = np.broadcast_to(20 * values[:, None, None], (len(values), 28, 28)).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", values)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())

    train, validation, test = load("mnist")

    assert [len(train), len(validation), len(test)] == [90, 10, 10]
    assert test.images[:, 0, 4, 4].tolist() == [20 * label for label in test.labels.tolist()]


def test_imagenette_is_read_from_torchvisions_folders(load, source):
    def grey(number):
        return Image.new("RGB", (8, 8), (20 * number,) * 3)

    folder = source / "imagenette2-320"
    for part, count in (("train", 10), ("val", 2)):
        write_tree(folder / part, sorted(Imagenette._WNID_TO_CLASS), count, "jpeg", grey)

    train, validation, test = load("imagenette")

    assert [len(train), len(validation), len(test)] == [90, 10, 20]
    assert torch.equal((test.images[:, 0, 4, 4] / 20).round().long(), test.labels)


def test_eurosat_is_read_from_torchvisions_folders_and_divided(load, source):
    write_tree(source / "eurosat" / "2750", load_card("eurosat").class_names(), 10, "png")

    parts = load("eurosat")

    assert [len(part) for part in parts] == [70, 10, 20]
    assert all(told(part)[0] == part.labels.tolist() for part in parts)


def test_chest_xrays_are_read_from_their_folders(load, source):
    for part, count in (("train", 20), ("val", 8), ("test", 4)):
        write_tree(source / part, ["NORMAL", "PNEUMONIA"], count, "jpeg", lambda number: picture(0, 6 * number))

    train, validation, test = load("chest-xray")

    assert [len(train), len(validation), len(test)] == [36, 4, 8]
    assert ((test.images[:, 2, 4, 4] > 100).long()).tolist() == test.labels.tolist() == [0] * 4 + [1] * 4


def test_a_new_data_set_needs_only_a_card(tmp_path, source, run_config):
    path = tmp_path / "animals.yaml"
    path.write_text("""
        source: {kind: folder}
        splits: {train: images}
        validation: 0.2
        test: 0.2
        classes: [cat, {name: dog, prompt: "dog, not hot dog"}]
        domains:
          photo:
          drawing: {class: "a drawing of {a class}"}
        prompts: {class: "a photo of {a class}"}
        defaults: {augmentation: none}
    """)
    for number, domain in enumerate(["photo", "drawing"]):
        write_tree(source / "images" / domain, ["cat", "dog"], 10, "png", lambda label, it=number: picture(label, it))
    settings = parse_run_config(
        run_config | {"dataset": str(path), "data-dir": str(source), "partition": "domain", "num-clients": 2}
    )

    clients = [
        load_client_data(settings.card, settings.data, {"partition-id": number, "num-partitions": 2}, 0)
        for number in range(2)
    ]

    for number, client in enumerate(clients):
        assert len(client.train) == 12
        assert client.train.domains.tolist() == told(client.train)[1] == [number] * 12
        assert client.train.labels.tolist() == told(client.train)[0] == [0] * 6 + [1] * 6
        assert client.class_names == ("cat", "dog")
        held_out = client.held_out()
        assert [len(held_out.validation), len(held_out.test)] == [8, 8]
    assert settings.training.augmentation == "none"
    assert settings.card.classes[1].prompt == "dog, not hot dog"
    assert settings.prompt_form("drawing").class_templates == ("a drawing of {a class}",)
    assert settings.prompt_form("photo").class_templates == ("a photo of {a class}",)
    own = {"dataset": str(path), "data-dir": str(source), "class-prompt": "{a class} in a {domain}"}
    overridden = parse_run_config(run_config | own | {"negative-prompt": "no {domain}"})
    assert [overridden.prompt_form(name).class_templates[0] for name in ("photo", "drawing")] == [
        "{a class} in a photo", "{a class} in a drawing",
    ]  # fmt: skip
    assert overridden.prompt_form("drawing").negative == "no drawing"


def test_a_class_that_torchvision_lacks_is_refused(tmp_path, load):
    changes = {"source": {"kind": "torchvision", "name": "MNISTT"}, "splits": {"train": {}, "test": {}}}
    path = write_hub_card(tmp_path, ["cat", "dog"], **changes)

    with pytest.raises(DataError, match=r"`source.name`.*'MNISTT'"):
        load(path)
