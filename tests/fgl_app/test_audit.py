"""Audits of real small runs, as the command makes them."""

import dataclasses
import json
import math
import re
import statistics

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm
from typer.testing import CliRunner

from clients.approval import wait_for_approval
from clients.embedding import TextEncoder
from fgl_app.audit.check import AuditedRun
from fgl_app.audit.material import all_real_images, attacked_images, open_material
from fgl_app.audit.membership_check import ONE_SIDED, TWO_SIDED
from fgl_app.audit.prompt_check import check_prompts, read_captions
from fgl_app.audit.shadow import joined, training_set
from fgl_app.audit.tables import comparison
from fgl_app.checks import check_settings
from fgl_app.cli import cli
from fgl_app.config import parse_run_config
from fgl_app.errors import ApprovalError, ConfigError, RunFolderError
from fgl_app.privacy.gap_intervals import Scored
from fgl_app.privacy.membership import SIGNS
from fgl_app.prompts import PromptCount
from fgl_app.records import embedding_name
from fgl_app.reporting.report import write_report
from fgl_app.server_app import run

LEAK = "seven, <b>Anna Kowalski</b>, +49 30 1234567, anna.k@example.org"
OVER_TRAINED = {
    "method": "fedavg", "image_size": 8, "max_train_images": 80, "num_clients": 2, "partition": "iid",
    "num_server_rounds": 1, "local_epochs": 30, "batch_size": 16, "augmentation": "none",
}  # fmt: skip


