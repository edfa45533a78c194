"""Data cards: one YAML file says where a data set lies, how it is divided, and how its classes are called in prompts.

Shipped cards are ``fgl_app/data/cards/*.yaml``; a user's own card is any YAML file of the same form.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fgl_app.errors import ConfigError

SHIPPED = Path(__file__).resolve().parent / "data" / "cards"

SourceKind = Literal["sklearn", "torchvision", "huggingface", "folder"]
_TRANSFORMS = ("resize", "pad", "center-crop")
_PLACEHOLDERS = ("{class}", "{a class}")


@dataclass(frozen=True)
class CardClass:
    """One class of a data set."""

    name: str
    """Name, unique on the card."""
    prompt: str
    """How prompts call it; disambiguates, e.g. "orange fruit" for the class "orange"."""
    source_id: int | str
    """Its label in the source: an index, or a folder's name."""


@dataclass(frozen=True)
class PromptForm:
    """How prompts are written; templates hold ``{class}``, or ``{a class}`` for the name with its article."""

    class_templates: tuple[str, ...]
    """Templates of class-level prompts; a run uses the first ``num-prompts-per-class`` of them."""
    instance_template: str
    """Template of instance-level prompts, with ``{caption}``; what follows it is the card's suffix."""
    negative: str
    """What the generator is steered away from; may be empty."""
    styles: tuple[str, ...] = ()
    """What the server's prompts (GPT-FL) may end with, e.g. "at night", to be many."""


@dataclass(frozen=True, eq=False)  # a card is loaded once and known by identity
class Card:
    """What the application must know about a data set."""

    name: str
    """File name without its ending."""
    title: str
    licence: str
    kind: SourceKind
    """Which library reads it."""
    locator: str
    """Class of ``torchvision.datasets``, id on the Hugging Face hub, or function of scikit-learn; empty for folders."""
    source_options: Mapping[str, Any]
    """Further arguments of that library, e.g. ``revision``."""
    splits: Mapping[str, Any]
    """The source's own ``train`` and, where it has one, ``validation`` and ``test`` part, as the library calls them."""
    public: float
    """Share of ``train`` that the shipped foundation models saw; no client ever holds it."""
    validation: float
    """Share of the other training images that is held out for validation; 0 if the source has a validation part."""
    test: float
    """Share held out for the test; 0 if the source has a test part."""
    split_seed: int
    """Seed of the public share, which is the same in every run; the run's seed divides the other images."""
    columns: Mapping[str, str]
    """Names of the columns ``image``, ``label`` and, where images have one, ``domain`` (Hugging Face)."""
    classes: tuple[CardClass, ...]
    domains: tuple[str, ...]
    """Names of the domains, in the order of their ids; empty for a data set of one domain."""
    transforms: tuple[tuple[str, int], ...]
    """What is done to each image before it is scaled to ``image-size``: pairs of name and size in px."""
    native_size: int
    """Side of an original image, px, or for photographs the usual size of training: ``image-size`` unless
    :attr:`defaults` names another."""
    form: PromptForm
    domain_forms: Mapping[str, PromptForm]
    """Form of a domain's prompts where it differs from :attr:`form`."""
    defaults: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Run-configuration keys that this data set sets where the user leaves them to the card."""

    def digest(self) -> str:
        """Hash of everything that the card says; a run does not go on with another card of the same name."""
        return hashlib.sha256(repr({**vars(self), "name": ""}).encode()).hexdigest()[:16]

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the K classes in the order of their labels."""
        return tuple(item.name for item in self.classes)

    def prompt_names(self, class_names: Iterable[str]) -> list[str]:
        """Return how prompts call classes; one that is not on the card is called by its name."""
        named = {item.name: item.prompt for item in self.classes}
        return [named.get(name, name) for name in class_names]

    def form_of(self, domain: str | None) -> PromptForm:
        """Return the prompt form of a domain, or the card's own."""
        return self.domain_forms.get(domain, self.form) if domain is not None else self.form


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
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise ConfigError(
            f"`dataset` {str(folder)!r} must hold one folder of images per class, at least two, but holds {len(names)}."
        )
    classes = tuple(CardClass(plain := unicodedata.normalize("NFKC", name), plain, name) for name in names)
    return dataclasses.replace(
        folder_card(()), name=folder.name, title=f"The folder {folder.name}", locator=str(folder), classes=classes
    )


