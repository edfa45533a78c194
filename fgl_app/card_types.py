"""What a data card says, as frozen dataclasses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fit = Literal["crop", "pad", "squash"]
SourceKind = Literal["sklearn", "torchvision", "huggingface", "folder"]


@dataclass(frozen=True)
class CardClass:
    """One class of a data set."""

    name: str
    """Name, unique on the card."""
    prompt: str
    """How prompts call it; disambiguates, e.g. "orange fruit" for the class "orange"."""
    source_id: int | str
    """Its label in the source: an index, or a folder's name."""


@dataclass(frozen=True)
class PromptForm:
    """How prompts are written; templates hold ``{class}``, or ``{a class}`` for the name with its article."""

    class_templates: tuple[str, ...]
    """Templates of class-level prompts; a run uses the first ``num-prompts-per-class`` of them."""
    instance_template: str
    """Template of instance-level prompts, with ``{caption}``; what follows it is the card's suffix."""
    negative: str
    """What the generator is steered away from; may be empty."""
    styles: tuple[str, ...] = ()
    """What the server's prompts (GPT-FL) may end with, e.g. "at night", to be many."""


@dataclass(frozen=True, eq=False)  # a card is loaded once and known by identity
class Card:
    """What the application must know about a data set."""

    name: str
    """File name without its ending."""
    title: str
    licence: str
    kind: SourceKind
    """Which library reads it."""
    locator: str
    """Class of ``torchvision.datasets``, id on the Hugging Face hub, or function of scikit-learn; empty for folders."""
    source_options: Mapping[str, Any]
    """Further arguments of that library, e.g. ``revision``."""
    splits: Mapping[str, Any]
    """The source's own ``train`` and, where it has one, ``validation`` and ``test`` part, as the library calls them."""
    public: float
    """Share of ``train`` that the shipped foundation models saw; no client ever holds it."""
    validation: float
    """Share of the other training images that is held out for validation; 0 if the source has a validation part."""
    test: float
    """Share held out for the test; 0 if the source has a test part."""
    split_seed: int
    """Seed of the public share, which is the same in every run; the run's seed divides the other images."""
    columns: Mapping[str, str]
    """Names of the columns ``image``, ``label`` and, where images have one, ``domain`` (Hugging Face)."""
    classes: tuple[CardClass, ...]
    domains: tuple[str, ...]
    """Names of the domains, in the order of their ids; empty for a data set of one domain."""
    transforms: tuple[tuple[str, int], ...]
    """What is done to each image before it is scaled to ``image-size``: pairs of name and size in px."""
    native_size: int
    """Side of an original image, px, or for photographs the usual size of training: ``image-size`` unless
    :attr:`defaults` names another."""
    form: PromptForm
    domain_forms: Mapping[str, PromptForm]
    """Form of a domain's prompts where it differs from :attr:`form`."""
    defaults: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Run-configuration keys that this data set sets where the user leaves them to the card."""
    fit: Fit = "crop"
    """How a picture that is not square becomes one: ``crop`` keeps its centre, ``pad`` all of it between black bars,
    ``squash`` all of it, distorted."""

    def digest(self) -> str:
        """Hash of everything that the card says; a run does not go on with another card of the same name."""
        return hashlib.sha256(repr({**vars(self), "name": ""}).encode()).hexdigest()[:16]

    def images_digest(self) -> str:
        """Hash of which images these are and how they are divided, whatever else the card says of them."""
        content = [self.kind, self.locator, dict(self.source_options), dict(self.splits), self.split_seed]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the K classes in the order of their labels."""
        return tuple(item.name for item in self.classes)

    def prompt_names(self, class_names: Iterable[str]) -> list[str]:
        """Return how prompts call classes; one that is not on the card is called by its name."""
        named = {item.name: item.prompt for item in self.classes}
        return [named.get(name, name) for name in class_names]

    def form_of(self, domain: str | None) -> PromptForm:
        """Return the prompt form of a domain, or the card's own."""
        return self.domain_forms.get(domain, self.form) if domain is not None else self.form
