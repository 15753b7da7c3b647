"""Leases on stored tasks: kept while their process lives, whatever its handlers do."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.task_plane import Agent, approximately, error_of, find_result, now, virtual

from forebay import BackpressureSupervisor, Deadline, Task, TaskStatus, WorkerState
from forebay.errors import StillSpilled, StoreUnavailable
from forebay.interfaces import Completion, DeadRecord, Lease
from forebay.overflow import SqliteTaskStore

pytestmark = pytest.mark.blocks

LEASE = 2.0  # seconds; a slow machine may delay its renewal, after a third of it, by as much as another second


class ReapCountingStore(SqliteTaskStore):
    """A store that counts the searches for lapsed leases, which a supervisor makes three times in each lease."""

    def __init__(self, path: Path, *, times: int) -> None:
        super().__init__(path)
        self.times = times
        self.looked = asyncio.Event()

    async def reap(self, *, now: float, max_attempts: int, latest: float = math.inf) -> Sequence[DeadRecord]:
        dead = await super().reap(now=now, max_attempts=max_attempts, latest=latest)
        self.times -= 1
        if not self.times:
            self.looked.set()
        return dead


async def test_a_handler_that_blocks_the_loop_past_its_lease_keeps_it(tmp_path: Path) -> None:
    """Test in real time: the heartbeat is a thread, and the other supervisor has an event loop of its own."""
    file = tmp_path / "spill.db"
    runs: list[str] = []
    started, resume = threading.Event(), threading.Event()

    async def blocks(_: Task) -> str:
        runs.append("blocks")
        started.set()
        assert resume.wait(30.0)  # the loop is blocked
        return "whole"

    async def steals(_: Task) -> None:
        runs.append("steals")

    async def other_process() -> None:
        store = ReapCountingStore(file, times=5)  # once when it opens, then until a third of a lease after its end
        async with BackpressureSupervisor(overflow=store, lease=LEASE) as second:
            second.register_worker("w", handler=steals, task_types=["work"])
            await store.looked.wait()

    def meanwhile() -> None:
        started.wait(30.0)
        asyncio.run(other_process())
        resume.set()

    thread = threading.Thread(target=meanwhile)
    thread.start()
    async with BackpressureSupervisor(overflow=f"sqlite:///{file}", lease=LEASE, lag_bound=None) as first:
        first.register_worker("w", handler=blocks, task_types=["work"])
        result = await (await first.submit(Task("work", durable=True)))
    thread.join()
    assert (result.result, result.attempts) == ("whole", 1)
    assert runs == ["blocks"]


class StuckStartStore(SqliteTaskStore):
    """A store that never records a start until told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.goes_on = asyncio.Event()

    async def begin_attempt(self, lease: Lease) -> bool:
        await self.goes_on.wait()
        return await super().begin_attempt(lease)


@virtual
async def test_a_deadline_ends_a_task_whose_start_the_store_does_not_record(tmp_path: Path) -> None:
    agent = Agent(1.0)
    store = StuckStartStore(tmp_path / "spill.db")
    supervisor = BackpressureSupervisor(overflow=store)
    supervisor.register_worker("ours", handler=agent, task_types=["work"])
    async with supervisor:
        ticket = await supervisor.submit(Task("work", durable=True, deadline=Deadline.within(5.0)))
        result = await ticket
        assert 5.0 <= now() < 5.5  # the store has recorded the end
        assert result.status is TaskStatus.EXPIRED
        store.goes_on.set()
        assert await supervisor.run(Task("work", "next", durable=True, deadline=Deadline.within(5.0))) == "next"
    assert [task.payload for task in agent.calls] == ["next"]


class SlowlyRecordingStore(SqliteTaskStore):
    """A store that takes longer to record a start than the task's timeout."""

    async def begin_attempt(self, lease: Lease) -> bool:
        await asyncio.sleep(5.0)
        return await super().begin_attempt(lease)


@virtual
async def test_the_timeout_of_a_worker_counts_from_the_start_of_the_handler(tmp_path: Path) -> None:
    agent = Agent(0.5)
    supervisor = BackpressureSupervisor(overflow=SlowlyRecordingStore(tmp_path / "store.db"))
    supervisor.register_worker("w", handler=agent, task_types=["work"], max_concurrent=10, timeout=1.0)
    async with supervisor:
        durable = [await supervisor.submit(Task("work", durable=True)) for _ in range(6)]
        plain = supervisor.submit_nowait(Task("work"))  # it sets the timer of the worker
        assert [(await ticket).status for ticket in (*durable, plain)] == [TaskStatus.SUCCEEDED] * 7


class SlowStartStore(SqliteTaskStore):
    """A store that takes a virtual second to record a start, and loses the lease before if told to."""

    loses = False

    async def begin_attempt(self, lease: Lease) -> bool:
        await asyncio.sleep(1.0)
        if self.loses:
            await self.release([lease])
            (theirs,) = await self.lease(lease.record.task_type, 1, until=lease.until + 1000.0)
            assert await super().begin_attempt(theirs)
            await self.finish(lease.record.task_id, THEIRS, fence=theirs.fence)
        return await super().begin_attempt(lease)


THEIRS = Completion(status="succeeded", worker_id="theirs", attempts=1, finished_at=0.0)


