"""Where foundation models lie: the shipped ones, folders that ``save_pretrained`` wrote, and hub ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fgl_app import tiny
from fgl_app.errors import ConfigError
from fgl_app.files import canonical_json, sha256

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def text_shape(generator: str, revision: str) -> tuple[int, int]:
    """Return the longest text L, tokens, of a generator's text encoder, and its width D, from its configuration alone.

    Args:
        generator: ``tiny``, a folder that ``save_pretrained`` of the pipeline wrote, or a hub id.
        revision: Git revision of a hub id; empty for the newest.

    Raises:
        ConfigError: If the generator has no text encoder whose configuration tells them, or more than one.
    """
    path, pinned = locate(generator, revision, tiny.DIFFUSION)
    try:
        index, config = (_read_json(path, pinned, name) for name in ("model_index.json", "text_encoder/config.json"))
        shape = int(config["max_position_embeddings"]), int(config["hidden_size"])
    except Exception as error:  # the hub's library has many of its own
        raise ConfigError(
            f"`prompt-level` embedding needs a `generator` whose text encoder is CLIP's, as Stable Diffusion 1.x and "
            f'2.x have it, but {generator!r} has none ({type(error).__name__}). Use for example "tiny".'
        ) from None
    if "text_encoder_2" in index:  # its pipeline wants what each of them makes of the text, and a pooled one
        raise ConfigError(
            f"`prompt-level` embedding needs a `generator` with one text encoder, as Stable Diffusion 1.x and 2.x, but "
            f'{generator!r} has more. Use another generator, or prompt-level "instance".'
        )
    return shape


def _read_json(path: str, pinned: str | None, name: str) -> Any:
    if Path(path).is_dir():
        return json.loads((Path(path) / name).read_text("utf-8"))
    from huggingface_hub import hf_hub_download

    return json.loads(Path(hf_hub_download(path, name, revision=pinned)).read_text("utf-8"))
