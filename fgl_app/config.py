"""The run configuration: flat, kebab-case keys of ``[tool.flwr.app.config]`` to frozen dataclasses, checked at once.

Defaults live in ``pyproject.toml`` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import typing
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fgl_app.cards import Card, folder_card, load_card
from fgl_app.errors import ConfigError
from fgl_app.settings import SECTIONS, TRACKERS, RunConfigValue, Settings, tracker_names

APP_FOLDER = Path(__file__).resolve().parent.parent

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_FROM_CARD: dict[str, tuple[RunConfigValue, RunConfigValue]] = {
    "image-size": (0, 0),
    "augmentation": ("card", "crop-flip"),
    "num-inference-steps": (0, 50),
    "guidance-scale": (-1.0, 2.0),
    "scheduler": ("card", "own"),
    "generation-size": (0, 0),
}
"""Keys with the value that leaves them to the card, and the value where the card is silent, too; where it is about the
size, its ``native-size``."""

_PROFILES: dict[str, dict[str, RunConfigValue]] = {
    "paper": {"guidance-start": 0.0, "guidance-stop": 1.0, "deep-cache-interval": 1},
    "balanced": {
        "scheduler": "dpm-solver++",
        "guidance-start": 0.0,
        "guidance-stop": 0.5,
        "deep-cache-interval": 1,
    },
    "turbo": {
        "scheduler": "tcd",
        "num-inference-steps": 4,
        "guidance-scale": 1.0,
        "guidance-start": 0.0,
        "guidance-stop": 1.0,
        "deep-cache-interval": 1,
    },
}
"""What each profile sets, unless the user does."""
_LEFT_TO_PROFILE: dict[str, RunConfigValue] = {
    "scheduler": "card",
    "num-inference-steps": 0,
    "guidance-scale": -1.0,
    "guidance-start": -1.0,
    "guidance-stop": -1.0,
    "deep-cache-interval": 0,
}
_BALANCED_SHARE_OF_STEPS = 0.4
"""Of the card's steps; DPM-Solver++ needs 20 where the paper's solver needs 50."""

_AT_LEAST: dict[str, float] = {
    "seed": 0, "num-clients": 1, "num-server-rounds": 1, "image-size": 8, "max-train-images": 0,
    "classes-per-client": 1, "shards-per-client": 1, "min-samples-per-client": 0, "num-prompts-per-class": 1,
    "captioning-batch-size": 1, "max-new-tokens": 1, "embedding-clusters": 1, "embedding-clip": 0,
    "embedding-epsilon": 0, "images-per-class": 1, "num-inference-steps": 1, "guidance-scale": 0,
    "guidance-start": 0, "guidance-stop": 0, "deep-cache-interval": 1, "generation-size": 0, "stored-size": 8,
    "synthesis-batch-size": 1, "synthesis-workers": 0, "synthesis-wait-s": 0, "filter-attempts": 0,
    "batch-size": 2, "server-epochs": 1, "server-finetune-epochs": 0, "local-epochs": 1, "min-clients": 0,
    "max-prompts-per-client": 1, "max-prompt-chars": 1, "max-classes": 2, "max-update-norm": 0,
    "max-caption-words": 0, "classes-epsilon": 0, "min-clients-per-prompt": 1, "client-dp-noise": 0,
    "example-dp-noise": 0,
}  # fmt: skip
_POSITIVE = {
    "dirichlet-beta": "0.01 (extreme skew) to 100 (almost IID)",
    "connect-timeout-s": "120",
    "prompt-deadline-s": "43200",
    "round-deadline-s": "3600",
    "max-client-share": "1",
    "counts-epsilon": "1",
    "client-dp-clip": "1",
    "example-dp-clip": "1",
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
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
    }
    for key in run_config:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known keys: {', '.join(sorted(hints))}."
            raise ConfigError(f"`{key}` is not a key of the run configuration. {hint}")
    values: dict[str, dict[str, RunConfigValue]] = {section: {} for section in SECTIONS}
    for key, (section, hint_type) in hints.items():
        if key not in run_config:
            raise ConfigError(f"`{key}` is missing from the run configuration; pyproject.toml holds its default.")
        values[section][key.replace("-", "_")] = _typed(key, run_config[key], hint_type)
    dataset, names = str(values["data"]["dataset"]), str(values["data"]["class_names"])
    card = _folder_card(names) if dataset == "folder" else load_card(dataset)
    _take_from_profile(card, values["synthesis"])
    _take_from_card(card, values, hints)
    settings = Settings(card=card, **{name: cls(**values[name]) for name, cls in SECTIONS.items()})
    _check_ranges(settings)
    _check_combinations(settings)
    return settings


def is_chosen(settings: Settings, key: str) -> bool:
    """Return whether a key that is left to the profile or the card by default has another value than theirs."""
    name = key.replace("-", "_")
    values: dict[str, RunConfigValue] = dataclasses.asdict(settings.synthesis) | {name: _LEFT_TO_PROFILE[key]}
    _take_from_profile(settings.card, values)
    if key in _FROM_CARD and values[name] == _FROM_CARD[key][0]:
        values[name] = settings.card.defaults.get(key, _FROM_CARD[key][1])
    return values[name] != settings.flat()[key]


def _take_from_profile(card: Card, chosen: dict[str, RunConfigValue]) -> None:
    """Put the profile's values in the place of those that the user left to it."""
    profile = dict(_PROFILES[str(chosen["profile"])])
    if chosen["profile"] == "balanced":
        steps = int(typing.cast(int, card.defaults.get("num-inference-steps", _FROM_CARD["num-inference-steps"][1])))
        profile["num-inference-steps"] = max(1, round(_BALANCED_SHARE_OF_STEPS * steps))
    for key, value in profile.items():
        name = key.replace("-", "_")
        if chosen[name] == _LEFT_TO_PROFILE[key]:
            chosen[name] = value


