"""Goodput of calls and tasks with short deadlines under overload.

The share of 50 slots that does useful work, from the second to the third minute, medians over seeds (SEEDS=3). Of a
provider: calls through a whole Upstream that knows their deadlines, compared with one that does not. The provider
refuses calls beyond its slots, or shares its capacity among all, or shares it and works on for callers that have left.
Of a worker: tasks with deadlines, with an overflow and without; compared with the best that can be done without knowing
how long a task takes, which starts the newest first. The average call or task takes 6.8 seconds alone, a quarter of
them more than 12.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from bench.baselines import newest_first
from bench.calls.limit_run import Callers
from bench.calls.parallel_runs import SEEDS, rounded_median, run_parallel
from bench.calls.scenarios import CALL, SLOTS, TPOT, TTFT, provider
from bench.calls.upstream_run import UpstreamRun
from forebay import BackpressureSupervisor, Deadline, Task
from forebay.simulation import Traffic, simulate
from forebay.simulation.provider.provider_config import ProviderConfig

MINUTES: Final = 3.0
PROVIDERS: Final[dict[str, ProviderConfig]] = {
    "refuses": provider(),
    "shares": provider(overcommit=None),
    "shares, works on": provider(overcommit=None, finish_abandoned=True),
}
TIMEOUTS: Final = (20.0, 30.0, 60.0)  # seconds from the arrival of a call or task to its deadline
LOADS: Final = (1.5, 3.0, 10.0)  # times the capacity
_LOAD_WITHOUT_DEADLINES: Final = 3.0
_FROM: Final = 60.0  # seconds
OVERFLOWS: Final = {"tasks": None, "tasks, overflow": "memory://"}
NEWEST_FIRST: Final = "tasks, newest first"


def share_of_slots(
    config: ProviderConfig, *, load: float, timeout: float, seed: int, with_deadlines: bool = True
) -> float:
    """Return the share of the provider's slots that did useful work."""
    callers = Callers(rate=lambda _: load * SLOTS / CALL, minutes=MINUTES, timeout=timeout)
    record = UpstreamRun(config, callers, seed=seed, with_deadlines=with_deadlines).run()
    return record.work(_FROM, 60 * MINUTES) / SLOTS


def share_newest_first(*, load: float, timeout: float, seed: int) -> float:
    """Return the share of a worker's slots that does useful work if every free slot gets the newest task."""
    draws, traffic = random.Random(seed), Traffic.conversation()
    return newest_first.share_of_slots(
        lambda: TTFT + TPOT * max(1, traffic.lengths(draws)[1]),
        lambda: draws.expovariate(load * SLOTS / CALL),
        slots=SLOTS,
        timeout=timeout,
        start=_FROM,
        end=60 * MINUTES,
    )


class TaskRun:
    """One run of tasks with deadlines on one worker; its queue is ten times its slots, or twice with an overflow."""

    def __init__(self, *, load: float, timeout: float, seed: int, overflow: str | None) -> None:
        self._load, self._timeout, self._seed, self._overflow = load, timeout, seed, overflow
        self._done: list[tuple[float, float]] = []  # when, and seconds of work

    def share_of_slots(self) -> float:
        """Simulate the run; return the share of the worker's slots that did useful work."""
        simulate(self._main, seed=self._seed)
        work = sum(seconds for at, seconds in self._done if _FROM <= at < 60 * MINUTES)
        return work / (60 * MINUTES - _FROM) / SLOTS

    async def _main(self) -> None:
        loop, draws, traffic = asyncio.get_running_loop(), random.Random(self._seed), Traffic.conversation()
        started = loop.time()

        async def handler(task: Task) -> None:
            await asyncio.sleep(task.payload["seconds"])
            self._done.append((loop.time() - started, task.payload["seconds"]))

        async def caller() -> None:
            seconds = TTFT + TPOT * max(1, traffic.lengths(draws)[1])
            task = Task("work", {"seconds": seconds}, deadline=Deadline.within(self._timeout))
            if ticket := await supervisor.submit(task):
                await ticket

        queue = (10 if self._overflow is None else 2) * SLOTS
        async with BackpressureSupervisor(max_queue_size=queue, overflow=self._overflow) as supervisor:
            supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=SLOTS)
            async with asyncio.TaskGroup() as group:
                while loop.time() - started < 60 * MINUTES:
                    group.create_task(caller())
                    await asyncio.sleep(draws.expovariate(self._load * SLOTS / CALL))


def one(case: tuple[str, float, float, bool, int]) -> float:
    """Return the share of slots of one run."""
    name, timeout, load, with_deadlines, seed = case
    if name in OVERFLOWS:
        return TaskRun(load=load, timeout=timeout, seed=seed, overflow=OVERFLOWS[name]).share_of_slots()
    if name == NEWEST_FIRST:
        return share_newest_first(load=load, timeout=timeout, seed=seed)
    return share_of_slots(PROVIDERS[name], load=load, timeout=timeout, seed=seed, with_deadlines=with_deadlines)


def run() -> dict[str, float]:
    """Return the share of slots by provider or worker, seconds to the deadline, and load."""
    loads = [(load, True) for load in LOADS]
    ways = [*loads, (_LOAD_WITHOUT_DEADLINES, False)]
    cases = [(name, timeout, *way) for name in PROVIDERS for timeout in TIMEOUTS for way in ways]
    cases += [(name, timeout, *way) for name in (*OVERFLOWS, NEWEST_FIRST) for timeout in TIMEOUTS for way in loads]
    runs = [(*case, seed) for case in cases for seed in range(SEEDS)]
    shares = dict(zip(runs, run_parallel(one, runs), strict=True))
    results = {}
    for name, timeout, load, with_deadlines in cases:
        label = f"{name}, {timeout:g} s, {load:g}x{'' if with_deadlines else ', deadlines unknown'}"
        results[label] = rounded_median(shares[name, timeout, load, with_deadlines, seed] for seed in range(SEEDS))
    return results
