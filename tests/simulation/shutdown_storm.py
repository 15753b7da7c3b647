"""The end of a supervisor with a backlog, drawn from a seed: it drains or closes in time, whatever its store does.

The store is fast, slow or silent. What waits moves to it in time, what cannot is ended and counted, nothing starts once
closing has begun, and a successor on the same store runs what is left, each conversation in its order and one message
at a time. It starts when the supervisor has closed, or as soon as its end begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from tests.support.supervisor_checks import fail_if_any

from forebay import BackpressureSupervisor, ForebayError, Priority, Task, TaskStatus, Ticket
from forebay.errors import StillSpilled
from forebay.interfaces import Lease, PutResult, RecordState, TaskRecord
from forebay.overflow import MemoryTaskStore
from forebay.simulation import simulate, virtual_loop

GRACE: Final = 2.0  # seconds that a cancelled handler has to stop
CLOSE_TIME: Final = 5.0  # seconds that the queue has to move when a supervisor closes
RELEASE_TIME: Final = 10.0  # seconds that the store then has to take leases back
PATIENCE: Final = 1_000.0  # seconds in which the successor must have finished what was left


class SlowStore(MemoryTaskStore):
    """A store that outlives its processes; writes that are made at once take one commit, or all of them hang."""

    durable = True

    def __init__(self, seconds: float) -> None:
        super().__init__(bound=10_000)
        self.seconds = seconds
        self.silent = False
        self._processes = 0  # that have opened it

    async def open(self) -> None:
        self._processes += 1
        if self._processes == 1:
            await super().open()

    async def close(self) -> None:
        self._processes -= 1
        if not self._processes:
            await super().close()

    async def _commit(self) -> None:
        if self.silent:
            await asyncio.sleep(3600.0)
        if self.seconds:
            await asyncio.sleep(self.seconds)

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        await self._commit()
        return await super().put(record, fence=fence, until=until, now=now)

    async def release(self, leases: Sequence[Lease]) -> None:
        await self._commit()
        await super().release(leases)


@dataclass(frozen=True)
class ShutdownScript:
    """The values that a seed draws."""

    kinds: tuple[str, ...]
    slots: int
    work: float  # seconds at most
    backlog: int
    conversations: int
    nests: float  # probabilities
    stays: float  # that a task may not be stored
    durable: float
    stubborn: float  # that a handler ignores its cancellation
    commit: float  # seconds
    silent: bool  # the store answers nothing once the end has begun
    end: str
    limit: float | None
    ends_at: float

    @classmethod
    def draw(cls, rng: random.Random) -> ShutdownScript:
        """Draw a script."""
        choice = rng.choice
        return cls(
            kinds=tuple(f"type {number}" for number in range(choice((1, 2, 12)))),
            slots=rng.randint(1, 4),
            work=choice((0.01, 0.3, 60.0)),
            backlog=choice((5, 40, 150, 150, 1_500)),  # more than one commit takes
            conversations=choice((0, 3, 10)),
            nests=choice((0.0, 0.3)),
            stays=choice((0.0, 0.2)),
            durable=choice((0.0, 0.3)),
            stubborn=choice((0.0, 0.0, 0.1)),
            commit=choice((0.0, 0.03, 0.3)),
            silent=rng.random() < 0.25,
            end=choice(("drain", "close", "fail")),
            limit=choice((0.0, 0.1, 3.0, 3.0, None)),
            ends_at=choice((0.001, 0.5, 3.0)),
        )

    @property
    def in_time(self) -> bool:
        """True if the store has the time for a few commits, and takes it."""
        return not self.silent and (self.end != "drain" or self.limit is None or self.limit > 2.0)


class ShutdownStorm:
    """One supervisor, its end, and its successor.

    Attributes:
        happened: how often each thing happened.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"shutdown {seed}")
        self.script = ShutdownScript.draw(self.rng)
        self.happened: Counter[str] = Counter()
        self.violations: list[str] = []
        self.tickets: list[Ticket] = []
        self.nested: set[str] = set()
        early = random.Random(f"early {seed}")
        self.early = early.random() < 0.5  # the successor starts
        if self.early and early.random() < 0.5:  # and has the time to look at what is left
            self.script = replace(self.script, end="drain", limit=None, work=60.0)
        self.started: dict[str, float] = {}  # loop time, by task id
        self.taken_over: set[str] = set()  # ids of the tasks that the successor started
        self.talking: Counter[str] = Counter()  # by conversation, messages that run
        self.order: defaultdict[str, list[int]] = defaultdict(list)
        self._closing_at = float("inf")
        self._recorded: set[str] = set()  # conversations with a durable message, if the successor is early

    def _supervisor(self, store: SlowStore, *, last: bool) -> BackpressureSupervisor:
        script = self.script
        supervisor = BackpressureSupervisor(
            overflow=store, max_queue_size=2_000, backpressure_threshold=1.0, zombie_grace=GRACE
        )

        async def handle(task: Task) -> None:
            self._start(task, last=last)
            with self._talking(task):
                await work(task)

        async def work(task: Task) -> None:
            payload = task.payload
            try:
                await asyncio.sleep(0.0 if last else payload["work"])
                if payload["children"] and not last:
                    children = [self._draw(number=None) for _ in range(payload["children"])]
                    self.nested.update(child.task_id for child in children)
                    for ticket in [await supervisor.submit(child) for child in children]:
                        self.tickets.append(ticket)
                        await ticket
            except asyncio.CancelledError:
                if not payload["stubborn"]:
                    raise
                await asyncio.sleep(2 * GRACE)

        supervisor.register_worker("all", handler=handle, task_types=script.kinds, max_concurrent=script.slots)
        supervisor.register_worker("first", handler=handle, task_types=script.kinds[:1])
        return supervisor

    @contextlib.contextmanager
    def _talking(self, task: Task) -> Iterator[None]:
        if (thread := task.thread_id) is None:
            yield
            return
        self.talking[thread] += 1
        if self.talking[thread] > 1 and not self.script.stubborn:
            self._wrong(f"{self.talking[thread]} messages of conversation {thread!r} run at a time")
        try:
            yield
        finally:
            self.talking[thread] -= 1

    def _start(self, task: Task, *, last: bool) -> None:
        now = virtual_loop().time()
        self.started[task.task_id] = now
        if last:
            self.taken_over.add(task.task_id)
        elif now > self._closing_at:
            self.violations.append(f"{task.task_id!r} started {now - self._closing_at:.3f} s after closing had begun")
        if task.thread_id is not None and task.payload["number"] not in self.order[task.thread_id]:
            self.order[task.thread_id].append(task.payload["number"])

    def _draw(self, *, number: int | None) -> Task:
        rng, script = self.rng, self.script
        spill = rng.random() >= script.stays
        conversation = number is not None and script.conversations and rng.random() < 0.5
        task = Task(
            rng.choice(script.kinds),
            {
                "number": number,
                "work": rng.choice((0.0, script.work)),
                "children": rng.choice((1, 3)) if number is not None and rng.random() < script.nests else 0,
                "stubborn": rng.random() < script.stubborn,
            },
            priority=rng.choice(tuple(Priority)),
            spill=spill,
            durable=spill and rng.random() < script.durable,
            thread_id=f"c{rng.randrange(script.conversations)}" if conversation else None,
        )
        if self.early and task.durable and task.thread_id is not None:
            # A second one would wait in the store, where no other process knows what waits here before it.
            if task.thread_id in self._recorded:
                return msgspec.structs.replace(task, durable=False)
            self._recorded.add(task.thread_id)
        return task

    async def run(self) -> None:
        """Run the supervisor to its end, then its successor, and check what was promised."""
        script, store = self.script, SlowStore(self.script.commit)
        supervisor = self._supervisor(store, last=False)
        await supervisor.start()
        submitting = asyncio.ensure_future(self._submit_all(supervisor))
        await asyncio.sleep(script.ends_at)
        store.silent = script.silent
        successor = self._supervisor(store, last=True)
        if self.early:
            await successor.start()
        await self._end(supervisor)
        submitting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await submitting
        await asyncio.sleep(3 * GRACE)  # until stubborn handlers have ended
        store.silent = False
        await self._check_what_is_left(store, successor)
        fail_if_any("a supervisor with a backlog ends as promised", self.violations)

    async def _submit_all(self, supervisor: BackpressureSupervisor) -> None:
        for number in range(self.script.backlog):
            try:
                self.tickets.append(await supervisor.submit(self._draw(number=number)))
            except ForebayError:
                return

    async def _end(self, supervisor: BackpressureSupervisor) -> None:
        script, loop = self.script, virtual_loop()
        began = loop.time()
        self.happened[script.end] += 1
        if script.end == "drain":
            inside = [
                ticket for ticket in self.tickets if not ticket.done() and ticket.status is not TaskStatus.SPILLED
            ]
            report = await supervisor.drain(script.limit)
            if script.limit is not None and loop.time() - began > script.limit + GRACE + 0.1:
                self._wrong(f"a drain within {script.limit} s took {loop.time() - began:.3f} s")
            counted = report.finished + report.spilled + report.cancelled + report.unanswered + len(report.orphans)
            if counted < len(inside):
                self._wrong(f"{len(inside)} tasks were inside, and {report} has {counted}")
            self._check_tickets("after the drain", stored_too=False)
            self.happened["moved"] += report.spilled
        self._closing_at, began = loop.time(), loop.time()
        if script.end == "fail":
            await supervisor.__aexit__(ValueError, ValueError(), None)
        else:
            await supervisor.close()
        if loop.time() - began > GRACE + CLOSE_TIME + RELEASE_TIME + 0.1:
            self._wrong(f"closing took {loop.time() - began:.1f} s")
        self._closing_at = float("inf")  # the successor starts
        self._check_tickets("after closing", stored_too=True)

    def _check_tickets(self, when: str, *, stored_too: bool) -> None:
        for ticket in self.tickets:
            if not ticket.done() and (stored_too or not ticket.stored):
                self._wrong(f"{ticket!r} has not ended {when}")
            result = ticket.result
            waited = result is not None and result.status is TaskStatus.CANCELLED and ticket.task_id not in self.started
            if waited and ticket.task.spill and ticket.task_id not in self.nested and self.script.in_time:
                self._wrong(f"{ticket!r} waited and was not moved to a store that had the time: {result}")

    async def _check_what_is_left(self, store: SlowStore, successor: BackpressureSupervisor) -> None:
        left = [ticket.task_id for ticket in self.tickets if await _is_left(ticket)]
        await store.open()
        for task_id in left:
            found = await store.find(task_id)
            if (found is None or found[0] is RecordState.DONE) and task_id not in self.taken_over:
                self._wrong(f"{task_id!r} is said to be stored, and is not: {found and found[0]}")
        await store.close()
        if not self.early:
            await successor.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):  # a lease that could not be returned has to lapse
                for task_id in left:
                    with contextlib.suppress(ForebayError):
                        if (ticket := await successor.find(task_id)) is not None:
                            await ticket
        await successor.drain()
        await successor.close()
        if missing := [task_id for task_id in left if task_id not in self.taken_over]:
            self._wrong(f"the successor did not run {missing}")
        self.happened["run by the successor"] += len(left)
        for thread, numbers in self.order.items():
            if numbers != sorted(numbers):
                self._wrong(f"conversation {thread!r} began in the order {numbers}")

    def _wrong(self, what: str) -> None:
        self.violations.append(what)


async def _is_left(ticket: Ticket) -> bool:
    """Return whether a ticket that is done says that its task is left to the next process."""
    if not ticket or not ticket.done():
        return False
    try:
        await ticket
    except StillSpilled:
        return True
    except ForebayError:
        pass
    return False


def run(seed: int) -> ShutdownStorm:
    """Run the storm of one seed; raise if an invariant is violated, or at a deadlock or an unhandled error."""
    storm = ShutdownStorm(seed)
    simulate(storm.run, seed=seed, max_time=1e6)
    return storm


if __name__ == "__main__":
    import logging
    import sys

    logging.disable()
    for argument in sys.argv[1:]:
        outcome: Any = run(int(argument))
        print(argument, outcome.script, outcome.happened, sep="\n")
