"""``fgl check-data``: what a folder or a card holds, what becomes of its pictures, and what would be sent of them."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fgl_app.cards import Card, shipped_cards
from fgl_app.client_prompts import to_upload, write_own_prompts
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.data.decoding import Unreadable
from fgl_app.data.findings import Decoded, Findings, by_reason, decode_readable, findings_of
from fgl_app.data.folder import class_folders, open_folder, split_own
from fgl_app.data.headers import Header, read_header
from fgl_app.data.images import HeldOut, ImageSet
from fgl_app.data.readers import Part, open_part
from fgl_app.data.sources import ClientData, open_own_card, train_rows
from fgl_app.errors import ConfigError, FGLError
from fgl_app.files import sha256, write_atomically
from fgl_app.foundation_models import text_shape
from fgl_app.image_folders import describe
from fgl_app.records import PROMPTS, prompts_reply
from fgl_app.reporting.figures import contact_sheet, to_png
from fgl_app.settings import RunConfigValue, Settings

SHEET = "contact_sheet.png"
_PER_CLASS = 12
_MOST_CLASSES = 30
_MOST_LISTED = 100


@dataclass(frozen=True)
class CheckedPart:
    """One part of a source, decoded: the whole of a folder, or the train, validation or test part of a card."""

    name: str
    part: Part
    decoded: Decoded
    findings: Findings
    headers: Mapping[int, Header]
    """What the files are, by row; of sources with files only."""

    @property
    def data(self) -> ImageSet:
        """The readable images."""
        return self.decoded.images

    @property
    def rows(self) -> tuple[int, ...]:
        """Their rows in the part."""
        return self.decoded.rows


def check_data(
    source: str, overrides: Mapping[str, RunConfigValue], out: Path | None, say: Callable[[str], None]
) -> list[CheckedPart]:
    """Decode all images of a folder or a card, and say what was found.

    Args:
        source: A folder with one folder of images per class, a card's file, or the name of a shipped card.
        overrides: Run configuration that matters to one's own images, e.g. ``image-size`` or ``prompt-level``. With
            ``dataset`` folder, a card is that of a SuperNode, which divides its training part by itself.
        out: Folder for the contact sheet; None for none.
        say: Prints a line.

    Raises:
        DataError: If nothing can be read.
        ConfigError: If a setting or the card is wrong.
    """
    path = Path(source).expanduser()
    is_folder = path.is_dir()
    own = is_folder or overrides.get("dataset") == "folder"
    if not is_folder and source not in shipped_cards() and not (path.is_file() and path.suffix in (".yaml", ".yml")):
        raise ConfigError(
            f"{source!r} is neither a folder, nor a card's .yaml file, nor the name of a shipped card "
            f"({', '.join(shipped_cards())})."
        )
    place = str(path.absolute()) if path.suffix in (".yaml", ".yml") else source
    dataset = "folder" if own else place
    settings = parse_run_config(
        default_run_config() | dict(overrides) | {"dataset": dataset, "require-approval": False}
    )
    card, named = settings.card, settings.card.class_names()
    if is_folder:
        names = run_names = tuple(named or class_folders(path))
        opened = {str(path): open_folder(path.absolute(), names)}
    elif own:
        card, part, run_names = open_own_card(place, settings.data.data_dir, named)
        names, opened = card.class_names(), {f"{card.name}, train": part}
    else:
        names = run_names = named
        opened = {f"{card.name}, {name}": open_part(card, name, settings.data.data_dir) for name in card.splits}
    say(f"decoding {sum(len(part.labels) for part in opened.values()):,} images\n")
    numbers = [run_names.index(name) for name in names] if own else None
    parts = [_checked(name, part, card, names, settings, numbers) for name, part in opened.items()]
    for checked in parts:
        for line in _lines(checked, names):
            say(line)
        say("")
    for line in _duplicates(parts, names):
        say(line)
    say("")
    if not own:
        say(
            "what follows is said of a simulation with this card; what a SuperNode does whose node-config names it is "
            "said with dataset=folder\n"
        )
    for line in _sent(parts[0], run_names, settings, numbers):
        say(line)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shown = {checked.name: _striking_first(checked) for checked in parts if len(checked.data)}
        figure = contact_sheet(shown, names[:_MOST_CLASSES], _PER_CLASS)
        write_atomically(out / SHEET, to_png(figure, 160))
        say(f"\nwhat the pictures are turned into: {out / SHEET}")
    return parts


def _checked(
    name: str, part: Part, card: Card, class_names: Sequence[str], settings: Settings, numbers: Sequence[int] | None
) -> CheckedPart:
    """Decode a part; ``numbers`` are those of its classes in the run, for a site's own images."""
    rows = range(len(part.labels))
    decoded = decode_readable(part, rows, card.transforms, settings.data.image_size, card.fit)
    headers = {
        row: header
        for row in decoded.rows
        if (path := Path(part.name(row))).is_file() and (header := read_header(path))
    }
    findings = findings_of(decoded, part, rows, class_names)
    if numbers is not None:
        test = split_own(part, decoded, numbers)[1].test
        findings = dataclasses.replace(findings, num_test=len(test))
    return CheckedPart(name, part, decoded, findings, headers)


