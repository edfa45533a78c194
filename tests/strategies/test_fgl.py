import functools
import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Strategy,
)
from PIL import Image

from fgl_app.cards import load_card
from fgl_app.config import parse_run_config
from fgl_app.data.images import ImageSet
from fgl_app.errors import RoundError
from fgl_app.phases import initial_arrays
from fgl_app.prompts import MergedPrompts, PromptCount, PromptLimits
from strategies import FGL, CheckedRounds
from strategies.prompt_round import PromptRound
from strategies.updates import restore_integers

SHUFFLENET = "shufflenet_v2_x0_5"
"""The smallest of torchvision's models with BatchNorm."""
NOTHING = ImageSet(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


def fedavg(num_clients: int = 3) -> FedAvg:
    return FedAvg(
        fraction_evaluate=0.0, min_train_nodes=num_clients, min_evaluate_nodes=0, min_available_nodes=num_clients
    )


def ask_for_prompts(grid: Grid, **changes: object) -> PromptRound:
    options = {"class_names": load_card("digits").class_names(), "deadline_s": 1.0}
    return PromptRound(grid, PromptLimits(1000, 1000), **(options | changes))


def identity_fgl(inner: Strategy | None = None, **changes: object) -> FGL:
    options = {
        "class_names": load_card("digits").class_names(),
        "num_clients": 3,
        "prompt_round": ask_for_prompts,
        "synthesize": lambda merged, listen: NOTHING,
        "pretrain": lambda arrays, images: arrays,
        "connect_timeout_s": 1,
    }
    return FGL(inner or fedavg(), **(options | changes))


@pytest.fixture
def shufflenet(run_config):
    """Settings of a model with BatchNorm, whose number of batches is an integer."""
    return parse_run_config(run_config | {"model": SHUFFLENET})


def same(first: ArrayRecord, second: ArrayRecord) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[k].numpy(), second[k].numpy()) for k in first)


def test_with_an_identity_as_server_phase_it_is_its_inner_strategy(make_grid, settings):
    start = initial_arrays(settings, settings.card.class_names())

    ours = identity_fgl().start(make_grid(), start, num_rounds=3).arrays
    # Rounds 2 and 3 of FGL are FedAvg's rounds 2 and 3, whose number seeds the clients' order of images.
    theirs = CheckedRounds(fedavg(), num_clients=3, rounds_done=1).start(make_grid(), start, num_rounds=2).arrays

    assert same(ours, theirs)


def test_one_round_is_one_shot(make_grid, settings):
    grid = make_grid()
    marked = ArrayRecord({"weight": torch.ones(1)})
    seen: list[int] = []

    result = identity_fgl(pretrain=lambda arrays, images: marked).start(
        grid,
        initial_arrays(settings, settings.card.class_names()),
        num_rounds=1,
        evaluate_fn=lambda number, arrays: seen.append(number),
    )

    assert same(result.arrays, marked)
    assert grid.asked == ["query.prompts"] * 3
    assert seen == [1]


def test_rounds_are_counted_as_the_paper_does(make_grid, settings):
    grid = make_grid()

    result = identity_fgl().start(
        grid,
        initial_arrays(settings, settings.card.class_names()),
        num_rounds=3,
        evaluate_fn=lambda number, arrays: MetricRecord({"number": number}),
    )

    assert grid.asked == ["query.prompts"] * 3 + ["train"] * 6
    assert list(result.train_metrics_clientapp) == [2, 3]
    assert {number: record["number"] for number, record in result.evaluate_metrics_serverapp.items()} == {
        1: 1,
        2: 2,
        3: 3,
    }


def test_clients_prompts_reach_the_synthesis_merged(make_grid, settings):
    received: list[PromptCount] = []

    exchanges: list[PromptRound] = []
    strategy = identity_fgl(
        synthesize=lambda merged, listen: received.extend(merged.prompts) or NOTHING,
        on_prompts=lambda merged, exchange: exchanges.append(exchange),
    )
    strategy.start(make_grid(partition="iid"), initial_arrays(settings, settings.card.class_names()), num_rounds=1)

    assert [item.label for item in received] == list(range(10))
    assert received[7].prompt == "a photo of a handwritten seven"
    assert sum(item.count for item in received) == 838  # every training image of every client, once
    assert len(exchanges[0].message_bytes) == 3


