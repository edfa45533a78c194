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

from fgl_app.cards import Card, PromptForm, folder_card, load_card
from fgl_app.errors import ConfigError

RunConfigValue = bool | int | float | str
TRACKERS = ("tensorboard", "wandb", "mlflow")
APP_FOLDER = Path(__file__).resolve().parent.parent

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunSettings:
    """What is run and where the results go."""

    method: Literal["fgl", "gpt-fl", "fedavg", "centralized"]
    """``fgl``: prompts, synthesis, pre-training, rounds; ``gpt-fl``: the same with prompts written on the server;
    ``fedavg``: rounds only; ``centralized``: all real data in one place."""
    run_name: str
    """Folder of the run below ``output-dir``; the same name resumes."""
    output_dir: str
    """Absolute path, or one that begins with ``~``."""
    store_dir: str
    """Folder of the synthetic images; empty for ``synthetic/`` of the run. Runs with equal prompts and synthesis
    settings that share one draw their images once."""
    trackers: str
    """Where metrics go besides the run folder: ``tensorboard``, ``wandb``, ``mlflow``, separated by commas."""
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

    dataset: str
    """A shipped card, the absolute path of a card, or ``folder``: each node's own images, from its node-config."""
    data_dir: str
    """Absolute folder where the card's data lie; empty for the library's download into the cache."""
    class_names: str
    """Class names, separated by commas, for ``folder``; empty there for the union of the clients' own."""
    image_size: int
    """Side of the classifier's input, px; 0 for the card's."""
    max_train_images: int
    """Use this many training images of all clients together, a fixed choice; 0 for all."""
    partition: Literal["iid", "dirichlet", "pathological", "shards", "domain"]
    """How the training images are divided over the clients; ``domain``: one domain each."""
    dirichlet_beta: float
    """Concentration of the Dirichlet partition, > 0; small is skewed."""
    classes_per_client: int
    """Classes of each client in the pathological partition."""
    shards_per_client: int
    """Shards of each client, of images sorted by class, in the partition by shards."""
    min_samples_per_client: int
    """A random partition is drawn again until every client has this many images; 0 for no such rule."""


@dataclass(frozen=True)
class PromptSettings:
    """What the generator is asked for, and who says it."""

    prompt_source: Literal["auto", "clients", "server"]
    """``clients``: from their images; ``server``: from class names alone; ``auto``: as the method says."""
    prompt_level: Literal["class", "instance", "embedding"]
    """``class``: the classes held; ``instance``: a caption of every image; ``embedding``: captions as the generator's
    text encoder sees them."""
    num_prompts_per_class: int
    """Templates per class and domain (class level), or prompts that the server writes per class."""
    class_prompt: str
    """Template with ``{class}``; ``card`` for the card's."""
    instance_prompt: str
    """Template with ``{class}`` and ``{caption}``; ``card`` for the card's."""
    captioner: str
    """``tiny`` (shipped), a hub id or a folder of an image-to-text model; a node's own ``captioner`` wins."""
    captioner_revision: str
    """Git revision of a hub id; empty for the newest."""
    captioner_dtype: Literal["auto", "float32", "bfloat16", "float16", "4bit"]
    """Arithmetic of the captioner; ``auto``: bfloat16 on a GPU, float32 on a CPU; ``4bit`` needs bitsandbytes or
    torchao."""
    captioning_batch_size: int
    """Images captioned at a time."""
    max_new_tokens: int
    """Longest caption, or prompt of the prompt writer, tokens."""
    prompt_writer: str
    """Who writes the server's prompts: ``templates`` of the card, or a causal language model by hub id or folder."""
    prompt_writer_revision: str
    """Git revision of a hub id; empty for the newest."""
    embedding_summary: Literal["none", "mean", "clusters"]
    """What a client sends of its embeddings: each, one mean per class, or centres of clusters per class."""
    embedding_clusters: int
    """Centres per class."""
    embedding_clip: float
    """Largest norm of one embedding; 0 for no clipping."""
    embedding_epsilon: float
    """Epsilon of the Gaussian mechanism on embeddings; 0 for no noise."""
    embedding_delta: float
    """Delta of the Gaussian mechanism."""


