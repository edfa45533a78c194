"""The command ``fgl``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from fgl_app.errors import FGLError

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
) -> None:
    """Run the application on Flower's simulation engine and end with a non-zero code if the run failed."""
    from fgl_app.simulation import parse_overrides, simulate  # imports of seconds, which --help does not need

    simulate(parse_overrides(overrides or []), num_clients=clients, client_cpus=client_cpus, client_gpus=client_gpus)


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
    from fgl_app.comparison import compare

    folder = (output_dir or Path("~/fgl-runs") / f"{experiment.resolve().parent.name}-{experiment.stem}").expanduser()
    table = compare(
        experiment, folder.absolute(), data_dir=None if data_dir is None else data_dir.absolute(),
        jobs=jobs, client_cpus=client_cpus, client_gpus=client_gpus, say=typer.echo,
    )  # fmt: skip
    typer.echo(f"table and figures: {table}")


@cli.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, e.g. ~/fgl-runs/digits")],
) -> None:
    """Write one HTML page for each finished run, report.html in its folder, and print its path."""
    from fgl_app.reporting.report import write_report

    for run in runs:
        typer.echo(write_report(run))


def main() -> None:
    """Run the command line; errors of this application are one sentence on stderr and code 1."""
    # A terminated run stops its SuperLink and everything below it, as an interrupted one does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        cli()
    except FGLError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
