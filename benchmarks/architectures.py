"""Full-size architectures with random weights: throughput does not depend on the weights, and nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    OPTConfig,
)

from fgl_app import tiny


def stable_diffusion_2_1(folder: Path, device: torch.device) -> Path:
    """Write a ``StableDiffusionPipeline`` of the architecture of SD 2.1-base (865.9 M parameters in the UNet).

    Args:
        folder: Where to.
        device: Draws the random weights.
    """
    torch.manual_seed(0)
    with device:
        parts = _parts_of_stable_diffusion_2_1()
    tokenizer = CLIPTokenizer.from_pretrained(tiny.folder_of(tiny.DIFFUSION) / "tokenizer", model_max_length=77)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, skip_prk_steps=True,
        steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _parts_of_stable_diffusion_2_1() -> dict[str, torch.nn.Module]:
    unet = UNet2DConditionModel(
        sample_size=64,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
            max_position_embeddings=77, hidden_act="gelu", projection_dim=512,
        )
    )  # fmt: skip
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


def random_lora(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Write random LoRA weights for a UNet's attention, which cost as much as trained ones; it keeps them."""
    unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


def blip2(small: bool) -> Blip2ForConditionalGeneration:
    """Return a BLIP-2 with OPT: that of ``blip2-opt-2.7b``, or one of the same parts that a CPU can run."""
    torch.manual_seed(0)
    if small:
        vision = Blip2VisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
        qformer = Blip2QFormerConfig(
            hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, encoder_hidden_size=128
        )
        text = OPTConfig(
            vocab_size=50304, hidden_size=128, ffn_dim=256, num_hidden_layers=4, num_attention_heads=4,
            word_embed_proj_dim=128,
        )  # fmt: skip
    else:
        vision, qformer = Blip2VisionConfig(), Blip2QFormerConfig()
        text = OPTConfig(
            vocab_size=50304, hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32,
            word_embed_proj_dim=2560,
        )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32, image_token_index=50265
    )
    return Blip2ForConditionalGeneration(config)