@dataclass(frozen=True)
class SynthesisSettings:
    """How the synthetic training set is drawn."""

    generator: str
    """``tiny`` (shipped), a hub id or a folder of a text-to-image pipeline."""
    generator_revision: str
    """Git revision of a hub id; empty for the newest."""
    images_per_class: int
    """Images drawn per class."""
    prompt_budget: Literal["proportional", "uniform"]
    """How the images of a class are spread over its prompts: by the prompts' counts, or evenly."""
    scheduler: Literal["card", "own", "ddim", "pndm", "dpm-solver++", "unipc", "euler"]
    """Solver of the denoising; ``own``: the pipeline's; ``card``: the card's."""
    num_inference_steps: int
    """Denoising steps; 0 for the card's."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none, -1 the card's."""
    negative_prompt: str
    """What the generator is steered away from; may be empty; ``card`` for the card's, by domain."""
    generation_size: int
    """Side at which images are drawn, px; 0 for the card's, or else the pipeline's own."""
    stored_size: int
    """Images larger than this are reduced to it before they are stored, px."""
    synthesis_batch_size: int
    """Images drawn at a time on a GPU; a CPU always draws 32, so that not even rounding depends on it."""


@dataclass(frozen=True)
class TrainingSettings:
    """The classifier, its optimisation on the server and on the clients, and the aggregation."""

    model: str
    """A torchvision classifier by name, or ``cnn``, McMahan's two convolutions."""
    initial_weights: str
    """``random``, ``imagenet`` (torchvision's), or the absolute path of a run's checkpoint."""
    strategy: str
    """A strategy of Flower by the name of its class."""
    strategy_options: str
    """Its parameters, e.g. ``eta=0.1 tau=0.01``."""
    weighting: Literal["examples", "uniform"]
    """Weights of the mean: the clients' numbers of images, or equal ones (FGL, Eq. 4)."""
    fraction_train: float
    """Share of the clients that train in each round, drawn anew each time."""
    augmentation: Literal["card", "none", "crop", "crop-flip"]
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
    """Everything that a run was asked for, with the card's values where it left them to the card."""

    run: RunSettings
    data: DataSettings
    prompts: PromptSettings
    synthesis: SynthesisSettings
    training: TrainingSettings
    card: Card

    def flat(self) -> dict[str, RunConfigValue]:
        """Return the settings as the user would type them: kebab-case keys, sections dissolved."""
        return {
            field.name.replace("_", "-"): getattr(getattr(self, name), field.name)
            for name, section in _SECTIONS.items()
            for field in dataclasses.fields(section)
        }

    @property
    def prompts_from_server(self) -> bool:
        """Whether the server writes the prompts itself (GPT-FL)."""
        return self.run.method == "gpt-fl" or self.prompts.prompt_source == "server"

    @property
    def synthesizes(self) -> bool:
        """Whether the method draws a synthetic set."""
        return self.run.method in ("fgl", "gpt-fl")

    @property
    def own_folders(self) -> bool:
        """Whether each node holds images of its own, so that the server has none to evaluate on."""
        return self.data.dataset == "folder"

    def prompt_form(self, domain: str | None = None) -> PromptForm:
        """Return how prompts of a domain are written: the card's form, overridden by the run configuration."""
        form = self.card.form_of(domain)
        if self.prompts.class_prompt != "card":
            form = dataclasses.replace(form, class_templates=(self.prompts.class_prompt,))
        if self.prompts.instance_prompt != "card":
            form = dataclasses.replace(form, instance_template=self.prompts.instance_prompt)
        if self.synthesis.negative_prompt != "card":
            form = dataclasses.replace(form, negative=self.synthesis.negative_prompt)
        return form


_SECTIONS = {
    "run": RunSettings,
    "data": DataSettings,
    "prompts": PromptSettings,
    "synthesis": SynthesisSettings,
    "training": TrainingSettings,
}

_FROM_CARD: dict[str, tuple[RunConfigValue, RunConfigValue]] = {
    "image-size": (0, 224),
    "augmentation": ("card", "crop-flip"),
    "num-inference-steps": (0, 50),
    "guidance-scale": (-1.0, 2.0),
    "scheduler": ("card", "own"),
    "generation-size": (0, 0),
}
"""Keys with the value that leaves them to the card, and the value where the card is silent, too."""

