import os

import pytest
import torch

from fgl_app.errors import SynthesisError
from fgl_app.files import write_atomically
from fgl_app.store import UnitStore


def unit(label: int, count: int = 2) -> dict[str, torch.Tensor]:
    return {
        "image": torch.full((count, 3, 4, 4), label, dtype=torch.uint8),
        "label": torch.full((count,), label),
        "seed": torch.arange(count),
        "sample_id": torch.zeros(count, 16, dtype=torch.uint8),
    }


def test_units_are_read_in_the_order_asked_for(tmp_path):
    store = UnitStore(tmp_path)
    store.commit("aa", unit(1), {"generator": "tiny"})
    store.commit("bb", unit(2), {"generator": "tiny"})

    data = store.read(["bb", "aa"])

    assert data.labels.tolist() == [2, 2, 1, 1]
    assert data.images[0].unique().tolist() == [2]


def test_a_unit_without_its_manifest_does_not_exist(tmp_path):
    store = UnitStore(tmp_path)
    store.commit("aa", unit(1), {})
    (tmp_path / "units" / "aa.json").unlink()

    assert not store.has("aa")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_unit_does_not_exist_and_is_never_read(tmp_path, damage):
    store = UnitStore(tmp_path)
    store.commit("aa", unit(1), {})
    file = tmp_path / "units" / "aa.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-8])
    else:
        file.unlink()

    assert not store.has("aa")
    with pytest.raises(SynthesisError, match="unit aa"):
        store.read(["aa"])


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"null", b'{"unit_id": "aa"}', b"\xff"])
def test_a_damaged_manifest_is_an_absent_unit(tmp_path, manifest):
    store = UnitStore(tmp_path)
    store.commit("aa", unit(1), {})
    (tmp_path / "units" / "aa.json").write_bytes(manifest)

    assert not store.has("aa")


def test_equal_units_have_equal_hashes_whatever_the_order_of_commits(tmp_path):
    first, second = UnitStore(tmp_path / "a"), UnitStore(tmp_path / "b")
    for store, order in ((first, "xy"), (second, "yx")):
        for name in order:
            store.commit(name, unit(ord(name)), {})

    assert first.content_hash(["x", "y"]) == second.content_hash(["y", "x"])
    second.commit("x", unit(0), {})
    assert first.content_hash(["x", "y"]) != second.content_hash(["x", "y"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_atomically(file, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")

    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["results.json"]
