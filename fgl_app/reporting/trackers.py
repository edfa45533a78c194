"""Send the metrics of a run to an experiment tracker as well: TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fgl_app.errors import ConfigError
from fgl_app.files import write_atomically
from fgl_app.settings import Settings, tracker_names


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of one round."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker:
    """Event files below ``tensorboard/`` of the run."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, server_round)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases; where it goes is said by that library's environment variables."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Start or resume the run of this name."""
        import wandb

        self._run: Any = wandb.init(
            project="federated-generative-learning", name=settings.run.run_name, id=_kept_id(folder, "wandb"),
            resume="allow", config=dict(settings.flat()), dir=str(folder),
            settings=wandb.Settings(console="off"),  # what a library prints is not sent away
        )  # fmt: skip
        _keep_id(folder, "wandb", self._run.id)

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at the round's number."""
        self._run.log(dict(metrics), step=server_round)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow; where it goes is said by that library's environment variables."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Start a run in the experiment of this application, or resume the one of an earlier start."""
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment("federated-generative-learning")
        earlier = _kept_id(folder, "mlflow")
        run = mlflow.start_run(run_id=earlier, run_name=settings.run.run_name)
        if earlier is None:  # a parameter that was logged cannot be changed
            mlflow.log_params(dict(settings.flat()))
            _keep_id(folder, "mlflow", run.info.run_id)

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at the round's number."""
        self._mlflow.log_metrics(dict(metrics), step=server_round)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


_TRACKERS: Mapping[str, tuple[str, Any]] = {
    "tensorboard": ("tensorboard", TensorBoardTracker),
    "wandb": ("wandb", WandbTracker),
    "mlflow": ("mlflow", MlflowTracker),
}


def _kept_id(folder: Path, tracker: str) -> str | None:
    """Return the tracker's own id of this run, which a second start of the run resumes; None at the first."""
    path = folder / f"{tracker}-run.txt"
    return path.read_text("utf-8") if path.exists() else None


def _keep_id(folder: Path, tracker: str, run_id: str) -> None:
    write_atomically(folder / f"{tracker}-run.txt", run_id.encode())


def open_trackers(settings: Settings, folder: Path | None) -> list[Tracker]:
    """Open the trackers that the run asks for.

    Args:
        settings: The run's settings.
        folder: The run's folder; None to check only that their packages are installed.

    Raises:
        ConfigError: If a package is not installed.
    """
    opened: list[Tracker] = []
    for name in tracker_names(settings.run.trackers):
        package, made = _TRACKERS[name]
        try:
            __import__(package)
        except ImportError:
            raise ConfigError(
                f"`trackers` {name} needs the package {package}, which is not installed here. Install it: "
                f"pip install {package}."
            ) from None
        if folder is not None:
            opened.append(made(settings, folder))
    return opened
