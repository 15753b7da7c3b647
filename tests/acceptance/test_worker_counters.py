"""The counters of each worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.task_plane import Agent, UncancellableHandler, flood, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Retry, Task
from forebay.supervisor import WorkerStatistics
from forebay.testing import FlakyHandler


def counters(supervisor: BackpressureSupervisor, name: str = "worker") -> WorkerStatistics:
    (found,) = [worker for worker in supervisor.statistics().workers if worker.name == name]
    return found


def ends(worker: WorkerStatistics) -> tuple[int, int, int, int, int, int]:
    return worker.started, worker.succeeded, worker.failed, worker.timed_out, worker.cancelled, worker.expired


@virtual
async def test_each_attempt_counts_once_by_its_end() -> None:
    async def handler(task: Task) -> None:
        if task.payload == "fails":
            raise ValueError
        await asyncio.sleep(task.payload)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=9)
        supervisor.register_worker("idle", handler=handler, task_types=["idle"])
        tasks = [
            Task("work", 1.0),
            Task("work", 2.0),
            Task("work", "fails"),
            Task("work", 9.0, timeout=3.0),
            Task("work", 9.0, deadline=Deadline.within(4.0)),
            Task("work", 5.0),
        ]
        tickets = [await supervisor.submit(task) for task in tasks]
        await asyncio.sleep(0.5)
        assert ends(counters(supervisor)) == (6, 0, 1, 0, 0, 0)
        tickets[-1].cancel()
        for ticket in tickets:
            await ticket
        assert ends(counters(supervisor)) == (6, 2, 1, 1, 1, 1)
        assert counters(supervisor).busy_seconds == pytest.approx(1.0 + 2.0 + 0.0 + 3.0 + 4.0 + 0.5)
        assert ends(counters(supervisor, "idle")) == (0, 0, 0, 0, 0, 0)
        assert counters(supervisor, "idle").busy_seconds == 0.0
    assert ends(counters(supervisor)) == (6, 2, 1, 1, 1, 1)
    async with supervisor:
        assert ends(counters(supervisor)) == (0, 0, 0, 0, 0, 0)
        assert counters(supervisor).busy_seconds == 0.0


@virtual
async def test_a_retried_task_counts_each_attempt_and_the_supervisor_the_task() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker(
            "worker", handler=FlakyHandler(2), task_types=["work"], retry=Retry(max_attempts=3, base_delay=0.1)
        )
        await supervisor.run(Task("work"))
        assert ends(counters(supervisor)) == (3, 1, 2, 0, 0, 0)
        statistics = supervisor.statistics()
        assert (statistics.started, statistics.succeeded, statistics.failed) == (3, 1, 0)


@virtual
async def test_slots_that_are_taken_now_are_busy_and_those_that_are_lent_are_not() -> None:
    async def outer(_: Task) -> Any:
        await asyncio.sleep(1.0)
        return await supervisor.run(Task("inner", 10.0))

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("outer", handler=outer, task_types=["outer"])
        supervisor.register_worker("inner", handler=Agent(10.0), task_types=["inner"])
        ticket = await supervisor.submit(Task("outer"))
        await asyncio.sleep(6.0)
        assert counters(supervisor, "outer").busy_seconds == pytest.approx(1.0)
        assert counters(supervisor, "inner").busy_seconds == pytest.approx(5.0)
        await ticket
        assert counters(supervisor, "outer").busy_seconds == pytest.approx(1.0)
        assert counters(supervisor, "inner").busy_seconds == pytest.approx(10.0)


@virtual
async def test_a_zombie_is_busy_until_it_ends_also_after_the_close() -> None:
    supervisor = BackpressureSupervisor(zombie_grace=1.0)
    supervisor.register_worker("worker", handler=UncancellableHandler(20.0), task_types=["work"], timeout=2.0)
    await supervisor.start()
    flood(supervisor, "work", 1)
    await asyncio.sleep(2.5)
    assert (counters(supervisor).zombies, counters(supervisor).zombies_found) == (1, 0)
    await asyncio.sleep(1.0)
    assert (counters(supervisor).zombies, counters(supervisor).zombies_found) == (1, 1)
    assert counters(supervisor).busy_seconds == pytest.approx(3.5)
    await supervisor.close()
    await asyncio.sleep(30.0)
    assert (counters(supervisor).zombies, counters(supervisor).zombies_found) == (0, 1)
    assert counters(supervisor).busy_seconds == pytest.approx(20.0)


@virtual
async def test_the_counters_of_the_workers_add_up_to_those_of_the_supervisor() -> None:
    async with BackpressureSupervisor(max_queue_size=1000) as supervisor:
        for name in ("a", "b", "c"):
            supervisor.register_worker(name, handler=Agent(0.5), task_types=["work"], max_concurrent=3)
        for ticket in flood(supervisor, "work", 100):
            await ticket
        await run_ready()
        statistics = supervisor.statistics()
        assert sum(worker.started for worker in statistics.workers) == statistics.started == 100
        assert sum(worker.succeeded for worker in statistics.workers) == statistics.succeeded == 100
        assert sum(worker.busy_seconds for worker in statistics.workers) == pytest.approx(50.0)


def test_a_supervisor_that_has_not_started_has_counted_nothing() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    assert ends(counters(supervisor)) == (0, 0, 0, 0, 0, 0)


@virtual
async def test_the_tasks_of_each_type_are_counted() -> None:
    async def handler(task: Task) -> None:
        await asyncio.sleep(1.0)
        if task.task_type == "fail":
            raise ValueError

    async with BackpressureSupervisor(max_queue_size=1, backpressure_threshold=1.0) as supervisor:
        supervisor.register_worker("both", handler=handler, task_types=["work", "fail"])
        supervisor.register_worker("idle", handler=handler, task_types=["idle"])
        tickets = [supervisor.submit_nowait(Task(kind)) for kind in ("work", "fail", "work", "work")]
        waiting = {each.task_type: each.waiting for each in supervisor.statistics().task_types}
        for ticket in tickets:
            if ticket:
                await ticket
        statistics = supervisor.statistics()
    work, fail, idle = (
        next(each for each in statistics.task_types if each.task_type == kind) for kind in ("work", "fail", "idle")
    )
    rejected = sum(not ticket for ticket in tickets)
    assert (waiting["idle"], sum(waiting.values())) == (0, statistics.admitted - 1)
    assert (work.submitted, work.admitted, work.rejected) == (3, 3 - work.rejected, work.rejected)
    assert (work.started, work.succeeded) == (work.admitted, work.admitted)
    assert (fail.submitted, fail.failed) == (1, fail.admitted)
    assert work.rejected + fail.rejected == rejected == statistics.rejected
    assert idle.submitted == 0
