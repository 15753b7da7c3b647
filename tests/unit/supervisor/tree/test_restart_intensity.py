"""Restart intensity: a sliding window."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forebay.supervisor.tree.restart_intensity import RestartIntensity

GAPS = st.lists(st.floats(0, 4, allow_nan=False), min_size=1, max_size=30)


def test_the_bounds_of_the_period_are_within_it() -> None:
    intensity = RestartIntensity(1, 5.0)
    assert intensity.allow(0.0)
    assert not intensity.allow(5.0)
    intensity.clear()
    assert intensity.allow(0.0)
    assert intensity.allow(5.001)


@given(gaps=GAPS, max_restarts=st.integers(0, 5))
def test_a_restart_is_allowed_if_no_more_than_the_others_of_the_period_came_before(
    gaps: list[float], max_restarts: int
) -> None:
    intensity, times, now = RestartIntensity(max_restarts, 5.0), [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
        recent = sum(now - time <= 5.0 for time in times)
        assert intensity.allow(now) == (recent <= max_restarts)


def test_no_more_times_are_kept_than_count() -> None:
    intensity = RestartIntensity(3, 5.0)
    for second in range(1000):
        intensity.allow(float(second))
    assert len(intensity._restarts) == 4
