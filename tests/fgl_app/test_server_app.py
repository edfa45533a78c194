import json
import re
import shutil

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image
from safetensors.torch import load_file

from fgl_app.cards import load_card
from fgl_app.checks import check_settings
from fgl_app.config import APP_FOLDER, parse_run_config
from fgl_app.errors import RoundError
from fgl_app.files import read_json_lines
from fgl_app.phases import initial_arrays
from fgl_app.privacy.accounting import images_epsilon
from fgl_app.reporting.report import write_report
from fgl_app.server_app import run


@pytest.fixture
def train_rounds(make_grid, run_config, tmp_path):
    """Return a function that starts a run, or goes on with it, and returns its folder."""

    def go(name, rounds, *, prepare=lambda grid: None, **overrides):
        changed = {key.replace("_", "-"): value for key, value in overrides.items()}
        config = run_config | changed | {"run-name": name, "num-server-rounds": rounds}
        grid = make_grid(**overrides)
        prepare(grid)
        run(grid, check_settings(parse_run_config(config)))
        return tmp_path / "runs" / name

    return go


def test_a_server_optimizer_goes_on_after_a_restart_as_if_nothing_had_happened(train_rounds):
    adam = {"method": "fedavg", "strategy": "FedAdam", "strategy_options": "eta=0.01"}

    whole = train_rounds("whole", 3, **adam)
    train_rounds("halves", 2, **adam)
    halves = train_rounds("halves", 3, **adam)

    for name in ("round-0003.safetensors", "round-0003.strategy.safetensors"):
        assert (halves / "checkpoints" / name).read_bytes() == (whole / "checkpoints" / name).read_bytes()


def test_a_new_start_does_not_forget_the_seconds_of_earlier_ones(train_rounds):
    def told(folder):
        found = json.loads((folder / "results.json").read_text())
        return found["seconds"], found["synthesis"]

    first = told(train_rounds("again", 2))
    nothing_left = told(train_rounds("again", 2))
    longer, synthesis = told(train_rounds("again", 3))

    assert set(first[0]) == {"prompts", "synthesis", "pretraining", "rounds", "total"}
    assert first[1]["generated"] == 20
    assert nothing_left == first
    assert longer["pretraining"] == first[0]["pretraining"]  # no second one
    assert longer["rounds"] > first[0]["rounds"]
    assert longer["total"] > first[0]["total"]
    assert synthesis == first[1]


def test_all_that_a_run_measures_is_described_with_its_unit(train_rounds):
    described = (APP_FOLDER / "examples" / "README.md").read_text("utf-8").split("## Columns and units")[1]

    folder = train_rounds("described", 2)

    names = {name for row in read_json_lines(folder / "metrics.jsonl") for name in row}
    found = json.loads((folder / "results.json").read_text())
    settings = {"method", "strategy", "dataset", "partition", "dirichlet_beta", "num_clients", "prompt_round", "rounds"}
    for name in (names | set(found)) - settings:
        assert f"`{name}`" in described


def test_embeddings_are_uploaded_and_drawn(train_rounds):
    by_mean = {"prompt_level": "embedding", "embedding_summary": "mean", "images_per_class": 16, "server_epochs": 8}

    run_folder = train_rounds("embedding", 1, **by_mean, num_inference_steps=8, server_learning_rate=0.05)

    found = json.loads((run_folder / "results.json").read_text())
    upload = found["upload_bytes"]["prompts_per_client"]
    # One mean per class of at most 32 tokens x 64 numbers of two bytes; at most ten classes.
    assert 10 * 64 * 2 < upload["payload"] < 10 * (32 * 64 * 2 + 200)
    assert found["one_shot_accuracy"] > 0.3
    assert (run_folder / "embeddings.safetensors").stat().st_mode & 0o777 == 0o600


def test_the_server_can_write_the_prompts_of_any_method(train_rounds):
    small = {"images_per_class": 8, "server_epochs": 1, "num_prompts_per_class": 2, "num_inference_steps": 2}

    run_folder = train_rounds("server", 2, prompt_source="server", **small)

    found = json.loads((run_folder / "results.json").read_text())
    assert found["method"] == "fgl"
    assert found["upload_bytes"]["prompts_per_client"] is None
    assert [row["upload_bytes"] > 0 for row in found["rounds"]] == [False, True]
    assert len({row["prompt"] for row in read_json_lines(run_folder / "prompts.jsonl")}) == 20


class LateWhile:
    """The nodes that have not answered yet: one, for as long as ``waiting`` says."""

    def __init__(self, node, waiting):
        self.node, self.waiting = node, waiting

    def __contains__(self, node):
        return node == self.node and self.waiting()


