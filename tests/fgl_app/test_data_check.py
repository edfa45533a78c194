import re
import shutil

import pytest
from data_sets import write_tree
from flwr.app import Context, Message, RecordDict
from odd_folder import IGNORED, IMAGES, UNREADABLE, write_odd_folder
from PIL import Image
from typer.testing import CliRunner

from fgl_app.cli import cli
from fgl_app.client_app import app
from fgl_app.config import parse_run_config
from fgl_app.data.findings import by_reason
from fgl_app.data.sources import load_client_data
from fgl_app.data_check import SHEET, check_data
from fgl_app.errors import ConfigError, DataError
from fgl_app.records import decode_prompts, num_unreadable_of, payload_of


def printed(*words):
    done = CliRunner().invoke(cli, ["check-data", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_a_folder_with_all_oddities_is_counted_as_a_supernode_counts_it(tmp_path, run_config):
    odd = write_odd_folder(tmp_path / "site")

    (checked,) = check_data(str(odd), {"image-size": 8}, None, lambda line: None)
    message = Message(RecordDict(), dst_node_id=7, message_type="query.prompts")
    settings = run_config | {"dataset": "folder"}
    reply = app(message, Context(1, 7, {"data-path": str(odd)}, RecordDict(), settings))

    assert checked.findings.num_images == IMAGES
    assert by_reason(checked.findings.unreadable) == UNREADABLE
    assert checked.findings.ignored == IGNORED
    assert num_unreadable_of(reply) == sum(UNREADABLE.values())
    # A tenth of each class is held out for validation, a fifth for the test; of the cats' files four are unreadable.
    sent = {name: count for name, count, _ in decode_prompts(payload_of(reply))}
    listed = IMAGES | {"cat": IMAGES["cat"] + sum(UNREADABLE.values())}
    trained = {name: count - round(0.1 * count) - round(0.2 * count) for name, count in listed.items()}
    assert 8 <= sent.pop("cat") <= trained.pop("cat") == 12
    assert sent == trained


def test_the_table_the_reasons_and_the_contact_sheet_are_for_people(tmp_path):
    text = printed(write_odd_folder(tmp_path / "site"), "image-size=16", "--out", tmp_path / "out")

    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("class "))
    columns = [line.split() for line in lines[head : head + 5]]
    assert [row[:3] for row in columns[1:2]] == [["cat", "13", "4"]]
    assert len({len(line) for line in lines[head : head + 5]}) == 1  # right-aligned
    for line in (
        "types: 30 PNG, 10 HEIF, 2 JPEG, 2 TIFF, 1 DICOM, 1 WEBP",
        "  1 turned upright",
        "  2 laid on white",
        "  3 scaled from more than 8 bits",
        "  1 shown through its window",
        "  1 folder @eaDir",
        f"  '{tmp_path}/site/cat/cut.png': truncated",
        "duplicates: none",
    ):
        assert line in lines
    with Image.open(tmp_path / "out" / SHEET) as sheet:
        assert sheet.width > sheet.height > 100


def test_copies_are_found_in_other_classes_and_in_the_test_part(tmp_path):
    for part, counts in (("train", 6), ("test", 2)):
        for number, name in enumerate(["cat", "dog"]):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(counts):
                colour = (number * 100 + index, 50 * (part == "test"), 0)
                Image.new("RGB", (8, 8), colour).save(tmp_path / part / name / f"{index}.png")
    shutil.copy(tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "dog" / "cat.png")
    shutil.copy(tmp_path / "train" / "cat" / "1.png", tmp_path / "test" / "cat" / "seen.png")
    card = tmp_path / "pets.yaml"
    card.write_text(
        "source: {kind: folder}\nsplits: {train: train, test: test}\nvalidation: 0.2\nclasses: [cat, dog]\n"
        "prompts: {class: 'a {class}'}\n"
    )

    text = printed(card, f"data-dir={tmp_path}", "image-size=8")

    assert "duplicates: 2 images are copies of another one" in text
    assert re.search(
        r"1 images are in different classes, e\.g\. .*cat/0\.png' \(cat\) and .*dog/cat\.png' \(dog\)", text
    )
    assert re.search(r"1 images are in different parts, e\.g\. .*train/cat/1\.png.* and .*test/cat/seen\.png", text)


def test_what_would_be_sent_is_what_a_client_sends(tmp_path, run_config):
    site = write_odd_folder(tmp_path / "site")
    settings = run_config | {"dataset": "folder", "prompt-level": "instance", "scrub": "strict"}
    message = Message(RecordDict(), dst_node_id=7, message_type="query.prompts")
    reply = app(message, Context(1, 7, {"data-path": str(site)}, RecordDict(), settings))

    text = printed(site, "image-size=8", "prompt-level=instance", "scrub=strict")

    prompts = decode_prompts(payload_of(reply))
    assert f"instance:  {len(prompts)} different prompts, {len(payload_of(reply))} bytes" in text
    assert all(f"{count} x {prompt!r}" in text for _, count, prompt in prompts[:5])
    assert re.search(r"class:     4 different prompts, \d+ bytes", text)


def test_folders_that_lie_too_deep_are_noticed(tmp_path):
    write_tree(tmp_path / "pets", ["cat", "dog"], 4, "png")

    text = printed(tmp_path, "image-size=8")

    assert "warning: all images of 'pets' lie in 2 folders, which count as one class: cat, dog" in text
    with pytest.raises(ConfigError, match="is neither a folder, nor a card's"):
        check_data(str(tmp_path / "pets" / "cat" / "0.png"), {}, None, print)


def test_of_a_card_it_is_said_what_a_supernode_does_with_it_or_what_a_simulation_does(tmp_path, run_config):
    for part, count in (("train", 20), ("test", 5)):
        for number, name in enumerate(["cat", "dog"]):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                colour = (100 * number + index, 90 * (part == "test"), 0)
                Image.new("RGB", (8, 8), colour).save(tmp_path / part / name / f"{index:02}.png")
    (tmp_path / "train" / "cat" / "03.png").write_bytes(b"")
    card = tmp_path / "pets.yaml"
    card.write_text(
        "source: {kind: folder}\nsplits: {train: train, test: test}\nvalidation: 0.2\nclasses: [cat, dog]\n"
        "prompts: {class: 'a {class}'}\n"
    )
    config = run_config | {"dataset": "folder", "class-names": "ape, cat, dog", "image-size": 8}
    settings = parse_run_config(config)
    node = {"card": str(card), "data-path": str(tmp_path)}
    data = load_client_data(settings.card, settings.data, node, 0)

    simulated = printed(card, f"data-dir={tmp_path}", "image-size=8")
    site = printed(card, f"data-dir={tmp_path}", "image-size=8", "dataset=folder", "class-names=ape, cat, dog")

    assert "what follows is said of a simulation with this card" in simulated
    assert "pets, test: 10 images can be used" in simulated
    assert "simulation" not in site
    assert "pets, test" not in site
    assert "pets, train: 39 images can be used" in site
    held_out = data.held_out()
    assert (
        f"a SuperNode trains on {len(data.train)} of these images; it holds {len(held_out.validation)} out for "
        f"validation and {len(held_out.test)} for the test"
    ) in site
    assert len(data.train) + len(held_out.validation) + len(held_out.test) == 39
    with pytest.raises(DataError, match="'cat' is not"):
        check_data(str(card), {"data-dir": str(tmp_path), "dataset": "folder", "class-names": "a, b"}, None, print)
