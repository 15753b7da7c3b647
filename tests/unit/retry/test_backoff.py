"""How long a retry waits, and when there is none."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.errors import InvalidSetting
from forebay.retry import Retry, RetryState

CHANCE = st.floats(0, 1, exclude_max=True)
NEARLY_ONE = math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(("retry", "longest"), [(1, 0.5), (2, 1.0), (3, 2.0), (7, 32.0), (8, 60.0), (100_000, 60.0)])
def test_it_waits_up_to_twice_as_long_each_time(retry: int, longest: float) -> None:
    rule = Retry(max_total_delay=math.inf)
    assert rule.delay(retry, draw=0.0) == 0.0
    assert rule.delay(retry, draw=NEARLY_ONE) == pytest.approx(longest)


def test_what_the_provider_asks_for_is_waited_and_those_who_were_told_the_same_come_back_apart() -> None:
    rule = Retry()
    assert rule.delay(1, draw=0.0, retry_after=40.0) == 40.0
    assert rule.delay(1, draw=0.5, retry_after=40.0) == pytest.approx(44.0)
    assert rule.delay(1, draw=NEARLY_ONE, retry_after=40.0) == pytest.approx(48.0)


def test_a_day_is_not_waited_for() -> None:
    assert Retry().delay(1, draw=0.0, retry_after=86_400.0) is None


def test_a_retry_at_the_deadline_or_later_is_none() -> None:
    rule = Retry()
    assert rule.delay(1, draw=0.0, retry_after=5.0, time_left=5.0) is None
    assert rule.delay(1, draw=0.0, time_left=0.0) is None
    assert rule.delay(1, draw=0.0, time_left=-1.0) is None


@given(
    retry=st.integers(1, 10_000),
    chance=CHANCE,
    asked=st.none() | st.floats(-10, 1e6),
    left=st.floats(-10, 1e6) | st.just(math.inf),
)
def test_a_delay_is_no_shorter_than_asked_for_and_within_what_is_left(
    retry: int, chance: float, asked: float | None, left: float
) -> None:
    delay = Retry().delay(retry, draw=chance, retry_after=asked, time_left=left)
    if delay is None:
        assert max(0.0, asked or 0.0) >= min(left, 60.0)
    else:
        assert max(0.0, asked or 0.0) <= delay <= min(left, 60.0)


@pytest.mark.parametrize(
    "numbers",
    [
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_attempts": 1.5},
        {"base": 0.0},
        {"base": math.nan},
        {"base": 2.0, "ceiling": 1.0},
        {"ceiling": math.inf},
        {"max_wait": -1.0},
        {"max_wait": math.nan},
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match=rf"Retry was given {list(numbers)[-1]}="):
        Retry(**numbers)  # type: ignore[arg-type]


# --- one call -------------------------------------------------------------------------------------------------------


def test_a_fault_is_tried_six_times_in_all() -> None:
    attempts = RetryState(Retry())
    delays = [attempts.next_delay(uses_attempt=True, draw=0.5) for _ in range(6)]
    assert delays == [0.25, 0.5, 1.0, 2.0, 4.0, None]


def test_refusals_use_up_no_attempt_but_the_wait_bounds_them() -> None:
    attempts = RetryState(Retry(max_total_delay=100.0))
    waits = []
    while (wait := attempts.next_delay(uses_attempt=False, draw=0.0, retry_after=3.0)) is not None:
        waits.append(wait)
    assert len(waits) == 33
    assert attempts.failed == 0
    assert [attempts.next_delay(uses_attempt=True, draw=0.0) for _ in range(6)] == [0.0] * 5 + [None]


def test_a_refusal_after_faults_backs_off_as_a_first_one() -> None:
    attempts = RetryState(Retry())
    for _ in range(4):
        attempts.next_delay(uses_attempt=True, draw=0.0)
    delay = attempts.next_delay(uses_attempt=False, draw=NEARLY_ONE)
    assert delay == pytest.approx(0.5)


@given(events=st.lists(st.tuples(st.booleans(), CHANCE, st.none() | st.floats(0, 100)), max_size=300))
def test_a_call_never_waits_longer_than_it_may_and_faults_end_it(
    events: list[tuple[bool, float, float | None]],
) -> None:
    attempts = RetryState(Retry(max_total_delay=50.0))
    waited = faults = 0.0
    for counts, chance, asked in events:
        delay = attempts.next_delay(uses_attempt=counts, draw=chance, retry_after=asked)
        faults += counts
        if counts and faults >= 6:
            assert delay is None
        waited += delay or 0.0
    assert waited <= 50.0 + 1e-9
