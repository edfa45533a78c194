"""The command ``fgl``."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from fgl_app.errors import FGLError, RunFolderError

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@cli.callback()
def describe() -> None:
    """Federated Generative Learning on Flower."""


@cli.command("run")
def run_command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Run configuration, e.g. dirichlet-beta=0.5")
    ] = None,
    clients: Annotated[int, typer.Option(help="Simulated clients.", min=1)] = 5,
    client_cpus: Annotated[int, typer.Option(help="CPU cores per simulated client.", min=1)] = 2,
    client_gpus: Annotated[float, typer.Option(help="Share of a GPU per simulated client.", min=0)] = 0.0,
    with_parent: Annotated[bool, typer.Option(help="End when the standard input is closed.", hidden=True)] = False,
) -> None:
    """Run the application on Flower's simulation engine and end with a non-zero code if the run failed."""
    if with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    from fgl_app.simulation import parse_overrides, simulate  # imports of seconds, which --help does not need

    with _resumable():
        simulate(
            parse_overrides(overrides or []), num_clients=clients, client_cpus=client_cpus, client_gpus=client_gpus
        )


@cli.command("check-data")
def check_data_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|CARD", help="Folder with one folder of images per class, or a card or its name."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Run configuration, e.g. image-size=224; dataset=folder for a SuperNode's card",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a contact sheet of the decoded pictures.")] = None,
) -> None:
    """Say what a client would read of its images, what it would leave out and why, and what it would send."""
    from fgl_app.data_check import check_data
    from fgl_app.simulation import parse_overrides

    check_data(source, parse_overrides(overrides or []), None if out is None else out.expanduser(), typer.echo)


@cli.command("compare")
def compare_command(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="E.g. examples/digits/table1.yaml")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Where runs, tables and figures go; by default ~/fgl-runs/EXPERIMENT.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data set lies, if it is not downloaded.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; they share the cores.", min=1)] = 1,
    client_cpus: Annotated[int, typer.Option(help="CPU cores per simulated client.", min=1)] = 2,
    client_gpus: Annotated[float, typer.Option(help="Share of a GPU per simulated client.", min=0)] = 0.0,
) -> None:
    """Run an experiment, methods x conditions x seeds, and write its table and figures; a second start goes on."""
    from fgl_app.experiment_reader import load_experiment

    load_experiment(experiment)  # a mistake in it is answered before imports of seconds
    from fgl_app.comparison import compare

    folder = (output_dir or Path("~/fgl-runs") / f"{experiment.resolve().parent.name}-{experiment.stem}").expanduser()
    with _resumable():
        table = compare(
            experiment, folder.absolute(), data_dir=None if data_dir is None else data_dir.absolute(),
            jobs=jobs, client_cpus=client_cpus, client_gpus=client_gpus, say=typer.echo,
        )  # fmt: skip
    typer.echo(f"table and figures: {table}")


@cli.command("report")
def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or comparisons, e.g. ~/fgl-runs/digits")
    ],
) -> None:
    """Write one HTML page for each finished run or comparison into its folder, and print its path."""
    from fgl_app.experiments import EXPERIMENT_FILE
    from fgl_app.reporting.earlier_start import require_finished

    comparisons = [folder for folder in folders if (folder.expanduser() / EXPERIMENT_FILE).exists()]
    for folder in folders:
        if folder not in comparisons:
            require_finished(folder)
    from fgl_app.comparison import report_comparison  # seconds, which a wrong path does not wait for
    from fgl_app.reporting.report import write_report

    for folder in folders:
        typer.echo(report_comparison(folder) if folder in comparisons else write_report(folder))


