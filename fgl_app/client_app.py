"""The ClientApp: thin handlers that load this node's data and call the functions of ``clients``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from logging import ERROR, INFO
from typing import cast

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from torch import nn

from clients.local_training import evaluate_held_out, train_locally
from clients.prompting import Captioner, write_prompts
from fgl_app.config import Settings, parse_run_config
from fgl_app.data.sources import ClientData, class_names_of, load_client_data
from fgl_app.errors import DataError, FGLError
from fgl_app.models import build_model, from_arrays, to_arrays
from fgl_app.records import (
    ARRAYS,
    CLIENT,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    client_record,
    evaluation_metrics,
    prompts_reply,
)
from fgl_app.rng import torch_generator
from fgl_app.training import pick_device

Handler = Callable[[Message, Settings, ClientData, Context], RecordDict]


def answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Make a Flower handler that answers a failure with a code and a neutral sentence.

    Flower would send the exception's text, which may name private files, to the server.
    """

    @functools.wraps(handler)
    def wrapped(message: Message, context: Context) -> Message:
        try:
            settings = parse_run_config(context.run_config)
            data = load_client_data(settings.data, context.node_config, settings.run.seed)
            return Message(handler(message, settings, data, context), reply_to=message)
        except FGLError as error:
            log(ERROR, "this client failed: %s", error)
            return Message(Error(error.client_code, error.client_sentence), reply_to=message)
        except Exception:
            log(ERROR, "this client failed", exc_info=True)
            return Message(Error(FGLError.client_code, FGLError.client_sentence), reply_to=message)

    return wrapped


def prompts(message: Message, settings: Settings, data: ClientData, context: Context) -> RecordDict:
    """Answer ``query.prompts``: distinct prompts of this client's training images, with counts."""
    written = write_prompts(
        data.train,
        class_names_of(settings.data),
        class_template=settings.prompts.class_prompt,
        instance_template=settings.prompts.instance_prompt,
        captioner=_captioner(settings, context) if settings.prompts.prompt_level == "instance" else None,
    )
    log(INFO, "client %s sends %s distinct prompts", data.partition_id, len(written))
    return prompts_reply(written, len(data.train), data.partition_id)


def train(message: Message, settings: Settings, data: ClientData, context: Context) -> RecordDict:
    """Answer ``train``: the global model after local SGD, and its loss."""
    model = _received_model(message, settings)
    server_round = cast(int, message.content[CONFIG]["server-round"])
    loss = train_locally(
        model,
        data.train,
        local_epochs=settings.training.local_epochs,
        batch_size=settings.training.batch_size,
        learning_rate=settings.training.learning_rate,
        augmentation=settings.training.augmentation,
        generator=torch_generator(settings.run.seed, "local-training", server_round, data.partition_id),
        device=pick_device(settings.run.device),
    )
    return RecordDict(
        {
            ARRAYS: to_arrays(model),
            METRICS: MetricRecord({NUM_EXAMPLES: len(data.train), "loss": loss}),
            CLIENT: client_record(data.partition_id),
        }
    )


def evaluate(message: Message, settings: Settings, data: ClientData, context: Context) -> RecordDict:
    """Answer ``evaluate``: loss and accuracy of the global model on this client's held-out images."""
    model = _received_model(message, settings)
    if len(data.held_out.test) == 0:
        raise DataError("A client that evaluates must hold at least 3 images of some class; one in five is held out.")
    validation, test = evaluate_held_out(model, data.held_out, pick_device(settings.run.device))
    return RecordDict(
        {
            METRICS: evaluation_metrics(validation, test),
            CLIENT: client_record(data.partition_id),
        }
    )


def _received_model(message: Message, settings: Settings) -> nn.Module:
    model = build_model(
        settings.training.model, len(class_names_of(settings.data)), settings.data.image_size, settings.run.seed
    )
    return from_arrays(model, message.content.array_records[ARRAYS])


def _captioner(settings: Settings, context: Context) -> Captioner:
    from clients.captioning import Blip2Captioner  # seconds of import, and only for instance-level prompts

    source = context.node_config.get("captioner", settings.prompts.captioner)
    return Blip2Captioner(
        str(source),
        revision=settings.prompts.captioner_revision,
        batch_size=settings.prompts.captioning_batch_size,
        max_new_tokens=settings.prompts.max_new_tokens,
        device=pick_device(settings.run.device),
    )


app = ClientApp()
app.query("prompts")(answer(prompts))
app.train()(answer(train))
app.evaluate()(answer(evaluate))
