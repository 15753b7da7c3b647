"""Usage asked for in a stream, and filtered out for a caller who did not ask."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.unit.upstream.providers import streams

from forebay.upstream.providers import UsageFilter, profile_for

SAY = [{"role": "user", "content": "Tell me of rivers."}]
CHAT = "/v1/chat/completions"
NULL = b', "usage": null'  # in all chunks but that with the usage


def filtered(data: bytes, cuts: list[int] | None = None) -> bytes:
    usage_filter = UsageFilter()
    out = b"".join(usage_filter.feed(data[begin:end]) for begin, end in pairwise([0, *sorted(cuts or []), len(data)]))
    return out + usage_filter.end()


def changed(body: dict[str, Any] | bytes, *, provider: str = "openai", path: str = CHAT) -> Any:
    profile = profile_for(provider)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = profile.with_include_usage(profile.read_request("POST", path, {}, data), data)
    return None if more is None else json.loads(more)


# --- the request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_a_stream_that_does_not_ask_for_usage_is_changed_to_ask(options: dict[str, Any]) -> None:
    body = {"model": "m", "messages": SAY, "stream": True} | options
    assert changed(body) == body | {"stream_options": {"include_usage": True}}


def test_other_options_stay_and_other_values_keep_their_bytes() -> None:
    body = (
        b'{"temperature": 1.0, "seed": 9007199254740993, "stream":true,"stream_options":{"include_obfuscation":false}}'
    )
    profile = profile_for("openai")
    more = profile.with_include_usage(profile.read_request("POST", CHAT, {}, body), body)
    assert more is not None
    assert json.loads(more)["stream_options"] == {"include_obfuscation": False, "include_usage": True}
    assert b'"temperature":1.0,"seed":9007199254740993' in more


@pytest.mark.parametrize(
    ("provider", "path", "rest"),
    [
        ("openai", CHAT, {"stream": False}),
        ("openai", CHAT, {"stream": True, "stream_options": {"include_usage": True}}),
        ("openai", CHAT, {"stream": True, "stream_options": 7}),
        ("openai", "/v1/responses", {"stream": True}),
        ("anthropic", "/v1/messages", {"stream": True}),
        ("openai-compatible", CHAT, {"stream": True}),
        ("generic", CHAT, {"stream": True}),
        ("azure", "/openai/deployments/d/chat/completions?api-version=2024-02-01", {"stream": True}),
    ],
)
def test_a_request_that_must_not_ask_stays_unchanged(provider: str, path: str, rest: dict[str, Any]) -> None:
    assert changed({"model": "m", "messages": SAY} | rest, provider=provider, path=path) is None


@pytest.mark.parametrize(
    ("provider", "path"),
    [
        ("vllm", CHAT),
        ("ollama", CHAT),
        ("llama.cpp", CHAT),
        ("openai", "/v1/completions"),
        ("azure", "/openai/deployments/d/chat/completions?api-version=2024-10-21"),
        ("azure", "/openai/v1/chat/completions?api-version=preview"),
        ("azure", "/openai/v1/chat/completions"),
    ],
)
def test_a_request_that_may_ask_is_changed(provider: str, path: str) -> None:
    assert changed({"model": "m", "messages": SAY, "stream": True}, provider=provider, path=path) is not None


# --- the response -----------------------------------------------------------------------------------------------------


def test_the_usage_chunk_is_removed_and_every_other_byte_passes() -> None:
    usage = streams.sse(streams.USAGE_CHUNK)
    assert usage in streams.CHAT_WITH_USAGE
    assert filtered(streams.CHAT_WITH_USAGE) == streams.CHAT_WITH_USAGE.replace(usage, b"").replace(NULL, b"")


@pytest.mark.parametrize("name", sorted(set(streams.ALL) - {"chat with usage"}))
def test_a_stream_without_a_usage_chunk_passes_unchanged(name: str) -> None:
    assert filtered(streams.ALL[name]) == streams.ALL[name]


@pytest.mark.parametrize(
    "event",
    [
        streams.sse(
            streams.chunk({}, "stop", usage=streams.CHAT_USAGE)
        ),  # llama.cpp before 2025: usage in a chunk with a choice
        streams.sse({"choices": [], "prompt_filter_results": [{}]}),  # Azure's first
        streams.sse({"choices": []}),
        b'data: {"choices": [], "usage": {}\n\n',
        b": a comment\n\n",
        b'data: "usage"',
        b"\r\n\r\r\n\n",
    ],
)
def test_an_event_that_only_resembles_the_usage_chunk_passes(event: bytes) -> None:
    for cut in range(len(event)):
        assert filtered(event + b"data: [DONE]\n\n", [cut]) == event + b"data: [DONE]\n\n"


@given(
    name=st.sampled_from(sorted(streams.ALL)),
    cuts=st.lists(st.integers(0, 1500), max_size=20),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
)
def test_the_filter_does_not_depend_on_the_pieces(name: str, cuts: list[int], end: bytes) -> None:
    data = streams.ALL[name].replace(b"\n", end)
    usage = streams.sse(streams.USAGE_CHUNK).replace(b"\n", end)
    passed = data.replace(usage, b"")
    if name == "chat with usage":
        passed = passed.replace(NULL, b"")
    assert filtered(data, [min(cut, len(data)) for cut in cuts]) == passed


@given(chunks=st.lists(st.binary(max_size=40) | st.sampled_from([b"data: {", b"\n", b"\r", b'"usage"']), max_size=30))
def test_other_bytes_pass_unchanged(chunks: list[bytes]) -> None:
    usage_filter = UsageFilter()
    out = b"".join(map(usage_filter.feed, chunks)) + usage_filter.end()
    assert out == b"".join(chunks)


@pytest.mark.parametrize(
    ("chunk", "passed"),
    [
        (b'{"choices":[{"index":0}],"usage":null}', b'{"choices":[{"index":0}]}'),
        (b'{"choices": [{"index": 0}], "usage": null}', b'{"choices": [{"index": 0}]}'),
        (b'{"usage":null,"choices":[]}', b'{"choices":[]}'),
        (b'{"id":1, "usage" : null , "choices":[]}', b'{"id":1 , "choices":[]}'),
        (b'{"usage":null}', b'{"usage":null}'),
        (
            b'{"choices":[{"delta":{"content":"\\ud83d"}}],"usage":null}',
            b'{"choices":[{"delta":{"content":"\\ud83d"}}]}',
        ),
        (b'{"choices":[{"usage":null}],"usage":null}', b'{"choices":[{"usage":null}]}'),
        (b'{"choices":[{"a":1,"usage":null}],"usage":null}', b'{"choices":[{"a":1,"usage":null}],"usage":null}'),
        (b'{"choices":[{"usage":null}]}', b'{"choices":[{"usage":null}]}'),
        (b'{"a":", \\"usage\\": null","usage":null}', b'{"a":", \\"usage\\": null"}'),
        (b'{"choices":[1],"usage":{"prompt_tokens":1}}', b'{"choices":[1],"usage":{"prompt_tokens":1}}'),
    ],
)
@pytest.mark.parametrize("size", [1, 9, 1000])
def test_added_nulls_are_removed_and_every_other_byte_stays(chunk: bytes, passed: bytes, size: int) -> None:
    data = b"data: %b\n\n" % chunk
    assert filtered(data * 2, list(range(size, 2 * len(data), size))) == b"data: %b\n\n" % passed * 2


@pytest.mark.parametrize("begin", ["", " \n"])
def test_a_body_with_half_a_surrogate_pair_is_changed_too(begin: str) -> None:
    body = begin + json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "\ud83d"}]})
    profile = profile_for("openai")
    more = profile.with_include_usage(profile.read_request("POST", CHAT, {}, body.encode()), body.encode())
    assert more is not None
    assert json.loads(more) == json.loads(body) | {"stream_options": {"include_usage": True}}
    assert more.endswith(body.partition("{")[2].encode())


def test_the_line_end_of_a_removed_chunk_is_removed_too() -> None:
    usage = streams.sse(streams.USAGE_CHUNK).replace(b"\n", b"\r\n")
    assert filtered(usage + b"data: [DONE]\r\n\r\n", [len(usage) - 1]) == b"data: [DONE]\r\n\r\n"


def test_an_event_is_passed_on_as_soon_as_it_has_ended() -> None:
    usage_filter = UsageFilter()
    event = streams.sse(streams.CHAT_PARTS[1])
    assert usage_filter.feed(event) == event


def test_a_line_of_a_hundred_megabytes_passes_in_bounded_memory() -> None:
    usage_filter = UsageFilter()
    piece = b"x" * 65_536
    for number in range(1600):
        out = usage_filter.feed(piece)
        assert len(usage_filter._held) <= 65_536
        assert number < 2 or out == piece
    assert usage_filter.feed(b'\n\ndata: {"choices": [], "usage": {}}\n\nrest') == b"\n\n"
    assert usage_filter.end() == b"rest"
