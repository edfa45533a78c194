"""What differential privacy a finished run has, in numbers and in sentences, for ``results.json`` and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fgl_app.privacy.accounting import clients_epsilon, images_epsilon
from fgl_app.reporting.ledger import PROMPTS, TRAIN
from fgl_app.reporting.page import Section, Table
from fgl_app.settings import PrivacySettings, Settings

_IMAGE, _CLIENT = "one image", "one client"
_ADD_OR_REMOVE, _ZERO_OUT, _REPLACE = "add or remove", "zero out", "replace"
_ANYBODY, _ALL_CLIENTS = "anybody, the server included", "all other clients together, but not the server"
_UNITS = {
    _IMAGE: "of the content of one training image",
    _CLIENT: "of all training data of one client",
}
_HELD_OUT = "held-out images on which clients evaluate"
_PARTS = {
    "prompts": "the prompts of the clients",
    "rounds": "the model of every round",
}


def privacy_statement(settings: Settings, releases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """State (epsilon, delta) of the prompts and of the rounds, each for what it protects, and in total for each unit.

    What clients were asked for counts, whether or not the round was finished or its model kept, and whichever start of
    the run asked. Epsilons and deltas of a unit add up (Dwork & Roth 2014, Theorem 3.16) where they hold for one
    relation. Where a part of what leaves a client is not protected at a unit, there is no total for it.

    An epsilon holds for a neighbouring relation, between the run with a unit and the same run

    * ``add or remove``: without it, where the number of units is not told;
    * ``zero out``: with nothing in its place, while all numbers stay (Kairouz et al. 2021, Definition 1.1);
    * ``replace``: with another in its place.

    Args:
        settings: The run's settings.
        releases: Rows of the run's :class:`fgl_app.reporting.ledger.ReleaseLedger`.

    Returns:
        ``mechanisms``: of each the ``part`` and ``unit`` that it protects, its name, the ``relation`` for which
        ``epsilon`` and ``delta`` hold, both if the unit is ``replaced``, ``against`` whom, smaller epsilons against
        ``weaker`` adversaries, what it ``protects``, and what it ``excludes``, which may be nothing; ``total``: for
        each unit the same numbers, None where nothing bounds them, and a sentence. None for a run without mechanisms.
    """
    mechanisms = [*_of_prompts(settings, releases), *_of_rounds(settings, releases)]
    if not mechanisms:
        return None
    parts = ["prompts"] * _prompted(settings) + ["rounds"] * (_count(releases, TRAIN) > 0)
    units = [unit for unit in _UNITS if any(item["unit"] == unit for item in mechanisms)]
    return {"mechanisms": mechanisms, "total": [_total(unit, parts, mechanisms) for unit in units]}


def privacy_sections(statement: Mapping[str, Any] | None) -> list[Section]:
    """Return the part of a run's report that shows what :func:`privacy_statement` states; none without mechanisms."""
    if statement is None or not statement.get("mechanisms"):  # version 0.1.0 knows no such key
        return []
    rows = [
        [
            item["part"],
            item["mechanism"],
            f"{item.get('relation', '')} {item['unit']}".strip(),  # older results name no relation
            f"{item['epsilon']:.2f}",
            f"{item['delta']:g}",
            f"{item['replaced']['epsilon']:.2f} at {item['replaced']['delta']:g}" if "replaced" in item else "",
            "; ".join([item.get("against", ""), *_words_of_weaker(item)]),
            item["protects"] + (f"; not {item['excludes']}" if item.get("excludes") else ""),
        ]
        for item in statement["mechanisms"]
    ]
    head = ["part", "mechanism", "relation", "ε", "δ", "ε and δ of replacing", "against", "what it hides"]
    table = Table("Differential privacy", head, rows, numbers=False)
    return [Section("Privacy", [item["sentence"] for item in statement["total"]], tables=[table])]


def _words_of_weaker(item: Mapping[str, Any]) -> list[str]:
    return [f"{each['against']}: ε {each['epsilon']:.2f}" for each in item.get("weaker", [])]


