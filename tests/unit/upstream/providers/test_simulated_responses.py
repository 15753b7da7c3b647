"""The simulated provider, which does not share this code, is understood by it."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from forebay.interfaces import Charge, RateLimitHeaders
from forebay.simulation.provider import wire_errors as dialect
from forebay.simulation.provider import wire_messages as wire
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect, Unit
from forebay.simulation.provider.rate_meters import MeterReading, RateShortage
from forebay.upstream.providers import (
    ErrorKind,
    Usage,
    UsageFilter,
    UsageMeter,
    classify,
    classify_stream_error,
    profile_for,
    read_rate_limits,
    read_response,
    read_retry_after,
)

WALL = 1_775_000_000.0
TOKENS = st.integers(1, 3000)


def writer_for(protocol: Dialect, *, include_usage: bool = True) -> wire.OpenAIWriter | wire.AnthropicWriter:
    if protocol is Dialect.OPENAI:
        return wire.OpenAIWriter(1, "gpt-4o", 0, include_usage=include_usage)
    return wire.AnthropicWriter(1, "claude-sonnet-5")


def stream(writer: wire.OpenAIWriter | wire.AnthropicWriter, input_tokens: int, output_tokens: int) -> bytes:
    pieces = [writer.stream_tokens(first, min(8, output_tokens - first)) for first in range(0, output_tokens, 8)]
    return b"".join(
        [
            writer.stream_start(input_tokens),
            *pieces,
            writer.stream_end((input_tokens, output_tokens), stopped=True),
        ]
    )


def metered(data: bytes) -> UsageMeter:
    meter = UsageMeter(input_tokens=7)
    meter.feed(data)
    meter.end()
    return meter


@given(protocol=st.sampled_from(Dialect), input_tokens=TOKENS, output_tokens=TOKENS)
def test_its_usage_is_read_from_bodies_and_streams(protocol: Dialect, input_tokens: int, output_tokens: int) -> None:
    usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    tier = "default" if protocol is Dialect.OPENAI else ""
    whole = writer_for(protocol).response((input_tokens, output_tokens), stopped=True)
    assert read_response(whole).usage == msgspec.structs.replace(usage, tier=tier)
    assert metered(stream(writer_for(protocol), input_tokens, output_tokens)).usage == usage


@given(input_tokens=TOKENS, output_tokens=TOKENS)
def test_without_usage_its_output_is_estimated_within_a_factor_of_two(input_tokens: int, output_tokens: int) -> None:
    usage = metered(stream(writer_for(Dialect.OPENAI, include_usage=False), input_tokens, output_tokens)).usage
    assert usage is not None
    assert usage.estimated
    assert usage.input_tokens == 7
    assert output_tokens / 2 <= usage.output_tokens <= 2 * output_tokens


def test_its_usage_is_filtered_out_for_a_caller_who_did_not_ask() -> None:
    asked, plain = (stream(writer_for(Dialect.OPENAI, include_usage=asks), 40, 100) for asks in (True, False))
    passed = UsageFilter().feed(asked)
    assert b"total_tokens" in asked
    assert b"total_tokens" not in passed
    assert passed.replace(b',"usage":null', b"") == plain


@pytest.mark.parametrize("protocol", Dialect)
def test_an_error_in_the_middle_of_a_stream_is_noticed(protocol: Dialect) -> None:
    writer = writer_for(protocol)
    error = dialect.stream_error_body(protocol, "req_1")
    meter = metered(writer.stream_start(40) + writer.stream_tokens(0, 8) + writer.stream_error(error))
    expected = ErrorKind.OVERLOADED if protocol is Dialect.ANTHROPIC else ErrorKind.FAULT
    assert meter.error_kind is expected is classify_stream_error(error["error"])
    assert not meter.complete


@given(
    protocol=st.sampled_from(Dialect),
    units=st.lists(st.sampled_from([Unit.REQUESTS, Unit.INPUT_TOKENS, Unit.OUTPUT_TOKENS]), min_size=1, unique=True),
    limit=st.integers(1, 10**7),
    share=st.floats(0, 1),
    full_in=st.floats(0, 86_000),
)
def test_its_rate_limit_headers_are_read(
    protocol: Dialect, units: list[Unit], limit: int, share: float, full_in: float
) -> None:
    remaining = int(limit * share)
    headers = dialect.rate_limit_headers(
        protocol, [MeterReading(unit, limit, remaining, full_in) for unit in units], WALL
    )
    found = {rate_limit.unit: rate_limit for rate_limit in read_rate_limits(headers, wall=WALL)}
    assert set(found) == {unit.value for unit in units}
    for rate_limit in found.values():
        assert (rate_limit.limit, rate_limit.remaining) == (limit, remaining)
        assert rate_limit.reset is not None
        assert full_in - 1e-3 <= rate_limit.reset <= full_in + (0.01 if protocol is Dialect.OPENAI else 1.01)


def test_its_limit_of_input_and_output_tokens_together_is_read() -> None:
    headers = dialect.rate_limit_headers(Dialect.OPENAI, [MeterReading(Unit.TOKENS, 30_000, 20_000, 20.0)], WALL)
    assert read_rate_limits(headers, wall=WALL) == (
        RateLimitHeaders(unit="tokens", limit=30_000, remaining=20_000, reset=20.0),
    )


MEANINGS = {
    RefusalReason.REQUESTS: ErrorKind.RATE_LIMIT,
    RefusalReason.TOKENS: ErrorKind.RATE_LIMIT,
    RefusalReason.INPUT_TOKENS: ErrorKind.RATE_LIMIT,
    RefusalReason.OUTPUT_TOKENS: ErrorKind.RATE_LIMIT,
    RefusalReason.TOO_LARGE: ErrorKind.CLIENT_ERROR,
    RefusalReason.ACCELERATION: ErrorKind.ACCELERATION_LIMIT,
    RefusalReason.SPEND_CAP: ErrorKind.SPEND_CAP,
    RefusalReason.CONCURRENCY: ErrorKind.CONCURRENCY_LIMIT,
    RefusalReason.OVERLOADED: ErrorKind.OVERLOADED,
    RefusalReason.STRAY: ErrorKind.CONCURRENCY_LIMIT,  # it gives no reason; the limiter tells noise from congestion
    RefusalReason.ERROR: ErrorKind.FAULT,
    RefusalReason.BAD_GATEWAY: ErrorKind.FAULT,
    RefusalReason.UNAVAILABLE: ErrorKind.OVERLOADED,
    RefusalReason.UNKNOWN_MODEL: ErrorKind.CLIENT_ERROR,
}
SHORT = {
    RefusalReason.REQUESTS: Unit.REQUESTS,
    RefusalReason.TOKENS: Unit.TOKENS,
    RefusalReason.INPUT_TOKENS: Unit.INPUT_TOKENS,
    RefusalReason.OUTPUT_TOKENS: Unit.OUTPUT_TOKENS,
    RefusalReason.TOO_LARGE: Unit.TOKENS,
    RefusalReason.ACCELERATION: Unit.INPUT_TOKENS,
}


def refusal(protocol: Dialect, reason: RefusalReason, wait: float = 4.2) -> dialect.HttpReply:
    unit = SHORT.get(reason)
    short = None if unit is None else RateShortage(unit, 30_000.0, 63.4, 385.0, wait)
    why = dialect.RefusalDetails(reason, "gpt-4o", short, next_minute_limit=40_000.0)
    return dialect.refusal_response(protocol, why, {}, "req_1")


@pytest.mark.parametrize("protocol", Dialect)
@pytest.mark.parametrize("reason", RefusalReason)
def test_each_of_its_refusals_is_classified(protocol: Dialect, reason: RefusalReason) -> None:
    expected = MEANINGS[reason]
    if protocol is Dialect.ANTHROPIC and reason is RefusalReason.TOO_LARGE:
        expected = ErrorKind.RATE_LIMIT  # worded as any other rate; the account's own bucket knows that it never fits
    reply = refusal(protocol, reason)
    assert classify(reply.status, reply.headers, reply.body) is expected


@pytest.mark.parametrize(("protocol", "seconds"), [(Dialect.OPENAI, 4.2), (Dialect.ANTHROPIC, 5.0)])
def test_its_retry_after_is_read(protocol: Dialect, seconds: float) -> None:
    reply = refusal(protocol, RefusalReason.TOKENS if protocol is Dialect.OPENAI else RefusalReason.INPUT_TOKENS)
    assert read_retry_after(reply.headers, reply.body, wall=WALL) == pytest.approx(seconds)
    stray = refusal(protocol, RefusalReason.STRAY)
    assert read_retry_after(stray.headers, stray.body, wall=WALL) is None


@pytest.mark.parametrize(("provider", "path"), [("openai", "/v1/chat/completions"), ("anthropic", "/v1/messages")])
def test_its_estimate_of_a_request_is_close_to_ours(provider: str, path: str) -> None:
    body = json.dumps(
        {
            "model": "m",
            "max_tokens": 50,
            "messages": [
                {"role": "user", "content": wire.answer_text(0, 400)},
                {"role": "assistant", "content": "yes"},
            ],
        }
    ).encode()
    theirs = wire.read_request(body)
    profile = profile_for(provider)
    request = profile.read_request("POST", path, {}, body)
    assert theirs.input_tokens() <= request.input_tokens <= 1.25 * theirs.input_tokens()
    assert request.max_output_tokens == theirs.max_output_tokens
    assert profile.estimate_charge(request) == Charge(
        input_tokens=request.input_tokens,
        output_tokens=50,
        tokens=request.input_tokens + (50 if provider == "anthropic" else 0),
    )
