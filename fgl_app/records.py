"""Keys and codecs of the Flower messages between server and clients."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import cast

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto

from fgl_app.errors import PromptError
from fgl_app.prompts import MAX_PROMPT_CHARS, PromptCount, is_printable
from fgl_app.training import Evaluation

PROMPTS_MESSAGE = "query.prompts"
ARRAYS, CONFIG, METRICS, PROMPTS, CLIENT = "arrays", "config", "metrics", "prompts", "client"
NUM_EXAMPLES = "num-examples"
PARTITION_ID = "partition-id"
PAYLOAD = "payload"

MAX_PROMPTS = 1_000_000
MAX_PAYLOAD_BYTES = 32 * 2**20
"""Largest decompressed payload of one client."""


def encode_prompts(prompts: Sequence[PromptCount]) -> bytes:
    """Pack prompts for the upload: zlib-compressed UTF-8 JSON, ``[[label, count, prompt], ...]``."""
    rows = [[item.label, item.count, item.prompt] for item in prompts]
    return zlib.compress(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode(), 9)


def decode_prompts(payload: bytes, num_classes: int) -> list[PromptCount]:
    """Unpack and check what a client uploaded; clients are not trusted.

    Args:
        payload: Bytes as :func:`encode_prompts` makes them.
        num_classes: Number of classes K; labels must lie in 0 to K - 1.

    Raises:
        PromptError: If anything is malformed, too large or out of range. The message holds no prompt.
    """
    try:
        unzip = zlib.decompressobj()
        raw = unzip.decompress(payload, MAX_PAYLOAD_BYTES)
        if unzip.unconsumed_tail or not unzip.eof:
            raise PromptError(f"A client's prompts must unpack to at most {MAX_PAYLOAD_BYTES} bytes, whole.")
        rows = json.loads(raw.decode("utf-8"))
    except (zlib.error, ValueError, RecursionError):
        raise PromptError("A client's prompts must be zlib-compressed UTF-8 JSON, but cannot be read.") from None
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_PROMPTS:
        raise PromptError(f"A client must send 1 to {MAX_PROMPTS} distinct prompts.")
    prompts = [_checked_row(row, num_classes) for row in rows]
    if len({(item.label, item.prompt) for item in prompts}) < len(prompts):
        raise PromptError("A client's prompts must be distinct within a class, but one is repeated.")
    return prompts


def _checked_row(row: object, num_classes: int) -> PromptCount:
    match row:
        case [int(label), int(count), str(prompt)] if not isinstance(label, bool) and not isinstance(count, bool):
            pass
        case _:
            raise PromptError("Each prompt of a client must be [label, count, text].")
    if not 0 <= label < num_classes:
        raise PromptError(f"A prompt's label must be 0 to {num_classes - 1}, but is {label}.")
    if not 1 <= count <= 10**9:
        raise PromptError("A prompt's count must be 1 to 1,000,000,000.")
    if not 1 <= len(prompt) <= MAX_PROMPT_CHARS:
        raise PromptError(f"A prompt must have 1 to {MAX_PROMPT_CHARS} characters, but one has {len(prompt)}.")
    if not all(map(is_printable, prompt)):
        raise PromptError("A prompt must hold printable characters only.")
    return PromptCount(label, prompt, count)


def client_record(partition_id: int) -> ConfigRecord:
    """Record that lets the server put replies into a reproducible order; Flower's node ids are random."""
    return ConfigRecord({PARTITION_ID: partition_id})


def prompts_reply(prompts: Sequence[PromptCount], num_examples: int, partition_id: int) -> RecordDict:
    """Build the content of a client's answer to :data:`PROMPTS_MESSAGE`."""
    return RecordDict(
        {
            PROMPTS: ConfigRecord({PAYLOAD: encode_prompts(prompts)}),
            METRICS: MetricRecord({NUM_EXAMPLES: num_examples}),
            CLIENT: client_record(partition_id),
        }
    )


def payload_of(message: Message) -> bytes:
    """Return the packed prompts of a client's reply.

    Raises:
        PromptError: If the reply has no such record.
    """
    record = message.content.get(PROMPTS)
    payload = record.get(PAYLOAD) if isinstance(record, ConfigRecord) else None
    if not isinstance(payload, bytes):
        raise PromptError(f"A client's reply must hold bytes under {PROMPTS}/{PAYLOAD}.")
    return payload


def reply_order(message: Message) -> tuple[int, int]:
    """Sort key of a reply: the partition id where the client sent one, then the node id."""
    record = message.content.get(CLIENT) if message.has_content() else None
    partition_id = record.get(PARTITION_ID) if isinstance(record, ConfigRecord) else None
    return (partition_id if isinstance(partition_id, int) else 2**62, message.metadata.src_node_id)


def evaluation_metrics(validation: Evaluation, test: Evaluation) -> MetricRecord:
    """Build a client's answer to ``evaluate``: sums over its images, which the server divides."""
    return MetricRecord(
        {
            NUM_EXAMPLES: test.num_examples,
            "loss": test.loss,
            "accuracy": test.accuracy,
            "num-validation": validation.num_examples,
            "validation_accuracy": validation.accuracy,
        }
    )


def mean_evaluation(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Average the clients' evaluations, each measure over the images that it was taken on.

    Args:
        contents: Replies as :func:`evaluation_metrics` makes them.
        weighted_by_key: Key of the number of test images; Flower passes it.
    """
    records = [next(iter(content.metric_records.values())) for content in contents]

    def mean(key: str, weight_key: str) -> float:
        pairs = [(cast(float, record[key]), cast(int, record[weight_key])) for record in records]
        total = sum(weight for _, weight in pairs)
        return sum(value * weight for value, weight in pairs) / total if total else 0.0

    return MetricRecord(
        {
            "loss": mean("loss", weighted_by_key),
            "accuracy": mean("accuracy", weighted_by_key),
            "validation_accuracy": mean("validation_accuracy", "num-validation"),
        }
    )


def serialized_bytes(message: Message) -> int:
    """Size of a whole message, metadata included, as Flower's protocol buffers serialize it."""
    return int(message_to_proto(message).ByteSize())
