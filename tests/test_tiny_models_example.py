"""The scripts that made the shipped models still run, and their corpus keeps its promises."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fgl_app.cards import load_card
from fgl_app.config import APP_FOLDER
from fgl_app.data.division import divide
from fgl_app.data.readers import open_part

FOLDER = APP_FOLDER / "examples" / "tiny_models"


@pytest.fixture(scope="module")
def corpora():
    sys.path.insert(0, str(FOLDER))
    try:
        import corpus

        yield corpus
    finally:
        sys.path.remove(str(FOLDER))


def test_the_corpus_is_repeatable_and_holds_the_public_third_only(corpora):
    corpus = corpora.build(None, copies_handwritten=2, copies_printed=1)

    assert corpora.digest(corpus) == corpora.digest(corpora.build(None, copies_handwritten=2, copies_printed=1))
    assert (corpus.kinds == corpora.HANDWRITTEN).sum() == 2 * 599
    card = load_card("digits")
    part = open_part(card, "train", "")
    public = divide(card, part.labels, seed=0)["public"]
    originals = np.stack([np.asarray(part.image(row)) for row in public])
    # The first copy is the scan itself: 4 x 4 blocks of the picture average to the pixels of the public scans.
    scans = corpus.images[: len(public)].reshape(-1, 8, 4, 8, 4).mean((2, 4))
    assert np.abs(scans - originals).mean() < 40
    assert np.corrcoef(scans.ravel(), originals.ravel())[0, 1] > 0.95


def test_captions_name_the_class(corpora):
    corpus = corpora.build(None, copies_handwritten=1, copies_printed=1)
    rng = np.random.default_rng(0)

    for row in rng.integers(0, len(corpus.labels), 200).tolist():
        name, numeral = corpus.class_name(row), str(corpus.labels[row])
        caption = corpora.web_caption(corpus, row, rng)
        assert name in caption or numeral in caption
        assert corpora.plain_caption(corpus, row).endswith(name)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("script", "arguments", "product"),
    [
        (
            "train_diffusion.py",
            ["--without-fashion", "--autoencoder-steps", "2", "--steps", "2", "--batch-size", "4"],
            "pipeline",
        ),
        ("train_captioner.py", ["--without-fashion", "--steps", "2", "--batch-size", "4"], "model"),
    ],
)
def test_the_training_scripts_write_folders_that_pack(tmp_path, script, arguments, product):
    environment = os.environ | {"PYTHONPATH": str(APP_FOLDER)}

    def run(*command: object) -> None:
        subprocess.run([sys.executable, *map(str, command)], env=environment, check=True, capture_output=True)

    run(FOLDER / script, "--output", tmp_path / "out", *arguments)
    run(FOLDER / "pack.py", tmp_path / "out" / product, tmp_path / "packed.json")

    assert (tmp_path / "packed.json").stat().st_size > 500_000
