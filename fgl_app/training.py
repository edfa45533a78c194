"""Local SGD and evaluation; the server and the clients share them."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fgl_app.compilation import can_compile, for_many_steps
from fgl_app.data.images import ImageSet
from fgl_app.errors import ConfigError

MOMENTUM = 0.9
"""FGL, Appendix: SGD with momentum 0.9 on the server and on the clients."""
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue of ImageNet's pixels, 0 to 1: what torchvision's pretrained weights expect."""
NUMBERS_PER_CROP = 5
"""Random numbers that decide how one image is cropped and flipped."""
_EVALUATION_BATCH = 256
_CACHED_VALUES = 1 << 20
"""Values of images that a CPU crops at a time, 4 MB."""
_SHARE_OF_MEMORY = 0.5
"""Of a GPU's free memory, which images may take."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over a set of images."""

    loss: float
    """Cross-entropy, nats."""
    accuracy: float
    """Share of correct predictions, 0 to 1."""
    num_examples: int
    predictions: torch.Tensor
    """Predicted class of each image, int64 ``[N]``."""


def pick_device(name: str) -> torch.device:
    """Turn the ``device`` setting into a device; ``auto`` is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def check_device(name: str, key: str = "device") -> None:
    """Check that a setting, ``key``, names a device of this machine.

    Raises:
        ConfigError: If it asks for a GPU that PyTorch does not see.
    """
    device = pick_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"`{key}` must be a device of this machine, but {name} is none. Use auto or cpu.")


def train(
    model: nn.Module,
    data: ImageSet,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    augmentation: str,
    schedule: str = "constant",
    proximal_mu: float = 0.0,
    generator: torch.Generator,
    device: torch.device,
    compiled: bool = False,
    on_epoch: Callable[[int, float], None] | None = None,
) -> float:
    """Train a classifier in place by SGD with momentum 0.9 on the cross-entropy.

    Args:
        model: From float ``[N, 3, S, S]`` to logits ``[N, K]``.
        data: At least one image.
        epochs: Passes over the data, each in a new random order.
        batch_size: Images per step.
        learning_rate: Step size.
        weight_decay: L2 penalty (2e-4 on the paper's server, 1e-4 on its clients).
        augmentation: ``none``, ``crop`` or ``crop-flip``.
        schedule: ``constant``, or ``cosine``: the step size falls to zero along half a cosine (Loshchilov & Hutter
            2017, Eq. 5, without restarts), so that the end does not depend on the noise of the last steps.
        proximal_mu: Weight of the squared distance to the initial weights, of which half is added to the loss; 0 for
            none.
        generator: CPU generator of the order and the crops.
        device: Where to train.
        compiled: Whether to compile the classifier first, where this machine can: a minute that many steps pay back.
        on_epoch: Called with the number of finished epochs and their last mean loss.

    Returns:
        Mean loss over the last epoch, nats.
    """
    # A private generator drives dropout, so that training neither reads nor moves the global one.
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        _place(model, device).train()
        network = for_many_steps(model, device) if compiled and can_compile("training", device.type) else model
        optimizer = torch.optim.SGD(
            model.parameters(), learning_rate, momentum=MOMENTUM, weight_decay=weight_decay, fused=device.type == "cuda"
        )
        total_steps = epochs * math.ceil(len(data) / batch_size)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps) if schedule == "cosine" else None
        anchor = [weight.detach().clone() for weight in model.parameters()] if proximal_mu > 0 else []
        mean_loss = math.nan
        resident = is_resident(data.images, device)
        source = ImageSet(data.images.to(device), data.labels.to(device)) if resident else data
        for epoch in range(epochs):
            total = torch.zeros((), device=device)
            order = torch.randperm(len(data), generator=generator)
            batches = (order.to(device) if resident else order).split(batch_size)  # one copy, not one in every step
            # BatchNorm cannot normalise a single value: a batch of one is doubled, which leaves the mean as it is.
            steps = [rows.repeat(2) if len(rows) == 1 else rows for rows in batches]
            taken = taken_on_device(source, steps) if resident else prefetched(source, steps, device)
            for rows, (images, labels) in zip(batches, taken, strict=True):
                pixels = augment(images, augmentation, generator)
                # Half precision where the hardware multiplies it faster; the weights stay in fp32.
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    # A last batch of another length would be compiled anew.
                    loss = F.cross_entropy(_logits(network if len(labels) == batch_size else model, pixels), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for weight, first in zip(model.parameters(), anchor, strict=bool(anchor)):
                    if weight.grad is not None:
                        weight.grad.add_(weight.detach() - first, alpha=proximal_mu)
                optimizer.step()
                if decay is not None:
                    decay.step()
                total += loss.detach() * len(rows)
            mean_loss = total.item() / len(data)
            if on_epoch is not None:
                on_epoch(epoch + 1, mean_loss)
    model.to("cpu")
    return mean_loss


def is_resident(images: torch.Tensor, device: torch.device) -> bool:
    """Return whether the images can lie on the device for the whole training, uint8 ``[N, 3, S, S]``."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes < _SHARE_OF_MEMORY * free


def taken_on_device(source: ImageSet, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield images and labels of each batch of rows, from where they lie."""
    for rows in order:
        yield source.images[rows], source.labels[rows]


def prefetched(
    source: ImageSet, order: Sequence[torch.Tensor], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As :func:`taken_on_device` for images in memory or in a mapped file: a thread gathers the next batch meanwhile.

    Two pinned buffers take turns and are copied on a stream of their own, beside the step before.
    """
    pinned = device.type == "cuda"
    stream = torch.cuda.Stream(device) if pinned else None
    labels = source.labels[torch.cat(list(order))].to(device).split([len(rows) for rows in order]) if order else ()
    longest = max(map(len, order), default=0)
    shape = (longest, *source.images.shape[1:])
    buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in range(2)] if pinned else []

    def gather(number: int) -> torch.Tensor:
        if pinned:
            copied[number % 2].synchronize()  # the buffer's last copy has left it
        rows = order[number]
        return torch.index_select(source.images, 0, rows, out=buffers[number % 2][: len(rows)])

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(gather, 0) if len(order) else None
        for number in range(len(order)):
            assert following is not None
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                images = following.result().to(device, non_blocking=True, copy=True)
            if stream is not None:
                copied[number % 2].record(stream)
                step = torch.cuda.current_stream(device)  # not that of the current device
                step.wait_event(copied[number % 2])
                images.record_stream(step)
            following = pool.submit(gather, number + 1) if number + 1 < len(order) else None
            yield images, labels[number]


def evaluate(model: nn.Module, data: ImageSet, device: torch.device) -> Evaluation:
    """Measure loss and accuracy of a classifier; an empty set gives zeros."""
    if len(data) == 0:
        return Evaluation(0.0, 0.0, 0, torch.zeros(0, dtype=torch.int64))
    network = _place(copy.deepcopy(model), device).eval()
    loss, predictions = 0.0, []
    with torch.inference_mode():
        for start in range(0, len(data), _EVALUATION_BATCH):
            labels = data.labels[start : start + _EVALUATION_BATCH].to(device)
            logits = network(normalize(data.images[start : start + _EVALUATION_BATCH].to(device)))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            predictions.append(logits.argmax(1).cpu())
    predicted = torch.cat(predictions)
    accuracy = int((predicted == data.labels).sum()) / len(data)
    return Evaluation(loss / len(data), accuracy, len(data), predicted)


def accuracy_by_domain(predictions: torch.Tensor, data: ImageSet, domains: Sequence[str]) -> dict[str, float]:
    """Return the share of correct predictions, 0 to 1, in each domain that has images; empty without domains."""
    if data.domains is None:
        return {}
    right = predictions == data.labels
    rows = {name: data.domains == number for number, name in enumerate(domains)}
    return {name: float(right[mask].float().mean()) for name, mask in rows.items() if mask.any()}


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 ``[N, 3, S, S]`` to float32, channels last, so that ImageNet's pixels have mean 0 and variance 1."""
    return _standardize(images.to(torch.float32, memory_format=torch.channels_last))


def augment(images: torch.Tensor, augmentation: str, generator: torch.Generator) -> torch.Tensor:
    """Normalize, crop 0.75 to 1 of the area at aspect ratios 3/4 to 4/3 (``crop``) and flip (``crop-flip``).

    Args:
        images: uint8 ``[N, 3, S, S]``.
        augmentation: ``none``, ``crop`` or ``crop-flip``.
        generator: CPU generator.

    Returns:
        float32 ``[N, 3, S, S]``, normalized as :func:`normalize` does.
    """
    if augmentation == "none":
        return normalize(images)
    return augment_by(images, augmentation, torch.rand(NUMBERS_PER_CROP, len(images), generator=generator).T)


def augment_by(images: torch.Tensor, augmentation: str, numbers: torch.Tensor) -> torch.Tensor:
    """Augment each image by random numbers of its own; see :func:`augment`.

    One ``grid_sample`` cuts its own crop of every row; transforms of torchvision would draw one for the whole batch.

    Args:
        images: uint8 ``[N, 3, S, S]``.
        augmentation: ``none``, ``crop`` or ``crop-flip``.
        numbers: Uniform from 0 to 1, float32 ``[N, 5]``: of each image, area, aspect ratio, x, y and whether to flip.

    Returns:
        float32 ``[N, 3, S, S]``; each row depends on the same row of ``images`` and ``numbers`` alone.
    """
    if augmentation == "none":
        return normalize(images)
    windows = _windows(numbers, augmentation == "crop-flip").to(images.device, non_blocking=True)
    pixels = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    # A CPU takes half the time where what lies between two steps of a few images stays in its cache.
    rows = len(images) if images.is_cuda else max(1, _CACHED_VALUES // images[0].numel())
    for into, part, of_part in zip(pixels.split(rows), images.split(rows), windows.split(rows), strict=True):
        # Half precision would round the coordinates of the crops, by a part of a pixel.
        with torch.autocast(images.device.type, enabled=False):
            places = _sample_places(of_part, images.shape[-1])
            whole = _standardize(part.float())
            into.copy_(F.grid_sample(whole, places, mode="bilinear", padding_mode="border", align_corners=False))
    return pixels


def _windows(numbers: torch.Tensor, flip: bool) -> torch.Tensor:
    """Return windows of images, half of them mirrored if ``flip``: middle and extent along x and y, ``[N, 2, 2]``.

    Coordinates run from -1 to 1; a mirrored window has a negative extent along x.
    """
    of_area, of_aspect, along_x, along_y, of_flip = numbers.unbind(1)
    area = 0.75 + 0.25 * of_area
    aspect = torch.exp(math.log(4 / 3) * (2 * of_aspect - 1))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = (2 * along_x - 1) * (1 - width), (2 * along_y - 1) * (1 - height)
    mirror = torch.where(of_flip < 0.5, -1.0, 1.0) if flip else torch.ones(len(numbers))
    return torch.stack([torch.stack([x, width * mirror], 1), torch.stack([y, height], 1)], 1)


def _sample_places(windows: torch.Tensor, side: int) -> torch.Tensor:
    """Return where to sample each window: ``[N, side, side, 2]``, what ``affine_grid`` gives in twice the time."""
    steps = torch.arange(1 - side, side, 2, device=windows.device) / side  # the middles of pixels
    along_x, along_y = (windows[:, :, :1] + windows[:, :, 1:] * steps).unbind(1)
    shape = (len(windows), side, side)
    return torch.stack([along_x[:, None].expand(shape), along_y[:, :, None].expand(shape)], -1)


def _standardize(pixels: torch.Tensor) -> torch.Tensor:
    """Map float32 ``[N, 3, S, S]``, 0 to 255, in place."""
    mean, sd = _moments(pixels.device)
    return pixels.sub_(mean).div_(sd)


@functools.cache
def _moments(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of ImageNet's pixels, 0 to 255, ``[3, 1, 1]``."""
    mean, sd = (255 * torch.tensor(value, device=device)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_SD))
    return mean, sd


def _place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device in place, channels last, as the images are."""
    # nn.Module.to documents `memory_format`, but torch's annotations have no overload with it.
    placed: nn.Module = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _logits(model: Callable[..., torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    output = model(pixels)
    # googlenet and inception_v3 return their auxiliary logits beside the main ones while they train.
    return output if isinstance(output, torch.Tensor) else output.logits
