import json
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import typer
from data_sets import write_tree
from flwr.app import ArrayRecord
from typer.testing import CliRunner

from fgl_app.cli import _resumable, cli
from fgl_app.config import parse_run_config
from fgl_app.data import sources
from fgl_app.errors import ConfigError, DataError, RunFolderError
from fgl_app.phases import resolve
from fgl_app.reporting.earlier_start import is_other_listing, say_if_finished
from fgl_app.reporting.finished_run import check_listing
from fgl_app.reporting.run_folder import RunFolder
from fgl_app.simulation import simulate


@pytest.fixture
def finished(run_config):
    """Settings of a run of two rounds that has ended, as words of the command are parsed, and its folder."""
    chosen = run_config | {"method": "fedavg", "num-server-rounds": 2, "num-clients": 2}
    settings = parse_run_config(chosen)
    folder = RunFolder(settings, resolve(settings))
    rows = [{"round": number, "accuracy": 0.5 + number / 10} for number in (1, 2)]
    for row in rows:
        folder.save_round(row, ArrayRecord({"weight": torch.zeros(2)}))
    folder.write_results({"rounds": rows, "final_accuracy": 0.7})
    return {key: value for key, value in chosen.items() if key != "num-clients"}, folder.path


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_answered_at_once_and_left_as_it_is(finished, capsys):
    chosen, folder = finished
    before = files(folder)

    simulate(chosen, num_clients=2, client_cpus=1, client_gpus=0.0)

    said = capsys.readouterr().out
    assert "is finished: accuracy 0.7000 after 2 rounds" in said
    assert str(folder / "results.json") in said
    assert files(folder) == before


@pytest.mark.parametrize(("key", "value"), [("seed", 77), ("learning-rate", 0.5), ("dataset", "folder")])
def test_other_settings_are_refused_before_anything_is_checked_or_started(finished, key, value):
    chosen, folder = finished
    names = {"class-names": "cat,dog"} if key == "dataset" else {}
    before = files(folder)

    with pytest.raises(
        RunFolderError, match=f"must be resumed with the settings it began with, but `({key}|class-names)`"
    ):
        simulate(chosen | names | {key: value}, num_clients=2, client_cpus=1, client_gpus=0.0)

    assert files(folder) == before


