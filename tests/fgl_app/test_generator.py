"""The own denoising loop against the pipelines of diffusers, on the shipped model and the same noise."""

import dataclasses
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from plans import CPU, SETTINGS, draw, plan_of

from fgl_app.errors import ConfigError, FGLError, ModelError
from fgl_app.foundation_models import text_shape
from fgl_app.prompts import PromptBudget
from fgl_app.synthesis.families import read_family
from fgl_app.synthesis.generator import PipelineCall, load_generator, load_pipeline
from fgl_app.synthesis.latent_diffusion import LatentDiffusion
from fgl_app.synthesis.plan import DrawSettings
from fgl_app.synthesis.solvers import SCHEDULERS, tabulate

PROMPTS = [("a photo of a handwritten seven", ""), ("zero, handwritten", "bold"), ("a coat", "")]
SEEDS = [5, 6, 7]


def both(settings: DrawSettings) -> tuple[LatentDiffusion, PipelineCall]:
    ours = load_generator(settings, CPU)
    assert isinstance(ours, LatentDiffusion)
    return ours, PipelineCall(load_pipeline(settings, CPU), settings, read_family("tiny", ""))


def images(generator, prompts=PROMPTS, seeds=SEEDS) -> torch.Tensor:
    return (generator.generate(generator.encode(prompts), seeds) * 255).round()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["own", *SCHEDULERS])
def test_our_loop_draws_what_the_pipeline_draws(scheduler, guidance_scale):
    ours, theirs = both(
        dataclasses.replace(SETTINGS, scheduler=scheduler, guidance_scale=guidance_scale, num_inference_steps=7)
    )

    assert images(theirs).std() > 30
    assert (images(ours) - images(theirs)).abs().max() <= 1


@pytest.mark.parametrize("scheduler", ["own", *SCHEDULERS])
def test_our_loop_draws_what_the_pipeline_draws_in_as_many_steps_as_the_authors_make(scheduler):
    ours, theirs = both(dataclasses.replace(SETTINGS, scheduler=scheduler, guidance_scale=2.0, num_inference_steps=50))

    assert (images(ours) - images(theirs)).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"scheduler": "tcd", "num_inference_steps": 60},
            "`num-inference-steps` .* at most 50 for the solver TCDScheduler .* is 60",
        ),
        ({"generation_size": 34}, "`generation-size` must be a multiple of 4 .* but is 34. Use 32 or 36"),
    ],
)
def test_what_a_generator_cannot_do_is_one_sentence(changes, named):
    with pytest.raises(FGLError, match=named):
        load_generator(dataclasses.replace(SETTINGS, **changes), CPU)


@pytest.mark.parametrize("scheduler", ["pndm", "dpm-solver++", "unipc"])
@pytest.mark.parametrize("num_steps", [4, 5, 50])
def test_a_table_makes_the_steps_of_its_scheduler(scheduler, num_steps):
    stepping = SCHEDULERS[scheduler].from_config(load_pipeline(SETTINGS, CPU).scheduler.config)
    solver = tabulate(stepping, num_steps)
    stepping.set_timesteps(num_steps)
    latent = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * solver.initial_scale
    latents, outputs = [latent], []
    for step, timestep in zip(solver.steps, stepping.timesteps, strict=True):
        output = (latent * step.input_scale).sin()  # any model will do
        latent = stepping.step(output, timestep, latent, return_dict=False)[0]
        outputs.append((latents[-1] * step.input_scale).sin())
        latents.append(
            sum(value * latents[index] for index, value in step.latents.items())
            + sum(value * outputs[index] for index, value in step.outputs.items())
        )

    assert torch.allclose(latents[-1], latent, rtol=1e-2, atol=1e-2 * float(latent.abs().max()))
    assert all(last >= number for number, last in enumerate(solver.last_use()))


def test_a_solver_that_clips_is_left_to_its_pipeline(tmp_path):
    pipeline = load_pipeline(SETTINGS, CPU)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, thresholding=True)
    pipeline.save_pretrained(tmp_path)

    generator = load_generator(dataclasses.replace(SETTINGS, generator=str(tmp_path)), CPU)

    assert isinstance(generator, PipelineCall)
    assert images(generator).std() > 30


def test_an_sdxl_pipeline_is_called_with_texts_only(tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    shipped = load_pipeline(SETTINGS, CPU)
    config = CLIPTextConfig(**{**shipped.text_encoder.config.to_dict(), "projection_dim": 16})
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=8, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 16,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=shipped.vae, text_encoder=shipped.text_encoder, text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=shipped.tokenizer, tokenizer_2=shipped.tokenizer, unet=unet, scheduler=shipped.scheduler,
        add_watermarker=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    plan = plan_of(PromptBudget(0, "zero", 3), generator=str(tmp_path))

    drawn = torch.stack(list(draw(plan).values()))

    assert isinstance(load_generator(plan.settings, CPU), PipelineCall)
    assert drawn.shape == (3, 3, 32, 32)
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ConfigError, match="needs a `generator` with one text encoder, "):
        text_shape(str(tmp_path), "")


