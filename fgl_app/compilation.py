"""Whether ``torch.compile`` has on this machine what it compiles with."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

_PYTHON_HEADERS = Path(sysconfig.get_path("include", "posix_prefix"))
"""Where Triton looks for ``Python.h``; the scheme that Debian prefers names another folder."""


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
