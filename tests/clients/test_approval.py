import json
import logging
import threading
import time

import pytest
from typer.testing import CliRunner

from clients.approval import (
    approvals_folder,
    check_approved,
    decide,
    decisions,
    pending,
    read_preview,
    wait_for_approval,
)
from fgl_app.cli import cli
from fgl_app.client_app import _terms
from fgl_app.config import parse_run_config
from fgl_app.errors import ApprovalError
from fgl_app.prompts import PromptCount

PROMPTS = [PromptCount(0, "a cat", 3), PromptCount(1, "a dog", 2)]
NAMES = ("cat", "dog")


def wait(folder, prompts=PROMPTS, timeout_s=20.0, terms="one round", num_rounds=0):
    wait_for_approval(prompts, NAMES, "study", terms, folder, timeout_s, num_rounds)


def test_prompts_wait_until_their_owner_approves_exactly_them(tmp_path):
    waiting = threading.Thread(target=wait, args=(tmp_path,))
    waiting.start()
    while not pending(tmp_path):
        time.sleep(0.05)
    (name,) = pending(tmp_path)

    preview = read_preview(name, tmp_path)
    assert (preview.run, preview.rows) == ("study", [("cat", 3, "a cat"), ("dog", 2, "a dog")])
    assert (tmp_path / f"{name}.json").stat().st_mode & 0o777 == 0o600
    assert waiting.is_alive()
    decide(name, tmp_path, approve=True)
    waiting.join(10)

    assert not waiting.is_alive()
    assert pending(tmp_path) == []
    wait(tmp_path, timeout_s=0.1)  # once approved, not asked for again
    with pytest.raises(ApprovalError, match=r"nobody did within 0\.1 s"):  # others are
        wait(tmp_path, [PromptCount(0, "another cat", 3)], timeout_s=0.1)


def test_rejected_prompts_are_never_sent_until_they_are_approved_after_all(tmp_path):
    with pytest.raises(ApprovalError, match="fgl approve"):
        wait(tmp_path, timeout_s=0.0)
    (name,) = pending(tmp_path)
    decide(name, tmp_path, approve=False)

    with pytest.raises(ApprovalError, match="rejected"):
        wait(tmp_path)

    decide(name, tmp_path, approve=True)
    wait(tmp_path, timeout_s=0.0)


def test_a_node_takes_part_only_in_runs_whose_prompts_were_approved(tmp_path):
    with pytest.raises(ApprovalError, match="no prompts for 'study' with these settings were"):
        check_approved("study", "one round", tmp_path)
    with pytest.raises(ApprovalError):
        wait(tmp_path, timeout_s=0.0)
    (name,) = pending(tmp_path)
    decide(name, tmp_path, approve=True)
    wait(tmp_path)

    check_approved("study", "one round", tmp_path)
    with pytest.raises(ApprovalError, match="no prompts for 'study' with these settings"):
        check_approved("study", "a thousand rounds", tmp_path)
    with pytest.raises(ApprovalError, match=r"nobody did within 0\.1 s"):
        wait(tmp_path, timeout_s=0.1, terms="a thousand rounds")
    with pytest.raises(ApprovalError, match="no prompts for 'another'"):
        check_approved("another", "one round", tmp_path)
    decide(name, tmp_path, approve=False)
    with pytest.raises(ApprovalError, match="no prompts for 'study'"):
        check_approved("study", "one round", tmp_path)


@pytest.mark.parametrize("run_waits", [False, True])
def test_rejecting_later_prompts_of_a_run_keeps_the_node_out_of_it(tmp_path, run_waits):
    with pytest.raises(ApprovalError):
        wait(tmp_path, timeout_s=0.0)
    (first,) = pending(tmp_path)
    decide(first, tmp_path, approve=True)
    wait(tmp_path)
    later = [PromptCount(0, "another cat", 3)]
    with pytest.raises(ApprovalError):
        wait(tmp_path, later, timeout_s=0.0)
    (second,) = pending(tmp_path)
    check_approved("study", "one round", tmp_path)

    decide(second, tmp_path, approve=False)
    if run_waits:
        with pytest.raises(ApprovalError, match="rejected"):
            wait(tmp_path, later)

    with pytest.raises(ApprovalError, match="no prompts for 'study'"):
        check_approved("study", "one round", tmp_path)
    decide(second, tmp_path, approve=True)
    check_approved("study", "one round", tmp_path)


def test_the_run_itself_keeps_its_node_out_where_its_owner_decided_by_hand(tmp_path):
    with pytest.raises(ApprovalError):
        wait(tmp_path, timeout_s=0.0)
    (first,) = pending(tmp_path)
    decide(first, tmp_path, approve=True)
    wait(tmp_path)
    later = [PromptCount(0, "another cat", 3)]
    with pytest.raises(ApprovalError):
        wait(tmp_path, later, timeout_s=0.0)
    (second,) = pending(tmp_path)
    (tmp_path / f"{second}.rejected").touch()  # as an older version did

    with pytest.raises(ApprovalError, match="rejected"):
        wait(tmp_path, later)

    with pytest.raises(ApprovalError, match="no prompts for 'study'"):
        check_approved("study", "one round", tmp_path)