def _lines(checked: CheckedPart, class_names: Sequence[str]) -> list[str]:
    """Say what one part holds."""
    findings, part = checked.findings, checked.part
    lines = [f"{checked.name}: {len(checked.data):,} images can be used", ""]
    left_out = Counter(part.labels) - Counter(checked.data.labels.tolist())
    table = [["class", "images", "left out", "smallest, px", "median, px", "largest, px"]]
    for label, name in enumerate(class_names):
        sizes = [
            checked.headers[row].size for row in checked.rows if part.labels[row] == label and row in checked.headers
        ]
        table.append([name, f"{findings.num_images.get(name, 0):,}", f"{left_out[label]:,}", *_extent(sizes)])
    lines += _aligned(table if checked.headers else [row[:3] for row in table])
    kinds = Counter(header.kind for header in checked.headers.values())
    changes = Counter(change for header in checked.headers.values() for change in header.changes)
    if kinds:
        lines += ["", f"types: {describe(kinds)}"]
    if changes:
        lines += ["of these pictures are", *(f"  {count:,} {change}" for change, count in sorted(changes.items()))]
    if findings.ignored:
        lines += [f"no images: {sum(findings.ignored.values()):,} files or folders"]
        lines += [f"  {count:,} {reason}" for reason, count in sorted(findings.ignored.items(), key=lambda it: -it[1])]
    if findings.unreadable:
        lines += [f"left out: {len(findings.unreadable):,} images ({describe(by_reason(findings.unreadable))})"]
        lines += _listed(findings.unreadable)
    return [*lines, *(f"warning: {line}" for line in (*findings.warnings(), *_nested(checked, class_names)))]


def _nested(checked: CheckedPart, class_names: Sequence[str]) -> list[str]:
    """Say which classes have all their images in several sub-folders, which may be classes that lie too deep."""
    folders: dict[int, set[Path]] = defaultdict(set)
    for row in checked.headers:
        folders[checked.part.labels[row]].add(Path(checked.part.name(row)).parent)
    return [
        f"all images of {class_names[label]!r} lie in {len(inner)} folders, which count as one class: "
        + ", ".join(sorted(folder.name for folder in inner)[:5])
        for label, inner in folders.items()
        if len(inner) > 1
        and all(folder.parent in {each.parent for each in inner} for folder in inner)
        and len({folder.parent for folder in inner}) == 1
    ]


def _listed(unreadable: Sequence[Unreadable]) -> list[str]:
    lines = [f"  {image}" for image in unreadable[:_MOST_LISTED]]
    more = len(unreadable) - _MOST_LISTED
    return [*lines, f"  and {more:,} more"] if more > 0 else lines


