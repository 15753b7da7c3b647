"""Every ledger against a naive one: whatever is done to both, they answer alike."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, TypeVar

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forebay.interfaces import Completion, DeadRecord, Lease, PutResult, RecordState, TaskRecord
from forebay.overflow import open_task_store
from forebay.task import Priority

BOUND = 10
MAX_ATTEMPTS = 2
TYPES = st.sampled_from(["research", "write"])
NAMES = st.sampled_from("abcdefghijklmnopqr")

_T = TypeVar("_T")


@dataclass
class ModelRecord:
    """A row of the naive ledger."""

    row: TaskRecord
    turn: int
    state: RecordState
    fence: str | None = None
    until: float = 0.0
    status: str | None = None
    finished_at: float = 0.0

    @property
    def place(self) -> tuple[int, float, float, int]:
        row = self.row
        return row.priority, inf if row.deadline is None else row.deadline, row.enqueued_at, self.turn


class ModelStore:
    """A ledger that looks through all that it has at every question."""

    def __init__(self) -> None:
        self.rows: dict[str, ModelRecord] = {}
        self.turns = 0

    def within(self, *states: RecordState) -> list[ModelRecord]:
        return [stored for stored in self.rows.values() if stored.state in states]

    def put(self, row: TaskRecord, fence: str | None, until: float) -> PutResult:
        if row.task_id in self.rows or (row.key is not None and self.find_key(row.key) is not None):
            return PutResult.DUPLICATE
        if self.full:
            return PutResult.FULL
        self.turns += 1
        state = RecordState.WAITING if fence is None else RecordState.LEASED
        self.rows[row.task_id] = ModelRecord(row, self.turns, state, fence, until)
        return PutResult.STORED

    @property
    def full(self) -> bool:
        return len(self.within(RecordState.WAITING, RecordState.LEASED)) >= BOUND

    def best(self, task_type: str, limit: int, rung: Priority | None) -> list[ModelRecord]:
        waiting = [stored for stored in self.within(RecordState.WAITING) if stored.row.task_type == task_type]
        of_rung = [stored for stored in waiting if rung is None or stored.row.priority is rung]
        return sorted(of_rung, key=lambda stored: stored.place)[:limit]

    def held(self, lease: Lease) -> ModelRecord | None:
        stored = self.rows.get(lease.record.task_id)
        return stored if stored and stored.state is RecordState.LEASED and stored.fence == lease.fence else None

    def end(self, stored: ModelRecord, state: RecordState, status: str, now: float) -> None:
        stored.state, stored.fence, stored.status, stored.finished_at = state, None, status, now
        if state is RecordState.DONE:
            stored.row = msgspec.structs.replace(stored.row, envelope=b"")
        self.trim()

    def trim(self) -> None:
        for state in (RecordState.DONE, RecordState.DEAD):
            ended = sorted(self.within(state), key=lambda stored: stored.finished_at)
            for oldest in ended[: max(0, len(ended) - BOUND)]:
                del self.rows[oldest.row.task_id]

    def dead(self) -> list[ModelRecord]:
        return sorted(self.within(RecordState.DEAD), key=lambda stored: (stored.finished_at, stored.row.task_id))

    def find_key(self, key: str) -> str | None:
        return next((task_id for task_id, stored in self.rows.items() if stored.row.key == key), None)


class TaskStoreMachine(RuleBasedStateMachine):
    """Does to a ledger what may be done, and to the naive one the same."""

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.ledger = open_task_store(self.url.format(path=self.directory.name, bound=BOUND))
        self.run(self.ledger.open())
        self.model = ModelStore()
        self.leases: list[Lease] = []
        self.now = 1000.0

    def teardown(self) -> None:
        self.run(self.ledger.close())
        self.runner.close()
        self.directory.cleanup()

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(call)

    def tick(self) -> float:
        self.now += 1.0  # no two things end at the same time, so that it is plain which is the oldest
        return self.now

    @rule(
        task_id=NAMES,
        task_type=TYPES,
        priority=st.sampled_from(Priority),
        deadline=st.sampled_from([None, None, 1.0, 2.0]),
        key=st.sampled_from([None, None, "k", "l"]),
        fenced=st.sampled_from([False, False, False, True]),
        late=st.sampled_from([0.0, 0.0, 2.5]),
    )
    def put(  # noqa: PLR0913 - the fields of a row
        self,
        task_id: str,
        task_type: str,
        priority: Priority,
        deadline: float | None,
        key: str | None,
        *,
        late: float,
        fenced: bool,
    ) -> None:
        row = TaskRecord(
            task_id=task_id,
            task_type=task_type,
            priority=priority,
            envelope=task_id.encode(),
            enqueued_at=self.now - late,
            deadline=deadline,
            key=key,
        )
        until = self.tick() + 3.0
        fence = f"fence {until}" if fenced else None
        outcome = self.run(self.ledger.put(row, fence=fence, until=until))
        assert outcome is self.model.put(row, fence, until)
        if fence is not None and outcome is PutResult.STORED:
            self.leases.append(Lease(record=row, fence=fence, until=until))

    @rule(task_ids=st.lists(NAMES, min_size=8, max_size=10), task_type=TYPES)
    def put_together(self, task_ids: list[str], task_type: str) -> None:
        rows = [
            TaskRecord(task_id=task_id, task_type=task_type, priority=Priority.LOW, envelope=b"", enqueued_at=self.now)
            for task_id in task_ids
        ]
        outcomes = self.run(self.put_all(rows))
        assert outcomes == [self.model.put(row, None, 0.0) for row in rows]

    async def put_all(self, rows: list[TaskRecord]) -> list[PutResult]:
        return await asyncio.gather(*(self.ledger.put(row) for row in rows))

    @rule(task_type=TYPES, limit=st.integers(0, 9), rung=st.sampled_from([None, None, *Priority]))
    def lease(self, task_type: str, limit: int, rung: Priority | None) -> None:
        until = self.tick() + 3.0
        expected = self.model.best(task_type, limit, rung)
        leases = self.run(self.ledger.lease(task_type, limit, until=until, priority=rung))
        assert [lease.record for lease in leases] == [stored.row for stored in expected]
        for lease, stored in zip(leases, expected, strict=True):
            assert lease.until == until
            stored.state, stored.fence, stored.until = RecordState.LEASED, lease.fence, until
        self.leases += leases

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        stored = self.model.held(lease)
        assert self.run(self.ledger.begin_attempt(lease)) is (stored is not None)
        if stored is not None:
            stored.row = msgspec.structs.replace(stored.row, attempts=stored.row.attempts + 1)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), length=st.sampled_from([-1.0, 1.0, 5.0]))
    def renew(self, data: st.DataObject, length: float) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.leases), unique_by=lambda lease: lease.fence))
        until = self.now + length
        lost = [lease for lease in chosen if self.model.held(lease) is None]
        assert list(self.ledger.renew(chosen, until=until)) == lost
        for lease in chosen:
            if (stored := self.model.held(lease)) is not None:
                stored.until = max(stored.until, until)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.leases), unique_by=lambda lease: lease.fence))
        self.run(self.ledger.release(chosen))
        for lease in chosen:
            if (stored := self.model.held(lease)) is not None:
                stored.state, stored.fence = RecordState.WAITING, None

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def finish_held(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        completion = Completion(status="succeeded", finished_at=self.tick())
        stored = self.model.held(lease)
        finished = self.run(self.ledger.finish(lease.record.task_id, completion, fence=lease.fence))
        assert finished is (stored is not None)
        if stored is not None:
            self.model.end(stored, RecordState.DONE, "succeeded", self.now)

    @rule(task_id=NAMES)
    def give_up(self, task_id: str) -> None:
        completion = Completion(status="cancelled", finished_at=self.tick())
        stored = self.model.rows.get(task_id)
        waiting = stored is not None and stored.state is RecordState.WAITING
        assert self.run(self.ledger.finish(task_id, completion, fence=None)) is waiting
        if stored is not None and waiting:
            self.model.end(stored, RecordState.DONE, "cancelled", self.now)

    @rule()
    def reap(self) -> None:
        now = self.tick()
        dead = []
        for stored in self.model.within(RecordState.LEASED):
            if stored.until < now and stored.row.attempts < MAX_ATTEMPTS:
                stored.state, stored.fence = RecordState.WAITING, None
            elif stored.until < now:
                dead.append(replace(stored))
        found = [each.record for each in self.run(self.ledger.reap(now=now, max_attempts=MAX_ATTEMPTS))]
        assert {row.task_id: row for row in found} == {stored.row.task_id: stored.row for stored in dead}
        # Those that die at once are all equally old: the ledger may choose which to keep.
        for row in found:
            if self.run(self.ledger.find(row.task_id)) is None:
                del self.model.rows[row.task_id]
            else:
                stored = self.model.rows[row.task_id]
                stored.state, stored.fence, stored.status, stored.finished_at = RecordState.DEAD, None, "failed", now
        self.model.trim()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def bury(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        completion = Completion(status="failed", error="unreadable", finished_at=self.tick())
        stored = self.model.held(lease)
        assert self.run(self.ledger.mark_dead(lease, completion)) is (stored is not None)
        if stored is not None:
            self.model.end(stored, RecordState.DEAD, "failed", self.now)

    @rule(task_id=NAMES)
    def requeue(self, task_id: str) -> None:
        stored = self.model.rows.get(task_id)
        outcome = self.run(self.ledger.requeue(task_id))
        if stored is None or stored.state is not RecordState.DEAD:
            assert outcome is None
        elif self.model.full:
            assert outcome is PutResult.FULL
        else:
            assert outcome is PutResult.STORED
            stored.state, stored.status = RecordState.WAITING, None
            stored.row = msgspec.structs.replace(stored.row, attempts=0)

    @rule(task_id=NAMES)
    def drop(self, task_id: str) -> None:
        stored = self.model.rows.get(task_id)
        is_dead = stored is not None and stored.state is RecordState.DEAD
        assert self.run(self.ledger.delete_dead(task_id)) is is_dead
        if is_dead:
            del self.model.rows[task_id]

    @rule(size=st.integers(1, 4))
    def read_the_dead(self, size: int) -> None:
        pages, last = list[DeadRecord](), (-inf, "")
        while page := self.run(self.ledger.list_dead(size, after=last)):
            assert len(page) <= size
            pages += page
            last = (page[-1].completion.finished_at, page[-1].record.task_id)
        expected = [msgspec.structs.replace(stored.row, envelope=b"") for stored in self.model.dead()]
        assert [dead.record for dead in pages] == expected

    @rule(age=st.sampled_from([0.0, 5.0, 20.0]))
    def prune(self, age: float) -> None:
        before = self.now - age
        old = [s for s in self.model.within(RecordState.DONE) if s.finished_at < before]
        assert self.run(self.ledger.prune(before=before)) == len(old)
        for stored in old:
            del self.model.rows[stored.row.task_id]

    @rule()
    def reopen(self) -> None:
        self.run(self.ledger.close())
        self.run(self.ledger.open())

    @rule(task_id=NAMES, key=st.sampled_from(["k", "l", "m"]))
    def look_up(self, task_id: str, key: str) -> None:
        assert self.run(self.ledger.find_key(key)) == self.model.find_key(key)
        found = self.run(self.ledger.find(task_id))
        stored = self.model.rows.get(task_id)
        if stored is None:
            assert found is None
            return
        assert found is not None
        state, row, completion = found
        assert (state, row) == (stored.state, stored.row)
        assert (None if completion is None else completion.status) == stored.status

    @invariant()
    def depths_are_true(self) -> None:
        waiting = self.model.within(RecordState.WAITING)
        expected = Counter((stored.row.task_type, stored.row.priority) for stored in waiting)
        assert self.run(self.ledger.depths()) == expected


class MemoryMachine(TaskStoreMachine):
    """In memory."""

    url = "memory://?bound={bound}"


class SqliteMachine(TaskStoreMachine):
    """In a SQLite file."""

    url = "sqlite:///{path}/ledger.db?bound={bound}&synchronous=off"


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=settings().max_examples // 2)
TestSqlite = SqliteMachine.TestCase
TestSqlite.settings = settings(max_examples=settings().max_examples // 5, stateful_step_count=30)  # it waits for a file
