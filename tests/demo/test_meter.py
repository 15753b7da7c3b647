"""The counters of a side."""

from __future__ import annotations

import msgspec
import pytest

from demo.meter import Meter
from demo.provider import Provider
from demo.sample import Sample
from forebay.task import Priority

STATE = {"input_tokens": 1_000_000, "output_tokens": 100_000}


@pytest.fixture
def lines() -> list[bytes]:
    return []


@pytest.fixture
def meter(lines: list[bytes]) -> Meter:
    return Meter(Provider(url="", model="gpt-4o-2024"), lines.append)


def test_every_http_attempt_is_counted_and_what_it_was_answered(meter: Meter) -> None:
    for status in (200, 429, 429, 503, None):
        meter.sent()
        if status is not None:
            meter.received(status)
    now = meter.sample()
    assert (now.calls, now.calls_429, now.calls_5xx) == (5, 2, 1)


def test_answers_are_paid_for_and_only_those_of_done_tasks_are_useful(meter: Meter) -> None:
    meter.answered(1_000_000, 100_000)
    meter.answered(1_000_000, 0)
    meter.done(STATE, seconds=2.5, priority=Priority.HIGH)
    now = meter.sample()
    assert (now.answered, now.tokens) == (2, 2_100_000)
    assert now.usd == pytest.approx(6.0)  # 2.50 a million in, 10.00 a million out
    assert now.useful_tokens == 1_100_000
    assert now.useful_usd == pytest.approx(3.5)


def test_a_model_without_a_known_price_costs_nothing_that_we_would_tell() -> None:
    meter = Meter(Provider(url="", model="llama-4"), lambda _line: None)
    meter.answered(10, 10)
    assert meter.sample().usd == 0.0


def test_tasks_are_counted_by_how_they_end_and_how_urgent_they_were(meter: Meter) -> None:
    meter.done(STATE, seconds=1.0, priority=Priority.CRITICAL)
    meter.done(STATE, seconds=None, priority=None)  # of an earlier process
    meter.failed()
    now = meter.sample()
    assert (now.done, now.failed, now.done_by, meter.ended) == (2, 1, (1, 0, 0, 0), 3)


def test_latencies_are_told_once(meter: Meter) -> None:
    meter.done(STATE, seconds=1.25, priority=Priority.LOW)
    assert meter.sample().latencies == (1.25,)
    assert meter.sample().latencies == ()


def test_it_reports_when_it_begins_and_for_the_last_time_when_it_ends(meter: Meter, lines: list[bytes]) -> None:
    meter.observe = lambda: setattr(meter, "waiting", 4)
    meter.begin()
    meter.end()
    samples = [msgspec.json.decode(line, type=Sample) for line in lines]
    assert [sample.stage for sample in samples] == ["surge", "ended"]
    assert samples[-1].waiting == 4
    assert samples[-1].rss_mb > 1


def test_a_reader_that_has_gone_does_not_end_it() -> None:
    def gone(_line: bytes) -> None:
        raise BrokenPipeError

    Meter(Provider(url=""), gone).report()
