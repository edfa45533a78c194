"""Where foundation models lie: the shipped ones, folders that ``save_pretrained`` wrote, and hub ids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fgl_app import tiny
from fgl_app.errors import ConfigError, ModelError
from fgl_app.files import canonical_json, sha256

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_WEIGHTS = re.compile(rf"(?:diffusion_pytorch_)?model{_SHARD}(?:\.(?P<variant>[a-z0-9_]+))?{_SHARD}\.safetensors")
"""Weights as diffusers and transformers name them, whole or in parts: model.safetensors, model.fp16.safetensors…"""
_NO_WEIGHTS = re.compile(r"Tokenizer|Processor|Scheduler|FeatureExtractor")
"""Parts of a pipeline without weights, by the name of their class."""


def locate(source: str, revision: str, shipped: str | None = None) -> tuple[str, str | None]:
    """Say what to hand to ``from_pretrained``.

    Args:
        source: ``tiny`` where a model is shipped, a folder, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        shipped: Name of the shipped model that ``tiny`` means; None if there is none.

    Returns:
        A folder or hub id, and the revision of a hub id.
    """
    if source == "tiny" and shipped is not None:
        return str(tiny.folder_of(shipped)), None
    folder = Path(source).expanduser()
    return (str(folder), None) if folder.is_dir() else (source, revision or None)


def identity_of(source: str, shipped: str | None = None) -> tuple[str | int, ...]:
    """Tell foundation models apart: a shipped one by its checksum, a folder by its files, a hub id by itself.

    Of a folder count path, and each file's name, size and time of modification, hidden ones aside: hashing gigabytes of
    weights at every start would take longer than most starts. A copy of a folder is thus another model.

    Args:
        source: ``tiny`` where a model is shipped, a folder, or a hub id.
        shipped: Name of the shipped model that ``tiny`` means; None if there is none.
    """
    if source == "tiny" and shipped is not None:
        return (tiny.folder_of(shipped).name,)
    folder = Path(source).expanduser()
    identity: list[str | int] = [source]
    for path in sorted(folder.rglob("*")) if _is_folder(folder) else []:
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            identity += [name.as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
    return tuple(identity)


def content_of(*sources: str) -> str:
    """Hash the identities of those models that are folders; empty if none is one.

    Hub ids, with their revisions, and shipped models say by themselves what they are.
    """
    folders = [list(identity_of(source)) for source in sources if _is_folder(Path(source).expanduser())]
    return sha256(canonical_json(folders))[:16] if folders else ""


def _is_folder(path: Path) -> bool:
    # Hub ids and "tiny" are relative; a folder of that name may lie wherever the process was started.
    return path.is_absolute() and path.is_dir()


def check_model_source(key: str, value: str, revision: str, marker: str, shipped: str | None = None) -> None:
    """Check, before anything is computed, that a foundation model can be found.

    Args:
        key: The key of the run configuration that names it.
        value: ``tiny`` where a model is shipped, a folder, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        marker: File that every such model has: ``model_index.json`` or ``config.json``.
        shipped: Name of the shipped model that ``tiny`` means; None if there is none.

    Raises:
        ConfigError: If the value is none of these, the folder cannot be read or the hub does not have the id.
    """
    if value == "tiny" and shipped is not None:
        return
    tiny_or = '"tiny" or ' if shipped is not None else ""
    folder = Path(value).expanduser()
    if folder.is_absolute():
        try:
            (folder / marker).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"`{key}` must be a folder that holds a readable {marker}, but {value!r} does not "
                f"({error.strerror}). Use {tiny_or}a folder that save_pretrained wrote."
            ) from None
        return
    if not _HUB_ID.fullmatch(value):
        raise ConfigError(
            f"`{key}` must be {tiny_or}an absolute folder or a hub id such as owner/name, but is {value!r}."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(value, marker, revision=revision or None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"`{key}` must be a model that the hub or its local cache has, but {value!r} cannot be had "
            f"({type(error).__name__}). Use {tiny_or}another one, or check name, revision, network and token."
        ) from None


def check_weights(key: str, source: str, revision: str, parts: Sequence[str] = ("",)) -> None:
    """Check, from the names of its files alone, that a model has weights that are loaded without running their code.

    Args:
        key: The key of the run configuration that names it.
        source: A folder or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        parts: Subfolders that hold weights; ``""`` is the folder itself.

    Raises:
        ConfigError: If one of them holds none.
    """
    path, pinned = locate(source, revision)
    for part in parts:
        if not _variants(_file_names(path, pinned), part):
            raise ConfigError(
                f"The weights of `{key}` must be safetensors files, but {source!r} has none"
                f"{f' in {part}/' if part else ''}. Save the model again with save_pretrained, or use another one."
            )


def weights_variant(path: str, pinned: str | None, part: str = "") -> str | None:
    """Return the ``variant`` with which ``from_pretrained`` finds the weights, e.g. ``fp16``.

    Many models are published in half precision only, as ``model.fp16.safetensors``.

    Args:
        path: A folder or a hub id, see :func:`locate`.
        pinned: Revision of a hub id.
        part: Subfolder of the weights; empty for the folder itself.

    Returns:
        None where there are weights without a variant, or none at all.
    """
    variants = _variants(_file_names(path, pinned), part)
    return (
        None if None in variants else min(filter(None, variants), key=lambda name: (name != "fp16", name), default=None)
    )


def _variants(names: Sequence[str], part: str) -> set[str | None]:
    """Return the variants in which weights lie in a folder; None for weights without one."""
    found = [PurePosixPath(name) for name in names if PurePosixPath(name).parent == PurePosixPath(part)]
    return {match["variant"] for file in found if (match := _WEIGHTS.fullmatch(file.name))}


def _file_names(path: str, pinned: str | None) -> list[str]:
    """Return the names of a model's files, relative to its folder; without network those of a hub id in the cache."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import HfApi, snapshot_download

        try:
            return HfApi().list_repo_files(path, revision=pinned)
        except Exception:  # no network, or told to use none; the hub's library has many errors of its own
            try:
                folder = Path(snapshot_download(path, revision=pinned, local_files_only=True))
            except (OSError, ValueError):
                return []
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def load_whole(kind: Any, path: str, *, spared: str = "", **options: Any) -> Any:
    """Call ``from_pretrained`` of a class of diffusers or transformers, and accept no weight that its files lack.

    Both libraries would draw such weights at random and go on.

    Args:
        kind: The class of the model.
        path: A folder or a hub id.
        spared: Name of a layer that the model does without if the files have none of its weights.
        **options: Further arguments of ``from_pretrained``.

    Returns:
        The model.

    Raises:
        ModelError: If a weight is not in the files, or has another shape there.
    """
    model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if spared and lacking and all(key.startswith(f"{spared}.") for key in lacking):
        setattr(model, spared, None)
    elif lacking:
        part = f"{options['subfolder']} of " if options.get("subfolder") else ""
        raise ModelError(
            f"Every weight of {type(model).__name__} must be in the files of {part}{path!r}, but {len(lacking)} are "
            f"not, such as {lacking[0]}, and would be random. Use a complete copy of a model of this class."
        )
    return model


