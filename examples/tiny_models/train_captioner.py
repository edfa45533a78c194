"""Train the tiny BLIP-2 on the public corpus.

    python examples/tiny_models/train_captioner.py --output build/tiny-captioner

Writes the folder that ``save_pretrained`` of ``Blip2ForConditionalGeneration`` and of its processor write, weights in
fp16.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import corpus as corpora
import numpy as np
import torch
import torch.nn.functional as F
import vocabulary
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    GPT2Tokenizer,
    OPTConfig,
)

NUM_QUERY_TOKENS = 8
WIDTH = 64


def build_processor(tokenizer: GPT2Tokenizer) -> Blip2Processor:
    size = {"height": corpora.IMAGE_SIZE_PX, "width": corpora.IMAGE_SIZE_PX}
    image_processor = BlipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True)
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=NUM_QUERY_TOKENS)


def build_model(tokenizer: GPT2Tokenizer) -> Blip2ForConditionalGeneration:
    """A complete BLIP-2: vision transformer, Q-Former and OPT language model. ``<image>`` must be in the tokenizer."""
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **(common | {"num_hidden_layers": 3}),
            intermediate_size=2 * WIDTH,
            image_size=corpora.IMAGE_SIZE_PX,
            patch_size=4,
            initializer_range=0.02,
        ),
        qformer_config=Blip2QFormerConfig(
            **common,
            intermediate_size=2 * WIDTH,
            encoder_hidden_size=WIDTH,
            vocab_size=8,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=OPTConfig(
            **common,
            vocab_size=len(tokenizer),
            ffn_dim=2 * WIDTH,
            word_embed_proj_dim=WIDTH,
            dropout=0.0,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def batch_of(
    corpus: corpora.Corpus, rows: np.ndarray, tokenizer: GPT2Tokenizer, rng: np.random.Generator, device: str
) -> dict[str, torch.Tensor]:
    """Images, half of them through 16 x 16 pixels as a client's may be, and captions behind the image tokens."""
    pixels = torch.from_numpy(corpus.images[rows]).float().div(127.5).sub(1)[:, None]
    small = F.interpolate(F.interpolate(pixels, size=16, mode="bilinear", antialias=True), size=32, mode="bicubic")
    through = torch.from_numpy(rng.random(len(rows)) < 0.5)[:, None, None, None]
    pixels = torch.where(through, small.clamp(-1, 1), pixels).expand(-1, 3, -1, -1)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    sequences = []
    for row in rows.tolist():
        words = tokenizer(corpora.plain_caption(corpus, row), add_special_tokens=False).input_ids
        sequences.append([image_id] * NUM_QUERY_TOKENS + [tokenizer.bos_token_id, *words, tokenizer.eos_token_id])
    length = max(map(len, sequences))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for index, sequence in enumerate(sequences):
        ids[index, : len(sequence)] = torch.tensor(sequence)
        labels[index, NUM_QUERY_TOKENS + 1 : len(sequence)] = torch.tensor(sequence[NUM_QUERY_TOKENS + 1 :])
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}
    return {name: value.to(device) for name, value in (batch | {"labels": labels}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--fashion-dir", default="", help="where Fashion-MNIST lies; by default torchvision downloads it"
    )
    parser.add_argument("--without-fashion", action="store_true")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    corpus = corpora.build(None if args.without_fashion else args.fashion_dir)
    rng = np.random.default_rng(5)
    tokenizer = vocabulary.gpt2_tokenizer(
        [corpora.plain_caption(corpus, row) for row in rng.integers(0, len(corpus.labels), 5000).tolist()]
    )
    processor = build_processor(tokenizer)
    torch.manual_seed(5)
    model = build_model(tokenizer).to(args.device).train()
    print("parameters", sum(p.numel() for p in model.parameters()), "vocabulary", len(tokenizer), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / args.steps)))),
    )
    shares = {corpora.CLOTHES: 0.5, corpora.HANDWRITTEN: 0.38, corpora.PRINTED: 0.12}
    losses = []
    for step in tqdm(range(args.steps), desc="captioner", unit="step", mininterval=10):
        rows = corpora.choose(corpus, args.batch_size, shares, rng)
        loss = model(**batch_of(corpus, rows, tokenizer, rng, args.device)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} loss {np.mean(losses[-250:]):.4f}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    model.cpu().half().eval().save_pretrained(args.output / "model", safe_serialization=True)
    processor.save_pretrained(args.output / "model")


if __name__ == "__main__":
    main()
