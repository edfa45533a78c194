"""A strategy and clients of somebody who builds on this application: more metrics, more records, a state of its own."""

import logging
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from fgl_app.client_app import app
from fgl_app.data.images import ImageSet
from fgl_app.errors import ConfigError, RoundError
from fgl_app.phases import initial_arrays, resolve
from fgl_app.prompts import MergedPrompts, PromptCount, PromptLimits
from fgl_app.records import evaluation_metrics, training_metrics
from fgl_app.reporting.run_folder import RunFolder
from fgl_app.training import Evaluation
from strategies import FGL, CheckedRounds
from strategies.differential_privacy import with_noise
from strategies.extras import Extras, take_means
from strategies.prompt_round import PromptRound
from strategies.screening import EVALUATED, evaluation_fault, update_fault

NO_IMAGES = ImageSet(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
TAKING_PART = {"fraction_evaluate": 0.0, "min_train_nodes": 3, "min_evaluate_nodes": 0, "min_available_nodes": 3}


class Variates(FedAvg):
    """A server's control variate in the manner of SCAFFOLD (Karimireddy et al. 2020): sent, moved by clients, kept."""

    extra_records: ClassVar = {"control": ArrayRecord}
    extra_metrics = ("num-steps",)

    def __init__(self):
        super().__init__(**TAKING_PART)
        self.control = {}

    def configure_train(self, server_round, arrays, config, grid):
        self.control = self.control or {name: torch.zeros(array.shape) for name, array in arrays.items()}
        for message in super().configure_train(server_round, arrays, config, grid):
            message.content["control"] = ArrayRecord(self.control)
            yield message

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        found = [reply.content.pop("control").to_torch_state_dict() for reply in replies]
        self.steps = [reply.content["metrics"]["num-steps"] for reply in replies]
        self.control = {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}
        arrays, metrics = super().aggregate_train(server_round, replies)
        moved = {name: value + 0.1 * self.control[name] for name, value in arrays.to_torch_state_dict().items()}
        return ArrayRecord(moved), metrics

    def memory(self):
        return self.control

    def restore(self, memory):
        self.control = dict(memory)


class Forgetful(FedAvg):
    """Remembers something and says nothing of it."""


def client(message, context):
    """Answer as our ClientApp does, and with more."""
    reply = app(message, context)
    place = context.node_config["partition-id"]
    if message.metadata.message_type == "train":
        sent, trained = message.content["arrays"], reply.content["arrays"]
        control = {name: 0.5 * a.numpy() for name, a in message.content["control"].items()}
        reply.content["control"] = ArrayRecord(
            {name: Array(old + sent[name].numpy() - trained[name].numpy()) for name, old in control.items()}
        )
        reply.content["metrics"]["num-steps"] = 10 * (place + 1)
        if place:
            reply.content["metrics"]["grad_norm"] = float(place)
    return reply


@pytest.fixture
def run_fgl(make_grid, settings):
    """Return a function that runs FGL around a strategy, from round 1 or from what an earlier start left."""

    def go(inner, num_rounds, earlier=None, memory=None):
        grid = make_grid()
        grid.app = client
        names = settings.card.class_names()
        strategy = FGL(
            inner,
            class_names=names,
            num_clients=3,
            prompt_round=lambda grid: PromptRound(grid, PromptLimits(1000, 1000), class_names=names, deadline_s=1.0),
            synthesize=lambda merged, listen: NO_IMAGES,
            pretrain=lambda arrays, images: arrays,
            prompts=None if earlier is None else MergedPrompts((PromptCount(0, "zero", 1),), names),
            connect_timeout_s=1,
            rounds_done=0 if earlier is None else 2,
        )
        if memory is not None:
            strategy.restore(memory)
        start = initial_arrays(settings, names) if earlier is None else earlier
        return strategy, strategy.start(grid, start, num_rounds=num_rounds)

    return go


def content(arrays):
    return {name: array.numpy().tobytes() for name, array in arrays.items()}


def test_a_strangers_strategy_gets_its_records_and_metrics_and_these_are_kept_by_round(run_fgl):
    inner = Variates()

    strategy, result = run_fgl(inner, 3)

    assert strategy.refusals[2].rows() == strategy.refusals[3].rows() == []
    assert inner.steps == [10, 20, 30]
    assert any(value.any() for value in inner.control.values())
    # Client 0 does not send `grad_norm`, which Flower would answer by aggregating nothing.
    assert set(strategy.extra_metrics) == {2, 3}
    assert set(strategy.extra_metrics[2]["train"]) == {"grad_norm", "num-steps"}
    assert 1 < strategy.extra_metrics[2]["train"]["grad_norm"] < 2
    assert 10 < result.train_metrics_clientapp[3]["num-steps"] < 30
    assert "grad_norm" not in result.train_metrics_clientapp[3]


def test_a_strangers_strategy_goes_on_after_a_restart_with_what_it_remembered(run_fgl, settings):
    whole = run_fgl(Variates(), 4)[1].arrays

    first, result = run_fgl(Variates(), 2)
    folder = RunFolder(settings, resolve(settings))
    folder.save_round({"round": 2}, result.arrays, first.memory())
    kept = folder.load_memory(2)
    resumed = run_fgl(Variates(), 4, result.arrays, kept)[1].arrays
    forgetful = run_fgl(Variates(), 4, result.arrays)[1].arrays

    assert content(resumed) == content(whole)
    assert content(forgetful) != content(whole)


def test_whoever_keeps_no_state_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        for inner in (Variates(), FedAvg(**TAKING_PART), FedAdam(**TAKING_PART)):
            CheckedRounds(inner, num_clients=3)
        assert "resumed" not in caplog.text
        CheckedRounds(Forgetful(**TAKING_PART), num_clients=3)

    told = [record.getMessage() for record in caplog.records if "resumed" in record.getMessage()]
    assert len(told) == 1
    assert "Forgetful has no memory() and restore()" in told[0]


def test_a_memory_of_anything_but_tensors_is_named():
    inner = Variates()
    inner.control = {"rounds": 3}

    with pytest.raises(RoundError, match=r"memory\(\) of Variates returned int under 'rounds'"):
        CheckedRounds(inner, num_clients=3).memory()


def test_adams_moments_and_a_state_of_ones_own_are_kept_beside_each_other():
    class Warm(FedAdam):
        def memory(self):
            return {"m_t": torch.tensor([7.0])}

        def restore(self, memory):
            self.own = memory

    first, second = Warm(**TAKING_PART), Warm(**TAKING_PART)
    first.m_t = first.v_t = {"weight": np.ones(2, np.float32)}

    CheckedRounds(second, num_clients=3).restore(CheckedRounds(first, num_clients=3).memory())

    assert {name: value.tolist() for name, value in second.m_t.items()} == {"weight": [1.0, 1.0]}
    assert {name: value.tolist() for name, value in second.own.items()} == {"m_t": [7.0]}


SENT = ArrayRecord({"weight": Array(np.zeros(3, np.float32))})
CONTROL = ArrayRecord({"weight": Array(np.ones(3, np.float32))})
DECLARED = Extras({"control": ArrayRecord}, {"control": SENT}, frozenset({"num-steps"}))


WEIGHTED = Extras.of(FedAvg(weighted_by_key="steps"), accepted=True)


def reply(*, leave_out="", metrics=None, **records):
    held = {"arrays": CONTROL, "metrics": MetricRecord(dict(training_metrics(8, 0.5)) | (metrics or {})), **records}
    held = {key: record for key, record in held.items() if key != leave_out}
    return Message(RecordDict(held), reply_to=Message(RecordDict(), dst_node_id=1, message_type="train"))


def of(*values, dtype=np.float32):
    return ArrayRecord({"weight": Array(np.array(values, dtype))})


@pytest.mark.parametrize(
    ("changed", "extras", "fault"),
    [
        ({"metrics": {"auc": 0.7}}, Extras(), None),
        ({"metrics": {f"m{number}": number for number in range(100)}}, Extras(), None),
        ({"metrics": {f"m{number}": number for number in range(101)}}, Extras(), "more than 100 metrics"),
        ({"metrics": {"auc": float("nan")}}, Extras(), "`auc` that is not finite"),
        ({"metrics": {"auc": 1.7e308}}, Extras(), "`auc` that is not finite, or larger"),
        ({"metrics": {"auc": 10**400}}, Extras(), "`auc` that is not finite, or larger"),
        ({"metrics": {"auc": [0.5, 0.7]}}, Extras(), "`auc` that is not one number"),
        ({"metrics": {"steps": 10_000_000}}, WEIGHTED, None),
        ({"metrics": {"steps": 0.5}}, WEIGHTED, None),
        ({"metrics": {"steps": 0}}, WEIGHTED, "a weight `steps` that is not above 0 and at most 10,000,000"),
        ({"metrics": {"steps": -1.0}}, WEIGHTED, "a weight `steps`"),
        ({"metrics": {"steps": 1e300}}, WEIGHTED, "a weight `steps`"),
        ({}, WEIGHTED, "metrics without `steps`"),
        ({"metrics": {"a" * 65: 1.0}}, Extras(), "whose name is not"),
        ({"metrics": {"mr. kowalski": 1.0}}, Extras(), "whose name is not"),
        ({"metrics": {"auc": 0.7}}, Extras(accepted=False), "`auc`, which neither noise nor withheld counts protect"),
        ({"metrics": {"loss": 10**400}}, Extras(), "out of range"),
        ({"leave_out": "metrics"}, Extras(), "no metrics"),
        ({"control": CONTROL}, Extras(), "`control` that the strategy does not declare"),
        ({"more": ConfigRecord({"x": 1})}, Extras(), "`more` that the strategy does not declare"),
        ({"more": MetricRecord({"x": 1})}, Extras(), "`more` that the strategy does not declare"),
        ({"control": CONTROL, "metrics": {"num-steps": 3}}, DECLARED, None),
        ({"control": CONTROL}, DECLARED, "without `num-steps`, which the strategy declares"),
        ({"metrics": {"num-steps": 3}}, DECLARED, "no record `control`"),
        ({"control": of(1.0, 2.0), "metrics": {"num-steps": 3}}, DECLARED, "other shapes and types"),
        ({"control": of(1, 2, 3, dtype=np.int64), "metrics": {"num-steps": 3}}, DECLARED, "other shapes and types"),
        ({"control": of(1, np.inf, 3), "metrics": {"num-steps": 3}}, DECLARED, "not finite numbers in the record `co"),
        ({"control": MetricRecord({"x": 1}), "metrics": {"num-steps": 3}}, DECLARED, "`control` that is no Array"),
        ({"control": ArrayRecord({"b": CONTROL["weight"]}), "metrics": {"num-steps": 3}}, DECLARED, "other arrays"),
        ({"client": CONTROL}, Extras(), "`client` that is no ConfigRecord"),
        ({"more": MetricRecord({"x": [1.0, float("nan")]})}, Extras({"more": MetricRecord}), "infinite metrics in"),
        ({"more": of(*range(99_999))}, Extras({"more": ArrayRecord}), "larger than the model"),
        ({"more": of(*range(99))}, Extras({"more": ArrayRecord}), None),
        ({"more": of("x", dtype="<U1")}, Extras({"more": ArrayRecord}), "not finite numbers"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_key(changed, extras, fault):
    found = update_fault(reply(**changed), SENT, extras=extras)

    assert found is None if fault is None else fault in found
    assert "kowalski" not in (found or "")


def test_evaluations_may_hold_more_metrics_and_no_more_records():
    good = Evaluation(0.5, 0.9, 10, torch.zeros(10))

    def fault(**records):
        metrics = MetricRecord(dict(evaluation_metrics(good, good)) | {"auc": 0.7})
        held = RecordDict({"metrics": metrics, **records})
        return evaluation_fault(Message(held, reply_to=Message(RecordDict(), dst_node_id=1, message_type="evaluate")))

    assert fault() is None
    assert "`more`" in fault(more=ConfigRecord({"x": 1}))


@pytest.mark.parametrize(("weighting", "mean"), [("num-examples", 2.7), ("equal-weight", 2.0)])
def test_the_mean_of_a_further_metric_is_weighted_as_the_weights_are(make_grid, weighting, mean):
    strategy = CheckedRounds(FedAvg(weighted_by_key=weighting, **TAKING_PART), num_clients=3)
    grid = make_grid()
    questions = list(strategy.configure_train(1, SENT, ConfigRecord(), grid))
    grid.push_messages(questions)
    replies = []
    for question, number, value in zip(questions, (1, 1, 8), (1.0, 2.0, 3.0), strict=True):
        metrics = MetricRecord(dict(training_metrics(number, 0.5)) | {"grad_norm": value})
        replies.append(Message(RecordDict({"arrays": CONTROL, "metrics": metrics}), reply_to=question))

    _, metrics = strategy.aggregate_train(1, replies)

    # (1 x 1 + 1 x 2 + 8 x 3) / 10 = 2.7, and without weights (1 + 2 + 3) / 3 = 2.
    assert strategy.extra_metrics[1]["train"] == {"grad_norm": pytest.approx(mean)}
    assert metrics["grad_norm"] == pytest.approx(mean)


def test_where_noise_protects_updates_nothing_more_is_asked_for_or_accepted(make_grid):
    noised = with_noise(FedAvg(**TAKING_PART), "fixed", noise_multiplier=1.0, clipping_norm=1.0, num_selected=3)
    strategy = CheckedRounds(noised, num_clients=3)
    grid = make_grid()
    questions = list(strategy.configure_train(1, SENT, ConfigRecord(), grid))
    grid.push_messages(questions)
    replies = []
    for place, question in enumerate(questions):
        metrics = MetricRecord(dict(training_metrics(5, 0.5)) | ({} if place else {"auc": 0.7}))
        replies.append(Message(RecordDict({"arrays": CONTROL, "metrics": metrics}), reply_to=question))

    strategy.aggregate_train(1, replies)

    assert [row["reason"] for row in strategy.refusals[1].rows()] == [
        "Refused: a metric `auc`, which neither noise nor withheld counts protect."
    ]
    assert strategy.extra_metrics == {}
    with pytest.raises(ConfigError, match="Variates asks clients for 'control'"):
        CheckedRounds(Variates(), num_clients=3, accept_extras=False)


def test_a_further_metric_of_evaluations_is_weighted_by_images_where_the_rounds_weight_is_not_told():
    contents = []
    for number, value in ((1, 1.0), (3, 2.0), (0, 9.0)):
        told = Evaluation(0.5, 0.5, number, torch.zeros(number))
        contents.append(RecordDict({"metrics": MetricRecord(dict(evaluation_metrics(told, told)) | {"auc": value})}))

    assert take_means(contents, EVALUATED, "steps") == {"auc": pytest.approx(1.75)}
    assert take_means(contents[2:], EVALUATED, "steps") == {"auc": 0.0}
