import functools
import logging
import re
import time

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.clientapp import ClientApp

from fgl_app.cards import load_card
from fgl_app.data.images import ImageSet
from fgl_app.errors import PromptError, RoundError
from fgl_app.phases import initial_arrays
from fgl_app.prompts import PromptCount, PromptLimits
from fgl_app.records import Upload, prompts_reply
from fgl_app.reporting.defences import defences_sections
from strategies import FGL
from strategies.inner import build_inner
from strategies.prompt_round import PromptRound

NOTHING = ImageSet(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
NAMES = load_card("digits").class_names()


def prompt_round(grid, limits=None, **changes):
    return PromptRound(
        grid, limits or PromptLimits(1000, 1000), **({"class_names": NAMES, "deadline_s": 0.2} | changes)
    )


def fgl(grid, *, synthesize, min_clients=2, limits=None, num_clients=3):
    """Run one-shot FGL; return what its synthesis was given each time, and the last report of the exchange."""
    drawn, reports = [], []

    def draw(merged, listen):
        drawn.append(sum(item.count for item in merged.prompts))
        synthesize(listen)
        return NOTHING

    strategy = FGL(
        build_inner("FedAvg", "", num_selected=2, weighting="examples", evaluate_on_clients=False),
        class_names=NAMES,
        num_clients=num_clients,
        prompt_round=functools.partial(prompt_round, limits=limits),
        synthesize=draw,
        pretrain=lambda arrays, images: arrays,
        on_prompts=lambda merged, exchange: reports.append(exchange.report()),
        connect_timeout_s=1,
        min_clients=min_clients,
    )
    strategy.start(grid, ArrayRecord({"weight": torch.zeros(1)}), num_rounds=1)
    return drawn, reports[-1]


def test_prompts_of_a_late_client_are_merged_while_images_are_drawn(make_grid):
    grid = make_grid(partition="iid")
    grid.late = {1002}

    def synthesize(listen):
        grid.late = set()
        listen()

    drawn, report = fgl(grid, synthesize=synthesize)

    assert 0 < drawn[0] < 838  # two of three clients
    assert drawn[1:] == [838]
    assert (report["late"], report["missed"], report["clients_used"]) == ([2], [], 3)


def test_a_client_that_joins_while_images_are_drawn_is_asked(make_grid):
    grid = make_grid(partition="iid")
    latecomer = grid.node_configs.pop(1001)

    def synthesize(listen):
        grid.node_configs[1001] = latecomer
        listen()

    drawn, report = fgl(grid, synthesize=synthesize)

    assert drawn[1:] == [838]
    assert (report["clients_asked"], report["late"]) == (3, [1])


def test_a_client_that_was_gone_is_asked_again_when_it_is_back_and_one_that_failed_is_not(make_grid):
    grid = make_grid(partition="iid")
    grid.gone, grid.broken = {1001}, {1002}
    exchange = prompt_round(grid)
    exchange.ask(grid.get_node_ids())
    exchange.wait()
    assert exchange.num_used == 1
    grid.gone = set()

    exchange.listen()
    exchange.listen()

    assert len(grid.asked) == 4
    assert exchange.report()["late"] == [1]


def test_a_quorum_waits_for_a_client_that_is_back_before_the_deadline(make_grid, monkeypatch):
    monkeypatch.setattr("strategies.prompt_round._ASK_AGAIN_S", 0.0)
    grid = make_grid(partition="iid")
    grid.gone = {1001}
    exchange = prompt_round(grid, deadline_s=30.0)
    exchange.ask(grid.get_node_ids())
    nodes = grid.get_node_ids
    monkeypatch.setattr(grid, "get_node_ids", lambda: grid.gone.clear() or nodes())

    exchange.wait(3)

    assert exchange.num_used == 3
    assert len(grid.asked) == 4
    assert exchange.report()["late"] == []


def test_a_quorum_does_not_wait_for_a_client_that_failed_or_never_comes_back(make_grid, monkeypatch):
    monkeypatch.setattr("strategies.prompt_round._ASK_AGAIN_S", 0.0)
    grid = make_grid(partition="iid")
    grid.gone, grid.broken = {1001}, {1002}
    exchange = prompt_round(grid, deadline_s=30.0)
    exchange.ask(grid.get_node_ids())
    started = time.monotonic()

    exchange.wait(3)

    assert exchange.num_used == 1
    assert len(grid.asked) == 2 + 4
    assert time.monotonic() - started < 20


def test_a_client_that_connects_while_others_write_prompts_is_asked_at_once(make_grid, monkeypatch):
    monkeypatch.setattr("strategies.prompt_round._ASK_AGAIN_S", 0.0)
    grid = make_grid(partition="iid")
    newcomer = grid.node_configs.pop(1002)
    grid.late = {1000}
    exchange = prompt_round(grid, deadline_s=30.0)
    exchange.ask(grid.get_node_ids())
    push = grid.push_messages

    def asked(messages):
        grid.late = set()  # the slow one answers after the newcomer was asked
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", asked)
    grid.node_configs[1002] = newcomer

    exchange.wait()

    assert exchange.num_used == 3


def test_a_client_that_is_always_gone_is_asked_a_few_times(make_grid):
    grid = make_grid(partition="iid")
    grid.gone = {1001}
    exchange = prompt_round(grid)
    exchange.ask(grid.get_node_ids())
    exchange.wait()

    for _ in range(9):
        exchange.listen()

    assert len(grid.asked) == 3 + 3
    assert exchange.report()["late"] == []


def test_a_client_whose_records_cannot_be_serialized_is_refused(make_grid):
    class Odd:
        """A grid whose first client sends what Flower's JSON can hold and its messages cannot."""

        def pull_messages(self, names):
            replies = list(inner.pull_messages(names))
            for reply in replies:
                if reply.metadata.src_node_id == 1000:
                    reply.content["odd"] = ConfigRecord({"text": "\ud800"})
            return replies

        def __getattr__(self, name):
            return getattr(inner, name)

    inner = make_grid(partition="iid")
    exchange = prompt_round(Odd())
    exchange.ask(inner.get_node_ids())
    exchange.wait()

    assert exchange.num_used == 2
    assert [row["reason"] for row in exchange.report()["refused"]] == ["Refused: records that are none of Flower's."]


def test_a_client_that_does_not_answer_in_time_is_reported_as_missed(make_grid):
    grid = make_grid(partition="iid")
    grid.late = {1002}

    started = time.monotonic()
    drawn, report = fgl(grid, synthesize=lambda listen: listen())

    assert len(drawn) == 1
    assert report["missed"] == [1002]  # nothing is known of it but its node
    assert time.monotonic() - started < 30


def test_a_quorum_that_is_not_met_ends_the_run(make_grid):
    grid = make_grid(partition="iid")
    grid.late = {1002}

    with pytest.raises(RoundError, match="at least 3 of 3 clients must send usable prompts"):
        fgl(grid, synthesize=lambda listen: None, min_clients=3)

    del grid.node_configs[1001], grid.node_configs[1002]
    with pytest.raises(RoundError, match="`min-clients` is 2, but after 1 s only 1 clients"):
        fgl(grid, synthesize=lambda listen: None)


def test_a_missing_client_is_waited_for_once(make_grid, settings, monkeypatch):
    grid = make_grid(partition="iid")
    del grid.node_configs[1002]
    strategy = FGL(
        build_inner("FedAvg", "", num_selected=2, weighting="examples", evaluate_on_clients=False),
        class_names=NAMES,
        num_clients=3,
        prompt_round=prompt_round,
        synthesize=lambda merged, listen: NOTHING,
        pretrain=lambda arrays, images: arrays,
        connect_timeout_s=2,
        min_clients=2,
    )
    slept = []
    monkeypatch.setattr("strategies.rounds.time.sleep", slept.append)
    original = strategy.configure_train

    def timed(number, arrays, config: ConfigRecord, grid):
        slept.clear()  # what came before was the prompt round
        messages = original(number, arrays, config, grid)
        assert slept == []
        return messages

    strategy.configure_train = timed
    strategy.start(grid, initial_arrays(settings, NAMES), num_rounds=3)

    assert len(strategy.model_bytes[3]) == 2


def naming(make_grid, class_names_of_clients):
    """Make clients that send prompts of these classes."""
    app = ClientApp()

    @app.query("prompts")
    def answer(message, context):
        place = context.node_config["partition-id"]
        names = class_names_of_clients[place]
        upload = Upload([PromptCount(label, "a photo", 1) for label in range(len(names))], names)
        return Message(prompts_reply(upload, len(names), place), reply_to=message)

    grid = make_grid(num_clients=len(class_names_of_clients))
    grid.app = app
    return grid


def united(make_grid, class_names_of_clients):
    """Return the merged prompts and the report."""
    grid = naming(make_grid, class_names_of_clients)
    exchange = prompt_round(grid, PromptLimits(1000, 1000, max_classes=5), class_names=())
    exchange.ask(grid.get_node_ids())
    exchange.wait()
    return exchange.merged(), exchange.report()


def test_the_label_space_is_the_union_of_the_clients_classes(make_grid):
    merged, report = united(make_grid, [("dog", "cat"), ("eel", "dog")])

    assert merged.class_names == ("cat", "dog", "eel")
    assert report["refused"] == []
    with pytest.raises(PromptError, match="at least 2 different classes"):
        united(make_grid, [("cat",), ("cat",)])


def test_classes_of_one_client_alone_are_told_by_their_number(make_grid, caplog):
    united(make_grid, [("dog", "cat"), ("eel", "dog")])

    (line,) = [record.getMessage() for record in caplog.records if "alone" in record.getMessage()]
    assert "2 of 3 classes come from one client alone" in line


def test_a_client_that_names_too_many_classes_loses_its_own_place_only(make_grid):
    many = tuple(f"class {number}" for number in range(30))

    merged, report = united(make_grid, [many, ("dog", "cat"), ("eel", "dog")])

    assert merged.class_names == ("cat", "dog", "eel")
    assert report["clients_used"] == 2
    assert [(row["client"], row["reason"]) for row in report["refused"]] == [
        (0, "Refused: more classes than `max-classes` together with those of the others.")
    ]


def test_a_quorum_is_counted_after_classes_were_refused(make_grid):
    grid = naming(make_grid, [("cat", "dog"), ("eel", "fox", "gnu"), ("hen", "ibex", "jay")])

    with pytest.raises(RoundError, match="at least 2 of 3 clients must send usable prompts"):
        FGL(
            class_names=(),
            num_clients=3,
            prompt_round=lambda grid: prompt_round(grid, PromptLimits(1000, 1000, max_classes=2), class_names=()),
            synthesize=lambda merged, listen: NOTHING,
            pretrain=lambda arrays, images: arrays,
            min_clients=2,
        ).start(grid, ArrayRecord(), num_rounds=1)


def test_what_is_refused_is_counted_by_client_and_reason(make_grid):
    grid = make_grid(partition="iid")

    drawn, report = fgl(grid, synthesize=lambda listen: None, limits=PromptLimits(8, 1000, ("seven",)))

    assert report["clients_used"] == 3
    refused = {(row["client"], row["reason"]): row["count"] for row in report["refused"]}
    assert refused == {
        **{(client, "Refused: a blocked word."): 1 for client in range(3)},
        **{(client, "Refused: more prompts than one client may send."): 1 for client in range(3)},
    }
    assert drawn[0] < 838


def let_minutes_pass(monkeypatch):
    """Have every pause of a waiting exchange take a minute of a clock that nothing else moves."""
    now = [0.0]
    monkeypatch.setattr("strategies.prompt_round.time.monotonic", lambda: now[0])
    monkeypatch.setattr("strategies.prompt_round.time.sleep", lambda seconds: now.__setitem__(0, now[0] + 60))


@pytest.mark.parametrize(
    ("by_owners", "sentence"),
    [
        (True, "replies from 2 of 3 clients so far; waiting for the approval of 1 sites' owners, until "),
        (False, "replies from 2 of 3 clients so far, until "),
    ],
)
def test_the_server_says_that_it_waits_and_until_when(make_grid, monkeypatch, caplog, by_owners, sentence):
    let_minutes_pass(monkeypatch)
    grid = make_grid(partition="iid")
    grid.late = {1002}
    exchange = prompt_round(grid, deadline_s=600.0, approved_by_owners=by_owners)
    exchange.ask(grid.get_node_ids())

    with caplog.at_level(logging.INFO, "flwr"):
        exchange.wait()

    said = [line for line in caplog.messages if line.startswith("prompt round: replies")]
    assert re.match(re.escape(f"prompt round: {sentence}") + r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", said[0])
    assert said[0].endswith("sites may be waiting for their owner's approval") != by_owners


def test_a_wait_that_goes_on_is_told_ever_more_rarely(make_grid, monkeypatch, caplog):
    let_minutes_pass(monkeypatch)
    grid = make_grid(partition="iid")
    grid.late = {1000, 1001, 1002}
    exchange = prompt_round(grid, deadline_s=12 * 3600.0)
    exchange.ask(grid.get_node_ids())

    with caplog.at_level(logging.INFO, "flwr"):
        exchange.wait()

    # After 1, 2, 4, 8, 16, 32 and 64 minutes, or a little later, then once an hour.
    assert 14 <= sum(line.startswith("prompt round: replies from 0 of 3") for line in caplog.messages) <= 19


def test_no_number_of_images_is_told_where_counts_are_withheld(make_grid):
    grid = make_grid(prompt_level="instance", partition="iid", prompt_counts="withheld", weighting="uniform")
    exchange = prompt_round(
        grid, min_senders=3, class_prompt=lambda name, domain: f"a {name}", deadline_s=60.0, exact_counts=False
    )
    exchange.ask(grid.get_node_ids())
    exchange.wait()
    exchange.merged()

    counted = exchange.report()["defences"]

    assert counted["prompts_replaced"] > 0
    assert counted["images_replaced"] is None
    section = defences_sections({"settings": {}, **counted})[0].text[-1]
    assert section == f"{counted['prompts_replaced']} prompts were replaced, because too few clients sent them."


def test_what_clients_and_server_changed_for_privacy_is_counted(make_grid):
    grid = make_grid(prompt_level="instance", partition="iid", max_caption_words=3)
    exchange = prompt_round(grid, min_senders=3, class_prompt=lambda name, domain: f"a {name}", deadline_s=60.0)
    exchange.ask(grid.get_node_ids())
    exchange.wait()
    merged = exchange.merged()

    counted = exchange.report()["defences"]
    # Each caption of the shipped captioner has more than three words.
    assert counted["captions"] == {"clients": 3, "written": 838, "changed": 838, "emptied": 0}
    fallback = [item for item in merged.prompts if item.prompt.startswith("a ")]
    assert counted["images_replaced"] == sum(item.count for item in fallback) > 0
    assert counted["prompts_replaced"] >= len(fallback)
    section = defences_sections({"settings": {}, **counted})[0].text[-1]
    assert f" prompts, of {counted['images_replaced']} images, were replaced" in section
    assert counted["prompts_cut"] == 0


def test_clients_that_hide_their_counts_do_not_tell_what_they_changed(make_grid):
    grid = make_grid(
        prompt_level="instance", partition="iid", max_caption_words=3, prompt_counts="withheld", weighting="uniform"
    )
    exchange = prompt_round(grid, max_client_share=0.4, deadline_s=60.0)
    exchange.ask(grid.get_node_ids())
    exchange.wait()
    exchange.merged()

    assert exchange.num_used == 3
    assert exchange.report()["defences"]["captions"] is None