def test_fine_tuning_follows_every_aggregation(make_grid, settings):
    tuned: list[int] = []

    def finetune(server_round: int, arrays: ArrayRecord, images: ImageSet) -> ArrayRecord:
        tuned.append(server_round)
        return ArrayRecord({name: torch.zeros_like(torch.from_numpy(a.numpy())) for name, a in arrays.items()})

    result = identity_fgl(finetune=finetune).start(
        make_grid(), initial_arrays(settings, settings.card.class_names()), num_rounds=3
    )

    assert tuned == [2, 3]
    assert not result.arrays["9.weight"].numpy().any()


def test_a_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(make_grid, settings):
    start = initial_arrays(settings, settings.card.class_names())
    whole = identity_fgl().start(make_grid(), start, num_rounds=3).arrays
    half = identity_fgl().start(make_grid(), start, num_rounds=2).arrays
    grid = make_grid()

    resumed = (
        identity_fgl(
            prompts=MergedPrompts((PromptCount(0, "zero", 1),), load_card("digits").class_names()), rounds_done=2
        )
        .start(grid, half, num_rounds=3)
        .arrays
    )

    assert same(resumed, whole)
    assert grid.asked == ["train"] * 3


@pytest.mark.parametrize(
    "inner",
    [
        FedAvg,
        FedAvgM,
        FedAdam,
        FedYogi,
        FedAdagrad,
        FedMedian,
        FedTrimmedAvg,
    ],
)
def test_any_inner_strategy_trains_and_keeps_integer_buffers(make_grid, shufflenet, inner):
    strategy = identity_fgl(inner(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3))

    arrays = strategy.start(
        make_grid(model=SHUFFLENET), initial_arrays(shufflenet, shufflenet.card.class_names()), num_rounds=2
    ).arrays

    assert {array.dtype for name, array in arrays.items() if name.endswith("num_batches_tracked")} == {"int64"}
    assert not same(arrays, initial_arrays(shufflenet, shufflenet.card.class_names()))


def test_clients_evaluate_every_round_the_one_shot_model_included(make_grid, settings):
    inner = FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3)
    strategy = identity_fgl(inner)

    strategy.start(make_grid(), initial_arrays(settings, settings.card.class_names()), num_rounds=2)

    assert list(strategy.client_metrics) == [1, 2]
    assert 0 <= strategy.client_metrics[2]["accuracy"] <= 1


def test_all_clients_failing_in_the_prompt_round_is_an_error_without_their_words(make_grid, settings):
    grid = make_grid()
    grid.broken = set(grid.node_configs)

    with pytest.raises(RoundError, match=r"prompt round.*3 of 3 failed: The client failed") as caught:
        identity_fgl().start(grid, initial_arrays(settings, settings.card.class_names()), num_rounds=2)

    assert "own words" not in str(caught.value)


def test_all_clients_failing_in_a_training_round_is_an_error(make_grid, settings):
    grid = make_grid()
    grid.broken = set(grid.node_configs)

    with pytest.raises(RoundError, match=r"round 1 \(train\).*3 of 3 failed"):
        CheckedRounds(fedavg(), num_clients=3).start(
            grid, initial_arrays(settings, settings.card.class_names()), num_rounds=1
        )


def test_a_client_failing_is_left_out(make_grid, settings):
    grid = make_grid(partition="iid")
    grid.broken = {1001}
    received: list[PromptCount] = []

    strategy = identity_fgl(synthesize=lambda merged, listen: received.extend(merged.prompts) or NOTHING)
    strategy.start(grid, initial_arrays(settings, settings.card.class_names()), num_rounds=2)

    assert 0 < sum(item.count for item in received) < 838
    assert len(strategy.model_bytes[2]) == 2


def test_too_few_clients_is_an_error(make_grid, settings):
    with pytest.raises(RoundError, match="`num-clients` is 4, but after 1 s only 3 clients"):
        identity_fgl(num_clients=4).start(
            make_grid(), initial_arrays(settings, settings.card.class_names()), num_rounds=1
        )


