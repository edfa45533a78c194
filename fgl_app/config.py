"""The run configuration: flat, kebab-case keys of ``[tool.flwr.app.config]`` to frozen dataclasses, checked at once.

Defaults live in ``pyproject.toml`` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fgl_app.errors import ConfigError

RunConfigValue = bool | int | float | str
APP_FOLDER = Path(__file__).resolve().parent.parent

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class RunSettings:
    """What is run and where the results go."""

    method: Literal["fgl", "fedavg", "centralized"]
    """``fgl``: prompts, synthesis, pre-training, FedAvg; ``fedavg``: FedAvg from random weights; ``centralized``: all
    real data in one place."""
    run_name: str
    """Folder of the run below ``output-dir``; the same name resumes."""
    output_dir: str
    """Absolute path, or one that begins with ``~``."""
    seed: int
    """Seed of everything random."""
    num_clients: int
    """Clients that must be connected before the run begins."""
    num_server_rounds: int
    """Rounds as the paper counts them: 1 = one-shot, 5 = prompt round and 4 FedAvg rounds."""
    connect_timeout_s: float
    """Seconds to wait for the clients to connect."""
    round_timeout_s: float
    """Seconds to wait for the replies of one exchange; captioning is the longest."""
    device: str
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""


@dataclass(frozen=True)
class DataSettings:
    """The clients' data."""

    dataset: Literal["digits", "folder"]
    """``digits``: scikit-learn's digits, partitioned; ``folder``: each node's own images, from its node-config."""
    class_names: str
    """Class names, separated by commas, for ``folder``; empty for ``digits``."""
    image_size: int
    """Side of the classifier's input, px."""
    partition: Literal["iid", "dirichlet"]
    """How ``digits`` are divided over the clients."""
    dirichlet_beta: float
    """Concentration of the Dirichlet partition, > 0; small is skewed."""
    min_samples_per_client: int
    """The Dirichlet partition is drawn again until every client has this many images."""


@dataclass(frozen=True)
class PromptSettings:
    """What the clients tell the server about their images."""

    prompt_level: Literal["class", "instance"]
    """``class``: the classes held; ``instance``: a caption of every image."""
    class_prompt: str
    """Template with ``{class}``."""
    instance_prompt: str
    """Template with ``{class}`` and ``{caption}``."""
    captioner: str
    """``tiny`` (shipped), a hub id or a folder of a BLIP-2 model; a node's own ``captioner`` wins."""
    captioner_revision: str
    """Git revision of a hub id; empty for the newest."""
    captioning_batch_size: int
    """Images captioned at a time."""
    max_new_tokens: int
    """Longest caption, tokens."""


@dataclass(frozen=True)
class SynthesisSettings:
    """How the synthetic training set is drawn."""

    generator: str
    """``tiny`` (shipped), a hub id or a folder of a text-to-image pipeline."""
    generator_revision: str
    """Git revision of a hub id; empty for the newest."""
    images_per_class: int
    """Images drawn per class."""
    num_inference_steps: int
    """Denoising steps."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none."""
    negative_prompt: str
    """What the generator is steered away from; may be empty."""
    stored_size: int
    """Images larger than this are reduced to it before they are stored, px."""
    synthesis_batch_size: int
    """Images drawn at a time on a GPU; a CPU always draws 32, so that not even rounding depends on it."""


