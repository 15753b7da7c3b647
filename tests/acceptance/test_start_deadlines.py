"""Deadlines when many tasks wait: a task that can hardly end in time is not started in the slot of another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Deadline, Estimate, Task, TaskStatus, Verdict


async def work(task: Task) -> None:
    await asyncio.sleep(task.payload)


def task(seconds: float, within: float | None = None) -> Task:
    return Task("work", seconds, deadline=None if within is None else Deadline.within(within))


@asynccontextmanager
async def make_supervisor(overflow: str | None = None) -> AsyncIterator[BackpressureSupervisor]:
    """Yield a supervisor with one slot. Most tasks have taken a second, a third of them four, one in twenty eight."""
    async with BackpressureSupervisor(overflow=overflow) as supervisor:
        supervisor.register_worker("worker", handler=work, task_types=["work"])
        for seconds in (*(4.0,) * 7, *(1.0,) * 12, 8.0):
            await supervisor.run(task(seconds))
        yield supervisor


@virtual
async def test_a_task_is_rejected_if_the_wait_leaves_too_little_time_for_most_tasks() -> None:
    async with make_supervisor() as supervisor:
        waiting = [await supervisor.submit(task(1.0)) for _ in range(3)]
        tried, rejected = [await supervisor.submit(task(1.0, within=8.0)) for _ in range(2)]
        assert tried  # one in ten seconds is admitted whatever the estimate
        assert rejected.verdict is Verdict.REJECTED  # four seconds are needed after a wait of some five
        assert "cannot be met" in str(rejected.reason)
        assert await supervisor.submit(task(1.0, within=14.0))  # though not nearly any task would fit
        assert all([(await ticket).success for ticket in waiting])


@pytest.mark.parametrize("overflow", [None, "memory://"], ids=["without", "with an overflow"])
@virtual
async def test_a_task_with_hardly_any_time_left_is_not_started_before_others_with_more(overflow: str | None) -> None:
    async with make_supervisor(overflow) as supervisor:
        holder = await supervisor.submit(task(9.0))
        first, second = [await supervisor.submit(task(1.0, within=12.0 + number)) for number in range(2)]
        other = await supervisor.submit(task(1.0))
        await holder
        assert (await first).success  # with three of its twelve seconds left; one in ten seconds is tried anyway
        assert (await second).status is TaskStatus.EXPIRED
        assert (await other).success


@pytest.mark.parametrize("overflow", [None, "memory://"], ids=["without", "with an overflow"])
@pytest.mark.parametrize("rejected", [0, 1])
@virtual
async def test_a_task_that_may_be_cut_off_gives_way_only_while_others_are_not_admitted(
    overflow: str | None, rejected: int
) -> None:
    async with make_supervisor(overflow) as supervisor:
        holder = await supervisor.submit(task(9.0))
        late = await supervisor.submit(task(1.0, within=15.0))
        waiting = [await supervisor.submit(task(1.0)) for _ in range(6)]
        tried, *others = [await supervisor.submit(task(1.0, within=16.0)) for _ in range(1 + rejected)]
        assert tried  # one in ten seconds is admitted whatever the estimate
        assert all(ticket.verdict is Verdict.REJECTED for ticket in others)
        await holder
        # Six of its fifteen seconds are left, as three quarters need, but not nearly all.
        assert (await late).status is (TaskStatus.EXPIRED if rejected else TaskStatus.SUCCEEDED)
        assert all([(await ticket).success for ticket in waiting])


@virtual
async def test_a_task_with_hardly_any_time_left_is_started_if_no_other_waits() -> None:
    async with make_supervisor() as supervisor:
        holder = await supervisor.submit(task(9.0))
        late = await supervisor.submit(task(1.0, within=12.0))
        await holder
        assert (await late).success


@virtual
async def test_a_task_that_had_little_time_from_the_start_gets_the_benefit_of_the_doubt() -> None:
    async with make_supervisor() as supervisor:
        holder = await supervisor.submit(task(6.0))
        hurried = [await supervisor.submit(task(1.0, within=8.0 + number)) for number in range(2)]
        other = await supervisor.submit(task(1.0))
        await holder
        assert [(await ticket).success for ticket in hurried] == [True, True]
        assert (await other).success


@virtual
async def test_a_run_cut_off_at_its_deadline_counts_as_longer_than_that() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=work, task_types=["work"])
        for _ in range(20):
            cut = await supervisor.submit(task(60.0, within=4.0))
            assert (await cut).status is TaskStatus.EXPIRED
        waiting = [await supervisor.submit(task(1.0)) for _ in range(2)]
        tried, rejected = [await supervisor.submit(task(1.0, within=14.0)) for _ in range(2)]
        assert tried
        assert rejected.verdict is Verdict.REJECTED  # seven and a half seconds must be left after twelve
        assert all([(await ticket).success for ticket in waiting])


def estimated(seconds: float, within: float | None = None) -> Task:
    """Return a task that is expected to need ten tokens a second."""
    deadline = None if within is None else Deadline.within(within)
    return Task("work", seconds, deadline=deadline, estimate=Estimate(output_tokens=round(10 * seconds)))


@asynccontextmanager
async def make_estimating() -> AsyncIterator[BackpressureSupervisor]:
    """Yield a supervisor with two slots, whose tasks have taken one to eight seconds, as estimated."""
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=work, task_types=["work"], max_concurrent=2)
        for seconds in (1.0, 2.0, 4.0, 8.0) * 3:
            await supervisor.run(estimated(seconds))
        yield supervisor


@virtual
async def test_a_task_with_an_estimate_is_compared_with_tasks_of_its_size() -> None:
    async with make_estimating() as supervisor:
        tried, rejected = [await supervisor.submit(estimated(20.0, within=15.0)) for _ in range(2)]
        assert tried  # one in ten seconds is admitted whatever the estimate
        assert rejected.verdict is Verdict.REJECTED
        assert "cannot be met" in str(rejected.reason)
        assert await supervisor.submit(estimated(0.5, within=0.7))  # though three quarters took two seconds
        assert (await tried).status is TaskStatus.EXPIRED


@virtual
async def test_a_long_task_is_not_started_if_its_turn_comes_too_late_for_its_size() -> None:
    async with make_estimating() as supervisor:
        holders = [await supervisor.submit(estimated(40.0)) for _ in range(2)]
        waiting = [(20.0, 55.0), (20.0, 55.1), (12.0, 55.2), (1.0, None)]
        tried, late, short, other = [await supervisor.submit(estimated(*each)) for each in waiting]
        assert all([(await holder).success for holder in holders])
        assert (await late).status is TaskStatus.EXPIRED
        assert "before its deadline, which is too late to finish" in str((await late).error)
        assert (await short).success
        assert (await other).success
        assert (await tried).status is TaskStatus.EXPIRED  # one in ten seconds is tried anyway
