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


def lacking_for_compilation(environment: Mapping[str, str] = os.environ, headers: Path = _PYTHON_HEADERS) -> str | None:
    """Return what compilation lacks here; None if it has a C compiler and Python's headers."""
    path = environment.get("PATH")
    compilers = [environment["CC"]] if "CC" in environment else ["gcc", "clang"]
    if not any(shutil.which(name, path=path) for name in compilers):
        return "a C compiler (gcc, clang or what $CC names)"
    return None if (headers / "Python.h").exists() else "the headers of Python (python3-dev)"


@functools.cache
def can_compile(phase: str) -> bool:
    """Return whether this machine can compile; if not, warn once a phase (``synthesis``…) on the standard error."""
    lacking = lacking_for_compilation()
    if lacking is not None:
        sys.stderr.write(
            f"{phase}: warning: nothing is compiled, and all is slower, because this machine lacks {lacking}\n"
        )
    return lacking is None
