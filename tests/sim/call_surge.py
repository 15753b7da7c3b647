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
from bench.calls.whole import MODEL, asked
from tests.sim import promises
from tests.sim.key import ALONE, CALLS, Fleet, capacity
from tests.sim.promises import Broke

from forebay import BackpressureSupervisor, Budget, Deadline, ForebayError, Priority, Quota, Task, Ticket, Upstream
from forebay.errors import DeadlinePassed
from forebay.quota import Price
from forebay.retry import Retry
from forebay.sim import simulate, virtual_loop
from forebay.sim.config import Allowance, Bursts, Busy, Faults, ProviderConfig, Slow, Step, Unit
from forebay.sim.traffic import Traffic
from forebay.sim.virtual import SimulatedProvider
from forebay.testing import Record, check_upstream
from forebay.typing import Charge, Grant, Limit, Outcome
from forebay.upstream.ask import Permit
from forebay.upstream.attempt import Tried

HAPPENINGS = ("admitted", "spilled", "rejected", "succeeded", "failed", "timed_out", "cancelled", "expired")
CALL_ENDS = ("answered", "refused by the provider", "broke", "cut short", "refused by the upstream")
MINUTES = 3.0  # of a plateau
WARM_UP = 60.0  # seconds that do not count, as in the benches: nothing is known of the key at first
PRICE = Price(input=0.15, output=0.60)


@dataclass
class Script:
    """What the seed has drawn."""

    provider: ProviderConfig
    most: int | None  # calls in flight, as the upstream is told
    quotas: tuple[Quota, ...]
    usd: float | None
    longest_wait: float
    workers: int  # slots for runs
    overflow: str | None
    tasks: int
    spread: float  # seconds over which the tasks come
    hurried: float  # chances
    impatient: float
    moody: float

    @classmethod
    def draw(cls, rng: random.Random) -> Script:
        """A house, its key and a surge on both."""
        slots = rng.choice((2, 4, 8))
        rate = rng.choice((None, None, 60, 200))
        return cls(
            provider=_provider(rng, slots, rate),
            most=rng.choice((None, None, slots, 3 * slots)),
            quotas=() if rate is None or rng.random() < 0.5 else (Quota(requests=rate, per="minute"),),
            usd=rng.choice((None, None, 0.002, 0.01)),
            longest_wait=rng.choice((5.0, 60.0)),
            workers=rng.choice((slots, 20, 60)),
            overflow=rng.choice((None, "memory://", "memory://?bound=20")),
            tasks=rng.choice((20, 60, 120)),
            spread=rng.choice((0.0, 10.0, 40.0)),
            hurried=rng.choice((0.0, 0.5, 1.0)),
            impatient=rng.choice((0.0, 0.2)),
            moody=rng.choice((0.0, 0.3)),
        )


