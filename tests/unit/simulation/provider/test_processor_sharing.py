"""Processor sharing, compared with a plain event-by-event integration."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.simulation.provider.processor_sharing import ProcessorSharing, capacity_phases
from forebay.simulation.provider.provider_config import CapacityStep, Slowdown

jobs = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=12)


def finish_times(slots: int, work: list[tuple[int, int]]) -> list[float]:
    """Return the end of each job by the class under test; jobs are (arrival, seconds of work)."""
    sharing: ProcessorSharing[int] = ProcessorSharing(slots)
    ends = [math.inf] * len(work)
    waiting = sorted(range(len(work)), key=lambda job: work[job][0])
    while waiting or sharing.population:
        due = sharing.next_at()
        if waiting and work[waiting[0]][0] <= due:
            job = waiting.pop(0)
            sharing.advance_to(work[job][0])
            sharing.population += 1
            sharing.mark(sharing.work + work[job][1], job)
        else:
            ends[sharing.pop()] = due
            sharing.population -= 1
            if not sharing.population:
                sharing.reset()
    assert sharing.busy_slot_seconds == pytest.approx(sum(seconds for _, seconds in work))
    return ends


def by_hand(slots: int, work: list[tuple[int, int]]) -> list[float]:
    """Return the same, event by event, with a remainder for each job."""
    now, ends = 0.0, [math.inf] * len(work)
    left: dict[int, float] = {}
    waiting = sorted(range(len(work)), key=lambda job: work[job][0])
    while waiting or left:
        rate = min(1.0, slots / len(left)) if left else 1.0
        end = now + min(left.values()) / rate if left else math.inf
        until = min(end, work[waiting[0]][0] if waiting else math.inf)
        left = {job: rest - (until - now) * rate for job, rest in left.items()}
        now = until
        for job in [job for job, rest in left.items() if rest <= 1e-9]:
            ends[job] = now
            del left[job]
        while waiting and work[waiting[0]][0] <= now:
            job = waiting.pop(0)
            left[job] = float(work[job][1])
    return ends


@given(slots=st.integers(1, 6), work=jobs)
def test_calls_share_the_slots_and_work_is_conserved(slots: int, work: list[tuple[int, int]]) -> None:
    assert finish_times(slots, work) == pytest.approx(by_hand(slots, work), abs=1e-6)


@given(work=jobs)
def test_with_a_slot_for_each_call_none_is_slowed(work: list[tuple[int, int]]) -> None:
    assert finish_times(len(work), work) == pytest.approx([arrival + seconds for arrival, seconds in work])


def test_without_slots_no_call_progresses() -> None:
    sharing: ProcessorSharing[str] = ProcessorSharing(0)
    sharing.population = 1
    sharing.mark(1.0, "end")
    assert sharing.next_at() == math.inf
    sharing.advance_to(100.0)
    sharing.slots = 1
    assert sharing.next_at() == pytest.approx(101.0)


def test_capacity_steps_and_slowdowns_make_one_schedule() -> None:
    schedule = capacity_phases(
        10,
        (CapacityStep(at=60, slots=5), CapacityStep(at=120, slots=0, cut=True)),
        (Slowdown(at=30, seconds=60, factor=2), Slowdown(at=50, seconds=10, factor=3)),
    )
    phases = [(phase.at, phase.slots, round(phase.speed, 4), phase.cut) for phase in schedule]
    assert phases == [
        (0, 10, 1.0, False),
        (30, 10, 0.5, False),
        (50, 10, 0.1667, False),
        (60, 5, 0.5, False),
        (90, 5, 1.0, False),
        (120, 0, 1.0, True),
    ]
