import logging

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from PIL import Image
from typer.testing import CliRunner

from fgl_app.cards import load_card
from fgl_app.cli import cli
from fgl_app.client_app import app
from fgl_app.config import parse_run_config
from fgl_app.models import to_arrays
from fgl_app.phases import initial_arrays
from fgl_app.records import decode_prompts, num_unreadable_of, payload_of


def ask(run_config, message_type, node_config, content=None):
    message = Message(content or RecordDict(), dst_node_id=7, message_type=message_type)
    return app(message, Context(1, 7, node_config, RecordDict(), run_config))


def test_prompts_hold_classes_and_counts_only(run_config):
    reply = ask(run_config, "query.prompts", {"partition-id": 0, "num-partitions": 3})

    prompts = decode_prompts(payload_of(reply))
    assert {prompt.split()[-1] for _, _, prompt in prompts} <= set(load_card("digits").class_names())
    assert set(reply.content) == {"prompts", "metrics", "client"}


def test_training_returns_new_weights_and_the_number_of_images(run_config, settings):
    sent = initial_arrays(settings, settings.card.class_names())
    content = RecordDict({"arrays": sent, "config": ConfigRecord({"server-round": 2})})

    first, second = (ask(run_config, "train", {"partition-id": 1, "num-partitions": 3}, content) for _ in range(2))

    name = "9.weight"
    assert first.content["metrics"]["num-examples"] >= 10
    assert not torch.equal(first.content["arrays"].to_torch_state_dict()[name], sent.to_torch_state_dict()[name])
    assert first.content["arrays"][name].data == second.content["arrays"][name].data


def test_dp_sgd_takes_no_crop_from_the_runs_seed_which_the_server_knows(run_config, settings):
    private = {"example-dp-noise": 1e-9, "batch-size": 1000, "augmentation": "crop", "learning-rate": 1.0}
    sent = initial_arrays(settings, settings.card.class_names())
    content = RecordDict({"arrays": sent, "config": ConfigRecord({"server-round": 2})})

    first, second = (
        ask(run_config | private, "train", {"partition-id": 1, "num-partitions": 3}, content).content["arrays"]
        for _ in range(2)
    )

    name = "9.weight"
    apart = first.to_torch_state_dict()[name] - second.to_torch_state_dict()[name]
    assert apart.abs().max() > 1e-5  # all images are drawn, with next to no noise: only crops differ


def ask_site(run_config, message_type, folder, prompt_counts):
    """Ask a site with 20 readable and two unreadable images."""
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(11):
            Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / name / f"{number}.png")
        (folder / name / "0.png").write_bytes(b"no image")
    hidden = {"dataset": "folder", "class-names": "cat,dog", "prompt-counts": prompt_counts, "weighting": "uniform"}
    sent = initial_arrays(parse_run_config(run_config | hidden), ("cat", "dog"))
    content = RecordDict({"arrays": sent, "config": ConfigRecord({"server-round": 2})})
    return ask(run_config | hidden, message_type, {"data-path": str(folder)}, content)


@pytest.mark.parametrize("message_type", ["query.prompts", "train"])
@pytest.mark.parametrize(("prompt_counts", "told"), [("exact", 2), ("withheld", 0)])
def test_unreadable_images_are_told_unless_counts_are_hidden(run_config, tmp_path, message_type, prompt_counts, told):
    assert num_unreadable_of(ask_site(run_config, message_type, tmp_path, prompt_counts)) == told


@pytest.mark.parametrize("message_type", ["query.prompts", "train", "evaluate"])
@pytest.mark.parametrize("prompt_counts", ["exact", "withheld"])
def test_the_number_of_images_is_told_unless_counts_are_hidden(run_config, tmp_path, message_type, prompt_counts):
    metrics = ask_site(run_config, message_type, tmp_path, prompt_counts).content["metrics"]

    numbers = [metrics[key] for key in ("num-examples", "num-validation") if key in metrics]
    assert (max(numbers) > 1) == (prompt_counts == "exact")


