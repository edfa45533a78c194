"""Exported sets are read back by the libraries that they are meant for."""

import dataclasses
import json
from pathlib import Path

import pytest
import webdataset
from datasets import load_dataset
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

from fgl_app.cli import cli
from fgl_app.errors import ConfigError
from fgl_app.phases import resolve
from fgl_app.reporting.export import export, folder_names
from fgl_app.reporting.finished_run import drawn_set, read_run
from fgl_app.reporting.run_folder import DrawnSet, RunFolder
from fgl_app.store import as_ids
from fgl_app.synthesis.plan import Plan


@pytest.fixture
def run(make_run):
    return read_run(make_run())


def expected(run):
    """Class name by identity of the image."""
    return {
        sample.sample_id.hex(): run.class_names[sample.label] for sample in Plan.load(run.path / "plan.json").samples()
    }


def pixels(run, sample_id: str):
    store, _ = drawn_set(run)
    return store.read(as_ids([bytes.fromhex(sample_id)])).images[0].permute(1, 2, 0).tolist()


def test_class_folders_are_read_by_torchvision_and_datasets(run, tmp_path):
    outcome = CliRunner().invoke(cli, ["store", "export", str(run.path), str(tmp_path / "out")])

    assert "20 images written" in outcome.output
    folder = ImageFolder(tmp_path / "out")
    # The labels are the model's: the digits' names in their alphabetical order begin with eight.
    assert folder.classes[:3] == ["0_zero", "1_one", "2_two"]
    assert {Path(path).stem: run.class_names[label] for path, label in folder.samples} == expected(run)
    assert json.loads((tmp_path / "out" / "classes.json").read_text("utf-8")) == list(run.class_names)
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    assert loaded.features["label"].names == folder.classes
    assert len(loaded) == 20
    with pytest.raises(ConfigError, match="must not exist yet"):
        export(run, "folder", tmp_path / "out")


def test_parquet_is_read_by_datasets_with_the_same_pixels(run, tmp_path):
    assert export(run, "parquet", tmp_path / "out") == 20

    loaded = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")

    assert loaded.features["label"].names == list(run.class_names)
    assert sorted(run.class_names[label] for label in loaded["label"]) == sorted(expected(run).values())
    first = loaded[0]["image"]
    assert first.size == (32, 32)
    assert list(first.getdata()) == [tuple(pixel) for row in pixels(run, sorted_first(run)) for pixel in row]


def sorted_first(run) -> str:
    return next(Plan.load(run.path / "plan.json").samples()).sample_id.hex()


# WebDataset leaves it to the garbage collector to close its files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tar_files_are_read_by_webdataset(run, tmp_path):
    assert export(run, "webdataset", tmp_path / "out") == 20

    dataset = webdataset.WebDataset(str(tmp_path / "out" / "000000.tar"), shardshuffle=False).decode("rgb8")

    read = {item["__key__"]: (item["txt"], item["png"]) for item in dataset}
    assert {key: name for key, (name, _) in read.items()} == expected(run)
    key, (_, image) = next(iter(read.items()))
    assert image.tolist() == pixels(run, key)


def test_a_run_that_deleted_its_prompts_is_exported_alike(run, tmp_path):
    plan = Plan.load(run.path / "plan.json")
    samples = list(plan.samples())
    ids = as_ids(sample.sample_id for sample in samples)
    wanted = expected(run)
    kept = DrawnSet(plan.settings.digest(), ids, tuple(sample.label for sample in samples))
    RunFolder(run.settings, resolve(run.settings)).forget_prompts(kept)

    assert export(read_run(run.path), "folder", tmp_path / "out") == 20

    folder = ImageFolder(tmp_path / "out")
    assert {Path(path).stem: run.class_names[label] for path, label in folder.samples} == wanted


def test_whatever_classes_are_called_each_has_a_folder_of_its_own(run, tmp_path):
    names = ("a/b", "a_b", "A_B", "猫" * 100, "猫" * 99 + "犬", "..", "/", "a_b-0", " ", "zero")
    named = dataclasses.replace(run, class_names=names)

    assert export(named, "folder", tmp_path / "out") == 20

    # Of 3 bytes each, 66 fit into 200.
    wanted = [
        "0_a_b", "1_a_b", "2_A_B", f"3_{'猫' * 66}", f"4_{'猫' * 66}", "5___", "6__", "7_a_b-0", "8__", "9_zero",
    ]  # fmt: skip
    written = {path.stem: path.parent.name for path in (tmp_path / "out").glob("*/*.png")}
    labels = {name: wanted[label] for label, name in enumerate(names)}
    assert written == {sample: labels[name] for sample, name in expected(named).items()}


def test_folders_of_many_classes_stand_in_the_order_of_their_labels():
    names = [f"class {number}" for number in range(1_000, 0, -1)]

    assert sorted(folder_names(names)) == folder_names(names)
    assert folder_names(names)[::999] == ["000_class 1000", "999_class 1"]


def test_a_failed_export_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fgl_app.reporting.export._png", lambda image: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        export(run, "folder", tmp_path / "out")

    assert list(tmp_path.glob("*out*")) == []
