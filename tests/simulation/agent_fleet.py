"""A house of agents on one simulated key: supervisor and upstream together, or either without the other."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field

from bench.calls.upstream_run import MODEL, asked

from forebay import BackpressureSupervisor, Deadline, Overloaded, Task, clock
from forebay.interfaces import Charge
from forebay.retry import Retry, RetryBudget
from forebay.simulation import simulate
from forebay.simulation.provider.provider_config import BusyReason, ProviderConfig
from forebay.simulation.provider.simulated_provider import AnswerCut, ProviderRefusal, SimulatedProvider
from forebay.upstream import Upstream
from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.fallback_chain import PlainRoute

CALLS = 4  # of a run
PATIENCE = 60.0  # seconds after which a run's result is worthless to its caller
INPUT, OUTPUT = 500, 100  # tokens of a call
ALONE = 0.5 + OUTPUT * 0.01  # seconds of a call, alone


def provider_config(slots: int = 20, **facts: object) -> ProviderConfig:
    """A key whose provider refuses what finds too many others in flight."""
    return ProviderConfig(slots=slots, ttft=0.5, tpot=0.01, busy_reason=BusyReason.CONCURRENCY, overcommit=1.0, **facts)  # type: ignore[arg-type]


@dataclass
class AgentFleet:
    """Runs offered at a rate, by callers who lose patience; what became of them."""

    config: ProviderConfig
    offered_rate: float  # runs a second
    seed: int = 1
    minutes: float = 10.0
    workers: int = 100  # slots for runs
    limited: bool = True  # calls go through an upstream
    max_start_wait: float | None = None
    max_queue_size: int | None = None  # runs that may wait
    unlimited: bool = False  # nothing is limited: neither calls in flight, nor runs, nor the line, nor retries
    done: list[float] = field(default_factory=list)  # when each run ended that was in time
    useful: list[float] = field(default_factory=list)  # when each call of those ended, also of runs that end later
    refused: int = 0  # by the gate
    failed: int = 0
    calls: int = 0  # sent
    refusals: int = 0  # by the provider

    def run(self) -> AgentFleet:
        """Simulate."""
        simulate(self._main, seed=self.seed)
        return self

    async def _main(self) -> None:
        self._ended: dict[str, list[float]] = {}
        self.provider = SimulatedProvider(self.config, seed=self.seed)
        self.upstream = (
            self._unlimited_upstream()
            if self.unlimited
            else Upstream("key", provider="openai", max_start_wait=self.max_start_wait)
        )
        rng = random.Random(self.seed)
        loop = asyncio.get_running_loop()
        line = 100_000 if self.unlimited else self.max_queue_size
        async with BackpressureSupervisor(max_queue_size=line) as house, asyncio.TaskGroup() as group:
            house.register_worker("agents", handler=self._agent, task_types=["run"], max_concurrent=self.workers)
            self.supervisor = house
            while loop.time() < 60 * self.minutes:
                group.create_task(self._submit(house))
                await asyncio.sleep(rng.expovariate(self.offered_rate))

    def _unlimited_upstream(self) -> Upstream:
        retry = Retry(max_attempts=1000, max_delay=1.0, max_total_delay=1e6)
        upstream = Upstream("key", provider="openai", retry=retry, max_concurrent=100_000, max_start_wait=1e9)
        budgets = upstream.core.retries._budgets  # nobody may set them: this is the control
        budgets.faults = budgets.throttles = RetryBudget(share=1000.0, extra=1_000_000)
        return upstream

    async def _submit(self, house: BackpressureSupervisor) -> None:
        began = asyncio.get_running_loop().time()
        ticket = await house.submit(Task("run", deadline=None if self.unlimited else Deadline.within(PATIENCE)))
        if self.unlimited:  # who waits is not known to have a deadline either, and leaves
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
            await (self._limited_call() if self.limited else self._direct_call(task))
            self._ended.setdefault(task.task_id, []).append(clock.now())

    async def _direct_call(self, task: Task) -> None:
        for _ in range(6):  # as SDKs and frameworks do it
            self.calls += 1
            try:
                await self.provider.call(model=MODEL, input_tokens=INPUT, output_tokens=OUTPUT, run=task.task_id)
            except (ProviderRefusal, AnswerCut):
                self.refusals += 1
                await asyncio.sleep(1.0)
            else:
                return
        raise ConnectionError

    async def _limited_call(self) -> None:
        charge = Charge(input_tokens=INPUT, output_tokens=OUTPUT, tokens=INPUT + OUTPUT)
        desk = self.upstream.core.accounts.account(MODEL)

        async def attempt(_: PlainRoute, permit: Permit) -> AttemptResult:
            self.calls += 1
            tried = await asked(self.provider, desk, permit, (INPUT, OUTPUT))
            self.refusals += tried.outcome.usd == 0.0
            return tried

        request = self.upstream.core.request(MODEL, charge)
        await self.upstream.runner.run(PlainRoute(self.upstream, desk, request), attempt)

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


__all__ = ["MODEL", "AgentFleet", "Overloaded", "capacity", "provider_config"]
