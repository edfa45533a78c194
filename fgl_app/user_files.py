"""Text and YAML that users write: byte-order marks are skipped, and YAML means what it looks like.

YAML is read by a strict part of YAML 1.2's core schema. ``true``, ``false`` and ``null`` are themselves, ``10``,
``0.5`` and ``1e-2`` are numbers, and everything else is text: ``no``, ``010``, ``1_000``, ``12:30`` and ``2024-01-01``
as well. Names before a colon are always text. A name that stands twice in one mapping is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fgl_app.errors import ConfigError

Place = tuple[str | int, ...]
"""Names and positions that lead to a value: ``("classes", 3, "id")``."""

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str"))
_FORMS = {
    _NULL: (re.compile(r"(?:~|null|Null|NULL|)\Z"), [*"~nN", ""]),
    _BOOL: (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    _INT: (re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z"), list("-+0123456789")),
    _FLOAT: (
        re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.(?:inf|nan)\Z"),
        list("-+.0123456789"),
    ),
}
_MOST_VALUES = 100_000
"""Values of one file, with each repetition of what an alias repeats: nine lines could stand for a thousand million."""
NUMBERS_HINT = "Numbers are written as 10, 0.5 or 1e-2, and truth as true or false"


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by :data:`_FORMS` alone."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own field


class _Dumper(yaml.SafeDumper):
    """Quotes each text that this module or another reader of YAML would take for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own field
        first: list(forms) for first, forms in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _first) in _FORMS.items():
    _Loader.add_implicit_resolver(_name, _pattern, _first)
    _Dumper.add_implicit_resolver(_name, _pattern, _first)


@dataclass(frozen=True)
class Document:
    """The content of a YAML file, and where in it everything stands."""

    path: Path
    content: Any
    """Mappings, lists, text, numbers, truth values and None."""
    lines: Mapping[Place, int] = field(default_factory=dict)
    """Line of each value's name, or of the value where it has none; from 1 on."""
    spelled: Mapping[Place, str] = field(default_factory=dict)
    """Each scalar as it is written, e.g. "1e-2" for 0.01."""

    def where(self, place: Place) -> str:
        """Return file, line and name of a value; of what is absent the line of what should hold it."""
        known = next((place[:end] for end in range(len(place), -1, -1) if place[:end] in self.lines), ())
        named = f", {named_place(place)}" if place else ""
        return f"{str(self.path)!r}, line {self.lines.get(known, 1)}{named}"


def named_place(place: Place) -> str:
    """Write a place as users do: ```classes[3].id```."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return f"`{text}`"


def read_user_text(path: Path) -> str:
    """Read a text file of a user, without the byte-order mark that Windows puts before it.

    Raises:
        OSError: If it cannot be read.
        UnicodeDecodeError: If it is not UTF-8.
    """
    return path.read_text("utf-8-sig")


def read_yaml(path: Path, what: str) -> Document:
    """Read a YAML file of a user.

    Args:
        path: The file.
        what: What it is to be, for error messages, e.g. "card".

    Raises:
        ConfigError: If it cannot be read, is no YAML, or names something twice.
    """
    try:
        loader = _Loader(read_user_text(path))
        root = loader.get_single_node()
        reader = _Reader(path, what)
        content = None if root is None else reader.value(root, ())
    except OSError as error:
        raise ConfigError(f"The {what} {str(path)!r} must be a file that can be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The {what} {str(path)!r} must be text in UTF-8, but byte {error.start} of it is not. Save it as UTF-8."
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a number of too many digits, too
        raise ConfigError(f"The {what} {str(path)!r} must be YAML, but is not: {_one_line(error)}.") from None
    return Document(path, content, reader.lines, reader.spelled)


def write_yaml(content: Any) -> str:
    """Write YAML that :func:`read_yaml` reads as the same content, and so does every other reader."""
    text: str = yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    return text


class _Reader:
    """Makes values of PyYAML's nodes, and remembers where they stand."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what
        self.lines: dict[Place, int] = {}
        self.spelled: dict[Place, str] = {}
        self._num_values = 0

    def value(self, node: yaml.Node, place: Place) -> Any:
        self._num_values += 1
        if self._num_values > _MOST_VALUES:
            raise self._error(
                node, f"it must hold at most {_MOST_VALUES:,} values, but aliases and lists make more. Shorten it"
            )
        self.lines.setdefault(place, _line(node))
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, (*place, number)) for number, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"{node.tag.removeprefix(_TAG)!r} is no tag that it may have")
        self.spelled[place] = node.value
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a name must be text, and not a list or a mapping")
            name = key.value
            if name == "<<" and key.style is None:
                raise self._error(key, "`<<` is not understood here. Write what it stands for")
            if name in found:
                first = self.lines[*place, name]
                raise self._error(key, f"{named_place((*place, name))} stands in line {first}, too. Keep one of them")
            self.lines[*place, name] = _line(key)
            found[name] = self.value(value, (*place, name))
        return found

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        tag, text = node.tag, node.value
        if tag == _STR:
            return text
        if tag not in _FORMS or not _FORMS[tag][0].match(text):
            raise self._error(node, f"{text!r} is no value of the tag {tag.removeprefix(_TAG)!r}")
        if tag == _NULL:
            return None
        if tag == _BOOL:
            return text.lower() == "true"
        return int(text) if tag == _INT else float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def _error(self, node: yaml.Node, reason: str) -> ConfigError:
        return ConfigError(f"In the {self._what} {str(self._path)!r}, line {_line(node)}: {reason}.")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
