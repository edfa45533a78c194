"""What differential privacy a finished run has, in numbers and in sentences, for ``results.json`` and the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fgl_app.privacy.accounting import clients_epsilon, images_epsilon
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


def privacy_statement(settings: Settings, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """State (epsilon, delta) of the prompts and of the rounds, each for what it protects, and in total for each unit.

    The rounds that are counted are those whose models are kept, whichever start of the run made them. Epsilons and
    deltas of a unit add up (Dwork & Roth 2014, Theorem 3.16). Where a part of what leaves a client is not protected at
    a unit, there is no total for it.

    Args:
        settings: The run's settings.
        rounds: Metrics of each round: with ``client-dp`` those of the federated ones have ``drawn``, the numbers of
            clients that trained and that they were drawn from; with DP-SGD ``num_examples``, the number of training
            images by client.

    Returns:
        ``mechanisms``: of each the ``part`` and ``unit`` that it protects, its name, ``epsilon``, ``delta`` and a
        sentence; ``total``: for each unit ``epsilon`` and ``delta``, None where nothing bounds them, and a sentence.
        None for a run without any mechanism.
    """
    mechanisms = [*_of_prompts(settings), *_of_rounds(settings, rounds)]
    if not mechanisms:
        return None
    parts = ["prompts"] * _prompted(settings) + ["rounds"] * any(row["phase"] == "federated" for row in rounds)
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
            item["protects"],
        ]
        for item in statement["mechanisms"]
    ]
    table = Table("Differential privacy", ["part", "unit", "mechanism", "ε", "δ", "what it hides"], rows, numbers=False)
    return [Section("Privacy", [item["sentence"] for item in statement["total"]], tables=[table])]


def _of_prompts(settings: Settings) -> list[dict[str, Any]]:
    if not _prompted(settings):
        return []
    prompts, privacy = settings.prompts, settings.privacy
    mechanisms = []
    if prompts.prompt_level == "embedding" and prompts.embedding_epsilon:
        mechanisms.append(
            _mechanism(
                "prompts", _IMAGE, "Gaussian, on embeddings", prompts.embedding_epsilon, prompts.embedding_delta,
                "the content of one image's prompt; not its class, nor the number of prompts",
            )
        )  # fmt: skip
    if privacy.prompt_counts == "noised":
        mechanisms.append(
            _mechanism(
                "prompts", _IMAGE, "stability-based histogram of prompts", privacy.counts_epsilon, privacy.counts_delta,
                "one image's prompt, its class and that it was counted",
            )
        )  # fmt: skip
    if privacy.classes_epsilon:
        name, hidden = "randomized response for each class", "which classes a client says it holds"
        whole = privacy.classes_epsilon * len(settings.card.classes)
        mechanisms += [
            _mechanism("prompts", _IMAGE, name, privacy.classes_epsilon, 0.0, f"what one image changes in {hidden}"),
            _mechanism("prompts", _CLIENT, name, whole, 0.0, f"{hidden}, all classes together"),
        ]
    return mechanisms


def _prompted(settings: Settings) -> bool:
    return settings.synthesizes and not settings.prompts_from_server


def _of_rounds(settings: Settings, rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    privacy, training = settings.privacy, settings.training
    mechanisms = []
    drawn = [(int(row["drawn"][0]), int(row["drawn"][1])) for row in rounds if "drawn" in row]
    if privacy.client_dp != "off" and drawn:
        mechanisms.append(
            _mechanism(
                "rounds", _CLIENT, "Gaussian, on the mean of clipped updates",
                clients_epsilon(privacy.client_dp_noise, drawn, privacy.dp_delta), privacy.dp_delta,
                f"all training images of one client in the models of {len(drawn)} rounds, against everybody but the "
                "server; not that it took part, nor the numbers and measures that clients report",
            )
        )  # fmt: skip
    histories: dict[str, list[int]] = defaultdict(list)
    for row in rounds:
        for client, number in row.get("num_examples", {}).items():
            histories[client].append(int(number))
    if privacy.example_dp_noise and histories:
        epsilon = images_epsilon(
            privacy.example_dp_noise,
            histories,
            batch_size=training.batch_size,
            local_epochs=training.local_epochs,
            delta=privacy.dp_delta,
        )
        mechanisms.append(
            _mechanism(
                "rounds", _IMAGE, "DP-SGD on the clients", epsilon, privacy.dp_delta,
                "one training image in the weights that its client sends, against the server, too; the client where "
                "epsilon is largest; not the number of images, nor held-out images on which clients evaluate",
            )
        )  # fmt: skip
    return mechanisms


def _mechanism(part: str, unit: str, name: str, epsilon: float, delta: float, protects: str) -> dict[str, Any]:
    return {
        "part": part, "unit": unit, "mechanism": name, "epsilon": round(epsilon, 4), "delta": delta,
        "protects": protects,
    }  # fmt: skip


def _total(unit: str, parts: Sequence[str], mechanisms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [item for item in mechanisms if item["unit"] == unit]
    open_parts = [part for part in parts if part not in {item["part"] for item in own}]
    if open_parts:
        sentence = f"No bound on what the run tells {_UNITS[unit]}: nothing hides it in {_PARTS[open_parts[0]]}."
        return {"unit": unit, "epsilon": None, "delta": None, "sentence": sentence}
    epsilon, delta = (sum(float(item[key]) for item in own) for key in ("epsilon", "delta"))
    sentence = f"What the run tells {_UNITS[unit]} is bounded by epsilon {epsilon:.2f} at delta {delta:g}."
    return {"unit": unit, "epsilon": round(epsilon, 4), "delta": delta, "sentence": sentence}
