"""The tables and the page of a comparison, from the results of its finished runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fgl_app.experiments import (
    Experiment,
    Measure,
    Ordering,
    Results,
    accuracies,
    accuracy_by_seed,
    cumulative_upload,
    epsilon_of,
    mean_and_sd,
    seconds_of,
    settings_of,
)
from fgl_app.files import write_atomically
from fgl_app.intervals import Interval, of_mean
from fgl_app.reporting.comparison_figures import draw
from fgl_app.reporting.page import Page, Picture, Section, Table, render

_MEASURES: Mapping[Measure, str] = {
    "final_accuracy": "Test accuracy after the last round, %",
    "selected_accuracy": "Test accuracy after the round that validation chose, %",
    "paper_metric": "Test accuracy best of all rounds on the test set, as the papers report, %",
    "validation_accuracy": "Validation accuracy after the last round, %",
}


def write_tables(experiment: Experiment, results: Results, folder: Path) -> Path:
    """Write ``table.md``, ``results.csv``, figures and ``comparison.html`` of what is finished; return the first."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(experiment, results)
    sections = _sections(experiment, results)
    write_atomically(folder / "results.csv", _csv(experiment, results).encode())
    for name, content in pictures.items():
        write_atomically(folder / name, content)
    write_atomically(folder / "comparison.html", render(_page(experiment, sections, pictures)).encode())
    path = folder / "table.md"
    write_atomically(path, _markdown(experiment, sections, pictures).encode())
    return path


def _sections(experiment: Experiment, results: Results) -> list[tuple[str, Table]]:
    """Build the comparison's tables with their headings; accuracies are mean and standard deviation, in percent."""
    caption = _caption(experiment, results)
    head = ["", *experiment.columns]
    others = [measure for measure in _MEASURES if measure not in (experiment.measure, "validation_accuracy")]
    if experiment.measure == "validation_accuracy":
        others = []  # what is chosen by validation must not be seen with its test accuracy
    sections = []
    for measure in (experiment.measure, *others):
        rows = [
            [row.name, *(_cell(experiment, results, row.name, column, measure) for column in experiment.columns)]
            for row in experiment.rows
        ]
        sections.append((_MEASURES[measure], Table(caption, head, rows)))
    if (differences := _difference_table(experiment, results)) is not None:
        sections.append((f"Difference from {experiment.rows[0].name}, points", differences))
    if (by_domain := _domain_table(experiment, results, caption)) is not None:
        sections.append(("Test accuracy in each domain, %", by_domain))
    uploads = [
        [row.name, *(_megabytes(cumulative_upload(experiment, results, row.name, c)) for c in experiment.columns)]
        for row in experiment.rows
    ]
    sections.append(
        ("Uploaded by all clients together, MB", Table("Whole Flower messages, mean of runs.", head, uploads))
    )
    for part in ("prompts", "rounds"):
        if (epsilons := _epsilon_table(experiment, results, part)) is not None:
            sections.append((f"ε of the {part}", epsilons))
    if experiment.orderings:
        claims = [_ordering(experiment, results, ordering) for ordering in experiment.orderings]
        columns = ["claim", "above", "below", "difference, points", "margin", "holds"]
        sections.append(("Orderings", Table(_ORDERINGS, columns, claims, numbers=False)))
    return sections


def _markdown(experiment: Experiment, sections: Sequence[tuple[str, Table]], pictures: Mapping[str, bytes]) -> str:
    lines = [f"# {experiment.title}", ""] + ([experiment.about, ""] if experiment.about else [])
    for heading, table in sections:
        lines += [
            f"## {heading}",
            "",
            table.caption,
            "",
            f"| {' | '.join(table.head)} |",
            "|---" * len(table.head) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in table.rows] + [""]
    shown = [figure for figure in experiment.figures if f"{figure.name}.png" in pictures]
    lines += ["## Figures", ""] if shown else []
    lines += [f"![{figure.title}]({figure.name}.png)" for figure in shown]
    return "\n".join(lines).rstrip() + "\n"


