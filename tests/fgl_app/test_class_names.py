import logging
import re

import pytest
from data_sets import load_folder, write_tree
from flwr.app import Context, Message, RecordDict

from fgl_app.checks import check_settings
from fgl_app.client_app import app
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.errors import ConfigError, DataError, PromptError
from fgl_app.prompts.rehearsal import check_class_prompts, check_site
from fgl_app.prompts.screening import MAX_NAME_CHARS, PromptLimits, name_fault, screen_prompts


def settings_of(**changes):
    config = {key.replace("_", "-"): value for key, value in changes.items()}
    return parse_run_config(default_run_config() | {"model": "cnn", "trackers": ""} | config)


def card(folder, classes, form="class: 'a {class}'"):
    path = folder / "own.yaml"
    path.write_text(
        "title: Own\nsource: {kind: folder}\nsplits: {train: ''}\nvalidation: 0.1\ntest: 0.2\n"
        f"prompts: {{{form}}}\nclasses: {classes}\n",
        "utf-8",
    )
    return str(path)


NAMES = ["cat", "x²", "a\nb", "n" * 101, "cafe\u0301", "right\u202eleft", "x\u200dy", "\ud800", "猫", "ﬁne", "n" * 100]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_refused_before_the_start_if_and_only_if_screening_refuses_all_its_prompts(name):
    kept, _ = screen_prompts([[name, 1, "a picture"]], PromptLimits(9, 99))

    assert (name_fault(name) is None) == bool(kept)


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["x²", "x2"], "'x2' and 'x²' are both 'x2'"),
        (["cafe\u0301", "caf\u00e9"], "are both 'café'"),
        (["cat", "line\nbreak"], r"the class 'line\\nbreak' has characters that control"),
        (["cat", "n" * 150], "the class 'nnn.* has 150 characters"),
        (["cat", "dog\u202e"], "the class .* has characters that control"),
        (["Cat", "cat"], "'cat' and 'Cat' would be drawn as one"),
    ],
)
def test_a_folder_of_a_class_that_would_not_be_drawn_is_named_before_the_start(tmp_path, folders, named):
    write_tree(tmp_path, folders, 10, "png")

    with pytest.raises((ConfigError, DataError), match=named):
        check_settings(settings_of(dataset=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": "[cat, {name: dog, prompt: cat}]"}, "'dog' and 'cat' would be drawn as one"),
        ({"classes": "[cat, dog]", "blocked_words": "DOG"}, "those of 'dog' have a blocked word"),
        ({"classes": "[cat, dog]", "max_prompt_chars": 4}, "characters, and `max-prompt-chars` allows 4"),
        ({"classes": f"[cat, {'d' * (MAX_NAME_CHARS + 1)}]"}, "the class 'ddd.* has 101 characters"),
        ({"classes": "[cat, dog]", "class_prompt": "a secret {class}", "blocked_words": "secret"}, "a blocked word"),
        ({"classes": "[cat, dog]", "prompt_level": "instance", "blocked_words": "dog"}, "a blocked word"),
    ],
)  # fmt: skip
def test_a_class_whose_prompts_would_be_refused_or_mistaken_is_named_before_the_start(tmp_path, changes, named):
    others = {key: value for key, value in changes.items() if key != "classes"}

    with pytest.raises((ConfigError, PromptError), match=named):
        check_class_prompts(settings_of(dataset=card(tmp_path, changes["classes"]), **others))


def test_captions_may_stand_alone_where_a_card_says_so(tmp_path):
    dataset = card(tmp_path, "[cat, dog]", "class: '{class}', instance: '{caption}'")

    check_class_prompts(settings_of(dataset=dataset, prompt_level="instance"))


def test_names_of_a_run_on_own_folders_are_checked_before_the_start():
    with pytest.raises(ConfigError, match=r"`class-names` must have names of at most 100 .* has 130 characters"):
        check_settings(settings_of(dataset="folder", class_names=f"cat,{'d' * 130}"))
    with pytest.raises(ConfigError, match="`class-names` must list at least two different classes"):
        settings_of(dataset="folder", class_names="x²,x2")


def test_what_is_refused_from_clients_is_no_matter_where_the_server_writes_the_prompts(tmp_path):
    check_class_prompts(settings_of(method="gpt-fl", dataset=card(tmp_path, "[cat, dog]"), blocked_words="dog"))


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("line\nbreak", {}, r"'line\\nbreak' has characters that control"),
        ("n" * 120, {}, "has 120 characters"),
        ("dog", {"blocked_words": "dog"}, "'dog' has a blocked word"),
        ("dog", {"max_classes": 2}, "at most `max-classes` 2 classes, but holds 3"),
    ],
)
def test_a_site_whose_class_would_be_refused_says_so_before_it_sends(tmp_path, caplog, name, changes, named):
    settings = settings_of(dataset="folder", **changes)
    write_tree(tmp_path, ["cat", "fox", name], 4, "png")

    with pytest.raises(DataError, match=named):
        check_site(["cat", "fox", name], settings)
    message = Message(RecordDict(), dst_node_id=7, message_type="query.prompts")
    with caplog.at_level(logging.ERROR, "flwr"):
        reply = app(message, Context(1, 7, {"data-path": str(tmp_path)}, RecordDict(), settings.flat()))

    assert reply.error.code == DataError.client_code
    assert re.search(named, caplog.text)


def test_a_site_cannot_read_the_servers_list_and_needs_not():
    check_site(["cat", "dog"], settings_of(dataset="folder", blocked_words="/on/the/server.txt"))


def test_two_folders_of_one_class_are_named_at_a_site_too(tmp_path):
    write_tree(tmp_path, ["x²", "x2", "y"], 4, "png")

    with pytest.raises(DataError, match="'x2' and 'x²' are both 'x2'"):
        load_folder(tmp_path, ["x2", "y"], 8)


def test_a_site_says_once_which_of_the_runs_classes_it_has_none_of(tmp_path, caplog):
    settings = settings_of(dataset="folder", class_names="cat,dog,fox")
    write_tree(tmp_path, ["cat"], 4, "png")
    context = Context(1, 7, {"data-path": str(tmp_path)}, RecordDict(), settings.flat())

    with caplog.at_level(logging.WARNING, "flwr"):
        for _ in range(2):
            app(Message(RecordDict(), dst_node_id=7, message_type="query.prompts"), context)

    assert caplog.text.count("no image here of 2 of the run's classes: dog, fox") == 1
