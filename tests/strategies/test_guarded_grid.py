# ruff: noqa: N802
"""Replies as bytes through Flower's own grid of a deployment: what its SuperLink lets pass, and what it raises then."""

import json

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectResponse, PushObjectResponse
from flwr.proto.message_pb2 import Message as Header
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesResponse, PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid
from hypothesis import given
from hypothesis import strategies as st

from fgl_app.checks import check_settings
from fgl_app.config import parse_run_config
from fgl_app.prompts import PromptLimits
from fgl_app.records import training_metrics
from fgl_app.server_app import run
from strategies import CheckedRounds
from strategies.guarded_grid import guarded
from strategies.inner import build_inner
from strategies.prompt_round import PromptRound

CANARY = "a photo of Maria Kowalski"
UNREADABLE = "Refused: records that are none of Flower's."
SENT, MOVED = (ArrayRecord({"weight": Array(np.full(2, value, np.float32))}) for value in (1, 2))
TRAINED = {"arrays": MOVED, "metrics": training_metrics(3, 0.5)}


class SuperLink:
    """What an HttpGrid asks of a SuperLink, which checks objects, and deletes what it has passed on, as Flower's does.

    Args:
        clients: By node, a function from a question to the header of a reply, the tree of its objects and the objects.
    """

    def __init__(self, clients):
        self.clients, self.objects, self.trees, self.open = clients, {}, {}, {}
        self.pulls = 0

    def GetNodes(self, request):
        return GetNodesResponse(nodes=[NodeInfo(node_id=node) for node in self.clients])

    def PushMessages(self, request):
        ids = []
        for header, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            ids.append(header.metadata.message_id)
            self.open[ids[-1]] = message_from_proto(header)
            self.trees[ids[-1]] = tree
        wanted = {item.object_id for tree in request.message_object_trees for item in iterate_object_tree(tree)}
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=wanted, session_id="1")

    def PushObject(self, request):
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def PullMessages(self, request):
        self.pulls += 1
        found = PullAppMessagesResponse()
        for name in sorted(request.message_ids):
            if (header := self.open.pop(name, None)) is None:
                continue
            objects = {item.object_id: self.objects[item.object_id] for item in iterate_object_tree(self.trees[name])}
            question = inflate_object_from_contents(name, objects)
            question.metadata.__dict__["_message_id"] = name
            header, tree, objects = self.clients[header.metadata.dst_node_id](question)
            for content in objects.values():
                validate_object_content(content)
            self.objects |= objects
            found.messages_list.append(header)
            found.message_object_trees.append(tree)
        return found

    def PullObject(self, request):
        content = self.objects.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=content is not None, object_content=content
        )

    def ConfirmMessageReceived(self, request):
        return ConfirmMessageReceivedResponse()


def http_grid(clients):
    grid = HttpGrid(token="token")
    grid.set_run(Run.create_empty(1))
    grid._client = SuperLink(clients)
    return grid


def header_of(reply, message_id):
    reply.metadata.__dict__["_message_id"] = message_id
    return Header(metadata=metadata_to_proto(reply.metadata))


def honest(records):
    """Make a client that sends records as Flower's SuperNode does."""

    def answer(question):
        reply = Message(RecordDict(records), reply_to=question)
        objects = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
        return header_of(reply, reply.object_id), get_object_tree(reply), objects

    return answer


class Forger:
    """Puts objects together as Flower's client does, from whatever bytes."""

    def __init__(self):
        self.objects = {}

    def object(self, kind, body, *children):
        head = f"{kind} {','.join(child.object_id for child in children)} {len(body)}"
        content = head.encode() + b"\x00" + body
        self.objects[get_object_id(content)] = content
        return ObjectTree(object_id=get_object_id(content), children=children)

    def message(self, reply, *children, error=None):
        metadata = metadata_to_proto(reply.metadata)
        metadata.message_id = ""
        return self.object("Message", Header(metadata=metadata, error=error).SerializeToString(), *children)


def sending(kind, body):
    """Make a client whose reply has one object of that kind and body as its content; None: it has none."""

    def answer(question):
        forger, reply = Forger(), Message(RecordDict(), reply_to=question)
        tree = forger.message(reply, *([forger.object(kind, body)] if kind else []))
        return header_of(reply, tree.object_id), tree, forger.objects

    return answer


