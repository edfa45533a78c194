"""What is compiled, and whether ``torch.compile`` has on this machine what it compiles with."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

_PYTHON_HEADERS = Path(sysconfig.get_path("include", "posix_prefix"))
"""Where Triton looks for ``Python.h``; the scheme that Debian prefers names another folder."""
_MAX_SHAPES = 64
"""Shapes for which one function is compiled: batches with and without guidance, halved where memory runs out."""

T = TypeVar("T")


def lacking_for_compilation(
    kind: str, environment: Mapping[str, str] = os.environ, headers: Path = _PYTHON_HEADERS
) -> str | None:
    """Return what compilation lacks here; None if it has a compiler and Python's headers.

    Args:
        kind: Of the device: for ``cuda`` Triton calls a C compiler, for ``cpu`` PyTorch's inductor one of C++.
        environment: Names the compilers and where they are looked for.
        headers: Where ``Python.h`` is looked for.
    """
    variable, language, known = ("CC", "C", ["gcc", "clang"]) if kind == "cuda" else ("CXX", "C++", ["g++"])
    compilers = [environment[variable]] if variable in environment else known
    if not any(shutil.which(name, path=environment.get("PATH")) for name in compilers):
        return f"a {language} compiler ({', '.join(known)} or what ${variable} names)"
    return None if (headers / "Python.h").exists() else "the headers of Python (python3-dev)"


@functools.cache
def can_compile(phase: str, kind: str) -> bool:
    """Return whether this machine can compile for a kind of device; if not, warn on the standard error.

    It warns once a phase (``synthesis``…).
    """
    lacking = lacking_for_compilation(kind)
    if lacking is not None:
        sys.stderr.write(
            f"{phase}: warning: nothing is compiled, and all is slower, because this machine lacks {lacking}\n"
        )
    return lacking is None


def reproducible(function: Callable[..., T]) -> Callable[..., T]:
    """Compile a function for each shape that it meets, so that it rounds alike in every process on this kind of GPU.

    PyTorch chooses among kernels by timing them; here those are left out that sum in another order.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options={"deterministic": True})

    @functools.wraps(function)
    def call(*arguments: Any) -> T:
        # Whoever draws does so on a thread of its own, and PyTorch keeps this limit by thread.
        with torch._dynamo.config.patch(recompile_limit=_MAX_SHAPES):
            result: T = compiled(*arguments)
        return result

    return call


def for_many_steps(model: torch.nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
    """Compile a classifier that is trained in batches of one shape.

    On a GPU each step is recorded once and replayed (CUDA graphs): a ResNet's kernels end sooner than Python can start
    them.
    """
    compiled: Callable[..., torch.Tensor] = torch.compile(
        model, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default"
    )
    return compiled
