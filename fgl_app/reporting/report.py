"""The page of one run, ``report.html`` in its folder: what was run, what came out, and what the clients gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fgl_app.errors import DataError, RunFolderError, SynthesisError
from fgl_app.files import write_atomically
from fgl_app.reporting import figures
from fgl_app.reporting.audit_section import audit_sections
from fgl_app.reporting.defences import defences_sections
from fgl_app.reporting.finished_run import FinishedRun, class_counts, held_out_images, read_run, synthetic_images
from fgl_app.reporting.guarantees import privacy_sections
from fgl_app.reporting.page import Page, Picture, Section, Table, render
from fgl_app.reporting.run_folder import forgotten_set

MAX_CLIENTS = 100
"""Bars in the figure of the partition."""
MAX_SHEET_CLASSES = 20
"""Rows of the contact sheet."""
IMAGES_PER_CLASS = 8
"""Images of each class on each half of the contact sheet."""
MAX_SHOWN_SIZE_PX = 64
"""Larger images are reduced to this side for the contact sheet, so that the page stays a few megabytes."""
PROMPTS_PER_CLASS = 5

_PHASES = {
    "prompts": "prompts: writing and sending them",
    "synthesis": "synthesis: drawing what the store lacks",
    "pretraining": "pre-training on the synthetic set",
    "finetuning": "fine-tuning on the synthetic set, a part of the rounds",
    "rounds": "rounds of training, with their evaluation",
    "total": "from the first exchange to the last",
}

_NOTICE = (
    "This page holds prompts. What clients say of their images is their data: the page is for the eyes of the run's "
    "owner only."
)


def write_report(path: Path) -> Path:
    """Write the page of a run into its folder, readable by the owner alone, because it may hold prompts.

    Args:
        path: Folder of a finished run.

    Returns:
        The page.

    Raises:
        RunFolderError: If the folder holds no finished run, or cannot be written.
    """
    run = read_run(path)
    page = run.path / "report.html"
    content = render(build_page(run)).encode()
    try:
        write_atomically(page, content, mode=0o600)
    except OSError as error:
        raise RunFolderError(
            f"{str(run.path)!r} must be a folder that can be written, but is not ({error.strerror}). Use a copy of it."
        ) from None
    return page


def build_page(run: FinishedRun) -> Page:
    """Put the page together; what cannot be shown is replaced by a sentence that says why."""
    results = run.results
    title = run.config.get("resolved", {}).get("data_set")
    return Page(
        title=f"Run {run.path.resolve().name}",
        notice=_NOTICE if run.prompts else "",
        facts=[
            ("Method", results["method"]),
            ("Data set", f"{results['dataset']}: {title}" if title else results["dataset"]),
            ("Clients", str(results["num_clients"])),
            ("Seed", str(results["seed"])),
            ("Final accuracy", _percent(results["final_accuracy"])),
            ("Accuracy of the round that validation selects", _percent(results["selected_accuracy"])),
            ("Best accuracy on the test", _percent(results["paper_metric"])),
        ],
        sections=[
            _summary(run),
            _accuracy(run),
            *_domains(run),
            *_clients(run),
            *_updates(run),
            _confusion(run),
            _partition(run),
            _images(run),
            _prompts(run),
            *audit_sections(run.path, run.class_names),
            *_failures(run),
            *privacy_sections(results.get("privacy")),
            *defences_sections((results.get("privacy") or {}).get("defences")),
            _costs(run),
            _configuration(run),
        ],
    )


def _summary(run: FinishedRun) -> Section:
    results, last = run.results, run.rounds[-1]["round"]
    rounds = "round 1, the only one," if last == 1 else f"the last of {last} rounds"
    text = [
        f"After {rounds} the classifier recognised {_percent(results['final_accuracy'])} of the test images: the final "
        "accuracy.",
        f"Round {results['selected_round']} did best on the validation images, which are not those of the test, and "
        f"reaches {_percent(results['selected_accuracy'])} on the test. This is the fair number where the best round "
        "may be chosen.",
        f"The best accuracy of any round on the test is {_percent(results['paper_metric'])}. Papers report this "
        "number, but it chooses the round by the test images themselves and is therefore too optimistic.",
    ]
    if results["one_shot_accuracy"] is not None:
        text.append(
            f"After round 1, when no client had trained yet (one-shot), the accuracy on the test was "
            f"{_percent(results['one_shot_accuracy'])}."
        )
    return Section("Summary", text)


def _accuracy(run: FinishedRun) -> Section:
    accuracy = {
        "test": [(row["round"], 100 * row["accuracy"]) for row in run.rounds],
        "validation": [(row["round"], 100 * row["validation_accuracy"]) for row in run.rounds],
    }
    loss = {"test": [(row["round"], row["loss"]) for row in run.rounds]}
    return Section(
        "Accuracy and loss",
        pictures=[
            _lines(accuracy, "accuracy, %", "Accuracy after each round, on the held-out images."),
            _lines(loss, "loss, nats", "Mean cross-entropy after each round, on the test images."),
        ],
    )


def _domains(run: FinishedRun) -> list[Section]:
    rows = [row for row in run.rounds if row.get("domain_accuracy")]
    if not rows:
        return []
    names = list(rows[0]["domain_accuracy"])
    cells = [
        [str(row["round"]), *map(_percent, (row["domain_accuracy"][name] for name in names)),
         _percent(row["accuracy_macro"])]
        for row in rows
    ]  # fmt: skip
    caption = "Test accuracy after each round; the mean weights every domain alike."
    return [Section("Accuracy by domain", tables=[Table(caption, ["Round", *names, "Mean of the domains"], cells)])]


def _clients(run: FinishedRun) -> list[Section]:
    rows = [row for row in run.rounds if row.get("client_accuracy")]
    if not rows:
        return []
    shown = rows[:1] + rows[1:][-1:]
    names = sorted({name for row in shown for name in row["client_accuracy"]}, key=lambda name: (len(name), name))
    cells = [
        [name, *(_percent(row["client_accuracy"][name]) if name in row["client_accuracy"] else "" for row in shown)]
        for name in names[:MAX_CLIENTS]
    ]
    text = [f"The first {MAX_CLIENTS} of {len(names)} clients are shown."] if len(names) > MAX_CLIENTS else []
    caption = "Accuracy on test images that each client holds out of its own folder; all rounds are in results.json."
    columns = ["Client", *(f"After round {row['round']}" for row in shown)]
    return [Section("Accuracy by client", text, tables=[Table(caption, columns, cells)])]


def _updates(run: FinishedRun) -> list[Section]:
    pictures = []
    for key, name, label, caption in (
        (
            "gradient_diversity",
            "gradient diversity",
            "gradient diversity, no unit",
            "Sum of the squared lengths of the clients' updates over the squared length of their sum (Yin et al. "
            "2018): 1/M if all M clients agree, 1 if their updates are orthogonal, more if they oppose each other.",
        ),
        (
            "client_drift",
            "client drift",
            "client drift, norm of weights",
            "Root of the mean squared distance (L2) of the clients' weights from their mean.",
        ),
    ):
        points = [(row["round"], row[key]) for row in run.rounds if key in row]
        if points:
            pictures.append(_lines({name: points}, label, caption))
    return [Section("How much the clients' updates differ", pictures=pictures)] if pictures else []


def _lines(series: Mapping[str, Sequence[tuple[float, float]]], y_label: str, caption: str) -> Picture:
    svg = figures.to_svg(figures.line_chart(series, x_label="round", y_label=y_label))
    return Picture.of_svg(svg, f"{y_label} against rounds", caption)


def _confusion(run: FinishedRun) -> Section:
    heading = "Confusion matrix"
    if run.confusion is None:
        return Section(heading, ["There is none: the clients evaluate on images of their own and send averages."])
    svg = figures.to_svg(figures.confusion_chart(run.confusion["confusion"], run.confusion["class_names"]))
    caption = f"Test images by their true and their predicted class, after round {run.confusion['round']}."
    return Section(heading, pictures=[Picture.of_svg(svg, "Confusion matrix", caption)])


def _partition(run: FinishedRun) -> Section:
    heading = "Training images of the clients"
    try:
        counts = class_counts(run, MAX_CLIENTS)
    except DataError as error:
        return Section(heading, [str(error)])
    num_clients, flat = run.results["num_clients"], run.config["run_config"]
    text = [f"The first {MAX_CLIENTS} of {num_clients} clients are shown."] if num_clients > MAX_CLIENTS else []
    beta = f", β = {flat['dirichlet-beta']:g}" if flat["partition"] == "dirichlet" else ""
    caption = f"Training images of each class on each client; partition: {flat['partition']}{beta}."
    svg = figures.to_svg(figures.partition_chart(counts, run.class_names))
    return Section(heading, text, [Picture.of_svg(svg, "Stacked bars: images of each class by client", caption)])


def _images(run: FinishedRun) -> Section:
    heading = "Real and synthetic images"
    if not run.synthesizes:
        return Section(heading, ["The run drew no images."])
    names = run.class_names[:MAX_SHEET_CLASSES]
    text = []
    if len(names) < len(run.class_names):
        text.append(f"The first {len(names)} of {len(run.class_names)} classes are shown.")
    try:
        synthetic = synthetic_images(run, len(names), IMAGES_PER_CLASS, MAX_SHOWN_SIZE_PX)
    except SynthesisError as error:
        return Section(heading, [f"The synthetic images cannot be shown. {error}"])
    panels = {"synthetic": synthetic}
    caption = "Synthetic images, drawn from the prompts."
    try:
        panels = {"real, held out for validation": held_out_images(run, synthetic.images.shape[-1]), **panels}
    except DataError as error:
        text.append(f"Synthetic images only. {error}")
    else:
        caption = (
            "Left: images held out for validation, on which no client trains; the clients' private training images "
            "are not on this page. Right: synthetic images, drawn from the prompts."
        )
    png = figures.to_png(figures.contact_sheet(panels, names, IMAGES_PER_CLASS))
    return Section(heading, text, [Picture.of_png(png, "Contact sheet, one row for each class", caption)])


def _prompts(run: FinishedRun) -> Section:
    heading = "Most frequent prompts"
    if forgotten_set(run.path) is not None:
        return Section(heading, ["The prompts were deleted when the images had been drawn."])
    if not run.prompts:
        return Section(heading, ["The method has no prompts."])
    if run.config["run_config"].get("prompt-level") == "embedding":
        return Section(heading, [f"The clients sent {len(run.prompts):,} embeddings, which have no text."])
    rows = []
    for label, of_class in groupby(sorted(run.prompts), key=lambda item: item.label):
        frequent = sorted(of_class, key=lambda item: -item.count)[:PROMPTS_PER_CLASS]
        rows += [[run.class_names[label], item.prompt, item.domain, f"{item.count:,}"] for item in frequent]
    head = ["Class", "Prompt", "Domain", "Images"]
    if not any(row[2] for row in rows):
        head, rows = [head[0], head[1], head[3]], [[row[0], row[1], row[3]] for row in rows]
    caption = (
        f"Up to {PROMPTS_PER_CLASS} prompts of each class, of {len(run.prompts):,} in all, with the number of images "
        "that each stands for."
    )
    return Section(heading, tables=[Table(caption, head, rows, numbers=False)])


def _failures(run: FinishedRun) -> list[Section]:
    """Who was missed, and what was not used; empty if nothing was."""
    exchange = run.results.get("prompt_round") or {}
    refused = [("prompts", item) for item in exchange.get("refused", [])]
    refused += [(f"round {row['round']}", item) for row in run.rounds for item in row.get("refused", [])]
    unreadable: dict[str, int] = {}
    for found in (exchange, *run.rounds):  # a client says the same in every exchange
        unreadable |= found.get("unreadable_images", {})
    text = [f"Client {client} could not read {count:,} of its images." for client, count in unreadable.items()]
    for kind, sentence in (
        ("late", "came late with their prompts, which were merged"),
        ("missed", "did not send prompts in time"),
    ):
        if named := exchange.get(kind):
            text.append(f"Clients {', '.join(map(str, named))} {sentence}.")
    rows = [
        [exchange, _sender(item), item["reason"], f"{item['count']:,}"]
        for exchange, item in refused
    ]  # fmt: skip
    tables = [Table("What was not used.", ["Exchange", "Client", "Reason", "Number"], rows)] if rows else []
    return [Section("Failures", text, tables=tables)] if text or rows else []


def _sender(refused: Mapping[str, Any]) -> str:
    if refused["client"] is not None:
        return str(refused["client"])
    return "not named" if refused["node"] is None else f"node {refused['node']}"


def _costs(run: FinishedRun) -> Section:
    upload, synthesis = run.results["upload_bytes"], run.results["synthesis"]
    prompts = upload["prompts_per_client"] or {}
    sizes = [
        ("prompts of one client, packed (the largest)", prompts.get("payload")),
        ("prompts of one client, as a whole message (the largest)", prompts.get("message")),
        ("prompts of all clients", prompts.get("all_messages")),
        ("weights of one client in one round (mean)", upload["model_per_client_per_round"]),
        ("all that all clients uploaded", upload["total"]),
    ]
    rounds = [
        [str(row["round"]), row["phase"], str(row.get("clients", "")), _bytes(row["upload_bytes"]),
         f"{row['seconds']:,.1f}" if "seconds" in row else ""]
        for row in run.rounds
    ]  # fmt: skip
    text = [
        f"The synthetic set has {synthesis['images']:,} images: {synthesis['generated']:,} drawn at "
        f"{synthesis['images_per_second']:g} images/s, {synthesis['reused']:,} reused from the store."
    ] if synthesis is not None else []  # fmt: skip
    return Section(
        "Bytes and seconds",
        text,
        tables=[
            Table(
                "Bytes uploaded, counted on serialized messages.",
                ["What", "Size"],
                [[name, _bytes(value)] for name, value in sizes if value is not None],
            ),
            Table(
                "Wall-clock time of the phases, all starts of the run that ended with results together.",
                ["Phase", "Seconds"],
                [[_PHASES.get(name, name), f"{value:,.1f}"] for name, value in run.results["seconds"].items()],
            ),
            Table("Rounds.", ["Round", "Phase", "Clients that sent weights", "Uploaded", "Seconds"], rounds),
        ],
    )


def _configuration(run: FinishedRun) -> Section:
    captions = {
        "run_config": "Settings, as they are typed.",
        "resolved": "What they came to on the machine of the run.",
        "versions": "Versions.",
        "seeds": "Seeds.",
    }
    tables = [
        Table(caption, ["Key", "Value"], [[key, str(value)] for key, value in content.items()], numbers=False)
        for name, caption in captions.items()
        if (content := run.config.get(name))
    ]
    return Section("Configuration", tables=tables, folded=True)


def _percent(share: Any) -> str:
    return f"{100 * float(share):.2f} %"


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
