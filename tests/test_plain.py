"""What strangers write is read as plain data, in little time, or refused in one line."""

import pytest
import yaml

from elastic.errors import ConfigError, RunError
from elastic.plain import is_name, parse_json, parse_yaml, read_text, read_yaml, shaped

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{mine}: &{mine} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, mine in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine to the power of nine."""
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: &a {path: *a}", r"f\.yaml:1: broken YAML: the alias \*a cannot be followed"),
        (BOMB, r"f\.yaml:5: broken YAML: the alias \*d cannot be followed"),
        (CHAIN, r"f\.yaml:64: broken YAML: more than 64 lists and mappings"),
        ("a: *b", r"the alias \*b cannot be followed"),
        ("[" * 70 + "]" * 70, "more than 64 lists and mappings"),
        ("[" * 100_000, "nesting|more than 64 lists"),
        ("a: 1\nb: {c: 2}\na: 3", r"f\.yaml:3: broken YAML: 'a' stands there twice"),
        ("a: {b: 1, 'b': 2}", "'b' stands there twice"),
        ("a: !!python/object/apply:os.system [ls]", "a tag .*os.system.*; leave it out"),
        ("!!set {a, b}", "a tag"),
        ("? [1, 2]\n: 3", "a key that is no name"),
        ("a: " + "9" * 5000, "broken YAML: .*digits"),
        ("a: 2001-99-99", "broken YAML: month must be"),
        ("a: {b", r"f\.yaml:2: broken YAML: did not find expected ',' or '}'$"),
        ("a: \0", "broken YAML: unacceptable character"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)


def test_plain_yaml_is_what_the_library_reads():
    text = "a: &a [1, 2.5, x, null]\nb: *a\nc: {d: *a, e: {f: true}}\n- g: 1\n"[:-7]
    assert parse_yaml(text, "f.yaml") == yaml.safe_load(text)
    assert parse_yaml("", "f.yaml") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "digits"),
        ('{"a":\n}', r"f\.json:2: broken JSON: "),
    ],
)
def test_json_that_cannot_be_read_is_refused_in_one_line(text, message):
    with pytest.raises(RunError, match=message) as caught:
        parse_json(text, "f.json")
    assert "\n" not in str(caught.value)


def test_what_is_no_text_is_named_with_its_place(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"prompt: caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(.* at byte 11\)"):
        read_yaml(file)
    with pytest.raises(RunError, match=r"none\.yaml: no such file"):
        read_text(tmp_path / "none.yaml")
    with pytest.raises(RunError, match="cannot be read: is a directory"):
        read_text(tmp_path)
    with pytest.raises(RunError, match="cannot be read: embedded null"):
        read_text("a\0b")


def test_a_shape_says_where_another_was_met():
    shape = {"a": float, "b": [{"c": int}], "d": [float, float], "e": {"f": bool, "g": str}}
    value = {"a": 1, "b": [{"c": 1}, {"c": 2}], "d": [0.5, 1], "e": {"f": True, "g": "x"}, "h": 0}
    assert shaped(value, shape, "file") is value
    for change, message in [
        ({"a": "1"}, "file: a: expected a finite number, got '1'"),
        ({"a": float("nan")}, "file: a: expected a finite number"),
        ({"a": True}, "file: a: expected a finite number"),
        ({"b": [{"c": 1}, {"c": 2.5}]}, "file: b: c: expected a whole number, got 2.5"),
        ({"b": {}}, "file: b: expected a list, got {}"),
        ({"d": [0.5]}, "file: d: 1 values instead of 2"),
        ({"e": {"f": 1, "g": "x"}}, "file: e: f: expected true or false, got 1"),
        ({"e": {"f": True}}, "file: e: g is missing"),
    ]:
        with pytest.raises(RunError) as caught:
            shaped({**value, **change}, shape, "file")
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["best", "front-2", "a b", "modèle", "x" * 200])
def test_a_name_is_that_of_one_file(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "/a", "a\\b", "a\nb", "a\0", "x" * 201]
)
def test_what_leads_elsewhere_is_no_name(name):
    assert not is_name(name)