@dataclass(frozen=True)
class TrainingSettings:
    """The classifier and its optimisation, on the server and on the clients."""

    model: str
    """A torchvision classifier by name."""
    augmentation: Literal["none", "crop", "crop-flip"]
    """Random resized crop of 0.75 to 1 of the area, and a horizontal flip."""
    batch_size: int
    """Images per SGD step."""
    server_epochs: int
    """Epochs of pre-training on the synthetic set."""
    server_finetune_epochs: int
    """Epochs on the synthetic set after each aggregation; 0 for none."""
    server_learning_rate: float
    """SGD step size on the server."""
    server_schedule: Literal["constant", "cosine"]
    """Step size during the server's training: ``constant`` as in the paper, or falling to zero along a cosine."""
    local_epochs: int
    """Epochs of each client in each round."""
    learning_rate: float
    """SGD step size on the clients."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run was asked for."""

    run: RunSettings
    data: DataSettings
    prompts: PromptSettings
    synthesis: SynthesisSettings
    training: TrainingSettings

    def flat(self) -> dict[str, RunConfigValue]:
        """Return the settings as the user typed them: kebab-case keys, sections dissolved."""
        return {
            field.name.replace("_", "-"): getattr(section, field.name)
            for section in (self.run, self.data, self.prompts, self.synthesis, self.training)
            for field in dataclasses.fields(section)
        }


_SECTIONS = {
    "run": RunSettings,
    "data": DataSettings,
    "prompts": PromptSettings,
    "synthesis": SynthesisSettings,
    "training": TrainingSettings,
}

_AT_LEAST: dict[str, float] = {
    "seed": 0, "num-clients": 1, "num-server-rounds": 1, "image-size": 8, "min-samples-per-client": 1,
    "captioning-batch-size": 1, "max-new-tokens": 1, "images-per-class": 1, "num-inference-steps": 1,
    "guidance-scale": 0, "stored-size": 8, "synthesis-batch-size": 1, "batch-size": 2, "server-epochs": 1,
    "server-finetune-epochs": 0, "local-epochs": 1,
}  # fmt: skip
_POSITIVE = {
    "dirichlet-beta": "0.01 (extreme skew) to 100 (almost IID)",
    "connect-timeout-s": "120",
    "round-timeout-s": "3600",
    "server-learning-rate": "0.01",
    "learning-rate": "0.01",
}


def default_run_config() -> dict[str, RunConfigValue]:
    """Read the defaults from the application's ``pyproject.toml``."""
    try:
        project = tomllib.loads((APP_FOLDER / "pyproject.toml").read_text("utf-8"))
    except OSError:
        raise ConfigError(
            f"The application must lie beside its pyproject.toml, but {str(APP_FOLDER)!r} holds none. Install it from "
            "its repository with `pip install --editable .`."
        ) from None
    defaults: dict[str, RunConfigValue] = project["tool"]["flwr"]["app"]["config"]
    return defaults


def parse_run_config(run_config: Mapping[str, RunConfigValue]) -> Settings:
    """Check a complete run configuration and sort it into sections.

    Args:
        run_config: Every key with its value, as Flower hands it over: defaults overridden by the user's values.

    Raises:
        ConfigError: With one sentence that names the key as typed, what was found and a valid value.
    """
    hints = {
        field.name.replace("_", "-"): (section, typing.get_type_hints(cls)[field.name])
        for section, cls in _SECTIONS.items()
        for field in dataclasses.fields(cls)
    }
    for key in run_config:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known keys: {', '.join(sorted(hints))}."
            raise ConfigError(f"`{key}` is not a key of the run configuration. {hint}")
    values: dict[str, dict[str, RunConfigValue]] = {section: {} for section in _SECTIONS}
    for key, (section, hint_type) in hints.items():
        if key not in run_config:
            raise ConfigError(f"`{key}` is missing from the run configuration; pyproject.toml holds its default.")
        values[section][key.replace("-", "_")] = _typed(key, run_config[key], hint_type)
    settings = Settings(**{name: cls(**values[name]) for name, cls in _SECTIONS.items()})
    _check_ranges(settings)
    return settings


def _typed(key: str, value: RunConfigValue, hint: object) -> RunConfigValue:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"`{key}` must be one of {', '.join(choices)}, but is {value!r}.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", str: 'text, e.g. "tiny"'}
        raise ConfigError(f"`{key}` must be {names[typing.cast(type, hint)]}, but is {value!r}.")
    return value


