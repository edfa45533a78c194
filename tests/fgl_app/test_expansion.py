import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from fgl_app import tiny
from fgl_app.cards import PromptForm
from fgl_app.config import parse_run_config
from fgl_app.errors import ModelError
from fgl_app.phases import write_server_prompts
from fgl_app.prompts.expansion import LanguageModelWriter, expand, write_from_templates

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A real, small, untrained causal language model in a folder, with the tokenizer of the shipped captioner."""
    folder = tmp_path_factory.mktemp("opt")
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder_of(tiny.CAPTIONER))
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def writer(folder, seed=0) -> LanguageModelWriter:
    return LanguageModelWriter(str(folder), revision="", max_new_tokens=12, seed=seed, device=CPU)


def form(template, *styles):
    return PromptForm((template,), "{class}, {caption}", "", styles)


def test_styles_make_few_templates_many_prompts(language_model):
    at_night = form("a {class}", "at night", "in snow")

    assert write_from_templates("cat", at_night, 2) == ["a cat", "a cat, at night"]
    assert write_from_templates("cat", at_night, 9) == ["a cat", "a cat, at night", "a cat, in snow"]
    written = writer(language_model)("cat", at_night, 3)
    for number, opening in enumerate(("a cat ", "a cat, at night ", "a cat, in snow ")):
        assert written[number].startswith(opening)


def test_fewer_prompts_than_asked_for_are_a_warning(run_config, caplog):
    settings = parse_run_config(run_config | {"method": "gpt-fl", "num-prompts-per-class": 1000})

    with caplog.at_level("WARNING", "flwr"):
        merged = write_server_prompts(settings)

    styles, templates = settings.card.form.styles, settings.card.form.class_templates
    assert len(merged.prompts) == 10 * len(templates) * (1 + len(styles)) > 100
    assert "asks for 10000 prompts" in caplog.text


def test_templates_expand_each_class_in_each_domain():
    domains = [("photo", form("a photo of {a class}")), ("sketch", form("{class}, sketch"))]

    prompts = expand(["cat", "owl"], domains, write_from_templates, 3)

    assert [(item.label, item.prompt, item.domain) for item in prompts] == [
        (0, "a photo of a cat", "photo"),
        (0, "cat, sketch", "sketch"),
        (1, "a photo of an owl", "photo"),
        (1, "owl, sketch", "sketch"),
    ]


def test_a_language_model_writes_many_different_prompts_that_name_the_class(language_model):
    prompts = writer(language_model)("cat", form("a photo of a {class}"), 5)

    assert len(set(prompts)) == 5
    assert all(text.startswith("a photo of a cat") for text in prompts)


def test_the_same_seed_writes_the_same_prompts_and_leaves_the_global_generator_alone(language_model):
    state = torch.random.get_rng_state()

    first, second = (writer(language_model)("cat", form("a {class}"), 3) for _ in range(2))

    assert first == second
    assert first != writer(language_model, seed=1)("cat", form("a {class}"), 3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_chat_model_is_asked_and_its_answer_gets_the_class_in_front(language_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    OPTForCausalLM.from_pretrained(language_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    prompts = writer(tmp_path)("cat", form("a {class}"), 2)

    assert all(text.lower().startswith("cat") or "cat" in text.lower() for text in prompts)
    assert not any("Answer with the caption only" in text for text in prompts)


def test_a_folder_that_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="`prompt-writer`"):
        writer(tmp_path)


def test_gpt_fl_needs_no_client_for_its_prompts(run_config, language_model):
    settings = parse_run_config(
        run_config | {"method": "gpt-fl", "num-prompts-per-class": 2, "prompt-writer": str(language_model)}
    )

    merged = write_server_prompts(settings)

    assert merged.class_names == settings.card.class_names()
    assert {item.label for item in merged.prompts} == set(range(10))
    assert len(merged.prompts) == 20
