import datetime
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fgl_app.config import parse_run_config
from fgl_app.errors import ConfigError, RunFolderError
from fgl_app.models import check_model
from fgl_app.phases import resolve
from fgl_app.prompts import MergedPrompts, PromptCount
from fgl_app.records import evaluation_metrics, mean_evaluation
from fgl_app.reporting.results import summarize
from fgl_app.reporting.run_folder import DrawnSet, RunFolder
from fgl_app.store import as_ids
from fgl_app.synthesis.launch import SynthesisReport
from fgl_app.training import Evaluation


def row(number: int, accuracy: float = 0.5, validation: float = 0.5) -> dict:
    return {
        "round": number,
        "phase": "federated",
        "accuracy": accuracy,
        "loss": 1.0,
        "validation_accuracy": validation,
        "model_upload_bytes": 100,
        "upload_bytes": 500,
    }


def arrays(value: float) -> ArrayRecord:
    return ArrayRecord({"weight": torch.full((2,), value), "count": torch.tensor(7)})


@pytest.fixture
def folder(settings) -> RunFolder:
    return RunFolder(settings, resolve(settings))


def test_finished_rounds_and_their_weights_are_found_again(folder, settings):
    folder.save_round(row(1), arrays(1.0))
    folder.save_round(row(2), arrays(2.0))

    again = RunFolder(settings, resolve(settings))

    assert again.finished_rounds() == [row(1), row(2)]
    state = again.load_arrays(2).to_torch_state_dict()
    assert state["weight"].tolist() == [2.0, 2.0]
    assert state["count"].dtype == torch.int64


def test_only_one_process_works_in_a_folder(folder, settings, monkeypatch):
    monkeypatch.setattr("fgl_app.reporting.run_folder._LOCK_TIMEOUT_S", 0.1)
    holder = f"import fcntl; f = open({str(folder.path / '.lock')!r}, 'ab'); fcntl.lockf(f, fcntl.LOCK_EX)"
    code = f"{holder}; print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        # The lock of this process must go first: it is given up when any of its files is closed.
        (folder.path / ".lock").open("rb").close()
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(RunFolderError, match="One process at a time"):
            RunFolder(settings, resolve(settings))
        other.communicate(b"\n")

    RunFolder(settings, resolve(settings))


def test_the_process_that_works_in_a_folder_is_named_until_it_is_killed(run_config, tmp_path, monkeypatch):
    code = (
        "import sys; from fgl_app.config import parse_run_config; from fgl_app.reporting.run_folder import RunFolder\n"
        "import json; settings = parse_run_config(json.loads(sys.argv[1]))\n"
        "RunFolder(settings, {}); print('in', flush=True); sys.stdin.read(1)"
    )
    environment = os.environ | {"FGL_STARTED_BY": "`fgl run`, process 12"}
    settings = parse_run_config(run_config)
    monkeypatch.setattr("fgl_app.reporting.run_folder._LOCK_TIMEOUT_S", 0.1)
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(run_config)], env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == b"in\n"

        with pytest.raises(RunFolderError) as refusal:
            RunFolder(settings, {})

        other.kill()
    today = datetime.date.today().isoformat()
    assert f"another does: process {other.pid} (-c) on {platform.node()} since {today}" in str(refusal.value)
    assert "started by `fgl run`, process 12." in str(refusal.value)
    RunFolder(settings, {})


def test_labels_never_stand_beside_the_names_of_other_classes(folder, monkeypatch):
    folder.save_prompts(MergedPrompts((PromptCount(1, "a zebra", 3),), ("cat", "zebra")), {})
    monkeypatch.setattr("fgl_app.reporting.run_folder.write_json_lines", lambda *_, **__: 1 / 0)

    with pytest.raises(ZeroDivisionError):  # a crash between the two files
        folder.save_prompts(MergedPrompts((PromptCount(2, "a zebra", 3),), ("cat", "dog", "zebra")), {})

    assert folder.load_prompts() is None


def test_a_round_without_its_checkpoint_is_not_finished(folder):
    folder.save_round(row(1), arrays(1.0))
    folder.save_round(row(2), arrays(2.0))
    (folder.path / "checkpoints" / "round-0002.safetensors").unlink()

    assert [found["round"] for found in folder.finished_rounds()] == [1]


def test_a_round_done_again_forgets_the_later_ones(folder):
    for number in (1, 2, 3):
        folder.save_round(row(number), arrays(number))

    folder.save_round(row(2, accuracy=0.9), arrays(5.0))

    assert folder.finished_rounds() == [row(1), row(2, accuracy=0.9)]
    assert not (folder.path / "checkpoints" / "round-0003.safetensors").exists()


