import logging
import os
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_sets import load_folder, write_tree
from flwr.app import Context, RecordDict
from odd_folder import IGNORED, IMAGES, UNREADABLE, write_odd_folder
from PIL import Image

from fgl_app.audit.material import Material, attacked_images
from fgl_app.cards import load_card
from fgl_app.checks import check_settings
from fgl_app.client_app import _say_what_was_found
from fgl_app.config import parse_run_config
from fgl_app.data.adequacy import check_classes
from fgl_app.data.findings import by_reason, listed
from fgl_app.data.folder import open_folder
from fgl_app.data.readers import open_part
from fgl_app.data.sources import client_rows, load_client_data, load_held_out, load_split, train_part, train_rows
from fgl_app.errors import DataError
from fgl_app.image_folders import class_folders, find_images, loose_files


@pytest.fixture
def odd(tmp_path):
    return write_odd_folder(tmp_path / "site")


def counts(label_sets, names):
    return Counter(names[label] for labels in label_sets for label in labels.tolist())


def test_simulation_and_a_site_see_the_same_images_in_a_folder_with_all_oddities(odd, run_config):
    own = parse_run_config(run_config | {"dataset": "folder"})
    site = load_client_data(own.card, own.data, {"data-path": str(odd)}, 0)
    shared = parse_run_config(run_config | {"dataset": str(odd), "partition": "iid", "min-samples-per-client": 0})
    clients = [
        load_client_data(shared.card, shared.data, {"partition-id": number, "num-partitions": 3}, 0)
        for number in range(3)
    ]
    held_out = [load_split(shared.card, shared.data, name, 0) for name in ("validation", "test")]

    assert site.findings.num_images == IMAGES
    assert by_reason(site.findings.unreadable) == UNREADABLE
    assert site.findings.ignored == IGNORED
    names = shared.card.class_names()
    assert sorted(names) == sorted(IMAGES)
    assert counts([each.train.labels for each in clients] + [each.labels for each in held_out], names) == IMAGES
    assert all(each.findings.ignored == {} == each.findings.lost_classes for each in clients)
    part = train_part(shared.card, shared.data)
    assert part.ignored == IGNORED
    assert len(part.labels) == sum(IMAGES.values()) + sum(UNREADABLE.values())
    check_classes(shared.card, shared.data, 0)


def test_what_is_passed_over_in_a_divided_folder_is_said_once_by_the_server(odd, run_config, caplog):
    chosen = {"dataset": str(odd), "method": "fedavg", "partition": "iid", "min-samples-per-client": 0}

    with caplog.at_level(logging.WARNING, "flwr"):
        check_settings(parse_run_config(run_config | chosen))

    (line,) = [line for line in caplog.messages if "are no images" in line]
    assert f" {sum(IGNORED.values())} files of the training part are no images: " in line
    assert all(reason in line for reason in IGNORED)


def test_members_and_others_of_an_audit_are_as_many_where_images_cannot_be_read(tmp_path, run_config):
    write_tree(tmp_path / "pets", ["cat", "dog"], 40, "png")
    chosen = {"dataset": str(tmp_path / "pets"), "method": "fedavg", "partition": "iid", "min-samples-per-client": 0}
    settings = parse_run_config(run_config | chosen)
    part = train_part(settings.card, settings.data)
    cats = [
        row
        for rows in client_rows(settings.card, settings.data, settings.run.num_clients, settings.run.seed)
        for row in rows
        if part.labels[row] == 0
    ]
    for row in cats[3:]:
        (tmp_path / "pets" / part.name(row)).write_bytes(b"damaged")

    images = attacked_images(Material(None, settings, ()), with_rest=True)

    # A fifth of the 40 dogs is held out for the test, and of the cats 3 can be read of those that are trained on.
    assert Counter(images.members.labels.tolist()) == Counter(images.others.labels.tolist()) == {0: 3, 1: 8}
    assert set(images.rest.labels.tolist()) == {1}


def test_a_damaged_image_ends_no_simulation_and_is_counted_by_its_client(tmp_path, run_config):
    write_tree(tmp_path / "pets", ["cat", "dog"], 20, "png")
    damaged = [tmp_path / "pets" / name / f"{number}.png" for name in ("cat", "dog") for number in range(7)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:40])
    settings = parse_run_config(
        run_config | {"dataset": str(tmp_path / "pets"), "partition": "iid", "min-samples-per-client": 0}
    )

    clients = [
        load_client_data(settings.card, settings.data, {"partition-id": number, "num-partitions": 2}, 0)
        for number in range(2)
    ]
    held_out = [load_split(settings.card, settings.data, name, 0) for name in ("validation", "test")]

    left_out = [image.name for client in clients for image in client.findings.unreadable]
    assert len(left_out) + load_held_out(settings.card, settings.data, 0).num_unreadable == len(damaged)
    num_readable = sum(map(len, held_out)) + sum(len(client.train) for client in clients)
    assert num_readable == 26
    assert set(left_out) <= set(map(str, damaged))
    assert (
        sum(client.num_unreadable for client in clients)
        == len(left_out)
        == 28 - sum(len(client.train) for client in clients)
    )


