"""A task store with the faults of one process: slow, failing for a while, disconnected when the process crashes."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from forebay.errors import StoreUnavailable
from forebay.interfaces import (
    Completion,
    DeadRecord,
    Lease,
    PutResult,
    RecordState,
    StoredRecord,
    TaskRecord,
    TaskStore,
    WakeResult,
)
from forebay.task import Priority

T = TypeVar("T")


@dataclass
class AcknowledgedWrites:
    """The writes that a store acknowledged to any process, recorded independently of the store."""

    stored: set[str] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)  # completions that were accepted
    uncertain: set[str] = field(default_factory=set)  # ids of writes that were not acknowledged, but may have happened
    given_back: Counter[str] = field(default_factory=Counter)  # starts under leases that their holder returned


@dataclass(frozen=True)
class StoreFaults:
    """The faults between one process and its store.

    Attributes:
        slow: maximum seconds of an operation.
        slow_by: seconds that every operation takes.
        hangs: probability that an operation takes up to `hang` seconds.
        hang: seconds; longer than a lease.
        loses_reply: probability that an operation succeeds and reports an error.
        outages: (start, end) times in which all operations fail, as on a full disk; in seconds of the loop.
    """

    slow: float = 0.0
    slow_by: float = 0.0
    hangs: float = 0.0
    hang: float = 0.0
    loses_reply: float = 0.0
    outages: tuple[tuple[float, float], ...] = ()


class UnreliableStore:
    """A task store with faults."""

    def __init__(
        self, inner: TaskStore, faults: StoreFaults, acknowledged: AcknowledgedWrites, rng: random.Random
    ) -> None:
        self._inner = inner
        self._faults = faults
        self._acknowledged = acknowledged
        self._rng = rng
        self._disconnected = False
        self._begun: set[str] = set()  # fences under which a handler was started
        self.durable = inner.durable

    def disconnect(self) -> None:
        """Fail all operations from now on: the process has crashed."""
        self._disconnected = True

    def repair(self) -> None:
        """Remove all faults."""
        self._faults = StoreFaults()

    def slow_down(self, seconds: float) -> None:
        """Let every operation take `seconds` from now on."""
        self._faults = StoreFaults(slow_by=seconds)

    def _fail(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(where="the simulated disk", why=why, advice="It is part of the surge.")

    async def _call(self, call: Coroutine[Any, Any, T], *task_ids: str) -> T:
        """Await `call` with faults; the writes of `task_ids` are uncertain if it is not acknowledged."""
        try:
            await self._wait()
        except BaseException:
            call.close()  # it was never started
            raise
        try:
            value = await call
        except asyncio.CancelledError:
            self._acknowledged.uncertain.update(task_ids)
            raise
        if self._disconnected or self._rng.random() < self._faults.loses_reply:
            self._acknowledged.uncertain.update(task_ids)
            raise self._fail("the answer was lost")
        return value

    async def _wait(self) -> None:
        faults = self._faults
        delay = self._rng.uniform(0, faults.slow) if faults.slow else faults.slow_by
        if self._rng.random() < faults.hangs:
            delay = self._rng.uniform(0, faults.hang)
        if delay:
            await asyncio.sleep(delay)
        self._check()

    def _check(self) -> None:
        if self._disconnected:
            raise self._fail("its process has crashed")
        if self._faults.outages:  # in virtual time: in real time, the thread that renews leases has no loop
            now = asyncio.get_running_loop().time()
            if any(since <= now < until for since, until in self._faults.outages):
                raise self._fail("the disk is full")

    async def open(self) -> None:
        await self._call(self._inner.open())

    async def close(self) -> None:
        await self._inner.close()

    def subscribe(
        self,
        *,
        on_waiting: Callable[[], None],
        on_ended: Callable[[], None],
        on_lost: Callable[[], None] | None = None,
        on_interrupted: Callable[[], None] | None = None,
    ) -> None:
        self._inner.subscribe(on_waiting=on_waiting, on_ended=on_ended, on_lost=on_lost, on_interrupted=on_interrupted)

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        put = await self._call(self._inner.put(record, fence=fence, until=until, now=now), record.task_id)
        if put.written:
            self._acknowledged.stored.add(record.task_id)
        return put

    async def lease(
        self,
        task_type: str,
        limit: int,
        *,
        until: float,
        priority: Priority | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> Sequence[Lease]:
        return await self._call(self._inner.lease(task_type, limit, until=until, priority=priority, shares=shares))

    async def begin_attempt(self, lease: Lease) -> bool:
        try:
            counted = await self._call(self._inner.begin_attempt(lease), lease.record.task_id)
        except (StoreUnavailable, asyncio.CancelledError):  # it may not count a start that has happened
            self._acknowledged.uncertain.add(lease.record.task_id)
            raise
        if not counted:  # the lease had expired: the store did not count this attempt
            self._acknowledged.uncertain.add(lease.record.task_id)
        self._begun.add(lease.fence)
        return counted

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        if leases:  # otherwise there is nothing to ask the store
            self._check()
        if self._rng.random() < self._faults.hangs and leases:
            raise self._fail("it took too long")
        return self._inner.renew(leases, until=until)

    async def release(self, leases: Sequence[Lease]) -> None:
        self._acknowledged.given_back.update(lease.record.task_id for lease in leases if lease.fence in self._begun)
        await self._call(self._inner.release(leases))

    async def record_failures(self, lease: Lease) -> bool:
        return await self._call(self._inner.record_failures(lease))

    async def delay(self, lease: Lease, *, due: float) -> bool:
        return await self._call(self._inner.delay(lease, due=due), lease.record.task_id)

    async def wake(self, *, now: float) -> WakeResult:
        return await self._call(self._inner.wake(now=now))

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        try:
            finished = await self._call(self._inner.finish(task_id, completion, fence=fence), task_id)
        except StoreUnavailable:
            self._acknowledged.uncertain.add(task_id)
            raise
        if finished and completion.status == "rejected":  # withdrawn: the store forgets the task
            self._acknowledged.stored.discard(task_id)
        elif finished:
            self._acknowledged.ended[task_id] += 1
        return finished

    async def reap(self, *, now: float, max_attempts: int, latest: float = math.inf) -> Sequence[DeadRecord]:
        dead = await self._call(self._inner.reap(now=now, max_attempts=max_attempts, latest=latest))
        self._acknowledged.ended.update(record.record.task_id for record in dead)
        return dead

    async def prune(self, *, before: float) -> int:
        return await self._call(self._inner.prune(before=before))

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        try:
            marked = await self._call(self._inner.mark_dead(lease, completion), lease.record.task_id)
        except StoreUnavailable:
            self._acknowledged.uncertain.add(lease.record.task_id)
            raise
        self._acknowledged.ended[lease.record.task_id] += marked
        return marked

    async def list_records(
        self, state: RecordState, limit: int, *, after: tuple[float, str] | None = None
    ) -> Sequence[StoredRecord]:
        return await self._call(self._inner.list_records(state, limit, after=after))

    async def requeue(self, task_id: str) -> PutResult | None:
        return await self._call(self._inner.requeue(task_id))

    async def delete_dead(self, task_id: str) -> bool:
        return await self._call(self._inner.delete_dead(task_id))

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        return await self._call(self._inner.find(task_id))

    async def find_key(self, key: str) -> str | None:
        return await self._call(self._inner.find_key(key))

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        return await self._call(self._inner.depths())

    async def leased(self) -> Mapping[str, int]:
        return await self._call(self._inner.leased())

    async def conversations(self) -> Mapping[str, int]:
        return await self._call(self._inner.conversations())
