"""One run of tasks with deadlines on one worker of a real supervisor, in virtual time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bench.queue.policies import POLICIES
from forebay import BackpressureSupervisor, Deadline, Estimate, Priority, Task, TaskResult
from forebay.simulation import Traffic, simulate

SLOTS: Final = 20
MEAN: Final = 5.0  # seconds of service
MINUTES: Final = 4.0
FROM: Final = 60.0  # seconds: until then the queue fills and times are learned
_TRAFFIC: Final = Traffic.conversation()
_TRAFFIC_MEAN: Final = sum(_TRAFFIC.lengths(draws)[1] for draws in [random.Random(0)] for _ in range(20_000)) / 20_000
_BURST: Final = 20.0  # seconds

SERVICES: Final[dict[str, Callable[[random.Random], float]]] = {
    "alike": lambda draws: draws.uniform(0.8, 1.2),
    "exponential": lambda draws: draws.expovariate(1.0),
    "answers": lambda draws: _TRAFFIC.lengths(draws)[1] / _TRAFFIC_MEAN,  # of chat models, as measured
    "few long": lambda draws: 0.5 if draws.random() < 0.95 else 10.5,
}
DEADLINES: Final[dict[str, Callable[[random.Random], float]]] = {  # in mean service times
    "short": lambda _: 4.0,
    "long": lambda _: 12.0,
    "mixed": lambda draws: 2.0 * 10.0 ** draws.random(),
}
ESTIMATES: Final[dict[str, Callable[[float, random.Random], float] | None]] = {  # of the work of a task
    "none": None,
    "exact": lambda work, _: work,
    "rough": lambda work, draws: work * math.exp(draws.gauss(0.0, 0.5)),  # by a factor of 1.6 on average
    "three times too high": lambda work, _: 3.0 * work,
    "useless": lambda _, draws: MEAN * draws.expovariate(1.0),
}
PRIORITIES: Final[dict[str, tuple[Priority, ...]]] = {
    "one priority": (Priority.NORMAL,),
    "four priorities": (
        *(1 * [Priority.CRITICAL]), *(2 * [Priority.HIGH]), *(4 * [Priority.NORMAL]), *(3 * [Priority.LOW]),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The tasks that are offered to the worker, and the rule for those that wait."""

    policy: str
    load: float  # times the capacity
    service: str = "exponential"
    deadline: str = "short"
    priorities: str = "one priority"
    bursts: bool = False  # twice the load for 20 s, nothing for 20 s
    queue: int | None = None  # `max_queue_size`; None: 100
    estimates: str = "none"
    seed: int = 0


@dataclass
class Outcome:
    """The ends of the tasks that arrived after the first minute.

    Attributes:
        work: seconds of work of those that ended in time, a second and slot.
        in_time: how many ended in time, over how many the slots can serve, or were offered if fewer.
        told: of those that did not end in time, the mean share of their time after which their callers were told.
        better: of those of CRITICAL and HIGH, the share that ended in time.
    """

    work: float
    in_time: float
    told: float
    better: float


@dataclass
class DeadlineRun:
    """One run."""

    case: Case
    _served: list[tuple[float, Priority]] = field(default_factory=list)  # seconds of work, and priority
    _told: list[float] = field(default_factory=list)
    _better: int = 0
    _offered: int = 0
    _offered_work: float = 0.0

    def run(self) -> Outcome:
        """Simulate the run."""
        with POLICIES[self.case.policy]():
            simulate(self._main, seed=self.case.seed)
        seconds, better = 60 * MINUTES - FROM, sum(priority <= Priority.HIGH for _, priority in self._served)
        possible = min(SLOTS * seconds, self._offered_work)  # seconds of work
        return Outcome(
            work=sum(work for work, _ in self._served) / possible,
            in_time=len(self._served) / (possible / self._offered_work * self._offered),
            told=sum(self._told) / len(self._told) if self._told else 0.0,
            better=better / self._better if self._better else 0.0,
        )

    async def _main(self) -> None:
        case, draws, loop = self.case, random.Random(self.case.seed), asyncio.get_running_loop()
        service, within = SERVICES[case.service], DEADLINES[case.deadline]
        mix = PRIORITIES[case.priorities]

        async def handler(task: Task) -> None:
            await asyncio.sleep(task.payload)

        async def caller(arrived: float) -> None:
            work, time, priority = MEAN * service(draws), MEAN * within(draws), draws.choice(mix)
            counts = arrived >= FROM
            if counts and work <= time:  # no order and no slots would end the others in time
                self._offered += 1
                self._offered_work += work
                self._better += priority <= Priority.HIGH
            guess = ESTIMATES[case.estimates]
            estimate = None if guess is None else Estimate(output_tokens=max(1, round(100 * guess(work, draws))))
            task = Task("work", work, deadline=Deadline.within(time), priority=priority, estimate=estimate)
            ticket = await supervisor.submit(task)
            result: TaskResult | None = await ticket if ticket else None
            if not counts:
                return
            if result is not None and result.success:
                self._served.append((work, priority))
            else:
                self._told.append((loop.time() - started - arrived) / time)

        async with BackpressureSupervisor(max_queue_size=case.queue) as supervisor:
            started = loop.time()
            supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=SLOTS)
            rate = case.load * SLOTS / MEAN * (2 if case.bursts else 1)
            async with asyncio.TaskGroup() as group:
                while (now := loop.time() - started) < 60 * MINUTES:
                    if case.bursts and now % (2 * _BURST) >= _BURST:
                        await asyncio.sleep(2 * _BURST - now % (2 * _BURST))
                        continue
                    group.create_task(caller(now))
                    await asyncio.sleep(draws.expovariate(rate))
