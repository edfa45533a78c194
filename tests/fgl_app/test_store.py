import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from fgl_app.errors import SynthesisError
from fgl_app.files import write_atomically
from fgl_app.store import ContentHash, DamagedUnitsError, UnitStore, as_ids

DIGEST = "d" * 64


def open_store(folder: Path) -> UnitStore:
    return UnitStore(folder, DIGEST)


def ids(*numbers: int):
    return as_ids(bytes([number]) + bytes(14) + b"\0" for number in numbers)  # ends with zeros, as a hash may


def unit(*numbers: int, label: int = 0) -> dict[str, torch.Tensor]:
    return {
        "image": torch.stack([torch.full((3, 4, 4), number, dtype=torch.uint8) for number in numbers]),
        "label": torch.full((len(numbers),), label),
        "seed": torch.tensor(numbers),
        "sample_id": torch.frombuffer(bytearray(ids(*numbers).tobytes()), dtype=torch.uint8).reshape(-1, 16),
    }


def damage(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif kind == "truncate":
        file.write_bytes(content[:-8])
    else:
        file.unlink()


def test_images_are_read_in_the_order_asked_for_from_any_unit(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1, 2, label=1), {"generator": "tiny"})
    store.commit("bb", unit(3, 4, label=2), {"generator": "tiny"})

    data = store.read(ids(4, 1, 3))

    assert data.labels.tolist() == [2, 1, 2]
    assert data.images[:, 0, 0, 0].tolist() == [4, 1, 3]


def test_a_set_larger_than_the_memory_is_mapped_from_a_file(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.commit("aa", unit(1, 2), {})
    in_memory = store.read(ids(2, 1), size=2)
    monkeypatch.setattr("fgl_app.store._SHARE_OF_MEMORY", 0.0)

    mapped = store.read(ids(2, 1), size=2, backing=tmp_path / "images")

    assert torch.equal(mapped.images, in_memory.images)
    assert mapped.images.shape == (2, 3, 2, 2)
    assert not (tmp_path / "images").exists()


def test_a_mapped_set_without_room_is_one_sentence(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.commit("aa", unit(1, 2), {})
    monkeypatch.setattr("fgl_app.store._SHARE_OF_MEMORY", 0.0)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(SynthesisError, match=r"must have room for the synthetic set, 96 bytes.*No space left"):
        store.read(ids(1, 2), backing=tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_an_absent_image_is_an_error(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})

    assert store.index().holds(ids(1, 2)).tolist() == [True, False]
    with pytest.raises(SynthesisError, match="lacks 1 of 2"):
        store.read(ids(1, 2))


def test_an_empty_store_holds_nothing(tmp_path):
    assert not open_store(tmp_path / "absent").index().holds(ids(1)).any()


def test_a_unit_without_its_manifest_does_not_exist(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})
    (store.units_folder / "aa.json").unlink()

    assert not store.index().holds(ids(1)).any()


@pytest.mark.parametrize("kind", ["truncate", "remove"])
def test_a_unit_whose_file_is_short_or_gone_does_not_exist(tmp_path, kind):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})
    damage(store.units_folder / "aa.safetensors", kind)

    assert not store.index().holds(ids(1)).any()
    store.commit("aa", unit(1), {})  # a worker that draws it again must not find it there
    assert store.read(ids(1)).images.max() == 1


def test_of_two_processes_that_commit_a_unit_at_once_one_does(tmp_path, monkeypatch):
    store, other = open_store(tmp_path), open_store(tmp_path)
    replace = os.replace
    both = []

    def slow(source, target):
        """Let the other commit between the two files of the first."""
        if not both:
            both.append(threading.Thread(target=other.commit, args=("aa", unit(1, label=2), {})))
            both[0].start()
            both[0].join(0.5)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    store.commit("aa", unit(1, label=1), {})
    both[0].join()

    assert store.read(ids(1)).labels.tolist() == [1]
    assert {path.name for path in store.units_folder.iterdir()} == {"aa.json", "aa.safetensors"}


def test_a_flipped_byte_is_found_before_it_is_used_and_the_unit_is_named(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})
    store.commit("bb", unit(2), {})
    damage(store.units_folder / "aa.safetensors", "flip")

    with pytest.raises(DamagedUnitsError, match="unit aa") as caught:
        store.read(ids(1, 2))

    assert caught.value.units == ["aa"]
    store.discard(caught.value.units)
    assert store.index().holds(ids(1, 2)).tolist() == [False, True]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"unit_id": "aa"}', b"\xff"])
def test_a_damaged_manifest_is_an_absent_unit(tmp_path, content):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})
    (store.units_folder / "aa.json").write_bytes(content)

    assert not store.index().holds(ids(1)).any()
    store.commit("aa", unit(1), {})
    assert store.index().holds(ids(1)).all()


def test_files_that_others_write_meanwhile_hide_nothing(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})
    listed = os.listdir(store.units_folder)
    monkeypatch.setattr(os, "listdir", lambda folder: [*listed, ".bb.json.x7", "cc.json"])  # gone when they are read

    assert store.index().holds(ids(1)).all()


def test_a_manifest_that_claims_other_images_is_found(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})
    file = store.units_folder / "aa.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_ids": ids(9).tobytes().hex()}))

    with pytest.raises(DamagedUnitsError, match="unit aa"):
        store.read(ids(9))


def test_the_content_hash_depends_on_the_images_and_not_on_their_units(tmp_path):
    first, second, other = (open_store(tmp_path / name) for name in "abc")
    first.commit("x", unit(1, 2), {})
    first.commit("y", unit(3), {})
    second.commit("z", unit(3, 1), {})
    second.commit("w", unit(2), {})
    changed = unit(1, 2, 3)
    changed["image"][0, 0, 0, 0] += 1
    other.commit("v", changed, {})

    def hash_of(store, *numbers):
        content = ContentHash()
        store.read(ids(*numbers), size=2, content=content)  # of the pixels as they are stored
        return content.hexdigest()

    assert hash_of(first, 1, 2, 3) == hash_of(second, 3, 2, 1, 2)
    assert hash_of(first, 1, 2, 3) != hash_of(other, 1, 2, 3)
    assert hash_of(first, 1, 2, 3) != hash_of(first, 1, 2)


def test_a_unit_that_exists_is_left_alone(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {"seconds": 1.0})
    store.commit("aa", unit(1), {"seconds": 2.0})

    assert store.index().seconds(ids(1)) == 1.0


def test_seconds_are_those_of_the_images_asked_for(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1, 2, 3, 4), {"seconds": 8.0})

    assert store.index().seconds(ids(1, 4, 9)) == 4.0


def test_what_could_not_be_drawn_is_settled_and_left_out(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {"left_out": {ids(2).tobytes().hex(): "not finite"}})

    assert store.index().holds(ids(1, 2)).all()
    assert store.read(ids(2, 1)).images[:, 0, 0, 0].tolist() == [1]


def test_images_of_another_store_are_linked_not_copied(tmp_path):
    there, here = open_store(tmp_path / "there"), open_store(tmp_path / "here")
    there.commit("aa", unit(1, 2), {})
    there.commit("bb", unit(3), {})

    here.adopt(there, ids(1))

    assert here.index().holds(ids(1, 2, 3)).tolist() == [True, True, False]
    assert os.path.samefile(here.units_folder / "aa.safetensors", there.units_folder / "aa.safetensors")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    store = open_store(tmp_path)
    store.commit("aa", unit(1), {})
    before = sorted(os.listdir(store.units_folder))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(SynthesisError, match="have room"):
            store.commit("bb", unit(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert sorted(os.listdir(store.units_folder)) == before


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