def test_a_silent_exchange_is_an_error(make_grid, settings):
    grid = make_grid()
    grid.silent = True

    with pytest.raises(RoundError, match="no client replied in time"):
        identity_fgl().start(grid, initial_arrays(settings, settings.card.class_names()), num_rounds=1)


def test_a_client_that_goes_away_ends_the_run_instead_of_hanging(make_grid, settings):
    grid = make_grid()

    def pretrain(arrays: ArrayRecord, images: ImageSet) -> ArrayRecord:
        del grid.node_configs[1002]
        return arrays

    with pytest.raises(RoundError, match="only 2 clients were connected"):
        identity_fgl(pretrain=pretrain).start(grid, initial_arrays(settings, settings.card.class_names()), num_rounds=2)


def test_a_clients_own_words_are_never_logged(make_grid, settings, caplog):
    grid = make_grid()
    grid.broken = {1001}

    with caplog.at_level(logging.DEBUG, "flwr"):
        identity_fgl().start(grid, initial_arrays(settings, settings.card.class_names()), num_rounds=2)

    assert "1 of 3 failed: The client failed" in caplog.text
    assert "own words" not in caplog.text


def test_differential_privacy_wraps_inside(make_grid, shufflenet):
    noisy = DifferentialPrivacyServerSideFixedClipping(fedavg(), 0.001, 1.0, 3)

    arrays = (
        identity_fgl(noisy)
        .start(make_grid(model=SHUFFLENET), initial_arrays(shufflenet, shufflenet.card.class_names()), num_rounds=2)
        .arrays
    )

    assert {array.dtype for name, array in arrays.items() if name.endswith("num_batches_tracked")} == {"int64"}


def test_integer_buffers_are_rounded_back():
    averaged = ArrayRecord({"count": Array(np.array(6.9999)), "weight": Array(np.array([1.5]))})

    restored = restore_integers(averaged, {"count": "int64", "weight": "float32"})

    assert (restored["count"].numpy().item(), restored["count"].dtype) == (7, "int64")
    assert (restored["weight"].numpy().item(), restored["weight"].dtype) == (1.5, "float32")


def test_clients_with_different_classes_form_the_union_and_train_on_it(make_grid, run_config, tmp_path):
    for site, names in enumerate((("cat", "dog"), ("dog", "eel"), ("cat", "eel"))):
        for shade, name in enumerate(names):
            (tmp_path / str(site) / name).mkdir(parents=True)
            for index in range(6):
                Image.new("L", (8, 8), 40 * shade + index).save(tmp_path / str(site) / name / f"{index}.png")
    settings = parse_run_config(run_config | {"dataset": "folder"})
    grid = make_grid(dataset="folder")
    for site, node_config in enumerate(grid.node_configs.values()):
        node_config["data-path"] = str(tmp_path / str(site))
    merged: list[MergedPrompts] = []

    result = identity_fgl(
        class_names=(),
        prompt_round=functools.partial(ask_for_prompts, class_names=()),
        on_prompts=lambda found, exchange: merged.append(found),
        pretrain=lambda arrays, images: initial_arrays(settings, merged[0].class_names),
    ).start(grid, ArrayRecord(), num_rounds=2)

    assert merged[0].class_names == ("cat", "dog", "eel")
    assert [item.prompt for item in merged[0].prompts] == ["a photo of a cat", "a photo of a dog", "a photo of an eel"]
    assert result.arrays["9.bias"].numpy().shape == (3,)
    assert not same(result.arrays, initial_arrays(settings, merged[0].class_names))


def test_embeddings_come_along_with_their_prompts(make_grid, settings):
    merged: list[MergedPrompts] = []
    exchanges: list[PromptRound] = []

    def keep(found: MergedPrompts, exchange: PromptRound) -> None:
        merged.append(found)
        exchanges.append(exchange)

    strategy = identity_fgl(prompt_round=functools.partial(ask_for_prompts, embedding_shape=(32, 64)), on_prompts=keep)

    strategy.start(
        make_grid(prompt_level="embedding", embedding_summary="mean"),
        initial_arrays(settings, settings.card.class_names()),
        num_rounds=1,
    )

    assert {item.prompt for item in merged[0].prompts} == set(merged[0].embeddings)
    assert sum(item.count for item in merged[0].prompts) == 838
    assert min(exchanges[0].payload_bytes) > 64 * 2
