"""Training on a synthetic set: our loop on images in memory against PIL and a DataLoader over PNG files.

On a GPU ours is compiled, as ``compile-training=true`` asks for.

With ``--model pool`` the classifier is an average and a linear layer, so that the input pipelines alone are compared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.common import finish, parser, take_turns
from fgl_app.data.images import ImageSet
from fgl_app.models import build_model
from fgl_app.training import IMAGENET_MEAN, IMAGENET_SD, MOMENTUM, train

NUM_CLASSES = 10
STORED_SIZE = 256
LEARNING_RATE = 0.01


def classifier(name: str, size: int) -> nn.Module:
    """Return a classifier by name; ``pool`` is next to no work."""
    if name == "pool":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES))
    return build_model(name, NUM_CLASSES, size, 0)


def with_pil(folder: Path, model: nn.Module, size: int, batch_size: int, device: torch.device) -> Callable[[], int]:
    """Return an epoch as it is usually written: decoding, cropping and flipping in worker processes."""
    steps = [
        transforms.RandomResizedCrop(size, scale=(0.75, 1.0)), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_SD),
    ]  # fmt: skip
    data = ImageFolder(folder, transforms.Compose(steps))
    workers = os.cpu_count() or 1
    loader = DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, persistent_workers=True, pin_memory=device.type == "cuda"
    )
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)

    def run() -> int:
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(data)

    return run


def ours(data: ImageSet, model: nn.Module, batch_size: int, device: torch.device, epochs: int) -> Callable[[], int]:
    """Return epochs of our loop, the copy of the images to the device included."""

    def run() -> int:
        train(
            model, data, epochs=epochs, batch_size=batch_size, learning_rate=LEARNING_RATE, weight_decay=0.0,
            augmentation="crop-flip", generator=torch.Generator().manual_seed(0), device=device,
            compiled=device.type == "cuda",
        )  # fmt: skip
        return epochs * len(data)

    return run


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--model", default="resnet18", help="of torchvision, or pool")
    options.add_argument("--images", type=int, default=256)
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--epochs", type=int, default=1, help="of ours in a turn: a GPU needs some to be timed")
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    generator = torch.Generator().manual_seed(0)
    # Smooth pictures: noise would be no fair food for a PNG decoder.
    coarse = torch.rand(chosen.images, 3, 16, 16, generator=generator)
    stored = (F.interpolate(coarse, STORED_SIZE, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    labels = torch.arange(chosen.images) % NUM_CLASSES
    with tempfile.TemporaryDirectory() as root:
        for label in labels.unique().tolist():
            (Path(root) / str(label)).mkdir()

        def write(index: int) -> None:
            picture = Image.fromarray(stored[index].permute(1, 2, 0).numpy())
            picture.save(Path(root) / str(int(labels[index])) / f"{index}.png")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, range(chosen.images)))
        small = F.interpolate(stored.float(), chosen.size, mode="bilinear", antialias=True).round().to(torch.uint8)
        rates = take_turns(
            {
                "pil": with_pil(
                    Path(root), classifier(chosen.model, chosen.size), chosen.size, chosen.batch_size, device
                ),
                "ours": ours(
                    ImageSet(small, labels),
                    classifier(chosen.model, chosen.size),
                    chosen.batch_size,
                    device,
                    chosen.epochs,
                ),
            },
            chosen.rounds,
        )
    finish(
        "training", "images", chosen, contenders=rates, ratio=rates["ours"]["per_second"] / rates["pil"]["per_second"]
    )


if __name__ == "__main__":
    main()
