"""What was found where images lie: how many of each class, what could not be decoded, what was passed over."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fgl_app.cards import Fit
from fgl_app.data.decoding import Unreadable, UnreadableError, out_of_memory, reason_of
from fgl_app.data.images import ImageSet, to_pixels
from fgl_app.data.readers import Part
from fgl_app.errors import DataError
from fgl_app.files import canonical_json, sha256
from fgl_app.image_folders import describe


@dataclass(frozen=True)
class Decoded:
    """Images of a part, but for those that cannot be decoded."""

    images: ImageSet
    rows: tuple[int, ...]
    """Their rows in the part, in the same order."""
    unreadable: tuple[Unreadable, ...]
    """What was left out."""


FEWEST_OF_A_CLASS = 3
"""From so many images on, a site holds one out: a fifth, rounded."""
_SMALL_TEST = 100
_MOST_LISTED = 100


@dataclass(frozen=True)
class Findings:
    """What the loader of a client, or of a whole data set, found."""

    num_images: Mapping[str, int]
    """Readable images of each class that has images, by the class's name."""
    unreadable: tuple[Unreadable, ...] = ()
    """Images that cannot be decoded and were left out."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files or folders that are no images, by reason."""
    lost_classes: Mapping[str, str] = field(default_factory=dict)
    """Classes of which something was found, but no image that can be used, and what was found."""
    num_test: int | None = None
    """Images that a site holds out for its own test; None where the test images are not the client's."""

    def digest(self) -> str:
        """Return a hash of everything that was found, by which a client knows that it has said so before."""
        return sha256(canonical_json([self.lines(), [str(image) for image in self.unreadable]]))[:16]

    def lines(self) -> list[str]:
        """Say in a few lines what was found, without file names."""
        classes = ", ".join(f"{name} {count:,}" for name, count in self.num_images.items())
        lines = [f"{sum(self.num_images.values()):,} images can be used: {classes}"]
        if self.unreadable:
            lines.append(f"{len(self.unreadable):,} images are left out: {describe(by_reason(self.unreadable))}")
        if self.ignored:
            lines.append(f"{sum(self.ignored.values()):,} files or folders are no images: {describe(self.ignored)}")
        return lines

    def warnings(self) -> list[str]:
        """Say what the owner of the images should know before the classifier is believed."""
        lines = [
            f"class {name!r} has files, but no image that can be used ({found}); this class is absent here"
            for name, found in sorted(self.lost_classes.items())
        ]
        if self.num_test is None:
            return lines
        few = [name for name, count in self.num_images.items() if count < FEWEST_OF_A_CLASS]
        if few:
            lines.append(
                f"fewer than {FEWEST_OF_A_CLASS} images of {', '.join(few)}: all of them are trained on, and none is "
                "held out for the test"
            )
        return [*lines, *small_test(self.num_test)]


def small_test(num_images: int) -> list[str]:
    """Say so if a test set is so small that single images decide."""
    if not 0 < num_images < _SMALL_TEST:
        return []
    return [
        f"{num_images} images are held out for the test: each of them is {100 / num_images:.1f} points of accuracy, "
        "and differences of a few points mean nothing"
    ]


def by_reason(unreadable: Iterable[Unreadable]) -> dict[str, int]:
    """Count unreadable images by their reasons."""
    return dict(Counter(image.reason for image in unreadable))


def listed(unreadable: Sequence[Unreadable]) -> list[str]:
    """Name unreadable images one by one, up to a number that a log can take; those of an absent reader are counted."""
    of_types = [image for image in unreadable if image.of_its_type]
    one_by_one = [image for image in unreadable if not image.of_its_type]
    lines = [f"left out: {count:,} {reason}" for reason, count in by_reason(of_types).items()]
    lines += [f"left out: {image}" for image in one_by_one[:_MOST_LISTED]]
    if len(one_by_one) > _MOST_LISTED:
        lines.append(f"left out: {len(one_by_one) - _MOST_LISTED:,} more, which `fgl check-data` lists")
    return lines


def decode_readable(
    part: Part, rows: Sequence[int], transforms: Sequence[tuple[str, int]], image_size: int, fit: Fit
) -> Decoded:
    """Decode images, but for those that cannot be decoded.

    One damaged file ends no run and keeps no client out of it: it is left out, and reported.

    Args:
        part: Where the images lie.
        rows: Which of them; none are an empty set.
        transforms: The card's steps before an image is scaled to ``image_size``.
        image_size: Side of the images, px.
        fit: How a picture that is not square becomes one.

    Returns:
        The readable images, in the order of ``rows``, and what was left out.

    Raises:
        DataError: If there are images, but none is readable.
    """
    images, kept, unreadable = [], [], []
    for row in rows:
        pixels = _try(part, row, transforms, image_size, fit)
        if isinstance(pixels, Unreadable):
            unreadable.append(pixels)
        else:
            images.append(pixels)
            kept.append(row)
    if unreadable and not images:
        raise DataError(
            f"None of these {len(unreadable):,} images can be decoded ({describe(by_reason(unreadable))}), and at "
            f"least one is needed. The first: {unreadable[0]}."
        )
    domains = None if part.domains is None else torch.tensor([part.domains[row] for row in kept], dtype=torch.int64)
    labels = torch.tensor([part.labels[row] for row in kept], dtype=torch.int64)
    stacked = torch.stack(images) if images else torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8)
    return Decoded(ImageSet(stacked, labels, domains), tuple(kept), tuple(unreadable))


def until_one_is_readable(
    part: Part, rows: Sequence[int], transforms: Sequence[tuple[str, int]], image_size: int, fit: Fit
) -> list[Unreadable]:
    """Decode images as :func:`decode_readable` does until one is readable, and return those before it."""
    unreadable: list[Unreadable] = []
    for row in rows:
        if not isinstance(tried := _try(part, row, transforms, image_size, fit), Unreadable):
            break
        unreadable.append(tried)
    return unreadable


def _try(
    part: Part, row: int, transforms: Sequence[tuple[str, int]], image_size: int, fit: Fit
) -> torch.Tensor | Unreadable:
    try:
        return to_pixels(part.image(row), transforms, image_size, fit)
    except Exception as error:  # decoders share no error, see decoding.open_picture
        if out_of_memory(error):
            raise
        of_its_type = isinstance(error, UnreadableError) and error.image.of_its_type
        return Unreadable(part.name(row), reason_of(error), of_its_type)


def findings_of(decoded: Decoded, part: Part, rows: Sequence[int], class_names: Sequence[str]) -> Findings:
    """Sum up what decoding gave.

    Args:
        decoded: The readable images, with the part's labels, and what was left out.
        part: Where the images lie.
        rows: Which of them were asked for.
        class_names: Names of the part's classes.
    """
    readable = Counter(decoded.images.labels.tolist())
    reasons: dict[int, list[Unreadable]] = defaultdict(list)
    kept = set(decoded.rows)
    for row, image in zip((row for row in rows if row not in kept), decoded.unreadable, strict=True):
        reasons[part.labels[row]].append(image)
    lost = {class_names[label]: describe(by_reason(reasons[label])) for label in reasons.keys() - set(readable)}
    lost |= {name: describe(ignored) or "an empty folder" for name, ignored in part.empty_classes.items()}
    return Findings(
        {class_names[label]: count for label, count in sorted(readable.items())},
        decoded.unreadable,
        part.ignored,
        lost,
    )
