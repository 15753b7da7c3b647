"""The lines of the keys of a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.cli.toml_document import MAX_FILE_BYTES, InvalidConfiguration, KeyPath, TomlDocument, read_document

TEXT = '''# a comment
first = 1

[gateway]           # one behind a header
  "token file" = "a"
listen = """
[not.a.header]
rpm = 1
"""
hosts = [
    "a",            # [targets]

    "b",
]

[targets.openai]
models."gpt-4o*".rpm = 5
prices = { mine = { input = 1, output = 2 } }
[targets.openai.weights]
'acme' = 3
'''


def test_every_key_and_header_has_its_line() -> None:
    assert TomlDocument("f", TEXT).lines == {
        ("first",): 2,
        ("gateway",): 4,
        ("gateway", "token file"): 5,
        ("gateway", "listen"): 6,
        ("gateway", "hosts"): 10,
        ("targets",): 16,
        ("targets", "openai"): 16,
        ("targets", "openai", "models"): 17,
        ("targets", "openai", "models", "gpt-4o*"): 17,
        ("targets", "openai", "models", "gpt-4o*", "rpm"): 17,
        ("targets", "openai", "prices"): 18,
        ("targets", "openai", "prices", "mine"): 18,
        ("targets", "openai", "prices", "mine", "input"): 18,
        ("targets", "openai", "prices", "mine", "output"): 18,
        ("targets", "openai", "weights"): 19,
        ("targets", "openai", "weights", "acme"): 20,
    }


def test_a_key_in_a_list_of_tables_has_its_index() -> None:
    lines = TomlDocument("f", "[[a]]\nb = 1\n[[a]]\nb = 2\nc = 3\n[x]\n").lines
    assert lines == {
        ("a",): 1,
        ("a", 0): 1,
        ("a", 0, "b"): 2,
        ("a", 1): 3,
        ("a", 1, "b"): 4,
        ("a", 1, "c"): 5,
        ("x",): 6,
    }


WORDS = st.sampled_from(["a", "b c", "d.e", '"', "#", "[f]", "g = 1", "é"])
VALUES = st.sampled_from(
    ['"x"', "1", "[\n1,\n# two\n2\n]", '"""\n[a]\nb = 1\n"""', "'''\\\n'''", "{ z = 1 }", "1979-05-27"]
)
NOISE = st.sampled_from(["", "# a = 1", "  ", "# [a]", '# """'])


@given(
    tables=st.dictionaries(WORDS, st.dictionaries(WORDS, st.tuples(st.lists(NOISE, max_size=2), VALUES), max_size=4)),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_the_lines_of_keys_are_those_where_they_were_written(
    tables: dict[str, dict[str, tuple[list[str], str]]], ending: str
) -> None:
    written: list[str] = []
    expected: dict[KeyPath, int] = {}
    for name, table in tables.items():
        written.append(f"[{quoted(name)}]")
        expected[(name,)] = len(written)
        for key, (noise, value) in table.items():
            written += noise
            first, *rest = f"{quoted(key)} = {value}  # why".split("\n")
            written.append(first)
            expected[(name, key)] = len(written)
            written += rest
    text = ending.join(written)
    document = TomlDocument("f", text)
    assert {keys: line for keys, line in document.lines.items() if keys[-1] != "z"} == expected
    assert set(document.lines) == set(paths(tomllib.loads(text)))


def quoted(key: str) -> str:
    return '"' + key.replace('"', '\\"') + '"'


def paths(values: Mapping[str, Any]) -> Iterator[KeyPath]:
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in paths(value))


TWICE = "keep one of the two, or rename this one"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = 1\nb = \n", "f:2: Invalid value (column 5)"),
        ("a = 1\n[a]\n", f"f:2: a is already in line 1: {TWICE}"),
        ("a = 1\n\na = 2", f"f:3: a is already in line 1: {TWICE}"),
        ('a = 1\n\na = """\n2"""\nb = 3\n', f"f:3: a is already in line 1: {TWICE}"),
        ("[t.a]\nx = 1\n[t.b]\nx = 2\n[t.a]\n", f"f:5: t.a is already in line 1: {TWICE}"),
        ("[t.'g*']\nx = 1\ny = 1\nx = 2\n", f'f:4: t."g*".x is already in line 2: {TWICE}'),
        ("[[t]]\nx = 1\n[[t]]\nx = 1\nx = 2\n", f"f:5: t.x is already in line 4: {TWICE}"),
        ("a = 1\na.b = 2\n", "f:2: Cannot overwrite a value (column 8)"),
        ('a = 1\nb = """\nc = 3\n', "f:2: Unterminated string, from here to the end of the file"),
        ("# x\na = [\n1,\n2,\n", "f:2: Invalid value, from here to the end of the file"),
        ("a =", "f:1: Invalid value, from here to the end of the file"),
        ("a = 1\nhello\n", "f:2: Expected '=' after a key in a key/value pair (column 6)"),
    ],
)
def test_invalid_toml_is_reported_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(InvalidConfiguration) as rejected:
        TomlDocument("f", text)
    assert str(rejected.value) == problem


def test_an_unreadable_file_is_reported_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"none\.toml: it cannot be read: No such file"):
        read_document(tmp_path / "none.toml")
    with pytest.raises(InvalidConfiguration, match="Is a directory"):
        read_document(tmp_path)


def test_invalid_utf_8_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_bytes(b"a = 1\n# ok\nb = '\xff'\n")
    with pytest.raises(InvalidConfiguration, match=r"forebay\.toml:3: this is not UTF-8"):
        read_document(file)


def test_a_file_that_is_too_large_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(InvalidConfiguration, match="too large for a configuration"):
        read_document(file)
