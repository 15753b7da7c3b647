"""Routing by cost: dollars for a task that is done in time, and tasks that are not, by load and deadline.

One task type is served by a heavy worker, fast and dear (4 slots, 2 s, 20 thousandths of a dollar), and by a light
one, which is slow and cheap (10 slots, 10 s, 2 thousandths). Tasks come at random, have a size (gamma, coefficient of
variation 0.5) and a deadline. In simulated seconds, medians over seeds (SEEDS=3). Sides: *by score*, where no worker
has a cost; *by cost*, with `cost=`; *learned*, from charges of an upstream with a budget; *waiting*, with
`max_cost_wait=math.inf` as well. *Bound*: what a task costs at least, if the light worker does as many as it can. A
task that is cut off is paid for. The chart goes to build/bench.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from bench.calls.charts import plot_costs
from bench.calls.parallel_runs import CHARTS, SEEDS, rounded_median, run_parallel
from forebay import BackpressureSupervisor, Budget, Deadline, Price, Task, TaskStatus, Upstream
from forebay.simulation import simulate


class Side(NamedTuple):
    """One worker.

    Attributes:
        slots: tasks at a time.
        seconds: that a task of average size takes.
        usd: dollars that it costs.
    """

    slots: int
    seconds: float
    usd: float


HEAVY, LIGHT = Side(4, 2.0, 0.02), Side(10, 10.0, 0.002)
CAPACITY: Final = sum(side.slots / side.seconds for side in (HEAVY, LIGHT))  # tasks a second
SHAPE: Final = 4.0  # of the sizes
DEADLINES: Final = (15.0, 30.0, 60.0)  # seconds
LOADS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)  # of the capacity
SIDES: Final = ("by score", "by cost", "learned", "waiting")
SECONDS: Final = 1_800.0
FROM: Final = 200.0  # from then on tasks count


class CostRun:
    """One run of tasks on a heavy and a light worker."""

    def __init__(self, side: str, *, load: float, within: float, seed: int) -> None:
        self._side, self._load, self._within, self._seed = side, load, within, seed
        self._submitted = self._in_time = 0
        self._usd = 0.0

    def result(self) -> tuple[float, float]:
        """Simulate the run; return the dollars for each task done in time, and the share of tasks that were not."""
        simulate(self._main, seed=self._seed)
        return self._usd / max(1, self._in_time), 1.0 - self._in_time / max(1, self._submitted)

    async def _main(self) -> None:
        loop, draws = asyncio.get_running_loop(), random.Random(self._seed)
        upstream = None
        if self._side == "learned":
            upstream = Upstream("models", budget=Budget(usd=1e6), prices={"m": Price(input=1.0, output=1.0)})
        async with BackpressureSupervisor(max_cost_wait=math.inf if self._side == "waiting" else 0.0) as supervisor:
            for name, side in (("heavy", HEAVY), ("light", LIGHT)):
                supervisor.register_worker(
                    name,
                    handler=self._handler(side, upstream),
                    task_types=["answer"],
                    max_concurrent=side.slots,
                    cost=side.usd if self._side in ("by cost", "waiting") else None,
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
                self._submitted += 1
                self._in_time += bool(ticket) and (await ticket).status is TaskStatus.SUCCEEDED

    def _handler(self, side: Side, upstream: Upstream | None) -> Callable[[Task], Awaitable[None]]:
        async def handler(task: Task) -> None:
            size = task.payload["size"]
            if task.payload["counts"]:
                self._usd += side.usd * size
            if upstream is None:
                await asyncio.sleep(side.seconds * size)
                return
            async with upstream.call("m") as call:
                await asyncio.sleep(side.seconds * size)
                call.settle(input_tokens=1, output_tokens=1, usd=side.usd * size)

        return handler


def bound(load: float) -> float:
    """Return the least dollars a task, whatever its deadline. Above the capacity as many are done as can be."""
    share = min(1.0, LIGHT.slots / LIGHT.seconds / (min(1.0, load) * CAPACITY))
    return share * LIGHT.usd + (1.0 - share) * HEAVY.usd


def one(case: tuple[str, float, float, int]) -> tuple[float, float]:
    """Return the result of one run."""
    side, load, within, seed = case
    return CostRun(side, load=load, within=within, seed=seed).result()


def run() -> dict[str, float]:
    """Return thousandths of a dollar for a task done in time, and shares of tasks that were not."""
    cases = [
        (side, load, within, seed) for side in SIDES for load in LOADS for within in DEADLINES for seed in range(SEEDS)
    ]
    found = dict(zip(cases, run_parallel(one, cases), strict=True))
    results: dict[str, float] = {}
    usd: dict[tuple[float, str], list[float]] = {}
    late: dict[tuple[float, str], list[float]] = {}
    for within in DEADLINES:
        usd[within, "bound"] = [1000 * bound(load) for load in LOADS]
        for side in SIDES:
            runs = [[found[side, load, within, seed] for seed in range(SEEDS)] for load in LOADS]
            usd[within, side] = [rounded_median(1000 * dollars for dollars, _ in each) for each in runs]
            late[within, side] = [rounded_median(share for _, share in each) for each in runs]
    for index, load in enumerate(LOADS):
        for (within, side), values in usd.items():
            results[f"{within:.0f} s, load {load}, {side}: thousandths of a dollar"] = values[index]
        for (within, side), values in late.items():
            results[f"{within:.0f} s, load {load}, {side}: late"] = values[index]
    CHARTS.mkdir(parents=True, exist_ok=True)
    plot_costs(usd, late, LOADS, CHARTS)
    return results
