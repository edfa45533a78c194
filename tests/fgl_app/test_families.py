"""What each family of pipelines is asked for: calls bind, what has no effect is refused or changes no image."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from pipelines import BUILDERS, save_flux
from plans import CPU, SETTINGS

from fgl_app.checks import check_settings
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.errors import ConfigError, ModelError
from fgl_app.phases import draw_plan
from fgl_app.prompts import MergedPrompts, PromptCount
from fgl_app.synthesis.families import Family, read_family
from fgl_app.synthesis.generator import load_generator, load_pipeline
from fgl_app.synthesis.plan import DrawSettings

PROMPTS = [("zero", ""), ("a handwritten seven", "")]
MERGED = MergedPrompts((PromptCount(0, "zero", 1),), ("zero", "one"))
NEED_IMAGES = {name for name in AUTO_TEXT2IMAGE_PIPELINES_MAPPING if "control" in name}
MAKE_VIDEOS = {"helios", "helios-pyramid"}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Gives the folder of a tiny pipeline, which is built once."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            BUILDERS[name](root / name)
        return root / name

    return folder


def named(folder: Path, name: str, **parts: object) -> str:
    """Write the folder of a pipeline without any part but those that are given."""
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name} | parts))
    return str(folder)


def effective(generator: str, **changes: object) -> tuple[Family, DrawSettings]:
    family = read_family(generator, "")
    return family, family.effective(dataclasses.replace(SETTINGS, generator=generator, **changes))


def drawn(generator: str, prompts=PROMPTS, **changes: object) -> torch.Tensor:
    loaded = load_generator(effective(generator, **changes)[1], CPU)
    return loaded.generate(loaded.encode(prompts), [1, 2])


@pytest.mark.parametrize("key", sorted(AUTO_TEXT2IMAGE_PIPELINES_MAPPING))
def test_the_call_of_every_pipeline_that_diffusers_finds_for_texts_binds(key, tmp_path):
    kind = AUTO_TEXT2IMAGE_PIPELINES_MAPPING[key]
    parts = {"unet": ["diffusers", "UNet2DModel"]} if kind.__name__ == "StableDiffusionPipeline" else {}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    folder = named(tmp_path, kind.__name__, **parts)

    if key in NEED_IMAGES | MAKE_VIDEOS:
        with pytest.raises(ConfigError, match=r"needs an image|makes videos|has no num_inference_steps"):
            read_family(folder, "")
        return
    family, settings = effective(folder, generation_size=64, guidance_scale=3.0)
    options = family.options(settings) | {"prompt": ["a"], "generator": []}
    if family.takes_negative:
        options["negative_prompt"] = ["b"]
    bound = inspect.signature(kind.__call__).bind(None, **options)

    assert "kwargs" not in bound.arguments  # where some pipelines drop what they do not know
    assert (bound.arguments["height"], bound.arguments["width"]) == (64, 64)
    assert bound.arguments.get("use_resolution_binning", False) is False
    guidance = {"guidance_scale", "true_cfg_scale", "prior_guidance_scale"} & set(bound.arguments)
    assert len(guidance) == 1 or kind.__name__ in ("FluxPipeline", "FluxKontextPipeline")  # without its embedding


@pytest.mark.parametrize(
    ("name", "guidance", "negative"),
    [
        ("StableDiffusionXLPipeline", {"guidance_scale": 3.0}, True),
        ("StableDiffusion3Pipeline", {"guidance_scale": 3.0}, True),
        ("StableCascadeCombinedPipeline", {"prior_guidance_scale": 3.0}, True),
        ("QwenImagePipeline", {"true_cfg_scale": 3.0}, True),
        ("QwenImage21Pipeline", {"true_cfg_scale": 3.0}, True),
        ("FluxPipeline", {}, False),
        ("Flux2Pipeline", {"guidance_scale": 3.0}, False),
        ("Flux2KleinPipeline", {"guidance_scale": 3.0}, False),
        ("GlmImagePipeline", {"guidance_scale": 3.0}, False),
        ("Ideogram4Pipeline", {"guidance_scale": 3.0}, False),
        ("LatentConsistencyModelPipeline", {"guidance_scale": 3.0}, False),
        ("ZImagePipeline", {"guidance_scale": 2.0}, True),  # which counts from 0
        ("Krea2Pipeline", {"guidance_scale": 2.0}, True),
    ],
)
def test_guidance_goes_by_the_name_that_a_pipeline_has_for_it(name, guidance, negative, tmp_path):
    family, settings = effective(named(tmp_path, name), guidance_scale=3.0)

    options = family.options(settings)

    assert {key: value for key, value in options.items() if key.endswith("scale")} == guidance
    assert family.takes_negative is negative
    assert family.negatives(settings, {"": "blurry"}) == {"": "blurry" if negative else ""}


def test_klein_and_flux_that_were_distilled_know_no_guidance(tmp_path, folder_of):
    klein, settings = effective(named(tmp_path, "Flux2KleinPipeline", is_distilled=True), guidance_scale=3.0)
    save_flux(tmp_path / "schnell", guidance_embeds=False)

    assert klein.guidance == read_family(str(tmp_path / "schnell"), "").guidance == ""
    assert settings.guidance_scale == 1.0
    assert read_family(str(folder_of("flux")), "").guidance == "guidance_scale"


@pytest.mark.parametrize("name", BUILDERS)
def test_a_family_draws_at_the_size_that_was_asked_for(name, folder_of):
    images = drawn(str(folder_of(name)), generation_size=32)

    assert images.shape == (2, 3, 32, 32)
    assert images.std() > 0.02
    assert not torch.equal(images[0], images[1])


def test_pixart_denoises_at_the_size_that_was_asked_for(folder_of):
    loaded = load_generator(effective(str(folder_of("pixart")), generation_size=40)[1], CPU)
    shapes = set()
    loaded._pipeline.transformer.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape[2:])))

    loaded.generate(loaded.encode(PROMPTS), [1, 2])

    assert shapes == {(10, 10)}  # 40 px, of which the decoder makes one latent for four


@pytest.mark.parametrize("name", ["sdxl", "qwen", "pixart"])
def test_guidance_and_negative_prompts_have_an_effect_where_they_are_taken(name, folder_of):
    folder = str(folder_of(name))
    negative = [(prompt, "a bold eight") for prompt, _ in PROMPTS]

    plain, stronger = (drawn(folder, generation_size=32, guidance_scale=scale) for scale in (2.0, 6.0))
    steered = drawn(folder, negative, generation_size=32)

    assert (plain - stronger).abs().max() > 1e-3
    assert (plain - steered).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["lcm", "flux", "klein"])
def test_a_cards_negative_prompt_does_no_harm_where_none_is_taken(name, folder_of):
    folder = str(folder_of(name))
    negative = [(prompt, "low quality") for prompt, _ in PROMPTS]

    assert torch.equal(drawn(folder, generation_size=32), drawn(folder, negative, generation_size=32))


def test_an_image_without_a_negative_prompt_does_not_depend_on_its_neighbours(folder_of):
    folder = str(folder_of("sdxl"))
    alone = drawn(folder)
    both = drawn(folder, [(PROMPTS[0][0], "bold"), PROMPTS[1]])

    assert torch.equal(alone[1], both[1])
    assert not torch.equal(alone[0], both[0])


def plan_for(run_config, generator: Path | str, **changes: object):
    keys = {key.replace("_", "-"): value for key, value in changes.items()}
    settings = parse_run_config(run_config | {"generator": str(generator), "dataset": "imagenette"} | keys)
    return draw_plan(settings, MERGED, Path("none"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sdxl", {"guidance_stop": 0.5}),
        ("sdxl", {"deep_cache_interval": 3}),
        ("flux", {"guidance_start": 0.2}),
        ("flux", {"negative_prompt": "blurry"}),
        ("lcm", {"negative_prompt": "blurry"}),
        ("sdxl", {"filter_attempts": 5}),
        ("sdxl", {"generator_revision": "abc"}),  # a folder has none
        ("tiny", {"stored_size": 512}),  # it draws 32 px
        ("tiny", {"filter_revision": "abc"}),
    ],
)
def test_a_setting_without_effect_changes_no_images_noise(name, changes, folder_of, run_config):
    generator = name if name == "tiny" else folder_of(name)

    ours, theirs = (list(plan_for(run_config, generator, **each).samples()) for each in ({}, changes))

    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sdxl", {"guidance_scale": 4.0}),
        ("sdxl", {"negative_prompt": "blurry"}),
        ("flux", {"guidance_scale": 4.0}),
        ("tiny", {"guidance_stop": 0.5}),
        ("tiny", {"deep_cache_interval": 2}),
        ("tiny", {"stored_size": 16}),
    ],
)
def test_a_setting_with_an_effect_is_part_of_the_identity(name, changes, folder_of, run_config):
    generator = name if name == "tiny" else folder_of(name)

    ours, theirs = (next(plan_for(run_config, generator, **each).samples()) for each in ({}, changes))

    assert ours.sample_id != theirs.sample_id


def test_the_plan_of_a_default_run_has_the_digest_that_it_always_had():
    plan = draw_plan(parse_run_config(default_run_config()), MERGED, Path("none"))

    assert plan.settings.digest()[:16] == "dad72623c3e04563"


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        (
            "sdxl",
            {"guidance-stop": 0.5},
            "`guidance-stop` has no effect on this .*StableDiffusionXLPipeline, but is 0.5",
        ),
        ("flux", {"deep-cache-interval": 3}, "`deep-cache-interval` has no effect on this .*FluxPipeline, but is 3"),
        (
            "flux",
            {"negative-prompt": "red"},
            "`negative-prompt` has no effect on this .*FluxPipeline, but is not empty",
        ),
        ("lcm", {"negative-prompt": "red"}, "`negative-prompt` has no effect on .*LatentConsistencyModelPipeline"),
        ("lcm", {"num-inference-steps": 60}, "`num-inference-steps` must be at most 50 for the solver LCMScheduler"),
        ("flux", {"profile": "balanced"}, "`scheduler` must be own .*matches flows, .*but is dpm-solver"),
        ("sana", {"scheduler": "ddim"}, "`scheduler` must be own .*matches flows, .*but is ddim"),
        ("sdxl", {"safety-checker": True}, "`safety-checker` has no effect .*Leave it at false"),
        ("qwen", {"decoder": "DECODER"}, "`decoder` has no effect on this generator, a QwenImagePipeline"),
        ("tiny", {"negative-prompt": "red"}, "`negative-prompt` has no effect where `guidance-scale` is at most 1"),
        ("tiny", {"guidance-stop": 0.5}, "`guidance-stop` has no effect where `guidance-scale` is at most 1"),
        ("tiny", {"generation-size": 30}, "`generation-size` must be a multiple of 4 .*Use 28 or 32"),
        ("tiny", {"scheduler": "tcd", "num-inference-steps": 60}, "`num-inference-steps` must be at most 50"),
    ],
)
def test_what_a_generator_would_ignore_is_refused_before_any_work(name, changes, sentence, folder_of, run_config):
    generator = name if name == "tiny" else str(folder_of(name))
    changes = {key: str(folder_of("sdxl")) if value == "DECODER" else value for key, value in changes.items()}
    if "decoder" in changes:
        AutoencoderTiny().save_config(changes["decoder"])
        Path(changes["decoder"], "diffusion_pytorch_model.safetensors").touch()

    with pytest.raises(ConfigError, match=sentence):
        check_settings(parse_run_config(run_config | {"generator": generator} | changes))


def test_what_a_profile_or_a_card_sets_is_left_out_where_it_has_no_effect(folder_of, run_config):
    for name, changes in (("sdxl", {"profile": "balanced"}), ("flux", {}), ("lcm", {})):
        settings = parse_run_config(run_config | {"generator": str(folder_of(name)), "dataset": "imagenette"} | changes)
        plan = draw_plan(settings, MERGED, Path("none"))

        assert settings.prompt_form().negative
        assert plan.settings.guidance_stop == 1.0
        assert bool(plan.negatives[""]) == (name == "sdxl")


def test_a_plan_with_a_window_that_its_pipeline_ignores_is_not_drawn(folder_of):
    settings = dataclasses.replace(SETTINGS, generator=str(folder_of("sdxl")), guidance_stop=0.5)

    with pytest.raises(ModelError, match="no setting that StableDiffusionXLPipeline ignores"):
        load_generator(settings, CPU)


def test_a_part_of_which_a_weight_is_missing_is_not_drawn_at_random(folder_of, tmp_path):
    from safetensors.torch import load_file, save_file

    load_pipeline(SETTINGS, CPU).save_pretrained(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        whole = load_file(file)
        cut = dict(whole)
        lost = sorted(name for name in cut if name.endswith(".weight"))[-1]
        del cut[lost]
        save_file(cut, file, {"format": "pt"})

        with pytest.raises(ModelError, match=f"in the files of {part} of .* but 1 are not, such as {lost}"):
            load_pipeline(dataclasses.replace(SETTINGS, generator=str(tmp_path)), CPU)

        save_file(whole, file, {"format": "pt"})
    load_pipeline(dataclasses.replace(SETTINGS, generator=str(tmp_path)), CPU)


def test_weights_in_half_precision_alone_are_found(tmp_path, run_config):
    load_pipeline(SETTINGS, CPU, torch.float16).save_pretrained(tmp_path, variant="fp16")
    settings = dataclasses.replace(SETTINGS, generator=str(tmp_path))

    check_settings(parse_run_config(run_config | {"generator": str(tmp_path)}))
    ours, whole = (
        generator.generate(generator.encode(PROMPTS), [1, 2])
        for generator in (load_generator(settings, CPU), load_generator(SETTINGS, CPU))
    )

    assert [file.name for file in (tmp_path / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert torch.equal(ours, whole)  # the shipped weights are of half precision, too


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda folder: next((folder / "unet").glob("*.safetensors")).unlink(),
            "`generator` must be safetensors .* unet/",
        ),
        (lambda folder: edit(folder / "model_index.json", tokenizer=[None, None]), "a text encoder and no tokenizer"),
        (
            lambda folder: edit(folder / "tokenizer/tokenizer_config.json", model_max_length=10**30),
            "a model_max_length",
        ),
        (lambda folder: (folder / "tokenizer/tokenizer_config.json").unlink(), "tokenizer_config.json"),
    ],
    ids=["no weights", "no tokenizer", "a tokenizer without limit", "a tokenizer without settings"],
)
def test_a_generator_that_could_not_draw_is_refused_before_any_work(change, sentence, tmp_path, run_config):
    load_pipeline(SETTINGS, CPU).save_pretrained(tmp_path)
    config = run_config | {"generator": str(tmp_path)}
    check_settings(parse_run_config(config))

    change(tmp_path)

    with pytest.raises(ConfigError, match=sentence):
        check_settings(parse_run_config(config))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_embeddings_of_sana_are_refused_before_any_work(folder_of, run_config):
    config = run_config | {"generator": str(folder_of("sana")), "prompt-level": "embedding"}

    with pytest.raises(ConfigError, match=r"must be a CLIPTextModel, but that of .* is Gemma2Model, of type gemma2"):
        check_settings(parse_run_config(config))
