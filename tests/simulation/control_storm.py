"""A provider that misleads, punishes or changes, drawn from a seed, and more callers than it can serve.

The checks use only what is visible from outside: how much of the provider's capacity does useful work, how many calls
it refuses in any minute, how long none is sent, and how soon service is back after an outage.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import httpx
from tests.support.simulated_transport import SimulatedTransport, chat
from tests.support.supervisor_checks import InvariantViolation
from tests.support.upstream_checks import check_upstream

from forebay import Overloaded, Quota, Upstream, clock
from forebay.simulation import simulate
from forebay.simulation.provider.provider_config import (
    BusyReason,
    CapacityStep,
    Faults,
    Penalty,
    ProviderConfig,
    ReportedLimits,
    SimulatedRateLimit,
    Unit,
    Wording,
)
from forebay.simulation.provider.simulated_provider import SimulatedProvider

MODEL: Final = "gpt-4o-mini"
TTFT, TPOT = 0.5, 0.03
SHORTEST, LONGEST = 20, 100  # output tokens of a call
CALL: Final = TTFT + TPOT * (SHORTEST + LONGEST) / 2  # seconds of the average call
MINUTES: Final = 5
WARM_UP: Final = 120.0  # seconds that do not count: the limits are unknown at first
FREE: Final = 400  # slots, where a rate is the only limit
FEW: Final = 10  # refused calls in a minute that are no hammering, whatever their share
ONSET: Final = 10  # refused calls of a minute of an outage, for each slot: all in flight are refused, some repeatedly
SHUT: Final = 25.0  # seconds without a call, at most, while callers wait and calls in flight do not hold all slots
PUNISHED: Final = 60.0  # the same where each refused call may begin a penalty of 20 s
EMPTY: Final = 75.0  # the same where nothing is left of a minute, as the headers say
RECOVERY: Final = 90.0  # seconds after an outage
VAGUE: Final = ReportedLimits(wording=Wording.VAGUE, retry_after="", rate_limit_headers=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A provider, and what it allows.

    Attributes:
        config: the provider.
        capacity: calls a second.
        goodput: the least share of the capacity that must be used.
        busy: the least share of the callers whose calls must be in flight, on average, where nothing limits them. How
            many calls end in a time is chance there: where latency varies much, by 2 % in three minutes.
        refused: the largest share of the calls of any minute that may be refused.
        outage: when it begins and ends.
        callers: those who call; None for two to four times as many as the provider can serve.
        max_concurrent: of the upstream.
        quotas: of the upstream.
        gap: seconds in which no call is sent, at most, while callers wait and the provider's slots are not all held.
    """

    config: ProviderConfig
    capacity: float
    goodput: float = 0.85
    busy: float = 0.0
    refused: float = 0.1
    outage: tuple[float, float] | None = None
    callers: int | None = None
    max_concurrent: int | None = None
    quotas: tuple[Quota, ...] = ()
    gap: float = SHUT


LIMITS: Final = ("goodput", "busy", "refused", "outage", "callers", "max_concurrent", "quotas", "gap")


def _config(**fields: Any) -> ProviderConfig:
    defaults: dict[str, Any] = {
        "ttft": TTFT, "tpot": TPOT, "noise": 0.1, "overcommit": 1.0, "refusal_delay": 0.1,
        "busy_reason": BusyReason.CONCURRENCY, "reports": VAGUE,
    }  # fmt: skip
    return ProviderConfig(**defaults | fields)


def _slots(rng: random.Random, reports: ReportedLimits = VAGUE, slots: int | None = None, **fields: Any) -> Case:
    slots = rng.randint(6, 12) if slots is None else slots
    limits = {name: fields.pop(name) for name in LIMITS if name in fields}
    return Case(config=_config(slots=slots, reports=reports, **fields), capacity=slots / CALL, **limits)


def _rate(rng: random.Random, reports: ReportedLimits = VAGUE, **fields: Any) -> Case:
    limits = {name: fields.pop(name) for name in LIMITS if name in fields}
    window = {name: fields.pop(name) for name in ("fixed_window", "burst") if name in fields}
    period = fields.pop("period", 60.0)
    amount = round(rng.uniform(2.0, 5.0) * period)
    limit = SimulatedRateLimit(unit=Unit.REQUESTS, amount=amount, period=period, **window)
    config = _config(slots=FREE, reports=reports, rate_limits=(limit,), **fields)
    return Case(config=config, capacity=amount / period, **limits)


def _wrong_retry_after(rng: random.Random) -> ReportedLimits:
    return replace(VAGUE, retry_after=rng.choice(("0", "1", "5", "30", "3600", "86400", "soon")))


def _penalty(rng: random.Random) -> Penalty:
    return Penalty(seconds=rng.choice((2.0, 10.0, 20.0)), extended=rng.random() < 0.5)


def _outage(rng: random.Random) -> Case:
    slots, start = rng.randint(6, 12), rng.uniform(60, 100)
    end = start + rng.uniform(20, 80)
    steps = CapacityStep(at=start, slots=0, cut=rng.random() < 0.5), CapacityStep(at=end, slots=slots)
    return _slots(rng, slots=slots, capacity_steps=steps, busy_reason=rng.choice(list(BusyReason)), outage=(start, end))