def test_prompts_of_a_late_client_make_no_image_of_this_start_a_reused_one(make_grid, run_config, tmp_path):
    sources = {
        "partition": "pathological",
        "classes-per-client": 10,
        "prompt-level": "instance",
        "num-server-rounds": 1,
    }
    grid = make_grid(**{key.replace("-", "_"): value for key, value in sources.items()})
    folder = tmp_path / "runs" / run_config["run-name"]
    grid.late = LateWhile(1002, lambda: not any(folder.glob("synthetic/units/*/*.json")))

    run(grid, check_settings(parse_run_config(run_config | sources)))

    results = json.loads((folder / "results.json").read_text())
    found = results["synthesis"]
    assert results["prompt_round"]["late"] == [2]
    assert (found["images"], found["reused"], found["reused_seconds"]) == (20, 0, 0.0)
    assert found["generated"] > 20  # some of those drawn before gave way to others
    assert "reused_seconds" not in results["rounds"][0]


def test_deleted_prompts_are_nowhere_and_the_run_goes_on_without_them(train_rounds, tmp_path):
    captions = {"prompt_level": "instance", "seed": 5}
    whole = train_rounds("whole", 3, **captions)
    prompts = [json.loads(line)["prompt"] for line in (whole / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) > 20
    assert any(prompts[0].encode() in path.read_bytes() for path in whole.rglob("*") if path.is_file())
    shutil.move(whole, tmp_path / "whole")  # nothing to adopt images or prompts from

    train_rounds("deleted", 2, **captions, retain_prompts=False)
    deleted = train_rounds("deleted", 3, **captions, retain_prompts=False)

    files = [path for path in deleted.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [prompt for prompt in prompts if prompt.encode() in content], path.name
    last = "checkpoints/round-0003.safetensors"
    assert (deleted / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    assert "The prompts were deleted" in write_report(deleted).read_text()


def test_a_run_that_deleted_its_prompts_still_knows_what_was_rejected(train_rounds):
    folder = train_rounds("deleted", 1, retain_prompts=False)
    for manifest in folder.glob("synthetic/units/*/*.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"judged": {"7": [4, 1]}}))

    train_rounds("deleted", 2, retain_prompts=False)

    assert json.loads((folder / "results.json").read_text())["synthesis"]["rejection_rates"] == {"7": 0.25}


def test_planted_contacts_never_reach_the_servers_disk(train_rounds, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("FGL_CACHE", str(cache))
    train_rounds("first", 1, prompt_level="instance")  # fills the clients' files of captions
    (file,) = (cache / "captions").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    planted = [[image, f"{caption}, for Maria Gonzalez, +1 212 555 0123"] for image, caption in lines[:20]]
    file.write_text("\n".join(json.dumps(row) for row in planted + lines[20:]))
    shutil.rmtree(tmp_path / "runs")

    def holds(run, text):
        return any(text in path.read_bytes() for path in run.rglob("*") if path.is_file())

    open_run = train_rounds("open", 1, prompt_level="instance")
    assert holds(open_run, b"Gonzalez")
    assert holds(open_run, b"555 0123")
    scrubbed = train_rounds("scrubbed", 1, prompt_level="instance", scrub="on")
    told = json.loads((scrubbed / "results.json").read_text())["privacy"]["defences"]
    assert told["settings"] == {"scrub": "on"}
    assert (told["captions"]["changed"], told["captions"]["emptied"]) == (20, 0)
    assert told["captions"]["written"] == 838
    again = train_rounds("scrubbed", 2, prompt_level="instance", scrub="on")  # nobody is asked for prompts again
    assert json.loads((again / "results.json").read_text())["privacy"]["defences"] == told
    assert "changed 20 of them" in write_report(again).read_text()
    assert json.loads((open_run / "results.json").read_text())["privacy"] is None
    assert not holds(scrubbed, b"Gonzalez")
    assert not holds(scrubbed, b"555 0123")
    prompts = (scrubbed / "prompts.jsonl").read_text()
    assert "handwritten" in prompts


def test_rare_captions_become_their_classes_prompt(train_rounds):
    run = train_rounds("k", 1, prompt_level="instance", min_clients_per_prompt=2, partition="iid")

    privacy = json.loads((run / "results.json").read_text())["privacy"]
    assert privacy["mechanisms"] == []
    defences = privacy["defences"]
    assert defences["settings"] == {"min-clients-per-prompt": 2}
    assert defences["captions"] == {"clients": 3, "written": 838, "changed": 0, "emptied": 0}
    assert f"{defences['prompts_replaced']} prompts, of {defences['images_replaced']} images, were replaced" in (
        write_report(run).read_text()
    )
    rows = [json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines()]
    fallback = {f"a photo of a handwritten {name}" for name in load_card("digits").class_names()}
    assert sum(row["count"] for row in rows) == 838
    assert all(row["clients"] >= 2 or row["prompt"] in fallback for row in rows)
    assert {row["prompt"] for row in rows} & fallback
    assert any(row["prompt"] not in fallback for row in rows)
    replaced = sum(row["count"] for row in rows if row["prompt"] in fallback)
    assert 0 < replaced == defences["images_replaced"]


def prompts_of(run):
    return read_json_lines(run / "prompts.jsonl")


def test_captions_hold_the_allowed_words_alone_and_not_too_many(train_rounds, tmp_path):
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("bold\nleft\n")
    known = {"bold", "left", "handwritten", "a", "photo", "of", "the", "digit", *load_card("digits").class_names()}

    allowed = train_rounds("allowed", 1, prompt_level="instance", caption_vocabulary=str(vocabulary))
    short = train_rounds("short", 1, prompt_level="instance", max_caption_words=2)

    captions = [row["prompt"].partition(", ")[2].split() for row in prompts_of(allowed)]
    assert set().union(*captions) <= known
    assert {"bold", "left"} <= set().union(*captions)
    assert {len(row["prompt"].partition(", ")[2].split()) for row in prompts_of(short)} == {2}


def test_counts_are_noised_and_one_clients_share_is_bounded(train_rounds):
    exact = {row["label"]: row["count"] for row in prompts_of(train_rounds("exact", 1, partition="iid"))}
    noised = train_rounds("noised", 1, partition="iid", prompt_counts="noised", counts_epsilon=1.0, weighting="uniform")
    skewed = {"partition": "dirichlet", "dirichlet_beta": 0.5}
    claimed, bounded = (
        sum(row["count"] for row in prompts_of(train_rounds(f"share-{share}", 1, **skewed, max_client_share=share)))
        for share in (1.0, 0.4)
    )

    told = {row["label"]: row["count"] for row in prompts_of(noised)}
    assert told != exact
    assert all(abs(told[label] - count) < 40 for label, count in exact.items())  # three clients, scale 1 each
    assert bounded < claimed == sum(exact.values()) == 838


def test_hidden_classes_and_counts(train_rounds):
    held = train_rounds("open", 1, partition="pathological", classes_per_client=1)
    hidden = train_rounds(
        "hidden",
        1,
        partition="pathological",
        classes_per_client=1,
        prompt_counts="withheld",
        classes_epsilon=0.1,
        weighting="uniform",
    )

    truth, told = (
        [json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines()] for run in (held, hidden)
    )
    assert {row["label"] for row in truth} < set(range(10))
    assert all(row["count"] == row["clients"] for row in told)  # one each, whatever a client holds
    assert len({row["label"] for row in told} | {row["label"] for row in truth}) > len({row["label"] for row in truth})


def test_private_rounds_state_their_epsilon_and_a_resumed_run_counts_those_of_the_earlier_start(train_rounds):
    private = {
        "method": "fedavg", "weighting": "uniform", "client_dp": "client-adaptive", "example_dp_noise": 2.0,
        "batch_size": 16,
    }  # fmt: skip

    whole = json.loads((train_rounds("whole", 3, **private) / "results.json").read_text())["privacy"]
    first = train_rounds("halves", 1, **private)
    norm = first / "checkpoints" / "round-0001.strategy.safetensors"
    reached = load_file(norm)["clipping_norm"].item()
    once = json.loads((first / "results.json").read_text())["privacy"]
    folder = train_rounds("halves", 3, **private)
    found = json.loads((folder / "results.json").read_text())

    assert reached != 1.0
    assert found["privacy"] == whole  # epsilon depends on no draw, but on the rounds and the numbers of images alone
    for before, after in zip(once["mechanisms"], found["privacy"]["mechanisms"], strict=True):
        assert before["epsilon"] < after["epsilon"]
    assert [row["drawn"] for row in found["rounds"]] == [[3, 3]] * 3
    assert "gradient_diversity" not in found["rounds"][0]
    assert not [row for row in found["rounds"] if "num_examples" in row]


PRIVATE = {"method": "fedavg", "weighting": "uniform", "client_dp": "fixed", "example_dp_noise": 2.0, "batch_size": 16}


def epsilons(folder):
    mechanisms = json.loads((folder / "results.json").read_text())["privacy"]["mechanisms"]
    return [item["epsilon"] for item in mechanisms]


def kill_after_replies(grid):
    answer = grid.send_and_receive

    def killed(messages, **options):
        list(answer(messages, **options))
        raise SystemExit

    grid.send_and_receive = killed


def test_epsilon_counts_a_round_whose_replies_came_before_the_server_was_killed(train_rounds):
    of_one, of_two = (epsilons(train_rounds(f"whole-{rounds}", rounds, **PRIVATE)) for rounds in (1, 2))

    with pytest.raises(SystemExit):
        train_rounds("killed", 1, **PRIVATE, prepare=kill_after_replies)
    found = epsilons(train_rounds("killed", 1, **PRIVATE))

    assert found == of_two
    assert found > of_one


def test_epsilon_does_not_fall_when_a_checkpoint_is_deleted_or_fewer_rounds_are_asked_for(train_rounds):
    of_three = epsilons(train_rounds("three", 3, **PRIVATE))
    of_two = train_rounds("again", 2, **PRIVATE)
    (of_two / "checkpoints" / "round-0002.safetensors").unlink()

    assert epsilons(train_rounds("again", 2, **PRIVATE)) == of_three
    assert epsilons(train_rounds("again", 1, **PRIVATE)) == of_three


def test_a_client_at_the_place_of_another_takes_nothing_off_epsilon(train_rounds):
    def small_and_large_at_one_place(grid):
        for node, num_partitions in ((1000, 20), (1001, 2)):
            grid.node_configs[node] = {"partition-id": 0, "num-partitions": num_partitions}

    private = {key: value for key, value in PRIVATE.items() if key != "client_dp"}
    folder = train_rounds("same", 2, **private, num_clients=2, partition="iid", prepare=small_and_large_at_one_place)

    (numbers,) = (row["num_examples"] for row in read_json_lines(folder / "releases.jsonl") if len(row) == 1)
    bounds = [images_epsilon(2.0, [number], 2, batch_size=16, local_epochs=1, delta=1e-5) for number in numbers]
    assert len(numbers) == 2
    assert bounds[0] > bounds[1]  # of the small one
    assert epsilons(folder) == [round(bounds[0], 4)]


def test_prompts_that_were_asked_for_twice_count_twice(train_rounds):
    hidden = {"prompt_counts": "withheld", "classes_epsilon": 0.5, "weighting": "uniform"}

    with pytest.raises(SystemExit):
        train_rounds("twice", 1, **hidden, prepare=kill_while_prompts_come)

    assert epsilons(train_rounds("twice", 1, **hidden)) == [1.0, 10.0]
    assert epsilons(train_rounds("twice", 1, **hidden)) == [1.0, 10.0]  # nobody is asked again


def test_prompts_of_a_client_that_was_gone_count_as_often_as_it_was_asked(train_rounds, monkeypatch):
    monkeypatch.setattr("strategies.prompt_round._ASK_AGAIN_S", 0.0)
    hidden = {"prompt_counts": "withheld", "classes_epsilon": 0.5, "weighting": "uniform"}

    def gone_twice(grid):
        push, asked = grid.push_messages, []

        def pushed(messages):
            asked.extend(message for message in messages if message.metadata.dst_node_id == 1001)
            grid.gone = {1001} if len(asked) < 3 else set()
            return push(messages)

        grid.push_messages = pushed

    folder = train_rounds("gone", 1, **hidden, min_clients=3, prompt_deadline_s=60.0, prepare=gone_twice)

    asked = [row for row in read_json_lines(folder / "releases.jsonl") if row.get("asked") == "prompts"]
    assert len(asked) == 3
    assert epsilons(folder) == [1.5, 15.0]


def kill_while_prompts_come(grid):
    def killed(message_ids):
        raise SystemExit

    grid.pull_messages = killed


def test_nothing_written_says_who_was_drawn_where_privacy_counts_on_it(train_rounds):
    private = {key: value for key, value in PRIVATE.items() if key != "example_dp_noise"}

    def fail_the_first(grid):
        send = grid.send_and_receive

        def sent(messages, **options):
            messages = list(messages)
            if messages and messages[0].metadata.message_type == "train":
                grid.broken = {messages[0].metadata.dst_node_id}
            return send(messages, **options)

        grid.send_and_receive = sent

    folder = train_rounds("secret", 2, **private, fraction_train=0.5, client_dp_noise=0.01, prepare=fail_the_first)

    rounds = json.loads((folder / "results.json").read_text())["rounds"]
    refused = [item for row in rounds for item in row["refused"]]
    assert {(item["client"], item["node"], item["count"]) for item in refused} == {(None, None, 1)}
    assert "not named" in write_report(folder).read_text()
    assert read_json_lines(folder / "releases.jsonl") == [
        {"asked": "train", "round": number, "drawn": [2, 3]} for number in (1, 2)
    ]


@pytest.fixture
def at_sites(train_rounds, tmp_path):
    """Return a function that runs FedAvg between three sites with folders of their own, and returns its folder."""

    def go(places=(0, 1, 2), **overrides):
        def bring_folders(grid):
            for site, node in enumerate(grid.node_configs):
                for number, name in enumerate(("cat", "dog")):
                    (tmp_path / str(site) / name).mkdir(parents=True)
                    for index in range(6 + 4 * site):
                        picture = Image.new("RGB", (8, 8), (200 * number, 20 * index, 80 * site))
                        picture.save(tmp_path / str(site) / name / f"{index}.png")
                here = {"data-path": str(tmp_path / str(site)), "partition-id": places[site], "num-partitions": 3}
                grid.node_configs[node] = here

        own = {"method": "fedavg", "dataset": "folder", "class_names": "cat,dog"}
        return train_rounds("sites", 2, prepare=bring_folders, **own, **overrides)

    return go


@pytest.mark.parametrize(("places", "names"), [((0, 1, 2), ["0", "1", "2"]), ((0, 0, 0), ["1000", "1001", "1002"])])
def test_each_sites_accuracy_is_told(at_sites, places, names):
    folder = at_sites(places)

    rounds = json.loads((folder / "results.json").read_text())["rounds"]
    assert [sorted(row["client_accuracy"]) for row in rounds] == [names, names]
    for row in rounds:
        found = list(row["client_accuracy"].values())
        assert min(found) <= row["accuracy"] <= max(found)
    assert "Accuracy by client" in write_report(folder).read_text()


@pytest.mark.parametrize(
    "defence",
    [
        {"client_dp": "fixed", "client_dp_noise": 0.01, "weighting": "uniform"},
        {"example_dp_noise": 1.0, "batch_size": 4},
        {"prompt_counts": "withheld", "weighting": "uniform"},
    ],
)
def test_no_sites_accuracy_is_told_where_updates_or_counts_are_private(at_sites, defence):
    folder = at_sites(**defence)

    assert "client_accuracy" not in (folder / "results.json").read_text()
    assert "Accuracy by client" not in write_report(folder).read_text()


def test_further_metrics_of_clients_are_kept_with_their_round_unless_updates_are_private(train_rounds):
    def more(grid):
        ours = grid.app

        def client(message, context):
            reply = ours(message, context)
            if message.metadata.message_type == "train":
                reply.content["metrics"]["grad_norm"] = 2.5
            return reply

        grid.app = client

    folder = train_rounds("more", 2, prepare=more, method="fedavg")

    rows = read_json_lines(folder / "metrics.jsonl")
    assert [row["client_metrics"] for row in rows] == [{"train": {"grad_norm": pytest.approx(2.5)}}] * 2
    with pytest.raises(RoundError, match="a metric `grad_norm`, which neither noise nor withheld counts protect"):
        train_rounds("private", 1, prepare=more, method="fedavg", prompt_counts="withheld", weighting="uniform")


def test_clients_that_train_privately_withhold_their_losses(make_grid, settings):
    grid = make_grid(example_dp_noise=1.0)
    content = RecordDict(
        {
            "arrays": initial_arrays(settings, settings.card.class_names()),
            "config": ConfigRecord({"server-round": 1}),
        }
    )

    (reply,) = grid.send_and_receive([Message(content, dst_node_id=1000, message_type="train")])

    assert reply.content["metrics"]["loss"] == 0.0
    assert reply.content["metrics"]["train_loss"] == 0.0


def test_every_file_that_a_run_leaves_is_named_in_the_readme(train_rounds):
    readme = (APP_FOLDER / "README.md").read_text("utf-8")
    named = set(re.findall(r"`([\w.-]+)/?`", readme))
    small = {"images_per_class": 8, "server_epochs": 1, "num_inference_steps": 2, "prompt_level": "embedding"}

    kept = train_rounds("kept", 1, **small, trackers="tensorboard")
    forgotten = train_rounds("forgotten", 1, **small, retain_prompts=False)
    write_report(kept)

    left = {path.name for folder in (kept, forgotten) for path in folder.iterdir() if not path.name.startswith(".")}
    assert left >= {"plan.json", "prompt_round.json", "drawn_set.json", "embeddings.safetensors", "report.html"}
    assert left <= named
    resolved = json.loads((kept / "config.json").read_text())["resolved"]
    assert resolved["synthesis_batch_size"] == "64"  # the settings ask for 32, but a CPU draws a whole unit at a time