def audit(*arguments) -> str:
    done = CliRunner().invoke(cli, ["audit", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return done.output


def result_of(folder):
    return json.loads((folder / "audit" / "audit.json").read_text())


@pytest.fixture
def train_run(make_grid, run_config, tmp_path):
    """Return a function that makes a whole run and returns its folder."""

    def go(name, **overrides):
        changed = {key.replace("_", "-"): value for key, value in overrides.items()}
        config = run_config | changed | {"run-name": name}
        run(make_grid(**overrides), check_settings(parse_run_config(config)))
        return tmp_path / "runs" / name

    return go


def test_an_over_trained_run_is_told_from_a_one_shot_model(train_run, tmp_path):
    fedavg = train_run("fedavg", **OVER_TRAINED)
    fgl = train_run("fgl", **(OVER_TRAINED | {"method": "fgl", "num_server_rounds": 2}))

    said = audit(fedavg, fgl, "--shadow-models", 4, "--table", tmp_path / "table.md")

    (over_trained,) = result_of(fedavg)["membership"]["models"]
    assert all(over_trained["measures"][name]["auc"]["low"] > 0.5 for name in ("loss", "modified entropy", ONE_SIDED))
    assert "FedAvg, 1 round: members can be told from other images by" in said
    one_shot, last = result_of(fgl)["membership"]["models"]
    assert (one_shot["name"], last["name"]) == ("FGL one-shot", "FGL, 2 rounds")
    assert one_shot["measures"]["loss"]["auc"]["low"] < 0.5
    assert last["measures"]["loss"]["auc"]["low"] > 0.5
    part = result_of(fgl)["membership"]
    assert part["num_members"] == part["num_others"] == 80
    assert part["least_fpr"] == 1 / 80
    assert part["shadow_models"] == 4
    assert list(part["models"][0]["measures"]) == [*SIGNS, ONE_SIDED, TWO_SIDED]
    table = (tmp_path / "table.md").read_text()
    assert "| digits, iid | FedAvg, 1 round |" in table
    # Both runs were attacked on the same images, and FedAvg's members stand out from FGL's one-shot model.
    assert part["models"][0]["measures"]["confidence"]["gap_above_one_shot"] is None
    assert part["models"][1]["measures"]["confidence"]["gap_above_one_shot"]["low"] > 0
    assert "not subtracted" not in table
    assert "- digits, iid: FGL, 2 rounds against FedAvg, 1 round: " in table
    assert "| digits, iid | FedAvg, 1 round | 1.23 |" in table  # guessing: one of 81 where no false alarm is allowed


def test_centralized_training_is_audited_with_shadow_models(train_run):
    folder = train_run("all", method="centralized", max_train_images=40, num_server_rounds=1, local_epochs=20)

    said = audit(folder, "--shadow-models", 4)

    (model,) = result_of(folder)["membership"]["models"]
    assert (model["name"], result_of(folder)["membership"]["num_members"]) == ("Centralized, 1 round", 40)
    assert {ONE_SIDED, TWO_SIDED} <= set(model["measures"])
    assert "The run drew no images." in said


def test_shadow_models_are_trained_on_as_many_images_as_the_run(train_run):
    folder = train_run("one", method="centralized", image_size=8, num_server_rounds=1, local_epochs=1)

    said = audit(folder, "--shadow-models", 4)

    images = attacked_images(open_material(folder, None, []), with_rest=True)
    pool, held = joined(images.members, images.others), all_real_images(open_material(folder, None, []), 8).members
    half = np.arange(len(pool)) % 2 == 0
    trained_on = training_set(pool, half, images.rest)
    assert len(images.rest) > len(images.members)
    assert len(trained_on) == len(images.members) + len(images.rest) == len(held)
    everything = joined(images.members, images.rest).images.flatten(1)
    assert torch.equal(everything.sum(0), held.images.flatten(1).sum(0))  # each member once
    assert result_of(folder)["membership"]["shadow_images"] == len(held)
    assert f"shadow models were trained on {len(held):,} images each" in said


def test_everything_is_written_for_the_owner_alone_and_the_same_twice(train_run):
    folder = train_run("fgl")

    audit(folder)
    first = {path.name: path.read_bytes() for path in (folder / "audit").iterdir()}
    audit(folder)

    assert set(first) == {
        "audit.json", "audit.md", "distributions.png", "pairs.png", "roc.png", "similarity.png",
    }  # fmt: skip
    assert {path.name: path.read_bytes() for path in (folder / "audit").iterdir()} == first
    assert (folder / "audit").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (folder / "audit").iterdir()} == {0o600}
    assert "| FGL one-shot | loss | " in first["audit.md"].decode()


def test_a_planted_leak_is_flagged_and_never_printed(make_run):
    folder = make_run()
    with (folder / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"label": 7, "prompt": LEAK, "count": 1, "domain": "", "clients": 1}) + "\n")

    said = audit(folder)

    part = result_of(folder)["prompts"]
    found = {kind: [each["found"] for each in part["examples"][kind]] for kind in ("name", "phone number")}
    assert found == {"name": ["Anna Kowalski"], "phone number": ["+49 30 1234567"]}
    assert "1 holds an e-mail address" in said
    for secret in ("Kowalski", "1234567", "anna.k"):
        assert secret not in said
        assert secret not in (folder / "audit" / "audit.md").read_text()
    page = write_report(folder).read_text()
    assert "What the run gives away" in page
    assert "&lt;b&gt;Anna Kowalski&lt;/b&gt;" in page
    assert "<b>Anna" not in page


def test_a_part_that_cannot_be_done_says_why(make_run, tmp_path):
    said = audit(make_run())  # its checkpoints are no classifiers

    assert "This part could not be done. " in said
    assert "must hold the weights after round 1" in said
    assert "The synthetic images do not replicate" in said
    gone = audit(make_run(**{"run-name": "gone"}), "--data-dir", tmp_path / "gone")
    assert gone.count("`data-dir` must be a folder") == 2


def test_a_run_that_was_not_audited_has_no_such_section(make_run):
    folder = make_run()

    assert "What the run gives away" not in write_report(folder).read_text()

    (folder / "audit").mkdir()
    (folder / "audit" / "audit.json").write_text("{}")
    assert "cannot be read (KeyError)" in write_report(folder).read_text()


def test_embeddings_are_read_back_and_their_words_audited(train_run):
    folder = train_run(
        "embeddings", prompt_level="embedding", embedding_summary="none", max_train_images=12,
        min_samples_per_client=1, num_server_rounds=1, num_clients=1,
    )  # fmt: skip

    said = audit(folder)

    part = result_of(folder)["prompts"]
    assert part["embeddings"]["certain"] == part["embeddings"]["tried"] > 5
    assert all("handwritten" in text or "printed" in text for text in part["embeddings"]["texts"])
    assert part["embeddings"]["words_found"][0] == 1
    assert (folder / "audit" / "noise.png").read_bytes()[:4] == b"\x89PNG"
    assert "embeddings that were tried could be read back with certainty" in said


