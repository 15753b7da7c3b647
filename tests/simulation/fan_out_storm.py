"""A storm of fan-outs, drawn from a seed: wider than queue and slots, nested, hedged, with quorums, left half-way.

Each fan-out counts what it gets: one result for each task that it had, in order where that was asked for, and no more
tasks outstanding than its limit. Nothing stands still, whatever waits for whom; and who leaves leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tests.support.supervisor_checks import check_supervisor, fail_if_any

from forebay import BackpressureSupervisor, Deadline, ForebayError, Priority, Retry, Task
from forebay.errors import QuorumNotReached, SupervisorClosed, WouldDeadlock
from forebay.events import TaskFinished, TaskStarted
from forebay.retry import RetryBudget
from forebay.simulation import simulate, virtual_loop
from forebay.supervisor.fan_out import FanOut, FanOutProgress, Hedge
from forebay.testing import EventRecord

TYPES: Final = ("plan", "act")
PATIENCE: Final = 20_000.0  # seconds in which everything must have ended: many times the work of a storm
GRACE: Final = 2.0  # seconds
DEPTH: Final = 2


@dataclass(frozen=True)
class FanOutPlan:
    """One fan-out: its arguments, and what its reader does.

    Attributes:
        tasks: the tasks, in order.
        retry, limit, quorum, hedge, ordered: as the arguments of `fan_out`.
        lazily: the tasks come from a generator.
        leaves_after: results after which the reader leaves; None: it reads to the end.
        slow: seconds that the reader takes for a result.
    """

    tasks: list[Task]
    retry: Retry | None
    limit: int | None
    quorum: int | None
    hedge: Hedge | None
    ordered: bool
    lazily: bool
    leaves_after: int | None
    slow: float


@dataclass
class FanOutStorm:
    """One storm.

    Attributes:
        happened: how often each thing happened.
        violations: what readers saw that must not be.
        left: ids of the tasks whose reader has left, and when.
        asked: ids of all tasks of fan-outs.
    """

    seed: int
    happened: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(f"fan-outs {self.seed}")
        self.fails = rng.choice((0.0, 0.1, 0.5))
        self.nests = rng.choice((0.0, 0.1, 0.3))
        self.leaves = rng.choice((0.0, 0.3))
        self.deadlines = rng.choice((0.0, 0.0, 0.2))
        self.supervisor = BackpressureSupervisor(
            max_queue_size=rng.choice((0, 1, 3, 20, None)),
            overflow=rng.choice((None, None, "memory://")),
            retry_budget=RetryBudget(share=rng.choice((0.2, 1.0)), extra=rng.choice((0, 50))),
            zombie_grace=GRACE,
        )
        for number in range(rng.randint(1, 3)):
            self.supervisor.register_worker(
                f"w{number}",
                handler=self._handle,
                task_types=TYPES if number == 0 else rng.sample(TYPES, rng.randint(1, 2)),
                max_concurrent=rng.randint(1, 4),
                max_open=rng.choice((None, 4)),
                reset_timeout=1.0,
            )

    # --- drawing ---

    def _plan(self, depth: int) -> FanOutPlan:
        rng = self.rng
        count = rng.choice((0, 1, 2, 5, 12) if depth < DEPTH else (1, 5, 30, 100))
        kinds = rng.sample(TYPES, rng.randint(1, 2))
        return FanOutPlan(
            tasks=[self._task(rng.choice(kinds), depth) for _ in range(count)],
            retry=Retry(max_attempts=3, base_delay=0.5) if rng.random() < 0.3 else None,
            limit=rng.choice((None, None, 1, 3)),
            quorum=rng.randint(1, count) if count and rng.random() < 0.2 else None,
            hedge=rng.choice((None, None, None, 1.0, "p95")),
            ordered=rng.random() < 0.3,
            lazily=rng.random() < 0.5,
            leaves_after=rng.randrange(count) if count and rng.random() < self.leaves else None,
            slow=rng.choice((0.0, 0.0, 0.3)),
        )

    def _task(self, kind: str, depth: int) -> Task:
        rng = self.rng
        task_id = f"t{next(self.numbers)}"
        self.asked.add(task_id)
        return Task(
            kind,
            {"depth": depth if rng.random() < self.nests else 0},
            task_id=task_id,
            priority=rng.choice(tuple(Priority)) if depth == DEPTH else Priority.NORMAL,
            deadline=Deadline.within(rng.uniform(0.5, rng.choice((5.0, 200.0))))
            if rng.random() < self.deadlines
            else None,
            spill=rng.random() < 0.3,
        )

    # --- handlers ---

    async def _handle(self, task: Task) -> str:
        rng = self.rng
        await asyncio.sleep(20.0 if rng.random() < 0.03 else rng.random())
        if task.payload["depth"] and rng.random() < 0.8:
            await self._fan_out(self._plan(task.payload["depth"] - 1))
        if rng.random() < self.fails:
            message = "the agent failed"
            raise ConnectionError(message)
        return task.task_id

    # --- readers ---

    async def _fan_out(self, plan: FanOutPlan) -> None:
        states: list[FanOutProgress] = []
        fan_out = self.supervisor.fan_out(
            iter(plan.tasks) if plan.lazily else plan.tasks,
            retry=plan.retry,
            limit=plan.limit,
            quorum=plan.quorum,
            hedge=plan.hedge,
            ordered=plan.ordered,
            progress=states.append,
        )
        got: list[str] = []
        successes = 0
        try:
            async with fan_out:
                async for result in self._read(fan_out, plan):
                    got.append(result.task_id)
                    successes += result.success
                    if states and states[-1].submitted - len(got) > (plan.limit or len(plan.tasks)):
                        self.violations.append(f"{states[-1].submitted - len(got)} outstanding, of {plan.limit}")
                    self.happened[f"result {result.status.value}"] += 1
        except QuorumNotReached:
            self.happened["quorum not reached"] += 1
            if plan.quorum is None or len(plan.tasks) - states[-1].failed >= plan.quorum:
                self.violations.append(f"a quorum of {plan.quorum} was given up after {states[-1]}")
        except (SupervisorClosed, WouldDeadlock) as error:
            self.happened[type(error).__name__] += 1
        else:
            self._check_results(plan, got, successes)
        finally:
            now = virtual_loop().time()
            self.left.update((task.task_id, now) for task in plan.tasks if task.task_id not in got)

    async def _read(self, fan_out: FanOut, plan: FanOutPlan) -> AsyncIterator[Any]:
        count = 0
        async for result in fan_out:
            if count == plan.leaves_after:
                self.happened["left"] += 1
                return
            count += 1
            yield result
            await asyncio.sleep(plan.slow)

    def _check_results(self, plan: FanOutPlan, got: list[str], successes: int) -> None:
        ids = [task.task_id for task in plan.tasks]
        if len(set(got)) < len(got) or not set(got) <= set(ids):
            self.violations.append(f"results of {got}, for tasks {ids}")
        if plan.ordered and got != [task_id for task_id in ids if task_id in got]:
            self.violations.append(f"results in the order {got}, of tasks {ids}")
        if plan.leaves_after is None and plan.quorum is None and len(got) < len(ids):
            self.violations.append(f"{len(got)} results for {len(ids)} tasks")
        if plan.leaves_after is None and plan.quorum is not None:
            self.happened["quorum reached"] += 1
            if successes != plan.quorum:
                self.violations.append(f"{successes} successes, and a quorum of {plan.quorum}")

    # --- the whole storm ---

    async def run(self) -> None:
        """Run the storm, drain, and check what was promised."""
        rng = self.rng
        async with self.supervisor:
            record = EventRecord(self.supervisor)
            readers = [asyncio.ensure_future(self._fan_out(self._plan(DEPTH))) for _ in range(rng.randint(1, 6))]
            if rng.random() < 0.7:
                done, pending = await asyncio.wait(readers, timeout=PATIENCE)
                self.violations += [f"a fan-out has not ended after {PATIENCE} s" for _ in pending]
                for reader in done:
                    reader.result()
            else:
                await asyncio.sleep(rng.uniform(0.0, 20.0))
                for reader in readers:
                    if rng.random() < 0.3:
                        self.happened["reader cancelled"] += reader.cancel()
            await asyncio.wait_for(self.supervisor.drain(rng.choice((None, None, 5.0))), PATIENCE)
            await asyncio.wait_for(asyncio.wait(readers), PATIENCE)
            for reader in readers:
                with contextlib.suppress(asyncio.CancelledError, ForebayError):
                    reader.result()
        self._check(record)

    def _check(self, record: EventRecord) -> None:
        fail_if_any("fan-outs give what they promise", self.violations)
        check_supervisor(record, nested=True, zombies=True)
        fail_if_any("who leaves cancels what has not ended", [*self._worked_on(record)])
        hedges = [task_id for task_id in record.results if task_id not in self.asked]
        self.happened["hedges"] += len(hedges)
        self.happened["hedges that won"] += sum(record.results[hedge].success for hedge in hedges)
        self.happened.update(status.value for status in record.statuses.values())

    def _worked_on(self, record: EventRecord) -> Iterator[str]:
        for event in record.of_type(TaskStarted):
            if event.at > self.left.get(event.task_id, event.at):
                left = self.left[event.task_id]
                yield f"{event.task_id} started at {event.at:.3f} s: its reader left at {left:.3f} s"
        for end in record.of_type(TaskFinished):
            if end.at > self.left.get(end.task_id, end.at) + GRACE:
                yield f"{end.task_id} ended at {end.at:.3f} s: its reader left at {self.left[end.task_id]:.3f} s"


def run(seed: int) -> FanOutStorm:
    """Run the storm of one seed; raise if an invariant is violated, or at a deadlock or an unhandled error."""
    storms: list[FanOutStorm] = []

    async def main() -> None:
        storms.append(FanOutStorm(seed))
        await storms[0].run()

    simulate(main, seed=seed, max_time=1e6)
    return storms[0]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument, run(int(argument)).happened, sep="\n")
