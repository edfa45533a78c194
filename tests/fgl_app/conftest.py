"""Fixtures: folders of finished runs, as the ServerApp leaves them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_runs import PROMPT, a_row, without_optional
from flwr.app import ArrayRecord

from fgl_app.config import parse_run_config
from fgl_app.phases import draw_plan, resolve
from fgl_app.prompts import MergedPrompts, PromptCount
from fgl_app.reporting.results import summarize
from fgl_app.reporting.run_folder import RunFolder
from fgl_app.settings import RunConfigValue
from fgl_app.synthesis.launch import SynthesisReport
from fgl_app.synthesis.worker import work


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Images that the tests share: what the first one draws, the others reuse."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def make_run(run_config, store) -> Callable[..., Path]:
    """Makes the folder of a finished run of the shipped generator, as the ServerApp leaves it."""

    def make(**overrides: RunConfigValue) -> Path:
        settings = parse_run_config(run_config | {"store-dir": str(store)} | overrides)
        folder = RunFolder(settings, resolve(settings))
        names = settings.card.class_names()
        prompts = [PromptCount(label, f"a handwritten {name}", 40 + label) for label, name in enumerate(names)]
        merged = MergedPrompts((*prompts, PromptCount(7, PROMPT, 50)), names)
        exchange = {
            "clients_asked": 3,
            "clients_used": 2,
            "late": [],
            "missed": [],
            "unreadable_images": {"1": 4},
            "refused": [{"client": 2, "node": "17", "reason": "Refused: a blocked word.", "count": 5}],
            "upload": {"payload": 82, "message": 324, "all_messages": 700},
        }
        folder.save_prompts(merged, exchange)
        plan = draw_plan(settings, merged, folder.embeddings)
        plan.save(folder.path / "plan.json")
        drawn = work(plan, folder.synthetic)
        folder.save_confusion(names, [[30 if row == column else abs(row - column) // 7 for column in range(10)]
                                      for row in range(10)], 2)  # fmt: skip
        rounds = [a_row(1, 0.6), a_row(2, 0.8, gradient_diversity=0.4, client_drift=1.5)]
        for row in rounds:
            folder.save_round(row, ArrayRecord({"weight": torch.zeros(2)}))
        folder.write_results(
            summarize(
                settings,
                rounds,
                releases=folder.open_ledger().rows,
                prompt_round=exchange,
                synthesis=SynthesisReport(20, "ab", drawn, 20 - drawn, {}, {}, 2.0, 0.0),
                seconds={"prompts": 0.5, "synthesis": 2.0, "total": 9.0},
            )
        )
        return folder.path

    return make


@pytest.fixture
def make_fedavg(run_config) -> Callable[..., Path]:
    """Makes the folder of a finished run without prompts and images."""

    def make(**overrides: RunConfigValue) -> Path:
        settings = parse_run_config(run_config | {"method": "fedavg"} | overrides)
        folder = RunFolder(settings, resolve(settings))
        rounds = [without_optional(a_row(1, 0.3))]
        folder.write_results(
            summarize(
                settings,
                rounds,
                releases=[],
                prompt_round=None,
                synthesis=None,
                seconds={"rounds": 4.0},
            )
        )
        return folder.path

    return make
