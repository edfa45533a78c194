import io
import itertools
import struct

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import Imagenette
from torchvision.models._meta import _IMAGENET_CATEGORIES

from fgl_app.cards import load_card, shipped_cards
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.data.sources import load_client_data, load_split
from fgl_app.errors import ConfigError, DataError

IMAGENET_IDS = {  # METHOD.md, from the authors' code
    "imagefruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
    "imageyellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
    "imagesquawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
}
IMAGENETTE_IDS = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
DOMAINNET_IDS = [1, 73, 11, 19, 29, 31, 290, 121, 225, 39]
DOMAINS = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
HELD_OUT = {"train": "train", "test": "test"}
HUB = {  # columns of image and label, number of classes, parts of the card and of the hub
    "cifar10": ("img", "label", 10, HELD_OUT),
    "cifar100": ("img", "fine_label", 100, HELD_OUT),
    "flowers102": ("image", "label", 102, {"train": "train", "validation": "validation", "test": "test"}),
    "domainnet10": ("image", "label", 345, HELD_OUT),
} | {
    name: ("image", "label", 1000, {"train": "train", "test": "validation"}) for name in [*IMAGENET_IDS, "imagenet100"]
}


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FGL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")  # read when it was imported


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def load(run_config, source):
    """Loads the three parts that a run uses, at 8 px."""

    def load(dataset):
        settings = parse_run_config(run_config | {"dataset": str(dataset), "data-dir": str(source)})
        parts = [load_split(settings.card, settings.data, name) for name in ("train", "validation", "test")]
        for part in parts:
            assert part.images.shape == (len(part), 3, 8, 8)
            assert part.images.dtype == torch.uint8
            assert part.labels.dtype == torch.int64
            assert sorted(part.labels.unique().tolist()) == list(range(len(settings.card.classes)))
        return parts

    return load


