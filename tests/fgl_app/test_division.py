"""The seed divides the private images; the public share, the source's own parts and a site's folder stay."""

import hashlib
import json

import numpy as np
import pytest
import torch
from data_sets import write_fashion_mnist
from safetensors.torch import save_file

from fgl_app.audit.material import all_real_images, open_material
from fgl_app.cards import SHIPPED, load_card
from fgl_app.checks import check_settings
from fgl_app.comparison import report_comparison
from fgl_app.config import parse_run_config
from fgl_app.data.division import divide
from fgl_app.data.readers import open_part
from fgl_app.data.sources import load_client_data, load_held_out, load_split
from fgl_app.errors import ConfigError, DataError, RunFolderError
from fgl_app.experiment_reader import load_experiment
from fgl_app.experiments import settings_of
from fgl_app.files import checkpoint_file
from fgl_app.models import build_model
from fgl_app.phases import resolve
from fgl_app.reporting.finished_run import class_counts, held_out_images, read_run
from fgl_app.reporting.results import summarize
from fgl_app.reporting.run_folder import RunFolder

SEEDS = (0, 1, 100)


def digest_of(rows):
    return hashlib.sha256(np.array(rows).astype("<i8").tobytes()).hexdigest()


def identities(images):
    return {image.numpy().tobytes() for image in images.images}


def test_the_public_rows_of_both_shipped_cards_never_change():
    digits, fashion = load_card("digits"), load_card("fashion-mnist")
    of_digits = [divide(digits, open_part(digits, "train", "").labels, seed)["public"] for seed in SEEDS]
    of_fashion = [divide(fashion, (np.arange(60_000) % 10).tolist(), seed)["public"] for seed in SEEDS]

    # Of the version that trained the shipped models; for Fashion-MNIST with labels in turn, which need no download.
    assert set(map(digest_of, of_digits)) == {"d7f6553b632faa31dd4b27a58e8337f57d4215ba3649624de1615f7f5235ba3b"}
    assert set(map(digest_of, of_fashion)) == {"562bbffcd5a641e0edbf61afedec4d87c05bef21191fa4d8d0cf1d9f12814400"}


def test_each_seed_has_its_own_train_validation_and_test_images():
    card = load_card("digits")
    parts = [divide(card, open_part(card, "train", "").labels, seed) for seed in SEEDS]

    for name, size in {"train": 838, "validation": 120, "test": 240}.items():
        assert [len(each[name]) for each in parts] == [size] * 3
        assert len({tuple(each[name]) for each in parts}) == 3
    for each in parts:
        assert sorted(row for rows in each.values() for row in rows) == list(range(1797))
    # A fifth of the private images is drawn three times, independently: a test image recurs with probability 0.2.
    shared = len(set(parts[0]["test"]) & set(parts[1]["test"])) / 240
    assert 0.1 < shared < 0.3


def test_a_seed_chooses_its_own_images_where_they_are_limited(run_config):
    settings = parse_run_config(run_config | {"max-train-images": 100, "image-size": 32})
    chosen = [load_split(settings.card, settings.data, "train", seed) for seed in SEEDS]

    assert len({frozenset(identities(each)) for each in chosen}) == 3
    for seed, each in zip(SEEDS, chosen, strict=True):
        assert torch.bincount(each.labels, minlength=10).min() >= 8
        assert not identities(each) & identities(load_held_out(settings.card, settings.data, seed).test)


def test_a_test_part_of_the_source_is_the_same_for_every_seed(tmp_path, run_config, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path / "cache"))
    write_fashion_mnist(tmp_path)
    settings = parse_run_config(run_config | {"dataset": "fashion-mnist", "data-dir": str(tmp_path), "image-size": 0})

    def sets(name):
        return {frozenset(identities(load_split(settings.card, settings.data, name, seed))) for seed in SEEDS}

    assert [len(sets(name)) for name in ("public", "test", "train", "validation")] == [1, 1, 3, 3]


@pytest.mark.parametrize("seed", [0, 7])
def test_clients_server_audit_and_report_divide_by_the_runs_seed(make_run, seed):
    run = read_run(make_run(seed=seed, **{"image-size": 32}))
    card, data = run.settings.card, run.settings.data
    clients = [load_client_data(card, data, {"partition-id": i, "num-partitions": 3}, seed) for i in range(3)]

    held_out = load_held_out(card, data, seed)
    real = all_real_images(open_material(run.path, None, []), 32)

    trained = set().union(*(identities(client.train) for client in clients))
    assert trained == identities(real.members)
    assert identities(real.others) == identities(held_out.test) == identities(clients[0].held_out().test)
    assert identities(held_out_images(run, 32)) == identities(held_out.validation)
    assert not trained & (identities(held_out.test) | identities(held_out.validation))


