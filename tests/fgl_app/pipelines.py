"""Tiny pipelines of several families with random weights, saved as those of the hub are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from plans import CPU, SETTINGS

from fgl_app.synthesis.generator import load_pipeline

_ATTENDING = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
_WORDS = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def _shipped() -> Any:
    torch.manual_seed(0)
    return load_pipeline(SETTINGS, CPU)


def _t5(shipped: Any) -> Any:
    size = shipped.text_encoder.config.vocab_size
    config = transformers.T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def _projecting(shipped: Any) -> Any:
    config = transformers.CLIPTextConfig(**{**shipped.text_encoder.config.to_dict(), "projection_dim": 16})
    return transformers.CLIPTextModelWithProjection(config)


def _unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, **_ATTENDING, **options
    )  # fmt: skip


def save_sdxl(folder: Path) -> None:
    shipped = _shipped()
    unet = _unet(
        cross_attention_dim=128, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=shipped.vae, text_encoder=shipped.text_encoder, text_encoder_2=_projecting(shipped),
        tokenizer=shipped.tokenizer, tokenizer_2=shipped.tokenizer, unet=unet, scheduler=shipped.scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip


def save_lcm(folder: Path) -> None:
    shipped = _shipped()
    diffusers.LatentConsistencyModelPipeline(
        vae=shipped.vae, text_encoder=shipped.text_encoder, tokenizer=shipped.tokenizer,
        unet=_unet(cross_attention_dim=64, time_cond_proj_dim=16), scheduler=diffusers.LCMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def save_flux(folder: Path, guidance_embeds: bool = True) -> None:
    shipped = _shipped()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=64, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer,
        vae=diffusers.AutoencoderKL.from_config(shipped.vae.config, shift_factor=0.0),
        text_encoder=shipped.text_encoder, tokenizer=shipped.tokenizer, text_encoder_2=_t5(shipped),
        tokenizer_2=shipped.tokenizer,
    ).save_pretrained(folder)  # fmt: skip


def save_pixart(folder: Path) -> None:
    shipped = _shipped()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    diffusers.PixArtSigmaPipeline(
        tokenizer=shipped.tokenizer, text_encoder=_t5(shipped), vae=shipped.vae, transformer=transformer,
        scheduler=shipped.scheduler,
    ).save_pretrained(folder)  # fmt: skip


def save_sana(folder: Path) -> None:
    shipped = _shipped()
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=32,
    )  # fmt: skip
    coding = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)), "layers_per_block": (1, 1),
        }.items()
    }  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", **coding,
    )  # fmt: skip
    gemma = transformers.Gemma2Config(
        **_WORDS, head_dim=8, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512
    )
    diffusers.SanaPipeline(
        tokenizer=shipped.tokenizer, text_encoder=transformers.Gemma2Model(gemma), vae=vae, transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ).save_pretrained(folder)  # fmt: skip


def _qwen_tokenizer() -> Any:
    shipped = _shipped().tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=shipped.backend_tokenizer, pad_token=shipped.pad_token, eos_token=shipped.eos_token,
        model_max_length=512,
    )  # fmt: skip
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def save_qwen(folder: Path) -> None:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    attending = {"num_attention_heads": 2, "num_key_value_heads": 2}
    text = transformers.Qwen2_5_VLConfig(
        text_config={**_WORDS, **attending, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )  # fmt: skip
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(text), tokenizer=_qwen_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def save_klein(folder: Path) -> None:
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16 * 3, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), patch_size=(2, 2),
    )  # fmt: skip
    text = transformers.Qwen3Config(
        **_WORDS | {"num_hidden_layers": 28}, num_attention_heads=2, num_key_value_heads=2, head_dim=8
    )
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer,
        text_encoder=transformers.Qwen3ForCausalLM(text), tokenizer=_qwen_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


BUILDERS: dict[str, Callable[[Path], None]] = {
    "sdxl": save_sdxl,
    "lcm": save_lcm,
    "flux": save_flux,
    "pixart": save_pixart,
    "sana": save_sana,
    "qwen": save_qwen,
    "klein": save_klein,
}
