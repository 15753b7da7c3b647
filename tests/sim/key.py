"""A house of agents on one simulated key: supervisor and upstream together, or either without the other."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field

from bench.calls.whole import MODEL, asked

from forebay import BackpressureSupervisor, Deadline, Overloaded, Task, clock
from forebay.retry import Retry, RetryBudget
from forebay.sim import simulate
from forebay.sim.config import Busy, ProviderConfig
from forebay.sim.virtual import Broken, Refusal, SimulatedProvider
from forebay.typing import Charge
from forebay.upstream import Upstream
from forebay.upstream.ask import Permit
from forebay.upstream.attempt import Tried

CALLS = 4  # of a run
PATIENCE = 60.0  # seconds after which a run's result is worthless to its caller
INPUT, OUTPUT = 500, 100  # tokens of a call
ALONE = 0.5 + OUTPUT * 0.01  # seconds of a call, alone


def key(slots: int = 20, **facts: object) -> ProviderConfig:
    """A key whose provider refuses what finds too many others in flight."""
    return ProviderConfig(slots=slots, ttft=0.5, tpot=0.01, busy=Busy.CONCURRENCY, overcommit=1.0, **facts)  # type: ignore[arg-type]


@dataclass
class Fleet:
    """Runs offered at a rate, by callers who lose patience; what became of them."""

    config: ProviderConfig
    offered: float  # runs a second
    seed: int = 1
    minutes: float = 10.0
    workers: int = 100  # slots for runs
    limited: bool = True  # calls go through an upstream
    start_wait: float | None = None
    line: int | None = None  # runs that may wait
    wild: bool = False  # nothing is limited: neither calls in flight, nor runs, nor the line, nor retries
    done: list[float] = field(default_factory=list)  # when each run ended that was in time
    useful: list[float] = field(default_factory=list)  # when each call of those ended, also of runs that end later
    refused: int = 0  # by the gate
    failed: int = 0
    calls: int = 0  # sent
    refusals: int = 0  # by the provider

    def run(self) -> Fleet:
        """Simulate."""
        simulate(self._main, seed=self.seed)
        return self

    async def _main(self) -> None:
        self._ended: dict[str, list[float]] = {}
        self.provider = SimulatedProvider(self.config, seed=self.seed)
        self.upstream = self._wild() if self.wild else Upstream("key", provider="openai", start_wait=self.start_wait)
        rng = random.Random(self.seed)
        loop = asyncio.get_running_loop()
        line = 100_000 if self.wild else self.line
        async with BackpressureSupervisor(max_queue_size=line) as house, asyncio.TaskGroup() as group:
            house.register_worker("agents", handler=self._agent, task_types=["run"], max_concurrent=self.workers)
            self.house = house
            while loop.time() < 60 * self.minutes:
                group.create_task(self._offer(house))
                await asyncio.sleep(rng.expovariate(self.offered))

    def _wild(self) -> Upstream:
        retry = Retry(max_attempts=1000, ceiling=1.0, longest_wait=1e6)
        upstream = Upstream("key", provider="openai", retry=retry, max_concurrent=100_000, start_wait=1e9)
        budgets = upstream._retries.budgets  # nobody may set them: this is the control
        budgets.faults = budgets.refusals = RetryBudget(share=1000.0, extra=1_000_000)
        return upstream

    async def _offer(self, house: BackpressureSupervisor) -> None:
        began = asyncio.get_running_loop().time()
        ticket = await house.submit(Task("run", deadline=None if self.wild else Deadline.within(PATIENCE)))
        if self.wild:  # who waits is not known to have a deadline either, and leaves
            asyncio.get_running_loop().call_later(PATIENCE, ticket.cancel)
        if not ticket:
            self.refused += 1
        elif (await ticket).success:
            now = asyncio.get_running_loop().time()
            if now - began <= PATIENCE:
                self.useful += self._ended.pop(ticket.task_id)
                if now <= 60 * self.minutes:
                    self.done.append(now)
        else:
            self.failed += 1

    async def _agent(self, task: Task) -> None:
        for _ in range(CALLS):
            await (self._limited_call() if self.limited else self._bare_call(task))
            self._ended.setdefault(task.task_id, []).append(clock.now())

    async def _bare_call(self, task: Task) -> None:
        for _ in range(6):  # as SDKs and frameworks do it
            self.calls += 1
            try:
                await self.provider.call(model=MODEL, input_tokens=INPUT, output_tokens=OUTPUT, run=task.task_id)
            except (Refusal, Broken):
                self.refusals += 1
                await asyncio.sleep(1.0)
            else:
                return
        raise ConnectionError

    async def _limited_call(self) -> None:
        charge = Charge(input_tokens=INPUT, output_tokens=OUTPUT, tokens=INPUT + OUTPUT)
        desk = self.upstream.books.desk(MODEL)

        async def attempt(permit: Permit) -> Tried:
            self.calls += 1
            tried = await asked(self.provider, desk, permit, (INPUT, OUTPUT))
            self.refusals += tried.ended.usd == 0.0
            return tried

        await self.upstream.driver(desk).run(self.upstream.ask(MODEL, charge), attempt)

    def per_second(self, since: float = 60.0, until: float = math.inf) -> float:
        """Runs that ended in time, a second."""
        until = min(until, 60 * self.minutes)
        return sum(since <= at < until for at in self.done) / (until - since)

    def share(self, since: float, until: float) -> float:
        """Of the key's slots, those that calls of use held."""
        ended = sum(since <= at < until for at in self.useful)
        return ended * ALONE / (until - since) / self.config.slots


def capacity(config: ProviderConfig) -> float:
    """Runs a second that an oracle gets out of a key."""
    return config.slots / ALONE / CALLS


__all__ = ["MODEL", "Fleet", "Overloaded", "capacity", "key"]
