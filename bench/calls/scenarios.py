"""Scenarios: ten minutes of a provider, and the callers that it meets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from bench.baselines.oracle_limit import OracleLimit
from bench.baselines.semaphore import SEMAPHORE, retrying_inside
from bench.calls.limit_run import Callers, LimitRun, QuotaPacer, RunRecord
from forebay.limit import FixedLimit, Limit
from forebay.simulation import Traffic
from forebay.simulation.provider.provider_config import (
    AccelerationLimit,
    Bursts,
    BusyReason,
    CapacityStep,
    Faults,
    ProviderConfig,
    SimulatedRateLimit,
    Slowdown,
    Unit,
)
from forebay.simulation.provider.simulated_call import SimulatedCall

SLOTS: Final = 50
WARM_UP: Final = 60.0  # first seconds, which do not count
MINUTES: Final = 10.0

TTFT, TPOT = 0.5, 0.03  # seconds to the first token, and for each output token


def mean_call_seconds() -> float:
    """Return the seconds of the average call on an idle provider."""
    rng, traffic = random.Random(0), Traffic.conversation()
    return TTFT + TPOT * sum(traffic.lengths(rng)[1] for _ in range(20_000)) / 20_000


CALL: Final = mean_call_seconds()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A provider, its callers, and what happens to it.

    Attributes:
        config: the provider.
        offered: the offered load, in times of the largest capacity.
        shape: the offered load over time; 1 is `offered`.
        pacer: makes the rate limiter of a quota that is known.
        duration_error: the expected duration of a call over the true one.
        queued_per_slot: calls that may wait, for each slot.
        best_fixed: the fixed limit that does best here, instead of the oracle, where no capacity can be known.
        demand: calls a second that are offered, instead of `offered`.
        minutes: how long it takes.
        lengths: draws the input and output tokens of a call.
        processes: upstreams that share the key and know nothing of each other.
        timeout: seconds from its arrival after which an answer is worth nothing.
    """

    config: ProviderConfig
    offered: float = 3.0
    shape: Callable[[float], float] = lambda _: 1.0
    pacer: Callable[[ProviderConfig], QuotaPacer] | None = None
    duration_error: float = 1.0
    queued_per_slot: int = 2
    best_fixed: int | None = None
    demand: float | None = None
    minutes: float = MINUTES
    lengths: Callable[[random.Random], tuple[int, int]] = Traffic.conversation().lengths
    processes: int = 1
    timeout: float = 120.0

    @property
    def max_slots(self) -> int:
        """Return the most slots that there ever are."""
        return max(self.config.slots, *(step.slots for step in self.config.capacity_steps), 0)

    def callers(self, name: str) -> Callers:
        """Return the callers; with a semaphore they retry inside it, as SDKs do."""
        callers = Callers(
            rate=lambda now: self.shape(now) * (self.demand or self.offered * self.max_slots / CALL),
            minutes=self.minutes,
            queue_bound=self.queued_per_slot * self.max_slots,
            lengths=self.lengths,
            timeout=self.timeout,
        )
        return retrying_inside(callers) if name == SEMAPHORE else callers

    def run(self, name: str, limit: Limit | None, seed: int) -> RunRecord:
        """Simulate the minutes under `limit`; None for the oracle, or the best fixed limit."""
        return LimitRun(
            self.config,
            self.callers(name),
            limit or (FixedLimit(self.best_fixed) if self.best_fixed else OracleLimit(self._capacity)),
            seed=seed,
            pacer=self.pacer(self.config) if self.pacer is not None else None,
            duration_error=self.duration_error,
        ).run()

    def _capacity(self, now: float) -> int:
        past = [step.slots for step in self.config.capacity_steps if step.at <= now]
        return past[-1] if past else self.config.slots


def provider(**changes: object) -> ProviderConfig:
    """Return a provider that refuses calls beyond its slots; `changes` are fields of ProviderConfig."""
    fields: dict[str, object] = {
        "slots": SLOTS,
        "ttft": TTFT,
        "tpot": TPOT,
        "overcommit": 1.0,
        "refusal_delay": 0.1,
        **changes,
    }
    return ProviderConfig(**fields)  # type: ignore[arg-type]


def steps(*changes: tuple[float, int]) -> tuple[CapacityStep, ...]:
    """Return capacity steps from pairs of second and slots."""
    return tuple(CapacityStep(at=at, slots=slots) for at, slots in changes)


def _wave(now: float) -> float:
    """Return twice the load for half a minute, then a tenth of it for half a minute."""
    return 2.0 if now % 60 < 30 else 0.1