def changed(**fields):
    """Make a client whose reply has another header inside than the one that the SuperLink has checked."""

    def answer(question):
        reply = Message(RecordDict(TRAINED), reply_to=question)
        checked = metadata_to_proto(reply.metadata)
        for name, value in fields.items():
            reply.metadata.__dict__[f"_{name}"] = value
        _, whole, objects = honest(TRAINED)(question)
        forger = Forger()
        tree = forger.message(reply, *whole.children)
        checked.message_id = tree.object_id
        return Header(metadata=checked), tree, objects | forger.objects

    return answer


HOSTILE = {
    "no JSON": sending("RecordDict", b"[[["),
    "deep JSON": sending("RecordDict", b"[" * 100_000),
    "words for a child": sending("RecordDict", json.dumps({"x": CANARY}).encode()),
    "no text": sending("RecordDict", b"\xff" + CANARY.encode()),
    "another kind": sending("ConfigRecord", CANARY.encode()),
    "neither content nor error": sending(None, b""),
    "an answer to another question": changed(reply_to_message_id="0" * 64),
    "an answer in another's name": changed(src_node_id=1002),
}


@pytest.mark.parametrize("client", HOSTILE.values(), ids=HOSTILE)
def test_a_reply_that_flower_cannot_read_costs_its_client_alone(caplog, client):
    grid = http_grid({1000: honest(TRAINED), 1001: client, 1002: honest(TRAINED)})
    inner = build_inner("FedAvg", "", num_selected=3, weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=3)

    found = strategy.start(guarded(grid), SENT, num_rounds=1).arrays["weight"].numpy()

    assert found.tolist() == [2.0, 2.0]
    assert strategy.refusals[1].rows() == [{"client": None, "node": "1001", "reason": UNREADABLE, "count": 1}]
    assert len(strategy.model_bytes[1]) == 2  # no honest reply is lost
    assert "Kowalski" not in caplog.text
    assert grid._client.pulls == 1  # of all replies together


@pytest.mark.parametrize("client", HOSTILE.values(), ids=HOSTILE)
def test_the_prompt_round_refuses_a_reply_that_flower_cannot_read(caplog, client):
    grid = guarded(http_grid({1000: client}))
    exchange = PromptRound(grid, PromptLimits(5, 30, ()), class_names=("cat", "dog"), deadline_s=0.0)
    exchange.ask([1000])
    exchange.wait()

    assert [row["reason"] for row in exchange.report()["refused"]] == [UNREADABLE]
    assert "Kowalski" not in caplog.text


def test_a_whole_run_ends_with_the_honest_clients(make_grid, run_config, tmp_path, caplog):
    app = make_grid().app

    def client(node):
        def answer(question):
            place = {"partition-id": node - 1000, "num-partitions": 3}
            return honest(app(question, Context(1, node, place, RecordDict(), run_config)).content)(question)

        return answer

    grid = http_grid({1000: client(1000), 1001: HOSTILE["words for a child"], 1002: client(1002)})

    run(grid, check_settings(parse_run_config(run_config | {"method": "fedavg"})))

    results = json.loads((tmp_path / "runs" / run_config["run-name"] / "results.json").read_text())
    refused = [{"client": None, "node": "1001", "reason": UNREADABLE, "count": 1}]
    assert [row["refused"] for row in results["rounds"]] == [refused, refused]
    assert "Kowalski" not in caplog.text + json.dumps(results)


def test_what_fails_at_the_connection_is_no_clients_fault():
    grid = http_grid({1000: honest(TRAINED)})

    def cut(request):
        raise httpx.ConnectError("the SuperLink is gone")

    grid._client.PullObject = cut
    with pytest.raises(httpx.ConnectError):
        guarded(grid).send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="train")])


def late(client, times):
    """Make of an honest client one whose objects the SuperLink has only when it was asked for them so many times."""
    withheld, fetched = set(), []

    def answer(question):
        header, tree, objects = client(question)
        withheld.update(objects)
        return header, tree, objects

    def with_patience(pull_object):
        def pull(request):
            nonlocal times
            if request.object_id in withheld and times > 0:
                times -= 1
                return PullObjectResponse(object_found=True, object_available=False)
            fetched.append(request.object_id)
            return pull_object(request)

        return pull

    return answer, with_patience, fetched


