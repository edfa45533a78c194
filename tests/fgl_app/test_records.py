import json
import zlib

import pytest
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fgl_app.data.digits import CLASS_NAMES
from fgl_app.errors import PromptError
from fgl_app.prompts import PromptCount, class_prompts
from fgl_app.records import decode_prompts, encode_prompts, payload_of, prompts_reply, serialized_bytes

words = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=20)
prompt_lists = st.lists(
    st.builds(PromptCount, st.integers(0, 9), words, st.integers(1, 10**9)),
    min_size=1,
    max_size=10,
    unique_by=lambda item: (item.label, item.prompt),
)


@given(prompt_lists)
def test_prompts_survive_the_journey(prompts):
    assert decode_prompts(encode_prompts(prompts), num_classes=10) == prompts


@given(st.binary(max_size=200))
def test_bytes_that_are_no_prompts_are_refused(payload):
    with pytest.raises(PromptError):
        decode_prompts(payload, num_classes=10)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        {},
        [[0, 1]],
        [[10, 1, "label out of range"]],
        [[-1, 1, "label out of range"]],
        [[True, 1, "label is no number"]],
        [[0, 0, "count too small"]],
        [[0, 10**10, "count too large"]],
        [[0, 1.5, "count is no whole number"]],
        [[0, 1, ""]],
        [[0, 1, "x" * 1001]],
        [[0, 1, "line\nbreak"]],
        [[0, 1, "right to left \u202e override"]],
        [[0, 1, "lone surrogate \ud800"]],
        [[0, 1, "twice"], [0, 2, "twice"]],
    ],
)
def test_malformed_prompts_are_refused_without_being_quoted(rows):
    with pytest.raises(PromptError) as caught:
        decode_prompts(zlib.compress(json.dumps(rows).encode()), num_classes=10)

    assert not any(text in str(caught.value) for row in rows for text in row if isinstance(text, str) and len(text) > 3)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr("fgl_app.records.MAX_PAYLOAD_BYTES", 1000)

    with pytest.raises(PromptError, match="1000 bytes"):
        decode_prompts(zlib.compress(b"[" + b" " * 10**6 + b"]"), num_classes=10)


def test_ten_class_prompts_fit_the_papers_229_bytes():
    prompts = class_prompts(
        [label for label in range(10) for _ in range(80 + label)], CLASS_NAMES, "A photo of a {class}"
    )
    question = Message(RecordDict(), dst_node_id=1, message_type="query.prompts")
    reply = Message(prompts_reply(prompts, 845, 0), reply_to=question)

    assert len(prompts) == 10
    assert len(payload_of(reply)) <= 229
    assert serialized_bytes(reply) > len(payload_of(reply))
