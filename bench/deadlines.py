"""How much is put to use for callers who have little time, where more come than can be served.

Shares of 50 slots, from the second to the third minute, medians over seeds (SEEDS=3). Of a provider's, by calls through
a whole upstream that is told by when each must be answered, beside one that is not. The provider refuses what exceeds
its slots, or shares its capacity among all, or shares it and works on for callers who have left. And of a worker's, by
tasks with deadlines, with an overflow and without. The average call or task takes 6.8 seconds alone, a quarter of them
more than 12.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from bench.calls.scenarios import CALL, SLOTS, TPOT, TTFT, provider
from bench.calls.simulated_key import Callers
from bench.calls.table import SEEDS, everywhere, middle
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
PATIENCE: Final = (20.0, 30.0, 60.0)  # seconds
LOADS: Final = (1.5, 3.0, 10.0)  # times the capacity
_UNTOLD: Final = 3.0
_FROM: Final = 60.0  # seconds
OVERFLOWS: Final = {"tasks": None, "tasks, overflow": "memory://"}


def used(config: ProviderConfig, *, times: float, patience: float, seed: int, tells: bool = True) -> float:
    """The share of the slots that was put to use, once all is under way."""
    callers = Callers(rate=lambda _: times * SLOTS / CALL, minutes=MINUTES, patience=patience)
    return UpstreamRun(config, callers, seed=seed, tells=tells).run().work(_FROM, 60 * MINUTES) / SLOTS


class Tasks:
    """Tasks with deadlines, offered to one worker; its line is ten times its slots, or two times with an overflow."""

    def __init__(self, *, times: float, patience: float, seed: int, overflow: str | None) -> None:
        self._times, self._patience, self._seed, self._overflow = times, patience, seed, overflow
        self._done: list[tuple[float, float]] = []  # when, and seconds of work

    def used(self) -> float:
        """The share of the worker's slots that was put to use, once all is under way."""
        simulate(self._main, seed=self._seed)
        return sum(seconds for at, seconds in self._done if _FROM <= at < 60 * MINUTES) / (60 * MINUTES - _FROM) / SLOTS

    async def _main(self) -> None:
        loop, chance, traffic = asyncio.get_running_loop(), random.Random(self._seed), Traffic.conversation()
        began = loop.time()

        async def handler(task: Task) -> None:
            await asyncio.sleep(task.payload["seconds"])
            self._done.append((loop.time() - began, task.payload["seconds"]))

        async def caller() -> None:
            seconds = TTFT + TPOT * max(1, traffic.lengths(chance)[1])
            task = Task("work", {"seconds": seconds}, deadline=Deadline.within(self._patience))
            if ticket := await house.submit(task):
                await ticket

        line = (10 if self._overflow is None else 2) * SLOTS
        async with BackpressureSupervisor(max_queue_size=line, overflow=self._overflow) as house:
            house.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=SLOTS)
            async with asyncio.TaskGroup() as group:
                while loop.time() - began < 60 * MINUTES:
                    group.create_task(caller())
                    await asyncio.sleep(chance.expovariate(self._times * SLOTS / CALL))


def one(case: tuple[str, float, float, bool, int]) -> float:
    """One run."""
    name, patience, times, tells, seed = case
    if name in OVERFLOWS:
        return Tasks(times=times, patience=patience, seed=seed, overflow=OVERFLOWS[name]).used()
    return used(PROVIDERS[name], times=times, patience=patience, seed=seed, tells=tells)


def run() -> dict[str, float]:
    """The shares by whose slots they are, seconds that callers have, and load."""
    loads = [(load, True) for load in LOADS]
    ways = [*loads, (_UNTOLD, False)]
    cases = [(name, patience, *way) for name in PROVIDERS for patience in PATIENCE for way in ways]
    cases += [(name, patience, *way) for name in OVERFLOWS for patience in PATIENCE for way in loads]
    runs = [(*case, seed) for case in cases for seed in range(SEEDS)]
    found = dict(zip(runs, everywhere(one, runs), strict=True))
    figures = {}
    for name, patience, load, tells in cases:
        where = f"{name}, {patience:g} s, {load:g}x{'' if tells else ', not told'}"
        figures[where] = middle(found[name, patience, load, tells, seed] for seed in range(SEEDS))
    return figures