def _dips(rng: random.Random) -> Case:
    slots, every, low = rng.randint(8, 12), rng.choice((10, 20)), rng.choice((2, 3))
    times = range(every, 60 * MINUTES, every)
    steps = tuple(CapacityStep(at=at + after, slots=n) for at in times for after, n in ((0, 1), (low, slots)))
    case = _slots(
        rng,
        slots=slots,
        capacity_steps=steps,
        stalls=False,
        goodput=0.45,
        refused=0.65,
        busy_reason=rng.choice(list(BusyReason)),
    )
    return replace(case, capacity=case.capacity * (1 - low / every))


def _tier_falls(rng: random.Random) -> Case:
    at, low = rng.uniform(60, 120), rng.uniform(2.0, 4.0)
    limits = (
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=round(60 * 4 * low), until=at),
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=round(60 * low), since=at),
    )
    return Case(config=_config(slots=FREE, rate_limits=limits), capacity=low, refused=0.2)


def _no_limit(rng: random.Random, **fields: Any) -> Case:
    callers = rng.randint(30, 40)
    case = _slots(rng, slots=FREE, overcommit=None, callers=callers, **fields)
    return replace(case, capacity=callers / CALL)


def _tokens(rng: random.Random) -> Case:
    tokens = rng.randint(600, 1200)
    return replace(
        _slots(rng, slots=60, tokens_in_flight=tokens, goodput=0.4, refused=0.6), capacity=tokens / 75 / CALL
    )


CASES: Final[dict[str, Callable[[random.Random], Case]]] = {
    "slots, vague": _slots,
    "slots, wrong Retry-After": lambda rng: _slots(rng, _wrong_retry_after(rng)),
    "slots, said to be a rate": lambda rng: _slots(rng, replace(_wrong_retry_after(rng), wording=Wording.RATE)),
    "slots, penalty": lambda rng: _slots(rng, penalty=_penalty(rng), goodput=0.6, refused=0.2, gap=PUNISHED),
    "slots, outage": _outage,
    "slots, dips": _dips,
    "slots, late refusals": lambda rng: _slots(
        rng, refusal_delay=rng.uniform(5, 30), busy_reason=BusyReason.OVERLOADED, refused=0.2
    ),
    "few slots": lambda rng: _slots(rng, slots=rng.choice((1, 2, 3)), goodput=0.75),
    "few slots, shared": lambda rng: _slots(rng, slots=rng.choice((2, 3)), overcommit=None, goodput=0.6),
    # With 503 or 529: random 429s may be taken for a rate, a known weak spot in docs/limits.md.
    "small replicas": lambda rng: _slots(
        rng, slots=12, replicas=4, goodput=0.25, refused=0.75, busy_reason=BusyReason.OVERLOADED
    ),
    "replicas of one slot": lambda rng: _slots(
        rng, slots=12, replicas=12, goodput=0.12, refused=0.75, busy_reason=BusyReason.OVERLOADED
    ),
    "noise": lambda rng: _slots(rng, noise=rng.choice((0.6, 0.8)), goodput=0.6),
    "tokens in flight": _tokens,
    "rate, vague": _rate,
    "rate, wrong Retry-After": lambda rng: _rate(rng, _wrong_retry_after(rng)),
    "rate, said to be concurrency": lambda rng: _rate(rng, replace(VAGUE, wording=Wording.CONCURRENCY)),
    "rate, penalty": lambda rng: _rate(rng, penalty=_penalty(rng), goodput=0.5, refused=0.2, gap=PUNISHED),
    "rate, remaining 0": lambda rng: _rate(rng, ReportedLimits(remaining=0), gap=EMPTY),
    "rate, truthful": lambda rng: _rate(rng, ReportedLimits()),
    "rate, tier falls": _tier_falls,
    "window of ten seconds": lambda rng: _rate(rng, period=10.0, fixed_window=True, goodput=0.75, refused=0.2),
    "window of a minute": lambda rng: _rate(rng, fixed_window=True, goodput=0.7, refused=0.25),
    "window, wrong Retry-After": lambda rng: _rate(
        rng, _wrong_retry_after(rng), fixed_window=True, goodput=0.7, refused=0.25
    ),
    "window, remaining 0": lambda rng: _rate(rng, ReportedLimits(remaining=0), fixed_window=True, gap=EMPTY),
    "no limit, stray refusals": lambda rng: _no_limit(rng, noise=0.1, faults=Faults(stray=0.05), goodput=0.95),
    "no limit, noise": lambda rng: _no_limit(rng, noise=0.8, goodput=0.9, busy=0.97),
    "rate, quota of a day": lambda rng: _rate(
        rng, ReportedLimits(rate_limit_headers=False), quotas=(Quota(requests=100_000, per="day"),)
    ),
    "replicas, max_concurrent": lambda rng: _slots(
        rng, slots=12, replicas=12, max_concurrent=36, refused=0.95, goodput=0.1, busy_reason=BusyReason.OVERLOADED
    ),
}


