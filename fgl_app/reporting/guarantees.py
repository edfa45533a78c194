"""What differential privacy a finished run has, in numbers and in sentences, for ``results.json`` and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fgl_app.privacy.accounting import clients_epsilon, images_epsilon
from fgl_app.reporting.ledger import PROMPTS, TRAIN
from fgl_app.reporting.page import Section, Table
from fgl_app.settings import Settings

_IMAGE, _CLIENT = "one image", "one client"
_UNITS = {
    _IMAGE: "of the content of one training image",
    _CLIENT: "of all training data of one client",
}
_PARTS = {
    "prompts": "the prompts of the clients",
    "rounds": "the model of every round",
}


def privacy_statement(settings: Settings, releases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """State (epsilon, delta) of the prompts and of the rounds, each for what it protects, and in total for each unit.

    What clients were asked for counts, whether or not the round was finished or its model kept, and whichever start of
    the run asked. Epsilons and deltas of a unit add up (Dwork & Roth 2014, Theorem 3.16). Where a part of what leaves a
    client is not protected at a unit, there is no total for it.

    Args:
        settings: The run's settings.
        releases: Rows of the run's :class:`fgl_app.reporting.ledger.ReleaseLedger`.

    Returns:
        ``mechanisms``: of each the ``part`` and ``unit`` that it protects, its name, ``epsilon``, ``delta``, what it
        ``protects``, and what it ``excludes``, which may be nothing; ``total``: for each unit ``epsilon`` and
        ``delta``, None where nothing bounds them, and a sentence. None for a run without any mechanism.
    """
    mechanisms = [*_of_prompts(settings, releases), *_of_rounds(settings, releases)]
    if not mechanisms:
        return None
    parts = ["prompts"] * _prompted(settings) + ["rounds"] * (_count(releases, TRAIN) > 0)
    units = [unit for unit in _UNITS if any(item["unit"] == unit for item in mechanisms)]
    return {"mechanisms": mechanisms, "total": [_total(unit, parts, mechanisms) for unit in units]}


def privacy_sections(statement: Mapping[str, Any] | None) -> list[Section]:
    """Return the part of a run's report that shows what :func:`privacy_statement` states; none without mechanisms."""
    if statement is None or "mechanisms" not in statement:  # as results of version 0.1.0 have it
        return []
    rows = [
        [
            item["part"],
            item["unit"],
            item["mechanism"],
            f"{item['epsilon']:.2f}",
            f"{item['delta']:g}",
            item["protects"] + (f"; not {item['excludes']}" if item.get("excludes") else ""),
        ]
        for item in statement["mechanisms"]
    ]
    table = Table("Differential privacy", ["part", "unit", "mechanism", "ε", "δ", "what it hides"], rows, numbers=False)
    return [Section("Privacy", [item["sentence"] for item in statement["total"]], tables=[table])]


def _of_prompts(settings: Settings, releases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not _prompted(settings):
        return []
    prompts, privacy = settings.prompts, settings.privacy
    times = max(1, _count(releases, PROMPTS))  # each exchange draws new noise; older versions did not note the first
    mechanisms = []
    if prompts.prompt_level == "embedding" and prompts.embedding_epsilon:
        mechanisms.append(
            _mechanism(
                "prompts", _IMAGE, "Gaussian, on embeddings",
                times * prompts.embedding_epsilon, times * prompts.embedding_delta,
                "the content of one image's prompt", "its class and the numbers of prompts and of images",
            )
        )  # fmt: skip
    if privacy.prompt_counts == "noised":
        mechanisms.append(
            _mechanism(
                "prompts", _IMAGE, "stability-based histogram of prompts",
                times * privacy.counts_epsilon, times * privacy.counts_delta,
                "one image's prompt, its class and that it was counted",
            )
        )  # fmt: skip
    if privacy.classes_epsilon:
        name, hidden = "randomized response for each class", "which classes a client says it holds"
        each = times * privacy.classes_epsilon
        whole = each * len(settings.card.classes)
        mechanisms += [
            _mechanism("prompts", _IMAGE, name, each, 0.0, f"what one image changes in {hidden}"),
            _mechanism("prompts", _CLIENT, name, whole, 0.0, f"{hidden}, all classes together"),
        ]
    return mechanisms


def _prompted(settings: Settings) -> bool:
    return settings.synthesizes and not settings.prompts_from_server


def _of_rounds(settings: Settings, releases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    privacy, training = settings.privacy, settings.training
    asked = [row for row in releases if row.get("asked") == TRAIN]
    if not asked:
        return []
    mechanisms = []
    if privacy.client_dp != "off":
        draws = [(int(count), int(population)) for count, population in (row["drawn"] for row in asked)]
        if privacy.example_dp_noise:  # for whose sake the ledger says who was drawn: nothing is gained by the draw
            draws = [(count, count) for count, _ in draws]
        mechanisms.append(
            _mechanism(
                "rounds", _CLIENT, "Gaussian, on the mean of clipped updates",
                clients_epsilon(privacy.client_dp_noise, draws, privacy.dp_delta), privacy.dp_delta,
                f"all training images of one client in the models of {len(draws)} rounds, against everybody but the "
                "server",
                "that the client took part, whether its update could be used, and the numbers and measures that it "
                "reports",
            )
        )  # fmt: skip
    if privacy.example_dp_noise:
        numbers = {int(number) for row in releases for number in row.get("num_examples", [])}
        epsilon = images_epsilon(
            privacy.example_dp_noise,
            numbers,
            _most_rounds_of_a_client(asked),
            batch_size=training.batch_size,
            local_epochs=training.local_epochs,
            delta=privacy.dp_delta,
        )
        mechanisms.append(
            _mechanism(
                "rounds", _IMAGE, "DP-SGD on the clients", epsilon, privacy.dp_delta,
                "one training image in the weights that its client sends, used or not, against the server, too; for "
                "the client that was asked most often, with whichever number of images that any client told is worst",
                "the number of images, and held-out images on which clients evaluate",
            )
        )  # fmt: skip
    return mechanisms


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
    part: str, unit: str, name: str, epsilon: float, delta: float, protects: str, excludes: str = ""
) -> dict[str, Any]:
    return {
        "part": part, "unit": unit, "mechanism": name, "epsilon": round(epsilon, 4), "delta": delta,
        "protects": protects, "excludes": excludes,
    }  # fmt: skip


def _total(unit: str, parts: Sequence[str], mechanisms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [item for item in mechanisms if item["unit"] == unit]
    open_parts = [part for part in parts if part not in {item["part"] for item in own}]
    if open_parts:
        sentence = f"No bound on what the run tells {_UNITS[unit]}: nothing hides it in {_PARTS[open_parts[0]]}."
        return {"unit": unit, "epsilon": None, "delta": None, "sentence": sentence}
    epsilon, delta = (sum(float(item[key]) for item in own) for key in ("epsilon", "delta"))
    sentence = f"What the run tells {_UNITS[unit]} is bounded by epsilon {epsilon:.2f} at delta {delta:g}."
    if excluded := [f"{item['excludes']} ({item['part']})" for item in own if item["excludes"]]:
        sentence += f" Not bounded: {'; '.join(excluded)}."
    return {"unit": unit, "epsilon": round(epsilon, 4), "delta": delta, "sentence": sentence}
