import pytest

from fgl_app import tiny
from fgl_app.card_reader import _DEFAULTS
from fgl_app.config import _FROM_CARD, default_run_config, parse_run_config
from fgl_app.errors import ConfigError
from fgl_app.foundation_models import check_model_source, content_of, identity_of, locate
from fgl_app.models import check_model_name

FIXED_KEYS = {
    *("method", "run-name", "output-dir", "seed", "dataset", "partition", "dirichlet-beta", "num-server-rounds"),
    *("prompt-level", "images-per-class", "generator", "captioner", "model", "server-epochs", "local-epochs"),
    "server-finetune-epochs",
}


def test_defaults_are_valid_and_hold_the_fixed_keys():
    settings = parse_run_config(default_run_config())

    assert set(settings.flat()) >= FIXED_KEYS
    # What the defaults leave to the card and to the profile, the digits' card and the profile "paper" say.
    resolved = {
        "image-size": 16,
        "augmentation": "crop",
        "num-inference-steps": 20,
        "guidance-scale": 1.0,
        "scheduler": "own",
        "guidance-start": 0.0,
        "guidance-stop": 1.0,
        "deep-cache-interval": 1,
    }
    assert settings.flat() == default_run_config() | resolved


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("dirichlet-beta", -1.0, "0.01"),
        ("dirichlet-beta", 0, "0.01"),
        ("seed", "one", "whole number"),
        ("seed", True, "whole number"),
        ("seed", -1, "at least 0"),
        ("method", "fedsgd", "fgl, gpt-fl, fedavg, centralized"),
        ("partition", "sorted", "iid, dirichlet, pathological"),
        ("num-server-rounds", 0, "at least 1"),
        ("run-name", "../elsewhere", "digits-seed-1"),
        ("run-name", "", "digits-seed-1"),
        ("output-dir", "runs", "~/fgl-runs"),
        ("device", "gpu", "cuda"),
        ("class-prompt", "a photo", "{class}"),
        ("instance-prompt", "{class}", "{caption}"),
        ("class-names", "cat,dog", "empty"),
        ("learning-rate", float("nan"), "0.01"),
    ],
)
def test_a_bad_value_is_refused_by_key_with_advice(key, value, advice):
    with pytest.raises(ConfigError) as caught:
        parse_run_config(default_run_config() | {key: value})

    assert f"`{key}`" in str(caught.value)
    assert advice in str(caught.value)


def test_an_unknown_key_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"`dirichlet-alpha`.*`dirichlet-beta`"):
        parse_run_config(default_run_config() | {"dirichlet-alpha": 0.5})


def test_a_missing_key_is_refused():
    with pytest.raises(ConfigError, match="`seed` is missing"):
        parse_run_config({key: value for key, value in default_run_config().items() if key != "seed"})


def test_a_whole_number_is_a_number():
    assert parse_run_config(default_run_config() | {"dirichlet-beta": 1}).data.dirichlet_beta == 1.0


@pytest.mark.parametrize("names", ["cat", "cat,cat", "cat,,dog"])
def test_a_folder_data_set_needs_class_names(names):
    with pytest.raises(ConfigError, match="`class-names`"):
        parse_run_config(default_run_config() | {"dataset": "folder", "class-names": names})


@pytest.mark.parametrize("value", ["unknown", "/no/such/folder", "a/b/c", "../weights"])
def test_a_generator_that_cannot_be_found_is_refused(value):
    with pytest.raises(ConfigError, match=r'`generator`.*"tiny"|`generator`.*hub id'):
        check_model_source("generator", value, "", "model_index.json", "diffusion")


def test_a_folder_without_the_marker_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model_index\.json"):
        check_model_source("generator", str(tmp_path), "", "model_index.json")


def test_an_unknown_classifier_is_refused_with_near_names():
    with pytest.raises(ConfigError, match=r"`model`.*resnet18"):
        check_model_name("resnet81")