def _page(experiment: Experiment, sections: Sequence[tuple[str, Table]], pictures: Mapping[str, bytes]) -> Page:
    figures = [
        Picture.of_svg(pictures[f"{figure.name}.svg"].decode(), figure.title, figure.title)
        for figure in experiment.figures
        if f"{figure.name}.svg" in pictures
    ]
    (first, *rest) = [Section(heading, tables=[table]) for heading, table in sections]
    facts = [
        ("Data set", str(settings_of(experiment.runs(Path("/"))[0]).card.title)),
        ("Clients", str(experiment.num_clients)),
        ("Seeds", ", ".join(map(str, experiment.seeds))),
    ]
    shared = [[key, str(value)] for key, value in experiment.shared.items()]
    own = [[row.name, _words(row.settings)] for row in experiment.rows if row.of is None]
    conditions = [[name, _words(condition)] for name, condition in experiment.columns.items()]
    return Page(
        title=experiment.title,
        notice="",
        facts=facts,
        sections=[
            Section("What is compared", [experiment.about] if experiment.about else []),
            first,
            Section("Figures", pictures=figures),
            *rest,
            Section(
                "Configuration",
                tables=[
                    Table("All runs", ["key", "value"], shared, numbers=False),
                    Table("Methods", ["row", "settings"], own, numbers=False),
                    Table("Conditions", ["column", "settings"], conditions, numbers=False),
                ],
                folded=True,
            ),
        ],
    )


