import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fgl_app.checks import check_settings
from fgl_app.config import parse_run_config
from fgl_app.errors import ConfigError
from fgl_app.phases import initial_arrays
from fgl_app.records import training_metrics
from strategies import CheckedRounds
from strategies.differential_privacy import with_noise
from strategies.inner import build_inner, strategy_names

KINDS = ("fixed", "adaptive", "client-fixed", "client-adaptive")


def build(kind, *, noise=1.0, clip=1.0, clients=3, name="FedAvg", **options):
    inner = build_inner(name, "", num_selected=clients, weighting="uniform", evaluate_on_clients=False)
    noised = with_noise(inner, kind, noise_multiplier=noise, clipping_norm=clip, num_selected=clients)
    return CheckedRounds(noised, num_clients=clients, **options)


def weights(values):
    return ArrayRecord({"weight": Array(np.asarray(values, np.float32))})


def answer(strategy, grid, sent, updates, number=1, bits=None):
    """Have each client answer the round's question with the weights that it was sent plus its update."""
    questions = list(strategy.configure_train(number, sent, ConfigRecord(), grid))
    grid.push_messages(questions)
    replies = []
    for place, question in enumerate(questions):
        if updates[place] is None:
            continue
        metrics = MetricRecord(dict(training_metrics(10 + place, 0.5)))
        if bits is not None:
            metrics["norm_bit"] = bits[place]
        content = RecordDict({"arrays": weights(sent["weight"].numpy() + updates[place]), "metrics": metrics})
        replies.append(Message(content, reply_to=question))
    return strategy.aggregate_train(number, replies)[0]["weight"].numpy()


def flat(arrays):
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_real_clients_train_with_noise_that_differs_under_one_seed(make_grid, settings, kind):
    start = initial_arrays(settings, settings.card.class_names())
    overrides = {"client_dp": kind, "weighting": "uniform"}

    moved = [
        flat(build(kind, clip=0.5).start(make_grid(**overrides), start, num_rounds=1).arrays) - flat(start)
        for _ in range(2)
    ]

    assert not np.array_equal(*moved)
    # The noise of each weight is z C / m = 1/6, up to 2 / sqrt(3) of it where the norm adapts, too; the mean of the
    # updates is at most 0.5 in all, next to nothing beside it.
    deviation = 0.5 / 3 * (2 / math.sqrt(3) if "adaptive" in kind else 1.0)
    assert moved[0].std() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_no_update_moves_the_mean_by_more_than_the_clipping_norm(make_grid, settings, kind):
    start = initial_arrays(settings, settings.card.class_names())
    grid = make_grid(client_dp=kind, weighting="uniform")

    arrays = build(kind, noise=1e-9, clip=0.05).start(grid, start, num_rounds=1).arrays

    assert 0 < np.linalg.norm(flat(arrays) - flat(start)) <= 0.05 * (1 + 1e-3)


def test_the_noise_fits_the_replies_that_came(make_grid):
    sent, still = weights(np.zeros(200_000)), np.full(200_000, 1e-9)
    grid = make_grid(num_clients=4)

    all_came = answer(build("fixed", clients=4), grid, sent, [still] * 4)
    half_came = answer(build("fixed", clients=4), grid, sent, [still, None, still, None])

    assert all_came.std() == pytest.approx(1 / 4, rel=0.02)
    assert half_came.std() == pytest.approx(1 / 2, rel=0.02)


def test_updates_themselves_are_not_measured(make_grid):
    strategy = build("fixed", clients=2)

    answer(strategy, make_grid(num_clients=2), weights(np.zeros(2)), [np.ones(2), np.ones(2)])

    assert strategy.update_metrics == {}
    assert strategy.draws == {1: (2, 2)}


def test_an_update_of_zero_is_refused_and_stops_nobody(make_grid):
    strategy = build("fixed", clients=2, noise=1e-9)

    mean = answer(strategy, make_grid(num_clients=2), weights([0.0]), [np.zeros(1), np.ones(1)])

    assert mean == pytest.approx([1.0], abs=1e-6)
    assert strategy.refusals[1].reasons() == ["Refused: weights that have not changed."]


def test_arrays_are_clipped_by_their_names_in_whatever_order_a_client_sends_them(make_grid):
    sent = ArrayRecord({name: Array(np.full(2, value, np.float32)) for name, value in (("a", 0), ("b", 10))})
    strategy, grid = build("fixed", clients=2, noise=1e-9, clip=100.0), make_grid(num_clients=2)
    questions = list(strategy.configure_train(1, sent, ConfigRecord(), grid))
    grid.push_messages(questions)
    replies = []
    for question in questions:
        turned = ArrayRecord({"b": Array(np.full(2, 11, np.float32)), "a": Array(np.full(2, 1, np.float32))})
        replies.append(Message(RecordDict({"arrays": turned, "metrics": training_metrics(1, 0.5)}), reply_to=question))

    mean = strategy.aggregate_train(1, replies)[0]

    assert {name: array.numpy().round(4).tolist() for name, array in mean.items()} == {"a": [1, 1], "b": [11, 11]}


@pytest.mark.parametrize("kind", ["adaptive", "client-adaptive"])
def test_the_norm_rises_where_all_updates_are_clipped_and_falls_where_none_is(make_grid, kind):
    def norm_after(size):
        strategy = build(kind, noise=1e-9, clients=2)
        clipped = min(size, 1.0)
        updates = [np.array([size if kind == "adaptive" else clipped])] * 2
        bits = [int(size > 1)] * 2 if kind == "client-adaptive" else None
        answer(strategy, make_grid(num_clients=2), weights([0.0]), updates, bits=bits)
        return strategy.inner.clipping_norm

    # C exp(-eta (b - gamma)) with eta 0.2 and gamma 0.5, where b, the share that was not clipped, is 0 or 1; the noise
    # on b, one in twenty clients, moves the exponent by 0.2 x 0.1 / 2.
    assert norm_after(5.0) == pytest.approx(math.exp(0.1), rel=0.06)
    assert norm_after(0.5) == pytest.approx(math.exp(-0.1), rel=0.06)


def test_the_noise_is_that_of_the_norm_that_clipped_and_not_of_the_next_one(make_grid):
    strategy = build("adaptive", noise=1.0, clients=2)
    strategy.inner.clip_norm_lr = 10.0  # the next norm is far away

    moved = answer(strategy, make_grid(num_clients=2), weights(np.zeros(200_000)), [np.full(200_000, 1e-9)] * 2)

    assert moved.std() == pytest.approx(2 / math.sqrt(3) / 2, rel=0.02)


@pytest.mark.parametrize("kind", ["adaptive", "client-adaptive"])
def test_a_new_start_goes_on_with_the_norm_that_was_reached(make_grid, kind):
    first, second = build(kind), build(kind, rounds_done=1)
    first.inner.clipping_norm = 0.123456789

    second.restore(first.memory())

    assert second.inner.clipping_norm == 0.123456789


def test_the_draw_of_the_clients_is_secret_without_a_seed(make_grid):
    def drawn():
        grid = make_grid(num_clients=12, partition="iid")
        strategy = build("fixed", clients=12, fraction_train=0.5, seed=None)
        strategy.inner.strategy.min_train_nodes = strategy.inner.strategy.min_available_nodes = 6
        questions = strategy.configure_train(1, weights([0.0]), ConfigRecord(), grid)
        assert strategy.draws == {1: (6, 12)}
        return tuple(sorted(question.metadata.dst_node_id for question in questions))

    assert len({drawn() for _ in range(5)}) > 1


@pytest.mark.parametrize("name", sorted(set(strategy_names()) - {"FedAvg", "FedProx", "QFedAvg", "Bulyan"}))
def test_strategies_that_do_more_than_take_the_mean_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} does not. Use FedAvg or FedProx"):
        build("fixed", name=name)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"client-dp": "fixed", "model": "resnet18", "weighting": "uniform"}, "resnet18 has .*Use model=cnn"),
        ({"example-dp-noise": 1.0, "model": "resnet18"}, "`example-dp-noise` is set.*Use model=cnn"),
        ({"example-dp-noise": 1.0, "model": "convnext_tiny", "image-size": 32}, "a `model` without dropout"),
        ({"client-dp": "fixed"}, "`weighting` must be uniform"),
        ({"client-dp": "fixed", "weighting": "uniform", "client-dp-noise": 0.0}, "`client-dp-noise` must be > 0"),
        ({"client-dp": "fixed", "weighting": "uniform", "strategy": "FedAdam"}, "Use FedAvg or FedProx"),
        ({"example-dp-noise": 1.0, "method": "centralized"}, "has no clients"),
        ({"example-dp-noise": 1.0, "strategy": "QFedAvg"}, "losses, which are withheld"),
    ],
)
def test_settings_under_which_the_guarantee_would_not_hold_are_refused(run_config, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_settings(parse_run_config(run_config | overrides))
