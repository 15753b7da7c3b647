"""Rate limit headers and error responses of each provider."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect, Unit
from forebay.simulation.provider.rate_meters import MeterReading, RateShortage
from forebay.simulation.provider.wire_errors import (
    RefusalDetails,
    format_duration,
    format_timestamp,
    rate_limit_headers,
    refusal_response,
)

SHORTAGE = RateShortage(Unit.TOKENS, limit=30000, remaining=63.4, requested=385, wait=0.6436)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.0004, "1ms"),
        (0.02, "20ms"),
        (1.0, "1s"),
        (1.2, "1.2s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (360.0, "6m0s"),
        (3723.5, "1h2m3.5s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, 1e5))
def test_durations_are_rounded_up(seconds: float) -> None:
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    text, total = format_duration(seconds), 0.0
    if text.endswith("ms"):
        total = float(text.removesuffix("ms")) / 1000
    else:
        number = ""
        for character in text:
            if character in units:
                total += float(number) * units[character]
                number = ""
            else:
                number += character
    assert seconds - 1e-6 <= total <= seconds + 0.0011


@given(st.floats(1e9, 2e9))
def test_timestamps_are_rounded_up(epoch: float) -> None:
    written = dt.datetime.fromisoformat(format_timestamp(epoch)).timestamp()
    assert epoch - 1e-5 <= written <= epoch + 1


def test_openai_headers_state_resets_as_durations() -> None:
    readings = [MeterReading(Unit.REQUESTS, 500, 499.2, 0.12), MeterReading(Unit.TOKENS, 30000, 0.0, 60.0)]
    assert rate_limit_headers(Dialect.OPENAI, readings, 0.0) == {
        "x-ratelimit-limit-requests": "500",
        "x-ratelimit-remaining-requests": "499",
        "x-ratelimit-reset-requests": "120ms",
        "x-ratelimit-limit-tokens": "30000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m0s",
    }


def test_anthropic_headers_state_resets_as_times_and_sum_both_kinds_of_tokens() -> None:
    readings = [
        MeterReading(Unit.INPUT_TOKENS, 80000, 78000.0, 1.5),
        MeterReading(Unit.OUTPUT_TOKENS, 16000, 12000.0, 15.0),
    ]
    assert rate_limit_headers(Dialect.ANTHROPIC, readings, 1_740_435_930.0) == {
        "anthropic-ratelimit-input-tokens-limit": "80000",
        "anthropic-ratelimit-input-tokens-remaining": "78000",
        "anthropic-ratelimit-input-tokens-reset": "2025-02-24T22:25:32Z",
        "anthropic-ratelimit-output-tokens-limit": "16000",
        "anthropic-ratelimit-output-tokens-remaining": "12000",
        "anthropic-ratelimit-output-tokens-reset": "2025-02-24T22:25:45Z",
        "anthropic-ratelimit-tokens-limit": "96000",
        "anthropic-ratelimit-tokens-remaining": "90000",
        "anthropic-ratelimit-tokens-reset": "2025-02-24T22:25:32Z",
    }


def test_openai_errors_tell_requests_from_tokens_by_message_and_type() -> None:
    answer = refusal_response(Dialect.OPENAI, RefusalDetails(RefusalReason.TOKENS, "gpt-4o", SHORTAGE), {}, "req_1")
    assert json.loads(answer.body)["error"] == {
        "message": "Rate limit reached for gpt-4o in organization org-simulated on tokens per min (TPM): "
        "Limit 30000, Used 29937, Requested 385. Please try again in 644ms.",
        "type": "tokens",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert (answer.status, answer.headers["retry-after"], answer.headers["retry-after-ms"]) == (429, "1", "644")


def test_an_error_names_the_period_of_its_limit() -> None:
    daily = RateShortage(Unit.REQUESTS, limit=200, remaining=0, requested=1, wait=432.0, period=86400.0)
    body = json.loads(
        refusal_response(Dialect.OPENAI, RefusalDetails(RefusalReason.REQUESTS, "gpt-4o", daily), {}, "req_1").body
    )
    assert "on requests per day (RPD): Limit 200, Used 200, Requested 1. Please try again in 7m12s" in str(body)
    body = json.loads(
        refusal_response(Dialect.ANTHROPIC, RefusalDetails(RefusalReason.REQUESTS, "claude", daily), {}, "req_1").body
    )
    assert "of 200 requests per day" in str(body)


def test_anthropic_errors_have_the_request_id() -> None:
    answer = refusal_response(
        Dialect.ANTHROPIC, RefusalDetails(RefusalReason.TOKENS, "claude", SHORTAGE), {"a": "b"}, "req_1"
    )
    body = json.loads(answer.body)
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", "rate_limit_error", "req_1")
    assert answer.headers == {
        "content-type": "application/json",
        "request-id": "req_1",
        "a": "b",
        "retry-after": "1",
    }


@pytest.mark.parametrize(
    ("reason", "openai", "anthropic"),
    [
        (RefusalReason.CONCURRENCY, (429, "rate_limit_exceeded"), (429, "rate_limit_error")),
        (RefusalReason.STRAY, (429, "rate_limit_exceeded"), (429, "rate_limit_error")),
        (RefusalReason.OVERLOADED, (503, None), (529, "overloaded_error")),
        (RefusalReason.SPEND_CAP, (429, "insufficient_quota"), (402, "billing_error")),
        (RefusalReason.ACCELERATION, (503, "slow_down"), (429, "rate_limit_error")),
        (RefusalReason.ERROR, (500, None), (500, "api_error")),
        (RefusalReason.UNKNOWN_MODEL, (404, "model_not_found"), (404, "not_found_error")),
    ],
)
def test_each_refusal_reason_has_its_status_and_error_type(
    reason: RefusalReason, openai: tuple[int, str | None], anthropic: tuple[int, str]
) -> None:
    limits = {"limits": "yes"}
    answer = refusal_response(Dialect.OPENAI, RefusalDetails(reason, "gpt-4o"), limits, "req_1")
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == openai
    answer = refusal_response(Dialect.ANTHROPIC, RefusalDetails(reason, "claude"), limits, "req_1")
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == anthropic
    assert ("limits" in answer.headers) == (reason is RefusalReason.ACCELERATION)


def test_errors_of_proxies_are_not_json() -> None:
    for dialect in Dialect:
        gateway = refusal_response(dialect, RefusalDetails(RefusalReason.BAD_GATEWAY, "m"), {}, "req_1")
        assert (gateway.status, gateway.headers["content-type"]) == (502, "text/html")
        unavailable = refusal_response(dialect, RefusalDetails(RefusalReason.UNAVAILABLE, "m"), {}, "req_1")
        assert (unavailable.status, unavailable.headers, unavailable.body) == (503, {}, b"")
