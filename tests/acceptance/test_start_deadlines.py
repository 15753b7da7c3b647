"""Tasks with deadlines where many wait: who can hardly be in time is not begun, and does not take another's slot."""

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
async def house(overflow: str | None = None) -> AsyncIterator[BackpressureSupervisor]:
    """One slot. A task takes a second, most often; a third of them take four, and one in twenty took eight."""
    async with BackpressureSupervisor(overflow=overflow) as supervisor:
        supervisor.register_worker("worker", handler=work, task_types=["work"])
        for seconds in (*(4.0,) * 7, *(1.0,) * 12, 8.0):
            await supervisor.run(task(seconds))
        yield supervisor


@virtual
async def test_a_task_is_refused_whose_wait_would_leave_too_little_for_nearly_any() -> None:
    async with house() as supervisor:
        waiting = [await supervisor.submit(task(1.0)) for _ in range(2)]
        tried, refused = [await supervisor.submit(task(1.0, within=12.0)) for _ in range(2)]
        assert tried  # whatever is expected, one in ten seconds is
        assert refused.verdict is Verdict.REJECTED  # ten are needed after some six, to be sure
        assert "cannot be met" in str(refused.reason)
        assert await supervisor.submit(task(1.0, within=17.0))
        assert all([(await ticket).success for ticket in waiting])


@pytest.mark.parametrize("overflow", [None, "memory://"], ids=["without", "with an overflow"])
@virtual
async def test_one_that_hardly_has_time_left_is_not_begun_before_others_who_have(overflow: str | None) -> None:
    async with house(overflow) as supervisor:
        holder = await supervisor.submit(task(9.0))
        first, second = [await supervisor.submit(task(1.0, within=12.0 + number)) for number in range(2)]
        other = await supervisor.submit(task(1.0))
        await holder
        assert (await first).success  # with three of its twelve seconds left; one in ten seconds is tried all the same
        assert (await second).status is TaskStatus.EXPIRED
        assert (await other).success


@virtual
async def test_where_nobody_else_waits_it_is_begun() -> None:
    async with house() as supervisor:
        holder = await supervisor.submit(task(9.0))
        late = await supervisor.submit(task(1.0, within=12.0))
        await holder
        assert (await late).success


@virtual
async def test_one_that_had_little_time_from_the_first_is_judged_kindly() -> None:
    async with house() as supervisor:
        holder = await supervisor.submit(task(6.0))
        hurried = [await supervisor.submit(task(1.0, within=8.0 + number)) for number in range(2)]
        other = await supervisor.submit(task(1.0))
        await holder
        assert [(await ticket).success for ticket in hurried] == [True, True]
        assert (await other).success


@virtual
async def test_what_was_cut_off_at_its_deadline_is_known_to_take_longer() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=work, task_types=["work"])
        for _ in range(20):
            cut = await supervisor.submit(task(60.0, within=4.0))
            assert (await cut).status is TaskStatus.EXPIRED
        waiting = [await supervisor.submit(task(1.0)) for _ in range(2)]
        tried, refused = [await supervisor.submit(task(1.0, within=14.0)) for _ in range(2)]
        assert tried
        assert refused.verdict is Verdict.REJECTED  # seven and a half have to be left after twelve
        assert all([(await ticket).success for ticket in waiting])
