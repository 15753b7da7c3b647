"""A surge on a supervisor and an upstream, drawn from a seed, with the faults of a provider.

Agents make their calls through the upstream. Callers flood the supervisor, set deadlines, cancel, and retry when they
are told to. The provider refuses, fails, drops connections, stops, slows down, or finishes calls whose client hung up.
The checks use only what is visible from outside: the provider's side of every call, the cost of each call as its caller
knows it, and the outcomes of the tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import pytest
from bench.calls.upstream_run import MODEL, send_call
from tests.simulation.agent_fleet import CALL_SECONDS, CALLS, AgentFleet, capacity
from tests.support import run_checks
from tests.support.supervisor_checks import InvariantViolation
from tests.support.upstream_checks import check_upstream

from forebay import BackpressureSupervisor, Budget, Deadline, ForebayError, Priority, Quota, Task, Ticket, Upstream
from forebay.errors import DeadlinePassed
from forebay.interfaces import Charge, Outcome
from forebay.limit import Grant, Limit
from forebay.quota import BilledUsage, Price
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
from forebay.testing import EventRecord
from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

COUNTED = ("admitted", "spilled", "rejected", "succeeded", "failed", "timed_out", "cancelled", "expired")
CALL_ENDS = ("answered", "refused by the provider", "call failed", "call cancelled", "rejected by the upstream")
MINUTES = 3.0  # of a plateau
WARM_UP = 60.0  # seconds that do not count, as in the benchmarks: the limits of the key are unknown at first
PRICE = Price(input=0.15, output=0.60)


@dataclass
class CallSurgeScript:
    """The values that a seed draws."""

    provider: ProviderConfig
    max_concurrent: int | None  # calls in flight; None: unknown to the upstream
    quotas: tuple[Quota, ...]
    usd: float | None
    max_wait: float
    workers: int  # slots for runs
    overflow: str | None
    tasks: int
    spread: float  # seconds over which the tasks come
    deadline_share: float  # probabilities
    cancel_share: float
    misbehaving_share: float

    @classmethod
    def draw(cls, rng: random.Random) -> CallSurgeScript:
        """Draw a supervisor, a key and a surge on both."""
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
    at, seconds = rng.uniform(2, 30), rng.uniform(3, 20)
    fault = rng.choice(("none", "slow", "outage", "cut", "bursts", "halved"))
    steps = {
        "outage": (CapacityStep(at=at, slots=0), CapacityStep(at=at + seconds, slots=slots)),
        "cut": (CapacityStep(at=at, slots=0, cut=True), CapacityStep(at=at + seconds, slots=slots)),
        "halved": (CapacityStep(at=at, slots=slots // 2), CapacityStep(at=at + seconds, slots=slots)),
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
        capacity_steps=steps.get(fault, ()),
        slowdowns=(Slowdown(at=at, seconds=seconds, factor=5),) if fault == "slow" else (),
        faults=Faults(
            stray=rng.choice((0, 0.02)),
            error=rng.choice((0, 0.05)),
            cut=rng.choice((0, 0.05)),
            straggler=0.02,
            bursts=Bursts(every=20, seconds=4) if fault == "bursts" else None,
        ),
    )


_TRIAL: Final = 2.0  # seconds


class WatchedLimit(Limit):
    """A limit that checks every permit that another limit grants."""

    def __init__(self, limit: Limit) -> None:
        super().__init__()
        self._limit = limit
        self._recent: list[tuple[float, int]] = []  # times of grants, and the limits then
        self.violations: list[str] = []

    def limit(self, now: float) -> int:
        return self._limit.limit(now)

    def reopens_at(self, now: float) -> float | None:
        return self._limit.reopens_at(now)

    def grant(self, now: float, in_flight: int) -> Grant:
        self._recent = [(at, limit) for at, limit in self._recent if at > now - _TRIAL] + [
            (now, self._limit.limit(now))
        ]
        if in_flight > max(
            limit for _, limit in self._recent
        ):  # right after a refusal a trial keeps the limit of before
            self.violations.append(f"at {now:.3f} s slot {in_flight} of {self._limit.limit(now)} was granted")
        return self._limit.grant(now, in_flight)

    def accepted(self, now: float, grant: Grant) -> None:
        self._limit.accepted(now, grant)

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        self._limit.observe(now, grant, outcome, slowdown=slowdown)


class CallSurge:
    """One surge on a supervisor whose agents share a key."""

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
        self.account = self.upstream.core.accounts.account(MODEL)
        self.limit = self.account.account.limit = WatchedLimit(self.account.account.limit)
        self.sent = 0  # calls in flight, as their senders count
        self.spent = 0.0  # dollars, as the senders count
        self.tickets: list[Ticket] = []
        self.provider: SimulatedProvider

    # --- agents ---

    async def agent(self, task: Task) -> Any:
        """Make up to three calls, or misbehave as the payload says."""
        mood = task.payload
        try:
            if mood == "concurrent calls":
                await asyncio.gather(*(self.call() for _ in range(3)), return_exceptions=True)
            elif mood == "short timeout":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.rng.uniform(0, 3)):
                        await self.call()
            for _ in range(self.rng.randint(1, 2)):
                await self.call()
        except asyncio.CancelledError:
            if mood != "swallow":
                raise
            await asyncio.sleep(self.rng.uniform(1, 20))  # as some agent frameworks do
        return task.task_id

    async def call(self) -> None:
        """Make one call through the upstream; its length is not known before."""
        input_tokens, output_tokens = self.lengths.lengths(self.rng)
        tokens = input_tokens, min(output_tokens, 300)
        expected = Charge(input_tokens=input_tokens, output_tokens=100, tokens=input_tokens + 100)
        request = self.upstream.core.request(MODEL, expected)

        async def attempt(_: PlainRoute, permit: Permit) -> AttemptResult:
            return await self.send(permit, tokens, request.usd)

        try:
            await self.upstream.runner.run(PlainRoute(self.upstream, self.account, request), attempt)
        except ForebayError as error:
            self.happened["rejected by the upstream"] += not isinstance(error, ConnectionError)
            raise

    async def send(self, permit: Permit, tokens: tuple[int, int], reserved: float) -> AttemptResult:
        """Send one call to the provider, and count its cost as its sender knows it."""
        usd = self.script.usd
        if usd is not None and self.spent >= usd:
            raise InvariantViolation(f"a call is sent when ${self.spent:g} of ${usd:g} are spent")
        if self.script.max_concurrent is not None and self.sent >= self.script.max_concurrent:
            raise InvariantViolation(f"a call is sent when {self.sent} are in flight")
        self.sent += 1
        cost, end = reserved, "call cancelled"  # unless the call ends in another way
        try:
            result = await send_call(self.provider, self.account, permit, tokens)
            if result.outcome.kind is Outcome.SUCCESS:
                used = BilledUsage(input_tokens=tokens[0], output_tokens=tokens[1])
                cost, end = self.upstream.core.cost(MODEL, used) or 0.0, "answered"
                result.outcome = msgspec.structs.replace(result.outcome, usd=cost)
            elif result.outcome.usd == 0.0:
                cost, end = 0.0, "refused by the provider"
            else:
                end = "call failed"
            return result
        finally:
            self.sent -= 1
            self.spent += cost
            self.happened[end] += 1

    # --- callers ---

    async def caller(self, supervisor: BackpressureSupervisor, task: Task, at: float) -> None:
        """Submit, with the retries and the timeout that the seed draws."""
        await asyncio.sleep(at)
        timeout = self.rng.uniform(0, 20) if self.rng.random() < self.script.cancel_share else None
        for _ in range(3):
            try:
                ticket = await supervisor.submit(task)
            except DeadlinePassed:
                return
            if ticket:
                self.tickets.append(ticket)
                try:
                    async with asyncio.timeout(timeout):
                        await ticket
                except TimeoutError:
                    ticket.cancel()
                return
            if ticket.retry_after is None:
                return
            await asyncio.sleep(ticket.retry_after)

    def task(self, number: int) -> Task:
        """Draw one task of the surge."""
        rng, script = self.rng, self.script
        moods = ("concurrent calls", "short timeout", "swallow")
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
        """Run the surge until the supervisor is closed, and check the invariants."""
        script, rng = self.script, self.rng
        self.provider = SimulatedProvider(script.provider, seed=rng.randint(0, 1 << 30))
        tasks = [self.task(number) for number in range(script.tasks)]
        async with BackpressureSupervisor(overflow=script.overflow) as supervisor, asyncio.TaskGroup() as group:
            record = EventRecord(supervisor)
            supervisor.register_worker("agents", handler=self.agent, task_types=["run"], max_concurrent=script.workers)
            for task in tasks:
                group.create_task(self.caller(supervisor, task, rng.uniform(0, script.spread)))
        await asyncio.sleep(60.0)  # until handlers that swallowed their cancellation have ended
        run_checks.check_closed_supervisor(record)
        run_checks.check_in_memory_run(record, self.tickets)
        check_upstream(self.upstream)
        self.check()
        self.happened.update({name: getattr(supervisor.statistics(), name) for name in COUNTED})
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise InvariantViolation(f"asyncio tasks are left: {left}")

    def check(self) -> None:
        """Check that no limit was exceeded and that all costs add up."""
        if self.limit.violations:
            raise InvariantViolation("; ".join(self.limit.violations[:3]))
        counted = self.upstream.statistics().spent_usd
        if counted is not None and abs(counted - self.spent) > 1e-9:
            raise InvariantViolation(f"the upstream counts ${counted:g}, and its callers spent ${self.spent:g}")


def run(seed: int) -> CallSurge:
    """Run the surge of one seed; raise if an invariant is violated, or at a deadlock or an unhandled error."""
    surge = CallSurge(seed)
    with run_checks.fail_on_logged_errors():
        simulate(surge.main, seed=seed, max_time=36_000.0)
    return surge


class GoodputPlateau:
    """Simulations of a small key: at its capacity, flooded, flooded with an outage, and flooded without limits.

    Each takes three minutes. Goodput is the share of the key's capacity that runs in time used.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"{seed}/plateau")
        self.seed = seed
        self.slots = rng.choice((3, 4, 6))
        self.load_factor = rng.uniform(3, 10)  # load of a flood, divided by the capacity
        self.shares_speed = rng.random() < 0.5
        start = rng.uniform(10, 20)
        self.outage = (CapacityStep(at=start, slots=0), CapacityStep(at=start + rng.uniform(3, 15), slots=self.slots))
        self.recovered_at = self.outage[-1].at + 8 * CALLS * CALL_SECONDS  # eight service times: less than 90 s

    def fleet(self, times: float, *, unlimited: bool = False, steps: tuple[CapacityStep, ...] = ()) -> AgentFleet:
        """Simulate a load of `times` the capacity of the key."""
        overcommit = None if self.shares_speed or unlimited else 1.0
        config = ProviderConfig(
            slots=self.slots,
            ttft=0.5,
            tpot=0.01,
            overcommit=overcommit,
            busy_reason=BusyReason.CONCURRENCY,
            finish_abandoned=True,
            capacity_steps=steps,
        )
        workers, max_queue_size = (1000, 100_000) if unlimited else (8 * self.slots, 4 * self.slots)
        offered = times * capacity(config)
        return AgentFleet(
            config,
            offered,
            self.seed,
            minutes=MINUTES,
            workers=workers,
            max_queue_size=max_queue_size,
            unlimited=unlimited,
        ).run()

    def goodput_share(self, fleet: AgentFleet, since: float) -> float:
        """Return the goodput from `since` on, as a share of the key's capacity."""
        return fleet.share(since, 60 * MINUTES)

    def check(self) -> None:
        """Check that a flood does not reduce goodput, and that goodput recovers after an outage."""
        at_capacity, flooded = (self.goodput_share(self.fleet(times), WARM_UP) for times in (1.0, self.load_factor))
        if flooded < 0.95 * at_capacity or flooded < 0.9:
            raise InvariantViolation(
                f"{self.load_factor:.1f} times the capacity uses {flooded:.2f} of the key,"
                f" and a load of its capacity {at_capacity:.2f}"
            )
        interrupted = self.fleet(self.load_factor, steps=self.outage)
        check_upstream(interrupted.upstream)
        after, window = self.goodput_share(interrupted, self.recovered_at), 60 * MINUTES - self.recovered_at
        # the outage synchronizes the slots: the calls that end in a window are known to one round of them only
        least = 0.95 * flooded - CALLS * CALL_SECONDS / window
        if after < least:
            raise InvariantViolation(f"{after:.2f} of the key is used after the outage, and {flooded:.2f} without one")


def run_with_plateau(seed: int) -> CallSurge:
    """Run the surge and the plateau of a seed, and check both."""
    surge = run(seed)
    GoodputPlateau(seed).check()
    return surge


def seeds(count: int, quick: int) -> list[Any]:
    """Return test parameters for `count` seeds, of which `make test-quick` runs the first `quick`."""
    return [seed if seed < quick else pytest.param(seed, marks=pytest.mark.slow) for seed in range(count)]


SEEDS = seeds(100, 20)
PLATEAUS = seeds(25, 5)  # `make sim` runs one for every seed

if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run_with_plateau(int(argument))
        print(argument, outcome.script, outcome.happened, sep="\n")
