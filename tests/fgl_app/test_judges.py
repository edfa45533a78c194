"""Judges on tiny models of their real classes."""

import dataclasses

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from plans import CPU, SETTINGS, engine_of, plan_of
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fgl_app.errors import ModelError
from fgl_app.prompts import PromptBudget
from fgl_app.synthesis.engine import Engine
from fgl_app.synthesis.generator import load_generator, load_judges, load_pipeline
from fgl_app.synthesis.judges import LabelJudge

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}


def digits(names: list[str], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    plan = plan_of(
        *(PromptBudget(label, f"a photo of a handwritten {name}", count) for label, name in enumerate(names)),
        num_inference_steps=10, guidance_scale=1.0, batch_size=32,
    )  # fmt: skip
    engine = engine_of(plan)
    drawn = [engine.draw(unit).tensors for unit in plan.units()]
    return torch.cat([item["image"] for item in drawn]), torch.cat([item["label"] for item in drawn])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A ViT that was trained to tell the shipped generator's zeros and ones apart."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=32, id2label={0: "zero", 1: "One"}, **TINY))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    images, labels = digits(["zero", "one"], 32)
    pixels = processor(list(images), return_tensors="pt").pixel_values
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_classifier_accepts_images_of_their_class_and_rejects_others(classifier):
    judge = LabelJudge(classifier, "", ["one", "zero"], CPU)  # in the run's order, not the model's
    images, labels = digits(["one", "zero"], 16)

    assert judge(images, labels).float().mean() > 0.9
    assert judge(images, 1 - labels).float().mean() < 0.1


def test_rejected_images_are_drawn_again_and_left_out_in_the_end(classifier):
    plan = plan_of(
        PromptBudget(0, "a photo of a handwritten zero", 6), PromptBudget(1, "a photo of a handwritten zero", 6),
        num_inference_steps=10, guidance_scale=1.0, filter=classifier, filter_attempts=2,
    )  # fmt: skip
    plan = dataclasses.replace(plan, class_names=("zero", "one"))
    (unit,) = plan.units()
    engine = Engine(plan, load_generator(plan.settings, CPU), {}, list, 8, load_judges(plan, CPU))

    drawn = engine.draw(unit)

    # Zeros that claim to be ones are rejected three times each, nearly all; nothing that is kept was rejected.
    seen, refused = drawn.judged["1"]
    assert 6 < seen <= 18
    assert seen - 2 <= refused <= seen
    assert drawn.judged["0"][1] < 6
    assert set(drawn.left_out.values()) == {"rejected"}
    assert len(drawn.left_out) + len(drawn.tensors["label"]) == 12
    assert engine.judges[0](drawn.tensors["image"], drawn.tensors["label"]).all()
    seeds = {sample.sample_id.hex(): sample.noise_seed for sample in unit.samples}
    ids = [bytes(row.tolist()).hex() for row in drawn.tensors["sample_id"]]
    changed = sum(seeds[key] != seed for key, seed in zip(ids, drawn.tensors["seed"].tolist(), strict=True))
    assert changed <= drawn.judged["0"][1] + refused  # only what was rejected has other noise


def save_zero_shot(folder):
    """Save a CLIP with random weights, and return it with its processor."""
    pipeline = load_pipeline(SETTINGS, CPU)
    text = pipeline.text_encoder.config.to_dict()
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={"image_size": 32, **TINY}, projection_dim=16))
    model.save_pretrained(folder)
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), pipeline.tokenizer
    )
    processor.save_pretrained(folder)
    return model, processor


def test_a_zero_shot_model_takes_the_likeliest_text(tmp_path):
    model, processor = save_zero_shot(tmp_path)
    images, labels = digits(["zero", "one"], 8)
    inputs = processor(
        text=["a photo of a zero", "a photo of a one"],
        images=list(images),
        return_tensors="pt",
        padding="max_length",
        truncation=True,
    )

    accepted = LabelJudge(str(tmp_path), "", ["zero", "one"], CPU)(images, labels)

    with torch.inference_mode():
        assert torch.equal(accepted, model.eval()(**inputs).logits_per_image.argmax(1) == labels)


def test_a_zero_shot_judge_keeps_no_tokenizer_because_threads_cannot_share_one(tmp_path):
    save_zero_shot(tmp_path)

    judge = LabelJudge(str(tmp_path), "", ["zero", "one"], CPU)

    assert not any(hasattr(part, "tokenizer") for part in vars(judge).values())


@pytest.mark.parametrize(("threshold", "kept"), [(-1.0, 0), (1.0, 3)])
def test_the_safety_checker_of_a_generator_rejects_what_it_flags(tmp_path, threshold, kept):
    pipeline = load_pipeline(SETTINGS, CPU)
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config={}, vision_config={"image_size": 32, **TINY}, projection_dim=16)
    )
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(threshold)  # cosines above it are flagged
    pipeline.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    pipeline.save_pretrained(tmp_path)
    plan = plan_of(PromptBudget(0, "zero", 3), generator=str(tmp_path), safety_checker=True)
    (unit,) = plan.units()

    drawn = Engine(plan, load_generator(plan.settings, CPU), {}, list, 8, load_judges(plan, CPU)).draw(unit)

    assert len(drawn.tensors["label"]) == kept
    assert drawn.judged["0"] == ((3, 0) if kept else (9, 9))


def test_judges_that_do_not_fit_are_refused(classifier, tmp_path):
    with pytest.raises(ModelError, match="does not know number 1, counted from 0"):
        LabelJudge(classifier, "", ["zero", "two"], CPU)
    with pytest.raises(ModelError, match="`filter` must be an image classifier"):
        LabelJudge(str(tmp_path), "", ["zero"], CPU)
    with pytest.raises(ModelError, match="`safety-checker` needs a generator that has one"):
        load_judges(plan_of(PromptBudget(0, "zero", 1), safety_checker=True), CPU)
