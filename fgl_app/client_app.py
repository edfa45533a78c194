"""The ClientApp: thin handlers that load this node's data and call the functions of ``clients``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from logging import ERROR, INFO, WARNING
from typing import cast

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.common.logger import log
from torch import nn

from clients.approval import approvals_folder, check_approved, wait_for_approval
from clients.local_training import evaluate_held_out, train_locally
from fgl_app.client_prompts import to_upload, write_own_prompts
from fgl_app.config import parse_run_config
from fgl_app.data.findings import listed
from fgl_app.data.sources import ClientData, load_client_data
from fgl_app.environment import use_proxies
from fgl_app.errors import DataError, FGLError
from fgl_app.files import canonical_json, sha256
from fgl_app.models import build_model, from_arrays, to_arrays
from fgl_app.prompts.rehearsal import check_site
from fgl_app.records import (
    ARRAYS,
    CLASS_NAMES,
    CLIENT,
    CONFIG,
    METRICS,
    client_record,
    evaluation_metrics,
    prompts_reply,
    training_metrics,
)
from fgl_app.reporting.earlier_start import FREE_KEYS
from fgl_app.rng import torch_generator
from fgl_app.settings import Settings
from fgl_app.training import pick_device

Handler = Callable[[Message, Settings, Context], RecordDict]
_CLIPPING = {"client-fixed": fixedclipping_mod, "client-adaptive": adaptiveclipping_mod}
"""Flower's mod for each value of ``client-dp`` that clips updates on the clients."""
_FOUND = "found"
_MOST_NAMES = 20
"""Record in a node's state of the run: what this client has said of its images."""


def answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Make a Flower handler that answers a failure with a code and a neutral sentence.

    Flower would send the exception's text, which may name private files, to the server.
    """

    @functools.wraps(handler)
    def wrapped(message: Message, context: Context) -> Message:
        use_proxies()
        try:
            return Message(handler(message, parse_run_config(context.run_config), context), reply_to=message)
        except FGLError as error:
            log(ERROR, "this client failed: %s", error)
            return Message(Error(error.client_code, error.client_sentence), reply_to=message)
        except Exception:
            log(ERROR, "this client failed", exc_info=True)
            return Message(Error(FGLError.client_code, FGLError.client_sentence), reply_to=message)

    return wrapped


def clip_if_asked(handler: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    """Have Flower's mod clip the update that a handler answers with, where ``client-dp`` says so."""

    @functools.wraps(handler)
    def wrapped(message: Message, context: Context) -> Message:
        mod = _CLIPPING.get(str(context.run_config.get("client-dp")))
        return handler(message, context) if mod is None else mod(message, context, handler)

    return wrapped


def place(message: Message, settings: Settings, context: Context) -> RecordDict:
    """Answer ``query.place``: the partition id, by which the server draws the clients of a round reproducibly."""
    return RecordDict({CLIENT: client_record(int(context.node_config.get("partition-id", 0)))})


def prompts(message: Message, settings: Settings, context: Context) -> RecordDict:
    """Answer ``query.prompts``: distinct prompts of this client's training images, with counts."""
    data = _data(message, settings, context)
    if not settings.card.classes:
        check_site(data.class_names, settings)
    written = write_own_prompts(data, settings, context.node_config)
    if _needs_approval(settings, context):
        wait_for_approval(
            written.prompts,
            data.class_names,
            settings.run.run_name,
            _terms(settings),
            approvals_folder(),
            settings.policy.prompt_deadline_s,
            settings.run.num_server_rounds - 1,
        )
    upload = to_upload(written, settings, data)
    log(INFO, "client %s sends %s distinct prompts", data.partition_id, len(upload.prompts))
    return prompts_reply(upload, _told(len(data.train), settings), data.partition_id, _unreadable_told(data, settings))


def train(message: Message, settings: Settings, context: Context) -> RecordDict:
    """Answer ``train``: the global model after local SGD, and its loss, which DP-SGD withholds as 0."""
    _check_approved(settings, context)
    data = _data(message, settings, context)
    model = _received_model(message, settings, data.class_names)
    config = cast(ConfigRecord, message.content[CONFIG])
    training, privacy = settings.training, settings.privacy
    train_model: Callable[..., float | None]
    if privacy.example_dp_noise:  # its random numbers are secret, and none is the run's
        from clients.private_training import train_privately  # seconds of import

        train_model = functools.partial(
            train_privately, noise_multiplier=privacy.example_dp_noise, clipping_norm=privacy.example_dp_clip
        )
    else:
        train_model = functools.partial(
            train_locally,
            compiled=training.compile_training,
            generator=torch_generator(
                settings.run.seed, "local-training", cast(int, config["server-round"]), data.partition_id
            ),
        )
    loss = train_model(
        model,
        data.train,
        local_epochs=training.local_epochs,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        augmentation=training.augmentation,
        proximal_mu=float(cast(float, config.get("proximal-mu", 0.0))),  # sent by Flower's FedProx
        device=pick_device(settings.run.device),
    )
    return RecordDict(
        {
            ARRAYS: to_arrays(model),
            METRICS: training_metrics(_told(len(data.train), settings), loss or 0.0),
            CLIENT: client_record(data.partition_id, _unreadable_told(data, settings)),
        }
    )


