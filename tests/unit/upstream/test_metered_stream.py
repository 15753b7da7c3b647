"""A metered stream: which outcome an answer has, and which bytes its reader gets, whatever its encoding is."""

from __future__ import annotations

import gzip
from typing import Any

import pytest
from tests.unit.upstream.providers import streams

from forebay.interfaces import Outcome
from forebay.upstream.metered_stream import MeteredStream, StreamEnd
from forebay.upstream.providers import BodyMeter, Usage, UsageFilter, UsageMeter

CUT = streams.CHAT_WITH_USAGE.partition(b'"finish_reason": "stop"')[0]


class Recorder:
    """A stream, and how it was settled."""

    def __init__(self, encoding: str = "", *, body: bool = False, filtered: bool = False) -> None:
        self.settled: list[StreamEnd] = []
        self.meter: UsageMeter | BodyMeter = BodyMeter() if body else UsageMeter(input_tokens=5)
        usage_filter = UsageFilter() if filtered else None
        self.stream = MeteredStream(
            self.settled.append,
            lambda _: Outcome.FAULT,
            self.meter,
            usage_filter,
            detects_truncation=True,
            encoding=encoding,
        )

    def pass_all(self, data: bytes, size: int = 11) -> bytes:
        pieces = [self.stream.feed(data[begin : begin + size]) for begin in range(0, len(data), size)]
        return b"".join(pieces) + self.stream.end()

    @property
    def end(self) -> StreamEnd:
        [end] = self.settled
        return end

    @property
    def usage(self) -> Usage | None:
        return self.meter.usage


def members(data: bytes) -> bytes:
    return b"".join(gzip.compress(line) for line in data.splitlines(keepends=True))


@pytest.mark.parametrize("pack", [gzip.compress, members])
def test_a_compressed_stream_is_metered_and_passes_as_it_came(pack: Any) -> None:
    recorder, packed = Recorder("gzip"), pack(streams.CHAT_WITH_USAGE)
    assert recorder.pass_all(packed) == packed
    assert recorder.end.kind is Outcome.SUCCESS
    assert recorder.usage == Usage(input_tokens=19, output_tokens=10, cached_input_tokens=12, reasoning_tokens=3)


@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_a_stream_that_was_cut_off_is_a_fault(encoding: str) -> None:
    recorder = Recorder(encoding)
    recorder.pass_all(gzip.compress(CUT) if encoding else CUT)
    assert recorder.end.kind is Outcome.FAULT


@pytest.mark.parametrize(
    ("encoding", "data"),
    [("br", b"\x0b\x02\x80"), ("gzip", b"no gzip"), ("gzip", gzip.compress(b"x" * (16 << 20))), ("", b"data: <p>\n\n")],
    ids=["unknown encoding", "corrupt", "a bomb", "events of another form"],
)
def test_what_cannot_be_read_is_no_fault_and_counts_as_reserved(encoding: str, data: bytes) -> None:
    recorder = Recorder(encoding)
    assert recorder.pass_all(data, size=1 << 16) == data
    assert recorder.end.kind is Outcome.SUCCESS
    assert not recorder.end.readable
    assert recorder.usage is None


def test_an_empty_stream_is_a_fault() -> None:
    recorder = Recorder()
    recorder.pass_all(b"")
    assert recorder.end.kind is Outcome.FAULT


@pytest.mark.parametrize("pack", [gzip.compress, members])
def test_added_usage_is_removed_from_a_compressed_stream_which_is_decompressed_for_that(pack: Any) -> None:
    plain, compressed = Recorder(filtered=True), Recorder("gzip", filtered=True)
    assert compressed.stream.decoded
    assert compressed.pass_all(pack(streams.CHAT_WITH_USAGE)) == plain.pass_all(streams.CHAT_WITH_USAGE)
    assert compressed.usage == plain.usage
    assert not compressed.stream.corrupt


def test_a_stream_to_filter_of_an_unknown_encoding_passes_as_it_came() -> None:
    recorder = Recorder("br", filtered=True)
    assert not recorder.stream.decoded
    assert recorder.pass_all(b"\x0b\x02\x80") == b"\x0b\x02\x80"
    assert not recorder.stream.corrupt


def test_a_stream_to_filter_that_is_corrupt_is_noticed() -> None:
    recorder = Recorder("gzip", filtered=True)
    assert recorder.stream.feed(b"no gzip") == b""
    assert recorder.stream.corrupt


@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_a_large_body_is_metered_at_its_end(encoding: str) -> None:
    body = b'{"data": [' + b"0.25, " * 100_000 + b'1], "usage": {"prompt_tokens": 812, "completion_tokens": 0}}'
    recorder, packed = Recorder(encoding, body=True), gzip.compress(body) if encoding else body
    assert recorder.pass_all(packed, size=1000) == packed
    assert recorder.end.kind is Outcome.SUCCESS
    assert recorder.usage == Usage(input_tokens=812, output_tokens=0)


def test_a_body_that_its_reader_leaves_is_no_evidence() -> None:
    recorder = Recorder(body=True)
    recorder.stream.feed(b'{"data": [')
    recorder.stream.abandon()
    assert recorder.end.kind is Outcome.IGNORED
