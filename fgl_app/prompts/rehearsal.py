"""What screening and generator would make of a run's classes, asked before anything is started or sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fgl_app.errors import ConfigError, DataError
from fgl_app.prompts.screening import NAMED, limits_of, name_fault, screen_prompts
from fgl_app.prompts.writing import class_prompts, comparable, instance_prompts
from fgl_app.settings import Settings

_CAPTION = "."


def check_class_prompts(settings: Settings) -> None:
    """Check that no class of the run would be lost between its name and its images.

    Each name must be one that screening accepts, and so must the prompts that clients write of it. The generator must
    be able to tell the prompts of two classes apart: text encoders do not see case.

    Raises:
        ConfigError: If a class would be refused prompt by prompt, or drawn as another one.
        PromptError: If a prompt of a class's name alone is longer than `max-prompt-chars`.
    """
    card = settings.card
    for what, names in (("class", card.class_names()), ("domain", card.domains)):
        for name in names:
            if fault := name_fault(name):
                raise ConfigError(
                    f"{_of(settings)} must have {NAMED}, but the {what} {_shown(name)} has {fault}. Rename it."
                )
    drawn: dict[str, str] = {}
    limits = limits_of(settings.policy)
    for item in card.classes:
        rows = [] if settings.prompts_from_server else _rows(settings, item.name, item.prompt)
        if rows and settings.prompts.prompt_level != "embedding":
            _, refused = screen_prompts(
                rows,
                replace(limits, max_prompts=len(rows)),
                class_names=card.class_names(),
                domains=card.domains,
            )
            if refused:
                raise ConfigError(
                    f"{_of(settings)} must have classes whose prompts are accepted, but those of {_shown(item.name)} "
                    f"have {next(iter(refused))}. Change its `prompt` or name, or what is accepted."
                )
        called = comparable(item.prompt)
        if called in drawn:
            raise ConfigError(
                f"{_of(settings)} must have classes whose prompts differ in more than case, but {_shown(item.name)} "
                f"and {_shown(drawn[called])} would be drawn as one. Give one of them another `prompt` on a card, or "
                "put them together."
            )
        drawn[called] = item.name


def check_site(class_names: Sequence[str], settings: Settings) -> None:
    """Check, at a site, the names of its own classes, which the run's label space is formed of.

    Raises:
        DataError: If the server would refuse what is sent of one of them.
    """
    limits = replace(limits_of(settings.policy, of_server=False), max_prompts=len(class_names))
    for name in class_names:
        fault = name_fault(name)
        if fault is None:
            fault = next(iter(screen_prompts([[name, 1, "."]], limits)[1]), None)
        if fault is not None:
            raise DataError(f"Class folders must have {NAMED}, but {_shown(name)} has {fault}. Rename it.")
    if len(class_names) > limits.max_classes:
        raise DataError(
            f"A site must hold at most `max-classes` {limits.max_classes} classes, but holds {len(class_names)}."
        )


def _rows(settings: Settings, name: str, called: str) -> list[tuple[str, int, str, str]]:
    """Return what a client that holds a class in all domains would send of it, with next to no captions.

    Raises:
        PromptError: If what it writes of the class's name alone is too long.
    """
    found = []
    max_chars = settings.policy.max_prompt_chars
    for domain in settings.card.domains or ("",):
        form = settings.prompt_form(domain or None)
        if settings.prompts.prompt_level == "class":
            templates = form.class_templates[: settings.prompts.num_prompts_per_class]
            found += class_prompts([0], [called], templates, domain, max_chars)
        else:
            class_prompts([0], [called], [form.instance_template], domain, max_chars)
            found += instance_prompts([0], [_CAPTION], [called], form.instance_template, domain, max_chars)
    return [(name, 1, item.prompt, item.domain) for item in found]


def _of(settings: Settings) -> str:
    return "`class-names`" if settings.own_folders else f"`dataset` {settings.card.name}"


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")