def pipeline_parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return library and class of a pipeline's parts that have weights, by name, from its ``model_index.json``."""
    entries = {
        name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2 and all(value)
    }
    return {
        name: (str(library), str(kind))
        for name, (library, kind) in entries.items()
        if not name.startswith("_") and not _NO_WEIGHTS.search(str(kind))
    }


def text_shape(generator: str, revision: str) -> tuple[int, int]:
    """Return the longest text L, tokens, of a generator's text encoder, and its width D, from its configuration alone.

    Args:
        generator: ``tiny``, a folder that ``save_pretrained`` of the pipeline wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.

    Raises:
        ConfigError: If the generator's text encoder is not CLIP's alone, or its tokenizer does not know its length.
    """
    path, pinned = locate(generator, revision, tiny.DIFFUSION)
    try:
        index, config, tokenizer = (
            read_json(path, pinned, name)
            for name in ("model_index.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json")
        )
        encoders = {name: kind for name, (_, kind) in pipeline_parts(index).items() if "text_encoder" in name}
        longest = int(tokenizer["model_max_length"])
    except Exception as error:  # the hub's library has many of its own
        raise ConfigError(
            f"`prompt-level` embedding needs a `generator` whose text encoder and tokenizer are CLIP's, as Stable "
            f"Diffusion 1.x and 2.x have them, but {generator!r} has none ({type(error).__name__}). Use for example "
            '"tiny".'
        ) from None
    if len(encoders) > 1:  # its pipeline wants what each of them makes of the text, and a pooled one
        raise ConfigError(
            f"`prompt-level` embedding needs a `generator` with one text encoder, as Stable Diffusion 1.x and 2.x, but "
            f'{generator!r} has more. Use another generator, or prompt-level "instance".'
        )
    length, width = config.get("max_position_embeddings"), config.get("hidden_size")
    is_clip = encoders == {"text_encoder": "CLIPTextModel"} and config.get("model_type") in ("clip_text_model", "clip")
    if not (is_clip and isinstance(length, int) and isinstance(width, int)):
        raise ConfigError(
            "With `prompt-level` embedding clients run the text encoder of `generator`, which must be a CLIPTextModel, "
            f"but that of {generator!r} is {encoders.get('text_encoder', 'absent')}, of type "
            f'{config.get("model_type")}. Use Stable Diffusion 1.x or 2.x, or prompt-level "instance".'
        )
    if longest > length:
        raise ConfigError(
            f"The tokenizer of `generator` must cut texts at the {length} tokens that the text encoder takes, but "
            f"`model_max_length` in {generator!r} is {longest:.3g}. Put {length} into tokenizer/tokenizer_config.json."
        )
    return length, width


def read_json(path: str, pinned: str | None, name: str) -> Any:
    """Read a file of a model that lies where :func:`locate` says.

    Raises:
        OSError: If it cannot be had; the hub's errors are of this kind, too.
        ValueError: If it is not JSON.
    """
    if Path(path).is_dir():
        return json.loads((Path(path) / name).read_text("utf-8"))
    from huggingface_hub import hf_hub_download

    return json.loads(Path(hf_hub_download(path, name, revision=pinned)).read_text("utf-8"))
