import csv
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from fgl_app.comparison import compare, typed
from fgl_app.config import APP_FOLDER
from fgl_app.errors import ConfigError, RunFolderError
from fgl_app.experiment_reader import load_experiment, read_experiment
from fgl_app.experiments import accuracies, epsilon_of, mean_and_sd, seconds_of
from fgl_app.reporting.comparison_figures import _column_points, _round_points, draw
from fgl_app.reporting.comparison_tables import write_tables
from fgl_app.simulation import _value
from fgl_app.user_files import write_yaml

EXPERIMENT = {
    "title": "Two methods",
    "clients": 2,
    "seeds": [0, 1],
    "settings": {"model": "cnn"},
    "columns": {"β = 0.01": {"dirichlet-beta": 0.01}, "IID": {"partition": "iid"}},
    "rows": {
        "FedAvg": {"method": "fedavg", "num-server-rounds": 3},
        "FGL": {"num-server-rounds": 2},
        "One-shot": {"of": "FGL", "round": 1},
        "Centralized": {"method": "centralized", "num-server-rounds": 1, "every-column": False},
    },
    "figures": [
        {"name": "upload", "kind": "by-upload", "title": "Accuracy against upload"},
        {"name": "bars", "kind": "bars", "title": "All", "columns": ["IID"]},
    ],
    "orderings": [
        {"name": "O1", "larger": ["One-shot", "β = 0.01"], "smaller": ["FedAvg", "β = 0.01"]},
        {"name": "O9", "larger": ["FedAvg", "IID"], "smaller": ["FGL", "IID"], "margin": 0.1},
    ],
}


@pytest.fixture
def write(tmp_path):
    def made(**changes):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump({**EXPERIMENT, **changes}, allow_unicode=True, sort_keys=False), "utf-8")
        return path

    return made


def result(seed, *round_accuracies):
    rounds = [
        {
            "round": number,
            "accuracy": value,
            "validation_accuracy": value - 0.05,
            "upload_bytes": 1_000_000,
            "seconds": 2.0,
        }
        for number, value in enumerate(round_accuracies, 1)
    ]
    return {
        "seed": seed, "rounds": rounds, "final_accuracy": round_accuracies[-1], "paper_metric": max(round_accuracies),
        "selected_accuracy": round_accuracies[0], "one_shot_accuracy": None, "synthesis": None,
        "privacy": None,
        "upload_bytes": {"total": 1_000_000 * len(rounds)},
    }  # fmt: skip


RESULTS = {
    ("FedAvg", "β = 0.01"): [result(0, 0.1, 0.2, 0.3), result(1, 0.2, 0.4, 0.5)],
    ("FGL", "β = 0.01"): [result(0, 0.8, 0.9), result(1, 0.6, 0.7)],
    ("FGL", "IID"): [result(0, 0.8, 0.9), result(1, 0.6, 0.7)],
    ("FedAvg", "IID"): [result(0, 0.5, 0.6, 0.85)],
    ("Centralized", "β = 0.01"): [result(0, 0.95), result(1, 0.97)],
}


@pytest.fixture
def markdown(write, tmp_path):
    """Write the tables of some results and return them as Markdown."""
    return lambda results: write_tables(load_experiment(write()), results, tmp_path / "md").read_text("utf-8")


def test_runs_are_methods_times_conditions_times_seeds(write, tmp_path):
    runs = load_experiment(write()).runs(tmp_path)

    # Two methods in two columns and one that needs only one column, for two seeds; one row shows another's runs.
    assert len(runs) == 2 * (2 * 2 + 1)
    assert len({run.name for run in runs}) == len(runs)
    assert {run.overrides["store-dir"] for run in runs} == {str(tmp_path / "store")}
    assert runs[0].name == "fedavg--beta-0.01--seed-0"


@pytest.mark.parametrize("value", [True, False, 3, 0.5, "off"])
def test_values_are_typed_as_the_command_reads_them(value):
    assert _value(typed(value)) == value


