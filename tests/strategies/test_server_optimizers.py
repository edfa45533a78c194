import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fgl_app.records import training_metrics
from strategies import CheckedRounds
from strategies.inner import build_inner

SERVER_OPTIMIZERS = {
    "FedAdam": "eta=0.1",
    "FedYogi": "eta=0.1",
    "FedAdagrad": "eta=0.1",
    "FedAvgM": "server-learning-rate=0.5 server-momentum=0.9",
    "QFedAvg": "client-learning-rate=0.01",
}
START = {"weight": [1.0, 2.0], "bn.running_var": [1.0, 1.0], "bn.num_batches_tracked": 3}


def arrays_of(values):
    return ArrayRecord(
        {k: Array(np.asarray(v, np.int64 if "num" in k else np.float32)) for k, v in values.items()}
    )  # fmt: skip


def build(name, rounds_done=0):
    inner = build_inner(name, SERVER_OPTIMIZERS[name], num_selected=2, weighting="examples", evaluate_on_clients=False)
    return CheckedRounds(inner, num_clients=2, parameters={"weight"}, rounds_done=rounds_done)


def one_round(strategy, grid, number, arrays):
    """Have two clients move the weights, set variances of 4 and 8 and count 10 and 20 batches in the run's round."""
    replies, counted = [], number - strategy.rounds_done
    questions = list(strategy.configure_train(counted, arrays, ConfigRecord(), grid))
    grid.push_messages(questions)
    for place, message in enumerate(questions):
        sent = message.content["arrays"]
        assert list(sent) == list(START)
        content = {
            "weight": sent["weight"].numpy() - [0.5, 0.1 * number * (place + 1)],
            "bn.running_var": [4.0 * (place + 1)] * 2,
            "bn.num_batches_tracked": 10 * (place + 1),
        }
        metrics = training_metrics(1 + 2 * place, 1.0)
        replies.append(Message(RecordDict({"arrays": arrays_of(content), "metrics": metrics}), reply_to=message))
    return strategy.aggregate_train(counted, replies)[0]


@pytest.fixture
def two_clients(make_grid):
    return make_grid(num_clients=2)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_batchnorm_statistics_are_averaged_and_not_stepped(name, two_clients):
    arrays = one_round(build(name), two_clients, 1, arrays_of(START))

    assert list(arrays) == list(START)
    assert arrays["bn.running_var"].numpy().tolist() == [7.0, 7.0]  # (1 x 4 + 3 x 8) / 4
    assert arrays["bn.num_batches_tracked"].numpy() == 18  # (1 x 10 + 3 x 20) / 4, to the nearest whole number
    assert arrays["bn.num_batches_tracked"].dtype == "int64"
    assert (arrays["weight"].numpy() < START["weight"]).all()


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_new_start_goes_on_with_what_the_optimizer_remembers(name, two_clients):
    strategy, undisturbed = build(name), arrays_of(START)
    for number in (1, 2, 3):
        undisturbed = one_round(strategy, two_clients, number, undisturbed)

    first, arrays = build(name), arrays_of(START)
    for number in (1, 2):
        arrays = one_round(first, two_clients, number, arrays)
    second = build(name, rounds_done=2)
    second.restore(first.memory())
    forgetful = build(name, rounds_done=2)

    def last(strategy):
        return one_round(strategy, two_clients, 3, arrays)["weight"].numpy()

    assert last(second).tobytes() == undisturbed["weight"].numpy().tobytes()
    if name != "QFedAvg":  # which remembers nothing
        assert last(forgetful).tobytes() != undisturbed["weight"].numpy().tobytes()
