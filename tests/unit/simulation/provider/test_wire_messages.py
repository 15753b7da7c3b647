"""Requests and answers in the wire formats, without a socket."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.simulation.provider import wire_messages as wire


@given(st.integers(0, 9000), st.integers(0, 9000))
def test_parts_of_an_answer_make_the_whole_text(first: int, second: int) -> None:
    whole = wire.answer_text(0, first + second)
    assert wire.answer_text(0, first) + wire.answer_text(first, second) == whole
    assert len(whole.split()) == first + second or "  " not in whole


def test_an_answer_has_one_word_per_token() -> None:
    assert len(wire.answer_text(0, 500).split()) == 500


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": [{"role": "user", "content": "x" * 400}]}, 104),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 400}, {"type": "image"}]}]}, 104),
        ({"messages": [{"role": "user", "content": "x" * 200}], "system": "y" * 200}, 104),
        ({"messages": [{"role": "assistant", "content": None}]}, 4),
    ],
    ids=["text", "parts", "system", "nothing"],
)
def test_input_tokens_are_estimated_from_characters(body: dict[str, object], tokens: int) -> None:
    request = wire.read_request(json.dumps({"model": "m"} | body).encode())
    assert request.input_tokens() == tokens


def test_both_names_of_the_output_bound_are_read() -> None:
    base = {"model": "m", "messages": []}
    assert wire.read_request(json.dumps(base | {"max_tokens": 7}).encode()).max_output_tokens == 7
    assert (
        wire.read_request(
            json.dumps(base | {"max_completion_tokens": 8, "max_tokens": None}).encode()
        ).max_output_tokens
        == 8
    )
    assert wire.read_request(json.dumps(base).encode()).max_output_tokens is None


def test_an_invalid_request_is_refused_with_its_field() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.messages"):
        wire.read_request(b'{"model": "m", "messages": 3}')


def test_an_openai_stream_has_usage_only_if_requested() -> None:
    for asked in (False, True):
        end = wire.OpenAIWriter(1, "m", 0, include_usage=asked).stream_end((5, 10), stopped=True)
        assert (b'"total_tokens":15' in end) is asked
        assert end.endswith(b"data: [DONE]\n\n")
