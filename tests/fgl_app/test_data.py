import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import torch
import yaml
from data_sets import load_folder, write_fashion_mnist
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fgl_app.cards import load_card
from fgl_app.config import parse_run_config
from fgl_app.data.division import divide
from fgl_app.data.folder import class_folders, load_own, open_folder, split_rows
from fgl_app.data.images import to_pixels
from fgl_app.data.partition import partition_indices
from fgl_app.data.readers import open_part
from fgl_app.data.sources import load_client_data, load_split
from fgl_app.errors import ConfigError, DataError


def write_images(folder, counts):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 255, (12, 20, 3), np.uint8)).save(folder / name / f"{index}.png")


def client_data(settings, node_config, class_names=None):
    return load_client_data(settings.card, settings.data, node_config, 0, class_names)


def test_the_digits_split_is_disjoint_complete_and_never_changes():
    card = load_card("digits")
    parts = divide(card, open_part(card, "train", "").labels, 0)

    sizes = {"public": 599, "train": 838, "validation": 120, "test": 240}
    assert {name: len(rows) for name, rows in parts.items()} == sizes
    assert sorted(row for rows in parts.values() for row in rows) == list(range(1797))
    # The shipped models were trained on exactly this public third; another one would leak private images into them.
    digest = hashlib.sha256(np.array(parts["public"]).astype("<i8").tobytes()).hexdigest()
    assert digest == "d7f6553b632faa31dd4b27a58e8337f57d4215ba3649624de1615f7f5235ba3b"


def partition(labels, num_partitions, scheme, seed=3, beta=0.5, min_samples=10, domains=None):
    return partition_indices(
        labels, domains, num_partitions, scheme, beta=beta, classes_per_client=3, shards_per_client=2,
        min_samples=min_samples, seed=seed,
    )  # fmt: skip


SCHEMES = [("iid", 1.0), ("dirichlet", 0.01), ("dirichlet", 0.5), ("pathological", 1.0), ("shards", 1.0)]


@pytest.mark.parametrize(("scheme", "beta"), SCHEMES)
@pytest.mark.parametrize("num_partitions", [5, 8])
def test_a_partition_is_disjoint_complete_and_repeatable(scheme, beta, num_partitions):
    labels = (np.arange(400) % 10).tolist()

    parts = partition(labels, num_partitions, scheme, beta=beta)

    given = sorted(index for part in parts for index in part)
    if scheme == "pathological":  # a class that no client was given is left out
        classes = {labels[index] for index in given}
        assert given == [index for index in range(400) if labels[index] in classes]
    else:
        assert given == list(range(400))
    assert min(map(len, parts)) >= 10
    assert parts == partition(labels, num_partitions, scheme, beta=beta)
    assert parts != partition(labels, num_partitions, scheme, seed=4, beta=beta)


def test_a_small_beta_separates_the_classes():
    labels = (np.arange(1000) % 10).tolist()

    def classes_per_client(beta):
        parts = partition(labels, 5, "dirichlet", seed=0, beta=beta)
        return np.mean([len({labels[index] for index in part}) for part in parts])

    assert classes_per_client(0.01) < classes_per_client(100.0)


def test_a_pathological_client_has_its_number_of_classes():
    labels = (np.arange(400) % 10).tolist()

    assert {len({labels[index] for index in part}) for part in partition(labels, 10, "pathological")} == {3}


def test_a_client_per_domain():
    domains = [0, 1, 2] * 20

    parts = partition([0, 1] * 30, 3, "domain", domains=domains)

    assert [{domains[index] for index in part} for part in parts] == [{0}, {1}, {2}]
    with pytest.raises(DataError, match="number of domains, 3"):
        partition([0, 1] * 30, 4, "domain", domains=domains)


def test_a_thousand_clients():
    parts = partition((np.arange(4000) % 10).tolist(), 1000, "iid", min_samples=1)

    assert {len(part) for part in parts} == {4}


