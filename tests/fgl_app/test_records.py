import json
import re
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fgl_app.cards import load_card
from fgl_app.errors import PromptError
from fgl_app.prompts import PromptCount, PromptLimits, class_prompts, printable, screen_prompts
from fgl_app.records import (
    Upload,
    decode_prompts,
    defended_of,
    embedding_name,
    embeddings_of,
    encode_prompts,
    label_prompts,
    num_unreadable_of,
    payload_of,
    place_of,
    prompts_reply,
    serialized_bytes,
)

CLASS_NAMES = load_card("digits").class_names()

words = (
    st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=20).map(printable).filter(bool)
)
prompt_lists = st.lists(
    st.builds(PromptCount, st.integers(0, 9), words, st.integers(1, 10**9)),
    min_size=1,
    max_size=10,
    unique_by=lambda item: (item.label, item.prompt),
)


def named_prompts(upload):
    """What the server keeps of an upload; everything that an honest client sends."""
    kept, refused = screen_prompts(decode_prompts(encode_prompts(upload)), PromptLimits(1000, 1000), domains=["sketch"])
    assert not refused
    return kept


@given(prompt_lists)
def test_prompts_survive_the_journey(prompts):
    assert label_prompts(named_prompts(Upload(prompts, CLASS_NAMES)), CLASS_NAMES) == prompts


@given(st.binary(max_size=200))
def test_bytes_that_are_no_prompts_are_refused(payload):
    with pytest.raises(PromptError):
        decode_prompts(payload)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr("fgl_app.records.MAX_PAYLOAD_BYTES", 1000)

    with pytest.raises(PromptError, match="1000 bytes"):
        decode_prompts(zlib.compress(b"[" + b" " * 10**6 + b"]"))


@pytest.mark.parametrize("unit", [b"{},", b"[],", b'"a",', b"1.5,", b'["a",1,"b"],', b'{"a":{}},', b'"\\"",'])
def test_a_message_of_very_many_values_is_not_parsed(unit):
    count = 1_000_001 // len(re.findall(rb'"a"|"b"|"\\""|[\[{:,]', unit)) + 1

    with pytest.raises(PromptError, match="at most 125000 rows"):
        decode_prompts(zlib.compress(b"[" + unit * count + b"0]"))


def test_as_many_prompts_as_are_accepted_are_parsed_whatever_they_hold():
    rows = [["cat", 1, f'a "[{{,:\\ {number}', "sketch"] for number in range(70_000)]
    prompts = [PromptCount(0, row[2], row[1], row[3]) for row in rows]
    payload = encode_prompts(Upload(prompts, ("cat",)))

    assert decode_prompts(payload) == rows  # 8 * 70,000 tokens, fewer than are always parsed
    with pytest.raises(PromptError, match="`max-prompts-per-client`"):
        decode_prompts(encode_prompts(Upload(prompts * 2, ("cat",))), 10)
    assert len(decode_prompts(encode_prompts(Upload(prompts * 2, ("cat",))), 70_000)) == 140_000


def test_quotes_without_an_end_are_searched_once():
    with pytest.raises(PromptError, match="cannot be read"):
        decode_prompts(zlib.compress(b'["' + b'\\"' * 5_000_000))


def test_ten_class_prompts_fit_the_papers_229_bytes():
    prompts = class_prompts(
        [label for label in range(10) for _ in range(80 + label)], CLASS_NAMES, ["A photo of a {class}"]
    )
    question = Message(RecordDict(), dst_node_id=1, message_type="query.prompts")
    reply = Message(prompts_reply(Upload(prompts, CLASS_NAMES), 845, 0), reply_to=question)

    assert len(prompts) == 10
    assert len(payload_of(reply)) <= 229
    assert serialized_bytes(reply) > len(payload_of(reply))


def test_bytes_are_counted_as_flower_serializes_them():
    question = Message(RecordDict(), dst_node_id=1, message_type="train")
    for num_values in (0, 1, 100, 5000):
        arrays = ArrayRecord({"x" * (index + 1): Array(np.zeros(num_values + index)) for index in range(130)})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"loss": 0.5}), "empty": ArrayRecord()})
        reply = Message(content, reply_to=question)

        assert serialized_bytes(reply) == message_to_proto(reply).ByteSize()


def test_classes_become_labels_by_their_names():
    named = named_prompts(Upload([PromptCount(0, "a cat", 1, "sketch")], ("cat",)))

    assert label_prompts(named, ["dog", "cat"]) == [PromptCount(1, "a cat", 1, "sketch")]


