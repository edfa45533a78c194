import pytest
import yaml

from fgl_app.config import APP_FOLDER
from fgl_app.errors import ConfigError
from fgl_app.user_files import read_yaml, write_yaml

SHIPPED = sorted([*APP_FOLDER.glob("fgl_app/data/cards/*.yaml"), *APP_FOLDER.glob("examples/*/*.yaml")])


@pytest.fixture
def read(tmp_path):
    def read_text(text, encoding="utf-8"):
        (tmp_path / "own.yaml").write_text(text, encoding)
        return read_yaml(tmp_path / "own.yaml", "card")

    return read_text


@pytest.mark.parametrize(
    "text",
    [
        "no", "NO", "yes", "on", "Off", "y", "010", "00010", "0x1F", "0o17", "1_000", "12:30", "1:20:30", "2024-01-01",
        "2024-01-01 10:00:00", "=", "tRue", "1e", "1.2.3", "--1", "+", "0b1",
    ],
)  # fmt: skip
def test_text_stays_text(read, text):
    assert read(f"key: {text}\nlist: [{text}]\n").content == {"key": text, "list": [text]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("10", 10), ("-3", -3), ("+3", 3), ("1e-2", 0.01), ("1E5", 100_000.0), ("0.5", 0.5), (".5", 0.5),
        ("1.", 1.0), ("-1.5e+3", -1500.0), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ],
)  # fmt: skip
def test_numbers_and_truth_are_what_they_look_like(read, text, value):
    found = read(f"key: {text}\n").content["key"]

    assert (found, type(found)) == (value, type(value))


def test_quoted_text_and_names_before_a_colon_are_text_whatever_they_look_like(read):
    content = read("010: \"1e-2\"\nno: 'true'\n1e3: |\n  12\ntrue: {5: 6}\n").content

    assert content == {"010": "1e-2", "no": "true", "1e3": "12\n", "true": {"5": 6}}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: `a` stands in line 1, too"),
        ("rows:\n  FGL: {method: fgl}\n  FGL: {method: fedavg}\n", "line 3: `rows.FGL` stands in line 2, too"),
        ("c:\n- {name: x, id: 1, name: y}\n", r"line 2: `c\[0\].name` stands in line 2, too"),
        ("yes: 1\n'yes': 2\n", "line 2: `yes` stands in line 1, too"),
        ("a: &x {k: 1}\nb:\n  <<: *x\n", "line 3: `<<` is not understood"),
        ("a: 1\nb: !!python/name:os.system\n", "line 2: .*python/name:os.system"),
        ("a: !!int 010\n", "line 1: '010' is no value of the tag 'int'"),
        ("[1, 2]: 3\n", "line 1: a name must be text"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(read, tmp_path, text, named):
    with pytest.raises(ConfigError, match=named) as raised:
        read(text)

    assert str(tmp_path / "own.yaml") in str(raised.value)


def test_a_few_lines_whose_aliases_stand_for_millions_of_values_are_refused(read):
    lines = ["a0: &a0 [x]"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")

    with pytest.raises(ConfigError, match="must hold at most 100,000 values"):
        read("\n".join(lines))


def test_what_an_alias_repeats_is_read_at_each_place(read):
    document = read("a: &names [x, y]\nb: *names\nc: {d: *names}\n")

    assert document.content == {"a": ["x", "y"], "b": ["x", "y"], "c": {"d": ["x", "y"]}}
    assert document.spelled["c", "d", 1] == "y"


def test_a_value_is_known_by_file_line_and_name(read, tmp_path):
    document = read("# a card\ntitle: x\nclasses:\n  - cat\n  - name: dog\n    id: 1e1\n")

    assert document.where(("classes", 1, "id")) == f"'{tmp_path / 'own.yaml'}', line 6, `classes[1].id`"
    assert document.where(("classes", 1, "prompt")).endswith("line 5, `classes[1].prompt`")
    assert document.spelled["classes", 1, "id"] == "1e1"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(read, encoding):
    assert read("title: é\n", encoding).content == {"title": "é"}


def test_text_that_is_not_utf_8_is_refused(read):
    with pytest.raises(ConfigError, match="must be text in UTF-8, but byte 7 of it is not"):
        read("title: é\n", "latin-1")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_is_shipped_reads_as_any_other_reader_reads_it(path):
    other = yaml.safe_load(path.read_text("utf-8"))

    # repr() tells 1 from 1.0 and True, and the order of the names.
    assert repr(read_yaml(path, "card").content) == repr(other)


def test_what_is_written_reads_as_it_was_here_and_elsewhere(tmp_path):
    content = {"1e-2": "1e-2", "no": ["no", "010", "1_000", "12:30", "5", 5, 0.5, 1e-7, True, None], "a": {"b": "ü"}}

    (tmp_path / "copy.yaml").write_text(write_yaml(content), "utf-8")

    assert read_yaml(tmp_path / "copy.yaml", "experiment").content == content
    assert yaml.safe_load(write_yaml(content)) == content
