"""Workers of many task types: they are served as those of few are, at a cost that does not grow with the types."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any, Self

import pytest
from tests.support.task_plane import run_ready, virtual

from forebay import BackpressureSupervisor, Priority, Task, clock
from forebay.supervisor import pools as pools_module
from forebay.supervisor.pool import NESTED, NOT_NESTED, Pool
from forebay.supervisor.pools import PoolGroup
from forebay.supervisor.tenants import Tenants

KINDS = [f"type {number}" for number in range(12)]
Head = tuple[int, tuple[int, float], int]


class Waiting:
    """A group and what waits in its pools, for which the order is found by a search."""

    def __init__(self) -> None:
        self.pools = [Pool(kind, None, Tenants({})) for kind in KINDS]
        self.group = PoolGroup(self.pools)
        self.sequence = 0
        self.passed_over = dict.fromkeys(self.pools, 0)

    def enqueue(self, pool: Pool, priority: Priority, rank: tuple[int, float]) -> tuple[Any, Any]:
        self.sequence += 1
        ticket: Any = SimpleNamespace(nested=rank[0] == NESTED, task=Task(pool.task_type, priority=priority))
        return ticket, pool.enqueue(ticket, rank, self.sequence)

    def expected(self) -> Pool | None:
        heads = {pool: (head[3], head[0], head[1]) for pool in self.pools if (head := pool.queue.head()) is not None}
        starving = [pool for pool in heads if self.passed_over[pool] >= max(20, len(heads))]
        chosen = max(starving, key=self.passed_over.__getitem__, default=None) or min(
            heads, key=heads.__getitem__, default=None
        )
        self.passed_over = {
            pool: self.passed_over[pool] + 1 if pool in heads and pool is not chosen else 0 for pool in self.pools
        }
        return chosen


@pytest.mark.parametrize("seed", range(20))
def test_the_waiting_pool_with_the_most_urgent_head_is_next_and_none_is_passed_over_for_long(seed: int) -> None:
    rng = clock.new_random(seed)
    waiting, entries = Waiting(), []
    for _ in range(400):
        for _ in range(rng.randint(0, 2)):
            pool, priority = rng.choice(waiting.pools), rng.choice(list(Priority))
            rank = (rng.choice((NESTED, NOT_NESTED)), float(rng.randint(0, 5)))
            entries.append((pool, *waiting.enqueue(pool, priority, rank)))
        if entries and rng.random() < 0.2:
            pool, ticket, entry = entries.pop(rng.randrange(len(entries)))
            pool.remove(ticket, entry)
        if rng.random() < 0.2 and (busy := [pool for pool in waiting.pools if pool.queue]):
            rng.choice(busy).pop()  # by a worker that does not serve the others
        expected = waiting.expected()
        assert waiting.group.next_pool() is expected
        if expected is not None:
            expected.pop()
        assert len(waiting.group._heap) <= 2 * len(KINDS) + 17


async def starts(seed: int, overflow: str | None) -> list[tuple[str, Any]]:
    """Return what a worker of all types and one of a single type start, for tasks drawn from a seed.

    They are few, so that no pool is passed over too often: that is where the two differ.
    """
    rng, started = clock.new_random(seed), []
    supervisor = BackpressureSupervisor(overflow=overflow, max_queue_size=2, backpressure_threshold=1.0)

    def handler(name: str) -> Callable[[Task], Any]:
        async def handle(task: Task) -> None:
            started.append((name, task.payload))
            for child in range(task.payload["children"]):
                nested = Task(task.task_type, {"number": (task.payload["number"], child), "children": 0})
                await supervisor.run(nested)

        return handle

    supervisor.register_worker("all", handler=handler("all"), task_types=KINDS, max_concurrent=1)
    supervisor.register_worker("one", handler=handler("one"), task_types=KINDS[:1], max_concurrent=1)
    async with supervisor:
        for number in range(12):
            payload = {"number": number, "children": rng.choice((0, 0, 1))}
            kind, priority = rng.choice(KINDS[:10]), rng.choice(list(Priority))
            await supervisor.submit(Task(kind, payload, priority=priority))
            if rng.random() < 0.2:
                await run_ready()
        await supervisor.drain()
    return started


@pytest.mark.parametrize("overflow", [None, "memory://"])
@pytest.mark.parametrize("seed", range(10))
@virtual
async def test_a_worker_of_many_types_starts_tasks_as_one_of_few_types_does(
    seed: int, overflow: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_many = await starts(seed, overflow)
    monkeypatch.setattr(pools_module, "_MANY", len(KINDS))
    assert as_many == await starts(seed, overflow)


@virtual
async def test_the_counts_of_a_pool_hold_its_workers_of_few_and_of_many_types() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("many", handler=run_ready_for, task_types=KINDS, max_concurrent=2)
    supervisor.register_worker("few", handler=run_ready_for, task_types=KINDS[:1], max_concurrent=3)
    async with supervisor:
        for _ in range(6):
            await supervisor.submit(Task(KINDS[0]))
        statistics = supervisor.statistics()
        assert {worker.name: worker.current_tasks for worker in statistics.workers} == {"many": 2, "few": 3}
        assert not supervisor.submit_nowait(Task(KINDS[1], priority=Priority.LOW)).done()
        await supervisor.drain()


async def run_ready_for(_: Task) -> None:
    await run_ready()


# --- what it costs: lines of Python that are executed ----------------------------------------------------------------


class LineCount:
    """Counts the lines of Forebay that are executed: each turn of a loop is one more."""

    def __init__(self) -> None:
        self.lines = 0

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if "forebay" not in frame.f_code.co_filename:
            return None
        self.lines += event == "line"
        return self._trace


async def lines_per_task(types: int, *, waiting: int = 0, overflow: str | None = None) -> float:
    """Return the lines for each of a few tasks that start at once, behind others that wait in all pools."""
    supervisor = BackpressureSupervisor(max_queue_size=10_000, overflow=overflow, lag_bound=None)
    kinds = [f"type {number}" for number in range(types)]
    supervisor.register_worker("worker", handler=run_ready_for, task_types=kinds, max_concurrent=5)
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task(kinds[number % types])) for number in range(waiting)]
        with LineCount() as count:
            for number in range(20):
                tickets.append(await supervisor.submit(Task(kinds[number % types])))
                await run_ready()
            await tickets[-1]
        await supervisor.drain()
    return count.lines / (20 + waiting)


@pytest.mark.parametrize("overflow", [None, "memory://"])
@pytest.mark.parametrize("waiting", [0, 1_000])
@virtual
async def test_a_task_costs_the_same_on_a_worker_of_a_thousand_types(waiting: int, overflow: str | None) -> None:
    few, many = [await lines_per_task(types, waiting=waiting, overflow=overflow) for types in (10, 1_000)]
    assert many < 1.5 * few


async def lines_per_agent(types: int) -> float:
    """Return the lines for each agent that runs a nested task, while others wait in all pools."""
    supervisor = BackpressureSupervisor(max_queue_size=10_000, lag_bound=None)

    async def handle(task: Task) -> None:
        if task.payload:
            await supervisor.run(Task(task.task_type))

    kinds = [f"type {number}" for number in range(types)]
    supervisor.register_worker("worker", handler=handle, task_types=kinds, max_concurrent=5)
    async with supervisor:
        for number in range(1_000):
            supervisor.submit_nowait(Task(kinds[number % types], "agent"))
        with LineCount() as count:
            await supervisor.drain()
    return count.lines / 1_000


@virtual
async def test_an_agent_costs_the_same_on_a_worker_of_a_thousand_types_that_may_begin_no_new_run() -> None:
    few, many = [await lines_per_agent(types) for types in (10, 1_000)]
    assert many < 1.5 * few


@virtual
async def test_the_cost_of_registering_a_worker_does_not_grow_with_the_workers_of_its_type() -> None:
    lines = []
    supervisor = BackpressureSupervisor()
    async with supervisor:
        for batch in range(11):
            with LineCount() as count:
                for number in range(100):
                    supervisor.register_worker(f"{batch} {number}", handler=run_ready_for, task_types=["work"])
            lines.append(count.lines)
    assert lines[-1] < 1.2 * lines[0]


async def lines_of_a_rejection(types: int) -> int:
    supervisor = BackpressureSupervisor(max_queue_size=0)
    for number in range(types):
        supervisor.register_worker(str(number), handler=run_ready_for, task_types=[f"type {number}"])
    async with supervisor:
        assert supervisor.submit_nowait(Task("type 0"))
        with LineCount() as count:
            assert not supervisor.submit_nowait(Task("type 0"))
        await supervisor.drain()
    return count.lines


@virtual
async def test_a_rejection_costs_the_same_however_many_types_there_are() -> None:
    few, many = [await lines_of_a_rejection(types) for types in (10, 2_000)]
    assert many < 1.2 * few