def picture(number, domain=0, size=4):
    """Return an image that tells which source label and domain it was written for."""
    return Image.new("RGB", (size, size), (number // 8, 30 * (number % 8), 40 * domain))


def told(part):
    red, green, blue = part.images[:, :, 4, 4].int().T
    return (8 * red + green // 30).tolist(), (blue // 40).tolist()


def write_hub(folder, split, columns, rows, features):
    """Write the parquet file of one part as the hub has it; rows are tuples of source label and domain."""
    data = {columns[0]: [encoded(*row) for row in rows]}
    data |= {name: [row[number] for row in rows] for number, name in enumerate(columns[1:])}
    kinds = datasets.Features({columns[0]: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    table = datasets.Dataset.from_dict(data, features=datasets.Features(kinds | features))
    table.cast_column(columns[0], datasets.Image()).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def encoded(number, domain=0):
    buffer = io.BytesIO()
    picture(number, domain).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_tree(folder, names, count, ending, colour=picture):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour(number).save(folder / name / f"{index}.{ending}")


def ids_of(card, part):
    return [card.classes[label].source_id for label in part.labels.tolist()]


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


@pytest.mark.parametrize("name", [name for name in HUB if name != "domainnet10"])
def test_hub_data_are_read_without_foreign_classes(name, load, source):
    card = load_card(name)
    image, label, num_classes, parts = HUB[name]
    ids = [item.source_id for item in card.classes]
    foreign = [*sorted(set(range(num_classes)) - set(ids))[-2:], -1]  # -1: without a label
    counts = {"train": 10, "validation": 2, "test": 2}
    for part, split in parts.items():
        rows = [(number,) for number in [*foreign, *ids] * counts[part]]
        write_hub(source, split, [image, label], rows, {label: datasets.ClassLabel(num_classes=num_classes)})

    train, validation, test = load(name)

    given = 10 * len(ids)  # a tenth of train is for validation, unless the source has a part for it
    own = "validation" in parts
    assert [len(train), len(validation), len(test)] == (
        [given, 2 * len(ids), 2 * len(ids)] if own else [given * 9 // 10, given // 10, 2 * len(ids)]
    )
    for part in (train, validation, test):
        assert told(part)[0] == ids_of(card, part)


def test_domainnet_is_read_with_its_domains(load, source):
    card = load_card("domainnet10")
    image, label, num_classes, parts = HUB["domainnet10"]
    features = {
        label: datasets.ClassLabel(num_classes=num_classes),
        "domain": datasets.ClassLabel(names=[*reversed(DOMAINS), "photo"]),  # names count, not their order
    }
    for part, split in parts.items():
        rows = list(itertools.product([0, *DOMAINNET_IDS], range(7))) * (10 if part == "train" else 2)
        write_hub(source, split, [image, label, "domain"], rows, features)

    train, validation, test = load("domainnet10")

    assert [len(train), len(validation), len(test)] == [540, 60, 120]
    for part in (train, validation, test):
        numbers, domains = told(part)
        assert numbers == ids_of(card, part)
        assert [5 - domain for domain in domains] == part.domains.tolist()
        assert set(part.domains.tolist()) == set(range(6))


def write_hub_card(folder, classes, **changes):
    content = {
        "title": "Cats",
        "source": {"kind": "huggingface", "name": "owner/cats"},
        "splits": {"train": "train", "test": "test"},
        "validation": 0.25,
        "classes": classes,
        "prompts": {"class": "{class}"},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


@pytest.mark.parametrize("feature", [datasets.Value("string"), datasets.ClassLabel(names=["dog", "ant", "cat"])])
def test_classes_of_the_hub_may_be_known_by_name(feature, load, source, tmp_path):
    path = write_hub_card(tmp_path, [{"name": "kitty", "id": "cat"}, {"name": "doggy", "id": "dog"}])
    label = {"cat": 2, "dog": 0, "ant": 1}
    names = ["ant", "cat", "dog"]
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"image": [encoded(label[name]) for name in names] * 4, "label": names * 4})
        table = table.cast_column("image", datasets.Image()).cast_column("label", feature)
        table.to_parquet(str(source / f"{split}.parquet"))

    train, validation, test = load(path)

    assert [len(train), len(validation), len(test)] == [6, 2, 8]
    assert told(test)[0] == [2, 0] * 4
    assert test.labels.tolist() == [0, 1] * 4


def test_domains_of_the_hub_that_the_card_does_not_name_are_refused_by_name(load, source, tmp_path):
    path = write_hub_card(tmp_path, ["cat", "dog"], domains={"real": None}, columns={"domain": "style"})
    rows = [(0, 1), (1, 1)] * 4
    features = {"label": datasets.Value("int64"), "style": datasets.ClassLabel(names=["ink", "oil"])}
    write_hub(source, "train", ["image", "label", "style"], rows, features)

    with pytest.raises(DataError, match=r"but has oil\. Correct `domains`"):
        load(path)


def test_mnist_is_read_from_torchvisions_files(load, source):
    raw = source / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = {"train": np.tile(np.arange(10, dtype=np.uint8), 10), "t10k": np.arange(10, dtype=np.uint8)}
    for part, values in labels.items():
        images = np.broadcast_to(20 * values[:, None, None], (len(values), 28, 28)).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", values)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())

    train, validation, test = load("mnist")

    assert [len(train), len(validation), len(test)] == [90, 10, 10]
    assert test.images[:, 0, 4, 4].tolist() == [20 * label for label in test.labels.tolist()]


def test_imagenette_is_read_from_torchvisions_folders(load, source):
    def grey(number):
        return Image.new("RGB", (8, 8), (20 * number,) * 3)

    folder = source / "imagenette2-320"
    for part, count in (("train", 10), ("val", 2)):
        write_tree(folder / part, sorted(Imagenette._WNID_TO_CLASS), count, "jpeg", grey)

    train, validation, test = load("imagenette")

    assert [len(train), len(validation), len(test)] == [90, 10, 20]
    assert torch.equal((test.images[:, 0, 4, 4] / 20).round().long(), test.labels)


def test_eurosat_is_read_from_torchvisions_folders_and_divided(load, source):
    write_tree(source / "eurosat" / "2750", load_card("eurosat").class_names(), 10, "png")

    parts = load("eurosat")

    assert [len(part) for part in parts] == [70, 10, 20]
    assert all(told(part)[0] == part.labels.tolist() for part in parts)


def test_chest_xrays_are_read_from_their_folders(load, source):
    for part, count in (("train", 20), ("val", 8), ("test", 4)):
        write_tree(source / part, ["NORMAL", "PNEUMONIA"], count, "jpeg", lambda number: picture(0, 6 * number))

    train, validation, test = load("chest-xray")

    assert [len(train), len(validation), len(test)] == [36, 4, 8]
    assert ((test.images[:, 2, 4, 4] > 100).long()).tolist() == test.labels.tolist() == [0] * 4 + [1] * 4


def test_a_new_data_set_needs_only_a_card(tmp_path, source, run_config):
    path = tmp_path / "animals.yaml"
    path.write_text("""
        source: {kind: folder}
        splits: {train: images}
        validation: 0.2
        test: 0.2
        classes: [cat, {name: dog, prompt: "dog, not hot dog"}]
        domains:
          photo:
          drawing: {class: "a drawing of {a class}"}
        prompts: {class: "a photo of {a class}"}
        defaults: {augmentation: none}
    """)
    for number, domain in enumerate(["photo", "drawing"]):
        write_tree(source / "images" / domain, ["cat", "dog"], 10, "png", lambda label, it=number: picture(label, it))
    settings = parse_run_config(
        run_config | {"dataset": str(path), "data-dir": str(source), "partition": "domain", "num-clients": 2}
    )

    clients = [
        load_client_data(settings.card, settings.data, {"partition-id": number, "num-partitions": 2}, 0)
        for number in range(2)
    ]

    for number, client in enumerate(clients):
        assert len(client.train) == 12
        assert client.train.domains.tolist() == told(client.train)[1] == [number] * 12
        assert client.train.labels.tolist() == told(client.train)[0] == [0] * 6 + [1] * 6
        assert client.class_names == ("cat", "dog")
        held_out = client.held_out()
        assert [len(held_out.validation), len(held_out.test)] == [8, 8]
    assert settings.training.augmentation == "none"
    assert settings.card.classes[1].prompt == "dog, not hot dog"
    assert settings.prompt_form("drawing").class_templates == ("a drawing of {a class}",)
    assert settings.prompt_form("photo").class_templates == ("a photo of {a class}",)
    own = {"dataset": str(path), "data-dir": str(source), "class-prompt": "{a class} in a {domain}"}
    overridden = parse_run_config(run_config | own | {"negative-prompt": "no {domain}"})
    assert [overridden.prompt_form(name).class_templates[0] for name in ("photo", "drawing")] == [
        "{a class} in a photo", "{a class} in a drawing",
    ]  # fmt: skip
    assert overridden.prompt_form("drawing").negative == "no drawing"


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
    ({"classes": ["cat", "cat"]}, "`classes` must have different names and ids"),
    ({"classes": ["cat", {"name": "dog", "id": 0}]}, "`classes` must have different names and ids"),
    ({"classes": ["cat", {"name": "dog", "id": True}]}, r"`classes\[1\].id` must be a whole number or text"),
    ({"classes": ["cat", {"name": "dog", "promt": "a dog"}]}, r"`classes\[1\]` must have a name"),
    ({"classes": ["cat", 7]}, r"`classes\[1\]` must be a mapping"),
    ({"transforms": {"resize": 32}}, "`transforms` must be a list"),
    ({"transforms": [{"rotate": 90}]}, "`transforms` must hold steps"),
    ({"prompts": {}}, "`prompts.class` must hold at least one template"),
    ({"prompts": {"class": 5}}, "`prompts.class` must be a list"),
    ({"prompts": {"class": ["a photo"]}}, r"`prompts.class` must contain \{class\}"),
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

    with pytest.raises(ConfigError, match="sets `seed`"):
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
    with pytest.raises(ConfigError, match="must be a card that can be read"):
        load_card(str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="must be the absolute path"):
        load_card("mine.yaml")


@pytest.mark.parametrize(
    ("typed", "nearest"), [("cifar-10", "cifar10"), ("imagenete", "imagenette"), ("DomainNet", "domainnet10")]
)
def test_an_unknown_data_set_is_answered_with_the_nearest(typed, nearest):
    with pytest.raises(ConfigError, match=rf"but is '{typed}'\. Use {nearest}"):
        load_card(typed)


def test_a_class_that_torchvision_lacks_is_refused(tmp_path, load):
    changes = {"source": {"kind": "torchvision", "name": "MNISTT"}, "splits": {"train": {}, "test": {}}}
    path = write_hub_card(tmp_path, ["cat", "dog"], **changes)

    with pytest.raises(DataError, match=r"`source.name`.*'MNISTT'"):
        load(path)