_AT_LEAST: dict[str, float] = {
    "seed": 0, "num-clients": 1, "num-server-rounds": 1, "image-size": 8, "max-train-images": 0,
    "classes-per-client": 1, "shards-per-client": 1, "min-samples-per-client": 0, "num-prompts-per-class": 1,
    "captioning-batch-size": 1, "max-new-tokens": 1, "embedding-clusters": 1, "embedding-clip": 0,
    "embedding-epsilon": 0, "images-per-class": 1, "num-inference-steps": 1, "guidance-scale": 0,
    "generation-size": 0, "stored-size": 8, "synthesis-batch-size": 1, "batch-size": 2, "server-epochs": 1,
    "server-finetune-epochs": 0, "local-epochs": 1,
}  # fmt: skip
_POSITIVE = {
    "dirichlet-beta": "0.01 (extreme skew) to 100 (almost IID)",
    "connect-timeout-s": "120",
    "round-timeout-s": "3600",
    "server-learning-rate": "0.01",
    "learning-rate": "0.01",
    "fraction-train": "1",
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
    dataset, names = str(values["data"]["dataset"]), str(values["data"]["class_names"])
    card = _folder_card(names) if dataset == "folder" else load_card(dataset)
    _take_from_card(card, values, hints)
    settings = Settings(card=card, **{name: cls(**values[name]) for name, cls in _SECTIONS.items()})
    _check_ranges(settings)
    _check_combinations(settings)
    return settings


def _take_from_card(
    card: Card, values: dict[str, dict[str, RunConfigValue]], hints: Mapping[str, tuple[str, object]]
) -> None:
    for key in card.defaults:
        if key not in _FROM_CARD:
            raise ConfigError(f"The card {card.name} may set {', '.join(_FROM_CARD)}, but sets `{key}`.")
    for key, (left_to_card, otherwise) in _FROM_CARD.items():
        section, hint = hints[key]
        name = key.replace("-", "_")
        if values[section][name] == left_to_card:
            values[section][name] = _typed(key, card.defaults.get(key, otherwise), hint)


def _folder_card(names: str) -> Card:
    """Return the card of nodes that hold folders of their own; without names the clients' classes are united."""
    listed = tuple(name.strip() for name in names.split(",")) if names else ()
    if names and (len(listed) < 2 or len(set(listed)) < len(listed) or not all(listed)):
        raise ConfigError(
            f"`class-names` must list at least two different classes, or be empty for the union of the clients' "
            f'folders, but is {names!r}. Use for example "cat,dog": the names of the folders.'
        )
    return folder_card(listed)


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
            if flat[key] != "card" and mark not in str(flat[key]):
                raise ConfigError(f"`{key}` must contain {mark}, but is {flat[key]!r}. Use for example {marks[-1]!r}.")
    for key in ("store-dir", "data-dir"):
        if flat[key] and not Path(str(flat[key])).expanduser().is_absolute():
            raise ConfigError(f'`{key}` must be empty or an absolute folder, but is {flat[key]!r}. Use for example "".')
    if not settings.training.fraction_train <= 1:
        raise ConfigError(f"`fraction-train` must be at most 1, but is {settings.training.fraction_train:g}. Use 1.")
    if not 0 < settings.prompts.embedding_delta < 1:
        raise ConfigError(
            f"`embedding-delta` must lie between 0 and 1, but is {settings.prompts.embedding_delta:g}. Use 1e-5."
        )
    unknown = [name for name in tracker_names(settings.run.trackers) if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"`trackers` must list {', '.join(TRACKERS)} or nothing, but holds {unknown[0]!r}.")


def _check_combinations(settings: Settings) -> None:
    """Refuse settings that are each valid and make no sense together."""
    run, data, prompts = settings.run, settings.data, settings.prompts
    if data.dataset != "folder" and data.class_names:
        raise ConfigError(
            f"`class-names` must be empty for dataset {data.dataset}, whose card names them, but is "
            f'{data.class_names!r}. Use "".'
        )
    if data.dataset == "folder":
        if run.method == "centralized":
            raise ConfigError(
                "`method` must not be centralized for dataset folder, whose images never leave their nodes. "
                'Use "fedavg".'
            )
        if not data.class_names and (run.method == "fedavg" or settings.prompts_from_server):
            raise ConfigError(
                "`class-names` must list the classes where no client is asked for prompts, but is empty. Use for "
                'example "cat,dog": the names of the folders.'
            )
    if data.partition == "domain" and not (settings.card.domains or data.dataset == "folder"):
        raise ConfigError(f'`partition` must not be domain for {data.dataset}, which has one domain. Use "dirichlet".')
    if run.method == "gpt-fl" and prompts.prompt_source == "clients":
        raise ConfigError('`prompt-source` must be server or auto for method gpt-fl, but is clients. Use "auto".')
    if settings.prompts_from_server and prompts.prompt_level != "class":
        raise ConfigError(
            f"`prompt-level` must be class where the server writes the prompts, but is {prompts.prompt_level}. "
            'Use "class".'
        )
    if prompts.embedding_epsilon and (not prompts.embedding_clip or prompts.embedding_summary == "clusters"):
        raise ConfigError(
            "`embedding-epsilon` needs `embedding-clip` > 0, which bounds what noise must hide, and "
            "`embedding-summary` none or mean, because clusters depend on the data. Use for example embedding-clip=10."
        )


def tracker_names(trackers: str) -> list[str]:
    """Split the value of ``trackers``."""
    return [name.strip() for name in trackers.split(",") if name.strip()]