def of_an_earlier_version(folder):
    """Turn a run into one of a version that divided the images by the card alone."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["resolved"]["division"]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_that_was_divided_otherwise_is_not_resumed_audited_or_shown_with_other_images(make_run):
    folder = make_run()
    settings = read_run(folder).settings
    RunFolder(settings, resolve(settings))  # its own version goes on

    of_an_earlier_version(folder)

    with pytest.raises(RunFolderError, match="same test images for every seed"):
        RunFolder(settings, resolve(settings))
    with pytest.raises(ConfigError, match="Audit the run with the version"):
        open_material(folder, None, [])
    run = read_run(folder)
    for show in (lambda: class_counts(run, 3), lambda: held_out_images(run, 8)):
        with pytest.raises(DataError, match="held out other images"):
            show()


def test_a_table_does_not_mix_runs_that_were_divided_otherwise(tmp_path):
    (tmp_path / "experiment.yaml").write_text(
        "{title: One, clients: 2, seeds: [0], settings: {num-server-rounds: 1, method: fedavg},"
        " rows: {FedAvg: {}}, columns: {all: {}}}"
    )
    (run,) = load_experiment(tmp_path / "experiment.yaml").runs(tmp_path)
    settings = settings_of(run)
    folder = RunFolder(settings, resolve(settings))
    folder.write_results(
        {"seed": 0, "final_accuracy": 0.5, "selected_accuracy": 0.5, "paper_metric": 0.5, "one_shot_accuracy": None,
         "synthesis": None, "privacy": None, "upload_bytes": {"total": 1},
         "rounds": [{"accuracy": 0.5, "validation_accuracy": 0.5, "upload_bytes": 1, "seconds": 1.0}]}
    )  # fmt: skip
    report_comparison(tmp_path)

    of_an_earlier_version(folder.path)

    with pytest.raises(ConfigError, match="one table must not mix the two"):
        report_comparison(tmp_path)


def test_results_tell_how_many_images_measured_them(settings):
    held_out = load_held_out(settings.card, settings.data, 3)
    row = {"round": 1, "phase": "federated", "accuracy": 0.5, "loss": 1.0, "validation_accuracy": 0.5,
           "model_upload_bytes": 0, "upload_bytes": 0}  # fmt: skip
    parts = {"releases": [], "prompt_round": None, "synthesis": None, "seconds": {}}

    partitioned, own = (summarize(settings, [row], **parts, held_out=each) for each in (held_out, None))

    assert (partitioned["num_validation_images"], partitioned["num_test_images"]) == (120, 240)
    assert (own["num_validation_images"], own["num_test_images"]) == (None, None)


def test_weights_that_may_have_seen_this_seeds_test_images_are_refused(make_run, run_config):
    folder = make_run(seed=1, method="fedavg")
    network = build_model("cnn", 10, 8, 1)
    for number in (1, 2):
        save_file(network.state_dict(), checkpoint_file(folder, number))

    def check(seed, number):
        weights = {"seed": seed, "method": "fedavg", "initial-weights": str(checkpoint_file(folder, number))}
        return check_settings(parse_run_config(run_config | weights | {"run-name": "next"}))

    check(1, 2)
    with pytest.raises(ConfigError, match=r"trained with seed 1, .* test images of seed 2"):
        check(2, 2)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["run_config"]["method"] = "fgl"
    (folder / "config.json").write_text(json.dumps(config))
    check(2, 1)  # a one-shot model has seen synthetic images only
    with pytest.raises(ConfigError, match="trained with seed 1"):
        check(2, 2)


def test_weights_are_refused_under_a_card_that_only_writes_other_prompts_of_the_same_images(
    make_run, run_config, tmp_path
):
    folder = make_run(seed=1, method="fedavg")
    for number in (1, 2):
        save_file(build_model("cnn", 10, 8, 1).state_dict(), checkpoint_file(folder, number))
    text = (SHIPPED / "digits.yaml").read_text("utf-8")

    def check(content):
        card = tmp_path / f"own{len(content)}.yaml"
        card.write_text(content, "utf-8")
        weights = {"seed": 2, "method": "fedavg", "initial-weights": str(checkpoint_file(folder, 2))}
        return check_settings(parse_run_config(run_config | weights | {"run-name": "next", "dataset": str(card)}))

    assert "handwritten" in text
    with pytest.raises(ConfigError, match="trained with seed 1"):
        check(text.replace("handwritten", "written") + "fit: pad\n")
    split_seed = load_card("digits").split_seed
    check(text.replace(f"seed: {split_seed}", f"seed: {split_seed + 1}"))  # others are public
