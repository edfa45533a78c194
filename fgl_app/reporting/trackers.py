"""Send the metrics of a run to an experiment tracker as well: TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fgl_app.errors import ConfigError
from fgl_app.files import write_atomically
from fgl_app.settings import Settings, tracker_names

_PROJECT = "federated-generative-learning"
_LOGGER = logging.getLogger("flwr.trackers")


class Tracker(Protocol):
    """Where metrics go."""

    @staticmethod
    def check() -> None:
        """Raise an error if metrics could not be sent; nothing is made."""

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of one round."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker:
    """Event files below ``tensorboard/`` of the run."""

    @staticmethod
    def check() -> None:
        """Do nothing: the files lie in the run's folder."""

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

    @staticmethod
    def check() -> None:
        """Check that there is a login, and ask the server whether it is valid."""
        import wandb

        if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
            return
        if not wandb.login(prompt=False):
            raise ConfigError(
                "`trackers` wandb needs a login, but there is none on this machine. Use `wandb login` or "
                "WANDB_API_KEY, or WANDB_MODE=offline, which keeps the metrics in the run's folder."
            )

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Start or resume the run of this name."""
        import wandb

        self._run: Any = wandb.init(
            project=_PROJECT, name=settings.run.run_name, id=_kept_id(folder, "wandb"),
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
    """A run of MLflow, where MLFLOW_TRACKING_URI says, or else in a database in the run's folder, ``mlflow.db``."""

    @staticmethod
    def check() -> None:
        """Ask the tracking server, or the database, that MLflow is told to use."""
        import mlflow

        if _is_mlflow_told_where():
            # MLflow itself would try for minutes, which a run is right to do and a check is not.
            with _unless_set(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="20"):
                mlflow.MlflowClient().search_experiments(max_results=1)

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Start a run in the experiment of this application, or resume the one of an earlier start."""
        import mlflow
        from mlflow.entities import Param

        own = None if _is_mlflow_told_where() else f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self._client: Any = mlflow.MlflowClient(own)
        earlier = _kept_id(folder, "mlflow")
        if earlier is not None:
            try:
                self._client.update_run(earlier, status="RUNNING")
            except mlflow.MlflowException:
                _LOGGER.warning("MLflow does not know the run of the earlier start any more; a new one is begun.")
                earlier = None
        if earlier is None:
            artifacts = None if own is None else (folder.absolute() / "mlruns").as_uri()
            run = self._client.create_run(self._experiment(artifacts), run_name=settings.run.run_name)
            earlier = str(run.info.run_id)
            parameters = [Param(key, str(value)) for key, value in settings.flat().items()]
            for start in range(0, len(parameters), _MLFLOW_BATCH):
                self._client.log_batch(earlier, params=parameters[start : start + _MLFLOW_BATCH])
            _keep_id(folder, "mlflow", earlier)
        self._run_id = earlier

    def _experiment(self, artifacts: str | None) -> str:
        """Return the identity of this application's experiment, which is made if there is none."""
        from mlflow import MlflowException

        found = self._client.get_experiment_by_name(_PROJECT)
        if found is None:
            try:
                return str(self._client.create_experiment(_PROJECT, artifact_location=artifacts))
            except MlflowException:  # another run has made it meanwhile
                found = self._client.get_experiment_by_name(_PROJECT)
        return str(found.experiment_id)

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at the round's number."""
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        rows = [Metric(name, float(value), now_ms, server_round) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id)


_MLFLOW_BATCH = 100
"""Parameters that MLflow takes at a time."""


def _is_mlflow_told_where() -> bool:
    import mlflow

    is_set: Any = mlflow.is_tracking_uri_set
    return bool(is_set())


@contextlib.contextmanager
def _unless_set(**variables: str) -> Iterator[None]:
    """Give values to those environment variables that have none, for as long as it is open."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class OpenedTracker:
    """A tracker whose failure ends no run: what counts is in the run's own files.

    At its first failure a sentence says so, and no more metrics are sent there, since a library may try for minutes.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        """Remember the tracker and its name for the sentence."""
        self._name = name
        self._tracker = tracker
        self._has_failed = False

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of one round, unless an earlier round failed."""
        if self._has_failed:
            return
        with self._said_once():
            self._tracker.log(server_round, metrics)

    def close(self) -> None:
        """Write what is left."""
        with self._said_once():
            self._tracker.close()

    @contextlib.contextmanager
    def _said_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each library has exceptions of its own; their texts may hold addresses and keys
            if not self._has_failed:
                _LOGGER.warning(
                    "The tracker %s has failed (%s); the run goes on without it, and its metrics are in its folder.",
                    self._name,
                    type(error).__name__,
                )
            self._has_failed = True


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


def open_trackers(settings: Settings, folder: Path | None) -> list[OpenedTracker]:
    """Open the trackers that the run asks for.

    Args:
        settings: The run's settings.
        folder: The run's folder; None to check only that they could be opened.

    Raises:
        ConfigError: If a package is not installed, or a tracker cannot be reached or used.
    """
    opened: list[OpenedTracker] = []
    for name in tracker_names(settings.run.trackers):
        package, made = _TRACKERS[name]
        try:
            __import__(package)
        except ImportError:
            raise ConfigError(
                f"`trackers` {name} needs the package {package}, which is not installed here. Install it: "
                f"pip install {package}."
            ) from None
        try:
            if folder is None:
                made.check()
            else:
                opened.append(OpenedTracker(name, made(settings, folder)))
        except ConfigError:
            raise
        except Exception as error:  # each library has exceptions of its own
            advice = " WANDB_MODE=offline keeps the metrics in the run's folder." if name == "wandb" else ""
            raise ConfigError(
                f"`trackers` {name} cannot be used: {' '.join(str(error).split())[:300]}. Mend that, or take {name} "
                f"off `trackers`.{advice}"
            ) from None
    return opened