def test_what_no_run_waits_for_any_more_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path))
    with pytest.raises(ApprovalError):
        wait(approvals_folder(), timeout_s=0.0)
    (name,) = pending(approvals_folder())
    preview = read_preview(name, approvals_folder())

    listed = CliRunner().invoke(cli, ["approve"]).stdout

    over = f"stopped waiting at {preview.until}; a yes holds for the next start of the run: 2 prompts"
    assert over in listed
    assert "waits until" not in listed
    path = approvals_folder() / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"until_s": time.time() + 3600}))
    assert f"waits until {preview.until}: 2 prompts" in CliRunner().invoke(cli, ["approve"]).stdout
    assert CliRunner().invoke(cli, ["approve", name], input="y\n").stdout.endswith("approved\n")


def test_more_rounds_are_other_terms_and_another_device_is_not(run_config):
    def terms(**changes):
        return _terms(parse_run_config(run_config | {key.replace("_", "-"): value for key, value in changes.items()}))

    assert terms(num_server_rounds=1) != terms(num_server_rounds=1000)
    assert terms(local_epochs=1) != terms(local_epochs=2)
    assert terms(data_dir="/a") != terms(data_dir="/b")
    assert terms(device="cpu") == terms(device="auto")


def test_the_owner_decides_by_a_command(tmp_path, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path))
    with pytest.raises(ApprovalError):
        wait(approvals_folder(), timeout_s=0.0)
    run = CliRunner().invoke

    name = run(cli, ["approve"]).stdout.split()[0]
    shown = run(cli, ["approve", name], input="n\n").stdout
    assert "dog\t2\ta dog" in shown
    assert shown.endswith(f"nothing is sent or decided; `fgl approve {name} --reject` refuses it for good\n")
    assert pending(approvals_folder()) == [name]

    answer = run(cli, ["approve", name], input="y\n").stdout
    until = read_preview(name, approvals_folder()).until
    assert answer.endswith(f"approved for the next start of the run: it stopped waiting at {until}\n")
    wait(approvals_folder(), timeout_s=0.0)
    assert run(cli, ["approve"]).stdout == "nothing waits for approval\n"
    with pytest.raises(ApprovalError, match="is none"):
        read_preview("../etc", approvals_folder())


def test_what_waits_is_said_in_the_log_without_a_prompt_and_listed_with_its_size(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path))
    monkeypatch.setattr("clients.approval._POLL_S", 0.01)
    with caplog.at_level(logging.INFO, "flwr"), pytest.raises(ApprovalError):
        wait(approvals_folder(), timeout_s=0.2, num_rounds=4)
    (name,) = pending(approvals_folder())
    today = time.strftime("%Y-%m-%d ")

    (line,) = [record.getMessage() for record in caplog.records]  # repeated once an hour
    assert line.startswith(f"waiting for approval: run study, 2 prompts, until {today}")
    assert line.endswith(f"; read and decide with `fgl approve {name}`")
    assert "a cat" not in line
    listed = CliRunner().invoke(cli, ["approve"]).stdout
    assert listed.startswith(f"{name}  run study, asked {today}")
    assert listed.endswith("; a yes holds for the next start of the run: 2 prompts of 5 images, 4 rounds of training\n")
    assert "a cat" not in listed


@pytest.mark.parametrize(("rounds", "said"), [(4, True), (0, False)])
def test_the_question_says_that_weights_go_out_too(tmp_path, monkeypatch, rounds, said):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path))
    with pytest.raises(ApprovalError):
        wait(approvals_folder(), timeout_s=0.0, num_rounds=rounds)
    (name,) = pending(approvals_folder())

    shown = CliRunner().invoke(cli, ["approve", name], input="n\n").stdout

    assert ("also trains in the run's 4 rounds, and sends its weights after each." in shown) == said


def test_every_decision_is_kept_and_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "ada")
    run = CliRunner().invoke
    assert run(cli, ["approve", "--log"]).stdout == "nothing was decided yet\n"
    with pytest.raises(ApprovalError):
        wait(approvals_folder(), timeout_s=0.0, num_rounds=4)
    (name,) = pending(approvals_folder())
    run(cli, ["approve", name], input="n\n")  # no decision
    for arguments in (["--reject"], ["--yes"], ["--reject"]):
        assert run(cli, ["approve", name, *arguments]).exit_code == 0

    kept = approvals_folder() / "decisions.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["decision"] for row in rows] == ["rejected", "approved", "rejected"]
    assert {(row["run"], row["preview"], row["user"], row["prompts"], row["rounds"]) for row in rows} == {
        ("study", name, "ada", 2, 4)
    }
    assert kept.stat().st_mode & 0o777 == 0o600
    listed = run(cli, ["approve", "--log"]).stdout.splitlines()
    assert listed == decisions(approvals_folder())
    assert [line.split("  ")[1].split(" ")[0] for line in listed] == ["rejected", "approved", "rejected"]
    assert time.strftime("%Y-%m-%d") in listed[0]


def test_previews_of_an_older_version_are_listed(tmp_path):
    (tmp_path / "0123456789abcdef.json").write_text(json.dumps({"run": "old", "prompts": [["cat", 1, "a cat", ""]]}))

    assert "run old, asked an unknown time" in read_preview("0123456789abcdef", tmp_path).summary()
