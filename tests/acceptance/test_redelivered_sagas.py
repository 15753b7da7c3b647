"""Durable tasks whose process was lost once their saga had ended, and before the task's result was stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.task_plane import find_result, virtual

from forebay import BackpressureSupervisor, Retry, Task, TaskStatus, clock
from forebay.interfaces import TaskRecord
from forebay.overflow import SqliteTaskStore, encode_task
from forebay.saga import MemorySagaLog, SagaRun, SagaState, saga
from forebay.saga.records import CompensatedEntry, LogWrite, SagaHeader, encode_entry

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

LEASE = 3.0


async def leave_task(path: Path, task: Task, at: float) -> None:
    """Store a durable task that a process which was lost has begun."""
    store = SqliteTaskStore(path)
    await store.open()
    envelope = encode_task(task, None, bound=1_000)
    record = TaskRecord(
        task_id="t", task_type="work", priority=task.priority, envelope=envelope, enqueued_at=at, attempts=1
    )
    await store.put(record, fence="theirs", until=at + LEASE)
    await store.close()


async def leave_undone_saga(log: MemorySagaLog, task: Task, at: float) -> None:
    """Store the saga of the task: it was undone."""
    envelope = encode_task(task, None, bound=1_000)
    header = SagaHeader(saga_id="t", name="works", version="", envelope=envelope, submission=at)
    await log.begin(header, b"", fence="theirs", until=at + LEASE, now=at)
    entry = encode_entry(CompensatedEntry(at=at))
    assert await log.append("t", LogWrite(0, [entry], SagaState.COMPENSATED, "no money"), fence="theirs", now=at)


@virtual
@pytest.mark.parametrize(
    ("retry", "status", "calls"),
    [(None, TaskStatus.FAILED, 0), (Retry(max_attempts=5, base_delay=0.1), TaskStatus.SUCCEEDED, 1)],
)
async def test_a_task_that_is_delivered_again_has_the_outcome_of_its_saga(
    retry: Retry | None, status: TaskStatus, calls: int, tmp_path: Path
) -> None:
    """With a policy of retries it may have failed before, and been tried again: a new round is its next attempt."""
    done = 0

    async def work() -> None:
        nonlocal done
        done += 1

    @saga("works")
    async def definition(run: SagaRun, _: object) -> None:
        await run.step("work", work)

    log, path, at = MemorySagaLog(), tmp_path / "store.db", clock.wall_time()
    task = Task("work", task_id="t", durable=True, retry=retry)
    await leave_task(path, task, at)
    await leave_undone_saga(log, task, at)
    supervisor = BackpressureSupervisor(saga_log=log, overflow=f"sqlite:///{path}?fsync=no", lease=LEASE)
    supervisor.register_worker("worker", handler=definition, task_types=["work"])
    async with supervisor:
        result = await find_result(supervisor, "t")
    assert (result.status, done) == (status, calls)