@functools.cache
def _load(path: Path) -> Card:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"`dataset` must be a card that can be read, but {str(path)!r} cannot ({error.strerror}). See "
            "fgl_app/data/cards for examples."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The card {str(path)!r} must be YAML, but is not: {_one_line(error)}.") from None
    return _Reader(path, content).card()


class _Reader:
    """Turns the content of a card's file into a :class:`Card`, refusing what does not fit by name."""

    _KEYS = frozenset({
        "title", "licence", "source", "splits", "public", "validation", "test", "split-seed", "columns", "classes",
        "domains", "transforms", "native-size", "prompts", "defaults",
    })  # fmt: skip

    def __init__(self, path: Path, content: Any) -> None:
        self._path = path
        self._content = self._mapping("the card", content)
        unknown = sorted(map(str, set(self._content) - self._KEYS))
        if unknown:
            raise self._error(f"`{unknown[0]}`", f"be one of {', '.join(sorted(self._KEYS))}")

    def card(self) -> Card:
        get = self._content.get
        source = dict(self._mapping("`source`", get("source")))
        kind = source.pop("kind", None)
        if kind not in get_args(SourceKind):
            raise self._error("`source.kind`", f"be one of {', '.join(get_args(SourceKind))}, but is {kind!r}")
        locator = self._text("`source.name`", source.pop("name", ""))
        if bool(locator) == (kind == "folder"):
            raise self._error("`source.name`", f"be {'absent' if locator else 'there'} for kind {kind}")
        splits = self._splits(kind, get("splits", {"train": {} if kind == "torchvision" else "train"}))
        shares = {name: self._share(name, get(name, 0.0)) for name in ("public", "validation", "test")}
        for name in ("validation", "test"):
            if (name in splits) == (shares[name] > 0):
                raise self._error(f"`{name}`", f"be > 0 exactly if `splits` names no {name} part")
        prompts = self._mapping("`prompts`", get("prompts"))
        form = self._form("prompts", prompts, None)
        domains = self._mapping("`domains`", get("domains", {}))
        columns = {"image": "image", "label": "label"} | dict(self._mapping("`columns`", get("columns", {})))
        if kind != "folder" and bool(domains) != ("domain" in columns):
            raise self._error("`columns.domain`", "be there exactly if `domains` names the domains")
        return Card(
            name=self._path.stem,
            title=self._text("`title`", get("title", self._path.stem)),
            licence=self._text("`licence`", get("licence", "not stated")),
            kind=kind,
            locator=locator,
            source_options=source,
            splits=splits,
            **shares,
            split_seed=self._whole("`split-seed`", get("split-seed", 0)),
            columns=columns,
            classes=self._classes(get("classes")),
            domains=tuple(str(name) for name in domains),
            transforms=tuple(self._transform(step) for step in self._list("`transforms`", get("transforms", []))),
            native_size=self._whole("`native-size`", get("native-size", 224)),
            form=form,
            domain_forms={
                str(name): self._form(f"domains.{name}", self._mapping(f"`domains.{name}`", value), form)
                for name, value in domains.items()
                if value
            },
            defaults=self._mapping("`defaults`", get("defaults", {})),
        )

    def _form(self, where: str, value: Mapping[str, Any], parent: PromptForm | None) -> PromptForm:
        unknown = set(value) - {"class", "instance", "negative", "styles"}
        if unknown:
            raise self._error(f"`{where}.{sorted(map(str, unknown))[0]}`", "be class, instance, negative or styles")
        templates = value.get("class", list(parent.class_templates) if parent else [])
        templates = [templates] if isinstance(templates, str) else self._list(f"`{where}.class`", templates)
        if not templates:
            raise self._error(f"`{where}.class`", "hold at least one template")
        # A class prompt of a domain holds for its captions, too: the class goes where it stands, the caption behind it.
        instance = value.get("instance", parent.instance_template if parent else "{class}, {caption}")
        for template in templates:
            if not any(mark in self._text(f"`{where}.class`", template) for mark in _PLACEHOLDERS):
                raise self._error(f"`{where}.class`", f"contain {{class}} or {{a class}}, but is {template!r}")
        if "{caption}" not in self._text(f"`{where}.instance`", instance):
            raise self._error(f"`{where}.instance`", f"contain {{caption}}, but is {instance!r}")
        negative = self._text(f"`{where}.negative`", value.get("negative", parent.negative if parent else ""))
        styles = self._list(f"`{where}.styles`", value.get("styles", list(parent.styles) if parent else []))
        return PromptForm(
            tuple(templates), instance, negative, tuple(self._text(f"`{where}.styles`", text) for text in styles)
        )

    def _classes(self, value: Any) -> tuple[CardClass, ...]:
        if not isinstance(value, list) or len(value) < 2:
            raise self._error("`classes`", "be a list of at least two classes")
        classes = []
        for index, item in enumerate(value):
            entry = {"name": item} if isinstance(item, str) else dict(self._mapping(f"`classes[{index}]`", item))
            name = unicodedata.normalize("NFKC", self._text(f"`classes[{index}].name`", entry.get("name")))
            prompt = self._text(f"`classes[{index}].prompt`", entry.get("prompt", name))
            source_id = entry.get("id", name if self._content["source"].get("kind") == "folder" else index)
            if not name or not prompt or set(entry) - {"name", "prompt", "id"}:
                raise self._error(f"`classes[{index}]`", "have a name and may have a prompt and an id")
            if type(source_id) not in (int, str):
                raise self._error(f"`classes[{index}].id`", f"be a whole number or text, but is {source_id!r}")
            classes.append(CardClass(name, prompt, source_id))
        for what in ("name", "source_id"):
            values = [getattr(item, what) for item in classes]
            if len(set(values)) < len(values):
                raise self._error("`classes`", "have different names and ids, but one is repeated")
        return tuple(classes)

    def _transform(self, step: Any) -> tuple[str, int]:
        match step:
            case {**pair} if len(pair) == 1:
                ((name, size),) = pair.items()
                if name in _TRANSFORMS and type(size) is int and size > 0:
                    return name, size
        raise self._error("`transforms`", f"hold steps such as `resize: 32` ({', '.join(_TRANSFORMS)}), px")

    def _splits(self, kind: SourceKind, value: Any) -> Mapping[str, Any]:
        splits = self._mapping("`splits`", value)
        if "train" not in splits or set(splits) - {"train", "validation", "test"}:
            raise self._error("`splits`", "name the source's train, and may name its validation and test part")
        for name, part in splits.items():
            if kind == "torchvision":  # arguments of its class; the others' parts have names
                self._mapping(f"`splits.{name}`", part)
            else:
                self._text(f"`splits.{name}`", part)
        return splits

    def _list(self, where: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self._error(where, f"be a list, but is {value!r}")
        return value

    def _mapping(self, where: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._error(where, "be a mapping of names to values")
        return value

    def _text(self, where: str, value: Any) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise self._error(where, f"be printable text, but is {value!r}")
        return value

    def _whole(self, where: str, value: Any) -> int:
        if type(value) is not int or value < 0:
            raise self._error(where, f"be a whole number, but is {value!r}")
        return value

    def _share(self, where: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self._error(f"`{where}`", f"be a share from 0 to below 1, but is {value!r}")
        return float(value)

    def _error(self, where: str, must: str) -> ConfigError:
        return ConfigError(f"In the card {str(self._path)!r} {where} must {must}. See fgl_app/data/cards for examples.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
