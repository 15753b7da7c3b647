"""The task store on SQS, whose process dies between any two of its calls on the index and on the queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.support.leases import after_failure
from tests.support.simulated_queues import SimulatedQueues

pytest.importorskip("botocore")

from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskRecord
from forebay.overflow import MemoryTaskStore
from forebay.overflow.sqs import SqsTaskStore
from forebay.task import Priority

DONE = Completion(status="succeeded", finished_at=1e9)
FAILED = Completion(status="failed", finished_at=1e9)
LATE = 1e12  # when every lease has lapsed


class LastingIndex(MemoryTaskStore):
    """An index that outlives the processes that use it."""

    durable = True


class Calls:
    """Counts the calls of one process on the index and the queues, and lets it die at one of them.

    Args:
        inner: the index or the queues.
        process: what they have in common.
    """

    def __init__(self, inner: Any, process: Process) -> None:
        self._inner = inner
        self._process = process

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value) or name in {"open", "close", "hide_blocking", "renew"}:
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._process.before()
            result = await value(*args, **kwargs)
            self._process.after()
            return result

        return call


@dataclass
class Process:
    """A process that uses the store, and what it was told.

    Attributes:
        dies_at: the number of the call at which it dies.
        answered: True if that call is made, and its answer lost; False if it is not made.
        stored: task ids whose `put` was acknowledged.
        completed: ends that were acknowledged, by task id.
    """

    index: LastingIndex
    queues: SimulatedQueues
    dies_at: int | None = None
    answered: bool = False
    calls: int = 0
    is_dead: bool = False
    stored: set[str] = field(default_factory=set)
    completed: Counter[str] = field(default_factory=Counter)

    def before(self) -> None:
        if self.calls == self.dies_at and not self.answered:
            self.is_dead = True
        self._check()

    def after(self) -> None:
        if self.calls == self.dies_at:
            self.is_dead = True
        self.calls += 1
        self._check()

    def _check(self) -> None:
        if self.is_dead:
            raise StoreUnavailable(where="the test", why="the process has died", advice="Start another.")

    def store(self) -> SqsTaskStore:
        queues: Any = Calls(self.queues, self)
        return SqsTaskStore(queues, Calls(self.index, self))

    async def put(self, store: SqsTaskStore, task: TaskRecord, **lease: Any) -> None:
        if (await store.put(task, **lease)).written:
            self.stored.add(task.task_id)

    async def finish(self, store: SqsTaskStore, lease: Lease) -> None:
        assert lease.record.envelope == f"envelope of {lease.record.task_id}".encode()
        self.completed[lease.record.task_id] += await store.finish(lease.record.task_id, DONE, fence=lease.fence)


def record(task_id: str, *, thread: str | None = None, key: str | None = None) -> TaskRecord:
    return TaskRecord(
        task_id=task_id,
        task_type="t",
        priority=Priority.NORMAL,
        envelope=f"envelope of {task_id}".encode(),
        enqueued_at=1.0,
        thread_id=thread,
        key=key,
    )


async def put(process: Process, store: SqsTaskStore) -> None:
    await process.put(store, record("a", key="k"))
    await process.put(store, record("b"))


async def put_conversation(process: Process, store: SqsTaskStore) -> None:
    await process.put(store, record("a", thread="t"))
    await process.put(store, record("b", thread="t"))
    await process.put(store, record("c", thread="t"), fence="mine", until=50.0)


async def put_leased(process: Process, store: SqsTaskStore) -> None:
    await process.put(store, record("a"), fence="mine", until=50.0)
    process.completed["a"] += await store.finish("a", DONE, fence="mine")


async def lease_and_finish(process: Process, store: SqsTaskStore) -> None:
    await put(process, store)
    for lease in await store.lease("t", 9, until=50.0):
        await store.begin_attempt(lease)
        await process.finish(store, lease)


async def release(process: Process, store: SqsTaskStore) -> None:
    await put_conversation(process, store)
    await store.release(await store.lease("t", 9, until=50.0))
    await lease_and_finish(process, store)


async def delay_and_wake(process: Process, store: SqsTaskStore) -> None:
    await put(process, store)
    for lease in await store.lease("t", 9, until=50.0):
        await store.delay(after_failure(lease), due=5.0)
    await store.wake(now=6.0)
    for lease in await store.lease("t", 9, until=50.0):
        await process.finish(store, lease)


async def die_and_requeue(process: Process, store: SqsTaskStore) -> None:
    await put(process, store)
    for lease in await store.lease("t", 9, until=50.0):
        await store.mark_dead(lease, FAILED)
    for task_id in ("a", "b"):
        await store.requeue(task_id)
    for lease in await store.lease("t", 9, until=50.0):
        await process.finish(store, lease)


async def reap_dead(process: Process, store: SqsTaskStore) -> None:
    await put(process, store)
    for lease in await store.lease("t", 9, until=50.0):
        await store.begin_attempt(lease)
    await store.reap(now=60.0, max_attempts=1)


SCENARIOS: list[Callable[[Process, SqsTaskStore], Coroutine[Any, Any, None]]] = [
    put,
    put_conversation,
    put_leased,
    lease_and_finish,
    release,
    delay_and_wake,
    die_and_requeue,
    reap_dead,
]


async def recover(process: Process, store: SqsTaskStore) -> None:
    """Run everything that another process has left, over hours in which every message is seen again."""
    for _ in range(12):
        process.queues.now += 3600.0
        await store.reap(now=LATE, max_attempts=9)
        await store.wake(now=LATE)
        for dead in await store.list_records(RecordState.DEAD, 99):
            found = await store.find(dead.record.task_id)
            if found is not None and found[1].envelope:
                assert await store.requeue(dead.record.task_id) in (PutResult.STORED, PutResult.DUPLICATE)
        for lease in await store.lease("t", 99, until=LATE + 1):
            await process.finish(store, lease)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("answered", [False, True], ids=["before a call", "after it"])
async def test_nothing_acknowledged_is_lost_or_completed_twice_wherever_a_process_dies(
    scenario: Callable[[Process, SqsTaskStore], Coroutine[Any, Any, None]],
    answered: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forebay.overflow.sqs._CLEANUP_INTERVAL", 0.0)
    monkeypatch.setattr("forebay.overflow.sqs._YOUNG", 0.0)  # no other process is writing
    dies_at, is_over = 0, False
    while not is_over:
        index, queues = LastingIndex(), SimulatedQueues()
        process = Process(index, queues, dies_at=dies_at, answered=answered)
        store = process.store()
        await store.open()
        try:
            await scenario(process, store)
            is_over = not process.is_dead
        except StoreUnavailable:
            assert process.is_dead
        process.is_dead = True  # nothing that it left running may write
        await store.close()

        other = Process(index, queues)
        again = other.store()
        await again.open()
        await recover(other, again)
        for task_id in process.stored:
            found = await again.find(task_id)
            assert found is not None, (dies_at, task_id)
            assert found[0] is RecordState.DONE, (dies_at, task_id)
        assert max((process.completed + other.completed).values(), default=1) == 1, dies_at
        assert process.stored <= set(process.completed + other.completed) | lost_answers(process), dies_at
        assert await index.depths() == {}, dies_at
        assert await index.conversations() == {}, dies_at
        assert queues.messages == [], dies_at
        await again.close()
        dies_at += 1
    assert dies_at > 4


def lost_answers(process: Process) -> set[str]:
    """Return the tasks whose end may have been written without an answer: those that no process has completed."""
    return process.stored if process.answered and process.dies_at is not None else set()