def test_words_behind_noise_are_guessed_and_audited_all_the_same(make_run):
    """Noise of a tenth of the root mean square makes readings uncertain and leaves most of their words."""
    folder = make_run()
    noise = torch.Generator().manual_seed(3)  # one under which the name stays whole
    texts = ["eight, ask anna kowalski", "ankle boot, dark, woven"]
    clean = TextEncoder("tiny", "", torch.device("cpu"))(texts)
    noisy = [each + 0.1 * each.square().mean().sqrt() * torch.randn(each.shape, generator=noise) for each in clean]
    embeddings = {embedding_name(each): each for each in (clean[1], *noisy)}
    save_file(embeddings, folder / "embeddings.safetensors")
    material = open_material(folder, None, [])
    material = dataclasses.replace(
        material,
        run=dataclasses.replace(material.run, prompts=tuple(PromptCount(8, name, 1) for name in embeddings)),
        settings=dataclasses.replace(
            material.settings, prompts=dataclasses.replace(material.settings.prompts, prompt_level="embedding")
        ),
    )

    check = check_prompts(material)

    said = " ".join(check.findings)
    assert "The words of 1 of 3 embeddings that were tried could be read back with certainty" in said
    assert "What was read of 2 others are guesses, which may be right word for word" in said
    assert "hides the words." in said
    (name,) = check.content["examples"]["name"]
    assert (name["found"], name["certain"]) == ("anna kowalski", False)
    assert "kowalski" not in said
    (folder / "audit").mkdir()
    parts = {"membership": {"findings": []}, "replication": {"findings": []}}
    prompts = {"findings": list(check.findings), **check.content}
    (folder / "audit" / "audit.json").write_text(json.dumps(parts | {"prompts": prompts}))
    assert "eight , ask anna kowalski (a guess)" in write_report(folder).read_text()


def test_noised_counts_and_random_classes_are_not_called_exact(make_run):
    defended = {"prompt-counts": "withheld", "classes-epsilon": 1.0, "weighting": "uniform", "run-name": "defended"}
    exact, hidden = audit(make_run()), audit(make_run(**defended))

    assert "Their counts say which classes are held (10 of 10) and exactly how many images of each" in exact
    assert "or drew them at random to hide which it holds, and not how many images there are of each." in hidden
    assert "exactly how many" not in hidden


def test_a_run_that_deleted_its_prompts_keeps_what_images_show(train_run):
    folder = train_run("forgotten", retain_prompts=False, num_server_rounds=1)

    said = audit(folder)

    assert "The run has kept no prompts." in said
    assert "replicate private training images: " in said


def test_prompts_of_the_server_say_nothing_of_a_client(train_run):
    said = audit(train_run("server", method="gpt-fl", num_server_rounds=1))

    assert "The server wrote the prompts from the class names alone" in said


def test_a_client_reads_its_own_captions(tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps(["ab12", LEAK]) + "\n" + json.dumps(["cd34", "a thin upright handwritten one"]) + "\n")

    done = CliRunner().invoke(cli, ["audit-captions", str(file), str(tmp_path / "found")])

    content = json.loads((tmp_path / "found" / "audit.json").read_text())["prompts"]
    assert content["prompts_with"]["e-mail address"] == 1
    assert content["num_prompts"] == 2
    assert "1 holds a phone number" in done.output
    assert "Kowalski" not in done.output
    with pytest.raises(RunFolderError, match=r"There must be a file or folder .*gone"):
        raise CliRunner().invoke(cli, ["audit-captions", str(tmp_path / "gone"), str(tmp_path)]).exception
    with pytest.raises(RunFolderError, match="must be a text file of captions"):
        raise CliRunner().invoke(cli, ["audit-captions", str(tmp_path), str(tmp_path / "found")]).exception


