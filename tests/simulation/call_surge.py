"""A whole house drawn from a seed: supervisor and upstream, one provider, all that goes wrong, and promises.

Agents make their calls through the upstream; callers flood the house, set deadlines, leave and come back when told to.
The provider refuses, errs, cuts, stands still, slows down, or works on for those who have left. What is checked is seen
from outside: the provider's side of every call, the money of each as its own caller knows it, and how tasks ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from bench.calls.upstream_run import MODEL, asked
from tests.simulation.agent_fleet import ALONE, CALLS, AgentFleet, capacity
from tests.support import run_checks as promises
from tests.support.run_checks import InvariantViolation

from forebay import BackpressureSupervisor, Budget, Deadline, ForebayError, Priority, Quota, Task, Ticket, Upstream
from forebay.errors import DeadlinePassed
from forebay.interfaces import Charge, Grant, Limit, Outcome
from forebay.quota import Price
from forebay.retry import Retry
from forebay.simulation import simulate, virtual_loop
from forebay.simulation.provider.provider_config import (
    Bursts,
    BusyReason,
    CapacityStep,
    Faults,
    ProviderConfig,
    SimulatedRateLimit,
    Slowdown,
    Unit,
)
from forebay.simulation.provider.simulated_provider import SimulatedProvider
from forebay.simulation.provider.traffic import Traffic
from forebay.testing import EventRecord, check_upstream
from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.fallback_chain import PlainRoute

COUNTED = ("admitted", "spilled", "rejected", "succeeded", "failed", "timed_out", "cancelled", "expired")
CALL_ENDS = ("answered", "refused by the provider", "broke", "cut short", "refused by the upstream")
MINUTES = 3.0  # of a plateau
WARM_UP = 60.0  # seconds that do not count, as in the benches: nothing is known of the key at first
PRICE = Price(input=0.15, output=0.60)


@dataclass
class CallSurgeScript:
    """What the seed has drawn."""

    provider: ProviderConfig
    max_concurrent: int | None  # calls in flight, as the upstream is told
    quotas: tuple[Quota, ...]
    usd: float | None
    max_wait: float
    workers: int  # slots for runs
    overflow: str | None
    tasks: int
    spread: float  # seconds over which the tasks come
    deadline_share: float  # chances
    cancel_share: float
    misbehaving_share: float

    @classmethod
    def draw(cls, rng: random.Random) -> CallSurgeScript:
        """A house, its key and a surge on both."""
        slots = rng.choice((2, 4, 8))
        rate = rng.choice((None, None, 60, 200))
        return cls(
            provider=_provider(rng, slots, rate),
            max_concurrent=rng.choice((None, None, slots, 3 * slots)),
            quotas=() if rate is None or rng.random() < 0.5 else (Quota(requests=rate, per="minute"),),
            usd=rng.choice((None, None, 0.002, 0.01)),
            max_wait=rng.choice((5.0, 60.0)),
            workers=rng.choice((slots, 20, 60)),
            overflow=rng.choice((None, "memory://", "memory://?bound=20")),
            tasks=rng.choice((20, 60, 120)),
            spread=rng.choice((0.0, 10.0, 40.0)),
            deadline_share=rng.choice((0.0, 0.5, 1.0)),
            cancel_share=rng.choice((0.0, 0.2)),
            misbehaving_share=rng.choice((0.0, 0.3)),
        )


def _provider(rng: random.Random, slots: int, rate: int | None) -> ProviderConfig:
    at, long = rng.uniform(2, 30), rng.uniform(3, 20)
    trouble = rng.choice(("none", "slow", "outage", "cut", "bursts", "halved"))
    steps = {
        "outage": (CapacityStep(at=at, slots=0), CapacityStep(at=at + long, slots=slots)),
        "cut": (CapacityStep(at=at, slots=0, cut=True), CapacityStep(at=at + long, slots=slots)),
        "halved": (CapacityStep(at=at, slots=slots // 2), CapacityStep(at=at + long, slots=slots)),
    }
    return ProviderConfig(
        slots=slots,
        ttft=0.3,
        tpot=0.01,
        noise=0.2,
        overcommit=rng.choice((1.0, 1.0, 2.0, None)),
        busy_reason=rng.choice(list(BusyReason)),
        finish_abandoned=rng.random() < 0.5,
        rate_limits=() if rate is None else (SimulatedRateLimit(unit=Unit.REQUESTS, amount=rate),),
        capacity_steps=steps.get(trouble, ()),
        slowdowns=(Slowdown(at=at, seconds=long, factor=5),) if trouble == "slow" else (),
        faults=Faults(
            stray=rng.choice((0, 0.02)),
            error=rng.choice((0, 0.05)),
            cut=rng.choice((0, 0.05)),
            straggler=0.02,
            bursts=Bursts(every=20, seconds=4) if trouble == "bursts" else None,
        ),
    )


class WatchedLimit:
    """A limit that is looked at from outside whenever a slot is granted."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self.violations: list[str] = []

    def limit(self, now: float) -> int:
        return self._limit.limit(now)

    def reopens_at(self, now: float) -> float | None:
        return self._limit.reopens_at(now)

    def grant(self, now: float, in_flight: int) -> Grant:
        if in_flight > self._limit.limit(now):
            self.violations.append(f"at {now:.3f} s slot {in_flight} of {self._limit.limit(now)} was granted")
        return self._limit.grant(now, in_flight)

    def accepted(self, now: float, grant: Grant) -> None:
        self._limit.accepted(now, grant)

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        self._limit.observe(now, grant, outcome, slowdown=slowdown)


