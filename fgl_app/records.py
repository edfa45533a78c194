"""Keys and codecs of the Flower messages between server and clients."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import array_to_proto, recorddict_to_proto
from flwr.common.serde_utils import metadata_to_proto
from safetensors.torch import load, save

from fgl_app.errors import ConfigError, PromptError
from fgl_app.files import sha256
from fgl_app.prompts import NamedPrompt, PromptCount
from fgl_app.training import Evaluation

PROMPTS_MESSAGE = "query.prompts"
PLACE_MESSAGE = "query.place"
ARRAYS, CONFIG, METRICS, PROMPTS, CLIENT = "arrays", "config", "metrics", "prompts", "client"
NUM_EXAMPLES = "num-examples"
EQUAL_WEIGHT = "equal-weight"
"""Metric that is 1 for every client: the weight of the unweighted mean (FGL, Eq. 4)."""
NORM_BIT = "norm_bit"
"""Metric of Flower's adaptiveclipping_mod: 1 if the client clipped its update."""
NUM_UNREADABLE = "num-unreadable"
DEFENDED = "defended"
PARTITION_ID = "partition-id"
PAYLOAD, EMBEDDINGS = "payload", "embeddings"
CLASS_NAMES = "class-names"

MAX_PAYLOAD_BYTES = 32 * 2**20
"""Largest decompressed payload of one client."""
_HEADER_BYTES = 160
"""Most bytes that safetensors needs for the name, type, shape and place of one embedding."""
_TOKENS_OF_ROW = 8
"""Strings, brackets and commas of one row of prompts that has a domain."""
_MIN_TOKENS = 1_000_000
"""So many are parsed, some 100 MB of objects, even where fewer prompts are accepted, to be refused one by one."""
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,:\[{]', re.DOTALL)
"""Begins a value of JSON or ends one; the last quote may be absent, so that nothing is searched through twice."""
MAX_CLIENTS = 1_000_000
MAX_UNREADABLE = 10_000_000
MAX_CAPTIONS = 10_000_000


@dataclass(frozen=True)
class Upload:
    """What one client uploads in the prompt round."""

    prompts: Sequence[PromptCount]
    """Distinct prompts with counts; labels index :attr:`class_names`."""
    class_names: tuple[str, ...]
    """The label space: the run's, or the client's own where the run has none yet."""
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """At the level of embeddings: float16 ``[T, D]`` by the name that stands in the place of a prompt's text."""
    defended: tuple[int, int, int] | None = None
    """Captions written, of them changed by the client's defences, and of those such that nothing was left; None if that
    is not told."""


def encode_prompts(upload: Upload) -> bytes:
    """Pack prompts for the upload: zlib-compressed UTF-8 JSON, ``[[class name, count, prompt(, domain)], ...]``.

    Raises:
        PromptError: If they are more than the server unpacks.
    """
    rows = [
        [upload.class_names[item.label], item.count, item.prompt, *([item.domain] if item.domain else [])]
        for item in upload.prompts
    ]
    raw = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    _check_size("prompts", len(raw), "`max-prompts-per-client`, `max-prompt-chars` or `max-caption-words`")
    return zlib.compress(raw, 9)


def decode_prompts(payload: bytes, max_prompts: int = 0) -> list[object]:
    """Unpack what a client uploaded; its rows are not checked yet, see :func:`fgl_app.prompts.screen_prompts`.

    Args:
        payload: Bytes as :func:`encode_prompts` makes them.
        max_prompts: Prompts that are accepted of one client. What is far longer is not parsed: 32 MiB of ``{},{},...``,
            a small message, would become 11 million objects.

    Raises:
        PromptError: If the whole is malformed or too large. The message holds no prompt.
    """
    try:
        unzip = zlib.decompressobj()
        raw = unzip.decompress(payload, MAX_PAYLOAD_BYTES)
        if unzip.unconsumed_tail or not unzip.eof:
            raise PromptError(f"A client's prompts must unpack to at most {MAX_PAYLOAD_BYTES} bytes, whole.")
        most = max(_MIN_TOKENS, 2 * _TOKENS_OF_ROW * max_prompts)
        if sum(1 for _ in islice(_TOKEN.finditer(raw), most + 1)) > most:
            raise PromptError(
                f"A client's prompts must have at most {most // _TOKENS_OF_ROW} rows, but have more. Let it send "
                "fewer, or raise `max-prompts-per-client`."
            )
        rows = json.loads(raw.decode("utf-8"))
    except (zlib.error, ValueError, RecursionError):
        raise PromptError("A client's prompts must be zlib-compressed UTF-8 JSON, but cannot be read.") from None
    if not isinstance(rows, list):
        raise PromptError("A client's prompts must be a list, but are none.")
    return rows


def _check_size(what: str, num_bytes: int, remedy: str) -> None:
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise PromptError(
            f"The {what} of this client take {num_bytes:,} bytes, and the server accepts {MAX_PAYLOAD_BYTES:,} of one "
            f"client. Use a smaller {remedy}."
        )


def label_prompts(named: Iterable[NamedPrompt], class_names: Sequence[str]) -> list[PromptCount]:
    """Turn the class names of screened prompts into labels of the run's label space."""
    labels = {name: label for label, name in enumerate(class_names)}
    return [PromptCount(labels[item.class_name], item.prompt, item.count, item.domain) for item in named]


def client_record(partition_id: int, num_unreadable: int = 0) -> ConfigRecord:
    """Record that lets the server put replies into a reproducible order; Flower's node ids are random.

    Args:
        partition_id: The client's place among the clients.
        num_unreadable: Files among its images that could not be read.
    """
    return ConfigRecord({PARTITION_ID: partition_id, NUM_UNREADABLE: num_unreadable})


def prompts_reply(upload: Upload, num_examples: int, partition_id: int, num_unreadable: int = 0) -> RecordDict:
    """Build the content of a client's answer to :data:`PROMPTS_MESSAGE`.

    Args:
        upload: Prompts, and their embeddings if there are any.
        num_examples: Training images of the client.
        partition_id: Its place among the clients.
        num_unreadable: Files among its images that could not be read.

    Raises:
        PromptError: If it would be larger than what the server accepts.
    """
    record = ConfigRecord({PAYLOAD: encode_prompts(upload)})
    if upload.embeddings:
        packed = save(dict(upload.embeddings))
        _check_size("embeddings", len(packed), "`max-prompts-per-client`, or `embedding-summary` mean or clusters")
        record[EMBEDDINGS] = packed
    if upload.defended is not None:
        record[DEFENDED] = list(upload.defended)
    return RecordDict(
        {
            PROMPTS: record,
            METRICS: MetricRecord({NUM_EXAMPLES: num_examples}),
            CLIENT: client_record(partition_id, num_unreadable),
        }
    )


def num_unreadable_of(message: Message) -> int:
    """Return how many of its images a client says it could not read; 0 if it says nothing of the kind."""
    record = message.content.get(CLIENT)
    number = record.get(NUM_UNREADABLE) if isinstance(record, ConfigRecord) else None
    return number if type(number) is int and 0 < number <= MAX_UNREADABLE else 0


def defended_of(message: Message) -> tuple[int, int, int] | None:
    """Return what a client says its defences did, as :attr:`Upload.defended`; None if it says nothing that can be."""
    record = message.content.get(PROMPTS)
    told = record.get(DEFENDED) if isinstance(record, ConfigRecord) else None
    if not isinstance(told, list) or len(told) != 3 or any(type(number) is not int for number in told):
        return None
    captions, changed, emptied = (cast(int, number) for number in told)
    return (captions, changed, emptied) if 0 <= emptied <= changed <= captions <= MAX_CAPTIONS else None


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


def embeddings_of(message: Message, length: int, width: int) -> tuple[dict[str, torch.Tensor], int]:
    """Return and check the embeddings of a client's reply, and their size in bytes.

    Args:
        message: The reply.
        length: L of the generator's text encoder: what is longer, it could not have written.
        width: D of it.

    Raises:
        PromptError: If embeddings are absent, not float16 ``[T, D]`` of finite numbers with T up to L, or have other
            names than :func:`embedding_name` gives.
    """
    record = message.content.get(PROMPTS)
    packed = record.get(EMBEDDINGS) if isinstance(record, ConfigRecord) else None
    if not isinstance(packed, bytes) or len(packed) > MAX_PAYLOAD_BYTES:
        raise PromptError(f"A client's reply must hold at most {MAX_PAYLOAD_BYTES} bytes under {PROMPTS}/{EMBEDDINGS}.")
    header_end = 8 + int.from_bytes(packed[:8], "little")  # of safetensors: JSON with one object for each tensor
    if packed.count(b"{", 8, header_end) - 1 > max(1, (len(packed) - header_end) // (2 * width)):
        raise PromptError(
            f"A client's embeddings must each hold {width} numbers or more, but there are too few for all."
        )
    try:
        tensors = load(packed)
    except Exception:  # safetensors raises an exception class of its own
        raise PromptError("A client's embeddings must be safetensors, but cannot be read.") from None
    for tensor in tensors.values():
        if tensor.dtype != torch.float16 or tensor.dim() != 2 or not 1 <= len(tensor) <= length:
            raise PromptError(f"A client's embedding must be float16 [T, D] with T from 1 to {length}.")
        if tensor.shape[1] != width:
            raise PromptError(f"A client's embeddings must have the width of the generator's text encoder, {width}.")
        if not torch.isfinite(tensor).all():
            raise PromptError("A client's embedding must hold finite numbers only.")
    if any(name != embedding_name(tensor) for name, tensor in tensors.items()):
        raise PromptError("A client's embedding must have the name that its content gives it, but one has another.")
    return tensors, len(packed)


def check_embeddings_fit(num_images: int, length: int, width: int, max_prompts: int) -> None:
    """Check that a client can upload an embedding for each of its images, as it does where they are noised singly.

    Args:
        num_images: Training images of the client.
        length: L of the generator's text encoder.
        width: D of it.
        max_prompts: Prompts that the server accepts of one client.

    Raises:
        ConfigError: If they are too many.
    """
    most = min(max_prompts, MAX_PAYLOAD_BYTES // (2 * length * width + _HEADER_BYTES))
    if num_images > most:
        raise ConfigError(
            f"A client sends one noised embedding for each image where `embedding-epsilon` is set and "
            f"`embedding-summary` is none: with this `generator` and `max-prompts-per-client` at most {most} can be "
            f"sent, but one has {num_images} images. Use embedding-summary=mean."
        )


def embedding_name(embedding: torch.Tensor) -> str:
    """Name an embedding, float16 ``[T, D]``, by its content; the name stands in the place of a prompt's text."""
    content = f"{tuple(embedding.shape)}".encode() + embedding.contiguous().numpy().tobytes()
    return f"embedding:{sha256(content)[:32]}"


def place_of(message: Message) -> int | None:
    """Return the partition id that a client sent, or None if it sent none that can be one."""
    record = message.content.get(CLIENT) if message.has_content() else None
    partition_id = record.get(PARTITION_ID) if isinstance(record, ConfigRecord) else None
    fits = isinstance(partition_id, int) and not isinstance(partition_id, bool) and 0 <= partition_id < MAX_CLIENTS
    return cast(int, partition_id) if fits else None


def training_metrics(num_examples: int, loss: float) -> MetricRecord:
    """Build the metrics of a client's answer to ``train``; ``train_loss`` is the name that Flower's QFedAvg wants."""
    return MetricRecord({NUM_EXAMPLES: num_examples, EQUAL_WEIGHT: 1, "loss": loss, "train_loss": loss})


def evaluation_metrics(validation: Evaluation, test: Evaluation) -> MetricRecord:
    """Build a client's answer to ``evaluate``: means over its images with their numbers."""
    return MetricRecord(
        {
            NUM_EXAMPLES: test.num_examples,
            EQUAL_WEIGHT: 1,
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
        weighted_by_key: Key of the clients' weights in the aggregation, which Flower passes; an accuracy over all
            images is weighted by their numbers in any case.
    """
    records = [next(iter(content.metric_records.values())) for content in contents]

    def mean(key: str, weight_key: str) -> float:
        pairs = [(cast(float, record[key]), cast(int, record[weight_key])) for record in records]
        total = sum(weight for _, weight in pairs)
        return sum(value * weight for value, weight in pairs) / total if total else 0.0

    return MetricRecord(
        {
            "loss": mean("loss", NUM_EXAMPLES),
            "accuracy": mean("accuracy", NUM_EXAMPLES),
            "validation_accuracy": mean("validation_accuracy", "num-validation"),
        }
    )


def serialized_bytes(message: Message) -> int:
    """Size of a message with content, metadata included, as Flower's protocol buffers serialize it.

    Arrays are counted where they lie: to serialize a model for its size takes longer than to aggregate it.

    Raises:
        ValueError: If what a client says of its records cannot be serialized; Flower reads it from its JSON unchecked.
    """
    records = 0
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord):
            records += arrays_bytes(key, record)
        else:
            records += recorddict_to_proto(RecordDict({key: record})).ByteSize()
    return _field(metadata_to_proto(message.metadata).ByteSize()) + _field(records)


def arrays_bytes(key: str, arrays: ArrayRecord) -> int:
    """Size of a record of arrays in a message, as Flower's protocol buffers serialize it under ``key``."""
    content = sum(_field(_field(len(name.encode())) + _array_bytes(array)) for name, array in arrays.items())
    return _field(_field(len(key.encode())) + _field(content))


def _array_bytes(array: Array) -> int:
    described = array_to_proto(Array(array.dtype, array.shape, array.stype, b""))
    return _field(described.ByteSize() + _field(len(array.data)))


def _field(num_bytes: int) -> int:
    """Size of a field of protocol buffers: a tag, the length in groups of seven bits, and the bytes."""
    return 1 + max(1, math.ceil(num_bytes.bit_length() / 7)) + num_bytes