def test_only_a_hub_id_has_a_revision(tmp_path):
    assert locate("owner/name", "abc") == ("owner/name", "abc")
    assert locate("owner/name", "") == ("owner/name", None)
    assert locate(str(tmp_path), "abc") == (str(tmp_path), None)
    assert locate("tiny", "abc", "captioner")[1] is None


def test_a_retrained_model_has_another_identity_and_hidden_files_count_for_nothing(tmp_path, monkeypatch):
    weights = tmp_path / "unet" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    first = identity_of(str(tmp_path)), content_of(str(tmp_path), "")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").touch()

    assert (identity_of(str(tmp_path)), content_of(str(tmp_path), "")) == first
    weights.write_bytes(b"second try")
    assert identity_of(str(tmp_path)) != first[0]
    assert content_of(str(tmp_path), "") != first[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # no model that anybody named
    assert content_of("tiny", "owner/name", "") == ""
    assert identity_of("tiny", tiny.CAPTIONER) == (tiny.folder_of(tiny.CAPTIONER).name,)
    assert identity_of("owner/name", tiny.CAPTIONER) == ("owner/name",)


def test_no_prompt_writer_is_shipped():
    with pytest.raises(ConfigError, match="`prompt-writer` must be an absolute folder"):
        check_model_source("prompt-writer", "tiny", "", "config.json")


def drawing(**overrides):
    synthesis = parse_run_config(
        default_run_config() | {key.replace("_", "-"): value for key, value in overrides.items()}
    ).synthesis
    return synthesis.scheduler, synthesis.num_inference_steps, synthesis.guidance_scale, synthesis.guidance_stop


def test_profiles_are_sets_of_settings_that_are_overridden_one_by_one():
    assert drawing() == ("own", 20, 1.0, 1.0)
    assert drawing(profile="balanced") == ("dpm-solver++", 8, 1.0, 0.5)
    assert drawing(profile="balanced", dataset="imagenette") == ("dpm-solver++", 20, 2.0, 0.5)
    assert drawing(profile="balanced", num_inference_steps=5, guidance_scale=3.0) == ("dpm-solver++", 5, 3.0, 0.5)
    assert drawing(profile="turbo", lora="/weights", scheduler="lcm") == ("lcm", 4, 1.0, 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"profile": "turbo"}, "`lora` must name weights"),
        ({"guidance-stop": 1.5}, "`guidance-stop` must be a share, at most 1"),
        ({"ray-address": "head:6379"}, "`synthesis-workers` must be at least 1"),
        ({"profile": "fast"}, "`profile` must be one of paper, balanced, turbo"),
    ],
)
def test_synthesis_settings_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse_run_config(default_run_config() | overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"scrub": "on"}, "`prompt-level` must be instance"),
        ({"max-caption-words": 5, "prompt-level": "instance", "method": "fedavg"}, "acts on captions"),
        ({"caption-vocabulary": "words.txt", "prompt-level": "instance"}, "absolute path on the clients"),
        ({"classes-epsilon": 1.0}, "`prompt-counts` withheld"),
        ({"prompt-counts": "noised"}, "`weighting` must be uniform"),
        ({"prompt-counts": "noised", "weighting": "uniform", "num-prompts-per-class": 2}, "`num-prompts-per-class` 1"),
        ({"prompt-counts": "withheld", "weighting": "uniform", "example-dp-noise": 1.0}, "`example-dp-noise` is set"),
        ({"min-clients-per-prompt": 9}, "at most `num-clients`"),
        ({"min-clients-per-prompt": 2, "prompt-level": "embedding"}, "compares texts"),
        ({"min-clients": 9}, "`min-clients` must be at most `num-clients`"),
        ({"max-client-share": 1.5}, "`max-client-share` must be a share"),
        ({"counts-delta": 0.0}, "`counts-delta` must lie between 0 and 1"),
    ],
)
def test_defences_that_would_protect_nothing_are_refused(run_config, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_run_config(run_config | overrides)


def test_the_keys_that_a_card_may_set_are_those_that_runs_leave_to_it():
    assert set(_DEFAULTS) == set(_FROM_CARD)
