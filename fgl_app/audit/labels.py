"""How tables and figures call models and runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_METHODS = {"fgl": "FGL", "gpt-fl": "GPT-FL", "fedavg": "FedAvg", "centralized": "Centralized"}


def model_name(run_config: Mapping[str, Any], server_round: int, last_round: int) -> str:
    """Name the model of a run after a round, as the papers do: one-shot, 5 rounds, 5 rounds + syn."""
    method = str(run_config["method"])
    if method in ("fgl", "gpt-fl") and server_round == 1:
        return f"{_METHODS[method]} one-shot"
    synthetic = method in ("fgl", "gpt-fl") and int(run_config["server-finetune-epochs"]) > 0
    rounds = "1 round" if last_round == 1 else f"{last_round} rounds"
    return f"{_METHODS[method]}, {rounds}{' + syn' if synthetic else ''}"


def data_name(run_config: Mapping[str, Any]) -> str:
    """Name the data of a run: data set and partition."""
    if run_config["method"] == "centralized":
        return str(run_config["dataset"])
    partition = str(run_config["partition"])
    beta = f", β = {run_config['dirichlet-beta']:g}" if partition == "dirichlet" else f", {partition}"
    return f"{run_config['dataset']}{beta}"