def test_a_preview_says_which_classes_a_client_gives_away(tmp_path):
    rows = [PromptCount(0, f"cat, {LEAK}", 2), PromptCount(1, "dog, a dog", 5)]
    with pytest.raises(ApprovalError):
        wait_for_approval(rows, ("cat", "dog"), "ours", "terms", tmp_path, 0.0)
    (preview,) = tmp_path.glob("*.json")

    done = CliRunner().invoke(cli, ["audit-captions", str(preview), str(tmp_path / "found")])

    content = json.loads((tmp_path / "found" / "audit.json").read_text())["prompts"]
    assert "the classes that this client holds, and counts: cat (2), dog (5)" in done.output
    assert content["images_per_class"] == {"0": 2, "1": 5}
    assert content["prompts_with"]["e-mail address"] == 1


def test_plain_lines_and_prompts_are_captions_too(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text('a dog\n{"label": 3, "prompt": "a cat", "count": 4}\n\na dog\n')

    CliRunner().invoke(cli, ["audit-captions", str(file), str(tmp_path / "found")])

    content = json.loads((tmp_path / "found" / "audit.json").read_text())["prompts"]
    assert content["images_per_class"] == {"0": 2, "3": 4}


def test_a_byte_order_mark_is_no_part_of_a_client_s_captions(tmp_path):
    file = tmp_path / "captions.txt"
    rows = {"prompts": [["cat", 2, "a cat", ""]]}

    file.write_text("a dog\n", "utf-8-sig")
    assert read_captions(file) == ([PromptCount(0, "a dog", 1)], ())
    file.write_text(json.dumps(rows), "utf-8-sig")
    assert read_captions(file) == ([PromptCount(0, "a cat", 2)], ("cat",))


@pytest.mark.parametrize("told", ['"label": "cat"', '"label": null', '"label": -1', '"count": 0', '"count": "many"'])
def test_a_label_or_a_count_that_is_no_number_is_named_by_its_line(tmp_path, told):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a dog"}}\n\n{{"prompt": "x", {told}}}\n')

    with pytest.raises(RunFolderError, match=r"must be a whole number .* in line 3 of"):
        read_captions(file)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_number_of_shadow_models_that_leaves_images_in_is_refused(make_fedavg, number):
    with pytest.raises(ConfigError, match="`--shadow-models` must be 0 or an even number from 4 on"):
        audit(make_fedavg(), "--shadow-models", number)


def an_audit(run_config, seed, gaps, ids=range(40), **settings):
    """Audit of a made-up run on 20 members and 20 others; its one-shot model has no gap."""
    flat = run_config | {"seed": seed, "run-name": f"run-{seed}"} | settings
    rounds = {1: gaps} if flat["method"] == "fedavg" else {1: [0.0] * 4, flat["num-server-rounds"]: gaps}
    inside = np.arange(40) < 20
    wobble = np.tile([-0.1, 0.1], 20)
    models = [
        {
            "round": server_round,
            "measures": {
                name: {"gap": {"value": gap}, "tpr": {rate: {"value": gap} for rate in ("0.01", "0.001")}}
                for name, gap in zip(SIGNS, of_round, strict=True)
            },
        }
        for server_round, of_round in rounds.items()
    ]
    scores = {
        server_round: {
            name: Scored(np.array(ids), 20, wobble + gap * inside) for name, gap in zip(SIGNS, of_round, strict=True)
        }
        for server_round, of_round in rounds.items()
    }
    return AuditedRun({"run": {"seed": seed, "run_config": flat}, "membership": {"models": models}}, scores)


def test_runs_are_grouped_by_method_over_their_seeds(run_config):
    entropies = [0.1, 0.2, 0.6]
    fedavg = {"method": "fedavg", "num-server-rounds": 1}
    # Every seed has images of its own.
    own = [range(40 * seed, 40 * seed + 40) for seed in range(3)]
    audits = [
        an_audit(run_config, seed, [gap, 0.3, 0.3, 0.3], own[seed], **fedavg) for seed, gap in enumerate(entropies)
    ]
    audits += [an_audit(run_config, seed, [0.6, 0.1, 0.3, 0.2], own[seed]) for seed in range(3)]

    lines = comparison(audits)

    # Members and others wobble by 0.1 in the model and alike in one-shot, whose wobble cancels theirs.
    mean, sd = statistics.fmean(entropies), statistics.stdev(entropies)
    rows = [line for line in lines if line.startswith("| digits, β = 0.01 | FedAvg, 1 round |")]
    assert rows[0].startswith(
        f"| digits, β = 0.01 | FedAvg, 1 round | {mean:.3f} ± {sd:.3f} [{mean:.3f}, {mean:.3f}] |"
    )
    # The paper's absolute gaps have no interval.
    assert rows[1].startswith(f"| digits, β = 0.01 | FedAvg, 1 round | {mean:.3f} ± {sd:.3f} | 0.300 ± 0.000 |")
    # One-shot's own gap: s^2 = 0.1^2 20/19 on each side, over three seeds of different images.
    half = norm.ppf(0.975) * math.sqrt(2 * 0.01 / 19 / 3)
    one_shot = next(line for line in lines if line.startswith("| digits, β = 0.01 | FGL one-shot |"))
    assert one_shot.startswith(f"| digits, β = 0.01 | FGL one-shot | 0.000 ± 0.000 [-{half:.3f}, {half:.3f}] |")
    verdict = next(
        line for line in lines if line.startswith("- digits, β = 0.01: FGL, 2 rounds against FedAvg, 1 round")
    )
    assert "smaller on loss (-0.200 [-0.200, -0.200]), modified entropy (-0.100 " in verdict
    assert "larger on entropy (+0.300 [+0.300, +0.300])" in verdict
    # Guessing: with 20 others no false alarm is allowed at either rate, and 1 of 21 members is found.
    assert sum("| FedAvg, 1 round | 4.76 |" in line for line in lines) == 2


def test_seeds_that_share_their_images_are_no_more_certain_than_one(run_config):
    def width(ids):
        audits = [an_audit(run_config, seed, [0.2] * 4, ids[seed], method="fedavg") for seed in range(3)]
        row = next(line for line in comparison(audits) if line.startswith("| digits"))
        assert "not subtracted" in row  # there is no one-shot model
        low, high = re.search(r"\[(-?[\d.]+), ([\d.]+)\]", row).groups()
        return float(high) - float(low)

    shared, own = [range(40)] * 3, [range(40 * seed, 40 * seed + 40) for seed in range(3)]

    assert width(shared) == pytest.approx(width(own) * 3**0.5, abs=0.002)


def test_another_seeds_one_shot_model_or_one_of_other_images_is_not_subtracted(run_config):
    fedavg = {"method": "fedavg", "num-server-rounds": 1}
    for placebo in (an_audit(run_config, 1, [0.3] * 4), an_audit(run_config, 0, [0.3] * 4, range(100, 140))):
        lines = comparison([an_audit(run_config, 0, [0.2] * 4, **fedavg), placebo])

        assert "not subtracted" in next(line for line in lines if "| FedAvg, 1 round |" in line)
        assert not any(line.startswith("- ") for line in lines)


def test_runs_that_differ_in_a_setting_are_not_mixed(run_config):
    gaps = [0.1, 0.1, 0.1, 0.1]
    audits = [an_audit(run_config, 0, gaps, **{"learning-rate": rate}) for rate in (0.01, 0.02)]

    lines = comparison(audits)

    methods = {line.split(" | ")[1] for line in lines if line.startswith("| digits")}
    # No client has trained before the one-shot model, which is one and the same.
    assert methods == {"FGL one-shot", "FGL, 2 rounds (learning-rate = 0.01)", "FGL, 2 rounds (learning-rate = 0.02)"}


def test_runs_that_start_from_checkpoints_of_their_seeds_are_one_method(run_config):
    audits = [
        an_audit(run_config, seed, [0.1] * 4, method="fedavg", **{"initial-weights": f"/runs/{seed}/round-0001"})
        for seed in range(3)
    ]

    assert sum(line.startswith("| digits") for line in comparison(audits)) == 5  # one row in each of the tables


def test_nothing_to_compare_is_no_table():
    content = {"run": {"run_config": {}, "seed": 0}, "membership": {"findings": ["no images"]}}

    assert comparison([AuditedRun(content, {})]) == []
