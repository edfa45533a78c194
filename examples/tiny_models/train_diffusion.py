"""Train the tiny Stable Diffusion on the public corpus.

    python examples/tiny_models/train_diffusion.py --output build/tiny-diffusion

Writes the folder that ``StableDiffusionPipeline.save_pretrained`` writes, weights in fp16.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import corpus as corpora
import numpy as np
import torch
import torch.nn.functional as F
import vocabulary
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=corpora.IMAGE_SIZE_PX,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        norm_num_groups=8,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=vocabulary.CONTEXT_LENGTH,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def to_pixels(images: np.ndarray, device: str) -> torch.Tensor:
    """Grey uint8 ``[N, 32, 32]`` to float ``[N, 3, 32, 32]`` in -1 to 1."""
    return torch.from_numpy(images).to(device).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)


def train_autoencoder(images: np.ndarray, steps: int, device: str) -> AutoencoderKL:
    torch.manual_seed(1)
    vae = build_autoencoder().to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = np.random.default_rng(1)
    bar = tqdm(range(steps), desc="autoencoder", unit="step", mininterval=5)
    for _ in bar:
        x = to_pixels(images[rng.integers(0, len(images), 64)], device)
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-4 * posterior.kl().mean() / 256
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return vae.eval()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, device: str) -> torch.Tensor:
    parts = [vae.encode(to_pixels(images[i : i + 512], device)).latent_dist.mean for i in range(0, len(images), 512)]
    return torch.cat(parts)


def save(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--fashion-dir", default="", help="where Fashion-MNIST lies; by default torchvision downloads it"
    )
    parser.add_argument("--without-fashion", action="store_true")
    parser.add_argument("--autoencoder-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--snapshot-every", type=int, default=500)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    corpus = corpora.build(None if args.without_fashion else args.fashion_dir)
    print("corpus", corpus.images.shape, corpora.digest(corpus))
    rng = np.random.default_rng(2)
    tokenizer = vocabulary.clip_tokenizer(
        [corpora.web_caption(corpus, row, rng) for row in rng.integers(0, len(corpus.labels), 20000).tolist()]
    )
    vae_file = args.output / "autoencoder.pt"
    if vae_file.exists():
        vae = build_autoencoder().to(args.device).eval()
        vae.load_state_dict(torch.load(vae_file, weights_only=True))
    else:
        vae = train_autoencoder(corpus.images, args.autoencoder_steps, args.device)
        torch.save(vae.state_dict(), vae_file)
    latents = encode_all(vae, corpus.images, args.device)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    latents = latents * vae.config.scaling_factor

    torch.manual_seed(3)
    unet = build_unet().to(args.device)
    text_encoder = build_text_encoder(tokenizer).to(args.device)
    counts = {
        name: sum(p.numel() for p in m.parameters())
        for name, m in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder))
    }
    print("parameters", counts, "vocabulary", len(tokenizer), flush=True)
    trained = torch.nn.ModuleList([unet, text_encoder])
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1.5e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / args.steps)))),
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    shares = {corpora.CLOTHES: 0.6, corpora.HANDWRITTEN: 0.3, corpora.PRINTED: 0.1}
    state_file, first = args.output / "state.pt", 0
    if state_file.exists():  # of a training that was interrupted
        state = torch.load(state_file, weights_only=True)
        for name, holder in (
            ("trained", trained), ("average", average), ("optimizer", optimizer), ("schedule", schedule)
        ):  # fmt: skip
            holder.load_state_dict(state[name])
        rng.bit_generator.state, first = state["rng"], state["step"]
        torch.set_rng_state(state["torch_rng"])
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="diffusion", unit="step", mininterval=10)
    losses, started = [], time.time()
    for step in bar:
        rows = corpora.choose(corpus, args.batch_size, shares, rng).tolist()
        texts = ["" if rng.random() < 0.1 else corpora.web_caption(corpus, row, rng) for row in rows]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(args.device)
        clean = latents[rows]
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(rows),), device=args.device)
        noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
        hidden = text_encoder(tokens.input_ids).last_hidden_state
        # Half of the texts as a client uploads embeddings: without padding, which the end token's row then replaces.
        ends = tokens.attention_mask.sum(1) - 1
        last = hidden[torch.arange(len(rows)), ends][:, None].expand_as(hidden)
        filled = torch.where(tokens.attention_mask[..., None].bool(), hidden, last)
        unpadded = torch.from_numpy(rng.random(len(rows)) < 0.5).to(args.device)[:, None, None]
        loss = F.mse_loss(unet(noisy, t, torch.where(unpadded, filled, hidden)).sample, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % args.snapshot_every == 0 or step + 1 == args.steps:
            print(f"step {step + 1} loss {np.mean(losses[-500:]):.4f} {time.time() - started:.0f} s", flush=True)
            save(args.output / "pipeline", vae, average[1], tokenizer, average[0], scheduler)
            state = {
                "trained": trained.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state(),
                "step": step + 1,
            }  # fmt: skip
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)


if __name__ == "__main__":
    main()
