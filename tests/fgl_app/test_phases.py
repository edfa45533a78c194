"""What the server says of a synthetic set: images left out, batches halved, classes that the filter rejects."""

import pytest
from finished_runs import a_row
from plans import commit

from fgl_app.config import parse_run_config
from fgl_app.phases import draw_plan, draw_synthetic_set
from fgl_app.prompts import MergedPrompts, PromptCount
from fgl_app.reporting.results import summarize
from fgl_app.reporting.run_folder import RunFolder
from fgl_app.store import as_ids

OF_CLIENTS = ("cured", "a rare disease")


@pytest.fixture
def drawn(run_config, caplog):
    """Return a function that makes a set of two classes, tells what became of it, and returns log and results."""

    def draw(class_names=("airplane", "clock"), *, left_out=0, dataset="domainnet10", **provenance):
        judges = {"filter": "/of/nobody", "safety-checker": dataset == "folder"}
        settings = parse_run_config(run_config | judges | {"dataset": dataset, "device": "cpu"})
        folder = RunFolder(settings, {})
        domain = "sketch" if settings.card.domains else ""
        prompts = tuple(PromptCount(label, name, 2, domain) for label, name in enumerate(class_names))
        plan = draw_plan(settings, MergedPrompts(prompts, class_names), folder.embeddings)
        absent = [sample.sample_id.hex() for sample in plan.samples()][:left_out]
        commit(plan, folder.synthetic, left_out=dict.fromkeys(absent, "rejected"), **provenance)
        with caplog.at_level("INFO", "flwr"):
            _, report = draw_synthetic_set(settings, plan, folder, lambda: None, as_ids([]))
        results = summarize(settings, [a_row(1, 0.5)], releases=[], prompt_round=None, synthesis=report, seconds={})
        return caplog, results["synthesis"]

    return draw


def warnings(log) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelname == "WARNING"]


def test_a_class_of_which_the_filter_rejects_more_than_half_is_named_with_its_domain(drawn):
    log, results = drawn(judged={"0:sketch": [10, 5], "1:sketch": [30, 20]})

    assert results["rejection_rates"] == {"0:sketch": 0.5, "1:sketch": 0.666667}
    assert warnings(log) == [
        "synthesis: 67 % of the images of class clock in domain sketch were rejected (filter): the generator may not "
        "know it"
    ]


def test_a_class_whose_name_clients_brought_is_called_by_its_number(drawn):
    log, results = drawn(OF_CLIENTS, dataset="folder", judged={"0": [4, 0], "1": [10, 8]})

    assert results["rejection_rates"] == {"0": 0.0, "1": 0.8}
    assert warnings(log) == [
        "synthesis: 80 % of the images of class number 1 were rejected (safety checker, filter): the generator may not "
        "know it"
    ]
    assert not any(name in log.text for name in OF_CLIENTS)


def test_images_that_are_left_out_are_counted_with_the_reason(drawn):
    log, results = drawn(left_out=1, batch_size=64)

    assert (results["images"], results["left_out"]) == (3, {"rejected": 1})
    assert warnings(log) == ["synthesis: 1 images are left out: rejected"]


def test_batches_that_were_halved_are_a_warning_with_what_can_be_repeated(drawn):
    log, results = drawn(batch_size=16)

    (warning,) = warnings(log)
    assert results["batch_sizes"] == [16]
    assert "some images were drawn 16 at a time, not 64" in warning
    assert "`synthesis-batch-size` 16" in warning


def test_a_set_that_lacks_nothing_is_no_warning(drawn):
    log, results = drawn(batch_size=64, judged={"0:sketch": [10, 0], "1:sketch": [10, 2]})

    assert results["rejection_rates"] == {"0:sketch": 0.0, "1:sketch": 0.2}
    assert warnings(log) == []
    assert "synthesis: 4 images, 0 drawn now, 4 reused" in log.text