def test_files_beside_the_experiment_are_found_wherever_it_is_copied(write, tmp_path):
    rows = {
        "Captions": {"prompt-level": "instance", "caption-vocabulary": "words.txt"},
        "Elsewhere": {"prompt-level": "instance", "caption-vocabulary": "/elsewhere/words.txt"},
    }

    content = read_experiment(write(rows=rows, figures=[], orderings=[], settings={"dataset": "own/card.yaml"}))

    assert [row["caption-vocabulary"] for row in content["rows"].values()] == [
        str(tmp_path / "words.txt"), "/elsewhere/words.txt",
    ]  # fmt: skip
    assert content["settings"]["dataset"] == str(tmp_path / "own" / "card.yaml")


def test_a_row_can_start_from_the_weights_of_another(write, tmp_path):
    tuned = {"method": "centralized", "num-server-rounds": 1, "start-from": ["FGL", 1]}

    runs = load_experiment(write(rows={**EXPERIMENT["rows"], "Fine-tuned": tuned})).runs(tmp_path)

    (run,) = (run for run in runs if (run.row, run.column, run.seed) == ("Fine-tuned", "IID", 1))
    assert run.after == "fgl--iid--seed-1"
    assert run.overrides["initial-weights"] == str(
        tmp_path / "runs" / "fgl--iid--seed-1" / "checkpoints" / "round-0001.safetensors"
    )
    assert {run.after for run in runs if run.row != "Fine-tuned"} == {None}


@pytest.mark.parametrize(
    ("start", "named"),
    [
        ("FGL", "must be \\[ROW, ROUND\\]"),
        (["One-shot", 1], "earlier row with runs of its own"),
        (["Fine-tuned", 1], "earlier row with runs of its own"),
        (["FGL", 9], "start from round 9 of 'FGL', which has 2"),
    ],
)
def test_a_wrong_start_is_refused(write, start, named):
    tuned = {"method": "centralized", "num-server-rounds": 1, "start-from": start}

    with pytest.raises(ConfigError, match=named):
        load_experiment(write(rows={**EXPERIMENT["rows"], "Fine-tuned": tuned}))


def test_a_cell_is_mean_and_standard_deviation_over_the_seeds(markdown):
    text = markdown(RESULTS)

    # mean(30, 50) = 40; sample standard deviation of (30, 50) = 20 / sqrt(2) = 14.1.
    assert "| FedAvg | 40.0 ± 14.1 | 85.0 ± 0.0 (1 of 2 seeds) |" in text
    # The first round of FGL's runs: 80 and 60.
    assert "| One-shot | 70.0 ± 14.1 | 70.0 ± 14.1 |" in text
    # One column's runs stand for both.
    assert "| Centralized | 96.0 ± 1.4 | 96.0 ± 1.4 |" in text
    assert mean_and_sd([0.5]) == (0.5, 0.0)


def test_images_that_another_run_drew_are_charged_in_seconds(write, tmp_path):
    found = result(0, 0.1, 0.2)
    found["rounds"][0]["reused_seconds"] = 30.0

    write_tables(load_experiment(write()), {("FedAvg", "IID"): [found]}, tmp_path)

    (row,) = csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))
    assert float(row["seconds"]) == 2.0 + 2.0 + 30.0


def test_rows_that_show_an_earlier_round_have_lines_of_their_own(write, tmp_path):
    write_tables(load_experiment(write()), RESULTS, tmp_path)

    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    shown = [
        (line["row"], line["column"], line["seed"], line["final_accuracy"], line["rounds"], line["upload_bytes"])
        for line in lines
        if line["row"] in ("One-shot", "FGL") and line["column"] == "IID"
    ]
    # The first round of FGL's runs, one megabyte each; both rounds are FGL's own lines.
    assert sorted(shown) == [
        ("FGL", "IID", "0", "0.9", "2", "2000000"),
        ("FGL", "IID", "1", "0.7", "2", "2000000"),
        ("One-shot", "IID", "0", "0.8", "1", "1000000"),
        ("One-shot", "IID", "1", "0.6", "1", "1000000"),
    ]
    assert {line["seconds"] for line in lines if line["row"] == "One-shot"} == {"2.0"}
    assert [line["column"] for line in lines if line["row"] == "Centralized"] == ["β = 0.01"] * 2


