"""Data cards: one YAML file says where a data set lies, how it is divided, and how its classes are called in prompts.

Shipped cards are ``fgl_app/data/cards/*.yaml``; a user's own card is any YAML file of the same form.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from pathlib import Path

from fgl_app.card_reader import read_card
from fgl_app.card_types import Card, CardClass, Fit, PromptForm, SourceKind
from fgl_app.errors import ConfigError
from fgl_app.image_folders import class_folders, class_of

__all__ = ["Card", "CardClass", "Fit", "PromptForm", "SourceKind", "folder_card", "load_card", "shipped_cards"]

SHIPPED = Path(__file__).resolve().parent / "data" / "cards"


def shipped_cards() -> list[str]:
    """Return the names of the shipped cards."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_card(dataset: str) -> Card:
    """Load a shipped card by its name or one's own by its absolute path, or make that of a folder of images per class.

    Raises:
        ConfigError: If there is no such card or folder, or it is not well-formed.
    """
    if Path(dataset).expanduser().is_absolute() and Path(dataset).expanduser().is_dir():
        return _card_of(Path(dataset).expanduser())
    if dataset.endswith((".yaml", ".yml")):
        path = Path(dataset).expanduser()
        if not path.is_absolute():
            raise ConfigError(
                f"`dataset` must be the absolute path of a card, because Flower starts its apps in folders of its own, "
                f"but is {dataset!r}. Use for example ~/cards/mine.yaml."
            )
        return _load(path)
    known = [*shipped_cards(), "folder"]
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, n=2) or known
        raise ConfigError(
            f"`dataset` must be the name of a shipped card, folder, or the absolute path of a .yaml card or of a "
            f"folder with one folder of images per class, but is {dataset!r}. Use {' or '.join(near)}."
        )
    return _load(SHIPPED / f"{dataset}.yaml")


def folder_card(class_names: Sequence[str]) -> Card:
    """Return the card of a data set that nodes hold as folders of images per class; it needs no file."""
    return Card(
        name="folder",
        title="Folders of images per class, one on each node",
        licence="the owners'",
        kind="folder",
        locator="",
        source_options={},
        splits={"train": ""},
        public=0.0,
        validation=0.1,
        test=0.2,
        split_seed=0,
        columns={},
        classes=tuple(CardClass(name, name, name) for name in class_names),
        domains=(),
        transforms=(),
        native_size=224,
        form=PromptForm(("a photo of {a class}",), "{class}, {caption}", ""),
        domain_forms={},
    )


def _card_of(folder: Path) -> Card:
    """Return the card of a folder with one folder of images per class, which is divided over simulated clients."""
    names = class_folders(folder)
    if len(names) < 2:
        raise ConfigError(
            f"`dataset` {str(folder)!r} must hold one folder of images per class, at least two, but holds {len(names)}."
        )
    classes = tuple(CardClass(class_of(name), class_of(name), name) for name in names)
    return dataclasses.replace(
        folder_card(()), name=folder.name, title=f"The folder {folder.name}", locator=str(folder), classes=classes
    )


@functools.cache
def _load(path: Path) -> Card:
    return read_card(path)
