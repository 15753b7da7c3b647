"""The simulated provider, which knows nothing of these rules, is understood by them."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.sim import dialect, wire
from forebay.sim.config import Dialect, Unit
from forebay.sim.faults import Reason
from forebay.sim.quota import Reading, Shortage
from forebay.typing import Charge, Notice
from forebay.upstream.rules import (
    Meaning,
    Meter,
    Usage,
    UsageFilter,
    meaning_in_stream,
    meaning_of,
    notices,
    retry_after,
    rules_for,
)

WALL = 1_775_000_000.0
TOKENS = st.integers(1, 3000)


def voice(spoken: Dialect, *, include_usage: bool = True) -> wire.OpenAI | wire.Anthropic:
    if spoken is Dialect.OPENAI:
        return wire.OpenAI(1, "gpt-4o", 0, include_usage=include_usage)
    return wire.Anthropic(1, "claude-sonnet-5")


def stream(speaker: wire.OpenAI | wire.Anthropic, sent: int, made: int) -> bytes:
    pieces = [speaker.piece(first, min(8, made - first)) for first in range(0, made, 8)]
    return b"".join([speaker.begin(sent), *pieces, speaker.end((sent, made), speaker.reason(stopped=True))])


def metered(data: bytes, *, is_stream: bool = True) -> Meter:
    meter = Meter(stream=is_stream, input_tokens=7)
    meter.feed(data)
    meter.end()
    return meter


@given(spoken=st.sampled_from(Dialect), sent=TOKENS, made=TOKENS)
def test_its_usage_is_read_from_bodies_and_streams(spoken: Dialect, sent: int, made: int) -> None:
    usage = Usage(input_tokens=sent, output_tokens=made)
    whole = voice(spoken).whole((sent, made), "stop")
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
    error = dialect.error_body(spoken, "req_1")
    meter = metered(speaker.begin(40) + speaker.piece(0, 8) + speaker.error(error))
    expected = Meaning.OVERLOADED if spoken is Dialect.ANTHROPIC else Meaning.FAULT
    assert meter.error is expected is meaning_in_stream(error["error"])
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
    headers = dialect.limit_headers(spoken, [Reading(unit, limit, remaining, full_in) for unit in units], WALL)
    told = {notice.unit: notice for notice in notices(headers, wall=WALL)}
    assert set(told) == {unit.value for unit in units}
    for notice in told.values():
        assert (notice.limit, notice.remaining) == (limit, remaining)
        assert notice.reset is not None
        assert full_in - 1e-3 <= notice.reset <= full_in + (0.01 if spoken is Dialect.OPENAI else 1.01)


def test_the_tokens_of_both_kinds_together_are_read_too() -> None:
    headers = dialect.limit_headers(Dialect.OPENAI, [Reading(Unit.TOKENS, 30_000, 20_000, 20.0)], WALL)
    assert notices(headers, wall=WALL) == (Notice(unit="tokens", limit=30_000, remaining=20_000, reset=20.0),)


MEANINGS = {
    Reason.REQUESTS: Meaning.RATE,
    Reason.TOKENS: Meaning.RATE,
    Reason.INPUT_TOKENS: Meaning.RATE,
    Reason.OUTPUT_TOKENS: Meaning.RATE,
    Reason.TOO_LARGE: Meaning.CLIENT_ERROR,
    Reason.ACCELERATION: Meaning.ACCELERATION,
    Reason.SPEND_CAP: Meaning.SPEND_CAP,
    Reason.CONCURRENCY: Meaning.CONCURRENCY,
    Reason.OVERLOADED: Meaning.OVERLOADED,
    Reason.STRAY: Meaning.CONCURRENCY,  # it gives no reason; the limiter tells noise from congestion
    Reason.ERROR: Meaning.FAULT,
    Reason.BAD_GATEWAY: Meaning.FAULT,
    Reason.UNAVAILABLE: Meaning.OVERLOADED,
    Reason.UNKNOWN_MODEL: Meaning.CLIENT_ERROR,
}
SHORT = {
    Reason.REQUESTS: Unit.REQUESTS,
    Reason.TOKENS: Unit.TOKENS,
    Reason.INPUT_TOKENS: Unit.INPUT_TOKENS,
    Reason.OUTPUT_TOKENS: Unit.OUTPUT_TOKENS,
    Reason.TOO_LARGE: Unit.TOKENS,
    Reason.ACCELERATION: Unit.INPUT_TOKENS,
}


def refusal(spoken: Dialect, reason: Reason, wait: float = 4.2) -> dialect.Reply:
    unit = SHORT.get(reason)
    short = None if unit is None else Shortage(unit, 30_000.0, 63.4, 385.0, wait)
    why = dialect.Why(reason, "gpt-4o", short, next_allowed=40_000.0)
    return dialect.refusal(spoken, why, {}, "req_1")


@pytest.mark.parametrize("spoken", Dialect)
@pytest.mark.parametrize("reason", Reason)
def test_each_of_its_refusals_is_understood(spoken: Dialect, reason: Reason) -> None:
    expected = MEANINGS[reason]
    if spoken is Dialect.ANTHROPIC and reason is Reason.TOO_LARGE:
        expected = Meaning.RATE  # worded as any other rate; the account's own bucket knows that it never fits
    reply = refusal(spoken, reason)
    assert meaning_of(reply.status, reply.headers, reply.body) is expected


@pytest.mark.parametrize(("spoken", "seconds"), [(Dialect.OPENAI, 4.2), (Dialect.ANTHROPIC, 5.0)])
def test_when_it_says_to_come_back_is_read(spoken: Dialect, seconds: float) -> None:
    reply = refusal(spoken, Reason.TOKENS if spoken is Dialect.OPENAI else Reason.INPUT_TOKENS)
    assert retry_after(reply.headers, reply.body, wall=WALL) == pytest.approx(seconds)
    stray = refusal(spoken, Reason.STRAY)
    assert retry_after(stray.headers, stray.body, wall=WALL) is None


@pytest.mark.parametrize(("provider", "path"), [("openai", "/v1/chat/completions"), ("anthropic", "/v1/messages")])
def test_its_own_estimate_of_a_request_and_ours_are_near(provider: str, path: str) -> None:
    body = json.dumps(
        {
            "model": "m",
            "max_tokens": 50,
            "messages": [{"role": "user", "content": wire.text(0, 400)}, {"role": "assistant", "content": "yes"}],
        }
    ).encode()
    theirs = wire.read(body)
    rules = rules_for(provider)
    ours = rules.read("POST", path, {}, body)
    assert theirs.input_tokens() <= ours.input_tokens <= 1.25 * theirs.input_tokens()
    assert ours.max_output_tokens == theirs.most
    assert rules.reserve(ours) == Charge(
        input_tokens=ours.input_tokens,
        output_tokens=50,
        tokens=ours.input_tokens + (50 if provider == "anthropic" else 0),
    )
