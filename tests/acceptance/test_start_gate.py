"""Runs that are held back begin as soon as they may, whichever way the calls before them have left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.support.task_plane import approximately, now, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task, Ticket, Upstream
from forebay.interfaces import Outcome
from forebay.upstream.call_request import CallOutcome, CallRequest

LONG = 60.0  # seconds that a call takes, as is known: so long a run would wait that heard nothing
SLOTS = 10


class Began:
    """A handler whose runs end at once; when they began."""

    def __init__(self) -> None:
        self.at: list[float] = []

    async def __call__(self, _: Task) -> None:
        self.at.append(now())


@asynccontextmanager
async def house() -> AsyncIterator[tuple[Upstream, BackpressureSupervisor, Began]]:
    """A key whose calls take long, and a worker that draws on it."""
    key, began = Upstream("key", max_concurrent=SLOTS, max_wait=1000.0), Began()
    async with key.call():
        await asyncio.sleep(LONG)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=began, task_types=["work"], upstreams=[key])
        yield key, supervisor, began


async def fill(stack: AsyncExitStack, key: Upstream) -> None:
    """Take all slots."""
    for _ in range(SLOTS):
        await stack.enter_async_context(key.call())


async def in_line(key: Upstream, count: int, deadline: Deadline | None = None) -> list[asyncio.Task[None]]:
    async def call() -> None:
        async with key.call(deadline=deadline):
            raise AssertionError

    calls = [asyncio.create_task(call()) for _ in range(count)]
    await run_ready()
    return calls


async def held(supervisor: BackpressureSupervisor, began: Began, priority: Priority = Priority.NORMAL) -> Ticket:
    """A task that is admitted, and whose run does not begin yet."""
    ticket = supervisor.submit_nowait(Task("work", priority=priority))
    await asyncio.sleep(1.0)
    assert not began.at
    return ticket


@virtual
async def test_callers_that_leave_the_line_let_a_run_begin() -> None:
    async with house() as (key, supervisor, began), AsyncExitStack() as stack:
        await fill(stack, key)
        calls = await in_line(key, 3)
        ticket = await held(supervisor, began)
        at = now()
        for call in calls:
            call.cancel()
        await ticket
        assert began.at == [approximately(at)]


@virtual
async def test_callers_whose_deadline_passes_in_the_line_let_a_run_begin() -> None:
    async with house() as (key, supervisor, began), AsyncExitStack() as stack:
        await fill(stack, key)
        calls = await in_line(key, 3, Deadline.within(40.0))
        at = now() + 40.0
        await (await held(supervisor, began))
        assert began.at == [approximately(at)]
        assert all(isinstance(call.exception(), Overloaded) for call in calls)


@virtual
async def test_a_run_that_ends_without_a_call_lets_another_begin() -> None:
    async def thinks(_: Task) -> None:
        await asyncio.sleep(5.0)

    async with house() as (key, supervisor, began), AsyncExitStack() as stack:
        await fill(stack, key)
        supervisor.register_worker("thinker", handler=thinks, task_types=["think"], max_concurrent=9, upstreams=[key])
        at = now() + 5.0
        for _ in range(2):
            supervisor.submit_nowait(Task("think"))
        await run_ready()
        await (await held(supervisor, began))
        assert began.at == [approximately(at)]


@virtual
async def test_a_call_that_is_let_in_after_an_outage_lets_a_run_begin_before_it_ends() -> None:
    async with house() as (key, supervisor, began):
        await supervisor.run(Task("work"))  # one begins in each typical call's time: this was it
        began.at.clear()
        desk = key.core.accounts.account("")
        for _ in range(SLOTS):
            desk.settle(await desk.acquire(CallRequest()), CallOutcome(kind=Outcome.OVERLOAD, latency=LONG))
        permit = await desk.acquire(CallRequest())
        ticket = await held(supervisor, began)
        at = now()
        desk.answer_began(permit)
        await ticket
        assert began.at == [approximately(at)]
        desk.settle(permit, CallOutcome(kind=Outcome.SUCCESS))


@virtual
async def test_a_critical_run_begins_as_soon_as_it_may_though_a_normal_one_may_not_yet() -> None:
    async with house() as (key, supervisor, began), AsyncExitStack() as stack:
        await supervisor.run(Task("work", priority=Priority.CRITICAL))  # one begins in each typical call's time
        began.at.clear()
        await fill(stack, key)
        calls = await in_line(key, 12)
        ticket = await held(supervisor, began, priority=Priority.CRITICAL)
        at = now()
        for call in calls[:4]:
            call.cancel()
        await asyncio.sleep(1.0)
        assert began.at == [approximately(at)]
        for call in calls:
            call.cancel()
        await ticket
