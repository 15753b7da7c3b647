"""Half surrogate pairs in JSON."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.upstream.providers.json_text import replace_lone_surrogates


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (rb'"\ud800"', "\ufffd"),
        (rb'"a\uDFFFb"', "a\ufffdb"),
        (rb'"\ud83d\ude00"', "\U0001f600"),
        (rb'"\ud83d\ud83d\ude00\ude00"', "\ufffd\U0001f600\ufffd"),
        (rb'"\\ud800"', r"\ud800"),  # an escaped backslash
        (rb'"\\\ud800\""', '\\\ufffd"'),
        (rb'"\u00e9"', "\u00e9"),
    ],
)
def test_only_half_pairs_are_replaced(text: bytes, read: str) -> None:
    replaced = replace_lone_surrogates(text)
    assert msgspec.json.decode(replaced) == read
    assert len(replaced) == len(text)


@given(st.text(st.characters(categories=["Cs", "L", "P"]) | st.sampled_from('\ud83d\ude00\\"u'), max_size=20))
def test_what_python_writes_can_be_read(text: str) -> None:
    written = json.dumps({"text": text}).encode()
    read = msgspec.json.decode(replace_lone_surrogates(written))["text"]
    paired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert read.count("\ufffd") >= paired.count("\ufffd") - text.count("\ufffd")
    assert [letter for letter in read if letter != "\ufffd"] == [letter for letter in paired if letter != "\ufffd"]


def test_a_text_of_nothing_but_backslashes_is_read_in_one_pass() -> None:
    many = b"\\\\" * 1_000_000  # time that grows with the square of its length would be hours
    assert replace_lone_surrogates(b'"\\ud800' + many + b'"') == b'"\\ufffd' + many + b'"'