@pytest.mark.parametrize(
    ("labels", "num_partitions", "scheme", "settings", "sentence"),
    [
        ([0] * 20, 5, "iid", {"min_samples": 10}, "20 images to train on, too few for 5 clients with at least 10 each"),
        ([0] * 3, 5, "iid", {}, "3 images to train on, too few for 5 clients with at least 1 each"),
        ([0, 1] * 419, 5, "shards", {"shards_per_client": 500}, r"5 clients need 2500 shards.* Use at most 167\."),
        ([0, 1] * 9, 2, "pathological", {"classes_per_client": 3}, r"have 2 classes\. Use at most 2\."),
        ([0] * 9 + [1], 3, "pathological", {"classes_per_client": 2}, "Use fewer clients, a smaller `classes-per-cl"),
        ([0] * 40, 4, "dirichlet", {"beta": 1e-6, "min_samples": 9}, "Use fewer clients, a larger `dirichlet-beta`"),
    ],
)
def test_an_impossible_partition_is_refused_with_the_key_that_makes_it_one(
    labels, num_partitions, scheme, settings, sentence
):
    others = {"beta": 0.5, "classes_per_client": 1, "shards_per_client": 1, "min_samples": 0, "seed": 3}
    with pytest.raises(DataError, match=sentence):
        partition_indices(labels, None, num_partitions, scheme, **others | settings)


@given(
    labels=st.lists(st.integers(0, 4), max_size=40),
    num_partitions=st.integers(1, 12),
    scheme=st.sampled_from(["iid", "dirichlet", "pathological", "shards", "domain"]),
    beta=st.floats(1e-6, 1e6),
    classes=st.integers(1, 6),
    shards=st.integers(1, 50),
    min_samples=st.integers(0, 6),
)
def test_any_settings_give_a_disjoint_division_or_a_sentence(
    labels, num_partitions, scheme, beta, classes, shards, min_samples
):
    domains = [label % 3 for label in labels]
    try:
        parts = partition_indices(
            labels, domains, num_partitions, scheme, beta=beta, classes_per_client=classes, shards_per_client=shards,
            min_samples=min_samples, seed=5,
        )  # fmt: skip
    except DataError:
        return
    rows = [row for part in parts for row in part]
    assert len(parts) == num_partitions
    assert len(rows) == len(set(rows))
    assert min(map(len, parts)) >= min_samples
    if scheme in ("iid", "dirichlet", "domain"):
        assert sorted(rows) == list(range(len(labels)))


def test_clients_hold_the_whole_train_part_and_no_held_out_image(settings):
    clients = [client_data(settings, {"partition-id": i, "num-partitions": 3}) for i in range(3)]

    assert sum(len(client.train) for client in clients) == 838
    assert {len(client.held_out().test) for client in clients} == {240}


def test_fewer_training_images_are_a_fixed_choice_with_all_classes(run_config):
    settings = parse_run_config(run_config | {"max-train-images": 100})

    first, second = (load_split(settings.card, settings.data, "train", 0) for _ in range(2))

    assert len(first) == 100
    assert torch.equal(first.images, second.images)
    assert torch.bincount(first.labels, minlength=10).min() >= 8


@pytest.mark.parametrize("node_config", [{}, {"partition-id": 3, "num-partitions": 3}, {"partition-id": 0}])
def test_a_node_without_a_place_is_refused(settings, node_config):
    with pytest.raises(DataError, match="partition-id"):
        client_data(settings, node_config)


def test_a_picture_is_padded_scaled_and_cropped_to_a_square():
    picture = Image.new("L", (28, 28), 255)

    assert to_pixels(picture, [("pad", 2)], 32)[0].sum() == 28 * 28 * 255
    assert to_pixels(picture, [("center-crop", 20), ("resize", 10)], 8).shape == (3, 8, 8)
    assert to_pixels(Image.new("RGB", (40, 20)), [], 16).shape == (3, 16, 16)


