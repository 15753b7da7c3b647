"""A storm of retries, drawn from a seed: handlers fail, hang and are overloaded, tasks are cancelled, processes drain.

The checks use what handlers see, the record of events, and the retry budget's own withdrawals: every task ends once,
within its attempts; retries never pass the budget; no slot is held between two attempts, and no two attempts at a task
run at a time; a retry goes behind what waits already, and work of another worker is not delayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tests.support.supervisor_checks import InvariantViolation, check_supervisor, fail_if_any

from forebay import (
    BackpressureSupervisor,
    Deadline,
    ForebayError,
    Overloaded,
    Priority,
    Retry,
    Task,
    TaskStatus,
    Ticket,
)
from forebay.events import TaskFinished, TaskRetried, TaskStarted, TaskSubmitted, ZombieFound
from forebay.retry import RetryBudget
from forebay.simulation import simulate, virtual_loop
from forebay.testing import EventRecord

TYPES: Final = ("plan", "act")
HEALTHY: Final = "healthy"  # a type whose worker takes no other
PATIENCE: Final = 20_000.0  # seconds in which everything must have ended: many times the work of a storm
GRACE: Final = 2.0  # seconds
TIMER_SLACK: Final = 1e-3  # seconds


class RecordingBudget(RetryBudget):
    """A retry budget that remembers when it was used."""

    __slots__ = ("deposits", "extra", "share", "window", "withdrawals")

    def __init__(self, *, share: float, extra: int, window: float) -> None:
        super().__init__(share=share, extra=extra, window=window)
        self.share, self.extra, self.window = share, extra, window
        self.deposits: list[float] = []
        self.withdrawals: list[float] = []

    def deposit(self, now: float) -> None:
        """Record a first attempt."""
        super().deposit(now)
        self.deposits.append(now)

    def withdraw(self, now: float, *, keep: float = 0.0) -> bool:
        """Record a retry."""
        allowed = super().withdraw(now, keep=keep)
        if allowed:
            self.withdrawals.append(now)
        return allowed

    def excesses(self) -> Iterator[str]:
        """Yield the moments at which there were more retries than the budget of the last window allows."""
        for number, at in enumerate(self.withdrawals, 1):
            retries = sum(at - self.window < other for other in self.withdrawals[:number])
            first = sum(at - 1.1 * self.window < other <= at for other in self.deposits)
            if retries > self.share * first + self.extra + 1e-6:
                yield f"at {at:.3f} s there were {retries} retries in {self.window:.0f} s, after {first} first attempts"


@dataclass
class RetryStorm:
    """One storm.

    Attributes:
        happened: how often each thing happened.
        violations: what handlers saw that must not be.
        running: how many attempts at a task run, by its id.
        at_work: how many handlers work, by worker; those that await a nested task do not.
    """

    seed: int
    happened: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    running: Counter[str] = field(default_factory=Counter)
    at_work: Counter[str] = field(default_factory=Counter)
    talking: Counter[str] = field(default_factory=Counter)
    tickets: list[Ticket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(f"retries {self.seed}")
        self.fails = rng.choice((0.1, 0.3, 0.7, 1.0))
        self.hangs = rng.choice((0.0, 0.1))
        self.stubborn = rng.choice((0.0, 0.3))  # of those that hang: they ignore their cancellation
        self.nests = rng.choice((0.0, 0.2))
        self.deadlines = rng.choice((0.0, 0.3))
        self.budget = RecordingBudget(
            share=rng.choice((0.0, 0.2, 1.0)), extra=rng.choice((0, 3, 50)), window=rng.choice((5.0, 60.0))
        )
        self.supervisor = BackpressureSupervisor(
            max_queue_size=rng.choice((None, 3, 20)),
            overflow=rng.choice((None, None, "memory://")),
            retry_budget=self.budget,
            zombie_grace=GRACE,
        )
        self.policies: dict[str, Retry | None] = {}  # by worker
        for number in range(rng.randint(1, 3)):
            self._register(f"w{number}", TYPES if number == 0 else rng.sample(TYPES, rng.randint(1, 2)), retry=True)
        self._register(HEALTHY, (HEALTHY,), retry=False)

    def _register(self, name: str, kinds: Any, *, retry: bool) -> None:
        rng = self.rng
        self.policies[name] = policy = self._policy() if retry and rng.random() < 0.9 else None

        async def handle(task: Task) -> Any:
            return await self._handle(name, task)

        self.supervisor.register_worker(
            name,
            handler=handle,
            task_types=kinds,
            max_concurrent=100 if name == HEALTHY else rng.randint(1, 4),
            timeout=rng.choice((3.0, 30.0)),
            retry=policy,
            reset_timeout=1.0,
        )

    def _policy(self) -> Retry:
        rng = self.rng
        base = rng.choice((0.01, 1.0, 10.0))
        return Retry(
            max_attempts=rng.choice((1, 2, 3, 6)),
            base_delay=base,
            max_delay=10 * base,
            max_total_delay=rng.choice((1.0, 60.0, 600.0)),
            on=rng.choice((Exception, Exception, (ConnectionError, TimeoutError), _is_connection_error)),
        )

    # --- handlers ---

    @contextlib.contextmanager
    def _counted(self, task: Task) -> Iterator[None]:
        task_id, thread = task.task_id, task.thread_id
        self.running[task_id] += 1
        zombies = [event.task_id for event in self.record.of_type(ZombieFound)] if self.running[task_id] > 1 else []
        if self.running[task_id] > 1 + zombies.count(task_id):
            self.violations.append(f"two attempts at {task_id} run at {virtual_loop().time():.3f} s")
        if thread is not None:
            self.talking[thread] += 1
            if self.talking[thread] > 1:
                self.violations.append(f"two tasks of {thread} run at {virtual_loop().time():.3f} s")
        try:
            yield
        finally:
            self.running[task_id] -= 1
            if thread is not None:
                self.talking[thread] -= 1

    @contextlib.contextmanager
    def _working(self, worker: str) -> Iterator[None]:
        self.at_work[worker] += 1
        try:
            yield
        finally:
            self.at_work[worker] -= 1

    async def _handle(self, worker: str, task: Task) -> Any:
        rng = self.rng
        with self._counted(task):
            with self._working(worker):
                try:
                    await asyncio.sleep(100.0 if worker != HEALTHY and rng.random() < self.hangs else rng.random())
                except asyncio.CancelledError:
                    if rng.random() >= self.stubborn:
                        raise
                    await asyncio.sleep(rng.uniform(0.0, 3 * GRACE))
                    return None
            if task.payload["depth"] and rng.random() < 0.5:
                with contextlib.suppress(ForebayError):
                    await self.supervisor.run(self._draw(task.payload["depth"] - 1, nested=True))
            with self._working(worker):
                if worker != HEALTHY and rng.random() < self.fails:
                    raise rng.choice(
                        (
                            ConnectionError("no answer"),
                            ValueError("an answer that makes no sense"),
                            Overloaded("the account is full", retry_after=rng.uniform(0.0, 20.0)),
                        )
                    )
            return task.task_id

    # --- callers ---

    def _draw(self, depth: int, *, nested: bool = False) -> Task:
        rng = self.rng
        healthy = not nested and rng.random() < 0.2
        return Task(
            HEALTHY if healthy else rng.choice(TYPES),
            {"depth": 0 if healthy else depth},
            priority=rng.choice(tuple(Priority)),
            deadline=Deadline.within(rng.uniform(1.0, 60.0)) if rng.random() < self.deadlines else None,
            thread_id=f"c{rng.randrange(3)}" if not (nested or healthy) and rng.random() < 0.2 else None,
            retry=Retry(max_attempts=4, base_delay=0.1) if rng.random() < 0.1 else None,
        )

    async def _call(self, at: float) -> None:
        rng = self.rng
        await asyncio.sleep(at)
        task = self._draw(2 if rng.random() < self.nests else 0)
        try:
            ticket = await self.supervisor.submit(task)
        except ForebayError as error:  # the supervisor drains
            self.happened[type(error).__name__] += 1
            return
        self.tickets.append(ticket)
        if rng.random() < 0.1:
            await asyncio.sleep(rng.uniform(0.0, 20.0))
            ticket.cancel()

    async def _watch_slots(self) -> None:
        """Check again and again that each slot that is taken is held by a handler that works."""
        while True:
            await asyncio.sleep(0.1234567)
            for worker in self.supervisor.workers.values():
                if worker.current_tasks != self.at_work[worker.name]:
                    self.violations.append(
                        f"at {virtual_loop().time():.3f} s {worker.current_tasks} slots of {worker.name} are taken,"
                        f" and {self.at_work[worker.name]} handlers work"
                    )

    # --- the whole storm ---

    async def run(self) -> None:
        """Run the storm, drain, and check what was promised."""
        rng = self.rng
        async with self.supervisor:
            record = self.record = EventRecord(self.supervisor)
            watch = asyncio.ensure_future(self._watch_slots())
            spread = rng.choice((0.0, 5.0, 60.0))
            callers = [asyncio.ensure_future(self._call(rng.uniform(0.0, spread))) for _ in range(rng.randint(10, 80))]
            limit = rng.choice((None, 0.0, 5.0))
            if rng.random() < 0.5:
                await asyncio.wait(callers)
            else:
                await asyncio.sleep(rng.uniform(0.0, 2 * spread))
            before = virtual_loop().time()
            await asyncio.wait_for(self.supervisor.drain(limit), PATIENCE)
            took = virtual_loop().time() - before
            if limit is not None and took > limit + GRACE + TIMER_SLACK:
                self.violations.append(f"a drain of at most {limit} s took {took:.3f} s")
            self.happened["drained" if limit is None else "drained within a limit"] += 1
            await asyncio.wait(callers)
            watch.cancel()
        await asyncio.sleep(200.0)  # until handlers that ignored their cancellation have ended
        self._check(record)

    def _check(self, record: EventRecord) -> None:
        fail_if_any("what handlers see is as promised", self.violations)
        check_supervisor(record, tickets=[ticket for ticket in self.tickets if ticket], nested=True, zombies=True)
        fail_if_any("retries are within their budget", [*self.budget.excesses()])
        fail_if_any("attempts are as promised", [*self._wrong_attempts(record)])
        fail_if_any("a retry goes behind what waits", [*_overtaken(record)])
        fail_if_any("failing work delays no other worker", [*_delayed(record)])
        if self.supervisor.statistics().retries != len(self.budget.withdrawals):
            message = "the statistics count other retries than the budget"
            raise InvariantViolation(message)
        self.happened.update(
            {
                "retried": len(record.of_type(TaskRetried)),
                "retries": len(self.budget.withdrawals),
                "zombies": len(record.of_type(ZombieFound)),
                "budget used up": sum(
                    "budget of the supervisor" in (result.error or "") for result in record.results.values()
                ),
            }
        )
        self.happened.update(status.value for status in record.statuses.values())

    def _wrong_attempts(self, record: EventRecord) -> Iterator[str]:
        starts = Counter(event.task_id for event in record.of_type(TaskStarted))
        bound = max((policy.max_attempts for policy in self.policies.values() if policy is not None), default=1)
        for task_id, result in record.results.items():
            policy = record.tasks[task_id].retry if task_id in record.tasks else None
            most = bound if policy is None else policy.max_attempts
            if starts[task_id] > most:
                yield f"{task_id} was started {starts[task_id]} times, of {most}"
            if result.attempts != starts[task_id]:
                yield f"{task_id} was started {starts[task_id]} times, and its result says {result.attempts}"
        retries = sum(1 for event in record.of_type(TaskStarted) if event.attempt > 1)
        if retries > len(self.budget.withdrawals):
            yield f"there were {retries} retries, and the budget allowed {len(self.budget.withdrawals)}"
        retried = [event.task_id for event in record.of_type(TaskRetried)]
        ended = {event.task_id for event in record.of_type(TaskFinished)}
        yield from (f"{task_id} was to be retried, and has not ended" for task_id in retried if task_id not in ended)


def _is_connection_error(error: BaseException) -> bool:
    return isinstance(error, ConnectionError)


def _overtaken(record: EventRecord) -> Iterator[str]:
    """Yield retries that started before tasks of their type and priority which had waited when the retry was due."""
    compared = {
        task_id
        for task_id, task in record.tasks.items()
        if task.deadline is None and task.thread_id is None and task_id not in record.nested
    }
    queued: dict[tuple[str, Priority], dict[str, float]] = defaultdict(dict)  # and when, by task id
    due: dict[str, float] = {}
    for event in record.events:
        if isinstance(event, TaskSubmitted) and event.task_id in compared and event.verdict.value == "admitted":
            queued[event.task_type, event.priority][event.task_id] = event.at
        elif isinstance(event, TaskRetried):
            due[event.task_id] = event.at + event.delay
        elif isinstance(event, TaskStarted | TaskFinished) and event.task_id in compared:
            task = record.tasks[event.task_id]
            waiting = queued[task.task_type, task.priority]
            waiting.pop(event.task_id, None)
            if isinstance(event, TaskStarted) and event.attempt > 1:
                before = [task_id for task_id, at in waiting.items() if at < due[event.task_id]]
                if before:
                    yield f"{event.task_id} was retried at {event.at:.3f} s, before {before}"


def _delayed(record: EventRecord) -> Iterator[str]:
    submitted = {event.task_id: event.at for event in record.submitted if event.task_type == HEALTHY}
    for event in record.of_type(TaskStarted):
        if event.task_id in submitted and event.at > submitted[event.task_id] + TIMER_SLACK:
            yield f"{event.task_id} of a healthy type waited for {event.at - submitted[event.task_id]:.3f} s"
    for task_id, result in record.results.items():
        if task_id in submitted and result.status in (TaskStatus.FAILED, TaskStatus.TIMED_OUT):
            yield f"{task_id} of a healthy type has ended {result.status.value}"


def run(seed: int) -> RetryStorm:
    """Run the storm of one seed; raise if an invariant is violated, or at a deadlock or an unhandled error."""
    storms: list[RetryStorm] = []

    async def main() -> None:
        storms.append(RetryStorm(seed))
        await storms[0].run()

    simulate(main, seed=seed, max_time=1e6)
    return storms[0]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument, run(int(argument)).happened, sep="\n")
