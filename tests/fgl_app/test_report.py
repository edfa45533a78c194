import base64
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from finished_runs import PROMPT
from typer.testing import CliRunner

from fgl_app.cli import cli
from fgl_app.config import parse_run_config
from fgl_app.data.images import ImageSet
from fgl_app.data.sources import client_rows, load_split
from fgl_app.errors import RunFolderError, SynthesisError
from fgl_app.reporting import figures
from fgl_app.reporting.finished_run import class_counts, held_out_images, read_run, synthetic_images
from fgl_app.reporting.page import Page, render
from fgl_app.reporting.report import write_report

SECTIONS = [
    "Summary", "Accuracy and loss", "Accuracy by domain", "How much the clients' updates differ", "Confusion matrix",
    "Training images of the clients", "Real and synthetic images", "Most frequent prompts", "Bytes and seconds",
    "Configuration",
]  # fmt: skip


class Elements(HTMLParser):
    """Every element of a page with its attributes, and every text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def pictures_of(page: str) -> list[bytes]:
    return [base64.b64decode(content) for content in re.findall(r'src="data:image/[a-z+]+;base64,([^"]+)"', page)]


def test_the_page_of_a_run_is_complete_and_for_its_owner_alone(make_run):
    run = make_run()

    done = CliRunner().invoke(cli, ["report", str(run)])

    assert done.output.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_mode & 0o777 == 0o600
    texts = Elements((run / "report.html").read_text()).texts
    assert [text for text in texts if text in SECTIONS] == SECTIONS
    assert any("holds prompts" in text for text in texts)
    for shown in ("80.00 %", "60.00 %", "44.8 MB", "324 B", "70.00 %", "images-per-class", "diffusers"):
        assert shown in texts, shown


def test_the_page_draws_every_figure(make_run):
    page = write_report(make_run()).read_text()

    # Accuracy, loss, diversity, drift, confusion and partition; the contact sheet.
    assert [content[:4] for content in pictures_of(page)] == [b"<svg"] * 6 + [b"\x89PNG"]
    assert all(len(content) > 5_000 for content in pictures_of(page))
    assert page.count("<figcaption>") == 7


def test_the_page_loads_nothing_and_runs_nothing(make_run):
    page = write_report(make_run()).read_text()
    elements = Elements(page).found

    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    loaded = [values[key] or "" for _, values in elements for key in ("src", "href", "srcset", "data") if key in values]
    assert loaded
    assert all(source.startswith("data:image/") for source in loaded)
    assert not re.search(r"@import|url\(", page)
    assert not [key for _, values in elements for key in values if key.startswith("on")]
    (policy,) = (values for tag, values in elements if tag == "meta" and "http-equiv" in values)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_prompts_are_shown_as_they_are_and_never_as_html(make_run):
    page = write_report(make_run()).read_text()

    assert "<script" not in page
    assert PROMPT in "".join(Elements(page).texts)


def test_the_page_says_what_was_not_used(make_run, make_fedavg):
    page = write_report(make_run()).read_text()

    assert "Client 1 could not read 4 of its images." in page
    assert "Refused: a blocked word." in page
    assert "What was not used" not in write_report(make_fedavg(**{"run-name": "plain"})).read_text()


def test_the_same_run_gives_the_same_page(make_run):
    run = make_run()

    first = write_report(run).read_bytes()

    assert write_report(run).read_bytes() == first


@pytest.mark.parametrize("damage", ["absent", "no results", "damaged", "incomplete"])
def test_a_folder_that_is_no_finished_run_is_refused_in_one_sentence(make_fedavg, tmp_path, damage):
    run = tmp_path / "absent" if damage == "absent" else make_fedavg()
    if damage == "no results":
        (run / "results.json").unlink()
    elif damage == "damaged":
        (run / "results.json").write_text("{")
    elif damage == "incomplete":
        (run / "results.json").write_text("{}")

    with pytest.raises(RunFolderError, match=r"must be .*run|must be a JSON object"):
        write_report(run)

    assert not (run / "report.html").exists()


def test_the_command_ends_with_the_error_of_a_wrong_folder(tmp_path):
    done = CliRunner().invoke(cli, ["report", str(tmp_path)])  # main() turns it into a sentence and code 1

    assert isinstance(done.exception, RunFolderError)


def test_a_run_without_prompts_and_images_says_so(make_fedavg):
    page = write_report(make_fedavg(**{"run-name": "plain"})).read_text()

    assert "The run drew no images." in page
    assert "The method has no prompts." in page
    assert "holds prompts" not in page
    assert "Accuracy by domain" not in page
    assert len(pictures_of(page)) == 3  # accuracy, loss and partition


def test_the_server_does_not_know_the_images_of_own_folders(make_run, make_fedavg, run_config):
    folders = {"dataset": "folder", "class-names": "cat,dog", "run-name": "own"}
    page = write_report(make_fedavg(**folders)).read_text()
    drawn = make_run()

    settings = parse_run_config(run_config | {"dataset": "folder", "class-names": "cat,dog"})
    own = dataclasses.replace(read_run(drawn), settings=settings)

    assert "only the client knows what is in it" in page
    with pytest.raises(Exception, match="never leave the clients"):
        held_out_images(own, 16)


def test_a_store_that_is_gone_costs_the_contact_sheet_only(make_run, tmp_path):
    run = shutil.copytree(make_run(), tmp_path / "copy")
    config = json.loads((run / "config.json").read_text())
    config["run_config"]["store-dir"] = ""
    (run / "config.json").write_text(json.dumps(config))

    page = write_report(run).read_text()

    assert "The synthetic images cannot be shown." in page
    assert len(pictures_of(page)) == 6
    assert not (run / "synthetic").exists()  # reading makes no store


def test_data_that_cannot_be_loaded_leaves_the_synthetic_images(make_run, tmp_path):
    run = make_run()
    config = json.loads((run / "config.json").read_text())
    config["run_config"]["data-dir"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))

    page = write_report(run).read_text()

    assert page.count("`data-dir` must be a folder") == 2  # in place of the partition and of the real images
    assert "Synthetic images only." in page
    assert len(pictures_of(page)) == 6


def test_the_partition_counts_the_images_that_the_clients_hold(make_run, settings):
    counts = class_counts(read_run(make_run()), max_clients=2)

    rows = client_rows(settings.card, settings.data, settings.run.num_clients, settings.run.seed)
    assert [sum(of_client) for of_client in counts] == [len(rows[0]), len(rows[1])]
    assert all(len(of_client) == 10 for of_client in counts)


def test_the_sheet_shows_held_out_images_and_those_of_the_store(make_run, settings):
    run = read_run(make_run())

    real, synthetic = held_out_images(run, 8), synthetic_images(run, 3, 1, 16)

    validation = load_split(settings.card, settings.data, "validation", 0)
    assert torch.equal(real.images, validation.images)
    assert synthetic.labels.tolist() == [0, 1, 2]
    assert synthetic.images.shape == (3, 3, 16, 16)  # stored at 32 px


def test_a_damaged_store_is_named(make_run, tmp_path, store):
    run = read_run(make_run())
    copied = shutil.copytree(store, tmp_path / "store")
    for path in (copied / "units").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    config = {"run_config": dict(run.config["run_config"]) | {"store-dir": str(copied)}}

    with pytest.raises(SynthesisError, match="is damaged at unit"):
        synthetic_images(dataclasses.replace(run, config=config), 3, 1, 16)


def test_items_are_spread_evenly():
    assert figures.spread(range(10), 4) == [0, 2, 5, 7]
    assert figures.spread("abc", 8) == ["a", "b", "c"]
    assert figures.spread([], 8) == []


@pytest.mark.parametrize("num_classes", [2, 10, 30])
def test_figures_take_few_and_many_classes_and_any_name(num_classes):
    names = [f"$class {number}_猫 with a long name, {number}" for number in range(num_classes)]
    counts = [[row * column % 7 for column in range(num_classes)] for row in range(num_classes)]
    images = ImageSet(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]))

    drawn = [
        figures.confusion_chart(counts, names),
        figures.partition_chart(counts, names),
        figures.contact_sheet({"real": images, "synthetic": images}, names, per_class=2),
        figures.line_chart({name: [(1, 2.0), (2, 3.0)] for name in names[:8]}, x_label="round", y_label="$"),
    ]

    for figure in drawn:
        assert figures.to_svg(figure).startswith("<svg")
        assert figures.to_png(figure).startswith(b"\x89PNG")


def test_lines_differ_without_colour():
    figure = figures.line_chart({str(n): [(0, n)] for n in range(8)}, x_label="round", y_label="loss, nats")

    (axes,) = figure.axes
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}) == 8
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("round", "loss, nats")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(n) for n in range(8)]


def test_a_page_escapes_its_own_title():
    assert "<h1>a &lt;b&gt;</h1>" in render(Page("a <b>", "", [], []))


def test_the_page_states_epsilon_of_the_rounds_and_what_has_no_bound(make_fedavg, make_run):
    prompts = {"prompt-level": "embedding", "embedding-clip": 5.0, "embedding-epsilon": 8.0}

    half = write_report(make_run(**prompts, **{"run-name": "half"})).read_text()
    private = write_report(make_run(**prompts, **{"run-name": "private", "example-dp-noise": 1.0})).read_text()

    assert "nothing hides it in the model of every round" in half
    assert "<td>8.00</td>" in half
    assert "is bounded by epsilon" in private
    assert "Not bounded: its class and domain, and how many images have them (prompts)" in private
    assert "<h2>Privacy</h2>" not in write_report(make_fedavg()).read_text()
