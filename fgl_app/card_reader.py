"""Read a data card from its YAML file, and refuse what does not fit by file, line and key."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from fgl_app.card_types import Card, CardClass, Fit, PromptForm, SourceKind
from fgl_app.errors import ConfigError
from fgl_app.user_files import NUMBERS_HINT, Place, read_yaml

_TRANSFORMS = ("resize", "pad", "center-crop")
_PLACEHOLDERS = ("{class}", "{a class}")
_DEFAULTS: Mapping[str, tuple[type, ...]] = {
    "image-size": (int,),
    "augmentation": (str,),
    "num-inference-steps": (int,),
    "guidance-scale": (int, float),
    "scheduler": (str,),
    "generation-size": (int,),
}
"""Keys of the run configuration that a card may set, and the types of their values."""
_EXAMPLES = "See fgl_app/data/cards for examples"


def read_card(path: Path) -> Card:
    """Read a card.

    Raises:
        ConfigError: If the file cannot be read or is not well-formed; it names file, line and key.
    """
    return _CardReader(path).card()


class _CardReader:
    """Turns the content of a card's file into a :class:`Card`."""

    _KEYS = frozenset({
        "title", "licence", "source", "splits", "public", "validation", "test", "split-seed", "columns", "classes",
        "domains", "transforms", "fit", "native-size", "prompts", "defaults",
    })  # fmt: skip

    def __init__(self, path: Path) -> None:
        self._document = read_yaml(path, "card")
        self._path = path
        self._content = self._mapping((), self._document.content)
        for key in self._content:
            if key not in self._KEYS:
                raise self._error((key,), f"be one of {', '.join(sorted(self._KEYS))}")

    def card(self) -> Card:
        get = self._content.get
        source = dict(self._mapping(("source",), get("source")))
        kind = source.pop("kind", None)
        if kind not in get_args(SourceKind):
            raise self._error(("source", "kind"), f"be one of {', '.join(get_args(SourceKind))}, but is {kind!r}")
        locator = self._text(("source", "name"), source.pop("name", ""))
        if bool(locator) == (kind == "folder"):
            raise self._error(("source", "name"), f"be {'absent' if locator else 'there'} for kind {kind}")
        if "revision" in source:
            self._text(("source", "revision"), source["revision"])
        splits = self._splits(kind, get("splits", {"train": {} if kind == "torchvision" else "train"}))
        shares = {name: self._share((name,), get(name, 0.0)) for name in ("public", "validation", "test")}
        for name in ("validation", "test"):
            if (name in splits) == (shares[name] > 0):
                raise self._error((name,), f"be > 0 exactly if `splits` names no {name} part")
        form = self._form(("prompts",), self._mapping(("prompts",), get("prompts")), None)
        domains = self._mapping(("domains",), get("domains", {}))
        for name in domains:
            self._plain(("domains", name), name)
        columns = {"image": "image", "label": "label"} | dict(self._mapping(("columns",), get("columns", {})))
        for name in columns:
            self._text(("columns", name), columns[name])
        if kind != "folder" and bool(domains) != ("domain" in columns):
            raise self._error(("columns", "domain"), "be there exactly if `domains` names the domains")
        return Card(
            name=self._path.stem,
            title=self._text(("title",), get("title", self._path.stem)),
            licence=self._text(("licence",), get("licence", "not stated")),
            kind=kind,
            locator=locator,
            source_options=source,
            splits=splits,
            **shares,
            split_seed=self._whole(("split-seed",), get("split-seed", 0)),
            columns=columns,
            classes=self._classes(kind, get("classes")),
            domains=tuple(domains),
            transforms=tuple(
                self._transform(("transforms", number), step)
                for number, step in enumerate(self._list(("transforms",), get("transforms", [])))
            ),
            fit=self._fit(get("fit", "crop")),
            native_size=self._whole(("native-size",), get("native-size", 224)),
            form=form,
            domain_forms={
                name: self._form(("domains", name), self._mapping(("domains", name), value), form)
                for name, value in domains.items()
                if value
            },
            defaults=self._defaults(self._mapping(("defaults",), get("defaults", {}))),
        )

    def _form(self, place: Place, value: Mapping[str, Any], parent: PromptForm | None) -> PromptForm:
        for key in value:
            if key not in ("class", "instance", "negative", "styles"):
                raise self._error((*place, key), "be class, instance, negative or styles")
        templates = value.get("class", list(parent.class_templates) if parent else [])
        templates = [templates] if isinstance(templates, str) else self._list((*place, "class"), templates)
        if not templates:
            raise self._error((*place, "class"), "hold at least one template")
        # A class prompt of a domain holds for its captions, too: the class goes where it stands, the caption behind it.
        instance = value.get("instance", parent.instance_template if parent else "{class}, {caption}")
        for number, template in enumerate(templates):
            at: Place = (*place, "class", number) if isinstance(value.get("class"), list) else (*place, "class")
            if not any(mark in self._text(at, template) for mark in _PLACEHOLDERS):
                raise self._error(at, f"contain {{class}} or {{a class}}, but is {template!r}")
        if "{caption}" not in self._text((*place, "instance"), instance):
            raise self._error((*place, "instance"), f"contain {{caption}}, but is {instance!r}")
        negative = self._text((*place, "negative"), value.get("negative", parent.negative if parent else ""))
        styles = self._list((*place, "styles"), value.get("styles", list(parent.styles) if parent else []))
        for number, text in enumerate(styles):
            self._text((*place, "styles", number), text)
        return PromptForm(tuple(templates), instance, negative, tuple(styles))

    def _classes(self, kind: SourceKind, value: Any) -> tuple[CardClass, ...]:
        if not isinstance(value, list) or len(value) < 2:
            raise self._error(("classes",), "be a list of at least two classes")
        classes: list[CardClass] = []
        for index, item in enumerate(value):
            place: Place = ("classes", index)
            if isinstance(item, int | float):
                raise self._error(
                    place, f"be a name, or a mapping with one, but is the number {item}. Put it in quotes"
                )
            entry = {"name": item} if isinstance(item, str) else dict(self._mapping(place, item))
            if not entry.get("name") or entry.get("prompt") == "" or set(entry) - {"name", "prompt", "id"}:
                raise self._error(place, "have a name and may have a prompt and an id")
            written = self._plain((*place, "name"), entry["name"])
            name = unicodedata.normalize("NFKC", written)
            prompt = self._text((*place, "prompt"), entry.get("prompt", name))
            source_id = entry.get("id", written if kind == "folder" else index)
            if type(source_id) not in (int, str):
                raise self._error((*place, "id"), f"be a whole number or text, but is {source_id!r}")
            if kind in ("sklearn", "torchvision") and isinstance(source_id, str):
                raise self._error((*place, "id"), f"be a whole number for kind {kind}, but is the text {source_id!r}")
            classes.append(CardClass(name, prompt, source_id))
        self._must_differ([item.name for item in classes], "name")
        self._must_differ([str(item.source_id) for item in classes], "id")  # folders 10 and "10" are one
        if kind == "huggingface" and len({type(item.source_id) for item in classes}) > 1:
            raise self._error(("classes",), "have ids that are all whole numbers, or all text")
        return tuple(classes)

    def _must_differ(self, values: Sequence[str], what: str) -> None:
        for index, value in enumerate(values):
            if (first := values.index(value)) < index:
                raise self._error(
                    ("classes", index),
                    f"have another {what} than `classes[{first}]`, but both have {value!r} (in the normal form NFKC)",
                )

    def _defaults(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, value in values.items():
            if key not in _DEFAULTS:
                raise self._error(("defaults", key), f"be one of {', '.join(_DEFAULTS)}")
            if type(value) not in _DEFAULTS[key]:
                kind = "text" if str in _DEFAULTS[key] else "a number" if float in _DEFAULTS[key] else "a whole number"
                raise self._error(("defaults", key), f"be {kind}, but is {value!r}. {NUMBERS_HINT}")
        return values

    def _transform(self, place: Place, step: Any) -> tuple[str, int]:
        match step:
            case {**pair} if len(pair) == 1:
                ((name, size),) = pair.items()
                if name in _TRANSFORMS and type(size) is int and size > 0:
                    return name, size
        raise self._error(place, f"be a step such as `resize: 32` ({', '.join(_TRANSFORMS)}), px, but is {step!r}")

    def _fit(self, value: Any) -> Fit:
        if value not in get_args(Fit):
            raise self._error(("fit",), f"be one of {', '.join(get_args(Fit))}, but is {value!r}")
        return cast(Fit, value)

    def _splits(self, kind: SourceKind, value: Any) -> Mapping[str, Any]:
        splits = self._mapping(("splits",), value)
        if "train" not in splits or set(splits) - {"train", "validation", "test"}:
            raise self._error(("splits",), "name the source's train, and may name its validation and test part")
        for name, part in splits.items():
            if kind == "torchvision":  # arguments of its class; the others' parts have names
                self._mapping(("splits", name), part)
            else:
                self._text(("splits", name), part)
        return splits

    def _list(self, place: Place, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self._error(place, f"be a list, but is {value!r}")
        return value

    def _mapping(self, place: Place, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._error(place, "be a mapping of names to values")
        return value

    def _text(self, place: Place, value: Any) -> str:
        if isinstance(value, bool | int | float):
            written = self._document.spelled.get(place, value)
            raise self._error(place, f"be printable text, but is {written}. Put it in quotes")
        if not isinstance(value, str) or not value.isprintable():
            raise self._error(place, f"be printable text, but is {value!r}")
        return value

    def _plain(self, place: Place, value: Any) -> str:
        """Check the name of a class or a domain."""
        name = self._text(place, value)
        if not name or name != name.strip():
            raise self._error(place, f"be a name without blanks around it, but is {name!r}")
        return name

    def _whole(self, place: Place, value: Any) -> int:
        if type(value) is not int or value < 0:
            raise self._error(place, f"be a whole number, but is {value!r}. {NUMBERS_HINT}")
        return value

    def _share(self, place: Place, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self._error(place, f"be a share from 0 to below 1, but is {value!r}. {NUMBERS_HINT}")
        return float(value)

    def _error(self, place: Place, must: str) -> ConfigError:
        return ConfigError(f"In the card {self._document.where(place)} must {must}. {_EXAMPLES}.")