@pytest.fixture(scope="module")
def flows(tmp_path_factory) -> DrawSettings:
    """Settings that name an SD 3 pipeline with random weights, as large as the shipped one."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("flows")
    shipped = load_pipeline(SETTINGS, CPU)
    config = CLIPTextConfig(**{**shipped.text_encoder.config.to_dict(), "projection_dim": 16})
    torch.manual_seed(0)
    clip = CLIPTextModelWithProjection(config)
    t5 = T5Config(vocab_size=config.vocab_size, d_model=128, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=128, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_config(shipped.vae.config, shift_factor=0.0), text_encoder=clip,
        tokenizer=shipped.tokenizer, text_encoder_2=clip, tokenizer_2=shipped.tokenizer,
        text_encoder_3=T5EncoderModel(t5), tokenizer_3=shipped.tokenizer,
    ).save_pretrained(folder)  # fmt: skip
    return dataclasses.replace(SETTINGS, generator=str(folder))


def test_a_pipeline_that_matches_flows_draws_with_its_own_solver(flows):
    generator = load_generator(flows, CPU)
    theirs = StableDiffusion3Pipeline.from_pretrained(flows.generator)

    drawn = images(generator)

    alone = theirs(
        [prompt for prompt, _ in PROMPTS], negative_prompt=[negative for _, negative in PROMPTS], guidance_scale=2.0,
        num_inference_steps=2, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], output_type="pt",
    ).images  # fmt: skip
    assert isinstance(generator, PipelineCall)
    assert drawn.std() > 10
    assert (drawn - alone * 255).abs().max() <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_solver_that_would_take_flows_for_noise_is_refused(flows, scheduler):
    with pytest.raises(
        ConfigError, match=f"`scheduler` must be own for a generator that matches .* but is {re.escape(scheduler)}"
    ):
        load_generator(dataclasses.replace(flows, scheduler=scheduler), CPU)


def test_guidance_of_a_part_of_the_steps_lies_between_all_and_none():
    whole, none, early = (
        images(
            load_generator(
                dataclasses.replace(SETTINGS, num_inference_steps=8, guidance_scale=3.0, guidance_stop=stop), CPU
            )
        )
        for stop in (1.0, 0.0, 0.5)
    )
    unguided = images(load_generator(dataclasses.replace(SETTINGS, num_inference_steps=8, guidance_scale=1.0), CPU))

    assert (none - unguided).abs().max() <= 1
    assert 0 < (early - whole).abs().mean() < (none - whole).abs().mean()


def test_deep_features_of_every_step_are_the_whole_unet_and_older_ones_come_close():
    every, second, stale = (
        images(load_generator(dataclasses.replace(SETTINGS, num_inference_steps=12, deep_cache_interval=interval), CPU))
        for interval in (1, 2, 12)
    )

    assert 0 < (second - every).abs().mean() < (stale - every).abs().mean()
    assert (second - every).abs().mean() < 25


def test_a_small_decoder_takes_the_place_of_the_own_one(tmp_path, monkeypatch):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(tmp_path)  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    settings = dataclasses.replace(SETTINGS, decoder=f"~/{tmp_path.name}")

    ours, theirs = both(settings)

    assert (images(ours) - images(theirs)).abs().max() <= 1
    assert (images(ours) - images(load_generator(SETTINGS, CPU))).abs().max() > 1
    with pytest.raises(ModelError, match="`decoder`"):
        load_pipeline(dataclasses.replace(SETTINGS, decoder=str(tmp_path / "absent")), CPU)


@pytest.mark.parametrize(("room", "sizes"), [(5, [5]), (2, [2, 2, 1]), (0.5, [1] * 5)])
def test_images_decoded_in_parts_are_those_decoded_at_once(monkeypatch, room, sizes):
    generator = load_generator(SETTINGS, CPU)
    prompts, seeds = [(f"a handwritten {number}", "") for number in range(5)], list(range(5))
    expected = images(generator, prompts, seeds)
    decoded: list[int] = []
    generator._pipeline.vae.decoder.register_forward_pre_hook(lambda _, arguments: decoded.append(len(arguments[0])))
    monkeypatch.setattr("fgl_app.synthesis.latent_diffusion._DECODED_PIXELS", int(room * 32 * 32))

    drawn = images(generator, prompts, seeds)

    assert decoded == sizes
    assert (drawn - expected).abs().max() <= 1


def test_a_lora_changes_what_is_drawn(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = load_pipeline(SETTINGS, CPU)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))

    monkeypatch.setenv("HOME", str(tmp_path.parent))
    ours, theirs = both(dataclasses.replace(SETTINGS, lora=f"~/{tmp_path.name}"))

    assert (images(ours) - images(theirs)).abs().max() <= 1
    assert (images(ours) - images(load_generator(SETTINGS, CPU))).abs().max() > 1
    with pytest.raises(ModelError, match="`lora`"):
        load_pipeline(dataclasses.replace(SETTINGS, lora=str(tmp_path / "absent")), CPU)


def at_once(work, count: int) -> list:
    """Call ``work`` with 0, 1, … on as many threads, which begin together."""
    together = threading.Barrier(count)

    def begin(number: int):
        together.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_threads_that_share_a_tokenizer_encode_texts_of_any_length_at_once():
    generator = load_generator(SETTINGS, CPU)
    prompts = [[(f"{number} " + "seven " * (40 * length), "") for number in range(15)] for length in range(1, 9)]
    expected = [torch.stack(generator.encode(each)) for each in prompts]

    def encode_often(number: int) -> bool:
        return all(torch.equal(torch.stack(generator.encode(prompts[number])), expected[number]) for _ in range(10))

    assert all(at_once(encode_often, len(prompts)))


def test_threads_that_share_a_pipeline_draw_what_each_draws_alone():
    _, pipeline = both(dataclasses.replace(SETTINGS, scheduler="dpm-solver++", num_inference_steps=4))
    prompts = [[("seven " * length, ""), ("zero", "bold " * length)] for length in range(1, 5)]
    expected = [images(pipeline, each, SEEDS[:2]) for each in prompts]

    def draw_often(number: int) -> bool:
        return all(torch.equal(images(pipeline, prompts[number], SEEDS[:2]), expected[number]) for _ in range(5))

    assert all(at_once(draw_often, len(prompts)))
