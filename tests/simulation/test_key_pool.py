"""A pool of two API keys: both are used to their limits, one that dies is left alone, and is used again."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from forebay import Fallback, Overloaded, Quota, Upstream, clock
from forebay.interfaces import Outcome
from forebay.simulation import simulate
from forebay.upstream.call_request import AttemptResult, CallOutcome, CallRequest, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

LIMITS = {"small": 100, "large": 300}  # requests per minute
MINUTE = 60.0
CALL_SECONDS = 2.0


class KeyDead(Exception):
    """The provider answers no call with this key."""


class Throttled(Exception):
    """The provider has refused a call for its rate."""


@dataclass
class KeyPool:
    """Callers that send calls at random times through two keys of one model, and a provider that enforces its rates."""

    seed: int
    rate: float  # calls a minute
    minutes: float
    dead: tuple[float, float] = (0.0, 0.0)  # minutes in which the small key is dead
    served: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LIMITS})  # times, by key
    failures: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)  # for a rate
    waits: list[float] = field(default_factory=list)

    def run(self) -> KeyPool:
        simulate(self._main, seed=self.seed)
        return self

    async def _main(self) -> None:
        self._began = clock.now()
        self._level = {name: (float(limit), self._began) for name, limit in LIMITS.items()}
        large = Upstream("large", quotas=[Quota(requests=LIMITS["large"], per="minute")])
        small = Upstream(
            "small",
            quotas=[Quota(requests=LIMITS["small"], per="minute")],
            fallback=Fallback(large, weight=1.0),
        )
        rng = random.Random(self.seed)
        async with asyncio.TaskGroup() as group:
            while clock.now() - self._began < MINUTE * self.minutes:
                group.create_task(self._call(small))
                await asyncio.sleep(2.0 * rng.random() * MINUTE / self.rate)

    async def _call(self, upstream: Upstream) -> None:
        asked = clock.now()

        async def attempt(route: PlainRoute, permit: Permit) -> AttemptResult:
            try:
                await self._answer(route.core.name)
            except KeyDead as error:
                outcome = CallOutcome(kind=Outcome.FAULT, latency=clock.now() - permit.granted_at)
                return AttemptResult(outcome=outcome, error=error, retryable=True, can_fall_back=True)
            except Throttled as error:
                self.refusals[route.core.name] += 1
                outcome = CallOutcome(kind=Outcome.OVERLOAD, rate_limited=True, usd=0.0)
                return AttemptResult(
                    outcome=outcome, error=error, retryable=True, uses_attempt=False, can_fall_back=True
                )
            self.waits.append(permit.granted_at - asked)
            self.served[route.core.name].append(clock.now() - self._began)
            return AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS, latency=clock.now() - permit.granted_at))

        def request_at(_: UpstreamCore, model: str) -> CallRequest:
            return CallRequest(model=model)

        account = upstream.core.accounts.account("m")
        try:
            await upstream.runner.run(PlainRoute(upstream, account, CallRequest(model="m"), request_at), attempt)
        except (Overloaded, KeyDead, Throttled) as error:
            self.failures.append(f"{type(error).__name__}: {error}")

    async def _answer(self, name: str) -> None:
        now = clock.now()
        if name == "small" and self.dead[0] <= (now - self._began) / MINUTE < self.dead[1]:
            await asyncio.sleep(0.1)
            raise KeyDead
        level, at = self._level[name]
        level = min(LIMITS[name], level + (now - at) * LIMITS[name] / MINUTE)
        if level < 1.0:
            self._level[name] = level, now
            raise Throttled
        self._level[name] = level - 1.0, now
        await asyncio.sleep(CALL_SECONDS)

    def a_minute(self, name: str, since: float, until: float) -> float:
        """Return the calls a minute that a key has served between two times, in minutes."""
        return sum(since * MINUTE <= at < until * MINUTE for at in self.served[name]) / (until - since)


def use(pool: KeyPool, since: float = 1.0) -> dict[str, float]:
    """Return the share of its limit that each key has served."""
    return {name: pool.a_minute(name, since, pool.minutes) / limit for name, limit in LIMITS.items()}


@pytest.mark.parametrize("seed", range(3))
def test_calls_just_below_both_limits_wait_for_nothing(seed: int) -> None:
    pool = KeyPool(seed, rate=390.0, minutes=15.0).run()
    assert pool.failures == []
    assert not pool.refusals
    assert max(pool.waits) == 0.0
    used = use(pool)
    assert (100 * used["small"] + 300 * used["large"]) / 400 >= 0.97 * len(pool.waits) / (15.0 * 390.0)
    assert min(used.values()) >= 0.955  # of 0.975 that are asked for, on average
    assert abs(used["small"] - used["large"]) <= 0.02


@pytest.mark.parametrize("seed", range(3))
def test_two_keys_are_both_used_to_their_limits(seed: int) -> None:
    pool = KeyPool(seed, rate=405.0, minutes=15.0).run()
    assert pool.failures == []
    assert not pool.refusals
    assert min(use(pool).values()) >= 0.97


@pytest.mark.parametrize("seed", range(3))
def test_a_key_that_dies_leaves_all_calls_to_the_other_until_it_recovers(seed: int) -> None:
    pool = KeyPool(seed, rate=250.0, minutes=20.0, dead=(5.0, 10.0)).run()
    assert pool.failures == []
    assert not pool.refusals
    assert pool.a_minute("small", 5.1, 10.0) == 0.0
    assert pool.a_minute("large", 6.0, 10.0) == pytest.approx(250.0, rel=0.08)
    assert pool.a_minute("small", 11.5, 20.0) > 0.8 * pool.a_minute("small", 1.0, 5.0)
    assert sorted(pool.waits)[len(pool.waits) * 99 // 100] < 1.0