@cli.command("audit")
def audit_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, e.g. ~/fgl-runs/digits")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the data set lies, if not where the run found it.")
    ] = None,
    data_path: Annotated[
        list[Path] | None, typer.Option(help="Folder of a client, for runs on folders of their own; several times.")
    ] = None,
    backbone: Annotated[
        str,
        typer.Option(
            help="Features that are searched for replicas: pixels, classifier (the run's own), a classifier of "
            "torchvision, or a vision model of transformers by folder or hub id."
        ),
    ] = "pixels",
    shadow_models: Annotated[
        int, typer.Option(help="Shadow models of LiRA, an even number; 0 for none. Each costs a training.", min=0)
    ] = 0,
    table: Annotated[
        Path | None, typer.Option(help="Write the table of all runs, grouped by method over seeds, to this file.")
    ] = None,
) -> None:
    """Measure what finished runs give away: members, replicas, prompts. Writes audit/ in each; nothing is sent."""
    from fgl_app.reporting.earlier_start import require_finished

    for run in runs:
        require_finished(run)
    from fgl_app.audit.command import audit_run, check_runs, findings_of
    from fgl_app.audit.tables import comparison
    from fgl_app.files import write_atomically

    check_runs(runs, shadow_models)
    results = []
    for run in runs:
        results.append(
            audit_run(
                run, data_dir=data_dir, data_paths=data_path or [], backbone=backbone, shadow_models=shadow_models
            )
        )
        typer.echo(f"{run}:")
        for sentence in findings_of(results[-1].content):
            typer.echo(f"  {sentence}")
        typer.echo(f"  all of it: {run.expanduser() / 'audit' / 'audit.md'}")
    lines = comparison(results)
    if table is not None:
        write_atomically(table.expanduser(), "\n".join(lines).encode())
    elif len(runs) > 1:
        typer.echo("\n".join(lines))


@cli.command("audit-captions")
def audit_captions_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A client's captions or prompts, one a line.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder for audit.json and audit.md.")],
) -> None:
    """Say what one client's own captions reveal, at its side, before or after a run."""
    _require(file)
    from fgl_app.audit.command import audit_captions

    for sentence in audit_captions(file, target.expanduser()):
        typer.echo(sentence)
    typer.echo(f"all of it: {target / 'audit.md'}")


@cli.command("certificates")
def certificates_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that is absent or empty.")],
    host: Annotated[list[str], typer.Option(help="Name or IP address of the server; once for each.")],
    site: Annotated[list[str] | None, typer.Option(help="Name of a SuperNode; once for each.")] = None,
    days: Annotated[int, typer.Option(help="Validity of the certificates.", min=1, max=3650)] = 365,
) -> None:
    """Make a development CA, the server's certificate and a key pair per SuperNode; nothing is overwritten."""
    from fgl_app.certificates import make_certificates

    folder = folder.expanduser()
    make_certificates(folder, host, site or [], days)
    for part in ("ca", "server", *(site or [])):
        typer.echo(f"{folder / part}: " + ", ".join(sorted(file.name for file in (folder / part).iterdir())))


@cli.command("synthesize")
def synthesize_command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json of a run")],
    store: Annotated[Path | None, typer.Option(help="Folder of the store; by default that of PLAN's run.")] = None,
    workers: Annotated[int, typer.Option(help="Actors of Ray; 0 draws in this process.", min=0)] = 0,
    ray_address: Annotated[str, typer.Option(help="Cluster of Ray; empty for this machine.")] = "",
) -> None:
    """Draw what a store lacks of a plan, on any machine that shares the folder; a second start goes on."""
    _require(plan)
    from fgl_app.reporting.run_folder import store_of_run
    from fgl_app.synthesis.plan import Plan
    from fgl_app.synthesis.worker import work

    drawn = work(Plan.load(plan), store or store_of_run(plan.parent), workers, ray_address)
    typer.echo(f"{drawn:,} images drawn")


