"""Whatever a configuration, a card or a store holds, the answer is what is asked for or one of our errors."""

import itertools
import json
import math
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fgl_app.cards import SHIPPED, Card, load_card
from fgl_app.config import default_run_config, parse_run_config
from fgl_app.errors import ConfigError, SynthesisError
from fgl_app.settings import Settings
from fgl_app.store import UnitStore, as_ids

DEFAULTS = default_run_config()
CARD = yaml.safe_load((SHIPPED / "digits.yaml").read_text("utf-8"))
ONE_FOLDER = hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "name", "class", "id", "prompt"]) | st.text(max_size=5), inner)
    ),
    max_leaves=6,
)


def paths(value, here=()):
    """Every place in nested mappings and lists."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*here, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), st.booleans() | st.integers() | st.floats() | st.text()))
def test_any_configuration_is_settings_or_a_sentence(changed):
    try:
        found = parse_run_config(DEFAULTS | changed)
    except ConfigError:
        return
    assert isinstance(found, Settings)


OF_TYPE = {bool: st.booleans(), int: st.integers(), float: st.floats(), str: st.text()}


@given(st.sampled_from(sorted(DEFAULTS)).flatmap(lambda key: st.tuples(st.just(key), OF_TYPE[type(DEFAULTS[key])])))
def test_one_value_of_the_right_type_is_kept_if_it_is_a_finite_number_or_no_number(changed):
    key, value = changed
    try:
        found = parse_run_config(DEFAULTS | {key: value}).flat()
    except ConfigError:
        return
    assert not isinstance(value, float) or math.isfinite(value), key
    assert all(math.isfinite(number) for number in found.values() if isinstance(number, float))


@given(
    st.sampled_from(sorted(key for key, value in DEFAULTS.items() if isinstance(value, float))),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_every_number_must_be_finite(key, value):
    with pytest.raises(ConfigError, match=f"`{key}` must"):
        parse_run_config(DEFAULTS | {key: value})


_numbers = itertools.count()


@ONE_FOLDER
@given(place=st.sampled_from(list(paths(CARD))), value=anything)
def test_any_card_is_a_card_or_a_sentence(tmp_path, place, value):
    path = tmp_path / f"card{next(_numbers)}.yaml"
    path.write_text(yaml.safe_dump(replaced(CARD, place, value), allow_unicode=True), "utf-8", "surrogatepass")

    try:
        found = load_card(str(path))
    except ConfigError:
        return
    assert isinstance(found, Card)
    assert len(found.class_names()) >= 2


@ONE_FOLDER
@given(st.binary(max_size=300))
def test_any_file_is_a_card_or_a_sentence(tmp_path, content):
    path = tmp_path / f"card{next(_numbers)}.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError):
        load_card(str(path))


def ids(*numbers):
    return as_ids(bytes([number]) + bytes(15) for number in numbers)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    store = UnitStore(folder, "d" * 64)
    for unit, numbers in (("aa", (1, 2)), ("bb", (3,))):
        images = torch.stack([torch.full((3, 4, 4), number, dtype=torch.uint8) for number in numbers])
        names = torch.frombuffer(bytearray(ids(*numbers).tobytes()), dtype=torch.uint8).reshape(-1, 16)
        store.commit(unit, {"image": images, "label": torch.tensor(numbers), "sample_id": names}, {"seconds": 1.0})
    return folder


@ONE_FOLDER
@given(
    file=st.sampled_from(["aa.json", "aa.safetensors", "bb.json", "bb.safetensors"]),
    kind=st.sampled_from(["cut", "flip", "bytes", "json"]),
    at=st.integers(0, 10_000),
    content=st.binary(max_size=50),
    value=anything,
)
def test_a_damaged_store_gives_what_was_stored_or_an_error(sound, tmp_path, file, kind, at, content, value):
    folder = tmp_path / str(next(_numbers))
    shutil.copytree(sound, folder)
    store = UnitStore(folder, "d" * 64)
    path = store.units_folder / file
    held = bytearray(path.read_bytes())
    at %= len(held)
    if kind == "cut":
        del held[at:]
    elif kind == "flip":
        held[at] ^= 1 << (at % 8)
    elif kind == "bytes":
        held[at : at + len(content)] = content
    elif file.endswith(".json"):
        manifest = json.loads(bytes(held))
        manifest[sorted(manifest)[at % len(manifest)]] = value
        held = bytearray(json.dumps(manifest).encode())
    path.write_bytes(held)

    assert 0 <= store.index().seconds(ids(1, 2, 3)) < float("inf")
    try:
        data = store.read(ids(3, 1, 2))
    except SynthesisError:
        return
    assert data.images[:, 0, 0, 0].tolist() == [3, 1, 2]
    assert data.labels.tolist() == [3, 1, 2]