class ControlStorm:
    """One provider and its callers, who call again and again.

    Attributes:
        happened: how often each thing happened.
        full_at: times, to the second, at which calls in flight held as many slots as the provider has when it is
            well: in an outage they may go on for as long as it lasts, and none can be sent beside them.
        in_flight: calls in flight, each second.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"control {seed}")
        names = list(CASES)
        self.name = names[seed % len(names)]
        self.case = CASES[self.name](self.rng)
        flood = round(self.case.capacity * CALL * self.rng.uniform(2.0, 4.0)) + 2
        self.callers = self.case.callers or flood
        self.stream = seed // len(names) % 2 == 1
        self.served: list[float] = []
        self.full_at: list[float] = []
        self.in_flight: list[int] = []
        self.happened: Counter[str] = Counter()
        self.transport: SimulatedTransport

    async def main(self) -> None:
        """Let everybody call until the minutes are over, and check the upstream at rest."""
        self.transport = SimulatedTransport(SimulatedProvider(self.case.config, seed=self.seed))
        upstream = Upstream("llm", provider="openai", max_concurrent=self.case.max_concurrent, quotas=self.case.quotas)
        async with (
            asyncio.TaskGroup() as group,
            upstream.bind(httpx.AsyncClient(transport=self.transport, timeout=300.0)) as client,
        ):
            for number in range(self.callers):
                group.create_task(self._caller(client, number))
            while clock.now() < 60.0 * MINUTES + 200.0:
                await asyncio.sleep(1.0)
                self.in_flight.append(self.transport.in_flight)
                if self.transport.in_flight >= self.case.config.slots:
                    self.full_at.append(clock.now())
        check_upstream(upstream)

    async def _caller(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        await asyncio.sleep(rng.uniform(0, 10))
        while clock.now() < 60.0 * MINUTES:
            tokens = rng.randint(SHORTEST, LONGEST)
            request = chat(MODEL, f"run{number} Rivers?", output_tokens=tokens, max_tokens=200, stream=self.stream)
            try:
                response = await client.send(request)
            except Overloaded as error:
                self.happened["rejected"] += 1
                await asyncio.sleep(rng.uniform(0.5, 1.0) * min(5.0, error.retry_after or 5.0))
                continue
            except httpx.HTTPError:
                self.happened["failed"] += 1
                await asyncio.sleep(rng.uniform(0.5, 1.5))
                continue
            if response.status_code == 200:
                self.happened["served"] += 1
                self.served.append(clock.now())
            else:
                self.happened["refused"] += 1
                await asyncio.sleep(rng.uniform(0.5, 1.5))

    def goodput(self, since: float, until: float) -> float:
        """Return the share of the capacity that served calls in a time."""
        return sum(since <= at < until for at in self.served) / (until - since) / self.case.capacity

    def busy(self, since: float, until: float) -> float:
        """Return the share of the callers whose calls were in flight, on average of a time."""
        return statistics.fmean(self.in_flight[round(since) : round(until)]) / self.callers

    def refused(self, since: float) -> tuple[int, int]:
        """Return the calls of a minute that were refused, and all of that minute."""
        calls = [call.status for call in self.transport.sent if since <= call.at < since + 60.0]
        return sum(status in (402, 429, 503, 529) for status in calls), len(calls)

    def longest_gap(self) -> float:
        """Return the longest time in which no call was sent, though calls in flight did not hold all slots."""
        end = 60.0 * MINUTES
        moments = (call.at for call in self.transport.sent)
        times = [0.0, *sorted(at for at in (*moments, *self.full_at) if at < end), end]
        return max(after - before for before, after in itertools.pairwise(times))

    def check(self) -> None:
        """Check that the capacity is used, that nobody hammers, and that service comes back."""
        case, end = self.case, 60.0 * MINUTES
        start = WARM_UP if case.outage is None else case.outage[1] + RECOVERY
        if (share := self.goodput(start, end)) < case.goodput:
            raise InvariantViolation(f"{self.name}: {share:.2f} of the capacity is used after {start:.0f} s")
        if (share := self.busy(start, end)) < case.busy:
            raise InvariantViolation(f"{self.name}: {share:.2f} of the callers' calls are sent after {start:.0f} s")
        for since in range(120, 60 * MINUTES, 60):
            refused, calls = self.refused(since)
            down = case.outage is not None and case.outage[0] < since + 60.0 and since < case.outage[1]
            few = ONSET * case.config.slots if down else FEW
            if refused > max(few, case.refused * calls):
                raise InvariantViolation(f"{self.name}: {refused} of {calls} calls are refused from {since} s on")
        if (gap := self.longest_gap()) > case.gap:
            raise InvariantViolation(f"{self.name}: no call is sent for {gap:.0f} s")


def run(seed: int) -> ControlStorm:
    """Run the storm of a seed; raise if an invariant is violated."""
    storm = ControlStorm(seed)
    simulate(storm.main, seed=seed, max_time=36_000.0)
    storm.check()
    return storm


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run(int(argument))
        print(argument, outcome.name, outcome.happened, sep="\n")