def test_what_was_found_is_logged_once_in_a_run_with_each_file_once(odd, run_config, caplog):
    settings = parse_run_config(run_config | {"dataset": "folder"})
    context = Context(1, 7, {"data-path": str(odd)}, RecordDict(), run_config)

    for _ in range(3):  # prompts, training, evaluation: in a process each
        data = load_client_data(settings.card, settings.data, context.node_config, 0)
        _say_what_was_found(data, context)

    text = [record.getMessage() for record in caplog.records]
    assert len([line for line in text if "46 images can be used: cat 13, chien \u00e9t\u00e9 12" in line]) == 1
    for name in ("cut.png", "empty.jpg", "nowhere.png", "text.bmp"):
        (line,) = [line for line in text if name in line]
        assert "left out" in line
        assert "must be readable" not in line
    (odd / "cat" / "cut.png").unlink()
    _say_what_was_found(load_client_data(settings.card, settings.data, context.node_config, 0), context)
    assert len([record for record in caplog.records if "empty.jpg" in record.getMessage()]) == 2


def test_a_folder_that_is_divided_is_not_taken_for_classes(tmp_path, run_config):
    for part in ("train", "val", "test"):
        write_tree(tmp_path / part, ["cat", "dog"], 2, "png")

    for divided in (tmp_path, tmp_path / "train"):
        if divided == tmp_path:
            with pytest.raises(DataError, match="is divided into test, train, val, which are no classes"):
                class_folders(divided)
            with pytest.raises(DataError, match="is divided into"):
                load_card(str(divided))
        else:
            assert class_folders(divided) == ["cat", "dog"]
    write_tree(tmp_path / "vehicles", ["car", "train"], 2, "png")  # where a train is a train
    write_tree(tmp_path / "vehicles" / "train", ["2023"], 2, "png")
    assert class_folders(tmp_path / "vehicles") == ["car", "train"]


def test_pictures_that_need_a_package_are_counted_by_type_and_it_is_named(odd, run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pydicom", None)
    own = parse_run_config(run_config | {"dataset": "folder"})

    site = load_client_data(own.card, own.data, {"data-path": str(odd)}, 0)

    needs = "(to read them: pip install 'federated-generative-learning[pictures]')"
    assert site.findings.ignored == IGNORED
    lacking = {f"of type .heic {needs}": 10, f"of type DICOM {needs}": 1}
    assert by_reason(site.findings.unreadable) == UNREADABLE | lacking
    assert site.findings.lost_classes == {"phones": f"10 of type .heic {needs}"}
    assert (
        f"class 'phones' has files, but no image that can be used (10 of type .heic {needs})"
        in (site.findings.warnings()[0])
    )
    lines = listed(site.findings.unreadable)  # each type once, damaged files by name
    assert {line for line in lines if "pip install" in line} == {f"left out: {n} {why}" for why, n in lacking.items()}
    assert len(lines) == 2 + sum(UNREADABLE.values())
    shared = parse_run_config(run_config | {"dataset": str(odd)})
    with pytest.raises(DataError, match=r"'phones' can be decoded: 7 of type \.heic \(to read them: pip install"):
        check_classes(shared.card, shared.data, 0)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "20 empty file"), (b"no image", "20 not an image of a known format")]
)
def test_a_class_of_a_simulation_whose_images_are_all_unreadable_is_refused_with_the_reasons(
    tmp_path, run_config, content, reason
):
    write_tree(tmp_path, ["cat", "dog"], 28, "png")
    settings = parse_run_config(run_config | {"dataset": str(tmp_path), "min-samples-per-client": 0})
    part = train_part(settings.card, settings.data)
    dogs = [row for row in train_rows(settings.card, settings.data, 0) if part.labels[row] == 1]
    for row in dogs[:-1]:
        Path(part.name(row)).write_bytes(content)
    check_classes(settings.card, settings.data, 0)  # one is left
    Path(part.name(dogs[-1])).write_bytes(content)

    with pytest.raises(DataError, match=f"none of the 20 of 'dog' can be decoded: {reason}"):
        check_classes(settings.card, settings.data, 0)


