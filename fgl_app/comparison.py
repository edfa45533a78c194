"""Run an experiment and draw its table and figures: ``fgl compare EXPERIMENT.yaml``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fgl_app.config import default_run_config
from fgl_app.environment import child_environment
from fgl_app.errors import ConfigError, FGLError
from fgl_app.experiment_reader import load_experiment, read_experiment
from fgl_app.experiments import EXPERIMENT_FILE, Results, Run, settings_of
from fgl_app.files import write_atomically
from fgl_app.phases import resolve
from fgl_app.reporting.comparison_tables import write_tables
from fgl_app.reporting.earlier_start import is_other_listing
from fgl_app.reporting.folder_lock import held
from fgl_app.reporting.run_folder import IDENTITIES
from fgl_app.resources import check_client_resources, machine_resources
from fgl_app.user_files import write_yaml


def compare(
    path: Path,
    folder: Path,
    *,
    data_dir: Path | None,
    jobs: int,
    client_cpus: int,
    client_gpus: float,
    say: Callable[[str], None],
) -> Path:
    """Do what is left of an experiment's runs and write its tables and figures.

    Args:
        path: The experiment.
        folder: Where runs, images, tables and figures go; what is finished there is not done again.
        data_dir: Where the data set lies; None to let its library find or download it.
        jobs: Runs at a time; with more than one, each gets its share of the cores as threads, and its numbers then
            differ in rounding from those of a run alone.
        client_cpus: CPU cores per simulated client.
        client_gpus: Share of a GPU per client.
        say: Called with a line of progress for each run.

    Returns:
        The Markdown file with the tables.

    Raises:
        ConfigError: If the experiment is wrong, or the folder holds runs of the same name with other settings.
        RunFolderError: If another process does the same experiment in the folder.
        FGLError: If runs failed, when all others are done; it names them and their logs. Finished runs are kept.
    """
    check_client_resources(client_cpus, client_gpus, *machine_resources())
    experiment = load_experiment(path)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, "use another --output-dir"):
        runs = experiment.runs(folder, data_dir)
        finished = {run.name: _results(folder, run) for run in runs}
        write_atomically(folder / EXPERIMENT_FILE, write_yaml(read_experiment(path)).encode())
        left = [run for run in runs if finished[run.name] is None]
        say(f"{experiment.title}: {len(runs)} runs, {len(runs) - len(left)} finished, {len(left)} to do, in {folder}")
        options = ["--clients", str(experiment.num_clients), "--client-cpus", str(client_cpus)]
        options += ["--client-gpus", str(client_gpus)]
        started, failed = time.monotonic(), []
        for number, (run, seconds) in enumerate(_run_all(left, folder / "runs", options, jobs), 1):
            finished[run.name] = results = _results(folder, run)
            if results is None:
                failed.append(run.name)
            by_validation = experiment.measure == "validation_accuracy"
            last = {} if results is None else results["rounds"][-1]
            accuracy = last.get("validation_accuracy" if by_validation else "accuracy", 0.0)
            outcome = "failed" if results is None else f"{100 * float(accuracy):.1f} %"
            rest = (time.monotonic() - started) / number * (len(left) - number)
            say(
                f"{number}/{len(left)} {run.row}, {run.column}, seed {run.seed}: {outcome} in {seconds:.0f} s; "
                f"about {rest / 60:.0f} min left"
            )
            write_tables(experiment, _by_cell(runs, finished), folder)
        if failed:
            raise FGLError(
                f"All runs must end with results, but {len(failed)} of {len(left)} failed: {', '.join(failed[:3])}"
                f"{' and others' if len(failed) > 3 else ''}. Their logs are {str(folder / 'runs')!r}/*.log; start "
                "`fgl compare` again to go on."
            )
        return write_tables(experiment, _by_cell(runs, finished), folder)


def report_comparison(folder: Path) -> Path:
    """Write tables, figures and page of a comparison's finished runs anew.

    Args:
        folder: Where ``fgl compare`` put them.

    Returns:
        The page.

    Raises:
        ConfigError: If the folder holds no experiment, or runs of another one.
    """
    folder = folder.expanduser().absolute()
    experiment = load_experiment(folder / EXPERIMENT_FILE)
    runs = experiment.runs(folder)
    write_tables(experiment, _by_cell(runs, {run.name: _results(folder, run) for run in runs}), folder)
    return folder / "comparison.html"


def typed(value: object) -> str:
    """Write a value of the run configuration as it is typed: truth in lower case."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _run_all(runs: Sequence[Run], folder: Path, options: Sequence[str], jobs: int) -> Iterator[tuple[Run, float]]:
    """Do runs as processes ``fgl run``, ``jobs`` at a time; yield each with its seconds when it ends, or fails."""
    waiting, active = list(runs), dict[str, tuple[Run, subprocess.Popen[bytes], float]]()
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or active:
            unfinished = {*active, *(run.name for run in waiting)}
            for run in [run for run in waiting if run.after not in unfinished][: jobs - len(active)]:
                waiting.remove(run)
                words = [f"{key}={typed(value)}" for key, value in run.overrides.items() if key != "num-clients"]
                command = [sys.executable, "-m", "fgl_app.cli", "run", "--with-parent", *options, "--", *words]
                environment = child_environment(str(run.overrides.get("ray-address", "")), **threads)
                with (folder / f"{run.name}.log").open("wb") as log_file:
                    process = subprocess.Popen(
                        command, env=environment, stdin=subprocess.PIPE, stdout=log_file, stderr=log_file
                    )
                active[run.name] = run, process, time.monotonic()
            for name, (run, process, began) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[name]
                process.communicate()
                yield run, time.monotonic() - began
            time.sleep(0.2)
    finally:
        for _, process, _ in active.values():
            process.terminate()  # it stops what it started
        for _, process, _ in active.values():
            process.communicate()


def _by_cell(runs: Sequence[Run], finished: Mapping[str, Mapping[str, Any] | None]) -> Results:
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        results = finished[run.name]
        if results is not None:
            cells[run.row, run.column].append(results)
    return cells


def _results(folder: Path, run: Run) -> dict[str, Any] | None:
    """Return the results of a finished run; None if it is not finished.

    Raises:
        ConfigError: If the run was made with other settings.
    """
    place = folder / "runs" / run.name
    settings = settings_of(run)
    try:
        results: dict[str, Any] = json.loads((place / "results.json").read_text("utf-8"))
        written = json.loads((place / "config.json").read_text("utf-8"))
        earlier, resolved = default_run_config() | written["run_config"], written["resolved"]
    except (OSError, ValueError, KeyError):
        return None
    free = {"output-dir", "store-dir", "data-dir"}
    changed = [key for key, value in settings.flat().items() if key not in free and earlier.get(key) != value]
    now = resolve(settings)
    if resolved.get("division") != now.get("division"):
        raise ConfigError(
            f"{str(place)!r} was run by a version that held out the same test images for every seed; this version "
            "divides the images by `seed`, and one table must not mix the two. Use another --output-dir."
        )
    if is_other_listing(resolved, now):
        raise ConfigError(
            f"{str(place)!r} was run on other image files than there are now, which are divided otherwise, and one "
            "table must not mix the two. Put the files back, or use another --output-dir."
        )
    changed += [key for key in IDENTITIES if resolved.get(key) != now.get(key)]
    earlier |= resolved
    if changed:
        raise ConfigError(
            f"{str(place)!r} must be a run of this experiment, but its `{changed[0]}` was {earlier.get(changed[0])!r}. "
            "Use another --output-dir or delete that run."
        )
    return results if len(results["rounds"]) == settings.run.num_server_rounds else None
