"""Exponential backoff, and the retry state of one call."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.errors import InvalidSetting
from forebay.retry import Retry, RetryState

DRAW = st.floats(0, 1, exclude_max=True)
ALMOST_ONE = math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(("retry", "longest"), [(1, 0.5), (2, 1.0), (3, 2.0), (7, 32.0), (8, 60.0), (100_000, 60.0)])
def test_the_longest_delay_doubles_up_to_max_delay(retry: int, longest: float) -> None:
    policy = Retry(max_total_delay=math.inf)
    assert policy.delay(retry, draw=0.0) == 0.0
    assert policy.delay(retry, draw=ALMOST_ONE) == pytest.approx(longest)


def test_a_retry_after_is_waited_for_and_spread_by_a_fifth() -> None:
    policy = Retry()
    assert policy.delay(1, draw=0.0, retry_after=40.0) == 40.0
    assert policy.delay(1, draw=0.5, retry_after=40.0) == pytest.approx(44.0)
    assert policy.delay(1, draw=ALMOST_ONE, retry_after=40.0) == pytest.approx(48.0)


def test_a_retry_after_of_a_day_is_not_waited_for() -> None:
    assert Retry().delay(1, draw=0.0, retry_after=86_400.0) is None


def test_there_is_no_retry_at_the_deadline_or_later() -> None:
    policy = Retry()
    assert policy.delay(1, draw=0.0, retry_after=5.0, time_left=5.0) is None
    assert policy.delay(1, draw=0.0, time_left=0.0) is None
    assert policy.delay(1, draw=0.0, time_left=-1.0) is None


@given(
    retry=st.integers(1, 10_000),
    draw=DRAW,
    asked=st.none() | st.floats(-10, 1e6),
    time_left=st.floats(-10, 1e6) | st.just(math.inf),
)
def test_a_delay_is_at_least_retry_after_and_within_the_time_left(
    retry: int, draw: float, asked: float | None, time_left: float
) -> None:
    delay = Retry().delay(retry, draw=draw, retry_after=asked, time_left=time_left)
    if delay is None:
        assert max(0.0, asked or 0.0) >= min(time_left, 60.0)
    else:
        assert max(0.0, asked or 0.0) <= delay <= min(time_left, 60.0)


@pytest.mark.parametrize(
    "numbers",
    [
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_attempts": 1.5},
        {"base_delay": 0.0},
        {"base_delay": math.nan},
        {"base_delay": 2.0, "max_delay": 1.0},
        {"max_delay": math.inf},
        {"max_total_delay": -1.0},
        {"max_total_delay": math.nan},
    ],
)
def test_an_invalid_setting_is_reported_by_name(numbers: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match=rf"Retry was given {list(numbers)[-1]}="):
        Retry(**numbers)  # type: ignore[arg-type]


# --- one call --------------------------------------------------------------------------------------------------------


def test_a_failing_call_gets_six_attempts() -> None:
    state = RetryState(Retry())
    delays = [state.next_delay(uses_attempt=True, draw=0.5) for _ in range(6)]
    assert delays == [0.25, 0.5, 1.0, 2.0, 4.0, None]


def test_throttled_attempts_use_up_no_attempt_and_are_bounded_by_the_total_delay() -> None:
    state = RetryState(Retry(max_total_delay=100.0))
    waits = []
    while (wait := state.next_delay(uses_attempt=False, draw=0.0, retry_after=3.0)) is not None:
        waits.append(wait)
    assert len(waits) == 33
    assert state.failed == 0
    assert [state.next_delay(uses_attempt=True, draw=0.0) for _ in range(6)] == [0.0] * 5 + [None]


def test_a_retry_after_that_is_not_believed_is_not_waited_for_but_still_ends_the_call() -> None:
    state = RetryState(Retry())
    assert state.next_delay(uses_attempt=False, draw=0.5, retry_after=50.0, believed=False) == 0.25
    assert state.next_delay(uses_attempt=False, draw=0.5, retry_after=70.0, believed=False) is None


def test_a_throttled_attempt_after_faults_backs_off_like_a_first_one() -> None:
    state = RetryState(Retry())
    for _ in range(4):
        state.next_delay(uses_attempt=True, draw=0.0)
    delay = state.next_delay(uses_attempt=False, draw=ALMOST_ONE)
    assert delay == pytest.approx(0.5)


@given(events=st.lists(st.tuples(st.booleans(), DRAW, st.none() | st.floats(0, 100)), max_size=300))
def test_a_call_never_waits_longer_than_max_total_delay_and_six_faults_end_it(
    events: list[tuple[bool, float, float | None]],
) -> None:
    state = RetryState(Retry(max_total_delay=50.0))
    waited = faults = 0.0
    for uses_attempt, draw, asked in events:
        delay = state.next_delay(uses_attempt=uses_attempt, draw=draw, retry_after=asked)
        faults += uses_attempt
        if uses_attempt and faults >= 6:
            assert delay is None
        waited += delay or 0.0
    assert waited <= 50.0 + 1e-9


@pytest.mark.parametrize(
    ("old", "new"), [("base", "base_delay"), ("ceiling", "max_delay"), ("longest_wait", "max_total_delay")]
)
def test_an_old_name_gives_the_new_one(old: str, new: str) -> None:
    with pytest.raises(TypeError, match=f"Retry: {old} is now {new}"):
        Retry(**{old: 1.0})  # type: ignore[arg-type]