def test_a_client_that_withholds_what_it_announced_is_one_that_does_not_reply_in_time(monkeypatch):
    monkeypatch.setattr("strategies.guarded_grid._PATIENCE_S", 0.2)
    own = {"arrays": ArrayRecord({"weight": Array(np.zeros(2, np.float32))}), "metrics": training_metrics(4, 0.25)}
    client, withholding, _ = late(honest(own), 10**9)
    grid = http_grid({1000: honest(TRAINED), 1001: client, 1002: honest(TRAINED)})
    grid._client.PullObject = withholding(grid._client.PullObject)
    inner = build_inner("FedAvg", "", num_selected=3, weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=3)
    bounded = guarded(grid)

    found = strategy.start(bounded, SENT, num_rounds=1, timeout=1).arrays["weight"].numpy()

    assert found.tolist() == [2.0, 2.0]
    silent = {"client": None, "node": "1001", "reason": "It did not reply in time.", "count": 1}
    assert strategy.refusals[1].rows() == [silent]
    assert not bounded._arriving  # nobody waits for it any more


def test_a_reply_that_is_still_being_uploaded_is_read_when_all_of_it_is_there(monkeypatch):
    monkeypatch.setattr("strategies.guarded_grid._PATIENCE_S", 0.2)
    client, uploading, fetched = late(honest(TRAINED), 5)
    grid = http_grid({1001: client})
    grid._client.PullObject = uploading(grid._client.PullObject)
    question = Message(RecordDict(), dst_node_id=1001, message_type="train")

    (reply,) = guarded(grid).send_and_receive([question])

    assert reply.content["arrays"]["weight"].numpy().tolist() == [2.0, 2.0]
    assert set(fetched) == set(get_all_nested_objects(reply))
    assert grid._client.pulls == 1  # the SuperLink has forgotten the question that is answered


def test_what_came_while_flowers_loop_slept_came_in_time(monkeypatch):
    monkeypatch.setattr("strategies.guarded_grid._PATIENCE_S", 0.0)
    client, uploading, _ = late(honest(TRAINED), 1)
    grid = http_grid({1001: client})
    grid._client.PullObject = uploading(grid._client.PullObject)

    (reply,) = guarded(grid).send_and_receive(
        [Message(RecordDict(), dst_node_id=1001, message_type="train")], timeout=1
    )

    assert reply.content["arrays"]["weight"].numpy().tolist() == [2.0, 2.0]


def test_while_one_object_is_missing_no_other_is_asked_for(monkeypatch):
    monkeypatch.setattr("strategies.guarded_grid._PATIENCE_S", 0.5)
    client, uploading, fetched = late(honest(TRAINED), 10**9)
    grid = http_grid({1001: client})
    asked = []
    withheld = uploading(grid._client.PullObject)

    def pull(request):
        asked.append(request.object_id)
        return withheld(request)

    grid._client.PullObject = pull
    bounded = guarded(grid)
    question = Message(RecordDict(), dst_node_id=1001, message_type="train")
    names = list(bounded.push_messages([question]))

    assert bounded.pull_messages(names) == []
    first = len(asked)
    assert bounded.pull_messages(names) == []
    assert len(asked) > first
    assert len(set(asked[first:])) == 1
    assert fetched == []


def test_a_reply_of_more_objects_than_any_model_has_is_refused_unread(monkeypatch):
    monkeypatch.setattr("strategies.guarded_grid._MAX_OBJECTS", 5)
    grid = http_grid({1000: honest(TRAINED)})
    grid._client.PullObject = None

    (reply,) = guarded(grid).send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="train")])

    assert reply.error.code == 200


def test_an_upload_that_the_superlink_has_given_up_is_a_refusal():
    grid = http_grid({1000: honest(TRAINED)})
    grid._client.PullObject = lambda request: PullObjectResponse(object_found=False)

    (reply,) = guarded(grid).send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="train")])

    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_only_replies_that_come_in_time_are_returned():
    grid = guarded(http_grid({1000: honest(TRAINED)}))

    assert list(grid.send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="train")], timeout=0)) == []


