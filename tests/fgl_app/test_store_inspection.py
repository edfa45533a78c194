import os

from test_store import damage, ids, open_store, unit
from typer.testing import CliRunner

from fgl_app.cli import cli
from fgl_app.store import UnitStore
from fgl_app.store_inspection import contents, repair, stores_of, verify

A, B, C = "aa" * 16, "bb" * 16, "cc" * 16
FOREIGN = ("notes.txt", "weights.safetensors", ".gitignore", ".nfs000001")


def filled(folder):
    store = open_store(folder)
    store.commit(A, unit(1, 2, label=3), {"generator": "tiny", "seconds": 2.0, "batch_size": 16})
    store.commit(
        B, unit(4, label=5),
        {"generator": "tiny", "seconds": 1.0, "batch_size": 8, "left_out": {ids(9).tobytes().hex(): "rejected"}},
    )  # fmt: skip
    return store


def spoil(store):
    """One of each: a flipped byte, a manifest that is none, a unit without manifest, a temporary and foreign files."""
    damage(store.units_folder / f"{A}.safetensors", "flip")
    (store.units_folder / f"{B}.json").write_text("{")
    store.commit(C, unit(7), {})
    (store.units_folder / f"{C}.json").unlink()
    (store.units_folder / f".{C}.json.x7").write_text("{")
    for file in FOREIGN:
        (store.units_folder / file).write_text("mine")
    for file in (f"{C}.safetensors", f".{C}.json.x7", *FOREIGN):
        os.utime(store.units_folder / file, (0, 0))


def test_what_a_worker_may_be_writing_is_named_and_left(tmp_path):
    store = filled(tmp_path)
    (store.units_folder / f".{C}.json.x7").write_text("{")

    findings = list(verify(store))

    assert [finding.kind for finding in findings] == ["unfinished"]
    assert repair(findings) == 0


def test_a_unit_that_is_committed_meanwhile_is_no_finding(tmp_path, monkeypatch):
    store = filled(tmp_path)
    is_sound = UnitStore.is_sound

    def slow(self, *arguments):
        store.commit("dd" * 16, unit(8), {})
        return is_sound(self, *arguments)

    monkeypatch.setattr(UnitStore, "is_sound", slow)

    assert list(verify(store)) == []
    assert store.has("dd" * 16)


def test_a_unit_whose_manifest_was_not_yet_there_is_no_finding(tmp_path, monkeypatch):
    store = filled(tmp_path)
    store.commit("dd" * 16, unit(8), {})
    manifest = store.units_folder / f"{'dd' * 16}.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    is_sound = UnitStore.is_sound

    def slow(self, *arguments):
        manifest.write_bytes(kept)
        return is_sound(self, *arguments)

    monkeypatch.setattr(UnitStore, "is_sound", slow)

    assert list(verify(store)) == []


def test_a_sound_store_has_no_findings(tmp_path):
    assert list(verify(filled(tmp_path))) == []


def test_every_file_that_is_wrong_is_named_and_only_what_is_ours_is_removed(tmp_path):
    store = filled(tmp_path)
    store.commit("dd" * 16, unit(8), {})
    spoil(store)

    found = {finding.path.name: finding.kind for finding in verify(store)}

    assert found == {
        f"{A}.json": "damaged", f"{A}.safetensors": "damaged", f"{B}.json": "damaged", f"{B}.safetensors": "damaged",
        f"{C}.safetensors": "unfinished", f".{C}.json.x7": "unfinished", **dict.fromkeys(FOREIGN, "foreign"),
    }  # fmt: skip
    assert repair(list(verify(store))) == 6
    assert {finding.kind for finding in verify(store)} == {"foreign"}
    assert all((store.units_folder / file).read_text() == "mine" for file in FOREIGN)
    assert store.index().holds(ids(1, 2, 4, 7, 8)).tolist() == [False, False, False, False, True]


def test_the_contents_are_counted(tmp_path):
    held = contents(filled(tmp_path))

    assert (held.num_units, held.num_images, held.num_left_out, held.seconds, held.size_px) == (2, 3, 1, 3.0, 4)
    assert held.per_label == {3: 2, 5: 1}
    assert held.generator == "tiny"
    assert held.batch_sizes == (8, 16)


def test_the_commands_say_what_they_found(tmp_path):
    store = filled(tmp_path / "synthetic")
    run = CliRunner().invoke

    assert [opened.units_folder for opened in stores_of(tmp_path)] == [store.units_folder]
    assert "3 images of 4 px in 2 units" in run(cli, ["store", "stats", str(tmp_path)]).output
    assert "drawn at a time: 8, 16\n" in run(cli, ["store", "stats", str(tmp_path)]).output
    assert "3 images are sound" in run(cli, ["store", "verify", str(tmp_path)]).output
    spoil(store)
    bad = run(cli, ["store", "verify", str(tmp_path / "synthetic")])
    assert bad.exit_code == 1
    assert f"{A}.safetensors" in bad.output
    assert "6 files removed" in run(cli, ["store", "verify", "--repair", str(tmp_path)]).output
    assert run(cli, ["store", "verify", str(tmp_path)]).exit_code == 0
    assert "There must be a file or folder" in str(run(cli, ["store", "stats", str(tmp_path / "none")]).exception)
    (tmp_path / "none").mkdir()
    assert "must be the folder of a store" in str(run(cli, ["store", "stats", str(tmp_path / "none")]).exception)
