"""A ledger as one process has it: slow, broken for a while, cut off when its process dies; and what it has promised."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from forebay.errors import LedgerUnusable
from forebay.task import Priority
from forebay.typing import Completion, DeadRow, Lease, Ledger, Put, Row, RowState

T = TypeVar("T")


@dataclass
class Score:
    """What a store has acknowledged, to whichever process: kept apart from it, so that it cannot err with it."""

    stored: set[str] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)  # completions that were accepted
    unsure: set[str] = field(default_factory=set)  # it may have happened, and was not acknowledged


@dataclass(frozen=True)
class Trouble:
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
    forgets: float = 0.0
    spells: tuple[tuple[float, float], ...] = ()


class Unreliable:
    """A ledger in trouble."""

    def __init__(self, inner: Ledger, trouble: Trouble, score: Score, rng: random.Random) -> None:
        self._inner = inner
        self._trouble = trouble
        self._score = score
        self._rng = rng
        self._is_cut = False
        self.durable = inner.durable

    def cut(self) -> None:
        """Its process dies: whatever is asked for from now on does not happen."""
        self._is_cut = True

    def cure(self) -> None:
        """From now on it works."""
        self._trouble = Trouble()

    def _fail(self, why: str) -> LedgerUnusable:
        return LedgerUnusable(where="the simulated disk", why=why, advice="It is part of the surge.")

    async def _do(self, call: Coroutine[Any, Any, T], *concerns: str) -> T:
        """Await `call` in trouble; `concerns` are the ids of which nobody can be sure if it is not acknowledged."""
        try:
            await self._wait()
        except BaseException:
            call.close()  # it was never begun
            raise
        try:
            value = await call
        except asyncio.CancelledError:
            self._score.unsure.update(concerns)
            raise
        if self._is_cut or self._rng.random() < self._trouble.forgets:
            self._score.unsure.update(concerns)
            raise self._fail("the answer was lost")
        return value

    async def _wait(self) -> None:
        trouble = self._trouble
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
        if any(since <= now < until for since, until in self._trouble.spells):
            raise self._fail("the disk is full")

    async def open(self) -> None:
        await self._do(self._inner.open())

    async def close(self) -> None:
        await self._inner.close()

    async def put(self, row: Row, *, fence: str | None = None, until: float = 0.0) -> Put:
        put = await self._do(self._inner.put(row, fence=fence, until=until), row.task_id)
        if put is Put.STORED:
            self._score.stored.add(row.task_id)
        return put

    async def lease(self, task_type: str, limit: int, *, until: float, rung: Priority | None = None) -> Sequence[Lease]:
        return await self._do(self._inner.lease(task_type, limit, until=until, rung=rung))

    async def start(self, lease: Lease) -> bool:
        try:
            counted = await self._do(self._inner.start(lease), lease.row.task_id)
        except LedgerUnusable:
            self._score.unsure.add(lease.row.task_id)
            raise
        if not counted:  # it came when the right had lapsed: that start has no number in the store
            self._score.unsure.add(lease.row.task_id)
        return counted

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        self._check()
        if self._rng.random() < self._trouble.hangs:
            raise self._fail("it took too long")
        return self._inner.renew(leases, until=until)

    async def release(self, leases: Sequence[Lease]) -> None:
        await self._do(self._inner.release(leases))

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        try:
            finished = await self._do(self._inner.finish(task_id, completion, fence=fence), task_id)
        except LedgerUnusable:
            self._score.unsure.add(task_id)
            raise
        if finished and completion.status == "rejected":  # taken back, as if it had never been
            self._score.stored.discard(task_id)
        elif finished:
            self._score.ended[task_id] += 1
        return finished

    async def reap(self, *, now: float, max_attempts: int) -> Sequence[DeadRow]:
        dead = await self._do(self._inner.reap(now=now, max_attempts=max_attempts))
        self._score.ended.update(each.row.task_id for each in dead)
        return dead

    async def prune(self, *, before: float) -> int:
        return await self._do(self._inner.prune(before=before))

    async def bury(self, lease: Lease, completion: Completion) -> bool:
        buried = await self._do(self._inner.bury(lease, completion), lease.row.task_id)
        self._score.ended[lease.row.task_id] += buried
        return buried

    async def dead(self, limit: int, *, after: tuple[float, str] | None = None) -> Sequence[DeadRow]:
        return await self._do(self._inner.dead(limit, after=after))

    async def requeue(self, task_id: str) -> Put | None:
        return await self._do(self._inner.requeue(task_id))

    async def drop(self, task_id: str) -> bool:
        return await self._do(self._inner.drop(task_id))

    async def find(self, task_id: str) -> tuple[RowState, Row, Completion | None] | None:
        return await self._do(self._inner.find(task_id))

    async def find_key(self, key: str) -> str | None:
        return await self._do(self._inner.find_key(key))

    async def depths(self) -> Mapping[tuple[str, Priority], int]:
        return await self._do(self._inner.depths())