def test_a_second_comparison_in_one_folder_is_told_which_process_works_there(write, tmp_path):
    code = (
        "import sys; from pathlib import Path; from fgl_app.reporting.folder_lock import held\n"
        "with held(Path(sys.argv[1]), 'x'): print('in', flush=True); sys.stdin.read(1)"
    )
    said = []
    options = {"data_dir": None, "jobs": 1, "client_cpus": 1, "client_gpus": 0.0, "say": said.append}
    folder = tmp_path / "table"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=-1, stdout=-1, cwd=APP_FOLDER) as first:
        assert first.stdout.readline() == b"in\n"
        with pytest.raises(RunFolderError, match=rf"process {first.pid}.*use another --output-dir"):
            compare(write(), folder, **options)
        first.communicate(b"\n")

    assert said == []
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_every_column_is_described_with_its_unit(write, tmp_path):
    described = (APP_FOLDER / "examples" / "README.md").read_text("utf-8").split("## Columns and units")[1]
    write_tables(load_experiment(write()), RESULTS, tmp_path)

    for name in (tmp_path / "results.csv").read_text().splitlines()[0].split(","):
        assert f"`{name}`" in described


def test_what_has_not_run_is_said(markdown):
    text = markdown({})

    assert "| FedAvg | — | — |" in text
    assert "| O1 |  |  |  |  | not run |" in text


