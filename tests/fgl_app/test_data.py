import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from fgl_app.config import parse_run_config
from fgl_app.data import digits
from fgl_app.data.folder import load_folder, split_folder
from fgl_app.data.partition import partition_indices
from fgl_app.data.sources import load_client_data
from fgl_app.errors import DataError


def write_images(folder, counts):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 255, (12, 20, 3), np.uint8)).save(folder / name / f"{index}.png")


def test_the_split_is_disjoint_complete_and_never_changes():
    _, labels = digits.load()
    parts = digits.split_indices(labels)

    assert {name: len(rows) for name, rows in parts.items()} == {
        "public": 599,
        "train": 838,
        "validation": 120,
        "test": 240,
    }
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1797))
    # The shipped models were trained on exactly this public third; another one would leak private images into them.
    digest = hashlib.sha256(parts["public"].astype("<i8").tobytes()).hexdigest()
    assert digest == "d7f6553b632faa31dd4b27a58e8337f57d4215ba3649624de1615f7f5235ba3b"


@pytest.mark.parametrize(("scheme", "beta"), [("iid", 1.0), ("dirichlet", 0.01), ("dirichlet", 0.5)])
@pytest.mark.parametrize("num_partitions", [2, 5])
def test_a_partition_is_disjoint_complete_and_repeatable(scheme, beta, num_partitions):
    labels = (np.arange(400) % 10).tolist()

    parts = partition_indices(labels, num_partitions, scheme, beta, min_samples=10, seed=3)

    assert sorted(index for part in parts for index in part) == list(range(400))
    assert min(map(len, parts)) >= 10
    assert parts == partition_indices(labels, num_partitions, scheme, beta, min_samples=10, seed=3)
    assert parts != partition_indices(labels, num_partitions, scheme, beta, min_samples=10, seed=4)


def test_a_small_beta_separates_the_classes():
    labels = (np.arange(1000) % 10).tolist()

    def classes_per_client(beta):
        parts = partition_indices(labels, 5, "dirichlet", beta, min_samples=10, seed=0)
        return np.mean([len({labels[index] for index in part}) for part in parts])

    assert classes_per_client(0.01) < classes_per_client(100.0)


def test_an_impossible_partition_is_refused():
    with pytest.raises(DataError, match="at least 10 images"):
        partition_indices([0] * 20, 5, "iid", 1.0, min_samples=10, seed=0)


def test_clients_hold_the_whole_train_part_and_no_held_out_image(settings):
    clients = [load_client_data(settings.data, {"partition-id": i, "num-partitions": 3}, seed=0) for i in range(3)]

    assert sum(len(client.train) for client in clients) == 838
    assert {len(client.held_out.test) for client in clients} == {240}


@pytest.mark.parametrize("node_config", [{}, {"partition-id": 3, "num-partitions": 3}, {"partition-id": 0}])
def test_a_node_without_a_place_is_refused(settings, node_config):
    with pytest.raises(DataError, match="partition-id"):
        load_client_data(settings.data, node_config, seed=0)


def test_a_folder_of_images_per_class_is_read_at_the_image_size(tmp_path, run_config):
    write_images(tmp_path / "site", {"cat": 10, "dog": 20})
    settings = parse_run_config(run_config | {"dataset": "folder", "class-names": "bird, cat, dog"})

    data = load_client_data(settings.data, {"data-path": str(tmp_path / "site")}, seed=0)

    assert data.train.images.shape == (21, 3, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert torch.bincount(data.train.labels, minlength=3).tolist() == [0, 7, 14]
    assert torch.bincount(data.held_out.test.labels, minlength=3).tolist() == [0, 2, 4]
    assert torch.bincount(data.held_out.validation.labels, minlength=3).tolist() == [0, 1, 2]


def test_hidden_folders_are_passed_over(tmp_path):
    write_images(tmp_path, {"cat": 2, ".thumbs": 2})

    assert len(load_folder(tmp_path, ["cat", "dog"], 8)) == 2


def test_a_folder_split_never_changes(tmp_path):
    write_images(tmp_path, {"cat": 10})
    data = load_folder(tmp_path, ["cat", "dog"], 8)

    assert torch.equal(split_folder(data)[1].test.images, split_folder(data)[1].test.images)


def test_a_single_image_is_trained_on(tmp_path):
    write_images(tmp_path, {"cat": 1})

    assert len(split_folder(load_folder(tmp_path, ["cat", "dog"], 8))[0]) == 1


def test_folders_that_cannot_be_used_are_refused_with_the_reason(tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "foreign" / "horse").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    write_images(tmp_path / "broken", {"cat": 1})
    (tmp_path / "broken" / "cat" / "0.png").write_bytes(b"no picture")

    for name, reason in {
        "absent": "must be a folder",
        "empty": "must hold images",
        "foreign": "'horse'",
        "bare": "holds none",
        "broken": "readable",
    }.items():
        with pytest.raises(DataError, match=reason):
            load_folder(tmp_path / name, ["cat", "dog"], 8)
