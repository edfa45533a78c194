"""Tiny random captioners of every family, with real processors, saved as the hub's are.

The weights are drawn with variance 1 / fan-in instead of a constant 0.02: at 32 features the latter lets so little of
the pixels through that all images get one caption. The captions are gibberish, but each image gets its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from fgl_app import tiny

INSTRUCTION = "Describe this image in one short sentence."
TASK = "<CAPTION>"
TASK_IN_WORDS = "What does the image describe?"
SIDE = 32
WIDTH = 32
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = LAYERS | {"image_size": SIDE, "patch_size": 8}
SQUARE = {"height": SIDE, "width": SIDE}
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def byte_tokenizer(*special: str, bos: str = "<s>", **named: str) -> Any:
    """The shipped captioner's vocabulary, padded on the right, as most of the hub's tokenizers are."""
    shipped = transformers.AutoTokenizer.from_pretrained(tiny.folder_of(tiny.CAPTIONER))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=shipped.backend_tokenizer,
        bos_token=bos,
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=512,
        extra_special_tokens=named,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def word_tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "cat", "dog", "##s"]
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def text_config(tokenizer: Any, **options: Any) -> dict[str, Any]:
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LAYERS | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": 256} | options


def save(folder: Path, model: Any, processor: Any, **generation: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_blip(folder: Path) -> None:
    tokenizer = word_tokenizer()  # as on the hub, it does not know the decoder's BOS token
    text = text_config(tokenizer, vocab_size=len(tokenizer) + 1, bos_token_id=len(tokenizer), eos_token_id=2)
    config = transformers.BlipConfig(
        text_config=text | {"sep_token_id": tokenizer.sep_token_id}, vision_config=VISION | {"initializer_range": 0.02}
    )
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size=SQUARE, **PIXELS), tokenizer)
    save(folder, transformers.BlipForConditionalGeneration(config), processor)


def build_blip2(folder: Path) -> None:
    shutil.copytree(tiny.folder_of(tiny.CAPTIONER), folder, dirs_exist_ok=True)


def build_blip2_without_query_tokens(folder: Path) -> None:
    build_blip2(folder)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_query_tokens": None}))


def build_blip2_t5(folder: Path) -> None:
    tokenizer = byte_tokenizer("<image>")
    t5 = {"model_type": "t5", "d_model": WIDTH, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=LAYERS | {"encoder_hidden_size": WIDTH, "vocab_size": 8, "cross_attention_frequency": 1},
        text_config=t5 | text_config(tokenizer, decoder_start_token_id=tokenizer.pad_token_id),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config.use_decoder_only_language_model = False
    images = transformers.BlipImageProcessor(size=SQUARE, **PIXELS)
    processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=4)
    save(folder, transformers.Blip2ForConditionalGeneration(config), processor)


def build_florence2(folder: Path) -> None:
    tokenizer = byte_tokenizer(image_token="<image>")
    bart = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.Florence2Config(
        vision_config={
            "depths": (1, 1),
            "patch_size": (7, 3),
            "patch_stride": (4, 2),
            "patch_padding": (3, 1),
            "patch_prenorm": (False, True),
            "embed_dim": (16, WIDTH),
            "num_heads": (2, 4),
            "num_groups": (2, 4),
            "window_size": 4,
            "projection_dim": WIDTH,
        },
        text_config={"model_type": "bart"} | bart | heads | text_config(tokenizer, decoder_start_token_id=2),
        image_token_id=tokenizer.image_token_id,
    )
    images = transformers.CLIPImageProcessor(size=SQUARE, do_center_crop=False, **PIXELS)
    images.image_seq_length = (SIDE // 8) ** 2 + 1
    save(
        folder,
        transformers.Florence2ForConditionalGeneration(config),
        transformers.Florence2Processor(images, tokenizer),
        **{"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3},  # as on the hub
        **{"forced_bos_token_id": 0, "forced_eos_token_id": 2},
    )


def build_idefics3(folder: Path) -> None:
    """As Idefics3 on the hub, the template and the tokenizer both write a BOS token; an image is cut into 2 x 2 and 1.

    The first SmolVLM is an Idefics3 too.
    """
    tokenizer = byte_tokenizer("<image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, **PIXELS
    )
    template = DEFAULT_CHAT_TEMPLATE.replace("<|im_start|>", "<s>")
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    config = transformers.Idefics3Config(
        vision_config=VISION,
        text_config=text_config(tokenizer, model_type="llama"),
        image_token_id=processor.image_token_id,
    )
    config.text_config.vocab_size = len(tokenizer)  # the processor has added tokens
    save(folder, transformers.Idefics3ForConditionalGeneration(config), processor)


def build_smolvlm(folder: Path) -> None:
    pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    tokenizer = byte_tokenizer(
        *("<image>", "<global-img>", "<fake_token_around_image>", "<end_of_utterance>"), bos="<|im_start|>"
    )
    images = transformers.SmolVLMImageProcessor(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False, **PIXELS
    )
    processor = transformers.SmolVLMProcessor(
        images,
        tokenizer,
        transformers.SmolVLMVideoProcessor(size={"longest_edge": SIDE}),
        image_seq_len=4,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    config = transformers.SmolVLMConfig(
        vision_config=VISION,
        text_config=text_config(tokenizer, model_type="llama"),
        image_token_id=processor.image_token_id,
    )
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    save(folder, transformers.SmolVLMForConditionalGeneration(config), processor, eos_token_id=end)


def build_qwen2_vl(folder: Path) -> None:
    """Its pixel values are patches of all images in one list, as many as each image's size asks for."""
    image, video, start, end = names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = byte_tokenizer(*names)
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 8},
        text_config=text_config(tokenizer, num_key_value_heads=4, rope_scaling=rope),
        image_token_id=tokenizer.convert_tokens_to_ids(image),
        video_token_id=tokenizer.convert_tokens_to_ids(video),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(start),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(end),
    )
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(patch_size=8, min_pixels=SIDE**2, max_pixels=64**2, **PIXELS),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(patch_size=8),
        chat_template=DEFAULT_CHAT_TEMPLATE.replace("<|im_start|>", "").replace("<image>", start + image + end),
    )
    save(folder, transformers.Qwen2VLForConditionalGeneration(config), processor)


def build_git(folder: Path) -> None:
    tokenizer = word_tokenizer()
    config = transformers.GitConfig(vision_config=VISION, **text_config(tokenizer, bos_token_id=2, eos_token_id=3))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, **PIXELS)
    save(folder, transformers.GitForCausalLM(config), transformers.GitProcessor(images, tokenizer))


def build_instructblip(folder: Path) -> None:
    tokenizer, words = byte_tokenizer("<image>"), word_tokenizer()
    config = transformers.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=LAYERS | {"encoder_hidden_size": WIDTH, "vocab_size": len(words)},
        text_config=text_config(tokenizer, model_type="llama"),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = transformers.BlipImageProcessor(size=SQUARE, **PIXELS)
    processor = transformers.InstructBlipProcessor(images, tokenizer, words, num_query_tokens=4)
    save(folder, transformers.InstructBlipForConditionalGeneration(config), processor)


FAMILIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "blip": (build_blip, ""),
    "blip2": (build_blip2, ""),
    "blip2-without-query-tokens": (build_blip2_without_query_tokens, ""),
    "blip2-t5": (build_blip2_t5, ""),
    "git": (build_git, ""),
    "florence2": (build_florence2, TASK),
    "idefics3": (build_idefics3, INSTRUCTION),
    "smolvlm": (build_smolvlm, INSTRUCTION),
    "qwen2-vl": (build_qwen2_vl, INSTRUCTION),
}
