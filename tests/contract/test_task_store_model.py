"""Every task store against a simple model: the same operations give the same answers."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from math import inf
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tests.support.leases import after_failure
from tests.support.task_stores import ENVELOPE, ORDER, StoreBackend

from forebay.interfaces import Completion, Lease, PutResult, RecordState, StoredRecord, TaskRecord, WakeResult
from forebay.overflow import open_task_store
from forebay.task import Priority

BOUND = 10
MAX_ATTEMPTS = 2
TYPES = st.sampled_from(["research", "write"])
TENANTS = st.sampled_from(["a", "b", "c"])
NAMES = st.sampled_from("abcdefghijklmnopqr")
UNFINISHED = (RecordState.WAITING, RecordState.PARKED, RecordState.LEASED, RecordState.DELAYED)

_T = TypeVar("_T")


@dataclass
class ModelRecord:
    """A record of the model."""

    record: TaskRecord
    sequence: int
    state: RecordState
    fence: str | None = None
    until: float = 0.0
    status: str | None = None
    finished_at: float = 0.0
    scheduled: bool = False  # DELAYED by its not_before: it has not joined its conversation

    @property
    def age(self) -> tuple[float, int]:
        return self.record.enqueued_at, self.sequence

    @property
    def order(self) -> tuple[int, float, float, int]:
        record = self.record
        return record.priority, inf if record.deadline is None else record.deadline, record.enqueued_at, self.sequence

    @property
    def position(self) -> tuple[float, str]:
        return self.record.enqueued_at if self.status is None else self.finished_at, self.record.task_id

    def read_failures(self, lease: Lease) -> None:
        known = lease.record
        self.record = msgspec.structs.replace(
            self.record,
            failures=known.failures,
            total_delay=known.total_delay,
            last_error=known.last_error,
            usage=known.usage,
        )


class ModelStore:
    """The model: a store that searches all its records for every question."""

    def __init__(self) -> None:
        self.records: dict[str, ModelRecord] = {}
        self.count = 0

    def within(self, *states: RecordState) -> list[ModelRecord]:
        return [stored for stored in self.records.values() if stored.state in states]

    def put(self, record: TaskRecord, fence: str | None, until: float, now: float) -> PutResult:
        known = self.records.get(record.task_id)
        if known is not None and known.state in UNFINISHED:
            return PutResult.DUPLICATE
        if known is not None and known.record.key != (None if known.state is RecordState.DONE else record.key or ""):
            return PutResult.DUPLICATE
        if record.key is not None and self.find_key(record.key) is not None:
            return PutResult.DUPLICATE
        if self.full:
            return PutResult.FULL
        self.records.pop(record.task_id, None)
        self.count += 1
        stored = ModelRecord(record, self.count, RecordState.PARKED, None, until)
        self.records[record.task_id] = stored
        if fence is None and record.not_before is not None and record.not_before > now:
            stored.state, stored.until, stored.scheduled = RecordState.DELAYED, record.not_before, True
            return PutResult.STORED
        self.settle(record.thread_id)
        if fence is not None and stored.state is RecordState.WAITING:
            stored.state, stored.fence = RecordState.LEASED, fence
        expected = RecordState.WAITING if fence is None else RecordState.LEASED
        return PutResult.STORED if stored.state is expected else PutResult.PARKED

    def conversation(self, thread_id: str) -> list[ModelRecord]:
        unfinished = self.within(*UNFINISHED)
        return [each for each in unfinished if each.record.thread_id == thread_id and not each.scheduled]

    def settle(self, thread_id: str | None) -> None:
        """Let the oldest of each conversation wait, unless one has begun, and all without a conversation."""
        if thread_id is None:
            for stored in self.within(RecordState.PARKED):
                if stored.record.thread_id is None:
                    stored.state = RecordState.WAITING
            return
        conversation = sorted(self.conversation(thread_id), key=lambda stored: stored.age)
        begun = [stored for stored in conversation if stored.state in (RecordState.LEASED, RecordState.DELAYED)]
        assert len(begun) <= 1
        for stored in conversation:
            if stored not in begun:
                stored.state = RecordState.PARKED
        if conversation and not begun:
            conversation[0].state = RecordState.WAITING

    @property
    def full(self) -> bool:
        return len(self.within(*UNFINISHED)) >= BOUND

    def best(
        self, task_type: str, limit: int, priority: Priority | None, shares: Mapping[str, int] | None
    ) -> list[ModelRecord]:
        waiting = [stored for stored in self.within(RecordState.WAITING) if stored.record.task_type == task_type]
        chosen = [stored for stored in waiting if priority is None or stored.record.priority is priority]
        in_order = sorted(chosen, key=lambda stored: stored.order)
        if shares is None:
            return in_order[:limit]
        best: list[ModelRecord] = []
        for each in Priority:
            for tenant, share in shares.items():
                of_tenant = [s.record.priority is each and s.record.tenant == tenant for s in in_order]
                best += list(compress(in_order, of_tenant))[:share]
        return best[:limit]

    def held(self, lease: Lease) -> ModelRecord | None:
        stored = self.records.get(lease.record.task_id)
        return stored if stored and stored.state is RecordState.LEASED and stored.fence == lease.fence else None

    def end(self, stored: ModelRecord, state: RecordState, status: str, now: float) -> None:
        stored.state, stored.fence, stored.status, stored.finished_at = state, None, status, now
        stored.scheduled = False
        if state is RecordState.DONE:
            key = stored.record.key if status == "succeeded" else None
            stored.record = msgspec.structs.replace(stored.record, envelope=b"", key=key)
        self.settle(stored.record.thread_id)
        self.trim()

    def trim(self) -> None:
        for state in (RecordState.DONE, RecordState.DEAD):
            ended = sorted(self.within(state), key=lambda stored: stored.finished_at)
            for oldest in ended[: max(0, len(ended) - BOUND)]:
                del self.records[oldest.record.task_id]

    def listed(self, state: RecordState) -> list[ModelRecord]:
        return sorted(self.within(state), key=lambda stored: stored.position)

    def find_key(self, key: str) -> str | None:
        holders = self.within(*UNFINISHED, RecordState.DONE)
        return next((stored.record.task_id for stored in holders if stored.record.key == key), None)


class TaskStoreMachine(RuleBasedStateMachine):
    """Does random operations on a task store and on the model."""

    store_backend: ClassVar[StoreBackend]

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.store = open_task_store(self.store_backend.fast_url(Path(self.directory.name), bound=BOUND))
        self.run(self.store.open())
        self.model = ModelStore()
        self.leases: list[Lease] = []
        self.now = 1000.0

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()
        self.directory.cleanup()

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(call)

    def tick(self) -> float:
        self.now += 1.0  # no two records end at the same time, so that the oldest is unique
        return self.now

    @rule(
        task_id=NAMES,
        task_type=TYPES,
        priority=st.sampled_from(Priority),
        deadline=st.sampled_from([None, None, 1.0, 2.0]),
        key=st.sampled_from([None, None, "k", "l"]),
        fenced=st.sampled_from([False, False, False, True]),
        late=st.sampled_from([0.0, 0.0, 2.5]),
        ahead=st.sampled_from([None, None, None, -1.0, 0.0, 1.0, 6.0]),
        thread_id=st.sampled_from([None, None, "t", "u"]),
        tenant=TENANTS,
    )
    def put(  # noqa: PLR0913 - the fields of a record
        self,
        task_id: str,
        task_type: str,
        priority: Priority,
        deadline: float | None,
        key: str | None,
        *,
        late: float,
        ahead: float | None,
        fenced: bool,
        thread_id: str | None,
        tenant: str,
    ) -> None:
        now = self.tick()
        record = TaskRecord(
            task_id=task_id,
            task_type=task_type,
            priority=priority,
            envelope=task_id.encode(),
            enqueued_at=now - 1.0 - late,
            deadline=deadline,
            key=key,
            thread_id=thread_id,
            tenant=tenant,
            not_before=None if ahead is None else now + ahead,
        )
        until = now + 3.0
        fence = f"fence {until}" if fenced else None
        outcome = self.run(self.store.put(record, fence=fence, until=until, now=now))
        assert outcome is self.model.put(record, fence, until, now)
        if fence is not None and outcome is PutResult.STORED:
            self.leases.append(Lease(record=record, fence=fence, until=until))

    @rule(task_ids=st.lists(NAMES, min_size=8, max_size=10), task_type=TYPES, share=st.sampled_from([0, 1, 2]))
    def put_together(self, task_ids: list[str], task_type: str, share: int) -> None:
        """Store records in one batch; of `share` 1 all are of one conversation, of 2 every other one."""
        records = [
            TaskRecord(
                task_id=task_id,
                task_type=task_type,
                priority=Priority.LOW,
                envelope=b"",
                enqueued_at=self.now,
                thread_id="t" if share and not number % share else None,
            )
            for number, task_id in enumerate(task_ids)
        ]
        outcomes = self.run(self.put_all(records))
        assert outcomes == [self.model.put(record, None, 0.0, 0.0) for record in records]

    async def put_all(self, records: list[TaskRecord]) -> list[PutResult]:
        return await asyncio.gather(*(self.store.put(record) for record in records))

    @rule(
        task_type=TYPES,
        limit=st.integers(0, 9),
        priority=st.sampled_from([None, None, *Priority]),
        shares=st.none() | st.dictionaries(TENANTS, st.integers(0, 3)),
    )
    def lease(self, task_type: str, limit: int, priority: Priority | None, shares: Mapping[str, int] | None) -> None:
        until = self.tick() + 3.0
        expected = self.model.best(task_type, limit, priority, shares)
        leases = self.run(self.store.lease(task_type, limit, until=until, priority=priority, shares=shares))
        if ORDER not in self.store_backend.can:
            expected = self.leased_in_other_order(leases, task_type, limit, priority, shares)
        assert [lease.record for lease in leases] == [stored.record for stored in expected]
        for lease, stored in zip(leases, expected, strict=True):
            assert lease.until == until
            stored.state, stored.fence, stored.until = RecordState.LEASED, lease.fence, until
        self.leases += leases

    def leased_in_other_order(
        self,
        leases: Sequence[Lease],
        task_type: str,
        limit: int,
        priority: Priority | None,
        shares: Mapping[str, int] | None,
    ) -> list[ModelRecord]:
        """Return the records that were leased by a store that need not lease the best, or all that wait."""
        allowed = self.model.best(task_type, 10**6, priority, None)
        leased = [stored for lease in leases for stored in allowed if stored.record.task_id == lease.record.task_id]
        assert len({stored.record.task_id for stored in leased}) == len(leases) <= limit
        if shares is not None:
            counts = Counter((stored.record.priority, stored.record.tenant) for stored in leased)
            assert all(count <= shares.get(tenant, 0) for (_, tenant), count in counts.items())
        return leased

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def begin_attempt(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        stored = self.model.held(lease)
        assert self.run(self.store.begin_attempt(lease)) is (stored is not None)
        if stored is not None:
            stored.record = msgspec.structs.replace(stored.record, attempts=stored.record.attempts + 1)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), length=st.sampled_from([-1.0, 1.0, 5.0]))
    def renew(self, data: st.DataObject, length: float) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.leases), unique_by=lambda lease: lease.fence))
        until = self.now + length
        lost = [lease for lease in chosen if self.model.held(lease) is None]
        assert list(self.store.renew(chosen, until=until)) == lost
        for lease in chosen:
            if (stored := self.model.held(lease)) is not None:
                stored.until = until

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.leases), unique_by=lambda lease: lease.fence))
        self.run(self.store.release(chosen))
        for lease in chosen:
            if (stored := self.model.held(lease)) is not None:
                stored.state, stored.fence, stored.record = RecordState.PARKED, None, lease.record
                self.model.settle(stored.record.thread_id)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), wait=st.sampled_from([1.0, 4.0]), error=st.sampled_from(["no", "never"]))
    def record_failures(self, data: st.DataObject, wait: float, error: str) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        stored, failed = self.model.held(lease), after_failure(lease, wait=wait, error=error)
        assert self.run(self.store.record_failures(failed)) is (stored is not None)
        if stored is not None:
            stored.read_failures(failed)
            self.leases[self.leases.index(lease)] = failed

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), wait=st.sampled_from([1.0, 4.0]), error=st.sampled_from(["no", "never"]))
    def delay(self, data: st.DataObject, wait: float, error: str) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        stored, due = self.model.held(lease), self.tick() + wait
        failed = after_failure(lease, wait=wait, error=error)
        assert self.run(self.store.delay(failed, due=due)) is (stored is not None)
        if stored is not None:
            stored.state, stored.fence, stored.until = RecordState.DELAYED, None, due
            stored.read_failures(failed)

    @rule()
    def wake(self) -> None:
        now = self.tick()
        due = [stored for stored in self.model.within(RecordState.DELAYED) if stored.until <= now]
        for stored in due:
            stored.state, stored.scheduled = RecordState.PARKED, False
        for stored in due:
            self.model.settle(stored.record.thread_id)
        later = [stored.until for stored in self.model.within(RecordState.DELAYED)]
        expected = WakeResult(woken=len(due), delayed=len(later), next_due=min(later, default=None))
        assert self.run(self.store.wake(now=now)) == expected

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def finish_held(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        completion = Completion(status="succeeded", finished_at=self.tick())
        stored = self.model.held(lease)
        finished = self.run(self.store.finish(lease.record.task_id, completion, fence=lease.fence))
        assert finished is (stored is not None)
        if stored is not None:
            self.model.end(stored, RecordState.DONE, "succeeded", self.now)

    @rule(task_id=NAMES)
    def finish_waiting(self, task_id: str) -> None:
        completion = Completion(status="cancelled", finished_at=self.tick())
        stored = self.model.records.get(task_id)
        waiting = stored is not None and stored.state in UNFINISHED and stored.state is not RecordState.LEASED
        assert self.run(self.store.finish(task_id, completion, fence=None)) is waiting
        if stored is not None and waiting:
            self.model.end(stored, RecordState.DONE, "cancelled", self.now)

    @rule(ahead=st.sampled_from([inf, inf, 2.0]))
    def reap(self, ahead: float) -> None:
        now = self.tick()
        latest = now + ahead
        dead = []
        for stored in self.model.within(RecordState.LEASED):
            lapsed = stored.until < now or stored.until > latest
            if lapsed and stored.record.attempts - stored.record.failures < MAX_ATTEMPTS:
                stored.state, stored.fence = RecordState.PARKED, None
                self.model.settle(stored.record.thread_id)
            elif lapsed:
                dead.append(replace(stored))
        reaped = self.run(self.store.reap(now=now, max_attempts=MAX_ATTEMPTS, latest=latest))
        found = [each.record for each in reaped]
        assert {record.task_id: record for record in found} == {stored.record.task_id: stored.record for stored in dead}
        # Records that become dead at once are equally old: the store may choose which of them to keep.
        for record in found:
            stored = self.model.records[record.task_id]
            stored.state, stored.fence, stored.status, stored.finished_at = RecordState.DEAD, None, "failed", now
            self.model.settle(record.thread_id)
            if self.run(self.store.find(record.task_id)) is None:
                del self.model.records[record.task_id]
        self.model.trim()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def mark_dead(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        completion = Completion(status="failed", error="unreadable", finished_at=self.tick())
        stored = self.model.held(lease)
        assert self.run(self.store.mark_dead(lease, completion)) is (stored is not None)
        if stored is not None:
            self.model.end(stored, RecordState.DEAD, "failed", self.now)

    @rule(task_id=NAMES)
    def requeue(self, task_id: str) -> None:
        stored = self.model.records.get(task_id)
        outcome = self.run(self.store.requeue(task_id))
        if stored is None or stored.state is not RecordState.DEAD:
            assert outcome is None
        elif stored.record.key is not None and self.model.find_key(stored.record.key) is not None:
            assert outcome is PutResult.DUPLICATE
        elif self.model.full:
            assert outcome is PutResult.FULL
        else:
            assert outcome is PutResult.STORED
            stored.state, stored.status = RecordState.PARKED, None
            stored.record = msgspec.structs.replace(
                stored.record, attempts=0, failures=0, total_delay=0.0, last_error=None, usage=None
            )
            self.model.settle(stored.record.thread_id)

    @rule(task_id=NAMES)
    def delete_dead(self, task_id: str) -> None:
        stored = self.model.records.get(task_id)
        is_dead = stored is not None and stored.state is RecordState.DEAD
        assert self.run(self.store.delete_dead(task_id)) is is_dead
        if is_dead:
            del self.model.records[task_id]

    @rule(state=st.sampled_from(RecordState), size=st.integers(1, 4))
    def list_records(self, state: RecordState, size: int) -> None:
        pages, last = list[StoredRecord](), (-inf, "")
        while page := self.run(self.store.list_records(state, size, after=last)):
            assert len(page) <= size
            pages += page
            last = page[-1].position
        expected = self.model.listed(state)
        assert [each.position for each in pages] == [stored.position for stored in expected]
        assert [each.record for each in pages] == [
            msgspec.structs.replace(stored.record, envelope=b"") for stored in expected
        ]
        timed = state in (RecordState.LEASED, RecordState.DELAYED)
        assert [each.until for each in pages] == [stored.until if timed else None for stored in expected]
        statuses = [None if each.completion is None else each.completion.status for each in pages]
        assert statuses == [stored.status for stored in expected]

    @rule(age=st.sampled_from([0.0, 5.0, 20.0]))
    def prune(self, age: float) -> None:
        before = self.now - age
        old = [s for s in self.model.within(RecordState.DONE) if s.finished_at < before]
        assert self.run(self.store.prune(before=before)) == len(old)
        for stored in old:
            del self.model.records[stored.record.task_id]

    @rule()
    def reopen(self) -> None:
        self.run(self.store.close())
        self.run(self.store.open())

    @rule(task_id=NAMES, key=st.sampled_from(["k", "l", "m"]))
    def find(self, task_id: str, key: str) -> None:
        assert self.run(self.store.find_key(key)) == self.model.find_key(key)
        found = self.run(self.store.find(task_id))
        stored = self.model.records.get(task_id)
        if stored is None:
            assert found is None
            return
        assert found is not None
        state, record, completion = found
        hides = state in UNFINISHED and ENVELOPE not in self.store_backend.can
        expected = msgspec.structs.replace(stored.record, envelope=b"") if hides else stored.record
        assert (state, record) == (stored.state, expected)
        assert (None if completion is None else completion.status) == stored.status

    @invariant()
    def depths_agree(self) -> None:
        waiting = self.model.within(RecordState.WAITING)
        records = [stored.record for stored in waiting]
        expected = Counter((record.task_type, record.priority, record.tenant) for record in records)
        assert self.run(self.store.depths()) == expected

    @invariant()
    def leases_agree(self) -> None:
        expected = Counter(stored.record.task_type for stored in self.model.within(RecordState.LEASED))
        assert self.run(self.store.leased()) == expected

    @invariant()
    def conversations_agree(self) -> None:
        threads = [stored.record.thread_id for stored in self.model.within(*UNFINISHED)]
        expected = Counter(thread_id for thread_id in threads if thread_id is not None)
        assert self.run(self.store.conversations()) == expected
        for stored in self.model.within(*UNFINISHED):
            found = self.run(self.store.find(stored.record.task_id))
            assert found is not None
            assert found[0] is stored.state


def test_random_operations_give_the_answers_of_the_model(backend: StoreBackend) -> None:
    class Machine(TaskStoreMachine):
        store_backend = backend

    profile = settings()
    if backend.slow:
        run_state_machine_as_test(
            Machine, settings=settings(max_examples=profile.max_examples // 5, stateful_step_count=30)
        )
    else:
        run_state_machine_as_test(Machine, settings=settings(max_examples=profile.max_examples // 2))
