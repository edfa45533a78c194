"""Weights of foreign models: none is drawn at random, and those in half precision alone are found, by every loader."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from diffusers import AutoencoderTiny
from plans import CPU, SETTINGS
from safetensors.torch import load_file, save_file

from clients.captioning import HubCaptioner
from clients.embedding import TextEncoder
from fgl_app import tiny
from fgl_app.audit.backbones import open_backbone
from fgl_app.checks import check_settings
from fgl_app.config import parse_run_config
from fgl_app.data.images import ImageSet
from fgl_app.errors import ConfigError, ModelError
from fgl_app.foundation_models import check_weights, weights_variant
from fgl_app.prompts.expansion import LanguageModelWriter
from fgl_app.synthesis.generator import load_pipeline
from fgl_app.synthesis.judges import LabelJudge

LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def copied(shipped: str, folder: Path) -> Path:
    for file in tiny.folder_of(shipped).rglob("*.*"):
        if file.is_file():
            target = folder / file.relative_to(tiny.folder_of(shipped))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return folder


def a_classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, id2label={0: "zero", 1: "one"}, **LAYERS)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def a_writer(folder: Path) -> Path:
    transformers.AutoTokenizer.from_pretrained(tiny.folder_of(tiny.CAPTIONER)).save_pretrained(folder)
    config = transformers.OPTConfig(
        vocab_size=2048, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=16
    )
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    return folder


def a_decoder(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(folder)  # fmt: skip
    return folder


LOADERS: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], Any]]] = {
    "captioner": (
        lambda folder: copied(tiny.CAPTIONER, folder), "",
        lambda folder: HubCaptioner(str(folder), revision="", dtype="float32", max_new_tokens=4, device=CPU),
    ),
    "text encoder": (
        lambda folder: copied(tiny.DIFFUSION, folder), "text_encoder",
        lambda folder: TextEncoder(str(folder), "", CPU),
    ),
    "filter": (a_classifier, "", lambda folder: LabelJudge(str(folder), "", ["zero", "one"], CPU)),
    "backbone": (a_classifier, "", lambda folder: open_backbone(str(folder), torch.nn.Identity, 32, CPU)),
    "prompt-writer": (
        a_writer, "",
        lambda folder: LanguageModelWriter(str(folder), revision="", max_new_tokens=4, seed=0, device=CPU),
    ),
    "decoder": (
        a_decoder, "",
        lambda folder: load_pipeline(dataclasses.replace(SETTINGS, decoder=str(folder)), CPU),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_a_model_whose_files_lack_a_weight_is_refused_by_name(name, tmp_path):
    build, part, load = LOADERS[name]
    (file,) = (build(tmp_path / "model") / part).glob("*.safetensors")
    load(tmp_path / "model")
    weights = load_file(file)
    del weights[max(key for key in weights if key.endswith(".weight"))]
    save_file(weights, file, {"format": "pt"})

    with pytest.raises(ModelError, match=rf"must be in the files of .*{tmp_path.name}.* but \d are not, such as "):
        load(tmp_path / "model")


@pytest.mark.parametrize("name", LOADERS)
def test_weights_of_one_variant_alone_are_found(name, tmp_path):
    build, part, load = LOADERS[name]
    (file,) = (build(tmp_path) / part).glob("*.safetensors")
    file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))

    load(tmp_path)


def test_a_backbone_without_a_pooler_of_its_own_gives_the_mean_of_its_last_features(tmp_path):
    a_classifier(tmp_path)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    first, second = (
        open_backbone(str(tmp_path), torch.nn.Identity, 32, CPU)(ImageSet(images, torch.zeros(3))) for _ in range(2)
    )

    model = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    pixels = transformers.ViTImageProcessor.from_pretrained(tmp_path)(list(images), return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = model(pixels, output_hidden_states=True).hidden_states[-1]
        expected = model.vit.layernorm(expected).mean(1)
    assert (first == second).all()
    assert torch.allclose(torch.from_numpy(first), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "config", "sentence"),
    [
        (["transformers", "Gemma2Model"], {}, "must be a CLIPTextModel, but that of .* is Gemma2Model"),
        (["transformers", "CLIPTextModel"], {"model_type": "gemma2"}, "is CLIPTextModel, of type gemma2"),
        ([None, None], {}, "is absent"),
    ],
)
def test_another_text_encoder_than_clips_is_refused_before_anything_is_loaded(index, config, sentence, tmp_path):
    folder = copied(tiny.DIFFUSION, tmp_path)
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"is never read")
    for name, changes in (("model_index.json", {"text_encoder": index}), ("text_encoder/config.json", config)):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    with pytest.raises(ConfigError, match=sentence):
        TextEncoder(str(folder), "", CPU)


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "fp16"),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], "fp16"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], None),
        (["diffusion_pytorch_model.ema.safetensors", "pytorch_lora_weights.safetensors"], "ema"),
        (["model.fp16.bin"], None),
    ],
)
def test_the_variant_is_that_of_the_files(names, variant, tmp_path):
    (tmp_path / "part").mkdir()
    for name in names:
        (tmp_path / "part" / name).touch()

    assert weights_variant(str(tmp_path), None, "part") == variant


@pytest.mark.parametrize("key", ["filter", "prompt-writer", "decoder"])
def test_a_model_without_safetensors_is_refused_before_any_work(key, tmp_path, run_config):
    build, _, _ = LOADERS[key]
    (file,) = build(tmp_path).glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    changes = {key: str(tmp_path)} | ({"prompt-source": "server"} if key == "prompt-writer" else {})

    with pytest.raises(ConfigError, match=f"weights of `{key}` must be safetensors files, but .* has none"):
        check_settings(parse_run_config(run_config | changes))


def test_of_a_hub_id_without_network_the_cached_files_tell_the_variant(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))  # read when it was imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    assert weights_variant("owner/name", None, "unet") == "fp16"
    check_weights("generator", "owner/name", "", ["unet"])
    with pytest.raises(ConfigError, match="has none in vae/"):
        check_weights("generator", "owner/name", "", ["unet", "vae"])
