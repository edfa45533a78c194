"""Faults of clients in a real deployment: each row of the README's table of faults that a client can cause."""

import shutil
import time

import pytest
from commands import results
from federation import Federation, federation

__all__ = ["federation"]

pytestmark = pytest.mark.e2e


def refused(run, number):
    """Map client to reason and count for a round of a finished run."""
    (row,) = [row for row in run["rounds"] if row["round"] == number]
    return {item["client"]: (item["reason"], item["count"]) for item in row.get("refused", [])}


def test_clients_that_fail_in_captioning_and_in_training_are_left_out(federation: Federation):
    federation.start_supernode(0, 3)
    federation.start_supernode(1, 3, 'captioner="/no/such/folder"')
    federation.start_supernode(2, 3)
    run_id = federation.submit(
        num_clients=3, class_names="zero,one", prompt_level="instance", num_server_rounds=2, min_clients=1
    )
    federation.wait_for_round(1)
    shutil.rmtree(federation.folder / "site2")

    assert federation.wait_for_the_end(run_id) == "finished:completed"

    run = results(federation.folder / "digits")
    assert run["prompt_round"]["clients_used"] == 2
    assert [(row["client"], row["reason"]) for row in run["prompt_round"]["refused"]] == [
        (None, "The client could not load a model; its own log holds the reason.")
    ]
    # In training and in evaluation.
    assert refused(run, 2) == {2: ("The client has no usable images; its own log holds the reason.", 2)}
    assert run["rounds"][1]["clients"] == 2
    log = federation.log(run_id)
    assert "/no/such/folder" not in log
    assert str(federation.folder / "site2") not in log


@pytest.mark.nightly
def test_a_client_killed_in_any_phase_is_left_out_of_it(federation: Federation):
    for site in range(3):
        federation.start_supernode(site, 3)
    run_id = federation.submit(
        num_clients=3, class_names="zero,one", prompt_level="instance", num_server_rounds=2, min_clients=2,
        local_epochs=200,
    )  # fmt: skip

    federation.client_process(1, 1).kill()  # writes prompts
    federation.client_process(2, 3).kill()  # trains, after prompts and the evaluation of the one-shot model
    federation.client_process(0, 4).kill()  # evaluates

    assert federation.wait_for_the_end(run_id) == "finished:completed"
    run = results(federation.folder / "digits")
    assert run["prompt_round"]["clients_used"] == 2
    assert run["rounds"][1]["clients"] == 2
    assert refused(run, 2) == {
        0: ("The client's process ended.", 1),  # in evaluation
        2: ("The client's process ended.", 1),  # in training
    }


@pytest.mark.nightly
def test_a_late_client_is_merged_and_a_slow_one_left_out(federation: Federation):
    federation.start_supernode(0, 2)
    run_id = federation.submit(
        num_clients=2, num_server_rounds=2, min_clients=1, connect_timeout_s=15.0, round_deadline_s=25.0,
        class_names="zero,one", images_per_class=640, num_inference_steps=40, local_epochs=200,
    )  # fmt: skip
    federation.wait_for(run_id, "prompts of 1 of 1 clients")
    federation.start_supernode(1, 2)  # connects while images are drawn
    federation.wait_for_round(1)
    slow = federation.client_process(1, 3)
    slow.suspend()
    try:
        assert federation.wait_for_the_end(run_id) == "finished:completed"
    finally:
        slow.kill()

    run = results(federation.folder / "digits")
    assert (run["prompt_round"]["late"], run["prompt_round"]["clients_used"]) == ([1], 2)
    assert run["rounds"][1]["clients"] == 1
    assert {reason for reason, _ in refused(run, 2).values()} == {"It did not reply in time."}


@pytest.mark.nightly
def test_fewer_than_the_quorum_end_the_run_which_keeps_what_it_has(federation: Federation):
    for site in range(2):
        federation.start_supernode(site, 2)
    settings = {"num_clients": 2, "class_names": "zero,one", "num_server_rounds": 2, "local_epochs": 200}
    run_id = federation.submit(min_clients=2, **settings)
    federation.client_process(1, 3).kill()  # trains, after prompts and the evaluation of the one-shot model

    assert federation.wait_for_the_end(run_id) == "finished:failed"
    why = "In round 2 (train) at least 2 of 2 clients must succeed, but 1 of 2 failed: The client's process ended."
    assert why in federation.log(run_id)
    kept = federation.folder / "digits" / "checkpoints" / "round-0001.safetensors"
    before = kept.read_bytes()

    again = federation.submit(min_clients=2, **settings)
    assert federation.wait_for_the_end(again) == "finished:completed"
    assert "resuming: 1 rounds of this run are finished" in federation.log(again)
    assert kept.read_bytes() == before
    assert results(federation.folder / "digits")["rounds"][1]["clients"] == 2


@pytest.mark.nightly
@pytest.mark.parametrize("killed", ["flower-superlink", "flwr-serverapp"])
def test_a_run_is_resumed_after_the_server_was_killed(federation: Federation, killed):
    for site in range(2):
        federation.start_supernode(site, 2)
    settings = {"num_clients": 2, "num_server_rounds": 3}
    run_id = federation.submit(run_name="whole", **settings)
    assert federation.wait_for_the_end(run_id) == "finished:completed"
    run_id = federation.submit(run_name="broken", **settings)
    federation.wait_for_round(2, "broken")

    if killed == "flower-superlink":  # and with it the ServerApp
        federation.processes.kill("superlink")
        time.sleep(1)
        federation.start_superlink()
    else:
        for process in federation.processes.below("superlink", killed):
            process.kill()
        assert federation.wait_for_the_end(run_id) == "finished:failed"
    # The SuperNodes come back by themselves; the run that was lost is started anew under its name.
    again = federation.submit(run_name="broken", **settings)

    assert federation.wait_for_the_end(again) == "finished:completed"
    assert "resuming: 2 rounds of this run are finished" in federation.log(again)
    whole, broken = (federation.folder / name / "checkpoints/round-0003.safetensors" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