@cli.command("approve")
def approve_command(
    name: Annotated[
        str | None, typer.Argument(metavar="[PREVIEW]", help="Name of a preview; without it, a list.")
    ] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Never send these prompts.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without showing the prompts and asking.")] = False,
    show_log: Annotated[bool, typer.Option("--log", help="List all decisions that were made on this node.")] = False,
) -> None:
    """On a client: show what a run would send of one's prompts, and approve or reject exactly that."""
    from clients.approval import approvals_folder, decide, decisions, pending, read_preview

    folder = approvals_folder()
    if show_log:
        typer.echo("\n".join(decisions(folder)) or "nothing was decided yet")
        return
    if name is None:
        waiting = [read_preview(each, folder).summary() for each in pending(folder)]
        typer.echo("\n".join(waiting) or "nothing waits for approval")
        return
    preview = read_preview(name, folder)
    if not (yes or reject):
        typer.echo(f"run {preview.run}: class, images, prompt")
        for class_name, count, prompt in preview.rows:
            typer.echo(f"{class_name}\t{count}\t{prompt}")
        weights = (
            f" This node then also trains in the run's {preview.rounds} rounds, and sends its weights after each."
            if preview.rounds
            else ""
        )
        if not typer.confirm(f"Send these prompts to the server?{weights}"):
            typer.echo(f"nothing is sent or decided; `fgl approve {name} --reject` refuses it for good")
            return
    decide(name, folder, approve=not reject)
    over = "" if preview.waits else f" for the next start of the run: it stopped waiting at {preview.until}"
    typer.echo("rejected" if reject else f"approved{over}")


store_cli = typer.Typer(no_args_is_help=True, help="Look at stores of synthetic images, and hand them on.")
cli.add_typer(store_cli, name="store")


@store_cli.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a run or a store.")],
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged, for `fgl synthesize`.")] = False,
) -> None:
    """Check every file of a store against its checksum; code 1 if one is damaged and not repaired."""
    _require(folder)
    from fgl_app import store_inspection as inspection

    stores = inspection.stores_of(folder.expanduser())
    findings = [finding for store in stores for finding in inspection.verify(store)]
    for finding in findings:
        typer.echo(f"{finding.kind}: {finding.path}")
    if repair:
        typer.echo(f"{inspection.repair(findings)} files removed")
    elif any(finding.kind == "damaged" for finding in findings):
        raise typer.Exit(1)
    typer.echo(f"{sum(inspection.contents(store).num_images for store in stores):,} images are sound")


@store_cli.command("stats")
def stats_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a run or a store.")],
) -> None:
    """Say what a store holds."""
    _require(folder)
    from fgl_app import store_inspection as inspection

    for held in map(inspection.contents, inspection.stores_of(folder.expanduser())):
        typer.echo(
            f"settings {held.settings}, generator {held.generator}: {held.num_images:,} images of {held.size_px} px in "
            f"{held.num_units:,} units, {held.num_bytes:,} bytes, drawn in {held.seconds:,.0f} s, "
            f"{held.num_left_out} left out"
        )
        if held.batch_sizes:
            typer.echo(f"drawn at a time: {', '.join(map(str, held.batch_sizes))}")
        typer.echo("images by label: " + ", ".join(f"{label}: {count:,}" for label, count in held.per_label.items()))


@store_cli.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder that does not exist yet.")],
    form: Annotated[Literal["folder", "parquet", "webdataset"], typer.Option("--format", help="Form.")] = "folder",
) -> None:
    """Write the synthetic set of a run for other programs: class folders, Parquet, or WebDataset tar files."""
    from fgl_app.reporting.earlier_start import require_finished

    require_finished(run)
    from fgl_app.reporting.export import export
    from fgl_app.reporting.finished_run import read_run

    typer.echo(f"{export(read_run(run), form, target.expanduser()):,} images written to {target}")


def _end_with_parent() -> None:
    """End this process in good order when the one that started it is gone: its end of the pipe closes with it."""
    os.read(0, 1)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Answer Ctrl-C, when everything is stopped, with the command that goes on, and end with a shell's code for it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; what was finished is kept. Go on with: {shlex.join(['fgl', *sys.argv[1:]])}", err=True
        )
        raise typer.Exit(128 + signal.SIGINT) from None


def _require(path: Path) -> None:
    """Check that a path exists, before the libraries are imported that read it."""
    if not path.expanduser().exists():
        raise RunFolderError(f"There must be a file or folder {str(path)!r}, but there is none. Correct the path.")


def main() -> None:
    """Run the command line; errors of this application are one sentence on stderr and code 1."""
    from fgl_app.environment import use_own_packages, use_proxies

    # A terminated run stops its SuperLink and everything below it, as an interrupted one does.
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP, and `nohup` ignores it
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character ends no run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        use_own_packages()
        use_proxies()
        cli()
    except FGLError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
