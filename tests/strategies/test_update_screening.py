import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fgl_app.errors import RoundError
from fgl_app.records import evaluation_metrics, training_metrics
from fgl_app.training import Evaluation
from strategies import CheckedRounds
from strategies.inner import build_inner
from strategies.screening import evaluation_fault, update_fault
from strategies.updates import values_of

SENT = ArrayRecord({"weight": Array(np.zeros((2, 3), np.float32)), "count": Array(np.array(3))})


def reply(arrays=None, metrics=None, more=None):
    question = Message(RecordDict(), dst_node_id=1, message_type="train")
    content = {
        "arrays": ArrayRecord(
            {"weight": Array(np.ones((2, 3), np.float32)), "count": Array(np.array(4))} | (arrays or {})
        ),
        "metrics": MetricRecord(dict(training_metrics(8, 0.5)) | (metrics or {})),
        **(more or {}),
    }
    return Message(RecordDict(content), reply_to=question)


def array(value, dtype=np.float32):
    return Array(np.array(value, dtype))


def forged(data, shape=(2, 3)):
    return Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=data)


def test_an_honest_update_passes():
    assert update_fault(reply(), SENT) is None
    assert update_fault(reply(more={"client": ConfigRecord({"partition-id": 0})}), SENT) is None


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"arrays": {"weight": array(np.ones((3, 2)))}}, "shapes and types"),
        ({"arrays": {"weight": array(np.ones((2, 3)), np.float64)}}, "shapes and types"),
        ({"arrays": {"count": array(4.0)}}, "shapes and types"),
        ({"arrays": {"other": array([1.0])}}, "not the model's"),
        ({"arrays": {"weight": forged(b"no array")}}, "shapes and types"),
        ({"arrays": {"weight": forged(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'shape': (999999999999,)}")}}, "shapes"),
        ({"arrays": {"weight": forged(b"x" * 100_000)}}, "shapes and types"),
        ({"arrays": {"weight": Array("float32", (2**40,), "numpy.ndarray", b"")}}, "none of Flower's"),
        ({"arrays": {"weight": Array("\ud800", (2, 3), "numpy.ndarray", b"")}}, "none of Flower's"),
        ({"more": {"client": ConfigRecord({"number": 2**70})}}, "none of Flower's"),
        ({"arrays": {"weight": array([[np.nan, 0, 0], [0, 0, 0]])}}, "not finite"),
        ({"arrays": {"weight": array([[np.inf, 0, 0], [0, 0, 0]])}}, "not finite"),
        ({"metrics": {"num-examples": 0}}, "out of range"),
        ({"metrics": {"num-examples": 10**12}}, "out of range"),
        ({"metrics": {"num-examples": 8.5}}, "other types"),
        ({"metrics": {"loss": float("nan")}}, "not finite"),
        ({"metrics": {"loss": [1.0, 2.0]}}, "other types"),
        ({"metrics": {"loss": 1.7e308}}, "a loss or an accuracy that is out of range"),
        ({"metrics": {"loss": 1.1e9}}, "a loss or an accuracy that is out of range"),
        ({"metrics": {"train_loss": -1.0}}, "a loss or an accuracy that is out of range"),
        ({"metrics": {"one-more": float("nan")}}, "`one-more` that is not finite"),
        ({"more": {"second": MetricRecord({"num-examples": 1})}}, "`second` that the strategy does not declare"),
        ({"more": {"second": ArrayRecord({"weight": array([1.0])})}}, "`second` that the strategy does not declare"),
    ],
)
def test_an_update_that_breaks_a_rule_is_named(changed, fault):
    assert fault in update_fault(reply(**changed), SENT)


def test_a_variance_below_zero_is_refused_and_a_mean_below_zero_is_not():
    sent = ArrayRecord({"bn.running_mean": array([0.0]), "bn.running_var": array([1.0])})

    def told(mean: float, variance: float) -> str | None:
        answer = reply()
        answer.content["arrays"] = ArrayRecord({"bn.running_mean": array([mean]), "bn.running_var": array([variance])})
        return update_fault(answer, sent)

    assert told(-1.0, 0.0) is None
    assert told(0.0, -1e-3) == "variances below 0"


def test_the_norm_of_an_update_is_bounded():
    # Six weights go from 0 to 2: the norm is sqrt(6 * 4) = 4.899; the integer does not count.
    found = reply(arrays={"weight": array(np.full((2, 3), 2.0)), "count": array(10**6, np.int64)})

    assert update_fault(found, SENT, 4.9) is None
    assert "max-update-norm" in update_fault(found, SENT, 4.89)


def test_weights_may_grow_tenfold_unless_a_norm_is_set_and_statistics_more_in_any_case():
    sent = ArrayRecord({"weight": array([3.0, 4.0]), "bn.running_var": array([3.0, 4.0])})  # norms of 5

    def told(weight: float, variance: float, max_norm: float = 0.0) -> str | None:
        answer = reply()
        answer.content["arrays"] = ArrayRecord(
            {"weight": array([weight, 0.0]), "bn.running_var": array([variance, 0.0])}
        )
        return update_fault(answer, sent, max_norm)

    assert told(49.9, 4999.0) is None
    assert "more than 10 times" in told(-50.1, 5.0)
    assert "more than 1000 times" in told(5.0, 5001.0)
    # (3, 4) becomes (50.1, 0) and (3, 0): sqrt(47.1^2 + 4^2) = 47.27 and 4; what the variance does is not in the norm.
    assert told(50.1, 4999.0, max_norm=47.3) is told(3.0, 4999.0, max_norm=4.01) is None
    assert "max-update-norm" in told(50.1, 5.0, max_norm=47.2)
    assert "more than 1000 times" in told(50.1, 5001.0, max_norm=1e4)
    # From zeros, as biases begin, the norm counts as 1.
    assert update_fault(reply(arrays={"weight": array(np.full((2, 3), 4.0))}), SENT) is None  # 4 * sqrt(6) = 9.8


def test_an_evaluation_that_is_none_is_named():
    good = Evaluation(0.5, 0.9, 10, torch.zeros(10))
    record = evaluation_metrics(good, good)

    def fault(**changed):
        content = RecordDict({"metrics": MetricRecord(dict(record) | changed)})
        return evaluation_fault(
            Message(content, reply_to=Message(RecordDict(), dst_node_id=1, message_type="evaluate"))
        )

    assert fault() is None
    assert fault(loss=0.0) is fault(loss=1e9) is None
    assert "accuracy" in fault(accuracy=1.5)
    assert "out of range" in fault(loss=1.7e308)  # the mean of two would be infinite
    assert "out of range" in fault(loss=-1e-9)
    assert "not finite" in fault(loss=float("inf"))
    assert "out of range" in fault(**{"num-validation": -1})


shapes = st.sampled_from([(2, 3), (3, 2), (), (6,)])
arrays = st.one_of(
    hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64]), shapes).map(Array),
    hnp.arrays(np.float32, (2, 3), elements=st.floats(width=32)).map(Array),
    st.binary(max_size=200).map(forged),
)
numbers = st.integers(-(2**62), 2**62) | st.floats() | st.lists(st.floats(), max_size=2)