def test_fashion_mnist_is_read_from_the_files_that_debian_packages(tmp_path, run_config, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path / "cache"))
    write_fashion_mnist(tmp_path)
    settings = parse_run_config(run_config | {"dataset": "fashion-mnist", "data-dir": str(tmp_path), "image-size": 0})

    parts = {
        name: load_split(settings.card, settings.data, name, 0) for name in ("public", "train", "validation", "test")
    }

    assert {name: len(part) for name, part in parts.items()} == {
        "public": 200, "train": 180, "validation": 20, "test": 20,
    }  # fmt: skip
    assert parts["test"].images.shape == (20, 3, 28, 28)
    assert parts["test"].labels.tolist() == [*range(10), *range(10)]


def test_data_that_are_nowhere_are_named_with_advice(tmp_path, run_config, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path / "cache"))
    settings = parse_run_config(run_config | {"dataset": "fashion-mnist", "data-dir": str(tmp_path)})

    with pytest.raises(DataError, match=r"Fashion-MNIST.*`data-dir`"):
        load_split(settings.card, settings.data, "test", 0)


def test_a_folder_of_images_per_class_is_read_at_the_image_size(tmp_path, run_config):
    write_images(tmp_path / "site", {"cat": 10, "dog": 20})
    settings = parse_run_config(run_config | {"dataset": "folder", "class-names": "bird, cat, dog"})

    data = client_data(settings, {"data-path": str(tmp_path / "site")})

    assert data.train.images.shape == (21, 3, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert torch.bincount(data.train.labels, minlength=3).tolist() == [0, 7, 14]
    assert torch.bincount(data.held_out().test.labels, minlength=3).tolist() == [0, 2, 4]
    assert torch.bincount(data.held_out().validation.labels, minlength=3).tolist() == [0, 1, 2]


def test_a_folder_of_images_per_class_is_a_data_set_without_a_card(tmp_path, run_config):
    write_images(tmp_path / "pets", {"cat": 20, "dog": 20})
    settings = parse_run_config(
        run_config | {"dataset": str(tmp_path / "pets"), "partition": "pathological", "classes-per-client": 1}
    )

    clients = [client_data(settings, {"partition-id": number, "num-partitions": 2}) for number in range(2)]

    assert settings.card.class_names() == ("cat", "dog")
    assert sorted(set(client.train.labels.tolist()).pop() for client in clients) == [0, 1]
    assert [len(client.train) for client in clients] == [14, 14]  # 10 % are for validation, 20 % for the test
    assert len(load_split(settings.card, settings.data, "test", 0)) == 8
    with pytest.raises(ConfigError, match="at least two, but holds 0"):
        parse_run_config(run_config | {"dataset": str(tmp_path / "pets" / "cat")})


def node_with_a_card(folder):
    """Write 10 cats and 20 dogs and a card of them, and return the node-config that names both."""
    write_images(folder / "files" / "all", {"Felis": 10, "Canis": 20})
    card = {
        "title": "Pets of one site", "licence": "own", "source": {"kind": "folder"}, "splits": {"train": "all"},
        "validation": 0.1, "test": 0.2, "native-size": 20,
        "classes": [{"name": "dog", "id": "Canis"}, {"name": "cat", "id": "Felis"}],
        "prompts": {"class": ["a photo of {a class}"], "instance": "{class}, {caption}"},
    }  # fmt: skip
    (folder / "own.yaml").write_text(yaml.safe_dump(card))
    return {"card": str(folder / "own.yaml"), "data-path": str(folder / "files"), "partition-id": 3}


def test_a_node_may_hold_its_images_by_a_card_of_its_own(tmp_path, run_config):
    node = node_with_a_card(tmp_path)
    settings = parse_run_config(run_config | {"dataset": "folder", "class-names": "bird, cat, dog"})

    data = client_data(settings, node)

    assert (data.partition_id, data.class_names) == (3, ("bird", "cat", "dog"))
    assert data.train.images.shape == (21, 3, 8, 8)
    assert torch.bincount(data.train.labels, minlength=3).tolist() == [0, 7, 14]
    assert client_data(settings, node, ["cat", "dog"]).train.labels.max() == 1
    with pytest.raises(DataError, match="must be among cat, bird, but 'dog' is not"):
        client_data(settings, node, ["cat", "bird"])


def test_an_unreadable_image_of_a_nodes_own_card_is_left_out_and_counted(tmp_path, run_config):
    node = node_with_a_card(tmp_path)
    (tmp_path / "files" / "all" / "Felis" / "0.png").write_bytes(b"no image")
    settings = parse_run_config(run_config | {"dataset": "folder", "class-names": "cat, dog"})

    data = client_data(settings, node)

    assert data.num_unreadable == 1
    assert torch.bincount(data.train.labels, minlength=2).tolist() == [6, 14]  # of 10 and 20: 10 % and 20 % held out
    for image in (tmp_path / "files").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(DataError, match="None of these 30 images can be decoded"):
        client_data(settings, node)


def test_one_class_is_one_whichever_way_its_accents_are_written(tmp_path):
    write_images(tmp_path / "linux", {"caf\u00e9": 2})
    write_images(tmp_path / "macos", {"cafe\u0301": 3, "tea": 1})

    assert class_folders(tmp_path / "linux") == ["caf\u00e9"]
    assert class_folders(tmp_path / "macos") == ["caf\u00e9", "tea"]
    data, _ = load_folder(tmp_path / "macos", ["caf\u00e9", "tea"], 8)
    assert data.labels.tolist() == [0, 0, 0, 1]


def test_data_sets_that_torchvision_unpickles_are_refused(run_config):
    card = dataclasses.replace(load_card("fashion-mnist"), locator="CIFAR10")

    with pytest.raises(DataError, match="must not be CIFAR10, whose files torchvision unpickles"):
        open_part(card, "train", "")


def test_hidden_folders_are_passed_over(tmp_path):
    write_images(tmp_path, {"cat": 2, ".thumbs": 2})

    assert len(load_folder(tmp_path, ["cat", "dog"], 8)[0]) == 2


def test_a_folder_split_never_changes(tmp_path):
    write_images(tmp_path, {"cat": 10})
    part = open_folder(tmp_path, ["cat", "dog"])
    images, _ = load_folder(tmp_path, ["cat", "dog"], 8)

    _, held_out, _ = load_own(part, ["cat", "dog"], 8)

    assert split_rows([0] * 10) == ([0, 2, 5, 6, 7, 8, 9], [4], [1, 3])
    assert torch.equal(held_out.test.images, images.images[[1, 3]])
    assert torch.equal(held_out.validation.images, images.images[[4]])


def test_a_class_is_divided_alike_whichever_number_it_has(tmp_path):
    """A site counts its own classes in the prompt round, and the run's afterwards."""
    write_images(tmp_path, {"dog": 10, "eel": 10})

    own, of_run = (
        load_own(open_folder(tmp_path, names), names, 8) for names in (["dog", "eel"], ["ant", "bee", "dog", "eel"])
    )

    assert identities(own[0]) == identities(of_run[0])
    assert identities(own[1].test) == identities(of_run[1].test)


def identities(images):
    return {image.numpy().tobytes() for image in images.images}


@pytest.mark.parametrize("broken", [0, 3, 8])
@pytest.mark.parametrize("by_card", [True, False])
def test_a_file_that_cannot_be_read_for_a_while_moves_no_test_image_to_the_training_images(
    tmp_path, run_config, broken, by_card
):
    node = node_with_a_card(tmp_path)
    below = tmp_path / "files" / "all"
    if not by_card:
        node = {"data-path": str(below)}
    settings = parse_run_config(
        run_config | {"dataset": "folder", "class-names": "cat, dog" if by_card else "Felis, Canis"}
    )
    path = below / "Felis" / f"{broken}.png"
    content = path.read_bytes()

    path.write_bytes(content[:40])
    torn = client_data(settings, node)
    path.write_bytes(content)
    mended = client_data(settings, node)

    assert torn.num_unreadable == 1
    assert torn.findings.num_test == len(torn.held_out().test)
    for before, after in ((torn, mended), (mended, torn)):
        assert not identities(before.held_out().test) & identities(after.train)
        assert not identities(before.held_out().validation) & identities(after.train)
    parts = [(torn.train, mended.train)]
    parts += [(getattr(torn.held_out(), name), getattr(mended.held_out(), name)) for name in ("validation", "test")]
    assert sorted(len(whole) - len(part) for part, whole in parts) == [0, 0, 1]
    assert all(identities(part) <= identities(whole) for part, whole in parts)


def test_a_single_image_is_trained_on(tmp_path):
    write_images(tmp_path, {"cat": 1})

    assert len(load_own(open_folder(tmp_path, ["cat", "dog"]), ["cat", "dog"], 8)[0]) == 1


def test_an_unreadable_image_is_left_out_and_reported_among_good_ones(tmp_path):
    write_images(tmp_path, {"cat": 5})
    (tmp_path / "cat" / "2.png").write_bytes((tmp_path / "cat" / "2.png").read_bytes()[:40])

    data, findings = load_folder(tmp_path, ["cat", "dog"], 8)

    assert len(data) == 4
    assert [image.name for image in findings.unreadable] == [str(tmp_path / "cat" / "2.png")]


def test_an_image_that_pillow_refuses_in_its_own_way_is_unreadable_too(tmp_path):
    write_images(tmp_path, {"cat": 3})
    # Pillow raises ValueError for text of more than a mebibyte once it is unpacked.
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (2 * 2**20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "large.png", pnginfo=info)

    data, findings = load_folder(tmp_path, ["cat"], 8)

    assert len(data) == 3
    assert [image.name for image in findings.unreadable] == [str(tmp_path / "cat" / "large.png")]


def test_an_image_in_a_variant_that_pillow_does_not_know_is_unreadable_too(tmp_path):
    write_images(tmp_path, {"cat": 3})
    # A texture of Blizzard's, in an encoding that does not exist: Pillow raises NotImplementedError.
    header = struct.pack("<4siBBBB2i", b"BLP2", 1, 9, 0, 0, 0, 8, 8)
    (tmp_path / "cat" / "texture.png").write_bytes(header + bytes(2048))

    data, findings = load_folder(tmp_path, ["cat"], 8)

    assert len(data) == 3
    assert [image.name for image in findings.unreadable] == [str(tmp_path / "cat" / "texture.png")]


def test_folders_that_cannot_be_used_are_refused_with_the_reason(tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "foreign" / "horse").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    write_images(tmp_path / "broken", {"cat": 1})
    (tmp_path / "broken" / "cat" / "0.png").write_bytes(b"no picture")

    for name, reason in {
        "absent": "cannot be opened",
        "empty": "must hold images",
        "foreign": "'horse'",
        "bare": "holds none",
        "broken": "can be decoded",
    }.items():
        with pytest.raises(DataError, match=reason):
            load_folder(tmp_path / name, ["cat", "dog"], 8)


def test_a_node_without_the_runs_classes_has_its_own_until_it_is_told(tmp_path, run_config):
    write_images(tmp_path, {"dog": 10, "cat": 10})
    settings = parse_run_config(run_config | {"dataset": "folder"})

    own = client_data(settings, {"data-path": str(tmp_path)})
    told = client_data(settings, {"data-path": str(tmp_path)}, ("ape", "cat", "dog"))

    assert own.class_names == ("cat", "dog")
    assert set(own.train.labels.tolist()) == {0, 1}
    assert set(told.train.labels.tolist()) == {1, 2}