def _provider(rng: random.Random, slots: int, rate: int | None) -> ProviderConfig:
    at, long = rng.uniform(2, 30), rng.uniform(3, 20)
    trouble = rng.choice(("none", "slow", "outage", "cut", "bursts", "halved"))
    steps = {
        "outage": (Step(at=at, slots=0), Step(at=at + long, slots=slots)),
        "cut": (Step(at=at, slots=0, cut=True), Step(at=at + long, slots=slots)),
        "halved": (Step(at=at, slots=slots // 2), Step(at=at + long, slots=slots)),
    }
    return ProviderConfig(
        slots=slots,
        ttft=0.3,
        tpot=0.01,
        noise=0.2,
        overcommit=rng.choice((1.0, 1.0, 2.0, None)),
        busy=rng.choice(list(Busy)),
        run_on=rng.random() < 0.5,
        allowances=() if rate is None else (Allowance(unit=Unit.REQUESTS, amount=rate),),
        steps=steps.get(trouble, ()),
        slow=(Slow(at=at, seconds=long, factor=5),) if trouble == "slow" else (),
        faults=Faults(
            stray=rng.choice((0, 0.02)),
            error=rng.choice((0, 0.05)),
            cut=rng.choice((0, 0.05)),
            straggler=0.02,
            bursts=Bursts(every=20, seconds=4) if trouble == "bursts" else None,
        ),
    )


class Watched:
    """A limit that is looked at from outside whenever a slot is granted."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self.passed: list[str] = []

    def limit(self, now: float) -> int:
        return self._limit.limit(now)

    def next_change(self, now: float) -> float | None:
        return self._limit.next_change(now)

    def grant(self, now: float, in_flight: int) -> Grant:
        if in_flight > self._limit.limit(now):
            self.passed.append(f"at {now:.3f} s slot {in_flight} of {self._limit.limit(now)} was granted")
        return self._limit.grant(now, in_flight)

    def accepted(self, now: float, grant: Grant) -> None:
        self._limit.accepted(now, grant)

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, stretch: float | None = None) -> None:
        self._limit.observe(now, grant, outcome, stretch=stretch)


class CallSurge:
    """One surge on a house whose agents share a key."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.script = script = Script.draw(self.rng)
        self.happened: Counter[str] = Counter()
        self.lengths = Traffic.conversation()
        self.upstream = Upstream(
            "key",
            provider="openai",
            quotas=script.quotas,
            max_concurrent=script.most,
            budget=None if script.usd is None else Budget(usd=script.usd),
            retry=Retry(max_attempts=4),
            longest_wait=script.longest_wait,
            prices={MODEL: PRICE},
        )
        self.desk = self.upstream.books.desk(MODEL)
        self.limit = self.desk.account.limit = Watched(self.desk.account.limit)
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
        ask = self.upstream.ask(MODEL, expected)

        async def attempt(permit: Permit) -> Tried:
            return await self.send(permit, tokens, ask.usd)

        try:
            await self.upstream.driver(self.desk).run(ask, attempt)
        except ForebayError as refusal:
            self.happened["refused by the upstream"] += not isinstance(refusal, ConnectionError)
            raise

    async def send(self, permit: Permit, tokens: tuple[int, int], reserved: float) -> Tried:
        """What goes over the wire, and what its sender knows of it: money above all."""
        usd = self.script.usd
        if usd is not None and self.spent >= usd:
            raise Broke(f"a call is sent when ${self.spent:g} of ${usd:g} are spent")
        if self.script.most is not None and self.sent >= self.script.most:
            raise Broke(f"a call is sent when {self.sent} are under way")
        self.sent += 1
        cost, what = reserved, "cut short"  # what is known of a call that is cancelled
        try:
            tried = await asked(self.provider, self.desk, permit, tokens)
            if tried.ended.outcome is Outcome.SUCCESS:
                used = Charge(input_tokens=tokens[0], output_tokens=tokens[1])
                cost, what = self.upstream.dollars(MODEL, used), "answered"
                tried.ended = msgspec.structs.replace(tried.ended, usd=cost)
            elif tried.ended.usd == 0.0:
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
        patience = self.rng.uniform(0, 20) if self.rng.random() < self.script.impatient else None
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
            rng.choice(moods) if rng.random() < script.moody else "well",
            task_id=f"t{number}",
            priority=rng.choice(list(Priority)),
            tenant=rng.choice(("a", "b")),
            timeout=rng.choice((None, 20.0)),
            deadline=Deadline.within(script.spread + rng.uniform(1, 60)) if rng.random() < script.hurried else None,
            spill=rng.random() < 0.8,
        )

    async def main(self) -> None:
        """The surge from the first task to the closed house, and what must hold then."""
        script, rng = self.script, self.rng
        self.provider = SimulatedProvider(script.provider, seed=rng.randint(0, 1 << 30))
        tasks = [self.task(number) for number in range(script.tasks)]
        async with BackpressureSupervisor(overflow=script.overflow) as house, asyncio.TaskGroup() as group:
            record = Record(house)
            house.register_worker("agents", handler=self.agent, task_types=["run"], max_concurrent=script.workers)
            for task in tasks:
                group.create_task(self.caller(house, task, rng.uniform(0, script.spread)))
        await asyncio.sleep(60.0)  # until the last handler that swallowed its cancellation has ended
        promises.check_house(record)
        promises.check_memory(record, self.tickets)
        check_upstream(self.upstream)
        self.check()
        self.happened.update({name: getattr(house.statistics(), name) for name in HAPPENINGS})
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise Broke(f"asyncio tasks are left: {left}")

    def check(self) -> None:
        """No limit was passed, and the money adds up."""
        if self.limit.passed:
            raise Broke("; ".join(self.limit.passed[:3]))
        counted = self.upstream.statistics().spent_usd
        if counted is not None and abs(counted - self.spent) > 1e-9:
            raise Broke(f"${counted:g} count as spent, and its callers have spent ${self.spent:g}")


def run(seed: int) -> CallSurge:
    """Run the surge of one seed; raises if a promise is broken, nothing is left to do, or an error reached nobody."""
    surge = CallSurge(seed)
    with promises.no_failure_is_only_logged():
        simulate(surge.main, seed=seed, max_time=36_000.0)
    return surge


class Plateau:
    """The same house on a small key, calmly and flooded, with and without an outage, and flooded with nothing limited.

    Each is over three minutes. What is got is in runs that ended in time, over what the key bears.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"{seed}/plateau")
        self.seed = seed
        self.slots = rng.choice((3, 4, 6))
        self.times = rng.uniform(3, 10)  # the load of a flood
        self.shares = rng.random() < 0.5
        began = rng.uniform(10, 20)
        self.outage = (Step(at=began, slots=0), Step(at=began + rng.uniform(3, 15), slots=self.slots))
        self.back = self.outage[-1].at + 8 * CALLS * ALONE  # eight service times, which are less than 90 s

    def fleet(self, times: float, *, wild: bool = False, steps: tuple[Step, ...] = ()) -> Fleet:
        """So many times what the key bears."""
        overcommit = None if self.shares or wild else 1.0
        config = ProviderConfig(
            slots=self.slots,
            ttft=0.5,
            tpot=0.01,
            overcommit=overcommit,
            busy=Busy.CONCURRENCY,
            run_on=True,
            steps=steps,
        )
        workers, line = (1000, 100_000) if wild else (8 * self.slots, 4 * self.slots)
        offered = times * capacity(config)
        return Fleet(config, offered, self.seed, minutes=MINUTES, workers=workers, line=line, wild=wild).run()

    def got(self, fleet: Fleet, since: float) -> float:
        """Of what the key bears."""
        return fleet.share(since, 60 * MINUTES)

    def check(self) -> None:
        """Promise 3."""
        calm, flooded = (self.got(self.fleet(times), WARM_UP) for times in (1.0, self.times))
        if flooded < 0.95 * calm or flooded < 0.9:
            raise Broke(f"{self.times:.1f} times the load gets {flooded:.2f} of the key, and once the load {calm:.2f}")
        struck = self.fleet(self.times, steps=self.outage)
        check_upstream(struck.upstream)
        after, window = self.got(struck, self.back), 60 * MINUTES - self.back
        # the slots fall into step in the outage, so what ends within a window is known to one round of them only
        least = 0.95 * flooded - CALLS * ALONE / window
        if after < least:
            raise Broke(f"{after:.2f} of the key is got after the outage, and {flooded:.2f} without one")


def prove(seed: int) -> CallSurge:
    """All that is promised of a seed."""
    surge = run(seed)
    Plateau(seed).check()
    return surge


def seeds(past: int, quick: int) -> list[Any]:
    """All in `make test`, the first few in `make test-quick`."""
    return [seed if seed < quick else pytest.param(seed, marks=pytest.mark.slow) for seed in range(past)]


SEEDS = seeds(100, 20)
PLATEAUS = seeds(25, 5)  # `make sim` has one for every seed

if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = prove(int(argument))
        print(argument, outcome.script, outcome.happened, sep="\n")