HONEST = Array(np.arange(6, dtype=np.float32).reshape(2, 3)).data


@st.composite
def damaged_files(draw):
    """An array's file with a few bytes changed, or cut off; or with a header of one's own."""
    if draw(st.booleans()):
        header = f"{{'descr': {draw(descriptions)}, 'fortran_order': {draw(st.booleans())}, 'shape': {draw(shapes)}, }}"
        header = header.ljust(118 - 1) + "\n"
        return b"\x93NUMPY" + bytes([draw(st.sampled_from([1, 2, 3])), 0]) + b"v\x00" + header.encode() + HONEST[-24:]
    data = bytearray(HONEST)
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[place] = value
    return bytes(data[: draw(st.sampled_from([len(data)] * 3 + [130, 60, 9, 0]))])


descriptions = st.sampled_from(["'<f4'", "'>f4'", "'|O'", "'<f8'", "[('x', '<f4')]", "'<U1'", "'|S4'", "'<M8[s]'", "4"])
shapes = st.sampled_from([(2, 3), (3, 2), (-1, 3), (-2, -3), (6,), (), (0,), (2, 3, 1), (True, 6), (2**62, 4), "x"])


@given(damaged_files())
def test_an_update_that_passes_is_read_alike_by_flower(data):
    found = reply(arrays={"weight": forged(data)})

    if update_fault(found, SENT, 1e9) is None:
        array = found.content["arrays"]["weight"]
        assert np.array_equal(array.numpy(), values_of(array))
        assert array.numpy().shape == (2, 3)


@given(
    st.dictionaries(st.sampled_from(["weight", "count", "other"]), arrays, max_size=3),
    st.dictionaries(st.sampled_from(["num-examples", "loss", "equal-weight", "other"]), numbers, max_size=3),
    st.sampled_from([0.0, 1.0, 100.0]),
)
def test_whatever_arrives_only_an_update_that_keeps_every_rule_passes(changed, metrics, max_norm):
    found = reply(arrays=changed, metrics=metrics)

    if update_fault(found, SENT, max_norm) is None:
        record = found.content["arrays"]
        weight = record["weight"].numpy()
        assert set(record) == {"weight", "count"}
        assert (weight.shape, weight.dtype) == ((2, 3), np.dtype(np.float32))
        assert np.isfinite(weight).all()
        assert np.linalg.norm(weight.astype(np.float64)) <= (max_norm or 10.0) * (1 + 1e-6)  # of zeros that were sent
        assert (record["count"].numpy().shape, record["count"].numpy().dtype) == ((), np.dtype(np.int64))
        assert 1 <= found.content["metrics"]["num-examples"] <= 10_000_000


