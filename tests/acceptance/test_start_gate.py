"""The start gate: runs that are held back start as soon as they may, however the calls before them ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.support.task_plane import approximately, now, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task, TaskStatus, Ticket, Upstream
from forebay.interfaces import Outcome
from forebay.quota import Budget, Price
from forebay.upstream.call_request import CallOutcome, CallRequest

LONG = 60.0  # seconds that a call takes: a run that is not notified would wait as long
SLOTS = 10


class StartTimes:
    """A handler whose runs end at once, and the loop times at which they started."""

    def __init__(self) -> None:
        self.at: list[float] = []

    async def __call__(self, _: Task) -> None:
        self.at.append(now())


@asynccontextmanager
async def make_supervisor() -> AsyncIterator[tuple[Upstream, BackpressureSupervisor, StartTimes]]:
    """Yield an upstream whose calls take long, and a supervisor with a worker that calls it."""
    key, starts = Upstream("key", max_concurrent=SLOTS, max_wait=1000.0), StartTimes()
    async with key.call():
        await asyncio.sleep(LONG)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=starts, task_types=["work"], upstreams=[key])
        yield key, supervisor, starts


async def fill(stack: AsyncExitStack, key: Upstream) -> None:
    """Take every slot of the upstream."""
    for _ in range(SLOTS):
        await stack.enter_async_context(key.call())


async def queued_caller(key: Upstream, count: int, deadline: Deadline | None = None) -> list[asyncio.Task[None]]:
    async def call() -> None:
        async with key.call(deadline=deadline):
            raise AssertionError

    calls = [asyncio.create_task(call()) for _ in range(count)]
    await run_ready()
    return calls


async def held_task(
    supervisor: BackpressureSupervisor, starts: StartTimes, priority: Priority = Priority.NORMAL
) -> Ticket:
    """Return a task that is admitted, and whose run is held back."""
    ticket = supervisor.submit_nowait(Task("work", priority=priority))
    await asyncio.sleep(1.0)
    assert not starts.at
    return ticket


@virtual
async def test_callers_that_leave_the_queue_let_a_run_start() -> None:
    async with make_supervisor() as (key, supervisor, starts), AsyncExitStack() as stack:
        await fill(stack, key)
        calls = await queued_caller(key, 3)
        ticket = await held_task(supervisor, starts)
        at = now()
        for call in calls:
            call.cancel()
        await ticket
        assert starts.at == [approximately(at)]


@virtual
async def test_callers_whose_deadline_passes_in_the_queue_let_a_run_start() -> None:
    async with make_supervisor() as (key, supervisor, starts), AsyncExitStack() as stack:
        await fill(stack, key)
        calls = await queued_caller(key, 3, Deadline.within(40.0))
        at = now() + 40.0
        await (await held_task(supervisor, starts))
        assert starts.at == [approximately(at)]
        assert all(isinstance(call.exception(), Overloaded) for call in calls)


@virtual
async def test_a_run_that_ends_without_a_call_lets_another_start() -> None:
    async def thinks(_: Task) -> None:
        await asyncio.sleep(5.0)

    async with make_supervisor() as (key, supervisor, starts), AsyncExitStack() as stack:
        await fill(stack, key)
        supervisor.register_worker("thinker", handler=thinks, task_types=["think"], max_concurrent=9, upstreams=[key])
        at = now() + 5.0
        for _ in range(2):
            supervisor.submit_nowait(Task("think"))
        await run_ready()
        await (await held_task(supervisor, starts))
        assert starts.at == [approximately(at)]


@virtual
async def test_a_call_that_is_sent_after_an_outage_lets_a_run_start_before_it_ends() -> None:
    async with make_supervisor() as (key, supervisor, starts):
        await supervisor.run(Task("work"))  # one starts in each typical latency: this was it
        starts.at.clear()
        shared_account = key.core.accounts.account("")
        for _ in range(SLOTS):
            shared_account.settle(
                await shared_account.acquire(CallRequest()), CallOutcome(kind=Outcome.OVERLOAD, latency=LONG)
            )
        permit = await shared_account.acquire(CallRequest())
        ticket = await held_task(supervisor, starts)
        at = now()
        shared_account.answer_began(permit)
        await ticket
        assert starts.at == [approximately(at)]
        shared_account.settle(permit, CallOutcome(kind=Outcome.SUCCESS))


@virtual
async def test_a_critical_run_starts_as_soon_as_it_may_even_if_a_normal_one_may_not_yet() -> None:
    async with make_supervisor() as (key, supervisor, starts), AsyncExitStack() as stack:
        await supervisor.run(Task("work", priority=Priority.CRITICAL))  # one starts in each typical latency
        starts.at.clear()
        await fill(stack, key)
        calls = await queued_caller(key, 12)
        ticket = await held_task(supervisor, starts, priority=Priority.CRITICAL)
        at = now()
        for call in calls[:4]:
            call.cancel()
        await asyncio.sleep(1.0)
        assert starts.at == [approximately(at)]
        for call in calls:
            call.cancel()
        await ticket


@virtual
async def test_runs_whose_calls_are_free_do_not_wait_for_a_budget_that_never_refills() -> None:
    prices = {"paid": Price(input=1e6, output=1e6), "free": Price(input=0.0, output=0.0)}
    key = Upstream("key", budget=Budget(usd=1.0), prices=prices)

    async def handler(_: Task) -> None:
        with contextlib.suppress(Overloaded):
            async with key.call("free"):
                await asyncio.sleep(1.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        tickets = [supervisor.submit_nowait(Task("work")) for _ in range(2)]
        await asyncio.sleep(0.5)
        async with key.call("paid", output_tokens=1) as call:
            call.settle(input_tokens=0, output_tokens=1)
        async with asyncio.timeout(10.0):
            assert [result.status for result in [await ticket for ticket in tickets]] == [TaskStatus.SUCCEEDED] * 2
