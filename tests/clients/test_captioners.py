"""One contract for every family of captioners."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tiny_captioners import (
    FAMILIES,
    INSTRUCTION,
    TASK,
    TASK_IN_WORDS,
    build_blip2,
    build_instructblip,
)
from torchvision.transforms.v2.functional import to_pil_image

from clients.captioning import HubCaptioner
from fgl_app.cards import load_card
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.data.sources import load_split
from fgl_app.errors import ModelError

ROLES = ("User:", "USER:", "Assistant:", "ASSISTANT:")


@dataclass(frozen=True)
class Family:
    folder: Path
    asked: str
    """What transformers' documentation passes beside the image: nothing, a task, or a chat with this text."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    build, asked = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    build(folder)
    return Family(folder, asked)


def load(source: Path | str, dtype: str = "float32") -> HubCaptioner:
    return HubCaptioner(str(source), revision="", dtype=dtype, max_new_tokens=8, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def captioner(family: Family) -> HubCaptioner:
    return load(family.folder)


def pictures(size_px: int, num: int = 5) -> torch.Tensor:
    """Chequers of 4 x 4 random colours, uint8 ``[num, 3, size_px, size_px]``: as different at 16 as at 64 pixels."""
    colours = torch.randint(0, 256, (num, 3, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return colours.repeat_interleave(size_px // 4, 2).repeat_interleave(size_px // 4, 3)


def documented_captions(family: Family, images: torch.Tensor) -> list[str]:
    """Caption PIL images as the documentation of transformers does."""
    processor = transformers.AutoProcessor.from_pretrained(family.folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(family.folder, dtype=torch.float32)
    opened = [to_pil_image(image) for image in images]
    if family.asked == INSTRUCTION:
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": INSTRUCTION}]}]
            for image in opened
        ]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(chats, **options)
    else:
        text = {"text": [family.asked] * len(opened)} if family.asked else {}
        inputs = processor(images=opened, return_tensors="pt", **text)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    start = inputs["input_ids"].shape[1] if family.asked == INSTRUCTION else 0
    return [caption.strip() for caption in processor.batch_decode(ids[:, start:], skip_special_tokens=True)]


@pytest.mark.parametrize("size_px", [16, 64])
def test_each_image_gets_a_caption_without_prompt_and_special_tokens(family, captioner, size_px):
    special = transformers.AutoTokenizer.from_pretrained(family.folder).all_special_tokens

    captions = captioner(pictures(size_px))

    assert len(captions) == 5
    assert all(isinstance(caption, str) and caption == caption.strip() for caption in captions)
    assert not [t for t in (INSTRUCTION, TASK, TASK_IN_WORDS, *ROLES, *special) if any(t in c for c in captions)]


@pytest.mark.parametrize("size_px", [16, 64])
def test_the_image_decides_the_caption(captioner, size_px):
    assert len(set(captioner(pictures(size_px)))) > 1


@pytest.mark.parametrize("size_px", [16, 64])
def test_a_caption_does_not_depend_on_the_batch_or_the_call(captioner, size_px):
    images = pictures(size_px)

    together = captioner(images)

    assert captioner(images) == together
    assert [caption for image in images for caption in captioner(image[None])] == together


@pytest.mark.parametrize("size_px", [16, 64])
def test_captions_are_those_of_the_documented_use(family, captioner, size_px):
    # PIL images are 0..255, so equal captions also say that uint8 tensors are scaled once, and as channels first;
    # that no second BOS token is written; and that the prompt is cut where it ends.
    images = pictures(size_px)

    assert captioner(images) == documented_captions(family, images)


def test_a_dark_image_is_not_taken_for_one_already_scaled_to_one(family, captioner):
    dark = pictures(16) // 128  # only 0 and 1 of 255

    captions = captioner(dark)

    assert captions == documented_captions(family, dark)
    assert captions != captioner(dark * 255)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_cpu_captions_in_every_dtype(family, dtype):
    captions = load(family.folder, dtype)(pictures(16))

    assert len(captions) == 5
    assert len(set(captions)) > 1


def test_a_captioner_that_needs_a_text_of_its_own_is_refused(tmp_path):
    build_instructblip(tmp_path)

    with pytest.raises(ModelError, match="without being asked, or have a chat template"):
        load(tmp_path)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_captioner_that_does_not_see_is_refused(tmp_path, value):
    build_blip2(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.nn.init.constant_(model.language_projection.weight, value)  # the way from the image to the language model
    model.save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="must see the images"):
        load(tmp_path)


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def change_width(folder: Path, width: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = width
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [cut_weights, lambda folder: change_width(folder, 96), lambda folder: change_width(folder, "wide")],
    ids=["weights cut short", "other shapes", "wrong type"],
)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    build_blip2(tmp_path)
    damage(tmp_path)

    with pytest.raises(ModelError, match="`captioner` must be an image-to-text model"):
        load(tmp_path)


def test_4bit_without_a_package_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("clients.captioning._installed", lambda package: False)

    with pytest.raises(ModelError, match=r"'tiny' in 4bit needs a package.*pip install bitsandbytes"):
        load("tiny", "4bit")


def test_torchao_stands_in_where_bitsandbytes_is_not_installed(monkeypatch):
    monkeypatch.setattr("clients.captioning._installed", lambda package: package == "torchao")
    data = load_split(load_card("digits"), parse_run_config(default_run_config()).data, "train", 0)
    images, names = data.images[:40], load_card("digits").class_names()

    captions = load("tiny", "4bit")(images)

    right = sum(names[label] in caption.split() for label, caption in zip(data.labels[:40], captions, strict=True))
    assert right >= 32  # 4 bits cost some of the 95 % that the tiny captioner names in full precision