def _take_from_card(
    card: Card, values: dict[str, dict[str, RunConfigValue]], hints: Mapping[str, tuple[str, object]]
) -> None:
    defaults = {"image-size": card.native_size, **card.defaults}
    for key, (left_to_card, otherwise) in _FROM_CARD.items():
        section, hint = hints[key]
        name = key.replace("-", "_")
        if values[section][name] == left_to_card:
            try:
                values[section][name] = _typed(key, defaults.get(key, otherwise), hint)
            except ConfigError as error:
                raise ConfigError(f"In `defaults` of the card {card.name} {error}") from None


def _folder_card(names: str) -> Card:
    """Return the card of nodes that hold folders of their own; without names the clients' classes are united."""
    listed = tuple(unicodedata.normalize("NFKC", name.strip()) for name in names.split(",")) if names else ()
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
        names = {bool: "true or false", int: "a whole number", float: "a number", str: 'text, e.g. "tiny"'}
        raise ConfigError(f"`{key}` must be {names[typing.cast(type, hint)]}, but is {value!r}.")
    return value


def _check_ranges(settings: Settings) -> None:
    flat = settings.flat()
    for key, least in _AT_LEAST.items():
        number = typing.cast(float, flat[key])
        if not least <= number < float("inf"):  # NaN is neither less nor more than anything
            finite = "finite and " if isinstance(number, float) else ""
            raise ConfigError(
                f"`{key}` must be {finite}at least {least:g}, but is {number}. Use {max(least, 1):g} or more."
            )
    for key, example in _POSITIVE.items():
        if not 0 < typing.cast(float, flat[key]) < float("inf"):
            raise ConfigError(f"`{key}` must be > 0 and finite, but is {flat[key]:g}. Use {example}.")
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
    for key in ("device", "synthesis-device"):
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(flat[key])):
            raise ConfigError(f"`{key}` must be auto, cpu, cuda or cuda:N, but is {flat[key]!r}.")
    for key, marks in (("class-prompt", ("{class}",)), ("instance-prompt", ("{class}", "{caption}"))):
        for mark in marks:
            if flat[key] != "card" and mark not in str(flat[key]).replace("{a class}", "{class}"):
                raise ConfigError(f"`{key}` must contain {mark}, but is {flat[key]!r}. Use for example {marks[-1]!r}.")
    for key in ("store-dir", "data-dir"):
        if flat[key] and not Path(str(flat[key])).expanduser().is_absolute():
            raise ConfigError(f'`{key}` must be empty or an absolute folder, but is {flat[key]!r}. Use for example "".')
    for key in ("fraction-train", "guidance-start", "guidance-stop", "max-client-share"):
        if typing.cast(float, flat[key]) > 1:
            raise ConfigError(f"`{key}` must be a share, at most 1, but is {flat[key]:g}. Use 1.")
    if settings.policy.min_clients > settings.run.num_clients:
        raise ConfigError(
            f"`min-clients` must be at most `num-clients`, which is {settings.run.num_clients}, but is "
            f"{settings.policy.min_clients}. Use 0 for all of them."
        )
    for key in ("embedding-delta", "counts-delta", "dp-delta"):
        if not 0 < typing.cast(float, flat[key]) < 1:
            raise ConfigError(f"`{key}` must lie between 0 and 1, but is {flat[key]:g}. Use 1e-5.")
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
    _check_defences(settings)
    _check_private_rounds(settings)
    synthesis = settings.synthesis
    if synthesis.profile == "turbo" and not synthesis.lora:
        raise ConfigError(
            '`lora` must name weights that were distilled for few steps where `profile` is turbo, but is "". Use for '
            "example a TCD LoRA made for your generator, or profile=balanced."
        )
    if synthesis.ray_address and not synthesis.synthesis_workers:
        raise ConfigError("`synthesis-workers` must be at least 1 where `ray-address` is set, but is 0.")
    if prompts.embedding_epsilon and (not prompts.embedding_clip or prompts.embedding_summary == "clusters"):
        raise ConfigError(
            "`embedding-epsilon` needs `embedding-clip` > 0, which bounds what noise must hide, and "
            "`embedding-summary` none or mean, because clusters depend on the data. Use for example embedding-clip=10."
        )


