"""What the tables of a comparison say of seeds, test images and differences between methods."""

import csv
import io
import statistics

import pytest
import torch
from scipy.stats import t

from clients.captioning import HubCaptioner
from clients.prompting import write_prompts
from fgl_app.config import parse_run_config
from fgl_app.data.sources import load_client_data
from fgl_app.experiment_reader import load_experiment
from fgl_app.intervals import of_mean
from fgl_app.prompts import merge_prompts
from fgl_app.reporting.comparison_tables import write_tables

EXPERIMENT = """
title: Two methods
clients: 2
seeds: [0, 1, 2]
settings: {model: cnn, num-server-rounds: 2, %s}
columns: {IID: {partition: iid}}
rows: {FedAvg: {method: fedavg}, FGL: {}, One-shot: {of: FGL, round: 1}}
orderings:
  - {name: above, larger: [FGL, IID], smaller: [FedAvg, IID]}
  - {name: far above, larger: [FGL, IID], smaller: [FedAvg, IID], margin: 0.5}
  - {name: by little, larger: [One-shot, IID], smaller: [FedAvg, IID]}
  - {name: same, larger: [FGL, IID], smaller: [FGL, IID], margin: -0.01}
%s
"""


def result(seed, *pairs, num_test_images=240):
    """Results of a run with test and validation accuracy of each round."""
    rounds = [
        {"round": number, "accuracy": test, "validation_accuracy": validation, "upload_bytes": 1, "seconds": 1.0}
        for number, (test, validation) in enumerate(pairs, 1)
    ]
    return {
        "seed": seed, "rounds": rounds, "final_accuracy": pairs[-1][0], "selected_accuracy": pairs[0][0],
        "paper_metric": max(test for test, _ in pairs), "one_shot_accuracy": None, "synthesis": None, "privacy": None,
        "num_validation_images": 120, "num_test_images": num_test_images, "upload_bytes": {"total": 2},
    }  # fmt: skip


FEDAVG, FGL, ONE_SHOT = (0.50, 0.62, 0.71), (0.61, 0.70, 0.82), (0.58, 0.60, 0.90)
RESULTS = {
    ("FedAvg", "IID"): [result(seed, (0.1, 0.2), (FEDAVG[seed], 0.3)) for seed in range(3)],
    ("FGL", "IID"): [result(seed, (ONE_SHOT[seed], 0.4), (FGL[seed], 0.8 + seed / 100)) for seed in range(3)],
}


@pytest.fixture
def table(tmp_path):
    """Write the tables of results and return them as Markdown."""

    def write(results=RESULTS, settings="dataset: digits", more=""):
        path = tmp_path / "experiment.yaml"
        path.write_text(EXPERIMENT % (settings, more), "utf-8")
        return write_tables(load_experiment(path), results, tmp_path / "out").read_text("utf-8")

    return write


@pytest.mark.parametrize("values", [FEDAVG, (0.1, -0.2, 0.3, 0.05), (-1.0, 2.0)])
def test_the_interval_of_a_mean_is_students(values):
    low, high = t.interval(
        0.95, len(values) - 1, statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    )

    found = of_mean(values)

    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.value == pytest.approx(sum(values) / len(values))


def test_differences_are_those_of_the_same_seed_with_an_interval(table):
    # 11, 8 and 11 points: mean 10, standard deviation sqrt(3); t(2) = 4.303: 10 ± 4.303 * sqrt(3) / sqrt(3).
    # Unpaired, the seeds' own spread (10 points) would hide it.
    text = table()

    assert "## Difference from FedAvg, points" in text
    assert "| FGL | +10.0 [+5.7, +14.3] |" in text
    assert "| above | FGL, IID: 71.0 | FedAvg, IID: 61.0 | +10.0 [+5.7, +14.3] | 0 | yes |" in text
    assert "| far above | FGL, IID: 71.0 | FedAvg, IID: 61.0 | +10.0 [+5.7, +14.3] | 50 | **no** |" in text
    # 8, -2 and 19 points.
    assert "| by little | One-shot, IID: 69.3 | FedAvg, IID: 61.0 | +8.3 [-17.8, +34.4] | 0 | open |" in text
    assert "| same | FGL, IID: 71.0 | FGL, IID: 71.0 | +0.0 [+0.0, +0.0] | -1 | yes |" in text


def test_seeds_that_only_one_of_two_methods_has_are_left_out_of_their_difference(table):
    some = {("FedAvg", "IID"): RESULTS["FedAvg", "IID"][1:], ("FGL", "IID"): RESULTS["FGL", "IID"][:2]}

    text = table(some)

    assert "| FGL | — |" in text  # one common seed has no interval
    assert "| above | FGL, IID: 65.5 | FedAvg, IID: 66.5 | +8.0 | 0 | one seed |" in text


@pytest.mark.parametrize(
    ("settings", "size", "said"),
    [
        ("dataset: digits", 240, "240 test images; 2 clients. The seed varies the division of the images into "
         "training, validation and test, the partition over the clients, the first weights, the batches and the noise "
         "of the synthetic images; the generator is the same."),
        ("dataset: fashion-mnist, max-train-images: 2000", 10_000, "10,000 test images; 2 clients. The seed varies the "
         "division of the images into training and validation, the choice of the training images, the partition over "
         "the clients, the first weights, the batches and the noise of the synthetic images; the generator and the "
         "test images are the same."),
    ],
)  # fmt: skip
def test_the_caption_names_what_the_seeds_vary_and_how_many_images_measure(table, settings, size, said):
    results = {cell: [item | {"num_test_images": size} for item in found] for cell, found in RESULTS.items()}

    text = table(results, settings)

    assert f"Mean ± standard deviation over seeds 0, 1, 2; {said}" in text


def test_a_step_size_is_chosen_by_validation_and_its_table_shows_no_test_accuracy(table, tmp_path):
    text = table(more="measure: validation_accuracy")

    assert "## Validation accuracy after the last round, %" in text
    assert "| FGL | 81.0 ± 1.0 |" in text
    assert "| One-shot | 40.0 ± 0.0 |" in text
    assert "120 validation images" in text
    assert "Test accuracy" not in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text())))
    assert [float(row["validation_accuracy"]) for row in rows if row["row"] == "FGL"] == pytest.approx(
        [0.8, 0.81, 0.82]
    )


@pytest.mark.parametrize("level", ["class", "instance"])
def test_what_all_clients_together_send_does_not_depend_on_the_partition(run_config, level):
    cpu = torch.device("cpu")
    captioner = HubCaptioner("tiny", revision="", dtype="auto", max_new_tokens=32, device=cpu)

    def merged(**partition):
        settings = parse_run_config(run_config | {"max-train-images": 60, "min-samples-per-client": 1, **partition})
        clients = [
            load_client_data(settings.card, settings.data, {"partition-id": number, "num-partitions": 3}, 0)
            for number in range(3)
        ]
        names = settings.card.class_names()
        written = [
            write_prompts(
                client.train,
                names,
                form_of=settings.prompt_form,
                domains=(),
                num_prompts_per_class=1,
                captioner=captioner if level == "instance" else None,
            )
            for client in clients
        ]
        return [(item.label, item.prompt, item.count) for item in merge_prompts(written)]

    skewed = merged(**{"partition": "dirichlet", "dirichlet-beta": 0.01})

    # O2 holds by construction: the generator is asked for the same images, whoever holds which.
    assert skewed == merged(partition="iid")
    assert sum(count for _, _, count in skewed) == 60