def _neighbours() -> tuple[CapacityStep, ...]:
    """Return capacity steps of other clients, who hold up to two fifths of the slots for twenty seconds each."""
    rng = random.Random(7)
    return steps(*((20.0 * i, SLOTS - rng.randint(0, 2 * SLOTS // 5)) for i in range(1, round(3 * MINUTES))))


def _dips(slots: int, seconds: int, every: int) -> tuple[CapacityStep, ...]:
    """Return capacity steps down to `slots` for the first `seconds` of each period of `every` seconds."""
    starts = range(every, round(60 * MINUTES), every)
    return steps(*((at + after, to) for at in starts for after, to in ((0, slots), (seconds, SLOTS))))


def _tide() -> tuple[CapacityStep, ...]:
    """Return capacity steps along a sine from 15 to 105 slots with a period of a minute."""
    return steps(*((at, round(60 + 45 * math.sin(2 * math.pi * at / 60))) for at in range(round(60 * MINUTES))))


def _two_lengths(rng: random.Random) -> tuple[int, int]:
    """Draw the tokens of a call that is short, or in one case of ten ten times as long."""
    return (1000, 1000) if rng.random() < 0.1 else (100, 100)


def _long_answers(rng: random.Random) -> tuple[int, int]:
    """Draw the tokens of a call that takes from one minute to three."""
    return 1000, rng.randint(2000, 6000)


def _calls_of_two_minutes(config: ProviderConfig) -> Scenario:
    """Return a scenario of calls of two minutes, three times as many as the provider can serve."""
    demand = 3 * config.slots / 120.0
    return Scenario(config=config, demand=demand, lengths=_long_answers, timeout=600.0, minutes=2 * MINUTES)


class EvenPacer:
    """The simplest rate limiter of a known quota: one request every `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def interval(self, now: float) -> float:  # noqa: ARG002 - a subclass may need it
        """Return the seconds between two requests at `now`."""
        return self._seconds

    def wait(self, now: float, _: SimulatedCall) -> float:
        """Return the seconds until the next request may go; 0 takes it."""
        if now < self._next:
            return self._next - now
        seconds = self.interval(now)
        self._next = max(self._next, now - seconds) + seconds
        return 0.0


SCENARIOS: Final[Mapping[str, Scenario]] = {  # docs/limits.md has the same names
    "steady": Scenario(config=provider()),
    "burst": Scenario(config=provider(), shape=_wave),
    "halved and back": Scenario(config=provider(capacity_steps=steps((200, SLOTS // 2), (320, SLOTS)))),
    "quartered and back": Scenario(config=provider(capacity_steps=steps((200, SLOTS // 4), (320, SLOTS)))),
    "four times the capacity": Scenario(config=provider(capacity_steps=steps((200, 4 * SLOTS)))),
    "silent slowdown": Scenario(
        config=provider(overcommit=None, capacity_steps=steps((200, SLOTS // 2), (400, SLOTS)))
    ),
    "quota-bound": Scenario(
        config=provider(rate_limits=(SimulatedRateLimit(unit=Unit.REQUESTS, amount=200),)),
        pacer=lambda _: EvenPacer(60 / 200),
    ),
    "concurrency-bound": Scenario(config=provider(slots=8, busy_reason=BusyReason.CONCURRENCY)),
    "acceleration limit": Scenario(
        config=provider(acceleration=AccelerationLimit(unit=Unit.REQUESTS, start=100, growth=60))
    ),
    "1 % background refusals": Scenario(config=provider(faults=Faults(stray=0.01))),
    "3 % background refusals": Scenario(config=provider(faults=Faults(stray=0.03))),
    "outage of a minute": Scenario(config=provider(capacity_steps=steps((200, 0), (260, SLOTS)))),
    "outage of five minutes": Scenario(config=provider(capacity_steps=steps((150, 0), (450, SLOTS)))),
    "slow whatever our load": Scenario(config=provider(slowdowns=(Slowdown(at=200, seconds=200, factor=2.0),))),
    "noisy neighbours": Scenario(config=provider(capacity_steps=_neighbours())),
    "bursts of 529": Scenario(config=provider(faults=Faults(bursts=Bursts(every=60, seconds=3)))),
    "half throttled, 5 s a minute": Scenario(
        config=provider(faults=Faults(bursts=Bursts(every=60, seconds=5, share=0.5, regular=True)))
    ),
    "400 slots, 3 % background refusals": Scenario(config=provider(slots=400, faults=Faults(stray=0.03)), offered=1.5),
    "baseline 50 % too long": Scenario(
        config=provider(overcommit=None, capacity_steps=steps((200, SLOTS // 2), (400, SLOTS))), duration_error=1.5
    ),
    "baseline 25 % too short": Scenario(
        config=provider(capacity_steps=steps((200, 0), (260, SLOTS))), duration_error=0.75
    ),
    "half the load": Scenario(config=provider(), offered=0.5),
    # --- where refusals or slow calls say little ---
    "refuses after 30 s": Scenario(config=provider(refusal_delay=30.0)),
    "40,000 tokens in flight": Scenario(
        config=provider(slots=80, tokens_in_flight=40_000), queued_per_slot=1, lengths=_two_lengths, best_fixed=36
    ),
    "10 replicas of 5": Scenario(config=provider(replicas=10), best_fixed=40),
    "50 replicas of 1": Scenario(config=provider(replicas=50), best_fixed=40),
    "1 slot for 3 s of each 20": Scenario(config=provider(capacity_steps=_dips(1, 3, 20))),
    "1 slot for new calls, 3 s of each 20": Scenario(config=provider(capacity_steps=_dips(1, 3, 20), stalls=False)),
    "15 to 105 slots, a sine of a minute": Scenario(config=provider(capacity_steps=_tide())),
    "1 slot": Scenario(config=provider(slots=1)),
    "2 slots": Scenario(config=provider(slots=2)),
    "3 slots": Scenario(config=provider(slots=3)),
    "1 slot, shared": Scenario(config=provider(slots=1, overcommit=None)),
    "2 slots, shared": Scenario(config=provider(slots=2, overcommit=None)),
    "calls of two minutes, 100 slots": _calls_of_two_minutes(provider(slots=100)),
    "calls of two minutes, 10 slots, shared": _calls_of_two_minutes(provider(slots=10, overcommit=None)),
    "calls of two minutes, 100 slots, shared": _calls_of_two_minutes(provider(slots=100, overcommit=None)),
    "latency noise of 0.8": Scenario(config=provider(noise=0.8)),
    "no limit, latency noise of 0.6": Scenario(
        config=provider(slots=10_000, noise=0.6), demand=100 / CALL, queued_per_slot=1, minutes=60.0
    ),
    "no limit, latency noise of 0.8": Scenario(
        config=provider(slots=10_000, noise=0.8), demand=100 / CALL, queued_per_slot=1, minutes=60.0
    ),
}