def _extent(sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Return the smallest, the median and the largest size, by area."""
    if not sizes:
        return ["", "", ""]
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    return [f"{width} x {height}" for width, height in (ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1])]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) if not number else cell.rjust(width) for number, (cell, width) in enumerate(
            zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip


def _duplicates(parts: Sequence[CheckedPart], class_names: Sequence[str]) -> list[str]:
    """Say which images are there more than once, byte by byte or, without files, pixel by pixel."""
    places: dict[str, list[tuple[CheckedPart, int]]] = defaultdict(list)
    for checked in parts:
        for index, row in enumerate(checked.rows):
            path = Path(checked.part.name(row))
            content = path.read_bytes() if row in checked.headers else checked.data.images[index].numpy().tobytes()
            places[sha256(content)].append((checked, row))
    repeated = [found for found in places.values() if len(found) > 1]
    if not repeated:
        return ["duplicates: none"]
    lines = [f"duplicates: {sum(map(len, repeated)) - len(repeated):,} images are copies of another one"]
    across = [found for found in repeated if len({each.part.labels[row] for each, row in found}) > 1]
    held_out = [found for found in repeated if len({each.name for each, _ in found}) > 1]
    for what, groups in (("in different classes", across), ("in different parts", held_out)):
        if groups:
            lines.append(f"  {len(groups):,} images are {what}, e.g. " + _names(groups[0], class_names))
    if not held_out:
        lines.append("  copies may be trained on and tested with: remove all but one of each")
    return lines


def _names(group: Sequence[tuple[CheckedPart, int]], class_names: Sequence[str]) -> str:
    return " and ".join(f"{each.part.name(row)!r} ({class_names[each.part.labels[row]]})" for each, row in group[:2])


def _sent(
    checked: CheckedPart, class_names: Sequence[str], settings: Settings, numbers: Sequence[int] | None
) -> list[str]:
    """Say what a client with these images would send before the first round, at each level of prompts."""
    lines = []
    if numbers is not None:
        train, held_out = split_own(checked.part, checked.decoded, numbers)
        lines.append(
            f"a SuperNode trains on {len(train):,} of these images; it holds {len(held_out.validation):,} out for "
            f"validation and {len(held_out.test):,} for the test"
        )
    else:
        try:
            chosen_rows = set(train_rows(settings.card, settings.data, settings.run.seed))
        except FGLError as error:
            return [f"warning: {error}"]
        train = checked.data.take([index for index, row in enumerate(checked.rows) if row in chosen_rows])
    client = ClientData(train, lambda: HeldOut(train, train), 0, tuple(class_names), checked.findings)
    asked = settings.prompts.prompt_level
    lines.append(f"what a client that trains on {len(train):,} of these images would send, by prompt-level:")
    levels: tuple[Literal["class", "instance", "embedding"], ...] = ("class", "instance", "embedding")
    for level in levels:
        if level not in ("class", asked):
            lines.append(f"  {level + ':':11}{_bound(level, len(train), settings)}")
            continue
        chosen = dataclasses.replace(settings, prompts=dataclasses.replace(settings.prompts, prompt_level=level))
        try:
            written = write_own_prompts(client, chosen, {})
            upload = to_upload(written, chosen, client)
            record = prompts_reply(upload, 1, 0).config_records[PROMPTS]
        except FGLError as error:  # an upload may be larger than the server accepts
            lines.append(f"  {level + ':':11}nothing: {error}")
            continue
        size = sum(len(content) for content in record.values() if isinstance(content, bytes))
        lines.append(f"  {level + ':':11}{len(upload.prompts):,} different prompts, {size:,} bytes, such as")
        lines += [f"    {item.count:,} x {item.prompt!r}" for item in written.prompts[:5]]
    return lines


def _bound(level: str, num_images: int, settings: Settings) -> str:
    if level == "instance":
        return f"up to {num_images:,} captions, one for each image; prompt-level=instance writes and shows them"
    try:
        length, width = text_shape(settings.synthesis.generator, settings.synthesis.generator_revision)
    except FGLError as error:
        return str(error)
    return (
        f"up to {num_images:,} embeddings, each up to {length} x {width} numbers of 2 bytes, "
        f"{num_images * length * width * 2:,} bytes in all; prompt-level=embedding makes them"
    )


def _striking_first(checked: CheckedPart) -> ImageSet:
    """Take some images of each class for the contact sheet: first one of each kind of file, then others."""
    of_classes: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(checked.data.labels.tolist()):
        of_classes[label].append(index)
    chosen: list[int] = []
    for indices in of_classes.values():
        seen: set[tuple[str, tuple[str, ...]]] = set()
        first = []
        for index in indices:
            header = checked.headers.get(checked.rows[index])
            if header is not None and (header.kind, header.changes) not in seen:
                seen.add((header.kind, header.changes))
                first.append(index)
        chosen += (first + [index for index in indices if index not in first])[:_PER_CLASS]
    return checked.data.take(chosen)