def _check_ranges(settings: Settings) -> None:
    flat = settings.flat()
    for key, least in _AT_LEAST.items():
        if typing.cast(float, flat[key]) < least:
            raise ConfigError(f"`{key}` must be at least {least:g}, but is {flat[key]}. Use {max(least, 1):g} or more.")
    for key, example in _POSITIVE.items():
        if not 0 < typing.cast(float, flat[key]) < float("inf"):
            raise ConfigError(f"`{key}` must be > 0, but is {flat[key]:g}. Use {example}.")
    if not _RUN_NAME.fullmatch(settings.run.run_name):
        raise ConfigError(
            f"`run-name` must be letters, digits, dots, hyphens and underscores (at most 100, the first a letter or "
            f"digit), but is {settings.run.run_name!r}. Use for example digits-seed-1."
        )
    if not Path(settings.run.output_dir).expanduser().is_absolute():
        raise ConfigError(
            f"`output-dir` must be an absolute path, because Flower starts the server in a folder of its own, but is "
            f"{settings.run.output_dir!r}. Use for example ~/fgl-runs."
        )
    for key, value in flat.items():
        if isinstance(value, str) and ('"' in value or not value.isprintable()):
            raise ConfigError(f"`{key}` must be printable text without double quotes, but is {value!r}.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", settings.run.device):
        raise ConfigError(f"`device` must be auto, cpu, cuda or cuda:N, but is {settings.run.device!r}.")
    for key, marks in (("class-prompt", ("{class}",)), ("instance-prompt", ("{class}", "{caption}"))):
        for mark in marks:
            if mark not in str(flat[key]):
                raise ConfigError(f"`{key}` must contain {mark}, but is {flat[key]!r}. Use for example {marks[-1]!r}.")
    _check_dataset(settings)


def _check_dataset(settings: Settings) -> None:
    names = settings.data.class_names
    if settings.data.dataset == "digits":
        if names:
            raise ConfigError(f'`class-names` must be empty for dataset digits, but is {names!r}. Use "".')
        return
    listed = class_name_list(names)
    if len(listed) < 2 or len(set(listed)) < len(listed) or not all(listed):
        raise ConfigError(
            f"`class-names` must list at least two different classes for dataset folder, but is {names!r}. "
            'Use for example "cat,dog": the names of the folders.'
        )
    if settings.run.method == "centralized":
        raise ConfigError(
            '`method` must not be centralized for dataset folder, whose images never leave their nodes. Use "fedavg".'
        )


def class_name_list(names: str) -> list[str]:
    """Split the value of ``class-names``."""
    return [name.strip() for name in names.split(",")]


def check_model_source(key: str, value: str, revision: str, marker: str) -> None:
    """Check, before anything is computed, that a foundation model can be found.

    Args:
        key: ``generator`` or ``captioner``.
        value: ``tiny``, a folder, or a hub id.
        revision: Git revision of a hub id; empty for the newest.
        marker: File that every such model has: ``model_index.json`` or ``config.json``.

    Raises:
        ConfigError: If the value is none of these, the folder cannot be read or the hub does not have the id.
    """
    if value == "tiny":
        return
    folder = Path(value).expanduser()
    if folder.is_absolute():
        try:
            (folder / marker).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"`{key}` must be a folder that holds a readable {marker}, but {value!r} does not "
                f'({error.strerror}). Use "tiny" or a folder that save_pretrained wrote.'
            ) from None
        return
    if not _HUB_ID.fullmatch(value):
        raise ConfigError(
            f'`{key}` must be "tiny", an absolute folder or a hub id such as "owner/name", but is {value!r}.'
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(value, marker, revision=revision or None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"`{key}` must be a model that the hub or its local cache has, but {value!r} cannot be had "
            f'({type(error).__name__}). Use "tiny" or check the name, the revision, the network and the token.'
        ) from None
