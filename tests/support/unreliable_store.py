"""A ledger as one process has it: slow, broken for a while, cut off when its process dies; and what it has promised."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, DeadRecord, Lease, PutResult, RecordState, TaskRecord, TaskStore
from forebay.task import Priority

T = TypeVar("T")


@dataclass
class AcknowledgedWrites:
    """What a store has acknowledged, to whichever process: kept apart from it, so that it cannot err with it."""

    stored: set[str] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)  # completions that were accepted
    uncertain: set[str] = field(default_factory=set)  # it may have happened, and was not acknowledged


@dataclass(frozen=True)
class StoreFaults:
    """What is wrong with a process's way to its store.

    Attributes:
        slow: seconds that an operation takes at most.
        hangs: the chance that one takes up to `hang` seconds.
        hang: more than a lease, or it would be no trouble.
        forgets: the chance that one happens and an error says that it has not.
        spells: times from and to which all that is asked for fails, as on a full disk; in seconds of the loop.
    """

    slow: float = 0.0
    hangs: float = 0.0
    hang: float = 0.0
    loses_reply: float = 0.0
    outages: tuple[tuple[float, float], ...] = ()


class UnreliableStore:
    """A ledger in trouble."""

    def __init__(self, inner: TaskStore, trouble: StoreFaults, score: AcknowledgedWrites, rng: random.Random) -> None:
        self._inner = inner
        self._faults = trouble
        self._acknowledged = score
        self._rng = rng
        self._is_cut = False
        self.durable = inner.durable

    def disconnect(self) -> None:
        """Its process dies: whatever is asked for from now on does not happen."""
        self._is_cut = True

    def repair(self) -> None:
        """From now on it works."""
        self._faults = StoreFaults()

    def _fail(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(where="the simulated disk", why=why, advice="It is part of the surge.")

    async def _call(self, call: Coroutine[Any, Any, T], *concerns: str) -> T:
        """Await `call` in trouble; `concerns` are the ids of which nobody can be sure if it is not acknowledged."""
        try:
            await self._wait()
        except BaseException:
            call.close()  # it was never begun
            raise
        try:
            value = await call
        except asyncio.CancelledError:
            self._acknowledged.uncertain.update(concerns)
            raise
        if self._is_cut or self._rng.random() < self._faults.loses_reply:
            self._acknowledged.uncertain.update(concerns)
            raise self._fail("the answer was lost")
        return value

    async def _wait(self) -> None:
        trouble = self._faults
        delay = self._rng.uniform(0, trouble.slow) if trouble.slow else 0.0
        if self._rng.random() < trouble.hangs:
            delay = self._rng.uniform(0, trouble.hang)
        if delay:
            await asyncio.sleep(delay)
        self._check()

    def _check(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._is_cut:
            raise self._fail("its process is gone")
        if any(since <= now < until for since, until in self._faults.outages):
            raise self._fail("the disk is full")

    async def open(self) -> None:
        await self._call(self._inner.open())

    async def close(self) -> None:
        await self._inner.close()

    async def put(self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0) -> PutResult:
        put = await self._call(self._inner.put(record, fence=fence, until=until), record.task_id)
        if put is PutResult.STORED:
            self._acknowledged.stored.add(record.task_id)
        return put

    async def lease(
        self, task_type: str, limit: int, *, until: float, priority: Priority | None = None
    ) -> Sequence[Lease]:
        return await self._call(self._inner.lease(task_type, limit, until=until, priority=priority))

    async def begin_attempt(self, lease: Lease) -> bool:
        try:
            counted = await self._call(self._inner.begin_attempt(lease), lease.record.task_id)
        except StoreUnavailable:
            self._acknowledged.uncertain.add(lease.record.task_id)
            raise
        if not counted:  # it came when the right had lapsed: that start has no number in the store
            self._acknowledged.uncertain.add(lease.record.task_id)
        return counted

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        self._check()
        if self._rng.random() < self._faults.hangs:
            raise self._fail("it took too long")
        return self._inner.renew(leases, until=until)

    async def release(self, leases: Sequence[Lease]) -> None:
        await self._call(self._inner.release(leases))

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        try:
            finished = await self._call(self._inner.finish(task_id, completion, fence=fence), task_id)
        except StoreUnavailable:
            self._acknowledged.uncertain.add(task_id)
            raise
        if finished and completion.status == "rejected":  # taken back, as if it had never been
            self._acknowledged.stored.discard(task_id)
        elif finished:
            self._acknowledged.ended[task_id] += 1
        return finished

    async def reap(self, *, now: float, max_attempts: int) -> Sequence[DeadRecord]:
        dead = await self._call(self._inner.reap(now=now, max_attempts=max_attempts))
        self._acknowledged.ended.update(each.record.task_id for each in dead)
        return dead

    async def prune(self, *, before: float) -> int:
        return await self._call(self._inner.prune(before=before))

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        buried = await self._call(self._inner.mark_dead(lease, completion), lease.record.task_id)
        self._acknowledged.ended[lease.record.task_id] += buried
        return buried

    async def list_dead(self, limit: int, *, after: tuple[float, str] | None = None) -> Sequence[DeadRecord]:
        return await self._call(self._inner.list_dead(limit, after=after))

    async def requeue(self, task_id: str) -> PutResult | None:
        return await self._call(self._inner.requeue(task_id))

    async def delete_dead(self, task_id: str) -> bool:
        return await self._call(self._inner.delete_dead(task_id))

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        return await self._call(self._inner.find(task_id))

    async def find_key(self, key: str) -> str | None:
        return await self._call(self._inner.find_key(key))

    async def depths(self) -> Mapping[tuple[str, Priority], int]:
        return await self._call(self._inner.depths())
