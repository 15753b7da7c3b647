"""What happens to a provider in ten minutes, and what an oracle would do."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from bench.calls.limits import SEMAPHORE, Oracle
from bench.calls.simulated_key import Callers, LimitRun, QuotaPacer, RunRecord
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
WARM_UP: Final = 60.0  # seconds that do not count
MINUTES: Final = 10.0

TTFT, TPOT = 0.5, 0.03


def mean_call() -> float:
    """Seconds of the average call on an idle provider."""
    rng, traffic = random.Random(0), Traffic.conversation()
    return TTFT + TPOT * sum(traffic.lengths(rng)[1] for _ in range(20_000)) / 20_000


CALL: Final = mean_call()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A provider, those who call it, and what happens.

    Attributes:
        config: the provider.
        offered: times the most that it ever serves.
        shape: of the offered load over time; 1 is `offered`.
        pace: makes the quota that is paced ahead, if there is one.
        baseline: how far off the expected time of a call is.
        line: calls that may wait, for each slot.
    """

    config: ProviderConfig
    offered: float = 3.0
    shape: Callable[[float], float] = lambda _: 1.0
    pace: Callable[[ProviderConfig], QuotaPacer] | None = None
    baseline: float = 1.0
    line: int = 2

    @property
    def most(self) -> int:
        """The most slots that there ever are."""
        return max(self.config.slots, *(step.slots for step in self.config.capacity_steps), 0)

    def callers(self, name: str) -> Callers:
        """Those who call; around a semaphore they retry inside it, as SDKs do."""
        callers = Callers(
            rate=lambda now: self.offered * self.shape(now) * self.most / CALL,
            minutes=MINUTES,
            queue_bound=self.line * self.most,
        )
        return replace(callers, holds_slot_while_retrying=True, max_attempts=6) if name == SEMAPHORE else callers

    def run(self, name: str, limit: Limit | None, seed: int) -> RunRecord:
        """Ten minutes under `limit`; None for the oracle."""
        return LimitRun(
            self.config,
            self.callers(name),
            limit if limit is not None else Oracle(self._capacity),
            seed=seed,
            pace=self.pace(self.config) if self.pace is not None else None,
            baseline=self.baseline,
        ).run()

    def _capacity(self, now: float) -> int:
        past = [step.slots for step in self.config.capacity_steps if step.at <= now]
        return past[-1] if past else self.config.slots


def provider(**changes: object) -> ProviderConfig:
    """A provider that refuses what exceeds its slots; `changes` are fields of ProviderConfig."""
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
    """So many slots from such a second."""
    return tuple(CapacityStep(at=at, slots=slots) for at, slots in changes)


def _wave(now: float) -> float:
    """Half a minute of twice the load, half a minute of a tenth of it."""
    return 2.0 if now % 60 < 30 else 0.1


def _neighbours() -> tuple[CapacityStep, ...]:
    """Others hold up to two fifths of the slots, and change their mind every twenty seconds."""
    rng = random.Random(7)
    return steps(*((20.0 * i, SLOTS - rng.randint(0, 2 * SLOTS // 5)) for i in range(1, round(3 * MINUTES))))


class EvenPacer:
    """One request each `seconds`: as a quota that is known is paced, at the least."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def wait(self, now: float, _: SimulatedCall) -> float:
        """Seconds until the next."""
        if now < self._next:
            return self._next - now
        self._next = max(self._next, now - self._seconds) + self._seconds
        return 0.0


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "steady": Scenario(config=provider()),
    "burst": Scenario(config=provider(), shape=_wave),
    "halved and back": Scenario(config=provider(capacity_steps=steps((200, SLOTS // 2), (320, SLOTS)))),
    "quartered and back": Scenario(config=provider(capacity_steps=steps((200, SLOTS // 4), (320, SLOTS)))),
    "four times the capacity": Scenario(config=provider(capacity_steps=steps((200, 4 * SLOTS)))),
    "silent slow-down": Scenario(
        config=provider(overcommit=None, capacity_steps=steps((200, SLOTS // 2), (400, SLOTS)))
    ),
    "quota-bound": Scenario(
        config=provider(rate_limits=(SimulatedRateLimit(unit=Unit.REQUESTS, amount=200),)),
        pace=lambda _: EvenPacer(60 / 200),
    ),
    "concurrency-bound": Scenario(config=provider(slots=8, busy_reason=BusyReason.CONCURRENCY)),
    "acceleration limit": Scenario(
        config=provider(acceleration=AccelerationLimit(unit=Unit.REQUESTS, start=100, growth=60))
    ),
    "1 % stray": Scenario(config=provider(faults=Faults(stray=0.01))),
    "3 % stray": Scenario(config=provider(faults=Faults(stray=0.03))),
    "outage of a minute": Scenario(config=provider(capacity_steps=steps((200, 0), (260, SLOTS)))),
    "outage of five minutes": Scenario(config=provider(capacity_steps=steps((150, 0), (450, SLOTS)))),
    "slow, not through us": Scenario(config=provider(slowdowns=(Slowdown(at=200, seconds=200, factor=2.0),))),
    "noisy neighbours": Scenario(config=provider(capacity_steps=_neighbours())),
    "bursts of 529": Scenario(config=provider(faults=Faults(bursts=Bursts(every=60, seconds=3)))),
    "half refused, 5 s a minute": Scenario(
        config=provider(faults=Faults(bursts=Bursts(every=60, seconds=5, share=0.5, regular=True)))
    ),
    "400 slots, 3 % stray": Scenario(config=provider(slots=400, faults=Faults(stray=0.03)), offered=1.5),
    "baseline 50 % too long": Scenario(
        config=provider(overcommit=None, capacity_steps=steps((200, SLOTS // 2), (400, SLOTS))), baseline=1.5
    ),
    "baseline 25 % too short": Scenario(config=provider(capacity_steps=steps((200, 0), (260, SLOTS))), baseline=0.75),
    "half the load": Scenario(config=provider(), offered=0.5),
}