def evaluate(message: Message, settings: Settings, context: Context) -> RecordDict:
    """Answer ``evaluate``: loss and accuracy of the global model on this client's held-out images."""
    _check_approved(settings, context)
    data = _data(message, settings, context)
    held_out = data.held_out()
    model = _received_model(message, settings, data.class_names)
    if len(held_out.test) == 0:
        raise DataError("A client that evaluates must hold at least 3 images of some class; one in five is held out.")
    validation, test = (
        dataclasses.replace(found, num_examples=_told(found.num_examples, settings))
        for found in evaluate_held_out(model, held_out, pick_device(settings.run.device))
    )
    return RecordDict({METRICS: evaluation_metrics(validation, test), CLIENT: client_record(data.partition_id)})


def _needs_approval(settings: Settings, context: Context) -> bool:
    return settings.privacy.require_approval or bool(context.node_config.get("require-approval", False))


def _check_approved(settings: Settings, context: Context) -> None:
    if _needs_approval(settings, context):
        check_approved(settings.run.run_name, _terms(settings), approvals_folder())


def _terms(settings: Settings) -> str:
    """Hash what an owner approves beside the prompts: all settings but those of where and how fast a run computes."""
    # In a run of more rounds more leaves the node, and the prompts of other images were not shown.
    kept = FREE_KEYS - {"num-server-rounds", "data-dir"}
    return sha256(canonical_json({key: value for key, value in settings.flat().items() if key not in kept}))


def _told(num_images: int, settings: Settings) -> int:
    """Return the number of images that the server is told: how many there are is the owner's to keep if counts are."""
    return num_images if settings.privacy.prompt_counts == "exact" else min(1, num_images)


def _unreadable_told(data: ClientData, settings: Settings) -> int:
    return data.num_unreadable if settings.privacy.prompt_counts == "exact" else 0


def _data(message: Message, settings: Settings, context: Context) -> ClientData:
    record = message.content.get(CONFIG)
    sent = record.get(CLASS_NAMES) if isinstance(record, ConfigRecord) else None
    names = [str(name) for name in sent] if isinstance(sent, list) else None
    if names is not None and not settings.own_folders and tuple(names) != settings.card.class_names():
        raise DataError(
            f"The card {settings.card.name} must list the server's classes in the server's order, but does not. Use "
            "the server's copy of it."
        )
    data = load_client_data(settings.card, settings.data, context.node_config, settings.run.seed, names)
    known = data.class_names if settings.own_folders and (names or settings.card.classes) else ()
    _say_what_was_found(data, context, [name for name in known if name not in data.findings.num_images])
    return data


def _say_what_was_found(data: ClientData, context: Context, absent: Sequence[str] = ()) -> None:
    """Log what was found where the images lie, once in a run: Flower starts a process for each message.

    Args:
        data: What the client holds.
        context: Holds what was said before.
        absent: The run's classes of which it has no image, as soon as the run's classes are known.
    """
    told = context.state.get(_FOUND)
    before = dict(told) if isinstance(told, ConfigRecord) else {}
    digest = data.findings.digest()
    context.state[_FOUND] = ConfigRecord({"digest": digest, "absent": len(absent)})
    if before.get("digest") != digest:
        for line in data.findings.lines():
            log(INFO, "client %s: %s", data.partition_id, line)
        for line in (*data.findings.warnings(), *listed(data.findings.unreadable)):
            log(WARNING, "client %s: %s", data.partition_id, line)
    if absent and before.get("absent") != len(absent):
        shown = ", ".join(absent[:_MOST_NAMES]) + (" and others" if len(absent) > _MOST_NAMES else "")
        log(WARNING, "client %s: no image here of %s of the run's classes: %s", data.partition_id, len(absent), shown)


def _received_model(message: Message, settings: Settings, class_names: Sequence[str]) -> nn.Module:
    model = build_model(settings.training.model, len(class_names), settings.data.image_size, settings.run.seed)
    return from_arrays(model, message.content.array_records[ARRAYS])


app = ClientApp()
app.query("prompts")(answer(prompts))
app.query("place")(answer(place))
app.train()(clip_if_asked(answer(train)))
app.evaluate()(answer(evaluate))
