"""Deadlines when many tasks wait: a task that can hardly end in time is not started in the slot of another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Deadline, Task, TaskStatus, Verdict


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
async def test_a_task_is_rejected_if_the_wait_leaves_too_little_time_for_nearly_any_task() -> None:
    async with make_supervisor() as supervisor:
        waiting = [await supervisor.submit(task(1.0)) for _ in range(2)]
        tried, rejected = [await supervisor.submit(task(1.0, within=12.0)) for _ in range(2)]
        assert tried  # one in ten seconds is admitted whatever the estimate
        assert rejected.verdict is Verdict.REJECTED  # ten seconds are needed after a wait of some six
        assert "cannot be met" in str(rejected.reason)
        assert await supervisor.submit(task(1.0, within=17.0))
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
