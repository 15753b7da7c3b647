"""Routing by cost: dollars for a task that is done in time, and tasks that are late, by load and deadline.

One task type is served by a heavy worker, which is fast and dear, and by a light one, which is slow and cheap. Tasks
come at random and have a size of their own (gamma, coefficient of variation 0.5) and a deadline. In simulated seconds, medians
over seeds (SEEDS=3). Sides: *score*, where no worker has a cost; *given*, with `cost=`; *learned*, from the charges of an
upstream with a budget. *Bound* is what a task costs at least: as many as the light worker can do, done there. The chart goes to build/bench.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any, Final

from bench.calls.parallel_runs import SEEDS, rounded_median, run_parallel
from forebay import BackpressureSupervisor, Budget, Deadline, Task, TaskStatus, Upstream
from forebay.simulation import simulate

HEAVY: Final = {"max_concurrent": 4, "seconds": 2.0, "usd": 0.02}
LIGHT: Final = {"max_concurrent": 10, "seconds": 10.0, "usd": 0.002}
WORKERS: Final = {"heavy": HEAVY, "light": LIGHT}
CAPACITY: Final = sum(worker["max_concurrent"] / worker["seconds"] for worker in WORKERS.values())  # tasks a second
SHAPE: Final = 4.0  # of the sizes
DEADLINES: Final = (6.0, 15.0, 30.0, 60.0, 300.0)
LOADS: Final = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5)  # of the capacity
SIDES: Final = ("score", "given", "learned", "waiting")
SECONDS: Final = 1_800.0
FROM: Final = 200.0


class CostRun:
    """One run of tasks on a heavy and a light worker."""

    def __init__(self, side: str, *, load: float, within: float, seed: int) -> None:
        self._side, self._load, self._within, self._seed = side, load, within, seed
        self._submitted = self._in_time = 0
        self._usd = 0.0

    def result(self) -> tuple[float, float]:
        """Simulate the run; return the dollars for each task done in time, and the share of the tasks that were not."""
        simulate(self._main, seed=self._seed)
        return self._usd / max(1, self._in_time), 1.0 - self._in_time / max(1, self._submitted)

    async def _main(self) -> None:
        loop, draws = asyncio.get_running_loop(), random.Random(self._seed)
        upstream = Upstream("models", budget=Budget(usd=1e6)) if self._side == "learned" else None
        async with BackpressureSupervisor(**self._settings()) as supervisor:
            for name, worker in WORKERS.items():
                given = {"cost": worker["usd"]} if self._side not in ("score", "learned") else {}
                supervisor.register_worker(
                    name,
                    handler=self._handler(worker, upstream),
                    task_types=["answer"],
                    max_concurrent=int(worker["max_concurrent"]),
                    **given,
                )
            tickets = []
            while loop.time() < SECONDS:
                await asyncio.sleep(draws.expovariate(self._load * CAPACITY))
                size, counts = draws.gammavariate(SHAPE, 1.0 / SHAPE), loop.time() >= FROM
                task = Task("answer", {"size": size, "counts": counts}, deadline=Deadline.within(self._within))
                ticket = supervisor.submit_nowait(task)
                if counts:
                    tickets.append(ticket)
            for ticket in tickets:
                result = await ticket if ticket else None
                self._submitted += 1
                self._in_time += result is not None and result.status is TaskStatus.SUCCEEDED

    def _settings(self) -> dict[str, Any]:
        return {"max_cost_wait": math.inf} if self._side == "waiting" else {}

    def _handler(self, worker: dict[str, float], upstream: Upstream | None) -> Any:
        async def handler(task: Task) -> None:
            usd = worker["usd"] * task.payload["size"]
            if task.payload["counts"]:
                self._usd += usd  # a task that is cut off is paid for, too
            seconds = worker["seconds"] * task.payload["size"]
            if upstream is None:
                await asyncio.sleep(seconds)
                return
            async with upstream.call("model") as call:
                await asyncio.sleep(seconds)
                call.settle(input_tokens=1, output_tokens=1, usd=usd)

        return handler


def bound(load: float) -> float:
    """Return the least dollars a task if deadlines are no matter."""
    rate, light = load * CAPACITY, LIGHT["max_concurrent"] / LIGHT["seconds"]
    share = min(1.0, light / rate)
    return share * LIGHT["usd"] + (1.0 - share) * HEAVY["usd"]


def one(case: tuple[str, float, float, int]) -> tuple[float, float]:
    """Return the result of one run."""
    side, load, within, seed = case
    return CostRun(side, load=load, within=within, seed=seed).result()


def run() -> dict[str, float]:
    """Return dollars for a task in time, and shares of tasks that were not."""
    cases = [
        (side, load, within, seed) for side in SIDES for within in DEADLINES for load in LOADS for seed in range(SEEDS)
    ]
    found = dict(zip(cases, run_parallel(one, cases), strict=True))
    results: dict[str, float] = {}
    for within in DEADLINES:
        for load in LOADS:
            for side in SIDES:
                runs = [found[side, load, within, seed] for seed in range(SEEDS)]
                results[f"{within:.0f} s, load {load}, {side}: mUSD"] = (
                    1000 * rounded_median(1000 * usd for usd, _ in runs) / 1000
                )
                results[f"{within:.0f} s, load {load}, {side}: late"] = rounded_median(late for _, late in runs)
    return results
