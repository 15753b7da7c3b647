"""Priorities and tenants under overload: who waits for whom, in simulated seconds.

Every task takes a second on average. **CRITICAL**: three times as much as a worker can serve is offered, a fifth of its
capacity as CRITICAL tasks, with and without slots reserved for them. **Weights**: three tenants offer three times the
capacity each. **Flood**: one tenant submits many tasks at once, and then another one submits one, to one slot. Waits
are in average service times, medians over seeds (SEEDS=3). The chart goes to build/bench. And the real time of a task
while tasks of several tenants wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from bench.calls.charts import plot_fairness
from bench.calls.parallel_runs import CHARTS, SEEDS, rounded_median, run_parallel
from forebay import BackpressureSupervisor, Priority, Task, Ticket
from forebay.simulation import simulate

LOAD: Final = 3.0  # times the capacity
CRITICAL_SHARE: Final = 0.2  # of the capacity
SLOTS: Final = (5, 10, 50)
RESERVED: Final = 0.2  # of the slots
TASKS_PER_SLOT: Final = 1_000
WEIGHTS: Final[Mapping[str, float]] = {"acme": 3.0, "other": 1.0, "free": 0.5}
PLACES: Final[Mapping[str, dict[str, Any]]] = {
    "queue": {"max_queue_size": 20_000},
    "overflow": {"max_queue_size": 0, "overflow": "memory://?bound=20000"},
}
NO_OPS: Final = 10_000
FLOODS: Final = (1, 10, 100, 1_000, 10_000)


def critical_waits(slots: int, reserve: int, seed: int) -> list[float]:
    """Return how long CRITICAL tasks waited, in order."""
    rng, waits = random.Random(seed), list[float]()

    async def handler(task: Task) -> None:
        if task.priority is Priority.CRITICAL:
            waits.append(asyncio.get_running_loop().time() - task.payload)
        await asyncio.sleep(rng.expovariate(1.0))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker(
                "worker", handler=handler, task_types=["work"], max_concurrent=slots, reserve=reserve
            )
            for _ in range(TASKS_PER_SLOT * slots):
                await asyncio.sleep(rng.expovariate(LOAD * slots))
                critical = rng.random() < CRITICAL_SHARE / LOAD
                priority = Priority.CRITICAL if critical else rng.choice((Priority.NORMAL, Priority.LOW))
                supervisor.submit_nowait(Task("work", loop.time(), priority=priority))

    simulate(main, seed=seed)
    return sorted(waits)


def shares(place: str, seed: int) -> dict[str, float]:
    """Return the share of the starts that each tenant of `WEIGHTS` had while all of them had tasks waiting."""
    rng, order = random.Random(seed), list[str]()

    async def handler(task: Task) -> None:
        order.append(task.tenant)
        await asyncio.sleep(rng.expovariate(1.0))

    async def main() -> None:
        async with BackpressureSupervisor(tenants=WEIGHTS, **PLACES[place]) as supervisor:
            supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=5)
            for _ in range(3_000):
                await asyncio.sleep(rng.expovariate(LOAD * len(WEIGHTS) * 5))
                await supervisor.submit(Task("work", tenant=rng.choice(tuple(WEIGHTS))))
            counted.extend(order[50:])
            raise _Enough

    counted: list[str] = []
    with contextlib.suppress(_Enough):
        simulate(main, seed=seed)
    counts = Counter(counted)
    return {tenant: counts[tenant] / len(counted) for tenant in WEIGHTS}


class _Enough(Exception):
    """Enough has been measured: what is left need not be served."""


def wait_beside_flood(place: str, flood: int, *, one_tenant: bool) -> float:
    """Return how long a task waits that comes after `flood` tasks of another tenant, or of the same one."""

    async def handler(task: Task) -> None:
        del task
        await asyncio.sleep(1.0)

    async def main() -> float:
        loop = asyncio.get_running_loop()
        async with BackpressureSupervisor(**PLACES[place]) as supervisor:
            supervisor.register_worker("worker", handler=handler, task_types=["work"])
            tickets = [await supervisor.submit(Task("work", tenant="big")) for _ in range(flood)]
            asked = loop.time()
            small: Ticket = await supervisor.submit(Task("work", tenant="big" if one_tenant else "small"))
            await small
            waited = loop.time() - asked - 1.0
            for ticket in tickets:
                ticket.cancel()
            return waited

    return simulate(main, seed=1)


async def microseconds(tenants: int) -> float:
    """Return the real time of a no-op task while those of so many tenants wait."""

    async def handler(_: Task) -> None:
        pass

    best = math.inf
    async with BackpressureSupervisor(max_queue_size=4 * NO_OPS, backpressure_threshold=1.0) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=10)
        for _ in range(5):
            started = time.perf_counter()
            for ticket in [supervisor.submit_nowait(Task("work", tenant=f"{n % tenants}")) for n in range(NO_OPS)]:
                await ticket
            best = min(best, 1e6 * (time.perf_counter() - started) / NO_OPS)
    return best


def one(case: tuple[Any, ...]) -> Any:
    """Return the result of one run."""
    kind, *given = case
    if kind == "critical":
        return critical_waits(*given)
    if kind == "weights":
        return shares(*given)
    place, flood, one_tenant = given
    return wait_beside_flood(place, flood, one_tenant=one_tenant)


def run() -> dict[str, float]:
    """Return waits in service times, and how far the share of a tenant is from its weight."""
    cases: list[tuple[Any, ...]] = [
        ("critical", slots, reserve, seed)
        for slots in SLOTS
        for reserve in (0, round(RESERVED * slots))
        for seed in range(SEEDS)
    ]
    cases += [("weights", place, seed) for place in PLACES for seed in range(SEEDS)]
    cases += [("flood", place, flood, False) for place in PLACES for flood in FLOODS]
    cases += [("flood", "queue", flood, True) for flood in FLOODS]
    found = dict(zip(cases, run_parallel(one, cases), strict=True))
    results: dict[str, float] = {}
    waits: dict[tuple[int, bool], list[float]] = {}
    for slots in SLOTS:
        for reserve in (0, round(RESERVED * slots)):
            runs = [found["critical", slots, reserve, seed] for seed in range(SEEDS)]
            waits[slots, reserve > 0] = sorted(wait for run in runs for wait in run)
            p99 = rounded_median(run[int(0.99 * len(run))] for run in runs)
            results[f"CRITICAL waits at p99, {slots} slots, {reserve} reserved"] = p99
    total, gained = sum(WEIGHTS.values()), dict[tuple[str, str], float]()
    for place in PLACES:
        for tenant, weight in WEIGHTS.items():
            due = weight / total
            gained[place, tenant] = rounded_median(found["weights", place, seed][tenant] for seed in range(SEEDS)) / due
        worst = max(abs(gained[place, tenant] - 1) for tenant in WEIGHTS)
        results[f"weights off by at most, {place}"] = round(worst, 3)
    floods = {place: [found["flood", place, flood, False] for flood in FLOODS] for place in PLACES}
    floods["one tenant"] = [found["flood", "queue", flood, True] for flood in FLOODS]
    for place, values in floods.items():
        results[f"a task after {FLOODS[-1]} of another tenant waits, {place}"] = round(values[-1], 3)
    for tenants in (1, 2, 1_000):
        results[f"us for a no-op task, {tenants} tenants"] = asyncio.run(microseconds(tenants))
    CHARTS.mkdir(parents=True, exist_ok=True)
    plot_fairness(waits, gained, dict(zip(FLOODS, zip(*floods.values(), strict=True), strict=True)), [*floods], CHARTS)
    return results
