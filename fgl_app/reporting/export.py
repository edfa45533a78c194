"""Hand a run's synthetic set on, in forms that other programs read."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from fgl_app.errors import ConfigError, SynthesisError
from fgl_app.files import set_mode, write_json
from fgl_app.reporting.finished_run import FinishedRun, drawn_set
from fgl_app.store import UnitStore, as_ids

Form = Literal["folder", "parquet", "webdataset"]
_NAME_BYTES = 200
"""Of a folder's name; file systems take 255."""
_CHUNK = 1024
"""Images in memory at a time."""
_SHARD_IMAGES = 10_000
"""Images of a tar file."""


def export(run: FinishedRun, form: Form, target: Path) -> int:
    """Write the synthetic set of a run, PNG images with their classes, and return the number of images.

    Args:
        run: A run that drew images.
        form: ``folder``: one folder per class, ``LABEL_NAME``, as torchvision's ``ImageFolder`` and
            ``datasets.load_dataset`` read it, beside ``classes.json``, the names in the order of their labels;
            ``parquet``: one file that ``datasets.load_dataset`` reads; ``webdataset``: tar shards.
        target: A folder that does not exist yet; it appears when it is complete.

    Raises:
        ConfigError: If ``target`` exists, or the package webdataset is asked for and absent.
        SynthesisError: If the run drew nothing, or its store is damaged.
    """
    if target.exists():
        raise ConfigError(f"The target must not exist yet, but {str(target)!r} does. Choose another folder.")
    if not run.synthesizes:
        raise SynthesisError(f"{str(run.path)!r} must be a run that drew images, but its method draws none.")
    store, samples = drawn_set(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        writers = {"folder": _write_folder, "parquet": _write_parquet, "webdataset": _write_tars}
        count = writers[form](_images(store, iter(samples)), run.class_names, staging)
        set_mode(staging, 0o755)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return count


def _images(store: UnitStore, samples: Iterator[tuple[bytes, int]]) -> Iterator[tuple[str, int, bytes]]:
    """Yield identity, label and PNG of every image."""
    index = store.index()
    while len(part := as_ids(sample_id for sample_id, _ in islice(samples, _CHUNK))):
        data = store.read(part, index)
        drawn = part[index.row[index.find(part)] >= 0]
        for sample_id, label, image in zip(drawn.view("V16"), data.labels.tolist(), data.images, strict=True):
            yield sample_id.tobytes().hex(), label, _png(image)


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png")
    return buffer.getvalue()


def _write_folder(images: Iterator[tuple[str, int, bytes]], names: tuple[str, ...], folder: Path) -> int:
    count = 0
    folders = [folder / name for name in folder_names(names)]
    for path in folders:
        path.mkdir()
    for sample_id, label, png in images:
        (folders[label] / f"{sample_id}.png").write_bytes(png)
        count += 1
    write_json(folder / "classes.json", list(names))
    return count


def _write_parquet(images: Iterator[tuple[str, int, bytes]], names: tuple[str, ...], folder: Path) -> int:
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))})
    schema = features.arrow_schema
    count = 0
    with pyarrow.parquet.ParquetWriter(folder / "train-00000-of-00001.parquet", schema) as writer:
        while part := list(islice(images, _CHUNK)):
            columns: dict[str, Any] = {
                "image": [{"bytes": png, "path": f"{sample_id}.png"} for sample_id, _, png in part],
                "label": [label for _, label, _ in part],
            }
            writer.write_table(pyarrow.table(columns, schema=schema))
            count += len(part)
    return count


def _write_tars(images: Iterator[tuple[str, int, bytes]], names: tuple[str, ...], folder: Path) -> int:
    try:
        from webdataset import ShardWriter
    except ImportError:
        raise ConfigError(
            "The form webdataset needs the package webdataset, and it is not installed. Install the extra: "
            "pip install 'federated-generative-learning[export]'."
        ) from None
    count = 0
    with ShardWriter(str(folder / "%06d.tar"), maxcount=_SHARD_IMAGES, verbose=0, mtime=0) as writer:
        for sample_id, label, png in images:
            writer.write({"__key__": sample_id, "png": png, "cls": label, "txt": names[label]})
            count += 1
    return count


def folder_names(names: Sequence[str]) -> list[str]:
    """Return the name of a folder for each class: its label, with zeros before it, and its name as far as it is safe.

    Readers count classes in the order of their folders' names, which is then that of the model's labels.
    """
    digits = len(str(len(names) - 1))
    return [f"{label:0{digits}}_{_file_name(name)}" for label, name in enumerate(names)]


def _file_name(name: str) -> str:
    """A class name as the name of a folder: letters of clients never leave the target, nor are they too many."""
    safe = "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in name)
    return safe.encode()[:_NAME_BYTES].decode("utf-8", "ignore").strip() or "_"
