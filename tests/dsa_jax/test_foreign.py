"""JSON within bounds, and strings without control characters."""

import json
import os

import pytest

from dsa_jax.foreign import MOST_DEPTH, parse_json, printable, printable_text, read_object, shown
from dsa_jax.run.files import RunError
from dsa_jax.run.files import read_object as read_run_file


@pytest.mark.parametrize("value", [{}, [1, 2.5, None, True, "a"], {"a": {"b": [{"c": 1}]}}, 10**30, "\ud800"], ids=repr)
def test_ordinary_values_are_what_json_has(value):
    assert parse_json(json.dumps(value)) == value


def test_depth_counts_lists_and_objects():
    deepest = '{"a": [' * (MOST_DEPTH // 2) + "]}" * (MOST_DEPTH // 2)
    assert parse_json(deepest) == json.loads(deepest)
    for text in (f"[{deepest}]", f'{{"a": {deepest}}}', "[" * 10**6):
        with pytest.raises(ValueError, match=f"nested more than {MOST_DEPTH} deep"):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"x": {"a": 1, "b": 2, "a": 1}}', "the key 'a' stands twice"),
        ("[" + "1" * 101 + "]", "a number has 101 digits"),
        (b"\xff{}", "utf-8"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0", "model.layers.0"),
        ("größe 模型", "größe 模型"),
        ("\x1b[2J\r\n\t\x07\x7f\x9b", "\\x1b[2J\\r\\n\\t\\x07\\x7f\\x9b"),
        ("\u202egpj\u2028\ud800", "\\u202egpj\\u2028\\ud800"),
        ("a" * 201, "a" * 133 + " ... " + "a" * 50),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


def test_shown_is_short_for_any_value():
    assert shown({"a": ["\x1b"]}) == "{'a': ['\\x1b']}"
    assert len(shown([list(range(10**4))])) < 250


def test_readers_name_the_file(tmp_path):
    (tmp_path / "a.json").write_text("[" * 10**5)
    for read, kind in ((lambda file: read_object(file, RunError, remedy="Get it."), RunError), (read_run_file, RunError)):
        with pytest.raises(kind, match=r"a\.json is not .*JSON.* nested more than"):
            read(tmp_path / "a.json")
    with pytest.raises(RunError, match=r"missing\.json cannot be read: No such file.* Get it\."):
        read_object(tmp_path / "missing.json", RunError, remedy="Get it.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\n\tlines\n", "two\n\tlines\n"),
        ("größe 模型\u3000\xa0é e\u0301 \U0001f469\u200d\U0001f4bb ن\u200cم \ue000", None),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("done\rover\b\x00\x7f\x9b31m", "done\\rover\\x08\\x00\\x7f\\x9b31m"),
        ("\u202egpj\u2066\u2028\ud800", "\\u202egpj\\u2066\\u2028\\ud800"),
    ],
)
def test_printable_text_keeps_lines_and_letters(text, expected):
    assert printable_text(text) == (text if expected is None else expected)


def test_what_is_no_file_leaves_no_descriptor_open(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    before = os.listdir("/dev/fd")
    for name in ("fifo", "folder", "missing"):
        with pytest.raises(RunError, match="cannot be read"):
            read_object(tmp_path / name, RunError)
    assert os.listdir("/dev/fd") == before
