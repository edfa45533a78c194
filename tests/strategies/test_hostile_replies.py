"""Whole replies that hold anything which Flower's records can hold, through the rounds as they are."""

import contextlib
import json
import re
import zlib

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fgl_app.errors import PromptError
from fgl_app.prompts import PromptLimits
from fgl_app.records import evaluation_metrics, training_metrics
from fgl_app.training import Evaluation
from strategies import CheckedRounds
from strategies.inner import build_inner
from strategies.prompt_round import PromptRound

CANARY = "canary: kowalski"
LIMITS = PromptLimits(max_prompts=5, max_chars=30, blocked_words=("blocked",))

integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.booleans() | integers | st.floats() | st.sampled_from([CANARY, "", "\ud800"])
values = st.one_of(
    scalars,
    st.binary(max_size=20),
    st.lists(st.integers(0, 9), max_size=2),
    st.lists(st.floats(), max_size=2),
    st.just([CANARY]),
)
names = st.sampled_from(["cat", "dog", "cow", CANARY])
rows = st.one_of(
    st.tuples(names, st.integers(-1, 10**10), st.sampled_from(["a cat", CANARY, "blocked", "x" * 31]) | st.text()),
    st.tuples(names, st.just(1), st.just("a dog"), st.sampled_from(["sketch", CANARY])),
    st.lists(scalars, max_size=4),
)
payloads = st.one_of(
    st.binary(max_size=50),
    st.lists(rows, max_size=8).map(lambda found: zlib.compress(json.dumps(found).encode())),
)
array_records = st.dictionaries(st.sampled_from(["weight", CANARY]), st.binary(max_size=99), max_size=2).map(
    lambda found: ArrayRecord({key: Array("float32", (2,), "numpy.ndarray", data) for key, data in found.items()})
)
metric_names = st.sampled_from(
    ["num-examples", "equal-weight", "loss", "accuracy", "num-validation", "validation_accuracy", "train_loss", CANARY]
)
extremes = st.sampled_from([1.7e308, -1.7e308, -1.0, -5e-324, 1.1e9])
metric_values = st.one_of(integers, st.floats(), st.floats(0, 1), extremes, st.lists(st.floats(), max_size=2))
NOBODYS = Evaluation(0.5, 0.75, 4, torch.zeros(4))
metric_records = st.dictionaries(metric_names, metric_values, max_size=7).map(MetricRecord)
config_records = st.dictionaries(
    st.sampled_from(["payload", "embeddings", "partition-id", "num-unreadable", CANARY]), values, max_size=4
).map(ConfigRecord)
prompt_records = st.builds(
    lambda payload, more: ConfigRecord(more | {"payload": payload}),
    payloads,
    st.dictionaries(st.just("embeddings"), values, max_size=1),
)
any_record = st.one_of(config_records, prompt_records, metric_records, array_records)
contents = st.dictionaries(
    st.sampled_from(["prompts", "client", "metrics", "arrays", CANARY]), any_record, max_size=4
).map(RecordDict)
prompt_contents = contents | st.fixed_dictionaries(
    {"prompts": prompt_records}, optional={"client": config_records, "metrics": metric_records}
).map(RecordDict)


def nearly_right(**records):
    """Build contents that hold the right records but for one, which may have other keys or be another."""

    def changed(name, record):
        if not isinstance(record, MetricRecord):
            return any_record
        keys = st.dictionaries(metric_names, metric_values, max_size=2)
        return any_record | keys.map(lambda more: MetricRecord(dict(record) | more))

    return (
        st.sampled_from(sorted([*records, CANARY]))
        .flatmap(
            lambda name: (
                st.just(records) | changed(name, records.get(name)).map(lambda record: records | {name: record})
            )
        )
        .map(RecordDict)
    )