def _of_prompts(settings: Settings, releases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not _prompted(settings):
        return []
    prompts, privacy = settings.prompts, settings.privacy
    times = max(1, _count(releases, PROMPTS))  # each exchange draws new noise; older versions did not note the first
    # Sites measure the models on images that they hold out, and send the measures as they are.
    measured = [_HELD_OUT] if settings.own_folders else []
    mechanisms = []
    if prompts.prompt_level == "embedding" and prompts.embedding_epsilon:
        cost = times * prompts.embedding_epsilon, times * prompts.embedding_delta
        mechanisms.append(
            _mechanism(
                "prompts", _IMAGE, "Gaussian, on embeddings", _REPLACE, cost, cost,
                "what the prompt of one image says",
                "; ".join(["its class and domain, and how many images have them", *measured]),
            )
        )  # fmt: skip
    if privacy.prompt_counts == "noised":
        # Another prompt in its place changes two counts, whose noises are independent.
        cost = times * privacy.counts_epsilon, times * privacy.counts_delta
        mechanisms.append(
            _mechanism(
                "prompts", _IMAGE, "stability-based histogram of prompts", _ADD_OR_REMOVE, cost, _twice(cost),
                "one image's prompt, its class and that it was counted", *measured,
            )
        )  # fmt: skip
    if privacy.classes_epsilon:
        name, hidden = "randomized response for each class", "which classes a client says it holds"
        # An image more or less changes one answer at most, another image in its place two, another client all.
        each, whole = ((times * privacy.classes_epsilon * answers, 0.0) for answers in (1, len(settings.card.classes)))
        what = f"what one image changes in {hidden}"
        mechanisms += [
            _mechanism("prompts", _IMAGE, name, _ADD_OR_REMOVE, each, _twice(each), what, *measured),
            _mechanism("prompts", _CLIENT, name, _REPLACE, whole, whole, f"{hidden}, all classes together", *measured),
        ]
    return mechanisms


def _twice(cost: tuple[float, float]) -> tuple[float, float]:
    return 2 * cost[0], 2 * cost[1]


def _prompted(settings: Settings) -> bool:
    return settings.synthesizes and not settings.prompts_from_server


def _of_rounds(settings: Settings, releases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    privacy, training = settings.privacy, settings.training
    asked = [row for row in releases if row.get("asked") == TRAIN]
    if not asked:
        return []
    mechanisms = []
    if privacy.client_dp != "off":
        mechanisms.append(_of_clients(privacy, [row["drawn"] for row in asked]))
    if privacy.example_dp_noise:
        numbers = {int(number) for row in releases for number in row.get("num_examples", [])}
        zeroed, replaced = (
            images_epsilon(
                privacy.example_dp_noise,
                numbers,
                _most_rounds_of_a_client(asked),
                batch_size=training.batch_size,
                local_epochs=training.local_epochs,
                delta=privacy.dp_delta,
                replaced=other,
            )
            for other in (False, True)
        )
        mechanisms.append(
            _mechanism(
                "rounds", _IMAGE, "DP-SGD on the clients", _ZERO_OUT, (zeroed, privacy.dp_delta),
                (replaced, privacy.dp_delta),
                "one training image in the weights that its client sends, used or not; for the client that was asked "
                "most often, with whichever number of images that any client told is worst",
                f"the number of images, and {_HELD_OUT}",
            )
        )  # fmt: skip
    return mechanisms


def _of_clients(privacy: PrivacySettings, drawn: Sequence[Sequence[int]]) -> dict[str, Any]:
    draws = [(int(count), int(population)) for count, population in drawn]
    if privacy.example_dp_noise:  # for whose sake the ledger says who was drawn: nothing is gained by the draw
        draws = [(count, count) for count, _ in draws]
    everybody = max(population for _, population in draws) - 1

    def epsilon(num_colluding: int, *, replaced: bool = False) -> float:
        noise, delta = privacy.client_dp_noise, privacy.dp_delta
        return clients_epsilon(noise, draws, delta, num_colluding=num_colluding, replaced=replaced)

    found = _mechanism(
        "rounds", _CLIENT, "Gaussian, on the mean of clipped updates", _ZERO_OUT,
        (epsilon(everybody), privacy.dp_delta), (epsilon(everybody, replaced=True), privacy.dp_delta),
        f"all training images of one client in the models of {len(draws)} rounds",
        "that the client took part, whether its update could be used, and the numbers and measures that it reports",
        against=_ALL_CLIENTS,
    )  # fmt: skip
    if any(count < population for count, population in draws):
        found["weaker"] = [
            {"against": who, "epsilon": round(epsilon(number), 4)}
            for who, number in (("one other client", 1), ("somebody who sees the models alone", 0))
        ]
    return found


def _count(releases: Sequence[Mapping[str, Any]], asked: str) -> int:
    return sum(row.get("asked") == asked for row in releases)


def _most_rounds_of_a_client(asked: Sequence[Mapping[str, Any]]) -> int:
    """Count the rounds of the client that was asked most often, by what clients say is their place.

    Clients of one place, by mistake or by a lie, count as one that was asked for all of them. Rounds that name no
    places count for everybody.
    """
    named = Counter(place for row in asked for place in set(row.get("places", [])))
    return sum("places" not in row for row in asked) + max(named.values(), default=0)


def _mechanism(
    part: str,
    unit: str,
    name: str,
    relation: str,
    cost: tuple[float, float],
    replaced: tuple[float, float],
    protects: str,
    excludes: str = "",
    against: str = _ANYBODY,
) -> dict[str, Any]:
    return {
        "part": part, "unit": unit, "mechanism": name, "relation": relation, **_numbers(cost),
        "replaced": _numbers(replaced), "against": against, "protects": protects, "excludes": excludes,
    }  # fmt: skip


def _numbers(cost: tuple[float, float]) -> dict[str, float]:
    return {"epsilon": round(cost[0], 4), "delta": cost[1]}


def _total(unit: str, parts: Sequence[str], mechanisms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [item for item in mechanisms if item["unit"] == unit]
    open_parts = [part for part in parts if part not in {item["part"] for item in own}]
    if open_parts:
        sentence = f"No bound on what the run tells {_UNITS[unit]}: nothing hides it in {_PARTS[open_parts[0]]}."
        return {"unit": unit, "epsilon": None, "delta": None, "sentence": sentence}
    relation = _common_relation({item["relation"] for item in own})
    replaced = _sum([item["replaced"] for item in own])
    cost = replaced if relation == _REPLACE else _sum(own)
    against = _ALL_CLIENTS if any(item["against"] == _ALL_CLIENTS for item in own) else _ANYBODY
    sentence = (
        f"What the run tells {_UNITS[unit]} is bounded by epsilon {cost['epsilon']:.2f} at delta {cost['delta']:g} "
        f"({relation} {unit}), against {against}."
    )
    if relation != _REPLACE:
        sentence += f" Replacing it: epsilon {replaced['epsilon']:.2f} at delta {replaced['delta']:g}."
    if excluded := [f"{item['excludes']} ({item['part']})" for item in own if item["excludes"]]:
        sentence += f" Not bounded: {'; '.join(excluded)}."
    return {
        "unit": unit, "relation": relation, **cost, "replaced": replaced, "against": against, "sentence": sentence
    }  # fmt: skip


def _common_relation(relations: Collection[str]) -> str:
    """Return the relation for which epsilons of these relations may be added up.

    What bounds replacing a contribution of norm C, which moves a sum by 2 C, also bounds leaving it out, which moves it
    by C. Anything else is added up for replacing.
    """
    if len(relations) == 1:
        return next(iter(relations))
    return _ZERO_OUT if set(relations) == {_ZERO_OUT, _REPLACE} else _REPLACE


def _sum(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return _numbers((sum(float(item["epsilon"]) for item in costs), sum(float(item["delta"]) for item in costs)))
