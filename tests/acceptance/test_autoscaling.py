"""Auto-scaling of a supervisor's own worker, and what a supervisor says of the slots that its tasks ask for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, flood, now, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Task, Tenant, Upstream, Verdict
from forebay.breaker import BreakerRules
from forebay.clock import wall_time
from forebay.errors import UnknownTaskType
from forebay.events import Scaled
from forebay.overflow import open_task_store
from forebay.quota import Budget, Price, Quota
from forebay.scale import Autoscaler, WorkerTarget

# --- demand -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def supervisor_of(handler: Any, *, slots: int = 2, **settings: Any) -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor(**settings) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=slots)
        yield supervisor


@virtual
async def test_what_runs_what_waits_and_how_long_it_takes() -> None:
    async with supervisor_of(Agent(seconds=10.0)) as supervisor:
        assert (await supervisor.demand(["work"])).service is None
        flood(supervisor, "work", 5)
        demand = await supervisor.demand(["work", "work"])
        assert (demand.slots, demand.running, demand.queued, demand.spilled, demand.elsewhere) == (2, 2, 3, 0, None)
        await asyncio.sleep(11.0)
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.queued) == (2, 1)
        assert demand.service == pytest.approx(10.0, abs=0.1)
        with pytest.raises(UnknownTaskType):
            await supervisor.demand(["play"])


@virtual
async def test_a_worker_of_two_types_counts_once() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("both", handler=Agent(), task_types=["work", "play"], max_concurrent=3)
        flood(supervisor, "work", 2)
        demand = await supervisor.demand(["work", "play"])
        assert (demand.slots, demand.running) == (3, 2)


@virtual
async def test_what_waits_for_something_else_than_a_slot_asks_for_none() -> None:
    async with supervisor_of(Agent(seconds=10.0)) as supervisor:
        for number in range(4):
            await supervisor.submit(Task("work", number, thread_id="one conversation"))
        for number in range(4):
            await supervisor.submit(Task("work", number, not_before=wall_time() + 100.0))
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.queued) == (1, 0)
        flood(supervisor, "work", 5)
        supervisor.pause("work")
        assert (await supervisor.demand(["work"])).queued == 0


@virtual
async def test_tasks_without_room_are_counted_and_producers_that_wait_for_it() -> None:
    async with supervisor_of(Agent(seconds=10.0), max_queue_size=2) as supervisor:
        tickets = flood(supervisor, "work", 20)
        refused = sum(ticket.verdict is Verdict.REJECTED for ticket in tickets)
        assert (await supervisor.demand(["work"])).refused == refused > 10
        producers = [asyncio.create_task(supervisor.submit(Task("work", 1), wait=60.0)) for _ in range(7)]
        await run_ready()
        demand = await supervisor.demand(["work"])
        assert demand.queued == len(tickets) - refused - 2 + 7
        for producer in producers:
            producer.cancel()


@virtual
async def test_a_task_that_could_not_be_in_time_on_a_free_slot_is_not_counted() -> None:
    async with supervisor_of(Agent(seconds=10.0)) as supervisor:
        for _ in range(20):
            await supervisor.run(Task("work"))
        await supervisor.submit(Task("work", deadline=Deadline.within(0.1)))  # one in a while goes past the estimate
        ticket = await supervisor.submit(Task("work", deadline=Deadline.within(0.1)))
        assert ticket.verdict is Verdict.REJECTED
        assert (await supervisor.demand(["work"])).refused == 0


@pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own
@virtual
async def test_the_overflow_says_what_waits_there_and_what_others_run(tmp_path: Path) -> None:
    store = open_task_store(f"sqlite:///{tmp_path}/spill.db?fsync=no")
    async with supervisor_of(Agent(seconds=10.0), slots=3, overflow=store, max_queue_size=0) as supervisor:
        for number in range(10):
            await supervisor.submit(Task("work", number))
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.spilled, demand.elsewhere) == (3, 7, 0)
        (lease,) = await store.lease("work", 1, until=1e12)  # as another process does
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.spilled, demand.elsewhere) == (3, 6, 1)
        await store.release([lease])


@pytest.mark.blocks
@virtual
async def test_what_this_process_has_taken_from_the_overflow_is_not_elsewhere(tmp_path: Path) -> None:
    overflow = f"sqlite:///{tmp_path}/spill.db?fsync=no"
    async with supervisor_of(Agent(seconds=10.0), slots=3, overflow=overflow, max_queue_size=0) as supervisor:
        for number in range(10):
            await supervisor.submit(Task("work", number))
        await asyncio.sleep(15.0)
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.elsewhere) == (3, 0)
        assert demand.running + demand.spilled + demand.queued == 7


@virtual
async def test_an_overflow_in_memory_is_for_nobody_else() -> None:
    async with supervisor_of(Agent(seconds=10.0), overflow="memory://", max_queue_size=0) as supervisor:
        for number in range(10):
            await supervisor.submit(Task("work", number))
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.spilled, demand.elsewhere) == (2, 8, None)


def bounded(most: int) -> dict[str, Tenant]:
    return {"small": Tenant(max_running=most)}


@pytest.mark.parametrize("room", [1, 1000])  # most of them are in the overflow, or in the queue
@virtual
async def test_of_a_tenant_no_more_tasks_ask_for_slots_than_its_bound_lets_begin(room: int) -> None:
    settings: dict[str, Any] = {"max_queue_size": room, "tenants": bounded(3), "overflow": "memory://"}
    async with supervisor_of(Agent(seconds=10.0), **settings) as supervisor:
        for number in range(100):
            await supervisor.submit(Task("work", number, tenant="small"))
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.queued + demand.spilled) == (2, 1)  # three of its tasks may run
        for number in range(10):
            await supervisor.submit(Task("work", number, tenant="other"))
        demand = await supervisor.demand(["work"])
        assert (demand.running, demand.queued + demand.spilled) == (2, 11)


@pytest.mark.parametrize("room", [5, 1000])
@virtual
async def test_no_slot_is_added_for_the_tasks_of_a_tenant_that_has_its_bound(room: int) -> None:
    settings: dict[str, Any] = {"max_queue_size": room, "tenants": bounded(3), "overflow": "memory://"}
    async with supervisor_of(Agent(seconds=10.0), slots=5, **settings) as supervisor:
        worker = supervisor.workers["worker"]
        async with Autoscaler(supervisor, WorkerTarget(worker), task_types=["work"], maximum=40, service=10.0):
            for number in range(500):
                await supervisor.submit(Task("work", number, tenant="small"))
            await asyncio.sleep(60.0)
            assert worker.max_concurrent == 5


@virtual
async def test_no_slot_is_added_for_tasks_of_a_paused_type() -> None:
    async with supervisor_of(Agent(seconds=10.0), max_queue_size=5, overflow="memory://") as supervisor:
        worker = supervisor.workers["worker"]
        supervisor.pause("work")
        async with Autoscaler(supervisor, WorkerTarget(worker), task_types=["work"], maximum=40, service=10.0):
            for number in range(300):
                await supervisor.submit(Task("work", number))
            await asyncio.sleep(60.0)
            demand = await supervisor.demand(["work"])
            assert demand.paused == demand.spilled > 200  # which other processes may begin
            assert worker.max_concurrent == 2
            supervisor.resume("work")
            await asyncio.sleep(60.0)
            assert worker.max_concurrent > 20


# --- the bottleneck ---------------------------------------------------------------------------------------------------


async def call_once(key: Upstream, seconds: float) -> None:
    async with key.call():
        await asyncio.sleep(seconds)


@virtual
async def test_a_quota_that_keeps_runs_from_starting_is_named() -> None:
    key = Upstream("openai", quotas=[Quota(requests=6, per="minute")], max_wait=1000.0)

    async def handler(_: Task) -> None:
        await call_once(key, 1.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=4, upstreams=[key])
        assert (await supervisor.demand(["work"])).limited_by is None
        flood(supervisor, "work", 60)
        await asyncio.sleep(30.0)
        limited_by = (await supervisor.demand(["work"])).limited_by
        assert limited_by is not None
        assert limited_by.startswith("upstream:openai:")
        assert "requests" in limited_by


@virtual
async def test_a_worker_that_fails_is_named() -> None:
    async def handler(_: Task) -> None:
        message = "it is broken"
        raise OSError(message)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], reset_timeout=None)
        flood(supervisor, "work", 10)
        await asyncio.sleep(1.0)
        assert (await supervisor.demand(["work"])).limited_by in {"worker:worker", None}
        supervisor.submit_nowait(Task("work"))
        queued = await supervisor.demand(["work"])
        assert queued.slots == 0


# --- a worker as the target -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def scaled(
    handler: Any, *, maximum: int = 40, upstreams: Any = (), **settings: Any
) -> AsyncIterator[tuple[BackpressureSupervisor, Autoscaler, list[Scaled]]]:
    """Run a supervisor with one worker of two slots, and its autoscaler."""
    events: list[Scaled] = []

    def keep(event: Any) -> None:
        if isinstance(event, Scaled):
            events.append(event)

    async with BackpressureSupervisor(max_queue_size=10_000, on_event=keep) as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=handler, task_types=["work"], max_concurrent=2, upstreams=upstreams
        )
        async with Autoscaler(
            supervisor, WorkerTarget(worker), task_types=["work"], maximum=maximum, **settings
        ) as scaler:
            yield supervisor, scaler, events


async def offer(supervisor: BackpressureSupervisor, per_second: float, seconds: float) -> None:
    """Submit tasks at a rate."""
    for _ in range(round(per_second * seconds)):
        supervisor.submit_nowait(Task("work"))
        await asyncio.sleep(1 / per_second)


@virtual
async def test_a_worker_grows_with_a_surge_and_shrinks_after_it() -> None:
    agent = Agent(seconds=2.0)
    async with scaled(agent) as (supervisor, scaler, events):
        worker = supervisor.workers["worker"]
        await offer(supervisor, 0.5, 60.0)
        assert worker.max_concurrent <= 3
        surge = now()
        await offer(supervisor, 5.0, 60.0)
        assert worker.max_concurrent >= 10  # 5 a second, for 2 seconds each
        assert next(event.at for event in events if event.after >= 10) - surge < 20.0
        await offer(supervisor, 0.5, 700.0)
        assert worker.max_concurrent <= 3
        assert scaler.statistics().reversals == 1
        assert all(event.target == "worker:worker" for event in events)
        submitted = supervisor.statistics().submitted
    assert supervisor.statistics().succeeded == submitted == len(agent.finished)


@virtual
async def test_fewer_slots_end_no_run() -> None:
    agent = Agent(seconds=200.0)
    async with scaled(agent, stabilization=10.0, window=10.0) as (supervisor, _, _):
        tickets = flood(supervisor, "work", 20)
        await asyncio.sleep(30.0)
        worker = supervisor.workers["worker"]
        assert worker.max_concurrent >= 20
        worker.resize(40)
        await asyncio.sleep(100.0)
        assert worker.max_concurrent < 40
        for ticket in tickets:
            assert (await ticket).success


def paying_worker(key: Upstream) -> Any:
    async def handler(_: Task) -> None:
        await call_once(key, 1.0)

    return handler


@virtual
async def test_no_slot_is_added_while_a_quota_is_the_bottleneck() -> None:
    key = Upstream("openai", quotas=[Quota(requests=60, per="minute")], max_wait=1e6, max_concurrent=1000)
    await asyncio.gather(*(call_once(key, 1.0) for _ in range(60)))  # what a minute allows at once
    async with scaled(paying_worker(key), upstreams=[key]) as (supervisor, scaler, events):
        flood(supervisor, "work", 1000)
        await asyncio.sleep(600.0)
        assert not events
        statistics = scaler.statistics()
        assert statistics.limited_by is not None
        assert statistics.limited_by.startswith("upstream:openai:")
        assert statistics.wanted > 10
        assert statistics.current == 2
        assert statistics.unbought_seconds > 10_000.0
        await supervisor.close()


@virtual
async def test_without_a_quota_the_same_load_has_slots_added() -> None:
    """The negative control."""
    key = Upstream("openai", max_concurrent=1000)
    async with scaled(paying_worker(key), upstreams=[key]) as (supervisor, scaler, _):
        flood(supervisor, "work", 2000)
        await asyncio.sleep(60.0)
        assert supervisor.workers["worker"].max_concurrent == 40
        assert scaler.statistics().limited_by is None


@virtual
async def test_no_slot_is_added_while_a_budget_is_used_up() -> None:
    million = {"m": Price(input=1_000_000, output=0)}
    key = Upstream("openai", budget=Budget(usd=10, per="day"), prices=million, max_wait=1e6)

    async def handler(_: Task) -> None:
        async with key.call("m", input_tokens=1):
            await asyncio.sleep(1.0)

    async with scaled(handler, upstreams=[(key, "m")]) as (supervisor, scaler, events):
        flood(supervisor, "work", 12)
        await asyncio.sleep(60.0)
        spent = now()
        for _ in range(60):
            supervisor.submit_nowait(Task("work"))
            await asyncio.sleep(2.0)
        assert scaler.statistics().limited_by == "upstream:openai:m:budget"
        assert not [event for event in events if event.at > spent and event.after > event.before]
        await supervisor.close()


@virtual
async def test_no_slot_is_added_while_a_breaker_is_open() -> None:
    key = Upstream(
        "tool", breaker=BreakerRules(reset_timeout=600.0, max_reset_timeout=600.0), max_concurrent=1000, max_wait=1e6
    )

    async def handler(_: Task) -> None:
        async with key.call():
            await asyncio.sleep(1.0)
            message = "the tool is broken"
            raise ConnectionError(message)

    async with scaled(handler, upstreams=[key]) as (supervisor, scaler, events):
        flood(supervisor, "work", 20)
        await asyncio.sleep(60.0)
        assert key.statistics().accounts[0].breaker == "open"
        broken = now()
        for _ in range(60):
            supervisor.submit_nowait(Task("work"))
            await asyncio.sleep(2.0)
        assert scaler.statistics().limited_by == "upstream:tool:breaker"
        assert not [event for event in events if event.at > broken and event.after > event.before]
