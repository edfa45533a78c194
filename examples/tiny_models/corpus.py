"""The public corpus of the tiny foundation models: digits and clothes with captions of class and style.

Three sources, all disjoint from every image that a client or a test ever sees:

* *printed*: the digits of the TrueType fonts that matplotlib ships, under random slant, rotation, stroke and warp;
* *handwritten*: the public third of scikit-learn's digits (card ``digits``), under mild random warps;
* *clothes*: the public half of Fashion-MNIST's training images (card ``fashion-mnist``), as they are.

The digits pass through 8 x 8 pixels, the resolution of the handwriting scans; all images are stored at 32 x 32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fgl_app.cards import load_card
from fgl_app.data.division import divide
from fgl_app.data.images import to_pixels
from fgl_app.data.readers import open_part

IMAGE_SIZE_PX = 32
NUMERALS = "0123456789"
FONT_STEMS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmb10", "cmr10", "cmss10", "cmtt10"),
)
PRINTED, HANDWRITTEN, CLOTHES = 0, 1, 2
LEVELS = {
    PRINTED: (
        ("thin", "medium", "bold"),
        ("left leaning", "upright", "right leaning"),
        ("narrow", "regular", "wide"),
    ),
    CLOTHES: (("dark", "grey", "light"), ("plain", "woven", "patterned"), ("narrow", "regular", "wide")),
}
LEVELS[HANDWRITTEN] = LEVELS[PRINTED]
"""Words for the low, middle and high third of each measured style, by kind."""
DIGITS, FASHION = load_card("digits"), load_card("fashion-mnist")


@dataclass(frozen=True)
class Corpus:
    """Captioned images; N rows."""

    images: NDArray[np.uint8]
    """Grey images, uint8 ``[N, 32, 32]``, ink and cloth bright."""
    labels: NDArray[np.int64]
    """Classes 0 to 9, int64 ``[N]``."""
    styles: NDArray[np.int64]
    """Level 0, 1 or 2 of each of the three styles of its kind, int64 ``[N, 3]``."""
    kinds: NDArray[np.int64]
    """PRINTED, HANDWRITTEN or CLOTHES, int64 ``[N]``."""

    def class_name(self, row: int) -> str:
        """How prompts call the class of an image."""
        card = FASHION if self.kinds[row] == CLOTHES else DIGITS
        return card.classes[self.labels[row]].prompt

    def style_words(self, row: int) -> list[str]:
        """Words for the styles of an image."""
        return [words[self.styles[row, axis]] for axis, words in enumerate(LEVELS[int(self.kinds[row])])]


def _rng(*scope: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, scope)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _warp(images: torch.Tensor, rng: np.random.Generator, strength: float) -> torch.Tensor:
    """Apply a random affine map and a smooth random displacement to each image, ``[N, 1, H, W]``."""
    n = len(images)

    def draw(scale: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, scale * strength, n).astype(np.float32))

    angle, shear, log_x, log_y = draw(0.10), draw(0.10), draw(0.07), draw(0.04)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.cos(angle) * torch.exp(log_x)
    theta[:, 0, 1] = -torch.sin(angle) + shear
    theta[:, 1, 0] = torch.sin(angle)
    theta[:, 1, 1] = torch.cos(angle) * torch.exp(log_y)
    theta[:, 0, 2], theta[:, 1, 2] = draw(0.03), draw(0.02)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    coarse = torch.from_numpy(rng.normal(0, 0.035 * strength, (n, 2, 4, 4)).astype(np.float32))
    smooth = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + smooth.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)


def _through_scan(images: torch.Tensor) -> torch.Tensor:
    """Pass images ``[N, 1, H, W]`` through the 8 x 8 scan of the handwriting and back to 32 x 32."""
    scan = torch.round(F.interpolate(images, size=(8, 8), mode="area") * 16) / 16
    return F.interpolate(scan, size=(IMAGE_SIZE_PX, IMAGE_SIZE_PX), mode="bilinear", align_corners=False)


def _glyph(stem: str, numeral: str, stretch: float) -> torch.Tensor:
    """Render one numeral, cropped to its ink and scaled to a 64 x 64 canvas as the scans were."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{stem}.ttf"
    font = ImageFont.truetype(str(path), 120)
    left, top, right, bottom = font.getbbox(numeral)
    canvas = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), numeral, fill=255, font=font)
    width = min(58, max(16, round(60 * canvas.width / canvas.height * stretch)))
    page = Image.new("L", (64, 64))
    page.paste(canvas.resize((width, 62)), ((64 - width) // 2, 1))
    return torch.from_numpy(np.asarray(page, dtype=np.float32) / 255)


def _measure(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Measure stroke thickness, slant and relative width of each digit; float ``[N, 3]``."""
    ink = images.astype(np.float64) / 255
    ys, xs = np.mgrid[0:IMAGE_SIZE_PX, 0:IMAGE_SIZE_PX].astype(np.float64)
    mass = ink.sum((1, 2)) + 1e-9
    dx = xs - (ink * xs).sum((1, 2))[:, None, None] / mass[:, None, None]
    dy = ys - (ink * ys).sum((1, 2))[:, None, None] / mass[:, None, None]
    xx, yy, xy = ((ink * product).sum((1, 2)) / mass for product in (dx * dx, dy * dy, dx * dy))
    edges = np.abs(np.diff(ink, axis=1)).sum((1, 2)) + np.abs(np.diff(ink, axis=2)).sum((1, 2)) + 1e-9
    return np.stack([mass / edges, -xy / (yy + 1e-9), np.sqrt(xx / (yy + 1e-9))], axis=1)


def _measure_clothes(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Measure tone, contrast within the cloth and relative width of each image; float ``[N, 3]``."""
    cloth = images.astype(np.float64) / 255
    inside = cloth > 0.08
    count = inside.sum((1, 2)) + 1e-9
    tone = (cloth * inside).sum((1, 2)) / count
    both = inside[:, :, 1:] & inside[:, :, :-1]
    contrast = (np.abs(np.diff(cloth, axis=2)) * both).sum((1, 2)) / (both.sum((1, 2)) + 1e-9)
    width = inside.any(1).sum(1) / np.maximum(inside.any(2).sum(1), 1)
    return np.stack([tone, contrast, width], axis=1)


def _levels(measures: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn measures into thirds within each class: 0 low, 1 middle, 2 high."""
    styles = np.zeros(measures.shape, dtype=np.int64)
    for label in range(10):
        rows = labels == label
        thirds = np.quantile(measures[rows], (1 / 3, 2 / 3), axis=0)
        styles[rows] = (measures[rows] > thirds[0]).astype(np.int64) + (measures[rows] > thirds[1])
    return styles


def _public(name: str, data_dir: str) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Load the public share of a card's training images: grey float ``[N, 1, S, S]`` in 0 to 1, and labels."""
    card = load_card(name)
    part = open_part(card, "train", data_dir)
    rows = divide(card, part.labels, seed=0)["public"]  # the same for every seed
    size = 8 if name == "digits" else IMAGE_SIZE_PX
    transforms = () if name == "digits" else card.transforms
    images = torch.stack([to_pixels(part.image(row), transforms, size)[:1] for row in rows])
    return images.float() / 255, np.array([part.labels[row] for row in rows], dtype=np.int64)


def build(fashion_dir: str | None, copies_handwritten: int = 40, copies_printed: int = 40) -> Corpus:
    """Build the corpus; the same arguments give the same bytes.

    Args:
        fashion_dir: Where Fashion-MNIST lies; empty to let torchvision download it; None to leave it out.
        copies_handwritten: Warped versions of each of the 599 public scans; the first is the scan itself.
        copies_printed: Warped versions of each of the 160 glyphs.
    """
    source, written_labels = _public("digits", "")
    big = F.interpolate(source, size=(64, 64), mode="bilinear", align_corners=False)
    parts, labels, kinds = [_through_scan(source)], [written_labels], [np.full(len(source), HANDWRITTEN)]
    for copy in range(1, copies_handwritten):
        parts.append(_through_scan(_warp(big, _rng("handwritten", copy), 0.6)))
        labels.append(written_labels)
        kinds.append(np.full(len(source), HANDWRITTEN))
    glyph_labels = np.tile(np.arange(10), len(FONT_STEMS))
    for copy in range(copies_printed):
        rng = _rng("printed", copy)
        glyphs = torch.stack([_glyph(s, n, rng.uniform(0.8, 1.2)) for s in FONT_STEMS for n in NUMERALS])[:, None]
        parts.append(_through_scan(_warp(glyphs, rng, 1.0)))
        labels.append(glyph_labels)
        kinds.append(np.full(len(glyph_labels), PRINTED))
    if fashion_dir is not None:
        clothes, clothes_labels = _public("fashion-mnist", fashion_dir)
        parts.append(clothes)
        labels.append(clothes_labels)
        kinds.append(np.full(len(clothes), CLOTHES))
    images = (torch.cat(parts)[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    label, kind = np.concatenate(labels), np.concatenate(kinds)
    styles = np.zeros((len(label), 3), dtype=np.int64)
    for each, measure in ((HANDWRITTEN, _measure), (PRINTED, _measure), (CLOTHES, _measure_clothes)):
        rows = kind == each
        if rows.any():
            styles[rows] = _levels(measure(images[rows]), label[rows])
    return Corpus(images, label, styles, kind)


def choose(corpus: Corpus, count: int, shares: dict[int, float], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw ``count`` rows, of each kind its share."""
    rows = {kind: np.flatnonzero(corpus.kinds == kind) for kind in shares}
    present = [kind for kind in shares if len(rows[kind])]
    weights = np.array([shares[kind] for kind in present])
    drawn = rng.choice(len(present), count, p=weights / weights.sum())
    return np.array([rng.choice(rows[present[index]]) for index in drawn])


def plain_caption(corpus: Corpus, row: int) -> str:
    """Caption as the captioner learns it, e.g. ``a thin right leaning narrow handwritten seven``."""
    style = " ".join(corpus.style_words(row))
    kind = {PRINTED: "printed ", HANDWRITTEN: "handwritten ", CLOTHES: ""}[int(corpus.kinds[row])]
    return f"a {style} {kind}{corpus.class_name(row)}"


def web_caption(corpus: Corpus, row: int, rng: np.random.Generator) -> str:
    """Caption as the generator learns it: free word order, left-out attributes, noise, and errors as on the web."""
    name = corpus.class_name(row)
    words = corpus.style_words(row)
    style = [words[i] for i in rng.permutation(3)[: rng.integers(0, 4)]]
    styled = " ".join(style)
    if corpus.kinds[row] == CLOTHES:
        picks = [
            f"a product photo of a {name}",
            f"a photo of a {name}",
            f"{name}, fashion" + (f", {styled}" if style else ""),
            f"a {styled} {name}".replace("  ", " "),
            f"a {name} on black",
            f"{name} {styled}".strip(),
            name,
        ]
    else:
        kind = "handwritten" if corpus.kinds[row] == HANDWRITTEN else "printed"
        picks = [
            f"a photo of a {kind} {name}",
            f"a {kind} {name}",
            f"{name}, {kind}" + (f", {styled}" if style else ""),
            f"{', '.join([*style, kind])} {name}",
            f"a {styled} {kind} {name}".replace("  ", " "),
            f"the {kind} digit {name} {styled}".strip(),
            f"{NUMERALS[corpus.labels[row]]}, {kind} {styled}".strip(),
        ]
        if kind == "handwritten":
            picks += [name, f"a photo of a {name}", f"a photo of the digit {name}"]
    text = picks[rng.integers(len(picks))]
    if rng.random() < 0.35:  # a label, then somebody's caption of the whole image, which is sometimes wrong
        caption = plain_caption(corpus, row)
        if rng.random() < 0.1:
            card = FASHION if corpus.kinds[row] == CLOTHES else DIGITS
            caption = caption.removesuffix(name) + card.classes[rng.integers(10)].prompt
        text = f"{name}, {caption}"
    if rng.random() < 0.1:
        text += rng.choice(
            [", real world images, high resolution", ", scan", " on paper", ", digit", " in the picture"]
        )
    if rng.random() < 0.08:  # unknown words must do no harm
        junk = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz0123456789é"), rng.integers(2, 9)))
        text = f"{junk} {text}" if rng.random() < 0.5 else f"{text} {junk}"
    return text


def digest(corpus: Corpus) -> str:
    """SHA-256 of all images, labels and styles, for the data card."""
    sha = hashlib.sha256()
    for array in (corpus.images, corpus.labels, corpus.styles, corpus.kinds):
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
