"""A model's folder may bring code of its own: whoever loads one refuses it, asks nobody, and runs nothing."""

import dataclasses
import io
import json
import sys

import pytest
import torch
from plans import CPU, SETTINGS

from clients.captioning import HubCaptioner
from clients.embedding import TextEncoder
from fgl_app.audit.backbones import open_backbone
from fgl_app.errors import FGLError
from fgl_app.prompts.expansion import LanguageModelWriter
from fgl_app.synthesis.generator import load_pipeline
from fgl_app.synthesis.judges import LabelJudge

AUTO = (
    "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForImageClassification",
    "AutoProcessor", "AutoImageProcessor",
)  # fmt: skip
LOADERS = {
    "captioner": lambda folder: HubCaptioner(folder, revision="", dtype="auto", max_new_tokens=8, device=CPU),
    "prompt-writer": lambda folder: LanguageModelWriter(folder, revision="", max_new_tokens=8, seed=0, device=CPU),
    "filter": lambda folder: LabelJudge(folder, "", ["cat", "dog"], CPU),
    "backbone": lambda folder: open_backbone(folder, torch.nn.Identity, 16, CPU),
    "text encoder": lambda folder: TextEncoder(folder, "", CPU),
    "generator": lambda folder: load_pipeline(dataclasses.replace(SETTINGS, generator=folder), CPU),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_a_models_folder_is_refused_without_a_question(loader, tmp_path, monkeypatch):
    folder, proof = tmp_path / "model", tmp_path / "proof"
    auto_map = dict.fromkeys(AUTO, "own.Own") | {"AutoTokenizer": ["own.Own", None]}
    for part in (folder, folder / "tokenizer"):
        part.mkdir()
        (part / "own.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Own: pass\n")
        for name in ("config", "processor_config", "preprocessor_config", "tokenizer_config"):
            (part / f"{name}.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": ["own", "Own"], "_diffusers_version": "0.42"}))
    answers = io.StringIO("y\n" * 9)  # to whoever asks
    monkeypatch.setattr(sys, "stdin", answers)

    with pytest.raises(FGLError):
        LOADERS[loader](str(folder))

    assert answers.tell() == 0
    assert not proof.exists()
