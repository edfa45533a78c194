"""Whether a data set that is divided over clients has enough images to learn from and to measure with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from fgl_app.cards import Card
from fgl_app.data.findings import by_reason, small_test, until_one_is_readable
from fgl_app.data.sources import client_rows, load_held_out, train_labels, train_part, train_rows
from fgl_app.errors import DataError
from fgl_app.image_folders import describe
from fgl_app.settings import DataSettings


def check_classes(card: Card, settings: DataSettings, seed: int) -> None:
    """Check that every class of a partitioned data set has images to train on, of which one at least can be decoded.

    Raises:
        DataError: If one has none, with what lies in its place.
    """
    part = train_part(card, settings)
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row in train_rows(card, settings, seed):
        rows_of[part.labels[row]].append(row)
    for label, name in enumerate(card.class_names()):
        if rows := rows_of[label]:
            unreadable = until_one_is_readable(part, rows, card.transforms, settings.image_size, card.fit)
            if len(unreadable) == len(rows):
                raise DataError(
                    f"Every class of {card.name} needs images to train on, but none of the {len(rows):,} of {name!r} "
                    f"can be decoded: {describe(by_reason(unreadable))}. Make them readable, or leave the class out."
                )
            continue
        files = part.empty_classes.get(name)
        found = "no image at all"
        if label in part.labels:
            found = f"{part.labels.count(label)}, all of which are held out"
        elif files is not None:
            found = f"a folder without any: {describe(files)}" if files else "an empty folder"
        raise DataError(
            f"Every class of {card.name} needs images to train on, but {name!r} has {found}. Add images, or leave the "
            "class out."
        )


def warnings_of(card: Card, settings: DataSettings, num_clients: int, seed: int) -> list[str]:
    """Say what the division of a data set makes hard to measure or to learn; empty if there is nothing to say.

    Args:
        card: The data set.
        settings: The run's data settings.
        num_clients: Clients over which it is divided; 0 where all images are in one place.
        seed: The run's seed.

    Raises:
        DataError: If no test image can be decoded, or the division over the clients is impossible.
    """
    names, test = card.class_names(), load_held_out(card, settings, seed).test
    lines = small_test(len(test))
    tested = set(test.labels.tolist())
    untested = [name for label, name in enumerate(names) if label not in tested]
    if untested:
        lines.append(f"no test image of {_some(untested)}: the accuracy says nothing about such images")
    if num_clients:
        labels = train_labels(card, settings)
        holders = Counter(
            label
            for rows in client_rows(card, settings, num_clients, seed)
            for label in {labels[row] for row in rows}
        )  # fmt: skip
        alone = [name for label, name in enumerate(names) if holders[label] == 1]
        if alone and num_clients > 1:
            lines.append(f"a single client holds all images of {_some(alone)}: rounds without it teach nothing of them")
    return lines


def _some(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
