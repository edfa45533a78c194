import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fgl_app.phases import initial_arrays, parameter_names
from fgl_app.records import client_record, training_metrics
from strategies import CheckedRounds
from strategies.inner import build_inner
from strategies.updates import update_metrics


def record(values):
    return ArrayRecord({"weight": Array(np.array(values, np.float32)), "count": Array(np.array(3))})


def test_equal_updates_have_the_least_diversity_and_no_drift():
    found = update_metrics(record([0.0, 0.0]), [record([1.0, 2.0])] * 4)

    assert found["gradient_diversity"] == pytest.approx(1 / 4)
    assert found["client_drift"] == pytest.approx(0.0, abs=1e-6)


def test_orthogonal_updates_have_diversity_one():
    found = update_metrics(record([1.0, 1.0]), [record([3.0, 1.0]), record([1.0, 5.0])])

    # d_1 = (2, 0) and d_2 = (0, 4): (4 + 16) / |(2, 4)|^2 = 20 / 20.
    assert found["gradient_diversity"] == pytest.approx(1.0)
    # The mean is (2, 3) as weights; each client is (1, 2) away from it: sqrt(5).
    assert found["client_drift"] == pytest.approx(5**0.5)


def test_arrays_that_are_not_trained_do_not_count():
    sent, got = record([0.0, 0.0]), record([1.0, 0.0])

    assert update_metrics(sent, [got], parameters=["other"]) == {}
    assert update_metrics(sent, [got], parameters=["weight"])["gradient_diversity"] == 1.0


def test_statistics_of_batchnorm_are_no_parameters(run_config):
    from fgl_app.config import parse_run_config

    settings = parse_run_config(run_config | {"model": "resnet18"})
    names = parameter_names(settings, ("cat", "dog"))

    assert "bn1.weight" in names
    assert "bn1.running_mean" not in names


def rounds(make_grid, settings, *, fraction, seed=0, num_rounds=4, done=0):
    """Run some rounds with 6 clients; return the places of those that trained in each."""
    grid = make_grid(num_clients=6, partition="iid")
    selected = -(-6 * fraction // 1)
    inner = build_inner("FedAvg", "", num_selected=int(selected), weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=6, fraction_train=fraction, seed=seed, rounds_done=done)
    places: list[list[int]] = []
    original = grid.send_and_receive

    def spy(messages, **options):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == "train":
            places.append(sorted(message.metadata.dst_node_id - 1000 for message in messages))
        return original(messages, **options)

    grid.send_and_receive = spy
    strategy.start(grid, initial_arrays(settings, settings.card.class_names()), num_rounds=num_rounds)
    return places


def checked(settings):
    inner = build_inner("FedAvg", "", num_selected=3, weighting="examples", evaluate_on_clients=False)
    return CheckedRounds(inner, num_clients=3, connect_timeout_s=1), initial_arrays(
        settings, settings.card.class_names()
    )


def questions_of(strategy, grid, sent=None, number=1):
    """Have a strategy ask its clients to train, as far as the grid names the questions."""
    questions = list(strategy.configure_train(number, sent or record([0.0]), ConfigRecord(), grid))
    grid.push_messages(questions)
    return questions


def test_nobody_is_waited_for_where_no_client_evaluates(make_grid, settings):
    strategy, arrays = checked(settings)
    grid = make_grid()
    del grid.node_configs[1002]

    assert list(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid)) == []


def test_a_node_that_leaves_while_a_round_begins_is_asked_all_the_same(make_grid, settings):
    strategy, arrays = checked(settings)
    grid = make_grid()
    sightings = iter([[1000, 1001, 1002]])
    grid.get_node_ids = lambda: next(sightings, [1000, 1001])  # Flower's sampling would wait for the third for ever

    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)

    assert sorted(message.metadata.dst_node_id for message in messages) == [1000, 1001, 1002]


def test_a_fraction_of_the_clients_is_drawn_from_seed_and_round(make_grid, settings):
    first = rounds(make_grid, settings, fraction=0.5)

    assert [len(places) for places in first] == [3, 3, 3, 3]
    assert len({tuple(places) for places in first}) > 1
    assert first == rounds(make_grid, settings, fraction=0.5)
    assert first[2:] == rounds(make_grid, settings, fraction=0.5, num_rounds=2, done=2)  # as a resumed run draws them
    assert first != rounds(make_grid, settings, fraction=0.5, seed=1)


def test_a_client_that_says_another_place_later_changes_neither_draw_nor_order(make_grid):
    def drawn_and_used(says):
        inner = build_inner("FedAvg", "", num_selected=2, weighting="examples", evaluate_on_clients=False)
        strategy = CheckedRounds(inner, num_clients=4, fraction_train=0.5)
        grid, seen = make_grid(num_clients=4, partition="iid"), []
        for number in range(1, 7):
            questions = questions_of(strategy, grid, number=number)
            seen.append({question.metadata.dst_node_id for question in questions})
            replies = []
            for question in questions:
                client = client_record(says(question.metadata.dst_node_id - 1000))
                content = {"arrays": record([1.0]), "metrics": training_metrics(10, 0.5), "client": client}
                replies.append(Message(RecordDict(content), reply_to=question))
            used = strategy.usable_replies(number, "train", replies, lambda reply: None)
            seen.append([reply.metadata.src_node_id for reply in used])
        return seen, strategy.refusals[6].places

    honest = drawn_and_used(lambda place: place)

    assert drawn_and_used(lambda place: 3 - place) == honest
    assert honest[1] == {1000: 0, 1001: 1, 1002: 2, 1003: 3}


def test_one_of_many_clients_is_enough(make_grid, settings):
    assert [len(places) for places in rounds(make_grid, settings, fraction=0.1, num_rounds=2)] == [1, 1]


