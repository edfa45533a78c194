"""The command ``fgl``."""

from __future__ import annotations

import signal
import sys
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
    from fgl_app.simulation import simulate  # Flower's and PyTorch's imports take seconds; --help needs neither

    simulate(overrides or [], num_clients=clients, client_cpus=client_cpus, client_gpus=client_gpus)


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