def test_tables_and_figures_are_files(write, tmp_path):
    experiment = load_experiment(write())

    table = write_tables(experiment, RESULTS, tmp_path / "out")

    assert table.read_text("utf-8").startswith("# Two methods")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text())))
    assert len(rows) == sum(map(len, RESULTS.values())) + 4  # and the four runs of FGL again, for One-shot
    assert rows[0]["upload_bytes"] == "3000000"
    for name in ("upload", "bars"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(set(picture.convert("L").tobytes())) > 20
        assert (tmp_path / "out" / f"{name}.svg").read_text().count("<path") > 10


def test_curves_stand_at_the_seconds_of_their_rounds_and_at_the_number_of_their_column(write):
    volumes = {"columns": {"20": {"images-per-class": 20}, "1,000": {"images-per-class": 1000}}, "orderings": []}
    figures = [
        {"name": "time", "kind": "by-seconds", "title": "t"},
        {"name": "volume", "kind": "by-column", "title": "v"},
    ]
    experiment = load_experiment(write(**volumes, figures=figures))
    by_seconds, by_column = experiment.figures
    results = {("FGL", "1,000"): [result(0, 0.5, 0.7), result(1, 0.7, 0.9)], ("FGL", "20"): [result(0, 0.4, 0.4)]}

    # Two seconds a round; mean and sample standard deviation, in percent.
    assert _round_points(experiment, results, "FGL", "1,000", by_seconds.kind) == pytest.approx(
        np.array([[2.0, 60.0, 100 * 0.02**0.5], [4.0, 80.0, 100 * 0.02**0.5]])
    )
    assert _column_points(experiment, results, "FGL", experiment.columns, by_column) == pytest.approx(
        np.array([[20.0, 40.0, 0.0], [1000.0, 80.0, 100 * 0.02**0.5]])
    )
    assert {"time.png", "volume.png"} <= set(draw(experiment, results))


def test_figures_have_equal_bytes_for_equal_numbers(write, tmp_path):
    experiment = load_experiment(write())

    for folder in ("a", "b"):
        write_tables(experiment, RESULTS, tmp_path / folder)

    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_an_earlier_round_of_a_run_is_read_from_it(write):
    assert accuracies(load_experiment(write()), RESULTS, "One-shot", "IID") == [0.8, 0.6]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": []}, "`seeds`"),
        ({"measure": "best"}, "`measure`"),
        ({"tabel": 1}, "`tabel` is unknown"),
        ({"rows": {"A": {"of": "B", "round": 1}}, "figures": [], "orderings": []}, "'A' must be `of`"),
        ({"rows": {"A": {"of": "B"}}, "figures": [], "orderings": []}, "`of` and `round`"),
        ({"rows": {"A": {}, "B": {"of": "A", "round": 0}}, "figures": [], "orderings": []}, "whole number from 1 on"),
        (
            {"rows": {"A": {}, "B": {"of": "A", "round": 9}}, "figures": [], "orderings": []},
            "must not show or start from round 9",
        ),
        ({"rows": {"A": {"seed": 3}}, "figures": [], "orderings": []}, "`seed` is set by"),
        ({"rows": {"A": {"dirichlet-beta": -1}}, "figures": [], "orderings": []}, "`dirichlet-beta`"),
        ({"rows": {"A": {}, "a": {}}, "figures": [], "orderings": []}, "two runs are called"),
        ({"settings": {"run-name": "x"}}, "`run-name` is set by"),
        ({"orderings": [{"name": "O", "larger": ["X", "IID"], "smaller": ["FGL", "IID"]}]}, "ordering 'O'"),
        ({"figures": [{"name": "f", "kind": "by-column", "title": ""}]}, "named by numbers"),
        ({"figures": [{"name": "f", "kind": "pie", "title": ""}]}, "'f' must be one of"),
    ],
)
def test_a_wrong_experiment_is_refused_before_anything_runs(write, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        compare(
            write(**changes),
            tmp_path / "out",
            data_dir=None,
            jobs=1,
            client_cpus=1,
            client_gpus=0.0,
            say=lambda line: None,
        )

    assert not (tmp_path / "out").exists()


TEXT = """\
title: Own
clients: 2
seeds: [0]
settings: {model: cnn, learning-rate: 1e-2}
columns:
  1e-2: {dirichlet-beta: 1e-2}
  no: {partition: iid}
rows:
  FedAvg: {method: fedavg}
  010: {num-server-rounds: 1}
figures:
- {name: f, kind: bars, title: t, columns: [1e-2], rows: [010]}
orderings:
- {name: o, larger: [FedAvg, no], smaller: [010, 1e-2]}
"""


def test_names_of_rows_and_columns_and_numbers_are_what_is_written(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("\ufeff" + TEXT, "utf-8")

    for text in (path.read_text("utf-8"), write_yaml(read_experiment(path))):  # and in the copy beside the runs
        path.write_text(text, "utf-8")
        experiment = load_experiment(path)
        assert [row.name for row in experiment.rows] == ["FedAvg", "010"]
        assert experiment.shared["learning-rate"] == 0.01
        assert experiment.columns == {"1e-2": {"dirichlet-beta": 0.01}, "no": {"partition": "iid"}}
        assert experiment.figures[0].columns == ("1e-2",)
        assert experiment.orderings[0].smaller == ("010", "1e-2")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("  FedAvg: {", "  '010': {method: fgl}\n  FedAvg: {", "line 11: `rows.010` stands in line 9, too"),
        ("clients: 2", "clients: 0x2", "line 2, `clients`: it must be a whole number"),
        ("seeds: [0]", "seeds: [0, 010]", r"line 3, `seeds\[1\]`: it must be a whole number"),
        ("seeds: [0]", "seeds: [3, 3]", "line 3, `seeds`: each seed must stand there once"),
        ("learning-rate: 1e-2", "learning-rate: 1_000", "line 4, `settings.learning-rate`: .*must be a number"),
        ("{partition: iid}", "{compile-training: yes}", "line 7, `columns.no.compile-training`: .*true or false"),
        ("num-server-rounds: 1", "retain-prompts: no", "line 10, `rows.010.retain-prompts`: .*true or false"),
        ("num-server-rounds: 1", "learnig-rate: 1", "line 10, `rows.010.learnig-rate`: .*Did you mean"),
        ("num-server-rounds: 1", "every-column: no", "line 10, `rows.010.every-column`: it must be true or false"),
        ("num-server-rounds: 1", "lora: [a]", "line 10, `rows.010.lora`: it must be text, a number"),
        ("[FedAvg, no]", "[FedAvg, false]", "line 14, `orderings\\[0\\].larger`: ordering 'o' must name"),
        ("columns: [1e-2]", "columns: [0.01]", "line 12, `figures\\[0\\].columns\\[0\\]`: it must name one of the col"),
        ("name: o,", "name: o, margin: 1_0,", "line 14, `orderings\\[0\\].margin`: it must be a number"),
        ("title: t,", "titel: t,", "line 12, `figures\\[0\\].titel`: `titel` is unknown"),
        ("name: f,", "name: ../f,", "line 12, .*the name of a file"),
        ("orderings:", "- {name: F, kind: bars, title: t}\norderings:", "line 13, .*different names, as files"),
    ],
)  # fmt: skip
def test_an_experiments_mistake_has_file_line_and_key(tmp_path, old, new, named):
    path = tmp_path / "own.yaml"
    path.write_text(TEXT.replace(old, new), "utf-8")

    with pytest.raises(ConfigError, match=named) as raised:
        load_experiment(path)

    assert str(path) in str(raised.value)