def test_fedavgm_goes_on_from_the_weights_that_fine_tuning_made(make_grid, settings):
    start = initial_arrays(settings, settings.card.class_names())
    inner = build_inner(
        "FedAvgM", "server-learning-rate=0.5", num_selected=3, weighting="examples",
        evaluate_on_clients=False,
    )  # fmt: skip
    strategy = CheckedRounds(inner, num_clients=3)

    for number, value in ((1, 0.0), (2, 5.0)):
        sent = ArrayRecord({name: Array(array.numpy() * 0 + value) for name, array in start.items()})
        messages = questions_of(strategy, make_grid(), sent, number)
        replies = []
        for message in messages:  # clients that return what they got
            content = RecordDict({"arrays": sent, "metrics": training_metrics(10, 0.5)})
            replies.append(Message(content, reply_to=message))
        arrays, _ = strategy.aggregate_train(number, replies)

        assert all((array.numpy() == value).all() for array in arrays.values())


def test_a_client_does_not_choose_its_weight_in_the_unweighted_mean(make_grid):
    inner = build_inner("FedAvg", "", num_selected=2, weighting="uniform", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=2)
    questions = questions_of(strategy, make_grid(num_clients=2))
    replies = []
    for question, value, weight in zip(questions, (1.0, 3.0), (10**6, 1), strict=True):
        metrics = MetricRecord(dict(training_metrics(10, 0.5)) | {"equal-weight": weight})
        replies.append(Message(RecordDict({"arrays": record([value]), "metrics": metrics}), reply_to=question))

    arrays, _ = strategy.aggregate_train(1, replies)

    assert arrays["weight"].numpy().tolist() == [2.0]


def test_a_reply_that_answers_no_question_to_its_sender_is_not_used(make_grid):
    inner = build_inner("FedAvg", "", num_selected=3, weighting="uniform", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=3)
    replies = []
    for value, question in enumerate(questions_of(strategy, make_grid()), 1):
        content = {"arrays": record([value]), "metrics": training_metrics(10, 0.5)}
        replies.append(Message(RecordDict(content), reply_to=question))
    second, stray, foreign = (Message(replies[0].content, reply_to=question) for question in replies)
    second.metadata.__dict__.update(vars(replies[0].metadata))
    name = {"_src_node_id": replies[0].metadata.src_node_id}
    foreign.metadata.__dict__.update(vars(replies[2].metadata) | name)

    arrays, _ = strategy.aggregate_train(1, [*replies[:2], second, stray, foreign])

    assert arrays["weight"].numpy().tolist() == [1.5]
    assert strategy.refusals[1].reasons() == ["Refused: a reply in the name of another client."]
    assert [row["node"] for row in strategy.refusals[1].rows()] == [str(replies[2].metadata.src_node_id)]


@pytest.mark.parametrize(("seed", "logged"), [(0, 1), (None, 0)])
def test_what_clients_cannot_read_is_noted_beside_the_round_and_logged_once(make_grid, caplog, seed, logged):
    inner = build_inner("FedAvg", "", num_selected=3, weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=3, seed=seed, fraction_train=0.9)  # 2.7, rounded up
    for number in (1, 2):
        questions = questions_of(strategy, make_grid(num_clients=3), number=number)
        replies = []
        for question in questions:
            place = question.metadata.dst_node_id - 1000
            metrics, client = training_metrics(10, 0.5), client_record(place, (0, 4, -1)[place])
            content = RecordDict({"arrays": record([1.0]), "metrics": metrics, "client": client})
            replies.append(Message(content, reply_to=question))

        strategy.aggregate_train(number, replies)

    assert strategy.unreadable_images == {1: {"1": 4}, 2: {"1": 4}}
    assert caplog.text.count("client 1 cannot read 4 images") == logged  # not where nobody may know who was drawn


class Rows:
    """A ledger that keeps what it is told."""

    def __init__(self):
        self.rows = []

    def asked_to_train(self, server_round, drawn, places):
        self.rows.append((server_round, drawn, places))

    def told(self, num_examples):
        self.rows.append(set(num_examples))


def test_the_ledger_is_told_before_clients_are_asked_and_of_refused_replies_too(make_grid):
    ledger = Rows()
    inner = build_inner("FedAvg", "", num_selected=4, weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=4, rounds_done=6, ledger=ledger)

    questions = questions_of(strategy, make_grid(num_clients=4))
    assert ledger.rows == [(7, (4, 4), None)]
    replies = []
    for question, value, number in zip(questions, (1.0, np.nan, 2.0), (10, 20, 0), strict=False):  # one is silent
        metrics = MetricRecord(dict(training_metrics(10, 0.5)) | {"num-examples": number})
        content = RecordDict({"arrays": record([value]), "metrics": metrics, "client": client_record(0)})
        replies.append(Message(content, reply_to=question))
    strategy.aggregate_train(1, replies)

    assert ledger.rows[1:] == [{10, 20}]  # not finite, but sent; 0 images cannot be


def test_the_ledger_is_told_the_places_of_drawn_clients(make_grid):
    ledger, grid = Rows(), make_grid(num_clients=4, partition="iid")
    grid.node_configs[1003]["partition-id"] = 0
    inner = build_inner("FedAvg", "", num_selected=3, weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=4, fraction_train=0.75, ledger=ledger)

    asked = [
        [question.metadata.dst_node_id for question in strategy.configure_train(1, record([0.0]), ConfigRecord(), grid)]
        for _ in range(2)
    ]

    said = {1000: 0, 1001: 1, 1002: 2, 1003: 0}
    assert [(drawn, sorted(places)) for _, drawn, places in ledger.rows] == [
        ((3, 4), sorted(said[node] for node in nodes)) for nodes in asked
    ]