def test_what_left_the_clients_is_remembered_over_starts_by_the_owner_alone(folder, settings):
    folder.open_ledger().asked_for_prompts()
    folder.open_ledger().asked_to_train(2, (3, 3), None)

    rows = RunFolder(settings, resolve(settings)).open_ledger().rows

    assert rows == [{"asked": "prompts"}, {"asked": "train", "round": 2, "drawn": [3, 3]}]
    assert (folder.path / "releases.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("noise", "kept"), [(0.0, {}), (1.0, {"places": [1, 4]})])
def test_the_ledger_names_drawn_clients_for_dp_sgd_alone(run_config, noise, kept):
    settings = parse_run_config(run_config | {"example-dp-noise": noise})
    ledger = RunFolder(settings, resolve(settings)).open_ledger()

    ledger.asked_to_train(1, (2, 6), [4, 1])
    ledger.told([30, 20])
    ledger.told([20, 30])

    assert ledger.rows[0] == {"asked": "train", "round": 1, "drawn": [2, 6]} | kept
    assert ledger.rows[1:] == ([{"num_examples": [20, 30]}] if noise else [])


def test_kept_rounds_of_a_version_without_a_ledger_stand_in_for_it_and_stay(folder):
    folder.save_round(row(1) | {"phase": "one-shot"}, arrays(1.0))
    folder.save_round(row(2) | {"drawn": [2, 6], "num_examples": {"0": 40, "5": 30}}, arrays(2.0))
    folder.save_round(row(3) | {"drawn": [2, 6], "refused": [{"client": 4}]}, arrays(3.0))
    earlier = [
        {"asked": "train", "round": 2, "drawn": [2, 6], "num_examples": [30, 40]},
        {"asked": "train", "round": 3, "drawn": [2, 2]},  # it was written who was drawn
    ]

    assert folder.open_ledger().rows == earlier
    folder.open_ledger().asked_to_train(2, (3, 3), None)
    folder.save_round(row(2), arrays(9.0))  # forgets the kept rounds 2 and 3

    assert folder.open_ledger().rows == [*earlier, {"asked": "train", "round": 2, "drawn": [3, 3]}]


@pytest.mark.parametrize("content", [b"", b"damaged", b"\xff", b"[1]\n"])
def test_a_damaged_ledger_is_refused(folder, content):
    (folder.path / "releases.jsonl").write_bytes(content)

    with pytest.raises(RunFolderError, match=r"releases.jsonl.* is damaged, and epsilon cannot be stated"):
        folder.open_ledger()


def test_a_damaged_checkpoint_is_named(folder):
    folder.save_round(row(1), arrays(1.0))
    (folder.path / "checkpoints" / "round-0001.safetensors").write_bytes(b"damaged")

    with pytest.raises(RunFolderError, match=r"Delete round-0001"):
        folder.load_arrays(1)


@pytest.mark.parametrize(
    ("name", "load"),
    [("round-0001.safetensors", "load_arrays"), ("round-0001.strategy.safetensors", "load_memory")],
)
def test_a_checkpoint_of_which_one_byte_changed_is_named(folder, name, load):
    folder.save_round(row(1), arrays(1.0), {"momentum": torch.ones(3)})
    assert torch.equal(folder.load_memory(1)["momentum"], torch.ones(3))
    file = folder.path / "checkpoints" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    with pytest.raises(RunFolderError, match=rf"{name}.*Delete round-0001\.safetensors"):
        getattr(folder, load)(1)


def test_forgotten_prompts_and_embeddings_are_gone_with_what_a_kill_left_of_them(folder):
    embeddings = {"e": torch.ones(2, 3).half()}
    folder.save_prompts(MergedPrompts((PromptCount(0, "a cat", 3),), ("cat", "dog"), embeddings), None)
    for name in ("plan.json", "worker.log", ".prompts.jsonl.x7", ".embeddings.safetensors.x7", ".plan.json.x7"):
        (folder.path / name).write_text("a cat")

    folder.forget_prompts(DrawnSet("d" * 64, as_ids([bytes(16)]), (0,)))

    left = {path.name for path in folder.path.iterdir() if path.is_file()}
    assert {name for name in left if "a cat" in (folder.path / name).read_text("utf-8", "replace")} == set()
    assert not folder.embeddings.exists()
    assert {name for name in left if name.startswith(".")} == {".lock"}
    assert folder.load_prompts() is not None  # that there were some is known


def test_prompts_are_kept_for_their_owner_alone(folder):
    prompts = MergedPrompts(
        (PromptCount(0, "a cat", 3), PromptCount(1, "ein Hund, groß", 1, "photo")), ("cat", "dog"),
        {"e": torch.ones(2, 3).half()},
    )  # fmt: skip

    folder.save_prompts(prompts, {"payload": 10, "message": 20})

    merged, upload = folder.load_prompts()
    assert (merged.prompts, merged.class_names) == (prompts.prompts, prompts.class_names)
    assert torch.equal(merged.embeddings["e"], prompts.embeddings["e"])
    assert upload == {"payload": 10, "message": 20}
    assert folder.embeddings.stat().st_mode & 0o777 == 0o600
    assert (folder.path / "prompts.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_same_name_with_other_settings_is_refused_but_more_rounds_are_not(folder, run_config):
    longer = parse_run_config(run_config | {"num-server-rounds": 9})
    RunFolder(longer, resolve(longer))

    with pytest.raises(RunFolderError, match="`seed` was 0 and is 5 now"):
        RunFolder(parse_run_config(run_config | {"seed": 5}), {})


def test_a_file_in_the_folders_place_is_refused(run_config, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(RunFolderError, match="`output-dir`"):
        RunFolder(parse_run_config(run_config | {"output-dir": str(tmp_path / "file")}), {})


def test_the_configuration_on_disk_is_complete(folder, settings):
    written = json.loads((folder.path / "config.json").read_text())

    assert written["run_config"] == settings.flat()
    assert written["resolved"]["device"] in ("cpu", "cuda")
    assert written["resolved"]["generator"].startswith("diffusion-")
    assert {"flwr", "torch", "diffusers", "python"} <= set(written["versions"])


def test_the_three_accuracies_are_what_their_names_say(settings):
    rounds = [row(1, 0.5, 0.8), row(2, 0.9, 0.7), row(3, 0.6, 0.8), row(4, 0.7, 0.75)]

    results = summarize(
        settings,
        rounds,
        releases=[],
        prompt_round=None,
        synthesis=SynthesisReport(10, "ab", 4, 6, {"rejected": 1}, {"0": 0.25}, 2.0, 3.0, (8, 16)),
        seconds={"total": 1.23456},
    )

    assert results["final_accuracy"] == 0.7  # the last round
    assert (results["selected_round"], results["selected_accuracy"]) == (1, 0.5)  # best on validation, the earliest
    assert results["paper_metric"] == 0.9  # best on test
    assert results["synthesis"]["images_per_second"] == 2.0
    assert results["synthesis"]["batch_sizes"] == [8, 16]
    assert results["one_shot_accuracy"] == 0.5  # after the first round
    assert results["upload_bytes"]["model_per_client_per_round"] == 100
    assert results["upload_bytes"]["total"] == 4 * 500


def test_clients_evaluations_are_weighted_by_the_images_behind_them():
    none = torch.zeros(0, dtype=torch.int64)
    contents = [
        RecordDict({"metrics": evaluation_metrics(Evaluation(1.0, 0.5, 2, none), Evaluation(1.0, 0.2, 10, none))}),
        RecordDict({"metrics": evaluation_metrics(Evaluation(0.0, 0.0, 0, none), Evaluation(4.0, 0.8, 30, none))}),
    ]

    mean = mean_evaluation(contents, "num-examples")

    assert isinstance(mean, MetricRecord)
    assert mean["accuracy"] == pytest.approx((0.2 * 10 + 0.8 * 30) / 40)
    assert mean["loss"] == pytest.approx((1.0 * 10 + 4.0 * 30) / 40)
    assert mean["validation_accuracy"] == 0.5  # the second client has no validation image


def test_a_classifier_that_cannot_take_the_images_is_refused():
    with pytest.raises(ConfigError, match=r"`model` alexnet.*`image-size` 16"):
        check_model("alexnet", 10, 16)


def test_a_run_does_not_go_on_with_another_card_or_model_of_the_same_name(folder, settings):
    for key in ("card", "generator", "captioner"):
        with pytest.raises(RunFolderError, match=f"the {key} it began with"):
            RunFolder(settings, resolve(settings) | {key: "another"})


@pytest.mark.parametrize("key", ["generator", "lora", "decoder", "filter"])
def test_a_run_does_not_go_on_with_a_retrained_model_in_the_same_folder(run_config, tmp_path, key):
    weights = tmp_path / "model" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    settings = parse_run_config(run_config | {key: str(weights.parent)})
    RunFolder(settings, resolve(settings))
    RunFolder(settings, resolve(settings))

    weights.write_bytes(b"retrained")

    with pytest.raises(RunFolderError, match=f"the {key} it began with"):
        RunFolder(settings, resolve(settings))


def test_a_run_whose_images_are_drawn_does_not_go_on_with_other_rounding(run_config):
    def open_on(device: str, batch_size: int = 16) -> RunFolder:
        settings = parse_run_config(run_config | {"synthesis-batch-size": batch_size})
        return RunFolder(settings, resolve(settings) | {"synthesis_device": device})

    open_on("cpu")
    (open_on("cuda").path / "plan.json").touch()  # from now on images are drawn

    open_on("cuda:1")
    for device, batch_size, now in (("cuda", 8, "cuda/8"), ("cpu", 16, "cpu/64")):
        with pytest.raises(RunFolderError, match=f"that was cuda/16 and is {now} now"):
            open_on(device, batch_size)


def test_on_a_cpu_the_batch_size_is_free(run_config):
    for batch_size in (8, 16):
        settings = parse_run_config(run_config | {"synthesis-batch-size": batch_size, "device": "cpu"})
        (RunFolder(settings, resolve(settings)).path / "plan.json").touch()