def test_errors_of_the_superlink_stay_what_they_are():
    def gone(question):
        forger, reply = Forger(), Message(RecordDict(), reply_to=question)
        header = metadata_to_proto(reply.metadata)
        reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's own
        tree = forger.message(reply, error=error_to_proto(Error(5, "gone")))
        header.message_id = tree.object_id
        return Header(metadata=header), tree, forger.objects

    question = Message(RecordDict(), dst_node_id=1000, message_type="train")
    (reply,) = guarded(http_grid({1000: gone})).send_and_receive([question])

    assert reply.error.code == 5
    assert reply.metadata.reply_to_message_id == question.metadata.message_id


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([CANARY, "", "\ud800", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "weight", CANARY]), inner),
    max_leaves=6,
)
bodies = st.one_of(
    st.binary(max_size=60),
    values.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[[[", b"[" * 100_000, b'{"weight": 1' + b"0" * 5000 + b"}", CANARY.encode()]),
)
described = st.fixed_dictionaries(
    {},
    optional={
        "dtype": values,
        "shape": values | st.lists(st.integers(-1, 10**400), max_size=3),
        "stype": values,
        "arraychunk_ids": values | st.lists(st.integers(-2, 2), max_size=3),
    },
).map(lambda more: {"dtype": "float32", "shape": [2], "stype": "numpy.ndarray", "arraychunk_ids": [0]} | more)
kinds = ["Message", "RecordDict", "ArrayRecord", "ConfigRecord", "MetricRecord", "Array", "ArrayChunk"]


@st.composite
def forgeries(draw):
    """A client that puts its reply together as an honest one does, but some objects have other bytes or kinds."""
    changed = draw(st.sets(st.sampled_from(["chunk", "array", "arrays", "metrics", "record", "message"]), min_size=1))
    drawn = {name: draw(bodies) for name in sorted(changed)}
    if "array" in changed and draw(st.booleans()):
        drawn["array"] = json.dumps(draw(described)).encode()
    if "metrics" in changed and draw(st.booleans()):
        numbers = {key: draw(st.integers(-(2**63), 2**63 - 1) | st.floats()) for key in TRAINED["metrics"]}
        drawn["metrics"] = MetricRecord(numbers).deflate().partition(b"\0")[2]
    kind = {name: draw(st.sampled_from(kinds)) for name in sorted(changed) if draw(st.booleans())}
    childless = draw(st.sets(st.sampled_from(["array", "arrays", "record", "message"]), max_size=1))
    chunk_body = MOVED["weight"].data

    def answer(question):
        forger, reply = Forger(), Message(RecordDict(), reply_to=question)

        def put(name, honest_kind, body, *children):
            children = () if name in childless else children
            return forger.object(kind.get(name, honest_kind), drawn.get(name, body), *children)

        chunk = put("chunk", "ArrayChunk", chunk_body)
        array = put("array", "Array", MOVED["weight"].deflate().partition(b"\0")[2], chunk)
        arrays = put("arrays", "ArrayRecord", json.dumps({"weight": array.object_id}).encode(), array)
        metrics = put("metrics", "MetricRecord", TRAINED["metrics"].deflate().partition(b"\0")[2])
        names = json.dumps({"arrays": arrays.object_id, "metrics": metrics.object_id}).encode()
        record = put("record", "RecordDict", names, arrays, metrics)
        header = Header(metadata=metadata_to_proto(reply.metadata))
        tree = put("message", "Message", header.SerializeToString(), record)
        return header_of(reply, tree.object_id), tree, forger.objects

    return answer


@given(forgeries())
def test_whatever_objects_arrive_a_round_ends_with_the_honest_reply(client):
    grid = http_grid({1000: honest(TRAINED), 1001: client})
    inner = build_inner("FedAvg", "", num_selected=2, weighting="examples", evaluate_on_clients=False)
    strategy = CheckedRounds(inner, num_clients=2, min_clients=1)

    found = strategy.start(guarded(grid), SENT, num_rounds=1).arrays["weight"].numpy()

    rows = strategy.refusals[1].rows()
    assert {row["node"] for row in rows} <= {"1001"}
    assert "Kowalski" not in json.dumps(rows)
    assert np.isfinite(found).all()
    assert 1 <= len(strategy.model_bytes[1]) == 2 - len(rows)


def test_the_forger_can_be_honest():
    client = sending("RecordDict", b"{}")
    (reply,) = guarded(http_grid({1000: client})).send_and_receive(
        [Message(RecordDict(), dst_node_id=1000, message_type="train")]
    )

    assert reply.content == RecordDict()
