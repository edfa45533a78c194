import logging

import pytest
from PIL import Image

from fgl_app.checks import check_settings
from fgl_app.config import parse_run_config
from fgl_app.errors import DataError
from fgl_app.simulation import _unsaid


@pytest.fixture
def pets(tmp_path, run_config):
    """Makes the settings of a run on a folder with so many images of each class."""

    def make(counts, **changes):
        for number, (name, count) in enumerate(counts.items()):
            (tmp_path / "pets" / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (4, 4), (number, index, 0)).save(tmp_path / "pets" / name / f"{index}.png")
        own = {"dataset": str(tmp_path / "pets"), "partition": "iid", "min-samples-per-client": 0, "num-clients": 2}
        return parse_run_config(run_config | own | {key.replace("_", "-"): value for key, value in changes.items()})

    return make


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (
            {"cat": 1, "dog": 40},
            "Class 'cat' of pets has a single image left to divide when the test images are held out",
        ),
        (
            dict.fromkeys("abcde", 4),
            "4 of 20 images of pets would be held out as test images, too few for its 5 classes",
        ),
        ({"cat": 0, "dog": 40}, "Every class of pets needs images to train on, but 'cat' has an empty folder"),
    ],
)
def test_a_data_set_that_is_too_small_has_a_sentence_of_ours(pets, counts, sentence):
    with pytest.raises(DataError) as caught:
        check_settings(pets(counts))

    assert sentence in str(caught.value)
    for word in ("stratify", "n_splits", "least populated", "test_size", "train_size", "ValueError"):
        assert word not in str(caught.value)


@pytest.mark.parametrize("limit", [1, 83])
def test_a_choice_that_cannot_keep_the_proportions_is_refused_by_its_key(pets, limit):
    with pytest.raises(DataError, match=rf"`max-train-images` cannot be {limit}: .* 84 training images .* 2 to 82"):
        check_settings(pets({"cat": 60, "dog": 60}, max_train_images=limit))


def test_what_cannot_be_measured_or_learned_is_told_before_the_run(pets, caplog):
    settings = pets({"cat": 60, "dog": 60, "fox": 2}, partition="pathological", classes_per_client=1, num_clients=3)

    with caplog.at_level(logging.WARNING, "flwr"):
        check_settings(settings)

    lines = [record.getMessage() for record in caplog.records]
    assert "pets: 24 images are held out for the test: each of them is 4.2 points of accuracy" in " ".join(lines)
    assert any("a single client holds all images of" in line for line in lines)
    untested = [line for line in lines if "no test image of" in line]
    assert untested in ([], ["pets: no test image of fox: the accuracy says nothing about such images"])


def test_images_of_which_none_can_be_decoded_are_refused(pets, tmp_path):
    settings = pets({"cat": 20, "dog": 20})
    for path in (tmp_path / "pets").rglob("*.png"):
        path.write_bytes(b"no image")

    with pytest.raises(DataError, match=r"none of the 14 of 'cat' can be decoded: 14 not an image of a known format"):
        check_settings(settings)


def test_what_the_server_will_say_is_not_said_before_it_starts(pets, caplog):
    with _unsaid():
        check_settings(pets({"cat": 20, "dog": 20}))
    assert not caplog.records

    check_settings(pets({"fox": 20}))
    assert any("images are held out for the test" in record.getMessage() for record in caplog.records)