def test_which_files_are_listed_does_not_depend_on_installed_packages(odd, run_config, monkeypatch):
    (odd / "x\u00b2" / "new.avif").write_bytes(b"of a kind that old versions of Pillow cannot read")
    (odd / "x\u00b2" / "scan.dcm").write_bytes(bytes(200))
    shared = parse_run_config(run_config | {"dataset": str(odd), "min-samples-per-client": 0})
    before = [open_part(shared.card, "train", ""), open_folder(odd, shared.card.class_names())]

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    after = [open_part(shared.card, "train", ""), open_folder(odd, shared.card.class_names())]

    for have, lack in zip(before, after, strict=True):
        assert (have.labels, have.ignored) == (lack.labels, lack.ignored)
        assert list(map(have.name, range(len(have.labels)))) == list(map(lack.name, range(len(lack.labels))))
        assert len(have.labels) == sum(IMAGES.values()) + sum(UNREADABLE.values()) + 2


def test_images_are_found_at_every_depth_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a.png", "c/z.png", "c/d/y.JPG", "C/x.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)

    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path).files]

    assert found == ["a.png", "b.png", "C/x.tif", "c/z.png", "c/d/y.JPG"]


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))

    assert find_images(tmp_path).ignored == {"that are no regular files": 3}


def test_few_images_have_a_sentence_each(tmp_path):
    write_tree(tmp_path, ["cat", "dog"], 2, "png")
    for number in range(2, 60):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "cat" / f"{number}.png")
    write_tree(tmp_path, ["fox"], 3, "png")
    for path in (tmp_path / "fox").iterdir():
        path.write_bytes(b"no image")

    _, findings = load_folder(tmp_path, ["cat", "dog", "fox"], 8)

    assert findings.num_images == {"cat": 60, "dog": 2}
    assert findings.lost_classes == {"fox": "3 not an image of a known format"}


def test_a_site_is_told_what_it_cannot_measure(tmp_path, run_config):
    write_tree(tmp_path, ["cat", "dog"], 2, "png")
    for number in range(2, 60):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "cat" / f"{number}.png")
    own = parse_run_config(run_config | {"dataset": "folder"})

    few, small = load_client_data(own.card, own.data, {"data-path": str(tmp_path)}, 0).findings.warnings()

    assert few == "fewer than 3 images of dog: all of them are trained on, and none is held out for the test"
    assert small.startswith("12 images are held out for the test: each of them is 8.3 points of accuracy")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_without_permission_an_image_is_unreadable_and_a_folder_is_passed_over(tmp_path):
    write_tree(tmp_path, ["cat", "cat/closed"], 2, "png")
    (tmp_path / "cat" / "0.png").chmod(0)
    (tmp_path / "cat" / "closed").chmod(0)

    images, findings = load_folder(tmp_path, ["cat"], 8)

    (tmp_path / "cat" / "closed").chmod(0o700)
    assert len(images) == 1
    assert by_reason(findings.unreadable) == {"unreadable without permission": 1}
    assert findings.ignored == {"folder that cannot be opened": 1}


def test_order_and_pixels_of_a_flat_folder_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    write_tree(tmp_path, ["cat", "dog"], 12, "png", lambda number: Image.new("RGB", (8, 8), (7 * number, 9, 9)))

    images, _ = load_folder(tmp_path, ["cat", "dog"], 8)

    listing = ImageFolder(tmp_path)
    expected = torch.stack([torch.tensor(list(listing[row][0].tobytes()), dtype=torch.uint8) for row in range(24)])
    assert torch.equal(images.images, expected.reshape(24, 8, 8, 3).permute(0, 3, 1, 2))
    assert images.labels.tolist() == listing.targets


@pytest.mark.parametrize("name", ["#snapshot", ".snapshot", ".zfs", "@eaDir", ".git", "#recycle", ".private"])
def test_nothing_looks_into_a_folder_that_is_never_data(tmp_path, monkeypatch, name):
    write_tree(tmp_path / "pets", ["cat"], 2, "png")
    for place in (tmp_path / "pets", tmp_path / "pets" / "cat"):
        write_tree(place / name / "monday", ["cat"], 3, "png")
    opened = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(str(path)) or scandir(path))

    found, beside = find_images(tmp_path / "pets" / "cat"), loose_files(tmp_path / "pets")

    assert len(found.files) == 2
    expected = {"hidden folder" if name == ".private" else f"folder {name}": 1}
    assert found.ignored == beside == expected
    assert opened == [str(tmp_path / "pets" / "cat"), str(tmp_path / "pets")]