class CallSurge:
    """One surge on a house whose agents share a key."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.script = script = CallSurgeScript.draw(self.rng)
        self.happened: Counter[str] = Counter()
        self.lengths = Traffic.conversation()
        self.upstream = Upstream(
            "key",
            provider="openai",
            quotas=script.quotas,
            max_concurrent=script.max_concurrent,
            budget=None if script.usd is None else Budget(usd=script.usd),
            retry=Retry(max_attempts=4),
            max_wait=script.max_wait,
            prices={MODEL: PRICE},
        )
        self.desk = self.upstream.core.accounts.account(MODEL)
        self.limit = self.desk.account.limit = WatchedLimit(self.desk.account.limit)
        self.sent = 0  # calls under way, as those who send them count
        self.spent = 0.0  # dollars, likewise
        self.tickets: list[Ticket] = []
        self.provider: SimulatedProvider

    # --- agents ---

    async def agent(self, task: Task) -> Any:
        """A run of up to three calls, or of trouble, as its payload says."""
        mood = task.payload
        try:
            if mood == "together":
                await asyncio.gather(*(self.call() for _ in range(3)), return_exceptions=True)
            elif mood == "hasty":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.rng.uniform(0, 3)):
                        await self.call()
            for _ in range(self.rng.randint(1, 2)):
                await self.call()
        except asyncio.CancelledError:
            if mood != "swallow":
                raise
            await asyncio.sleep(self.rng.uniform(1, 20))  # as some agent teams do
        return task.task_id

    async def call(self) -> None:
        """One call through the upstream, whose length nobody knows before."""
        incoming, outgoing = self.lengths.lengths(self.rng)
        tokens = incoming, min(outgoing, 300)
        expected = Charge(input_tokens=incoming, output_tokens=100, tokens=incoming + 100)
        ask = self.upstream.core.request(MODEL, expected)

        async def attempt(_: PlainRoute, permit: Permit) -> AttemptResult:
            return await self.send(permit, tokens, ask.usd)

        try:
            await self.upstream.runner.run(PlainRoute(self.upstream, self.desk, ask), attempt)
        except ForebayError as refusal:
            self.happened["refused by the upstream"] += not isinstance(refusal, ConnectionError)
            raise

    async def send(self, permit: Permit, tokens: tuple[int, int], reserved: float) -> AttemptResult:
        """What goes over the wire, and what its sender knows of it: money above all."""
        usd = self.script.usd
        if usd is not None and self.spent >= usd:
            raise InvariantViolation(f"a call is sent when ${self.spent:g} of ${usd:g} are spent")
        if self.script.max_concurrent is not None and self.sent >= self.script.max_concurrent:
            raise InvariantViolation(f"a call is sent when {self.sent} are under way")
        self.sent += 1
        cost, what = reserved, "cut short"  # what is known of a call that is cancelled
        try:
            tried = await asked(self.provider, self.desk, permit, tokens)
            if tried.outcome.kind is Outcome.SUCCESS:
                used = Charge(input_tokens=tokens[0], output_tokens=tokens[1])
                cost, what = self.upstream.core.cost(MODEL, used), "answered"
                tried.outcome = msgspec.structs.replace(tried.outcome, usd=cost)
            elif tried.outcome.usd == 0.0:
                cost, what = 0.0, "refused by the provider"
            else:
                what = "broke"
            return tried
        finally:
            self.sent -= 1
            self.spent += cost
            self.happened[what] += 1

    # --- callers ---

    async def caller(self, house: BackpressureSupervisor, task: Task, at: float) -> None:
        """Submit, and behave as the draw says."""
        await asyncio.sleep(at)
        patience = self.rng.uniform(0, 20) if self.rng.random() < self.script.cancel_share else None
        for _ in range(3):
            try:
                ticket = await house.submit(task)
            except DeadlinePassed:
                return
            if ticket:
                self.tickets.append(ticket)
                try:
                    async with asyncio.timeout(patience):
                        await ticket
                except TimeoutError:
                    ticket.cancel()
                return
            if ticket.retry_after is None:
                return
            await asyncio.sleep(ticket.retry_after)

    def task(self, number: int) -> Task:
        """One of the surge."""
        rng, script = self.rng, self.script
        moods = ("together", "hasty", "swallow")
        return Task(
            "run",
            rng.choice(moods) if rng.random() < script.misbehaving_share else "well",
            task_id=f"t{number}",
            priority=rng.choice(list(Priority)),
            tenant=rng.choice(("a", "b")),
            timeout=rng.choice((None, 20.0)),
            deadline=Deadline.within(script.spread + rng.uniform(1, 60))
            if rng.random() < script.deadline_share
            else None,
            spill=rng.random() < 0.8,
        )

    async def main(self) -> None:
        """The surge from the first task to the closed house, and what must hold then."""
        script, rng = self.script, self.rng
        self.provider = SimulatedProvider(script.provider, seed=rng.randint(0, 1 << 30))
        tasks = [self.task(number) for number in range(script.tasks)]
        async with BackpressureSupervisor(overflow=script.overflow) as house, asyncio.TaskGroup() as group:
            record = EventRecord(house)
            house.register_worker("agents", handler=self.agent, task_types=["run"], max_concurrent=script.workers)
            for task in tasks:
                group.create_task(self.caller(house, task, rng.uniform(0, script.spread)))
        await asyncio.sleep(60.0)  # until the last handler that swallowed its cancellation has ended
        promises.check_closed_supervisor(record)
        promises.check_in_memory_run(record, self.tickets)
        check_upstream(self.upstream)
        self.check()
        self.happened.update({name: getattr(house.statistics(), name) for name in COUNTED})
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise InvariantViolation(f"asyncio tasks are left: {left}")

    def check(self) -> None:
        """No limit was passed, and the money adds up."""
        if self.limit.violations:
            raise InvariantViolation("; ".join(self.limit.violations[:3]))
        counted = self.upstream.statistics().spent_usd
        if counted is not None and abs(counted - self.spent) > 1e-9:
            raise InvariantViolation(f"${counted:g} count as spent, and its callers have spent ${self.spent:g}")


def run(seed: int) -> CallSurge:
    """Run the surge of one seed; raises if a promise is broken, nothing is left to do, or an error reached nobody."""
    surge = CallSurge(seed)
    with promises.fail_on_logged_errors():
        simulate(surge.main, seed=seed, max_time=36_000.0)
    return surge


class GoodputPlateau:
    """The same house on a small key, calmly and flooded, with and without an outage, and flooded with nothing limited.

    Each is over three minutes. What is got is in runs that ended in time, over what the key bears.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"{seed}/plateau")
        self.seed = seed
        self.slots = rng.choice((3, 4, 6))
        self.load_factor = rng.uniform(3, 10)  # the load of a flood
        self.shares = rng.random() < 0.5
        began = rng.uniform(10, 20)
        self.outage = (CapacityStep(at=began, slots=0), CapacityStep(at=began + rng.uniform(3, 15), slots=self.slots))
        self.back = self.outage[-1].at + 8 * CALLS * ALONE  # eight service times, which are less than 90 s

    def fleet(self, times: float, *, wild: bool = False, steps: tuple[CapacityStep, ...] = ()) -> AgentFleet:
        """So many times what the key bears."""
        overcommit = None if self.shares or wild else 1.0
        config = ProviderConfig(
            slots=self.slots,
            ttft=0.5,
            tpot=0.01,
            overcommit=overcommit,
            busy_reason=BusyReason.CONCURRENCY,
            finish_abandoned=True,
            capacity_steps=steps,
        )
        workers, line = (1000, 100_000) if wild else (8 * self.slots, 4 * self.slots)
        offered = times * capacity(config)
        return AgentFleet(
            config, offered, self.seed, minutes=MINUTES, workers=workers, max_queue_size=line, unlimited=wild
        ).run()

    def goodput_share(self, fleet: AgentFleet, since: float) -> float:
        """Of what the key bears."""
        return fleet.share(since, 60 * MINUTES)

    def check(self) -> None:
        """Promise 3."""
        calm, flooded = (self.goodput_share(self.fleet(times), WARM_UP) for times in (1.0, self.load_factor))
        if flooded < 0.95 * calm or flooded < 0.9:
            raise InvariantViolation(
                f"{self.load_factor:.1f} times the load gets {flooded:.2f} of the key, and once the load {calm:.2f}"
            )
        struck = self.fleet(self.load_factor, capacity_steps=self.outage)
        check_upstream(struck.upstream)
        after, window = self.goodput_share(struck, self.back), 60 * MINUTES - self.back
        # the slots fall into step in the outage, so what ends within a window is known to one round of them only
        least = 0.95 * flooded - CALLS * ALONE / window
        if after < least:
            raise InvariantViolation(f"{after:.2f} of the key is got after the outage, and {flooded:.2f} without one")


def run_with_plateau(seed: int) -> CallSurge:
    """All that is promised of a seed."""
    surge = run(seed)
    GoodputPlateau(seed).check()
    return surge


def seeds(past: int, quick: int) -> list[Any]:
    """All in `make test`, the first few in `make test-quick`."""
    return [seed if seed < quick else pytest.param(seed, marks=pytest.mark.slow) for seed in range(past)]


SEEDS = seeds(100, 20)
PLATEAUS = seeds(25, 5)  # `make sim` has one for every seed

if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run_with_plateau(int(argument))
        print(argument, outcome.script, outcome.happened, sep="\n")
