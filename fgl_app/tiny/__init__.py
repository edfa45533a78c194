"""The shipped tiny foundation models: a Stable Diffusion and a BLIP-2 as ``save_pretrained`` writes them.

A Flower bundle holds no binary files, so every file of a model travels as JSON text: base64 of its bytes with their
SHA-256. They are unpacked once into a cache and then loaded like any other folder.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from pathlib import Path

from fgl_app.errors import ModelError
from fgl_app.files import cache_folder, sha256

DIFFUSION = "diffusion"
CAPTIONER = "captioner"
_HERE = Path(__file__).resolve().parent


def pack(folder: Path, archive: Path) -> None:
    """Write all files of a model folder into one JSON archive; the same files give the same bytes."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        files[path.relative_to(folder).as_posix()] = {
            "sha256": sha256(content),
            "base64": base64.b64encode(content).decode("ascii"),
        }
    archive.write_text(json.dumps({"files": files}, indent=0) + "\n", "utf-8")


def folder_of(name: str, cache: Path | None = None) -> Path:
    """Return the folder of a shipped model, unpacked on first use.

    Args:
        name: :data:`DIFFUSION` or :data:`CAPTIONER`.
        cache: Where to unpack; by default ``$FGL_CACHE`` or ``~/.cache/federated-generative-learning``.

    Raises:
        ModelError: If the archive is damaged.
    """
    archive = (_HERE / f"{name}.json").read_bytes()
    root = cache or cache_folder()
    target = root / f"{name}-{sha256(archive)[:16]}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}-"))
    try:
        for relative, entry in json.loads(archive)["files"].items():
            content = base64.b64decode(entry["base64"])
            if sha256(content) != entry["sha256"]:
                raise ModelError(f"{name}.json must hold what its checksums say, but {relative} differs. Reinstall.")
            path = staging / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            staging.rename(target)  # atomic; another process may have been first
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
