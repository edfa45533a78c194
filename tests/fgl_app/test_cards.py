import pytest
from data_sets import DOMAINNET_IDS, DOMAINS, IMAGENET_IDS, write_hub_card
from torchvision.datasets import Imagenette
from torchvision.models._meta import _IMAGENET_CATEGORIES

from fgl_app.cards import load_card, shipped_cards
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.errors import ConfigError

IMAGENETTE_IDS = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


@pytest.mark.parametrize("name", shipped_cards())
def test_a_shipped_card_is_well_formed(name):
    card = load_card(name)

    for values in (
        card.class_names(),
        [item.prompt for item in card.classes],
        [item.source_id for item in card.classes],
    ):
        assert len(set(values)) == len(values) >= 2
        assert all(value != "" for value in values)
    assert card.name == name
    assert len(card.title) > 5
    assert len(card.licence) > 2
    for form in [card.form, *card.domain_forms.values()]:
        assert 1 <= len(set(form.class_templates)) == len(form.class_templates) <= 4
        assert all("{class}" in text or "{a class}" in text for text in [*form.class_templates, form.instance_template])
        assert "{caption}" in form.instance_template


@pytest.mark.parametrize("name", shipped_cards())
def test_a_card_has_styles_for_the_servers_prompts_or_domains_in_their_place(name):
    card = load_card(name)

    assert len(set(card.form.styles)) == len(card.form.styles)
    assert bool(card.domains) != (len(card.form.styles) >= 4)


@pytest.mark.parametrize("name", shipped_cards())
def test_a_run_takes_the_defaults_of_its_card(name):
    flat = parse_run_config(default_run_config() | {"dataset": name}).flat()

    card = load_card(name)
    assert set(card.defaults) >= {"augmentation", "guidance-scale", "num-inference-steps"}
    assert {key: flat[key] for key in card.defaults} == dict(card.defaults)
    assert flat["image-size"] == (16 if name == "digits" else card.native_size)


def test_the_numbers_of_classes():
    cards = {name: len(load_card(name).classes) for name in shipped_cards()}

    assert {name for name, number in cards.items() if number != 10} == {
        "cifar100", "chest-xray", "flowers102", "imagenet100",
    }  # fmt: skip
    assert [cards[name] for name in ("cifar100", "chest-xray", "flowers102", "imagenet100")] == [100, 2, 102, 100]


@pytest.mark.parametrize("name", [*IMAGENET_IDS, "imagenet100"])
def test_the_imagenet_subsets_are_the_papers(name):
    card = load_card(name)

    ids = [item.source_id for item in card.classes]
    assert ids == IMAGENET_IDS.get(name, ids)
    assert card.class_names() == tuple(_IMAGENET_CATEGORIES[number] for number in ids)
    assert card.form.class_templates == ("{class}, real world images, high resolution", "A photo of a {class}")
    assert card.form.instance_template == "{class}, {caption}, real world images, high resolution."
    assert card.form.negative == "low quality, low resolution"
    assert card.defaults == load_card("domainnet10").defaults == {
        "augmentation": "crop-flip", "guidance-scale": 2.0, "num-inference-steps": 50,
    }  # fmt: skip
    assert card.native_size == 224


def test_imagenette_has_the_papers_classes_in_torchvisions_order():
    card = load_card("imagenette")

    assert card.class_names() == tuple(_IMAGENET_CATEGORIES[number] for number in IMAGENETTE_IDS)
    assert card.class_names() == tuple(names[0] for _, names in sorted(Imagenette._WNID_TO_CLASS.items()))


def test_names_that_a_generator_could_mistake_are_explained():
    prompts = {item.name: item.prompt for name in ("imagefruit", "imagenet100") for item in load_card(name).classes}

    assert prompts["orange"] == "fruit: orange"
    assert prompts["kite"] == "kite, bird of prey"
    assert prompts["crane bird"] == "crane, wading bird"


def test_domainnet_has_the_papers_classes_and_a_form_per_domain():
    card = load_card("domainnet10")

    assert [item.source_id for item in card.classes] == DOMAINNET_IDS
    assert list(card.domains) == DOMAINS
    assert {domain: card.form_of(domain).class_templates[0] for domain in DOMAINS} == {
        "clipart": "{class}, clippart, cartoon style, single object.",
        "infograph": "{class}, infograph images with only one object in the picture, including text descriptions of "
        "the object's components.",
        "painting": "{class}, painting with only one object in the picture, high resolution",
        "quickdraw": "a black and white drawing of {a class}",
        "real": "{class}, real world images, high resolution, only one object in the picture",
        "sketch": "{class}, Sketch drawing with only one object in the picture",
    }
    negatives = {domain: card.form_of(domain).negative for domain in DOMAINS}
    assert negatives.pop("quickdraw") == "colorful, painting"
    assert set(negatives.values()) == {"low quality, low resolution"}


