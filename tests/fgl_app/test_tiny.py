import json

import pytest

from fgl_app import tiny
from fgl_app.errors import ModelError


def test_the_shipped_models_take_at_most_6_mb():
    folders = [tiny.folder_of(name) for name in (tiny.DIFFUSION, tiny.CAPTIONER)]

    weights = sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors"))
    assert 1e6 < weights <= 6e6
    assert (folders[0] / "model_index.json").is_file()
    assert json.loads((folders[1] / "config.json").read_text())["architectures"] == ["Blip2ForConditionalGeneration"]


def test_unpacking_restores_every_byte_and_packing_again_the_archive(tmp_path):
    folder = tiny.folder_of(tiny.CAPTIONER, cache=tmp_path)

    tiny.pack(folder, tmp_path / "again.json")

    assert (tmp_path / "again.json").read_bytes() == (tiny._HERE / "captioner.json").read_bytes()
    assert tiny.folder_of(tiny.CAPTIONER, cache=tmp_path) == folder


def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tiny.pack(source, tmp_path / "captioner.json")
    archive = json.loads((tmp_path / "captioner.json").read_text())
    archive["files"]["config.json"]["base64"] = "e30K"
    (tmp_path / "captioner.json").write_text(json.dumps(archive))
    monkeypatch.setattr(tiny, "_HERE", tmp_path)

    with pytest.raises(ModelError, match="checksums"):
        tiny.folder_of("captioner", cache=tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []
