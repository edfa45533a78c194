"""Real models with BatchNorm through every strategy: what is trained decides, and the statistics stay statistics."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fgl_app.models import build_model, to_arrays
from fgl_app.records import training_metrics
from strategies import CheckedRounds
from strategies.inner import build_inner, strategy_names
from strategies.updates import trained_names

OPTIONS = {"QFedAvg": "client-learning-rate=0.01", "Bulyan": "num-malicious-nodes=1"}
COUNTED = "num_batches_tracked"


@pytest.fixture(scope="module")
def small():
    return model("shufflenet_v2_x0_5")


def model(name):
    built = build_model(name, 2, 32, seed=0)
    return to_arrays(built), frozenset(key for key, _ in built.named_parameters())


def trained(sent, names, *, steps, norm, seed):
    """Move a model's weights by ``norm``, its running means and variances as far as training does, and count steps."""
    generator = np.random.default_rng(seed)
    moves = {name: generator.standard_normal(sent[name].shape, np.float32) for name in names}
    scale = np.float32(norm / sum(float(np.vdot(move, move)) for move in moves.values()) ** 0.5)
    arrays = {}
    for name, array in sent.items():
        before = array.numpy()
        if name in names:
            arrays[name] = before + scale * moves[name]
        elif name.endswith(COUNTED):
            arrays[name] = before + steps
        else:
            arrays[name] = (before + generator.uniform(0.0, steps / 10, before.shape)).astype(np.float32)
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def one_round(make_grid, sent, names, models, strategy, options=""):
    return aggregate(make_grid, sent, models, strategy, options, parameters=names)[0]


def aggregate(make_grid, sent, models, strategy, options="", **rules):
    inner = build_inner(strategy, options, num_selected=len(models), weighting="uniform", evaluate_on_clients=False)
    rounds = CheckedRounds(inner, num_clients=len(models), **rules)
    grid = make_grid(num_clients=len(models))
    questions = list(rounds.configure_train(1, sent, ConfigRecord(), grid))
    grid.push_messages(questions)
    by_node = sorted(questions, key=lambda question: question.metadata.dst_node_id)
    replies = [
        Message(RecordDict({"arrays": arrays, "metrics": training_metrics(9, 0.5)}), reply_to=question)
        for question, arrays in zip(by_node, models, strict=True)
    ]
    return rounds.aggregate_train(1, replies)[0], rounds.refusals[1].reasons()


def scores(models, names, num_malicious):
    """Krum's score of each model: the sum of the squared distances to its n - f - 2 nearest others."""
    count = len(models)
    squares = np.zeros((count, count))
    for name in names:
        flat = np.stack([arrays[name].numpy().ravel().astype(np.float64) for arrays in models])
        for one in range(count):
            squares[one] += ((flat - flat[one]) ** 2).sum(axis=1)
    nearest = [np.sort(np.delete(row, one))[: count - num_malicious - 2] for one, row in enumerate(squares)]
    return [float(row.sum()) for row in nearest]


def same(found, expected):
    return all(found[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)


def test_krum_returns_an_honest_resnet_and_not_one_that_took_a_middling_number_of_steps(make_grid):
    sent, names = model("resnet18")
    models = [trained(sent, names, steps=steps, norm=3.3, seed=steps) for steps in (10, 20, 32, 40, 50)] + [
        trained(sent, names, steps=36, norm=50.3, seed=99)
    ] * 2

    found = one_round(make_grid, sent, names, models, "Krum", "num-malicious-nodes=2")

    best = int(np.argmin(scores(models, names, 2)))
    assert best < 5
    assert same(found, models[best])  # its statistics go with its weights, to the last bit
    assert list(found) == list(sent)
    # By all arrays, as Flower would measure, a hostile model is the best one.
    assert np.argmin(scores(models, sent, 2)) >= 5


@pytest.mark.parametrize(
    ("honest", "hostile", "num_selected"),
    [((8, 24, 31, 47), 1, 2), ((5, 15, 30, 45, 60), 2, 3), ((12, 14, 33, 70, 90, 95), 2, 4)],
)
def test_multikrum_takes_the_mean_of_those_with_the_lowest_scores(make_grid, small, honest, hostile, num_selected):
    sent, names = small
    middle = int(np.median(honest))
    models = [trained(sent, names, steps=middle, norm=40.0, seed=99)] * hostile + [
        trained(sent, names, steps=steps, norm=1.0 + steps / 100, seed=steps) for steps in honest
    ]
    options = f"num-malicious-nodes={hostile} num-nodes-to-select={num_selected}"

    found = one_round(make_grid, sent, names, models, "MultiKrum", options)

    chosen = np.argsort(scores(models, names, hostile))[:num_selected]
    assert min(chosen) >= hostile
    for name, array in found.items():
        mean = np.mean([models[one][name].numpy().astype(np.float64) for one in chosen], axis=0)
        expected = np.rint(mean) if name.endswith(COUNTED) else mean
        np.testing.assert_allclose(array.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("honest", "hostile"), [(6, 1), (8, 1), (9, 2)])
def test_bulyan_aggregates_the_middle_of_those_with_the_lowest_scores(make_grid, small, honest, hostile):
    sent, names = small
    steps = np.linspace(10, 90, honest).astype(int)
    models = [trained(sent, names, steps=number, norm=1.0 + number / 50, seed=number) for number in steps]
    models += [trained(sent, names, steps=int(np.median(steps)), norm=30.0, seed=99)] * hostile

    found = one_round(make_grid, sent, names, models, "Bulyan", f"num-malicious-nodes={hostile}")

    theta = honest + hostile - 2 * hostile
    chosen = np.argsort(scores(models, names, hostile))[:theta]
    assert max(chosen) < honest
    for name in ("conv1.0.weight", "conv1.1.running_var", "fc.bias", "conv1.1.num_batches_tracked"):
        values = np.stack([models[one][name].numpy().astype(np.float64) for one in chosen]).reshape(theta, -1)
        median = np.median(values, axis=0)
        nearest = np.argsort(np.abs(values - median), axis=0, kind="stable")[: theta - 2 * hostile]
        mean = np.take_along_axis(values, nearest, axis=0).mean(axis=0)
        expected = np.rint(mean) if name.endswith(COUNTED) else mean
        np.testing.assert_allclose(found[name].numpy().ravel(), expected, rtol=1e-4, atol=1e-6)


def test_krum_tells_updates_apart_that_are_small_beside_the_weights(make_grid, small):
    sent, names = small
    sent = ArrayRecord({name: Array(array.numpy() + 30) if name in names else array for name, array in sent.items()})
    models = [trained(sent, names, steps=9, norm=norm, seed=int(norm * 100)) for norm in (0.2, 0.1, 0.4, 0.15, 0.3)]

    found = one_round(make_grid, sent, names, models, "Krum", "num-malicious-nodes=1")

    assert same(found, models[int(np.argmin(scores(models, names, 1)))])


@pytest.mark.parametrize("strategy", strategy_names())
def test_every_strategy_keeps_statistics_apart_from_weights_without_being_told_which_they_are(
    make_grid, small, strategy
):
    sent, names = small
    assert trained_names(sent) == names
    models = [trained(sent, names, steps=steps, norm=1.0, seed=steps) for steps in (4, 6, 9, 11, 15, 20, 31)]

    found = one_round(make_grid, sent, None, models, strategy, OPTIONS.get(strategy, ""))

    assert list(found) == list(sent)
    assert {name: array.dtype for name, array in found.items()} == {name: array.dtype for name, array in sent.items()}
    assert any((found[name].numpy() != sent[name].numpy()).any() for name in names)
    for name in set(sent) - names:  # what no optimizer has stepped lies among what the clients counted
        told = np.stack([arrays[name].numpy() for arrays in models])
        slack = 1e-5 * np.abs(told).max()
        assert (found[name].numpy() >= told.min(axis=0) - slack).all()
        assert (found[name].numpy() <= told.max(axis=0) + slack).all()


@pytest.mark.parametrize("max_norm", [3.5, 12.0])
def test_the_bound_on_updates_is_one_on_what_was_trained(make_grid, small, max_norm):
    sent, names = small
    models = [trained(sent, names, steps=40, norm=norm, seed=1) for norm in (0.9 * max_norm, 1.1 * max_norm)]
    statistics = [name for name in sent if name.endswith(("running_mean", "running_var"))]
    moved = sum(float(((models[0][name].numpy() - sent[name].numpy()) ** 2).sum()) for name in statistics) ** 0.5
    assert moved > 5 * max_norm  # as far as in a real ResNet after some dozen steps

    found, refused = aggregate(make_grid, sent, models, "FedAvg", parameters=names, max_update_norm=max_norm)

    assert same(found, models[0])
    assert refused == ["Refused: an update whose norm is above `max-update-norm`."]