class Tampering:
    """A grid whose first client sends other weights than it trained."""

    def __init__(self, grid, change):
        self._grid, self._change = grid, change

    def send_and_receive(self, messages, *, timeout=None):
        replies = sorted(self._grid.send_and_receive(messages, timeout=timeout), key=lambda m: m.metadata.src_node_id)
        for reply in replies[:1]:
            reply.content["arrays"] = self._change(reply.content["arrays"])
        return replies

    def __getattr__(self, name):
        return getattr(self._grid, name)


def scaled(factor):
    return lambda arrays: ArrayRecord({name: Array(value.numpy() * factor) for name, value in arrays.items()})


def huge(arrays):
    """Finite weights whose mean is finite as well, and whose loss is NaN."""
    return ArrayRecord({name: Array(np.full_like(value.numpy(), 3e38)) for name, value in arrays.items()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scaled(np.float32("nan")), "weights that are not finite"),
        (huge, "weights more than 10 times as large as those that it was sent"),
        (scaled(np.float32(1e3)), "weights more than 10 times as large as those that it was sent"),
    ],
)
def test_a_hostile_update_is_dropped_and_the_round_goes_on_without_it(make_grid, settings, change, reason):
    from fgl_app.phases import initial_arrays

    start = initial_arrays(settings, settings.card.class_names())
    grids = make_grid(), make_grid()
    del grids[1].node_configs[1000]
    found = []
    for grid, clients in (Tampering(grids[0], change), 3), (grids[1], 2):
        inner = build_inner("FedAvg", "", num_selected=2, weighting="examples", evaluate_on_clients=False)
        strategy = CheckedRounds(inner, num_clients=clients)
        found.append((strategy, strategy.start(grid, start, num_rounds=1).arrays))

    assert found[0][0].refusals[1].rows() == [
        {"client": 0, "node": "1000", "reason": f"Refused: {reason}.", "count": 1}
    ]
    assert found[0][1]["9.weight"].numpy().tobytes() == found[1][1]["9.weight"].numpy().tobytes()


@pytest.mark.parametrize(
    ("strategy", "options", "weight"),
    [
        ("FedAvg", "", 2.6),  # (0.9 + 1 + 1 + 1.1 + 9) / 5: what a plain mean makes of it
        ("FedMedian", "", 1.0),
        ("FedTrimmedAvg", "beta=0.2", 3.1 / 3),  # without one from below and one from above
        ("Krum", "num-malicious-nodes=1", 1.0),  # the one whose nearest others are nearest
    ],
)
def test_a_hostile_update_within_the_bound_has_no_influence_under_a_robust_mean(make_grid, strategy, options, weight):
    inner = build_inner(strategy, options, num_selected=5, weighting="uniform", evaluate_on_clients=False)
    rounds = CheckedRounds(inner, num_clients=5)
    sent = ArrayRecord({"weight": array([1.0, 1.0])})
    grid = make_grid(num_clients=5)
    questions = list(rounds.configure_train(1, sent, ConfigRecord(), grid))
    grid.push_messages(questions)
    replies = []
    for question, value in zip(questions, (0.9, 1.0, 1.0, 1.1, 9.0), strict=True):
        content = {"arrays": ArrayRecord({"weight": array([value, value])}), "metrics": training_metrics(10, 0.5)}
        replies.append(Message(RecordDict(content), reply_to=question))

    found, _ = rounds.aggregate_train(1, replies)

    assert rounds.refusals[1].rows() == []  # nothing about it can be refused by a rule
    assert found["weight"].numpy() == pytest.approx(weight, abs=1e-6)


def test_updates_that_leave_fewer_than_the_quorum_end_the_run(make_grid, settings):
    from fgl_app.phases import initial_arrays

    inner = build_inner("FedAvg", "", num_selected=3, weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=3, min_clients=3, max_update_norm=1e-9)

    with pytest.raises(
        RoundError, match=r"at least 3 of 3 clients must succeed, but 3 of 3 failed: Refused: an update"
    ):
        strategy.start(make_grid(), initial_arrays(settings, settings.card.class_names()), num_rounds=1)
