"""The simulated provider, which knows nothing of these rules, is understood by them."""

from __future__ import annotations

import json

import hypothesis.strategies as st
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
    read_retry_after,
)

WALL = 1_775_000_000.0
TOKENS = st.integers(1, 3000)


def voice(spoken: Dialect, *, include_usage: bool = True) -> wire.OpenAIWriter | wire.AnthropicWriter:
    if spoken is Dialect.OPENAI:
        return wire.OpenAIWriter(1, "gpt-4o", 0, include_usage=include_usage)
    return wire.AnthropicWriter(1, "claude-sonnet-5")


def stream(speaker: wire.OpenAIWriter | wire.AnthropicWriter, sent: int, made: int) -> bytes:
    pieces = [speaker.stream_tokens(first, min(8, made - first)) for first in range(0, made, 8)]
    return b"".join(
        [speaker.stream_start(sent), *pieces, speaker.stream_end((sent, made), speaker.finish_reason(stopped=True))]
    )


def metered(data: bytes, *, is_stream: bool = True) -> UsageMeter:
    meter = UsageMeter(stream=is_stream, input_tokens=7)
    meter.feed(data)
    meter.end()
    return meter


@given(spoken=st.sampled_from(Dialect), sent=TOKENS, made=TOKENS)
def test_its_usage_is_read_from_bodies_and_streams(spoken: Dialect, sent: int, made: int) -> None:
    usage = Usage(input_tokens=sent, output_tokens=made)
    whole = voice(spoken).response((sent, made), "stop")
    assert metered(whole, is_stream=False).usage == usage
    assert metered(stream(voice(spoken), sent, made)).usage == usage


@given(sent=TOKENS, made=TOKENS)
def test_without_usage_its_output_is_estimated_within_a_factor_of_two(sent: int, made: int) -> None:
    usage = metered(stream(voice(Dialect.OPENAI, include_usage=False), sent, made)).usage
    assert usage is not None
    assert usage.estimated
    assert usage.input_tokens == 7
    assert made / 2 <= usage.output_tokens <= 2 * made


def test_its_usage_is_kept_from_who_did_not_ask() -> None:
    asked, plain = (stream(voice(Dialect.OPENAI, include_usage=told), 40, 100) for told in (True, False))
    passed = UsageFilter().feed(asked)
    assert b"total_tokens" in asked
    assert b"total_tokens" not in passed
    assert passed.replace(b',"usage":null', b"") == plain


@pytest.mark.parametrize("spoken", Dialect)
def test_a_breakdown_in_the_middle_is_noticed(spoken: Dialect) -> None:
    speaker = voice(spoken)
    error = dialect.stream_error_body(spoken, "req_1")
    meter = metered(speaker.stream_start(40) + speaker.stream_tokens(0, 8) + speaker.stream_error(error))
    expected = ErrorKind.OVERLOADED if spoken is Dialect.ANTHROPIC else ErrorKind.FAULT
    assert meter.error_kind is expected is classify_stream_error(error["error"])
    assert not meter.complete


@given(
    spoken=st.sampled_from(Dialect),
    units=st.lists(st.sampled_from([Unit.REQUESTS, Unit.INPUT_TOKENS, Unit.OUTPUT_TOKENS]), min_size=1, unique=True),
    limit=st.integers(1, 10**7),
    share=st.floats(0, 1),
    full_in=st.floats(0, 86_000),
)
def test_its_headers_are_read_as_they_were_meant(
    spoken: Dialect, units: list[Unit], limit: int, share: float, full_in: float
) -> None:
    remaining = int(limit * share)
    headers = dialect.rate_limit_headers(
        spoken, [MeterReading(unit, limit, remaining, full_in) for unit in units], WALL
    )
    told = {notice.unit: notice for notice in read_rate_limits(headers, wall=WALL)}
    assert set(told) == {unit.value for unit in units}
    for notice in told.values():
        assert (notice.limit, notice.remaining) == (limit, remaining)
        assert notice.reset is not None
        assert full_in - 1e-3 <= notice.reset <= full_in + (0.01 if spoken is Dialect.OPENAI else 1.01)


def test_the_tokens_of_both_kinds_together_are_read_too() -> None:
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


def refusal(spoken: Dialect, reason: RefusalReason, wait: float = 4.2) -> dialect.HttpReply:
    unit = SHORT.get(reason)
    short = None if unit is None else RateShortage(unit, 30_000.0, 63.4, 385.0, wait)
    why = dialect.RefusalDetails(reason, "gpt-4o", short, next_minute_limit=40_000.0)
    return dialect.refusal_response(spoken, why, {}, "req_1")


@pytest.mark.parametrize("spoken", Dialect)
@pytest.mark.parametrize("reason", RefusalReason)
def test_each_of_its_refusals_is_understood(spoken: Dialect, reason: RefusalReason) -> None:
    expected = MEANINGS[reason]
    if spoken is Dialect.ANTHROPIC and reason is RefusalReason.TOO_LARGE:
        expected = ErrorKind.RATE_LIMIT  # worded as any other rate; the account's own bucket knows that it never fits
    reply = refusal(spoken, reason)
    assert classify(reply.status, reply.headers, reply.body) is expected


@pytest.mark.parametrize(("spoken", "seconds"), [(Dialect.OPENAI, 4.2), (Dialect.ANTHROPIC, 5.0)])
def test_when_it_says_to_come_back_is_read(spoken: Dialect, seconds: float) -> None:
    reply = refusal(spoken, RefusalReason.TOKENS if spoken is Dialect.OPENAI else RefusalReason.INPUT_TOKENS)
    assert read_retry_after(reply.headers, reply.body, wall=WALL) == pytest.approx(seconds)
    stray = refusal(spoken, RefusalReason.STRAY)
    assert read_retry_after(stray.headers, stray.body, wall=WALL) is None


@pytest.mark.parametrize(("provider", "path"), [("openai", "/v1/chat/completions"), ("anthropic", "/v1/messages")])
def test_its_own_estimate_of_a_request_and_ours_are_near(provider: str, path: str) -> None:
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
    rules = profile_for(provider)
    ours = rules.read_request("POST", path, {}, body)
    assert theirs.input_tokens() <= ours.input_tokens <= 1.25 * theirs.input_tokens()
    assert ours.max_output_tokens == theirs.max_output_tokens
    assert rules.estimate_charge(ours) == Charge(
        input_tokens=ours.input_tokens,
        output_tokens=50,
        tokens=ours.input_tokens + (50 if provider == "anthropic" else 0),
    )