def test_a_site_of_one_class_takes_part(run_config, tmp_path):
    (tmp_path / "cat").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "cat" / f"{number}.png")
    settings = run_config | {"dataset": "folder", "class-names": "cat,dog"}
    sent = initial_arrays(parse_run_config(settings), ("cat", "dog"))
    content = RecordDict({"arrays": sent, "config": ConfigRecord({"server-round": 2})})

    prompts, trained, evaluated = (
        ask(settings, kind, {"data-path": str(tmp_path)}, content) for kind in ("query.prompts", "train", "evaluate")
    )

    assert [row[0] for row in decode_prompts(payload_of(prompts))] == ["cat"]
    assert trained.content["metrics"]["num-examples"] == 4
    assert evaluated.content["metrics"]["accuracy"] in (0.0, 1.0)


def test_a_client_sends_a_noised_embedding_for_each_image(run_config):
    settings = run_config | {
        "prompt-level": "embedding", "embedding-clip": 10.0, "embedding-epsilon": 8.0, "max-train-images": 36,
    }  # fmt: skip

    reply = ask(settings, "query.prompts", {"partition-id": 1, "num-partitions": 3})

    rows = decode_prompts(payload_of(reply))
    assert [count for _, count, _ in rows] == [1] * reply.content["metrics"]["num-examples"]
    assert len({name for _, _, name in rows}) == len(rows) > 1


def test_a_client_with_too_many_images_for_an_embedding_each_says_so_before_it_loads_a_captioner(run_config, tmp_path):
    settings = run_config | {
        "prompt-level": "embedding", "embedding-clip": 1.0, "embedding-epsilon": 1.0, "max-prompts-per-client": 5,
    }  # fmt: skip
    node = {"partition-id": 0, "num-partitions": 3, "captioner": str(tmp_path / "none")}

    assert ask(settings, "query.prompts", node).error.code == 101  # 103 is that of models that cannot be loaded


def test_a_failure_reaches_the_server_as_a_code_without_private_names(run_config, tmp_path, caplog):
    settings = run_config | {"dataset": "folder", "class-names": "cat,dog"}
    with caplog.at_level(logging.ERROR, "flwr"):
        reply = ask(settings, "query.prompts", {"data-path": str(tmp_path / "jane-doe")})

    assert reply.error.code == 102
    assert "jane-doe" not in reply.error.reason


def test_a_node_whose_owner_approved_no_prompts_trains_and_evaluates_nothing(
    run_config, settings, monkeypatch, tmp_path
):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path))
    sent = initial_arrays(settings, settings.card.class_names())
    content = RecordDict({"arrays": sent, "config": ConfigRecord({"server-round": 2})})

    for kind in ("train", "evaluate"):
        node = {"partition-id": 1, "num-partitions": 3, "require-approval": True}
        assert ask(run_config, kind, node, content).error.code == 105


@pytest.mark.parametrize("by_the_run", [True, False])
def test_no_prompt_leaves_a_node_before_its_owner_has_approved_it(
    run_config, settings, monkeypatch, tmp_path, by_the_run
):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path))
    run_config = run_config | {"prompt-deadline-s": 0.1, "require-approval": by_the_run}
    node = {"partition-id": 0, "num-partitions": 3} | ({} if by_the_run else {"require-approval": True})
    sent = initial_arrays(settings, settings.card.class_names())
    content = RecordDict({"arrays": sent, "config": ConfigRecord({"server-round": 2})})

    before = ask(run_config, "query.prompts", node)
    (line,) = CliRunner().invoke(cli, ["approve"]).output.splitlines()
    name = line.split()[0]
    shown = CliRunner().invoke(cli, ["approve", name], input="n\n").output
    still = ask(run_config, "query.prompts", node)
    CliRunner().invoke(cli, ["approve", name, "--yes"], catch_exceptions=False)
    after = ask(run_config, "query.prompts", node)

    for reply in (before, still):
        assert (reply.error.code, reply.has_content()) == (105, False)
        assert not any(class_name in reply.error.reason for class_name in settings.card.class_names())
    rows = decode_prompts(payload_of(after))
    assert rows
    for class_name, count, prompt in rows:  # exactly what the owner saw
        assert f"{class_name}\t{count}\t{prompt}\n" in shown
    assert shown.count("\t") == 2 * len(rows)
    assert not ask(run_config, "train", node, content).has_error()


def test_a_wrong_model_is_answered_with_its_code(run_config):
    content = RecordDict({"arrays": to_arrays(torch.nn.Linear(2, 2)), "config": ConfigRecord({"server-round": 1})})

    reply = ask(run_config, "train", {"partition-id": 0, "num-partitions": 3}, content)

    assert reply.error.code == 103
