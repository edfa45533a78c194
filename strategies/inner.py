"""Build the strategy of the rounds by its name: any of Flower's that averages arrays."""

from __future__ import annotations

import difflib
import inspect
import math
from typing import Any

import flwr.serverapp.strategy
from flwr.serverapp.strategy import FedAvg, Strategy

from fgl_app.errors import ConfigError
from fgl_app.records import EQUAL_WEIGHT, NUM_EXAMPLES, mean_evaluation

_OURS = frozenset(inspect.signature(FedAvg.__init__).parameters)
"""Parameters that the run configuration sets by keys of its own."""
_CLIENTS_PER_HOSTILE = {"Krum": (2, 3), "MultiKrum": (2, 3), "Bulyan": (4, 3)}
"""Slope and offset of the least number of clients, of whom f are hostile: Krum's guarantee needs 2 f + 3 (Blanchard et
al. 2017, Proposition 4.2), Bulyan 4 f + 3 (El Mhamdi et al. 2018), with fewer of which Flower's skips the round."""


def strategy_names() -> list[str]:
    """Return the names of Flower's strategies that average arrays, FedAvg and its subclasses but for trees."""
    found = vars(flwr.serverapp.strategy).items()
    return sorted(
        name
        for name, value in found
        if inspect.isclass(value) and issubclass(value, FedAvg) and not name.startswith("FedXgb")
    )


def build_inner(name: str, options: str, *, num_selected: int, weighting: str, evaluate_on_clients: bool) -> Strategy:
    """Build the strategy of the rounds.

    Args:
        name: Name of its class in ``flwr.serverapp.strategy``.
        options: Its own parameters, ``KEY=NUMBER`` each, divided by blanks.
        num_selected: Least number of clients that train in a round.
        weighting: ``examples``: the mean is weighted by the clients' numbers of images (McMahan et al. 2017);
            ``uniform``: it is not (FGL, Eq. 4).
        evaluate_on_clients: Whether clients evaluate after each round.

    Raises:
        ConfigError: If Flower has no such strategy, it does not take an option or its value, or a round has too few
            clients for it.
    """
    known = strategy_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ConfigError(f"`strategy` must be one of Flower's, but is {name!r}. Use {' or '.join(near)}.")
    made = getattr(flwr.serverapp.strategy, name)
    own = [key for key in inspect.signature(made.__init__).parameters if key not in _OURS]
    keywords: dict[str, Any] = {}
    for word in options.split():
        key, _, text = word.partition("=")
        key = key.replace("-", "_")
        if key not in own:
            raise ConfigError(
                f"`strategy-options` of {name} must be among {', '.join(own) or 'none'}, but hold {word!r}."
            )
        try:
            number = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"`strategy-options` must be KEY=NUMBER, but hold {word!r}. Use eta=0.1.")
        keywords[key] = number
    _check_hostile(name, keywords.get("num_malicious_nodes", 0), num_selected)
    try:
        strategy: Strategy = made(
            fraction_train=1.0,
            fraction_evaluate=1.0 if evaluate_on_clients else 0.0,
            min_train_nodes=num_selected,
            min_evaluate_nodes=num_selected if evaluate_on_clients else 0,
            min_available_nodes=num_selected,
            weighted_by_key=NUM_EXAMPLES if weighting == "examples" else EQUAL_WEIGHT,
            evaluate_metrics_aggr_fn=mean_evaluation,
            **keywords,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`strategy-options` {options!r} do not make a {name}: {error}.") from None
    return strategy


def _check_hostile(name: str, num_hostile: float, num_selected: int) -> None:
    """Refuse a round of fewer clients than a strategy needs to withstand the hostile ones among them."""
    slope, offset = _CLIENTS_PER_HOSTILE.get(name, (0, 0))
    if slope and (num_hostile < 0 or not isinstance(num_hostile, int)):
        raise ConfigError(f"`num-malicious-nodes` of {name} must be a whole number from 0 on, but is {num_hostile}.")
    needed = slope * num_hostile + offset
    # Without hostile clients Krum chooses among any number of them.
    if num_selected < needed and (num_hostile or name == "Bulyan"):
        largest = (num_selected - offset) // slope
        raise ConfigError(
            f"`strategy` {name} needs rounds of at least {needed} clients to withstand num-malicious-nodes="
            f"{num_hostile}, {slope} for each and {offset}, but a round may have {num_selected}. "
            + (f"Use at most {largest}, or" if largest >= 0 else "Use another `strategy`, or")
            + " more clients: see `num-clients`, `fraction-train` and `min-clients`."
        )