def reply_with(embeddings, prompts=("e",)):
    upload = Upload([PromptCount(0, name, 1) for name in prompts], ("cat",), embeddings)
    question = Message(RecordDict(), dst_node_id=1, message_type="query.prompts")
    return Message(prompts_reply(upload, 1, 0), reply_to=question)


def test_embeddings_survive_the_journey_and_their_bytes_are_counted():
    tensor = torch.randn(5, 8).half()
    name = embedding_name(tensor)

    received, size = embeddings_of(reply_with({name: tensor}, [name]), 5, 8)

    assert torch.equal(received[name], tensor)
    assert 5 * 8 * 2 < size < 5 * 8 * 2 + 200


@pytest.mark.parametrize(
    ("embeddings", "reason"),
    [
        ({}, "must hold"),
        ({"e": torch.zeros(5, 8)}, "float16"),
        ({"e": torch.zeros(5).half()}, "float16"),
        ({"e": torch.zeros(0, 8).half()}, "float16"),
        ({"e": torch.zeros(6, 8).half()}, "T from 1 to 5"),
        ({"e": torch.full((2, 8), float("nan")).half()}, "finite"),
        ({"e": torch.zeros(2, 8).half(), "f": torch.zeros(2, 9).half()}, "width"),
        ({"e": torch.zeros(2, 8).half()}, "name that its content gives it"),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(embeddings, reason):
    reply = reply_with(embeddings)

    with pytest.raises(PromptError, match=reason):
        embeddings_of(reply, 5, 8)


def test_very_many_empty_embeddings_are_not_read():
    header = json.dumps({f"{number}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for number in range(9)})
    packed = len(header).to_bytes(8, "little") + header.encode()

    with pytest.raises(PromptError, match="too few for all"):
        embeddings_of(sent(packed), 5, 8)
    two = {embedding_name(tensor): tensor for tensor in (torch.zeros(1, 8).half(), torch.ones(1, 8).half())}
    assert embeddings_of(sent(save(two)), 5, 8)[0].keys() == two.keys()  # no fewer numbers than each must hold


some_tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 8), max_size=3),
    st.sampled_from([torch.float16, torch.float32, torch.int8]),
    st.sampled_from([0.0, 1.5, -3.0, float("inf"), float("nan")]),
)


def named(pair):
    honest, tensor = pair
    return (embedding_name(tensor) if honest else "e"), tensor


def sent(packed):
    question = Message(RecordDict(), dst_node_id=1, message_type="query.prompts")
    return Message(RecordDict({"prompts": ConfigRecord({"embeddings": packed})}), reply_to=question)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(st.tuples(st.booleans(), some_tensors), max_size=3).map(lambda pairs: save(dict(map(named, pairs)))),
        st.text(max_size=20),
        st.lists(st.binary(max_size=5), max_size=3),
    )
)
def test_whatever_embeddings_arrive_only_those_that_the_encoder_could_have_written_pass(packed):
    try:
        received, _ = embeddings_of(sent(packed), 5, 8)
    except PromptError:
        return
    for name, tensor in received.items():
        assert tensor.dtype == torch.float16
        assert 1 <= tensor.shape[0] <= 5
        assert tensor.shape[1:] == (8,)
        assert tensor.isfinite().all()
        assert name == embedding_name(tensor)


numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.lists(st.integers(0, 9), max_size=2))


@given(numbers, numbers | st.booleans() | st.text(max_size=5) | st.binary(max_size=5))
def test_whatever_numbers_arrive_they_are_in_range_or_none(unreadable, place):
    question = Message(RecordDict(), dst_node_id=1, message_type="query.prompts")
    content = {
        "metrics": MetricRecord({"num-unreadable": unreadable}), "client": ConfigRecord({"partition-id": place}),
    }  # fmt: skip
    reply = Message(RecordDict(content), reply_to=question)

    assert num_unreadable_of(reply) in range(10_000_001)
    assert place_of(reply) is None or place_of(reply) in range(1_000_000)


@pytest.mark.parametrize(
    "told",
    [[3, 2], [3, 2, -1], [2, 3, 0], [3, 1, 2], [10**7 + 1, 0, 0], [3.0, 2.0, 1.0], [True, True, True], "321", None],
)
def test_numbers_of_changed_captions_that_cannot_be_are_as_good_as_untold(told):
    question = Message(RecordDict(), dst_node_id=1, message_type="query.prompts")
    upload = Upload([PromptCount(0, "a cat", 1)], ("cat",), defended=(3, 2, 1))
    reply = Message(prompts_reply(upload, 1, 0), reply_to=question)
    assert defended_of(reply) == (3, 2, 1)

    if told is None:
        del reply.content["prompts"]["defended"]
    else:
        reply.content["prompts"]["defended"] = told

    assert defended_of(reply) is None