@pytest.mark.parametrize(
    ("was", "refused"),
    [
        ({"division": "the card"}, "held out the same test images"),
        ({"generator": "/models/other (0123)"}, "the generator it began with"),
        ({"captioner": "/models/other (0123)"}, "the captioner it began with"),
        ({"lora": "/models/other (0123)"}, "the lora it began with"),
        ({"synthesis_device": "cuda"}, "that was cuda/32 and is cpu/64 now"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_before_anything_is_started(finished, was, refused):
    chosen, folder = finished
    written = json.loads((folder / "config.json").read_text())
    written["resolved"] |= was
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "plan.json").touch()
    before, longer = files(folder), chosen | {"num-server-rounds": 3, "device": "cpu"}

    with pytest.raises(RunFolderError, match=refused):
        simulate(longer, num_clients=2, client_cpus=1, client_gpus=0.0)

    assert files(folder) == before


@pytest.mark.parametrize(("division", "goes_on"), [("the run's seed", True), (None, False)])
def test_a_finished_run_of_another_division_is_not_told_to_go_on(finished, division, goes_on):
    chosen, folder = finished
    written = json.loads((folder / "config.json").read_text())
    written["resolved"]["division"] = division
    (folder / "config.json").write_text(json.dumps(written))

    said = say_if_finished(parse_run_config(chosen | {"num-clients": 2})) or ""

    assert "is finished" in said
    assert ("or a larger num-server-rounds to go on" in said) == goes_on


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_of_another_number_of_rounds_is_not_finished(finished, rounds):
    chosen, _ = finished

    assert say_if_finished(parse_run_config(chosen | {"num-clients": 2, "num-server-rounds": rounds})) is None


@pytest.mark.parametrize("lost", ["results.json", "checkpoints/round-0002.safetensors"])
def test_a_run_whose_end_was_lost_is_not_finished(finished, lost):
    chosen, folder = finished
    (folder / lost).unlink()

    assert say_if_finished(parse_run_config(chosen | {"num-clients": 2})) is None


COMMANDS = [
    ["run", "sed=1"], ["run", "dirichlet-beta=0"], ["report", "/nowhere"], ["audit", "/nowhere"],
    ["audit-captions", "/nowhere", "/tmp"], ["store", "verify", "/nowhere"], ["store", "stats", "/nowhere"],
    ["store", "export", "/nowhere", "/tmp/out"], ["synthesize", "/nowhere"], ["compare", "/nowhere.yaml"],
]  # fmt: skip
LIBRARIES = ("torch", "flwr", "matplotlib", "diffusers", "transformers", "ray", "sklearn")


def test_a_wrong_word_or_path_is_answered_without_the_libraries_that_take_seconds():
    code = (
        "import json, sys\nfrom typer.testing import CliRunner\nfrom fgl_app.cli import cli\n"
        f"for words in {COMMANDS!r}:\n"
        "    done = CliRunner().invoke(cli, words)\n"
        f"    found = [name for name in {LIBRARIES!r} if name in sys.modules]\n"
        "    print(json.dumps([words, type(done.exception).__mro__[-4].__name__, str(done.exception), found]))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words for words, *_ in answers] == COMMANDS
    for words, base, said, loaded in answers:
        assert (base, loaded) == ("FGLError", []), words
        assert "/nowhere" in said or f"`{words[1].partition('=')[0]}`" in said


def test_an_interrupted_command_says_how_it_goes_on(monkeypatch, capsys):
    words = ["run", "run-name=a", "strategy-options=eta=0.1 tau=1", "--clients", "3"]
    monkeypatch.setattr(sys, "argv", ["/some/where/fgl", *words])

    with pytest.raises(typer.Exit) as ended, _resumable():
        raise KeyboardInterrupt

    assert ended.value.exit_code == 128 + signal.SIGINT
    command = capsys.readouterr().err.split("Go on with: ")[1].strip()
    assert shlex.split(command) == ["fgl", *words]


def test_a_mistake_in_an_experiment_is_answered_before_its_folder_is_made(tmp_path):
    (tmp_path / "own.yaml").write_text("title: x\nseeds: [no]\n")

    outcome = CliRunner().invoke(cli, ["compare", str(tmp_path / "own.yaml"), "--output-dir", str(tmp_path / "out")])

    assert isinstance(outcome.exception, ConfigError)
    assert not (tmp_path / "out").exists()


def test_the_process_that_waits_for_a_run_keeps_no_images_meanwhile(run_config, monkeypatch):
    kept = []

    def start(*_):  # the SuperLink, which would run for minutes
        kept.extend(cache.cache_info().currsize for cache in (sources.load_held_out, sources.client_rows))
        raise KeyboardInterrupt

    monkeypatch.setattr("fgl_app.simulation._superlink", start)
    chosen = {key: value for key, value in run_config.items() if key != "num-clients"}

    with pytest.raises(KeyboardInterrupt):
        simulate(chosen, num_clients=2, client_cpus=1, client_gpus=0.0)

    assert kept == [0, 0]


def test_a_run_whose_image_files_are_others_now_is_refused(tmp_path, run_config):
    write_tree(tmp_path / "pets", ["cat", "dog"], 12, "png")
    chosen = run_config | {"dataset": str(tmp_path / "pets"), "min-samples-per-client": 0}
    settings = parse_run_config(chosen)

    def start():
        sources.forget()
        return RunFolder(settings, resolve(settings))

    kept = json.loads((start().path / "config.json").read_text())["resolved"]["listing"]
    start()  # with the same files it goes on
    (tmp_path / "pets" / "cat" / "3.png").write_bytes(b"damaged")
    (tmp_path / "pets" / "notes.txt").touch()
    start()  # the list is the same
    names = {"new": lambda: shutil.copy(tmp_path / "pets" / "cat" / "1.png", tmp_path / "pets" / "cat" / "z.png")}
    names["other"] = lambda: (tmp_path / "pets" / "cat" / "z.png").rename(tmp_path / "pets" / "dog" / "z.png")
    for change in names.values():
        change()
        with pytest.raises(RunFolderError, match="must be resumed with the image files that it began with"):
            start()
    (tmp_path / "pets" / "dog" / "z.png").unlink()
    assert json.loads((start().path / "config.json").read_text())["resolved"]["listing"] == kept
    # At another place it is the same list; a run of an earlier version has none.
    (tmp_path / "moved").mkdir()
    (tmp_path / "pets").rename(tmp_path / "moved" / "pets")
    elsewhere = parse_run_config(chosen | {"dataset": str(tmp_path / "moved" / "pets")})
    assert resolve(elsewhere)["listing"] == kept
    assert "listing" not in resolve(parse_run_config(run_config | {"dataset": "digits"}))
    assert not is_other_listing({}, {"listing": kept})


def test_a_run_whose_image_files_are_others_now_is_not_audited(tmp_path, run_config):
    write_tree(tmp_path / "pets", ["cat", "dog"], 12, "png")
    settings = parse_run_config(run_config | {"dataset": str(tmp_path / "pets"), "min-samples-per-client": 0})
    listing = resolve(settings)["listing"]
    check_listing({"listing": listing}, settings)
    check_listing({}, settings)
    write_tree(tmp_path / "pets" / "cat", ["more"], 1, "png")
    sources.forget()

    with pytest.raises(DataError, match="Image files were added, removed or renamed since the run"):
        check_listing({"listing": listing}, settings)
