"""Captions per second of BLIP-2's architecture with random weights, one image at a time and in batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Blip2Processor, BlipImageProcessor

from benchmarks.architectures import blip2
from benchmarks.common import finish, parser, take_turns
from clients.captioning import HubCaptioner
from fgl_app import tiny


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument(
        "--size", choices=["small", "opt-2.7b"], default="small", help="small has the parts of the large"
    )
    options.add_argument("--images", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--max-new-tokens", type=int, default=16)
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    with tempfile.TemporaryDirectory() as folder:
        with device:  # draws the random weights
            model = blip2(chosen.size == "small")
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        tokenizer = Blip2Processor.from_pretrained(tiny.folder_of(tiny.CAPTIONER)).tokenizer
        Blip2Processor(
            BlipImageProcessor(size={"height": 224, "width": 224}), tokenizer, num_query_tokens=32
        ).save_pretrained(folder)
        captioner = HubCaptioner(
            str(Path(folder)), revision="", dtype="auto", max_new_tokens=chosen.max_new_tokens, device=device
        )
    images = torch.randint(
        256, (chosen.images, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def in_batches(size: int) -> Callable[[], int]:
        def run() -> int:
            return sum(len(captioner(part)) for part in images.split(size))

        return run

    rates = take_turns({"one by one": in_batches(1), "ours": in_batches(chosen.batch_size)}, chosen.rounds)
    finish(
        "captioning",
        "images",
        chosen,
        contenders=rates,
        ratio=rates["ours"]["per_second"] / rates["one by one"]["per_second"],
    )


if __name__ == "__main__":
    main()