def _check_defences(settings: Settings) -> None:
    """Refuse defences that would protect nothing where they are set."""
    privacy, prompts = settings.privacy, settings.prompts
    of_captions = {
        "scrub": privacy.scrub != "off",
        "caption-vocabulary": bool(privacy.caption_vocabulary),
        "max-caption-words": privacy.max_caption_words > 0,
    }
    for key, is_set in of_captions.items():
        if is_set and (prompts.prompt_level == "class" or settings.prompts_from_server or not settings.synthesizes):
            raise ConfigError(f"`{key}` acts on captions, so `prompt-level` must be instance or embedding.")
    if privacy.caption_vocabulary and not privacy.caption_vocabulary.startswith(("/", "~")):
        raise ConfigError(
            f"`caption-vocabulary` must be an absolute path on the clients, but is {privacy.caption_vocabulary!r}."
        )
    if privacy.classes_epsilon and not (
        prompts.prompt_level == "class" and privacy.prompt_counts == "withheld" and settings.card.classes
        and not settings.card.domains
    ):  # fmt: skip
        raise ConfigError(
            "`classes-epsilon` needs `prompt-level` class and `prompt-counts` withheld, because captions and counts "
            "would tell which classes are held, and known classes without domains. Set both, or use 0."
        )
    if privacy.prompt_counts == "noised" and prompts.num_prompts_per_class > 1 and prompts.prompt_level == "class":
        raise ConfigError(
            "`prompt-counts` noised needs `num-prompts-per-class` 1, so that one image stands behind one prompt."
        )
    if privacy.prompt_counts != "exact" and settings.training.weighting != "uniform":
        raise ConfigError(
            f"`weighting` must be uniform where `prompt-counts` is {privacy.prompt_counts}, because the weights of the "
            'mean are the numbers that it hides. Use "uniform".'
        )
    for key, is_set in (
        ("embedding-epsilon", prompts.embedding_epsilon > 0),
        ("example-dp-noise", privacy.example_dp_noise > 0),
    ):
        if privacy.prompt_counts != "exact" and is_set:
            raise ConfigError(
                f"`prompt-counts` must be exact where `{key}` is set, because its epsilon is computed from them, but "
                f"is {privacy.prompt_counts}."
            )
    if privacy.min_clients_per_prompt > settings.run.num_clients:
        raise ConfigError(
            f"`min-clients-per-prompt` must be at most `num-clients`, which is {settings.run.num_clients}, but is "
            f"{privacy.min_clients_per_prompt}."
        )
    if privacy.min_clients_per_prompt > 1 and prompts.prompt_level == "embedding":
        raise ConfigError(
            "`min-clients-per-prompt` compares texts, so `prompt-level` must be class or instance, but is embedding."
        )


def _check_private_rounds(settings: Settings) -> None:
    """Refuse differential privacy of the rounds where it would not hold."""
    privacy, training = settings.privacy, settings.training
    asked = "client-dp" if privacy.client_dp != "off" else "example-dp-noise" if privacy.example_dp_noise else None
    if asked and settings.run.method == "centralized":
        raise ConfigError(
            f'`{asked}` has no meaning for method centralized, which has no clients. Use method "fedavg".'
        )
    if privacy.client_dp != "off":
        if training.weighting != "uniform":
            raise ConfigError(
                "`weighting` must be uniform where `client-dp` is set, because the noise hides one client among equals,"
                f' but is {training.weighting}. Use "uniform".'
            )
        if not privacy.client_dp_noise:
            raise ConfigError("`client-dp-noise` must be > 0 where `client-dp` is set, but is 0. Use 1.")
    if privacy.example_dp_noise and training.strategy == "QFedAvg":
        raise ConfigError(
            "`strategy` must not be QFedAvg where `example-dp-noise` is set, because it weights clients by their "
            'losses, which are withheld. Use "FedAvg".'
        )
