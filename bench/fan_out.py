"""The delay of a fan-out's healthy branches by flaky ones, and the retries that these cost.

A fan-out of 200 tasks on two workers with ten slots each, in virtual time; a task takes two seconds on average. A tenth
of them is flaky: its first two attempts fail after all their work, or all of them do. Each ratio is the time of the
healthy branches over that of a run without flaky ones, of the same tasks. By hand it is a semaphore of 20 with the
same policy of retries inside it, as a handler with a retrying decorator is: its delays hold slots, and no budget bounds
it. Medians over seeds (SEEDS=3), and the greatest.
"""

from __future__ import annotations

import asyncio
import logging
import random
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import mean
from typing import Final, TypeAlias

from bench.calls.charts import plot_fan_out
from bench.calls.parallel_runs import CHARTS, SEEDS, rounded_median, run_parallel
from forebay import BackpressureSupervisor, Retry, Task
from forebay.events import Event, TaskStarted
from forebay.retry import RetryBudget, RetryState
from forebay.simulation import simulate

WIDTH: Final = 200
FLAKY: Final = 20  # tasks
WORKERS: Final = 2
SLOTS: Final = 10  # of each worker
SECONDS: Final = 2.0  # of a task, on average
FAILURES: Final = {"none": 0, "fail twice": 2, "fail always": 1_000}  # attempts at a flaky task
SIDES: Final = ("forebay", "by hand")
RETRY: Final = Retry(max_attempts=6, base_delay=1.0)
SHARE, EXTRA, WINDOW = 0.2, 10, 60.0  # the default of `RetryBudget`
LARGEST: Final = 1.1  # goal of the ratio

Case: TypeAlias = tuple[str, str, int]  # side, kind of failures, seed


@dataclass
class Branches:
    """The tasks of one run: what they take, which fail, and when they ended.

    Attributes:
        healthy: when each healthy branch succeeded, in seconds from the start.
        first: when the first attempt at each task began.
        retries: when each retry began.
    """

    seed: int
    failures: int
    healthy: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    retries: list[float] = field(default_factory=list)
    _attempts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draws = random.Random(self.seed)
        self.seconds = [draws.expovariate(1 / SECONDS) for _ in range(WIDTH)]
        self.flaky = set(draws.sample(range(WIDTH), FLAKY))

    async def attempt(self, number: int) -> None:
        """Make an attempt at a task."""
        made = self._attempts[number] = self._attempts.get(number, 0) + 1
        await asyncio.sleep(self.seconds[number])
        if number in self.flaky and made <= self.failures:
            raise ConnectionError

    def succeeded(self, number: int, at: float) -> None:
        """Record the end of a task, `at` seconds from the start."""
        if number not in self.flaky:
            self.healthy.append(at)

    def started(self, attempt: int, at: float) -> None:
        """Record the start of an attempt, `at` seconds from the start."""
        (self.first if attempt == 1 else self.retries).append(at)

    def most_over_budget(self) -> float:
        """Return by how many retries the budget was exceeded at most; at most 0 if it never was."""
        return max((self._retries_until(at) - self._allowed_until(at) for at in self.retries), default=-EXTRA)

    def _retries_until(self, at: float) -> int:
        return bisect_right(self.retries, at) - bisect_right(self.retries, at - WINDOW)

    def _allowed_until(self, at: float) -> float:
        """Return the retries that the window which ends at `at` may have: see `RetryBudget`."""
        return EXTRA + SHARE * (bisect_right(self.first, at) - bisect_right(self.first, at - 1.1 * WINDOW))