SHIPPED = [path for path in sorted(APP_FOLDER.glob("examples/*/*.yaml")) if "seeds:" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_experiment_is_well_formed(path, tmp_path):
    experiment = load_experiment(path)

    assert experiment.runs(tmp_path)
    assert experiment.title


def test_the_page_of_a_comparison_holds_tables_and_figures_and_loads_nothing(write, tmp_path):
    write_tables(load_experiment(write()), RESULTS, tmp_path / "out")

    page = (tmp_path / "out" / "comparison.html").read_text("utf-8")
    assert "70.0 ± 14.1" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert 'src="http' not in page
    assert "<script" not in page


def test_accuracies_per_domain_have_a_table_with_micro_and_macro(write, tmp_path):
    rounds = [{"domain_accuracy": {"photo": 0.9, "sketch": 0.5}, "accuracy_macro": 0.7}]
    one = result(0, 0.8)
    one["rounds"] = [one["rounds"][0] | rounds[0]]

    table = write_tables(load_experiment(write()), {("FedAvg", "IID"): [one]}, tmp_path / "out").read_text("utf-8")

    assert "|  | photo | sketch | micro | macro |" in table
    assert "| FedAvg, IID | 90.0 ± 0.0 | 50.0 ± 0.0 | 80.0 ± 0.0 | 70.0 ± 0.0 |" in table


def private_result(seed, accuracy, *mechanisms):
    stated = [{"part": part, "unit": unit, "epsilon": epsilon} for part, unit, epsilon in mechanisms]
    return result(seed, accuracy) | {"privacy": {"mechanisms": stated} if stated else None}


EPSILON_FIGURE = {"name": "epsilon", "kind": "by-epsilon", "part": "rounds", "title": "Accuracy against ε"}


def test_accuracy_against_epsilon_has_a_logarithmic_axis_and_levels_to_compare_with(write, tmp_path):
    columns = {"much": {"example-dp-noise": 4.0}, "little": {"example-dp-noise": 0.5}}
    rows = {
        "DP-SGD": {"method": "fedavg"},
        "FedAvg": {"method": "fedavg", "example-dp-noise": 0.0, "every-column": False},
    }
    experiment = load_experiment(write(columns=columns, rows=rows, figures=[EPSILON_FIGURE], orderings=[]))
    prompts = ("prompts", "one image", 8.0)
    results = {
        ("DP-SGD", "much"): [
            private_result(seed, 0.5, prompts, ("rounds", "one image", 2.0 + seed)) for seed in (0, 2)
        ],
        ("DP-SGD", "little"): [private_result(0, 0.8, ("rounds", "one client", 9.0), ("rounds", "one image", 300.0))],
        ("FedAvg", "much"): [private_result(0, 0.9), private_result(1, 0.9)],
    }

    assert epsilon_of(experiment, results, "DP-SGD", "much", "rounds") == 3.0  # the mean of 2 and 4
    assert epsilon_of(experiment, results, "DP-SGD", "much", "prompts") == 8.0
    assert epsilon_of(experiment, results, "DP-SGD", "little", "rounds") == 300.0
    assert epsilon_of(experiment, results, "FedAvg", "little", "rounds") is None
    assert epsilon_of(experiment, {}, "FedAvg", "much", "rounds") is None
    table = write_tables(experiment, results, tmp_path / "out").read_text("utf-8")
    assert "## ε of the rounds" in table
    assert "| DP-SGD | 3.00 | 300.00 |" in table
    drawn = (tmp_path / "out" / "epsilon.svg").read_text("utf-8")
    assert "DP-SGD" in drawn
    assert "FedAvg" in drawn


@pytest.mark.parametrize(
    ("figure", "named"),
    [
        ({**EPSILON_FIGURE, "part": "weights"}, "must be prompts or rounds, but is 'weights'"),
        (EPSILON_FIGURE, "must show last rounds only"),
    ],
)
def test_a_figure_of_epsilon_says_whose_epsilon_it_is(write, figure, named):
    with pytest.raises(ConfigError, match=named):
        load_experiment(write(figures=[figure]))


def test_seconds_that_a_run_keeps_secret_are_not_a_number():
    assert math.isnan(seconds_of({"round": 2, "accuracy": 0.5}))
    assert seconds_of({"seconds": 2.0, "reused_seconds": 1.0}) == 3.0
