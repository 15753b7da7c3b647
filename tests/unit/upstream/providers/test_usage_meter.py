"""The usage meter, fed with responses in pieces of any size."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.unit.upstream.providers import streams
from tests.unit.upstream.providers.streams import INPUT

from forebay.upstream.providers import ErrorKind, Usage, UsageMeter, read_response


def metered(data: bytes, *, cuts: list[int] | None = None) -> UsageMeter:
    meter = UsageMeter(input_tokens=INPUT)
    for begin, end in pairwise([0, *sorted(cuts or []), len(data)]):
        meter.feed(data[begin:end])
    meter.end()
    return meter


def reading(meter: UsageMeter) -> tuple[Any, ...]:
    return meter.usage, meter.complete, meter.error_kind, meter.output_tokens


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "usage"),
    [
        ("chat with usage", Usage(input_tokens=19, output_tokens=10, cached_input_tokens=12, reasoning_tokens=3)),
        ("chat", Usage(input_tokens=INPUT, output_tokens=2, estimated=True)),
        ("chat tools", Usage(input_tokens=INPUT, output_tokens=4, estimated=True)),
        ("vllm", Usage(input_tokens=8, output_tokens=3)),
        ("completion", Usage(input_tokens=INPUT, output_tokens=2, estimated=True)),
        ("responses", Usage(input_tokens=37, output_tokens=11, cached_input_tokens=5)),
        ("messages", Usage(input_tokens=145, output_tokens=15, cached_input_tokens=100, cache_write_tokens=20)),
    ],
)
def test_the_usage_of_a_stream_is_read_or_else_estimated(stream: str, usage: Usage) -> None:
    meter = metered(streams.ALL[stream])
    assert meter.usage == usage
    assert meter.complete
    assert meter.error_kind is None


def test_an_error_in_the_middle_is_noticed_and_earlier_output_is_estimated() -> None:
    meter = metered(streams.MESSAGES_OVERLOADED)
    assert meter.error_kind is ErrorKind.OVERLOADED
    assert not meter.complete
    expected = Usage(
        input_tokens=145, output_tokens=3, cached_input_tokens=100, cache_write_tokens=20, estimated=True
    )  # fifteen characters
    assert meter.usage == expected
    failed = metered(streams.RESPONSES_FAILED)
    assert failed.error_kind is ErrorKind.FAULT
    meter = metered(streams.sse(streams.chunk({"content": "a"}), {"error": {"code": "slow_down", "message": "..."}}))
    assert meter.error_kind is ErrorKind.ACCELERATION_LIMIT


def test_a_stream_that_is_cut_off_is_incomplete_and_its_usage_is_estimated() -> None:
    cut = streams.CHAT_WITH_USAGE[: streams.CHAT_WITH_USAGE.index(b" there")]
    meter = metered(cut)
    assert not meter.complete
    assert meter.usage == Usage(input_tokens=INPUT, output_tokens=1, estimated=True)
    assert metered(b"").usage is None


def test_a_stream_of_several_choices_is_complete_when_all_have_finished() -> None:
    def part(index: int, reason: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": {"content": "x"}, "finish_reason": reason}]}

    one = streams.sse(part(0), part(1), part(0, "stop"))
    assert not metered(one).complete
    assert metered(one + streams.sse(part(1, "stop"))).complete
    assert not metered(streams.sse(part(0, "stop"), part(1))).complete


def test_a_later_total_without_the_cache_keeps_the_cached_tokens() -> None:
    late = {"type": "message_delta", "delta": {}, "usage": {"input_tokens": 25, "output_tokens": 9}}
    meter = metered(streams.sse(*streams.MESSAGES_PARTS, late, {"type": "message_stop"}))
    assert meter.usage == Usage(input_tokens=145, output_tokens=9, cached_input_tokens=100, cache_write_tokens=20)


def test_totals_never_decrease() -> None:
    events = [
        {"type": "message_delta", "delta": {}, "usage": usage} for usage in ({"output_tokens": 9}, {"input_tokens": 1})
    ]
    meter = metered(streams.sse(*streams.MESSAGES_PARTS, *events, {"type": "message_stop"}))
    assert meter.usage == Usage(input_tokens=145, output_tokens=9, cached_input_tokens=100, cache_write_tokens=20)


def test_a_long_piece_counts_as_several_tokens() -> None:
    assert metered(streams.sse(streams.chunk({"content": "x" * 400}), "[DONE]")).output_tokens == 100


def test_a_last_event_without_its_empty_line_counts() -> None:
    assert metered(streams.CHAT_WITH_USAGE.removesuffix(b"data: [DONE]\n\n").rstrip()).usage == Usage(
        input_tokens=19, output_tokens=10, cached_input_tokens=12, reasoning_tokens=3
    )


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("stream", streams.ALL)
def test_lines_may_end_as_the_standard_allows(stream: str, end: str) -> None:
    data = streams.ALL[stream]
    other = data.replace(b"\n", end.encode())
    assert reading(metered(other)) == reading(metered(data))


@given(
    stream=st.sampled_from(sorted(streams.ALL)), cuts=st.lists(st.integers(0, 1500), max_size=20), crlf=st.booleans()
)
def test_the_usage_of_a_stream_does_not_depend_on_its_pieces(stream: str, cuts: list[int], *, crlf: bool) -> None:
    data = streams.ALL[stream]
    data = data.replace(b"\n", b"\r\n") if crlf else data
    assert reading(metered(data, cuts=[min(cut, len(data)) for cut in cuts])) == reading(metered(data))


def test_a_line_end_split_between_pieces_is_one() -> None:
    two_lines = b'data: {"usage":\r\ndata: {"prompt_tokens": 3, "completion_tokens": 4}}\r\n\r\ndata: [DONE]\r\n\r\n'
    meter = metered(two_lines, cuts=list(range(len(two_lines))))
    assert meter.usage == Usage(input_tokens=3, output_tokens=4)


@pytest.mark.parametrize("stream", streams.ALL)
def test_a_stream_may_come_byte_by_byte(stream: str) -> None:
    data = streams.ALL[stream]
    assert reading(metered(data, cuts=list(range(len(data))))) == reading(metered(data))


@pytest.mark.parametrize(
    "noise",
    [
        b": a comment\n\n",
        b"event: x\nid: 7\nretry: 10\n\n",
        b"data: not json\n\n",
        b"data: [1, 2]\n\n",
        b'data: {"choices": 3, "usage": []}\n\n',
        b'data: {"choices": [7, {"delta": 4, "text": 5}], "type": 3}\n\n',
        b'data: {"type": "message_start", "message": 4}\n\n',
        b'data: {"type": "message_delta", "usage": {"output_tokens": -5}}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"data: " + b"x" * 3_000_000 + b"\n\n",
        b"\xff\xfe\x00\n\n",
    ],
)
def test_noise_between_events_changes_nothing(noise: bytes) -> None:
    assert reading(metered(noise + streams.CHAT_WITH_USAGE)) == reading(metered(streams.CHAT_WITH_USAGE))


# --- whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (
            {"usage": streams.CHAT_USAGE},
            Usage(input_tokens=19, output_tokens=10, cached_input_tokens=12, reasoning_tokens=3),
        ),
        ({"usage": streams.RESPONSES_USAGE}, Usage(input_tokens=37, output_tokens=11, cached_input_tokens=5)),
        (
            {"usage": streams.MESSAGE_USAGE},
            Usage(input_tokens=145, output_tokens=1, cached_input_tokens=100, cache_write_tokens=20),
        ),
        (
            {"usage": {"prompt_tokens": 10, "completion_tokens": 2, "prompt_cache_hit_tokens": 4}},
            Usage(input_tokens=10, output_tokens=2, cached_input_tokens=4),
        ),
        ({"usage": {"prompt_tokens": 8, "total_tokens": 8}}, Usage(input_tokens=8, output_tokens=0)),
        ({"usage": {"prompt_tokens": 8.0, "completion_tokens": 0.0}}, Usage(input_tokens=8, output_tokens=0)),
        ({"usage": {"prompt_tokens": 8, "completion_tokens": 10**8}}, Usage(input_tokens=8, output_tokens=10**8)),
        ({"usage": {"prompt_tokens": 8, "completion_tokens": 1e300}}, None),  # impossible: the reserved amount counts
        ({"usage": {"prompt_tokens": 8, "completion_tokens": 10**8 + 1}}, None),
        ({"usage": {"prompt_tokens": -8, "completion_tokens": 1}}, None),
        ({"usage": {"input_tokens": 8, "output_tokens": 1, "cache_read_input_tokens": 10**9}}, None),
        ({"usage": {"prompt_tokens": "8"}}, None),
        ({"usage": {"total_tokens": 8}}, None),
        ({"usage": None}, None),
        ({"usage": [1]}, None),
        ({"input_tokens": 2095}, None),  # the response of count_tokens
        ({}, None),
    ],
)
def test_the_usage_of_a_body_is_read(body: dict[str, Any], usage: Usage | None) -> None:
    assert read_response(json.dumps({"id": "x", "choices": []} | body).encode()).usage == usage


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"usage": {"prompt_tok', b"[" * 100_000, b"3", b"\xff"])
def test_an_unreadable_body_has_no_usage(body: bytes) -> None:
    assert read_response(body).usage is None


def test_the_usage_of_an_enormous_body_is_found_at_its_end() -> None:
    embedding = b'{"object":"list","data":[' + b"0.123456789," * 1_000_000 + b'0],"usage":{"prompt_tokens":812}}'
    assert read_response(embedding).usage == Usage(input_tokens=812, output_tokens=0)


# --- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("piece", "megabytes"),
    [(b"x" * 65_536, 100), (b"data: " + b"x" * 65_530, 100), (b"data: x\n" * 8192, 4), (b"\n\r" * 32_768, 2)],
    ids=["one line", "one line of data", "one event of many lines", "empty lines"],
)
def test_memory_is_bounded_for_any_input(piece: bytes, megabytes: int) -> None:
    meter = UsageMeter()
    largest = 0
    for _ in range((megabytes << 20) // len(piece)):
        meter.feed(piece)
        events = meter._events
        largest = max(largest, len(events._line) + sum(map(len, events._data)))
    meter.end()
    assert 0 < largest <= 1 << 21 or piece.isspace()
    assert meter.usage is None


def test_an_event_that_is_too_long_is_not_read() -> None:
    meter = UsageMeter()
    meter.feed(b"data: " + b"x" * (1 << 21))
    meter.feed(b'\ndata: {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n')
    meter.end()
    assert meter.usage is None


def test_after_an_event_that_was_too_long_the_next_is_read() -> None:
    meter = UsageMeter()
    for _ in range(40):
        meter.feed(b"x" * 65_536)
    meter.feed(b"\n\n" + streams.CHAT_WITH_USAGE)
    meter.end()
    assert meter.usage == Usage(input_tokens=19, output_tokens=10, cached_input_tokens=12, reasoning_tokens=3)


@given(
    chunks=st.lists(
        st.binary(max_size=60) | st.sampled_from([b"data: {", b"\n\n", b"}\r\n", b'"usage":{}']), max_size=20
    )
)
def test_no_bytes_raise(chunks: list[bytes]) -> None:
    meter = UsageMeter()
    for part in chunks:
        meter.feed(part)
    meter.end()
    assert meter.usage is None or meter.usage.output_tokens >= 0
    whole = read_response(b"".join(chunks))
    assert whole.usage is None or whole.usage.output_tokens >= 0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("word " * 32, 40),
        ("水" * 40, 40),
        ("🜁" * 13, 39),
        ("naïve", 2),
        ("я" * 10 + "a" * 40, 20),
        ("\ud800" * 4, 4),
    ],
)
def test_no_text_of_a_stream_that_is_left_counts_as_less_than_it_costs(text: str, tokens: int) -> None:
    meter = UsageMeter(input_tokens=INPUT)
    event = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    meter.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert meter.unfinished_usage(0).output_tokens == tokens
    bound = tokens // 2
    assert meter.unfinished_usage(5, bound=bound).output_tokens == min(bound, meter.output_tokens + 5)


@pytest.mark.parametrize(
    ("reported", "output"),
    [
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 10_041}, 10_009),  # xAI: without its reasoning
        ({"prompt_tokens": 32, "total_tokens": 10_041}, 10_009),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 41}, 9),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 0}, 9),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 1e12}, 9),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": "many"}, 9),
    ],
)
def test_tokens_that_are_only_in_the_total_are_output(reported: dict[str, Any], output: int) -> None:
    usage = read_response(json.dumps({"usage": reported}).encode()).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (32, output)