async def run_forebay(branches: Branches) -> None:
    """Run the fan-out of a supervisor."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    def on_event(event: Event) -> None:
        if isinstance(event, TaskStarted):
            branches.started(event.attempt, event.at - start)

    async def handler(task: Task) -> int:
        await branches.attempt(task.payload)
        number: int = task.payload
        return number

    budget = RetryBudget(share=SHARE, extra=EXTRA, window=WINDOW)
    async with BackpressureSupervisor(retry_budget=budget, on_event=on_event) as supervisor:
        for number in range(WORKERS):
            supervisor.register_worker(f"w{number}", handler=handler, task_types=["work"], max_concurrent=SLOTS)
        async for result in supervisor.fan_out([Task("work", number) for number in range(WIDTH)], retry=RETRY):
            if result.success:
                branches.succeeded(result.result, loop.time() - start)


async def run_by_hand(branches: Branches) -> None:
    """Run the tasks under a semaphore; each is tried again where it failed, in its slot."""
    loop, draws = asyncio.get_running_loop(), random.Random(branches.seed)
    start, slots = loop.time(), asyncio.Semaphore(WORKERS * SLOTS)

    async def branch(number: int) -> None:
        state, attempt = RetryState(RETRY), 1
        async with slots:
            while True:
                branches.started(attempt, loop.time() - start)
                try:
                    await branches.attempt(number)
                except ConnectionError:
                    delay = state.next_delay(uses_attempt=True, draw=draws.random())
                    if delay is None:
                        return
                    await asyncio.sleep(delay)
                    attempt += 1
                else:
                    branches.succeeded(number, loop.time() - start)
                    return

    await asyncio.gather(*(branch(number) for number in range(WIDTH)))


def one(case: Case) -> Branches:
    """Simulate one run."""
    side, kind, seed = case
    branches, logger = Branches(seed, FAILURES[kind]), logging.getLogger("forebay")
    before = logger.level
    logger.setLevel(logging.ERROR)  # each task that the budget refuses is a warning
    try:
        simulate(lambda: (run_forebay if side == "forebay" else run_by_hand)(branches), seed=seed)
    finally:
        logger.setLevel(before)
    return branches


def ratios(records: dict[Case, Branches], side: str, kind: str) -> Iterable[tuple[float, float]]:
    """Yield for each seed the mean and the last end of the healthy branches over those without flaky ones."""
    for seed in range(SEEDS):
        ours, without = records[side, kind, seed].healthy, records[side, "none", seed].healthy
        yield mean(ours) / mean(without), max(ours) / max(without)


def run() -> dict[str, float | int | bool]:
    """Return the ratios of the healthy branches, how many retries there were, and whether the budget bounded them."""
    cases = [(side, kind, seed) for side in SIDES for kind in FAILURES for seed in range(SEEDS)]
    records = dict(zip(cases, run_parallel(one, cases), strict=True))
    results: dict[str, float | int | bool] = {}
    for side in SIDES:
        for kind in list(FAILURES)[1:]:
            means, lasts = zip(*ratios(records, side, kind), strict=True)
            label = f"{side}, {kind}"
            results[f"{label}: mean end"] = rounded_median(means)
            results[f"{label}: last end"] = rounded_median(lasts)
            results[f"{label}: last end, greatest"] = round(max(lasts), 3)
            results[f"{label}: retries"] = rounded_median(
                len(records[side, kind, seed].retries) for seed in range(SEEDS)
            )
    ours = [record for (side, _, _), record in records.items() if side == "forebay"]
    results["forebay: within the goal"] = all(
        value <= LARGEST for name, value in results.items() if name.startswith("forebay") and "end" in name
    )
    results["forebay: most retries over the budget"] = round(max(record.most_over_budget() for record in ours), 3)
    results["forebay: retries never above the budget"] = all(record.most_over_budget() <= 0 for record in ours)
    CHARTS.mkdir(parents=True, exist_ok=True)
    healthy = {
        "Forebay, without flaky ones": records["forebay", "none", 0].healthy,
        "Forebay": records["forebay", "fail always", 0].healthy,
        "retried in their slots": records["by hand", "fail always", 0].healthy,
    }
    retried = {
        "Forebay": records["forebay", "fail always", 0],
        "retried in their slots": records["by hand", "fail always", 0],
    }
    allowed = [(at, EXTRA + SHARE * count) for count, at in enumerate(retried["Forebay"].first, 1)]
    plot_fan_out(healthy, {name: record.retries for name, record in retried.items()}, allowed, WINDOW, CHARTS)
    return results
