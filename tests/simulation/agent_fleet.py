"""Agents that share one simulated API key, with a supervisor and an upstream or with only one of them."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field
from typing import Any

from bench.calls.upstream_run import MODEL, send_call

from forebay import BackpressureSupervisor, Deadline, Overloaded, Task, clock
from forebay.interfaces import Charge
from forebay.retry import Retry, RetryBudget
from forebay.simulation import simulate
from forebay.simulation.provider.provider_config import BusyReason, ProviderConfig
from forebay.simulation.provider.simulated_provider import AnswerCut, ProviderRefusal, SimulatedProvider
from forebay.upstream import Upstream
from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

CALLS = 4  # in a run
CALLER_TIMEOUT = 60.0  # seconds after which the result of a run is worthless
INPUT, OUTPUT = 500, 100  # tokens of a call
CALL_SECONDS = 0.5 + OUTPUT * 0.01  # duration of a call that runs alone


def provider_config(slots: int = 20, **fields: Any) -> ProviderConfig:
    """Return a provider that refuses calls above its number of slots."""
    defaults: dict[str, Any] = {"ttft": 0.5, "tpot": 0.01, "busy_reason": BusyReason.CONCURRENCY, "overcommit": 1.0}
    return ProviderConfig(slots=slots, **defaults | fields)


@dataclass
class AgentFleet:
    """Runs at a constant average rate, by callers with a timeout, and their outcomes."""

    config: ProviderConfig
    offered_rate: float  # runs a second
    seed: int = 1
    minutes: float = 10.0
    workers: int = 100  # slots for runs
    limited: bool = True  # calls use an upstream
    max_start_wait: float | None = None
    max_queue_size: int | None = None  # runs that may wait
    unlimited: bool = False  # no limit on calls in flight, runs, the queue and retries
    done: list[float] = field(default_factory=list)  # end times of runs that ended in time
    useful: list[float] = field(default_factory=list)  # end times of the calls of runs that ended in time, at any time
    rejected: int = 0  # by the supervisor
    failed: int = 0
    calls: int = 0  # sent
    refusals: int = 0  # by the provider

    def run(self) -> AgentFleet:
        """Run the simulation."""
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
        max_queue_size = 100_000 if self.unlimited else self.max_queue_size
        async with BackpressureSupervisor(max_queue_size=max_queue_size) as supervisor, asyncio.TaskGroup() as group:
            supervisor.register_worker("agents", handler=self._agent, task_types=["run"], max_concurrent=self.workers)
            self.supervisor = supervisor
            while loop.time() < 60 * self.minutes:
                group.create_task(self._submit(supervisor))
                await asyncio.sleep(rng.expovariate(self.offered_rate))

    def _unlimited_upstream(self) -> Upstream:
        retry = Retry(max_attempts=1000, max_delay=1.0, max_total_delay=1e6)
        upstream = Upstream("key", provider="openai", retry=retry, max_concurrent=100_000, max_start_wait=1e9)
        budgets = upstream.core.accounts.account(MODEL).retries._budgets  # the negative control: no public setting
        budgets.faults = budgets.throttles = RetryBudget(share=1000.0, extra=1_000_000)
        return upstream

    async def _submit(self, supervisor: BackpressureSupervisor) -> None:
        start = asyncio.get_running_loop().time()
        ticket = await supervisor.submit(
            Task("run", deadline=None if self.unlimited else Deadline.within(CALLER_TIMEOUT))
        )
        if self.unlimited:  # the task has no deadline either, and its caller cancels it
            asyncio.get_running_loop().call_later(CALLER_TIMEOUT, ticket.cancel)
        if not ticket:
            self.rejected += 1
        elif (await ticket).success:
            now = asyncio.get_running_loop().time()
            if now - start <= CALLER_TIMEOUT:
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
        for _ in range(6):  # as SDKs and frameworks do
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
        account = self.upstream.core.accounts.account(MODEL)

        async def attempt(_: PlainRoute, permit: Permit) -> AttemptResult:
            self.calls += 1
            result = await send_call(self.provider, account, permit, (INPUT, OUTPUT))
            self.refusals += result.outcome.usd == 0.0
            return result

        request = self.upstream.core.request(MODEL, charge)
        await self.upstream.runner.run(PlainRoute(self.upstream, account, request), attempt)

    def per_second(self, since: float = 60.0, until: float = math.inf) -> float:
        """Return the runs per second that ended in time."""
        until = min(until, 60 * self.minutes)
        return sum(since <= at < until for at in self.done) / (until - since)

    def share(self, since: float, until: float) -> float:
        """Return the share of the key's slots that calls of runs in time used."""
        ended = sum(since <= at < until for at in self.useful)
        return ended * CALL_SECONDS / (until - since) / self.config.slots


def capacity(config: ProviderConfig) -> float:
    """Return the runs per second of an ideal scheduler on a key."""
    return config.slots / CALL_SECONDS / CALLS


__all__ = ["MODEL", "AgentFleet", "Overloaded", "capacity", "provider_config"]
