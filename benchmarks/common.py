"""What every benchmark shares: turns, medians, the machine, the result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("flwr", "torch", "torchvision", "diffusers", "transformers", "ray", "numpy")


def parser(about: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--json", type=Path, help="where the result goes, too")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rounds", type=int, default=3, help="turns of each contender; the median counts")
    return made


def take_turns(contenders: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, Any]]:
    """Run every contender once per round, in turn; the first round, which warms up, does not count.

    Args:
        contenders: Functions that do the work and return the number of items they did.
        rounds: Turns that count.

    Returns:
        Items per second of each contender: all turns and their median.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            items = run()
            seconds = time.perf_counter() - started
            print(f"{'warm-up' if turn == 0 else f'turn {turn}'}: {name}: {items / seconds:.4g} /s", flush=True)
            if turn:
                rates[name].append(items / seconds)
    return {name: {"per_second": statistics.median(found), "turns": found} for name, found in rates.items()}


def machine() -> dict[str, Any]:
    """Return hardware and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def matrix_peak(device: torch.device) -> float:
    """Measure how fast the device multiplies large matrices in bf16, or fp32 on a CPU, operations per second."""
    on_gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def seconds() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / 10

    seconds()  # warms up
    return 2 * side**3 / min(seconds() for _ in range(3))


def finish(name: str, unit: str, chosen: argparse.Namespace, **found: Any) -> None:
    """Print the result of a benchmark with its options and the machine, and write it to the file asked for.

    Args:
        name: Of the benchmark.
        unit: What is counted per second.
        chosen: Its options.
        found: What it found: ``contenders``, ``ratio``...
    """
    options = {key: str(value) for key, value in vars(chosen).items() if key != "json"}
    text = json.dumps({"benchmark": name, "unit": unit, "options": options, **found, "machine": machine()}, indent=2)
    print(text)
    if chosen.json is not None:
        chosen.json.write_text(text + "\n")
