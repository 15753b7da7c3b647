"""Load sources: what the calls of runs use counts in admission and in the start of runs."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, flood, now, virtual

from forebay import (
    BackpressureSupervisor,
    Budget,
    Overloaded,
    Price,
    Priority,
    Quota,
    Task,
    TaskFailed,
    TaskStatus,
    Upstream,
    Verdict,
    WorkerState,
    context,
)
from forebay.testing import EventRecord


class Key:
    """A load source whose readings are set by the test."""

    def __init__(self, name: str = "upstream:key") -> None:
        self.name = name
        self.reading = 0.0
        self.lasts = (0.0, 1.0)  # seconds until there is room again, and between two calls then
        self.open = True
        self.queued = False
        self.seconds = 10.0
        self.held: dict[object, int] = {}
        self.awaited = 0
        self.looked = 0
        self.callbacks: dict[object, Callable[[], None]] = {}

    @property
    def accounts(self) -> tuple[Key]:
        return (self,)

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:  # noqa: ARG002 - see Source
        return self.reading, "requests"

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:  # noqa: ARG002 - see Source
        seconds, each = self.lasts
        return (seconds if self.reading >= load else 0.0), each

    def blocks(self, priority: Priority) -> bool:
        return self.queued and priority is not Priority.CRITICAL

    def may_start(self, priority: Priority) -> bool:
        self.looked += 1
        return self.open or priority is Priority.CRITICAL

    def typical_latency(self) -> float:
        return self.seconds

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:  # noqa: ARG002 - see Source
        if runs:
            self.held[holder] = runs
        else:
            self.held.pop(holder, None)

    def add_expected_calls(self, runs: int) -> None:
        self.awaited += runs

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        self.callbacks[holder] = callback

    def forget(self, holder: object) -> None:
        del self.callbacks[holder]

    def relieve(self) -> None:
        self.open = True
        for callback in list(self.callbacks.values()):
            callback()


class CallingAgent(Agent):
    """An agent whose every run calls a source."""

    def __init__(self, key: Key, seconds: float = 1.0) -> None:
        super().__init__(seconds)
        self.key = key

    async def __call__(self, task: Task) -> Any:
        running = context.call_observer()
        assert running is not None
        running.record_call(self.key)
        return await super().__call__(task)


def make_supervisor(agent: Agent, *, slots: int = 4, **settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**settings)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


@virtual
async def test_a_loaded_source_rejects_a_task_although_slots_are_free() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        key.reading = 0.85
        ticket = supervisor.submit_nowait(Task("work"))
        assert ticket.verdict is Verdict.REJECTED
        assert (ticket.limited_by, ticket.load) == ("upstream:key", 0.85)
        assert supervisor.submit_nowait(Task("work", priority=Priority.HIGH))
        assert supervisor.system_load() == 0.85
        assert [reading.load for reading in supervisor.readings() if reading.resource == "upstream:key"] == [0.85]
        key.reading = 0.0
        assert await supervisor.run(Task("work", "now")) == "now"


@virtual
async def test_a_worker_without_sources_keeps_admission_open() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key), slots=1) as supervisor:
        await supervisor.run(Task("work"))
        supervisor.register_worker("local", handler=Agent(), task_types=["work"], max_concurrent=1)
        key.reading = 2.0
        assert supervisor.submit_nowait(Task("work"))


@virtual
async def test_runs_wait_in_the_queue_while_the_next_call_would_wait_long() -> None:
    key = Key()
    agent = CallingAgent(key)
    async with make_supervisor(agent) as supervisor:
        await supervisor.run(Task("work", "first"))
        key.open = False
        started = now()
        tickets = flood(supervisor, "work", 3)
        await asyncio.sleep(0.5)
        assert agent.running == 0
        assert sum(key.held.values()) == 3
        await asyncio.sleep(4.5)
        key.relieve()
        await asyncio.gather(*(ticket.value() for ticket in tickets))
        assert now() - started == approximately(6.0)
        assert not key.held


@virtual
async def test_no_run_starts_past_queued_calls_except_of_a_priority_without_any() -> None:
    key = Key()
    agent = CallingAgent(key, seconds=1000.0)
    async with make_supervisor(agent) as supervisor:
        tickets = flood(supervisor, "work", 1)
        await asyncio.sleep(0.5)
        key.open, key.queued = False, True
        tickets += flood(supervisor, "work", 3)
        await asyncio.sleep(60.0)
        assert agent.running == 1
        key.queued = False  # now it is an estimate, which must not lock the start gate
        await asyncio.sleep(11.0)
        assert agent.running == 2
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_a_source_of_short_calls_that_blocks_for_long_is_asked_again_periodically() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        key.open, key.queued, key.seconds = False, True, 0.001
        ticket = supervisor.submit_nowait(Task("work"))
        looked = key.looked
        await asyncio.sleep(100.0)
        assert key.looked - looked <= 400
        key.open = True
        await asyncio.sleep(2.0)
        assert ticket.status is TaskStatus.SUCCEEDED


@virtual
async def test_a_better_run_that_is_held_back_is_not_overtaken_by_a_later_one() -> None:
    class KeyWithoutCritical(Key):
        def may_start(self, priority: Priority) -> bool:
            return self.open or priority is not Priority.CRITICAL

    key = KeyWithoutCritical()
    agent = CallingAgent(key)
    async with make_supervisor(agent) as supervisor:
        await supervisor.run(Task("work", priority=Priority.CRITICAL))
        key.open = False
        with EventRecord(supervisor) as record:
            tickets = [
                await supervisor.submit(Task("work", priority=priority))
                for priority in (Priority.CRITICAL, Priority.HIGH)
            ]
            key.relieve()
            for ticket in tickets:
                await ticket
        assert record.started == [ticket.task_id for ticket in tickets]


@virtual
async def test_refilled_tasks_wait_for_the_source_too() -> None:
    key = Key()
    agent = CallingAgent(key)
    async with make_supervisor(agent, overflow="memory://", max_queue_size=1) as supervisor:
        await supervisor.run(Task("work"))
        tickets = [await supervisor.submit(Task("work", number)) for number in range(6)]
        assert [ticket.verdict for ticket in tickets] == 4 * [Verdict.ADMITTED] + 2 * [Verdict.SPILLED]
        key.open = False
        await asyncio.sleep(2.0)  # by now there is room for them
        assert agent.running == 0
        key.relieve()
        for ticket in tickets:
            assert (await ticket).success
        assert now() == approximately(4.0)


@virtual
async def test_a_task_that_waited_for_its_thread_waits_for_the_source_too() -> None:
    key = Key()
    agent = CallingAgent(key)
    async with make_supervisor(agent) as supervisor:
        await supervisor.run(Task("work"))
        tickets = flood(supervisor, "work", 2, thread_id="talk")
        await asyncio.sleep(0.5)
        key.open = False
        await asyncio.sleep(1.0)
        assert agent.running == 0
        key.relieve()
        for ticket in tickets:
            assert (await ticket).success


@pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own
@virtual
async def test_a_run_counts_as_an_expected_call_before_its_start_is_on_record(tmp_path: Path) -> None:
    class KeyForOneCall(Key):
        def may_start(self, priority: Priority) -> bool:
            return super().may_start(priority) and not self.awaited

    key = KeyForOneCall()
    agent = CallingAgent(key)
    async with make_supervisor(agent, overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        await supervisor.run(Task("work"))
        key.open = False
        tickets = [await supervisor.submit(Task("work", number, durable=True)) for number in range(4)]
        key.relieve()
        await asyncio.sleep(0.5)
        assert agent.running == 1
        for ticket in tickets:
            assert (await ticket).success


@virtual
async def test_a_queue_that_is_full_because_of_a_source_names_the_source() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key), max_queue_size=10) as supervisor:
        await supervisor.run(Task("work"))
        full = flood(supervisor, "work", 20)[-1]
        assert full.limited_by == supervisor.statistics().limited_by == "pool:work"
        key.open = False
        held = supervisor.submit_nowait(Task("work"))
        assert (held.verdict, held.load) == (Verdict.REJECTED, full.load)
        assert held.limited_by == supervisor.statistics().limited_by == "upstream:key"
        assert "because of upstream:key" in (held.reason or "")
        supervisor.register_worker("local", handler=Agent(), task_types=["work"])
        assert supervisor.statistics().limited_by == "pool:work", "a worker without sources could start more"
        key.relieve()


@virtual
async def test_one_run_of_each_priority_starts_in_every_typical_latency_under_any_load() -> None:
    key = Key()
    agent = CallingAgent(key)
    async with make_supervisor(agent) as supervisor:
        await supervisor.run(Task("work", "first"))  # at 0, so the next may start at 10
        key.open = False
        started = now() - 1.0
        low = supervisor.submit_nowait(Task("work", "low", priority=Priority.LOW))  # the first of its priority
        tickets = flood(supervisor, "work", 2)
        ends = []
        for ticket in tickets:
            await ticket
            ends.append(now() - started)
        assert (await low).success
        assert ends == [approximately(11.0), approximately(21.0)]


@virtual
async def test_critical_runs_start_when_the_source_allows_it() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        key.open = False
        started = now()
        await asyncio.gather(*(supervisor.run(Task("work", priority=Priority.CRITICAL)) for _ in range(3)))
        assert now() - started == approximately(1.0)


@virtual
async def test_a_finally_rejected_call_ends_its_run_as_overloaded_even_if_the_exception_was_lost() -> None:
    key = Key()

    async def handler(task: Task) -> str:
        running = context.call_observer()
        assert running is not None
        running.record_rejection(key, Overloaded("the key is busy", limited_by="upstream:key", retry_after=3.0))
        if task.payload == "recovers":
            return "another way"
        raise ConnectionError

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        for _ in range(9):
            with pytest.raises(Overloaded, match="the key is busy"):
                await supervisor.run(Task("work", "fails"))
        assert worker.state is WorkerState.IDLE
        assert await supervisor.run(Task("work", "recovers")) == "another way"


@virtual
async def test_an_account_that_rejected_a_call_is_closed_to_the_run_until_its_retry_after() -> None:
    key = Key()
    left: list[tuple[float | None, int]] = []

    async def handler(task: Task) -> str:
        running = context.call_observer()
        assert running is not None
        running.record_rejection(key, Overloaded("the key is busy", limited_by="upstream:key", retry_after=3.0))
        for _ in range(task.payload):
            await asyncio.sleep(1.0)
            error = running.rejection_by(key)
            assert isinstance(error, Overloaded)
            try:
                raise error
            except Overloaded as raised:
                left.append((raised.retry_after, len(traceback.extract_tb(raised.__traceback__))))
        await asyncio.sleep(1.1)
        assert running.rejection_by(key) is None
        raise ValueError

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        with pytest.raises(TaskFailed, match="ValueError"):
            await supervisor.run(Task("work", 2))
    assert left == [(approximately(2.0), 1), (approximately(1.0), 1)]


@virtual
async def test_an_account_that_named_no_retry_after_stays_closed_to_the_run() -> None:
    key = Key()

    async def handler(_: Task) -> bool:
        running = context.call_observer()
        assert running is not None
        running.record_rejection(key, Overloaded("the key is busy"))
        await asyncio.sleep(1000.0)
        return running.rejection_by(key) is not None

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], timeout=2000.0)
        assert await supervisor.run(Task("work"))


@virtual
async def test_a_call_that_is_too_large_leaves_smaller_ones_to_its_run() -> None:
    by_quota = Upstream("quota", quotas=[Quota(input_tokens=1_000, per="minute")])
    by_budget = Upstream("budget", budget=Budget(usd=0.01), prices={"*": Price(input=1.0, output=1.0)})

    async def handler(task: Task) -> str:
        upstream = (by_quota, by_budget)[task.payload]
        with pytest.raises(Overloaded, match="ask for less"):
            await upstream.call("m", input_tokens=50_000, output_tokens=1).__aenter__()
        async with upstream.call("m", input_tokens=10, output_tokens=1):
            return "asked for less"

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        for place in range(2):
            assert await supervisor.run(Task("work", place)) == "asked for less"


@virtual
async def test_a_fault_of_an_upstream_does_not_count_against_the_worker() -> None:
    async def handler(_: Task) -> None:
        running = context.call_observer()
        assert running is not None
        running.record_upstream_fault()
        raise ConnectionError

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        for _ in range(9):
            assert (await supervisor.submit_nowait(Task("work"))).status is TaskStatus.FAILED
        assert worker.state is WorkerState.IDLE


@virtual
async def test_a_started_run_is_expected_to_call_until_it_does_or_ends() -> None:
    key = Key()
    calls = False

    async def handler(_: Task) -> None:
        running = context.call_observer()
        assert running is not None
        await asyncio.sleep(1.0)
        if calls:
            running.record_call(key)
            await asyncio.sleep(1.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=3)
        calls = True
        await supervisor.run(Task("work"))
        tickets = flood(supervisor, "work", 3)
        await asyncio.sleep(0.5)
        assert key.awaited == 3
        await asyncio.sleep(1.0)
        assert key.awaited == 0
        calls = False
        tickets += flood(supervisor, "work", 1)
        for ticket in tickets:
            await ticket
        assert key.awaited == 0


@virtual
async def test_a_closed_supervisor_stops_watching_its_sources() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        assert key.callbacks
    assert not key.callbacks