def _words(settings: Mapping[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _megabytes(upload: float | None) -> str:
    return "—" if upload is None else f"{upload / 1e6:,.4g}"


def _cell(experiment: Experiment, results: Results, row: str, column: str, measure: Measure) -> str:
    values = accuracies(experiment, results, row, column, measure)
    if not values:
        return "—"
    missing = "" if len(values) == len(experiment.seeds) else f" ({len(values)} of {len(experiment.seeds)} seeds)"
    return _mean_and_sd(values) + missing


def _mean_and_sd(values: Sequence[float]) -> str:
    mean, sd = mean_and_sd(values)
    return f"{100 * mean:.1f} ± {100 * sd:.1f}"


def _domain_table(experiment: Experiment, results: Results, caption: str) -> Table | None:
    """Build the accuracies in each domain, over all images (micro) and as the mean of the domains (macro)."""
    rows: list[list[str]] = []
    domains: list[str] = []
    for column in experiment.columns:
        for row in experiment.rows:
            owner, own_column, server_round = experiment.cell(row.name, column)
            index = -1 if server_round is None else server_round - 1
            shown = [item["rounds"][index] for item in results.get((owner, own_column), [])]
            if not shown or "domain_accuracy" not in shown[0]:
                continue
            domains = list(shown[0]["domain_accuracy"])
            cells = [[float(line["domain_accuracy"][name]) for line in shown] for name in domains]
            cells += [[float(line[key]) for line in shown] for key in ("accuracy", "accuracy_macro")]
            rows.append([f"{row.name}, {column}", *map(_mean_and_sd, cells)])
    return Table(caption, ["", *domains, "micro", "macro"], rows) if rows else None


def _epsilon_table(experiment: Experiment, results: Results, part: str) -> Table | None:
    """Build the epsilons of the runs whose prompts, or rounds, have differential privacy; None without any."""
    rows = []
    for row in experiment.rows:
        found = [epsilon_of(experiment, results, row.name, column, part) for column in experiment.columns]
        if any(value is not None for value in found):
            rows.append([row.name, *("—" if value is None else f"{value:.2f}" for value in found)])
    caption = (
        "Of one image, or else of one client; each run's results.json names the relation, the adversary and delta."
    )
    return Table(caption, ["", *experiment.columns], rows) if rows else None


def _caption(experiment: Experiment, results: Results) -> str:
    """Say over how many seeds and images a mean is, and what differs between the seeds."""
    runs = [item for of_cell in results.values() for item in of_cell]
    key = "num_validation_images" if experiment.measure == "validation_accuracy" else "num_test_images"
    sizes = sorted({int(item[key]) for item in runs if item.get(key)})
    held_out = "validation" if experiment.measure == "validation_accuracy" else "test"
    images = f" {' or '.join(f'{size:,}' for size in sizes)} {held_out} images;" if sizes else ""
    if len(experiment.seeds) == 1:
        return f"One seed, {experiment.seeds[0]};{images} {experiment.num_clients} clients."
    chosen = [settings_of(run) for run in experiment.runs(Path("/")) if run.seed == experiment.seeds[0]]
    card = chosen[0].card
    parts = ["training", *(["validation"] if card.validation else []), *(["test"] if card.test else [])]
    varied = [f"the division of the images into {_listed(parts)}"] if len(parts) > 1 else []
    if any(settings.data.max_train_images for settings in chosen):
        varied.append("the choice of the training images")
    if any(settings.data.partition != "domain" for settings in chosen):
        varied.append("the partition over the clients")
    varied += ["the first weights", "the batches"]
    if any(settings.synthesizes for settings in chosen):
        varied.append("the noise of the synthetic images")
    fixed = ["the generator"] if any(settings.synthesizes for settings in chosen) else []
    fixed += [] if card.test else ["the test images"]
    seeds = ", ".join(map(str, experiment.seeds))
    same = f"; {' and '.join(fixed)} {'are' if fixed[-1].endswith('images') else 'is'} the same" if fixed else ""
    return (
        f"Mean ± standard deviation over seeds {seeds};{images} {experiment.num_clients} clients. The seed varies "
        f"{_listed(varied)}{same}."
    )


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


_ASSUMPTION = (
    "Differences are between runs of the same seed, which share test images, partition and first weights; in brackets "
    "Student's 95 % interval of their mean, which takes them for independent and about normal."
)
_ORDERINGS = (
    f"Claims about the first table. {_ASSUMPTION} A claim holds if the whole interval is above the margin, fails if it "
    "is below, and is open otherwise."
)


def _differences(
    experiment: Experiment, results: Results, larger: tuple[str, str], smaller: tuple[str, str]
) -> list[float]:
    """Return how far one cell is above another, for each seed that both have."""
    first, second = (accuracy_by_seed(experiment, results, *cell) for cell in (larger, smaller))
    return [first[seed] - second[seed] for seed in first if seed in second]


def _difference_table(experiment: Experiment, results: Results) -> Table | None:
    """Build the paired differences of all rows from the first; None for one row, one seed or another experiment."""
    reference, *others = (row.name for row in experiment.rows)
    if not others or len(experiment.seeds) < 2 or experiment.measure == "validation_accuracy":
        return None
    rows = []
    for name in others:
        cells = []
        for column in experiment.columns:
            found = _differences(experiment, results, (name, column), (reference, column))
            cells.append(_signed(of_mean(found)) if len(found) > 1 else "—")
        rows.append([name, *cells])
    return Table(f"{_ASSUMPTION} Of the first table.", ["", *experiment.columns], rows)


def _signed(found: Interval) -> str:
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _ordering(experiment: Experiment, results: Results, ordering: Ordering) -> list[str]:
    cells = [accuracies(experiment, results, *cell) for cell in (ordering.larger, ordering.smaller)]
    found = _differences(experiment, results, ordering.larger, ordering.smaller)
    if not found:
        return [ordering.name, "", "", "", "", "not run"]
    above, below = (mean_and_sd(values)[0] for values in cells)
    difference = of_mean(found) if len(found) > 1 else None
    return [
        ordering.name,
        f"{', '.join(ordering.larger)}: {100 * above:.1f}",
        f"{', '.join(ordering.smaller)}: {100 * below:.1f}",
        f"{100 * found[0]:+.1f}" if difference is None else _signed(difference),
        f"{100 * ordering.margin:g}",
        "one seed" if difference is None else _verdict(difference, ordering.margin),
    ]


def _verdict(found: Interval, margin: float) -> str:
    if found.low > margin:
        return "yes"
    return "**no**" if found.high <= margin else "open"


def _csv(experiment: Experiment, results: Results) -> str:
    """Build a line for each row, column and seed, also of rows that show an earlier round of another row's runs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ["final_accuracy", "selected_accuracy", "paper_metric", "one_shot_accuracy"]
    writer.writerow(
        ["row", "column", "seed", *fields, "validation_accuracy", "rounds", "upload_bytes", "seconds", "images_drawn"]
    )
    for row, column in ((row.name, column) for row in experiment.rows for column in experiment.columns):
        owner, own_column, server_round = experiment.cell(row, column)
        if own_column != column:  # one column's runs stand for all
            continue
        for item in results.get((owner, column), []):
            rounds = item["rounds"][:server_round]
            shown = dict(item) if server_round is None else dict.fromkeys(fields, rounds[-1]["accuracy"])
            shown["one_shot_accuracy"] = item["one_shot_accuracy"]
            writer.writerow(
                [row, column, item["seed"], *(shown[name] for name in fields),
                 rounds[-1]["validation_accuracy"], len(rounds), sum(line["upload_bytes"] for line in rounds),
                 sum(map(seconds_of, rounds)), (item["synthesis"] or {}).get("images", 0)]
            )  # fmt: skip
    return text.getvalue()