def supervisor_with_slow_store(
    path: Path, agent: Agent, *, loses: bool = False
) -> tuple[BackpressureSupervisor, SlowStartStore]:
    store = SlowStartStore(path / "spill.db")
    store.loses = loses
    supervisor = BackpressureSupervisor(overflow=store)
    supervisor.register_worker("ours", handler=agent, task_types=["work"], timeout=10.0)
    return supervisor, store


@virtual
async def test_a_start_is_on_record_before_its_handler_runs(tmp_path: Path) -> None:
    agent = Agent()
    supervisor, store = supervisor_with_slow_store(tmp_path, agent)
    async with supervisor:
        ticket = await supervisor.submit(Task("work", 1, durable=True))
        await asyncio.sleep(0.9)
        assert agent.started == []
        assert ticket.status is TaskStatus.RUNNING
        await asyncio.sleep(0.3)
        assert agent.started == [1]
        found = await store.find(ticket.task_id)
        assert found is not None
        assert found[1].attempts == 1
        assert (await ticket).duration_ms == approximately(1000.0)  # of the handler, not of the record


@virtual
async def test_a_task_whose_lease_was_lost_before_its_start_does_not_run_here(tmp_path: Path) -> None:
    agent = Agent()
    supervisor, _ = supervisor_with_slow_store(tmp_path, agent, loses=True)
    async with supervisor:
        result = await (await supervisor.submit(Task("work", 1, durable=True)))
        assert (result.worker_id, result.attempts) == ("theirs", 1)
        assert agent.started == []
        assert supervisor.workers["ours"].state is WorkerState.IDLE


@pytest.mark.parametrize("after", [0.5, 1.5])
@virtual
async def test_a_task_cancelled_while_its_start_is_recorded_returns_its_slot(tmp_path: Path, after: float) -> None:
    agent = Agent()
    supervisor, _ = supervisor_with_slow_store(tmp_path, agent)
    async with supervisor:
        ticket = await supervisor.submit(Task("work", 1, durable=True))
        await asyncio.sleep(after)
        assert ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        assert await supervisor.run(Task("work", 2, spill=False)) == 2
    assert agent.started == ([2] if after < 1.0 else [1, 2])


@virtual
async def test_closing_while_a_start_is_recorded_runs_nothing_and_loses_nothing(tmp_path: Path) -> None:
    agent = Agent()
    supervisor, _ = supervisor_with_slow_store(tmp_path, agent)
    async with supervisor:
        ticket = await supervisor.submit(Task("work", 1, durable=True))
        await asyncio.sleep(0.5)
        await supervisor.close()
        assert isinstance(await error_of(ticket), StillSpilled)
    assert agent.started == []
    supervisor, _ = supervisor_with_slow_store(tmp_path, agent)
    async with supervisor:
        assert (await find_result(supervisor, ticket.task_id)).success


class SlowReapStore(SqliteTaskStore):
    """A store that takes long to search for lapsed leases, once told to."""

    seconds = 0.0

    async def reap(self, *, now: float, max_attempts: int, latest: float = math.inf) -> Sequence[DeadRecord]:
        await asyncio.sleep(self.seconds)
        return await super().reap(now=now, max_attempts=max_attempts, latest=latest)


@virtual
async def test_a_supervisor_may_close_during_maintenance_of_its_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SlowReapStore(tmp_path / "spill.db")
    async with BackpressureSupervisor(overflow=store, lease=30.0, zombie_grace=1.0):
        store.seconds = 100.0
        await asyncio.sleep(11.0)
    await asyncio.sleep(200.0)
    assert caplog.records == []


class InterruptedStore(SqliteTaskStore):
    """A store that fails for everybody while `interrupted` is set, as when a process was stopped in its commit."""

    interrupted = False

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        self._check()
        return super().renew(leases, until=until)

    async def reap(self, *, now: float, max_attempts: int, latest: float = math.inf) -> Sequence[DeadRecord]:
        self._check()
        return await super().reap(now=now, max_attempts=max_attempts, latest=latest)

    def _check(self) -> None:
        if self.interrupted:
            raise StoreUnavailable(where="disk", why="a process was stopped", advice="Continue it.")


@virtual
async def test_after_an_interruption_of_the_store_no_process_takes_what_another_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [Agent(200.0), Agent(200.0)]
    supervisors = []
    for agent in agents:
        supervisor = BackpressureSupervisor(overflow=InterruptedStore(tmp_path / "store.db"))
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=2)
        await supervisor.start()
        supervisors.append(supervisor)
        await asyncio.sleep(5.0)  # so that one looks for lapsed leases before the other has renewed its own
    tickets = [await each.submit(Task("work", number, durable=True)) for number, each in enumerate(supervisors)]
    for _ in range(3):
        monkeypatch.setattr(InterruptedStore, "interrupted", True)
        await asyncio.sleep(45.0)  # longer than a lease
        monkeypatch.setattr(InterruptedStore, "interrupted", False)
        await asyncio.sleep(15.0)
    assert [agent.started for agent in agents] == [[0], [1]]
    assert all([(await ticket).success for ticket in tickets])
    for supervisor in supervisors:
        await supervisor.close()