MALFORMED = [
    ({"sauce": {}}, "`sauce` must be one of"),
    ({"title": 5}, "`title` must be printable text"),
    ({"source": None}, "`source` must be a mapping"),
    ({"source": {"kind": "ftp"}}, "`source.kind` must be one of"),
    ({"source": {"kind": "torchvision"}}, "`source.name` must be there for kind torchvision"),
    ({"source": {"kind": "folder", "name": "x"}}, "`source.name` must be absent for kind folder"),
    ({"source": {"kind": "torchvision", "name": "MNIST"}}, "`splits.train` must be a mapping"),
    ({"splits": {"test": "test"}}, "`splits` must name the source's train"),
    ({"splits": {"train": 5}}, "`splits.train` must be printable text"),
    ({"validation": 0}, "`validation` must be > 0 exactly if `splits` names no validation part"),
    ({"test": 1.5}, "`test` must be a share from 0 to below 1"),
    ({"split-seed": -1}, "`split-seed` must be a whole number"),
    ({"columns": ["image"]}, "`columns` must be a mapping"),
    ({"columns": {"domain": "style"}}, "`columns.domain` must be there exactly if `domains`"),
    ({"domains": {"real": None}}, "`columns.domain` must be there exactly if `domains`"),
    ({"classes": ["cat"]}, "`classes` must be a list of at least two"),
    ({"classes": ["cat", "cat"]}, r"`classes\[1\]` must have another name than `classes\[0\]`"),
    ({"classes": ["cat", {"name": "dog", "id": 0}]}, r"`classes\[1\]` must have another id than `classes\[0\]`"),
    ({"classes": ["cat", {"name": "dog", "id": True}]}, r"`classes\[1\].id` must be a whole number or text"),
    ({"classes": ["cat", {"name": "dog", "promt": "a dog"}]}, r"`classes\[1\]` must have a name"),
    ({"classes": ["cat", 7]}, r"`classes\[1\]` must be a name, or a mapping with one, but is the number 7"),
    ({"transforms": {"resize": 32}}, "`transforms` must be a list"),
    ({"transforms": [{"rotate": 90}]}, r"`transforms\[0\]` must be a step"),
    ({"prompts": {}}, "`prompts.class` must hold at least one template"),
    ({"prompts": {"class": 5}}, "`prompts.class` must be a list"),
    ({"prompts": {"class": ["a photo"]}}, r"`prompts.class\[0\]` must contain \{class\}"),
    ({"prompts": {"class": "{class}", "instance": "{class}"}}, r"`prompts.instance` must contain \{caption\}"),
    ({"prompts": {"class": "{class}", "negativ": ""}}, "`prompts.negativ` must be class, instance, negative or styles"),
    (
        {"domains": {"real": {"class": "a photo"}}, "columns": {"domain": "style"}},
        r"`domains.real.class` must contain \{class\}",
    ),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_a_malformed_card_is_refused_in_a_sentence_that_names_the_field(change, message, tmp_path):
    path = write_hub_card(tmp_path, **({"classes": ["cat", "dog"]} | change))

    with pytest.raises(ConfigError, match=message) as raised:
        load_card(str(path))

    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_card_may_set_only_what_runs_leave_to_it(tmp_path):
    path = write_hub_card(tmp_path, ["cat", "dog"], defaults={"seed": 1})

    with pytest.raises(ConfigError, match=r"line \d+, `defaults.seed` must be one of"):
        parse_run_config(default_run_config() | {"dataset": str(path)})


def test_a_card_says_how_its_images_are_drawn_unless_the_run_does(tmp_path):
    drawing = {"scheduler": "ddim", "generation-size": 512, "guidance-scale": 3.0, "num-inference-steps": 25}
    config = default_run_config() | {"dataset": str(write_hub_card(tmp_path, ["cat", "dog"], defaults=drawing))}

    by_card = parse_run_config(config).flat()
    by_run = parse_run_config(config | {"scheduler": "own", "generation-size": 256}).flat()

    assert {key: by_card[key] for key in drawing} == drawing
    assert (by_run["scheduler"], by_run["generation-size"], by_run["guidance-scale"]) == ("own", 256, 3.0)


def test_a_domain_takes_what_it_does_not_say_from_the_card(tmp_path):
    path = write_hub_card(tmp_path, ["cat", "dog"], domains={"ink": {"negative": "red"}}, columns={"domain": "style"})

    card = load_card(str(path))

    assert card.form_of("ink").class_templates == card.form.class_templates
    assert card.form_of("ink").negative == "red"


def test_a_card_that_is_no_yaml_or_nowhere_is_refused(tmp_path):
    (tmp_path / "broken.yaml").write_text("title: [")

    with pytest.raises(ConfigError, match="must be YAML"):
        load_card(str(tmp_path / "broken.yaml"))
    with pytest.raises(ConfigError, match="must be a file that can be read"):
        load_card(str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="must be the absolute path"):
        load_card("mine.yaml")


@pytest.mark.parametrize(
    ("typed", "nearest"), [("cifar-10", "cifar10"), ("imagenete", "imagenette"), ("DomainNet", "domainnet10")]
)
def test_an_unknown_data_set_is_answered_with_the_nearest(typed, nearest):
    with pytest.raises(ConfigError, match=rf"but is '{typed}'\. Use {nearest}"):
        load_card(typed)


def write_card(folder, classes, extra="", kind="kind: folder"):
    path = folder / "own.yaml"
    path.write_text(
        f"title: Own\nsource: {{{kind}}}\nsplits: {{train: ''}}\nvalidation: 0.1\ntest: 0.2\n"
        f"prompts: {{class: 'a {{class}}'}}\nclasses:\n{classes}{extra}",
        "utf-8",
    )
    return path


def test_ids_and_names_on_a_card_are_what_is_written(tmp_path):
    card = load_card(str(write_card(tmp_path, "- {name: ten, id: 00010}\n- {name: no}\n- 12:30\n- x²\n")))

    assert [item.source_id for item in card.classes] == ["00010", "no", "12:30", "x²"]
    assert card.class_names() == ("ten", "no", "12:30", "x2")


@pytest.mark.parametrize(
    ("classes", "extra", "kind", "named"),
    [
        ("- a\n- b\n", "split-seed: 010\n", "kind: folder", "line 10, `split-seed` must be a whole number, but is"),
        ("- a\n- b\n", "defaults:\n  guidance-scale: 1_0\n", "kind: folder", "line 11, `defaults.guidance-scale` must"),
        ("- a\n- b\n- {name: c, prompt: 1e3}\n", "", "kind: folder", r"line 10, `classes\[2\].prompt` must be .* 1e3"),
        ("- x²\n- x2\n", "", "kind: folder", r"line 9, `classes\[1\]` must have another name than `classes\[0\]`"),
        ("- {name: a, id: 10}\n- {name: b, id: '10'}\n", "", "kind: folder", "must have another id"),
        ("- {name: a, id: 1}\n- {name: b, id: two}\n", "", "kind: huggingface, name: a/b", "all whole numbers, or all"),
        ("- a\n- b\n", "title: Again\n", "kind: folder", "line 10: `title` stands in line 1, too"),
        ("- a\n- ' b'\n", "", "kind: folder", "without blanks around it"),
    ],
)  # fmt: skip
def test_a_cards_mistake_has_file_line_and_key(tmp_path, classes, extra, kind, named):
    path = write_card(tmp_path, classes, extra, kind)
    if "huggingface" in kind:
        path.write_text(path.read_text("utf-8").replace("splits: {train: ''}", "splits: {train: train}"), "utf-8")

    with pytest.raises(ConfigError, match=named) as raised:
        load_card(str(path))

    assert str(path) in str(raised.value)


def test_how_a_picture_becomes_square_is_said_by_the_card_and_enters_its_digest(tmp_path):
    texts = {"crop": "", "pad": "fit: pad", "squash": "fit: squash"}
    cards = {}
    for fit, line in texts.items():
        path = tmp_path / f"{fit}.yaml"
        path.write_text(
            "source: {kind: folder}\nclasses: [a, b]\nprompts: {class: '{class}'}\n"
            f"test: 0.2\nvalidation: 0.1\n{line}\n"
        )
        cards[fit] = load_card(str(path))

    assert {fit: card.fit for fit, card in cards.items()} == {fit: fit for fit in texts}
    assert len({card.digest() for card in cards.values()}) == 3
    path = tmp_path / "wrong.yaml"
    path.write_text((tmp_path / "pad.yaml").read_text().replace("fit: pad", "fit: stretch"))
    with pytest.raises(ConfigError, match="`fit` must be one of crop, pad, squash, but is 'stretch'"):
        load_card(str(path))
