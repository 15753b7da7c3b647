"""Scenarios: ten minutes of a provider, and the callers that it meets."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from bench.baselines.oracle_limit import OracleLimit
from bench.baselines.semaphore import SEMAPHORE, retrying_inside
from bench.calls.limit_run import Callers, LimitRun, QuotaPacer, RunRecord
from forebay.limit import Limit
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
        processes: upstreams that share the key and know nothing of each other.
    """

    config: ProviderConfig
    offered: float = 3.0
    shape: Callable[[float], float] = lambda _: 1.0
    pacer: Callable[[ProviderConfig], QuotaPacer] | None = None
    duration_error: float = 1.0
    queued_per_slot: int = 2
    processes: int = 1

    @property
    def max_slots(self) -> int:
        """Return the most slots that there ever are."""
        return max(self.config.slots, *(step.slots for step in self.config.capacity_steps), 0)

    def callers(self, name: str) -> Callers:
        """Return the callers; with a semaphore they retry inside it, as SDKs do."""
        callers = Callers(
            rate=lambda now: self.offered * self.shape(now) * self.max_slots / CALL,
            minutes=MINUTES,
            queue_bound=self.queued_per_slot * self.max_slots,
        )
        return retrying_inside(callers) if name == SEMAPHORE else callers

    def run(self, name: str, limit: Limit | None, seed: int) -> RunRecord:
        """Simulate ten minutes under `limit`; None for the oracle."""
        return LimitRun(
            self.config,
            self.callers(name),
            limit if limit is not None else OracleLimit(self._capacity),
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
}