def extreme(metrics, **records):
    """Build contents that are right but for the size of some of their measures."""
    measures = sorted(key for key, value in metrics.items() if isinstance(value, float))
    changed = st.dictionaries(st.sampled_from(measures), extremes, min_size=1)
    return changed.map(lambda more: RecordDict(records | {"metrics": MetricRecord(dict(metrics) | more)}))


class Answers:
    """A grid of clients that answer with what a test made up."""

    def __init__(self, contents, **by_message_type):
        self._contents, self._by_message_type = contents, by_message_type
        self._open = {}

    def get_node_ids(self):
        return [1000 + place for place in range(len(self._contents))]

    def push_messages(self, messages):
        for message in messages:
            node = message.metadata.dst_node_id
            answers = self._by_message_type.get(message.metadata.message_type, self._contents)
            message.metadata.__dict__["_message_id"] = str(node)
            self._open[str(node)] = Message(answers[node - 1000], reply_to=message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        return [self._open.pop(name) for name in list(message_ids) if name in self._open]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


@given(st.lists(prompt_contents, min_size=1, max_size=3), st.booleans(), st.sampled_from([1, 2]))
def test_whatever_replies_arrive_only_prompts_that_keep_every_rule_are_merged(sent, own_classes, senders):
    class_names = () if own_classes else ("cat", "dog")
    grid = Answers(sent)
    exchange = PromptRound(
        grid, LIMITS, class_names=class_names, domains=("sketch",), min_senders=senders, max_client_share=0.7,
        deadline_s=0.0,
    )  # fmt: skip
    exchange.ask(grid.get_node_ids())
    exchange.wait()

    assert exchange.num_used <= exchange.num_asked == len(sent)
    refused = exchange.report()["refused"]
    assert exchange.num_used + len({row["node"] for row in refused}) >= len(sent)  # who is left out is named
    assert "kowalski" not in json.dumps(exchange.report())
    merged = None
    with contextlib.suppress(PromptError):  # the clients' own classes are fewer than two
        merged = exchange.merged()
    assert merged or own_classes
    for item in merged.prompts if merged else ():
        assert 0 <= item.label < len(merged.class_names)
        assert 1 <= item.count <= 3 * 10**9
        assert 1 <= len(item.prompt) <= 30
        assert "blocked" not in re.findall(r"\w+", item.prompt.lower())
        assert item.domain in ("", "sketch")


SENT, MOVED = (ArrayRecord({"weight": Array(np.full(2, value, np.float32))}) for value in (1, 2))
CLIENT = ConfigRecord({"partition-id": 0, "num-unreadable": 0})
TRAINED = {"arrays": MOVED, "metrics": training_metrics(3, 0.5), "client": CLIENT}
EVALUATED = {"metrics": evaluation_metrics(NOBODYS, NOBODYS), "client": CLIENT}


@given(
    contents | nearly_right(**TRAINED) | extreme(**TRAINED),
    contents | nearly_right(**EVALUATED) | extreme(**EVALUATED),
    st.sampled_from([("FedAvg", ""), ("QFedAvg", "client-learning-rate=1")]),
)
def test_whatever_replies_arrive_a_round_ends_with_the_honest_ones(trained, evaluated, strategy):
    name, options = strategy
    grid = Answers([RecordDict(TRAINED), trained], evaluate=[RecordDict(EVALUATED), evaluated])
    inner = build_inner(name, options, num_selected=2, weighting="examples", evaluate_on_clients=True)
    strategy = CheckedRounds(inner, num_clients=2, min_clients=1)

    found = strategy.start(grid, SENT, num_rounds=1).arrays["weight"].numpy()

    rows = strategy.refusals[1].rows()
    assert {row["node"] for row in rows} <= {"1001"}  # no honest reply is refused
    assert "kowalski" not in json.dumps(rows)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) <= 10 * np.linalg.norm([1, 1])
    (metrics,) = strategy.client_metrics.values()
    assert 0 <= metrics["accuracy"] <= 1
    assert np.isfinite(metrics["loss"])
