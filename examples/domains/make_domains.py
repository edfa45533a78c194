"""Write a small data set of six domains: the digits' private part in six styles, one folder per domain and class.

    python examples/domains/make_domains.py ~/fgl-data/domains

The card ``six_domains.yaml`` beside this script describes it; each of six clients then holds one domain.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from fgl_app.cards import load_card
from fgl_app.data.division import divide
from fgl_app.data.readers import open_part


def plain(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture


def bold(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.MaxFilter(3))


def thin(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.MinFilter(3))


def slanted(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0.35, -5.6, 0, 1, 0), Image.Resampling.BILINEAR)


def noisy(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    noise = rng.normal(0, 40, (picture.height, picture.width))
    return Image.fromarray((np.asarray(picture, np.float64) + noise).clip(0, 255).astype(np.uint8))


def negative(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageChops.invert(picture)


STYLES = {"plain": plain, "bold": bold, "thin": thin, "slanted": slanted, "noisy": noisy, "negative": negative}


def main() -> None:
    root = Path(sys.argv[1]).expanduser()
    card = load_card("digits")
    part = open_part(card, "train", "")
    public = set(divide(card, part.labels, seed=0)["public"])  # which does not depend on the seed
    private = [row for row in range(len(part.labels)) if row not in public]
    for number, row in enumerate(private):  # every image goes to one domain only
        name = list(STYLES)[number % len(STYLES)]
        picture = part.image(row).resize((32, 32), Image.Resampling.BILINEAR)
        folder = root / name / card.class_names()[part.labels[row]]
        folder.mkdir(parents=True, exist_ok=True)
        STYLES[name](picture, np.random.default_rng(row)).save(folder / f"{row}.png")
    print(f"{len(private)} images in {len(STYLES)} domains: {root}")


if __name__ == "__main__":
    main()
