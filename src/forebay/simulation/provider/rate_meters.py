"""Rate limits as a provider enforces them: token buckets, fixed windows, and a limit on growth.

Pure: every method takes `now`, which never goes backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forebay.simulation.provider.provider_config import AccelerationLimit, SimulatedRateLimit, Unit

_EPSILON = 1e-9  # relative: a caller that waits exactly the wait_time must be accepted
_MINUTE = 60.0


class RateMeter:
    """The remaining amount of one rate limit: a token bucket that refills continuously."""

    def __init__(self, rate_limit: SimulatedRateLimit, now: float) -> None:
        self.rate_limit = rate_limit
        self._size = rate_limit.size
        self._rate = rate_limit.amount / rate_limit.period
        self._level = self._size
        self._at = now

    def holds(self, now: float) -> bool:
        """Return whether the limit holds at `now`."""
        until = self.rate_limit.until
        return self.rate_limit.since <= now and (until is None or now < until)

    def level(self, now: float) -> float:
        """Return the amount available at `now`; a negative one is a debt."""
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level

    def wait_time(self, now: float, amount: float) -> float:
        """Return the seconds until `amount` can be taken: 0 for now, infinity for never."""
        if amount > self._size * (1 + _EPSILON):
            return math.inf
        missing = amount - self.level(now)
        return missing / self._rate if missing > _EPSILON * self._size else 0.0

    def take(self, now: float, amount: float) -> None:
        """Take `amount`, into debt if necessary."""
        self._level = self.level(now) - amount

    def full_in(self, now: float) -> float:
        """Return the seconds until the bucket is full."""
        return (self._size - self.level(now)) / self._rate


class FixedWindowMeter(RateMeter):
    """The remaining amount of one rate limit in fixed windows: all of it returns when a window ends."""

    def level(self, now: float) -> float:
        """Return the amount left in the current window."""
        period = self.rate_limit.period
        if now // period > self._at // period:
            self._level = self._size
        self._at = now
        return self._level

    def wait_time(self, now: float, amount: float) -> float:
        """Return the seconds until `amount` can be taken: 0, or until the next window, or infinity for never."""
        if amount > self._size:
            return math.inf
        return 0.0 if amount <= self.level(now) else self._window_ends_in(now)

    def full_in(self, now: float) -> float:
        """Return the seconds until the next window; 0 if nothing was taken in this one."""
        return 0.0 if self.level(now) == self._size else self._window_ends_in(now)

    def _window_ends_in(self, now: float) -> float:
        period = self.rate_limit.period
        left = (now // period + 1) * period - now
        return left if (now + left) // period > now // period else left + period * _EPSILON


@dataclass(frozen=True, slots=True)
class MeterReading:
    """The state of one rate limit, as the headers report it."""

    unit: Unit
    limit: float
    remaining: float
    full_in: float  # seconds


@dataclass(frozen=True, slots=True)
class RateShortage:
    """The rate limit that refuses a call, and the time until it would accept it."""

    unit: Unit
    limit: float
    remaining: float
    requested: float
    wait: float  # seconds; infinity: the call is larger than the bucket
    period: float = _MINUTE  # seconds in which the limit is granted


class AccountMeters:
    """All rate limits of one account: a call takes from each of them or from none."""

    def __init__(self, rate_limits: Iterable[SimulatedRateLimit], now: float) -> None:
        self._meters = [(FixedWindowMeter if limit.fixed_window else RateMeter)(limit, now) for limit in rate_limits]
        self.units = frozenset(meter.rate_limit.unit for meter in self._meters)

    def shortage(self, now: float, amounts: Mapping[Unit, float]) -> RateShortage | None:
        """Return the rate limit with the longest wait for a call of these amounts; None if it can go now."""
        longest: RateShortage | None = None
        for meter in self._meters:
            if not meter.holds(now):
                continue
            limit = meter.rate_limit
            requested = amounts.get(limit.unit, 0.0)
            wait = meter.wait_time(now, requested)
            if wait > 0 and (longest is None or wait > longest.wait):
                longest = RateShortage(limit.unit, limit.amount, meter.level(now), requested, wait, limit.period)
        return longest

    def take(self, now: float, unit: Unit, amount: float) -> None:
        """Take `amount` from every rate limit of `unit`, into debt if necessary."""
        for meter in self._meters:
            if meter.rate_limit.unit is unit and meter.holds(now):
                meter.take(now, amount)

    def take_at_most(self, now: float, unit: Unit, amount: float) -> None:
        """Take `amount` from every rate limit of `unit`, but not more than is available."""
        for meter in self._meters:
            if meter.rate_limit.unit is unit and meter.holds(now):
                meter.take(now, max(0.0, min(amount, meter.level(now))))

    def readings(self, now: float) -> list[MeterReading]:
        """Return one reading for each unit: that of its tightest rate limit."""
        tightest: dict[Unit, tuple[float, MeterReading]] = {}
        for meter in self._meters:
            if not meter.holds(now):
                continue
            limit = meter.rate_limit
            left = meter.level(now)
            share = left / limit.size
            if limit.unit not in tightest or share < tightest[limit.unit][0]:
                reading = MeterReading(limit.unit, limit.amount, max(0.0, left), meter.full_in(now))
                tightest[limit.unit] = (share, reading)
        return [reading for _, reading in tightest.values()]


class AccelerationMeter:
    """The remaining amount of an acceleration limit in the current minute."""

    def __init__(self, acceleration: AccelerationLimit) -> None:
        self.acceleration = acceleration
        self._minute = 0
        self._used = 0.0
        self._limit = acceleration.start

    def shortage(self, now: float, amounts: Mapping[Unit, float]) -> RateShortage | None:
        """Return why a call of these amounts would grow usage too fast; None if it would not."""
        self._roll_minute(now)
        requested = amounts.get(self.acceleration.unit, 0.0)
        left = self._limit - self._used
        if requested <= left:
            return None
        wait = (self._minute + 1) * _MINUTE - now
        return RateShortage(self.acceleration.unit, self._limit, left, requested, max(wait, _EPSILON))

    def take(self, now: float, amounts: Mapping[Unit, float]) -> None:
        """Count the amounts of an accepted call."""
        self._roll_minute(now)
        self._used += amounts.get(self.acceleration.unit, 0.0)

    def next_minute_limit(self) -> float:
        """Return the limit of the next minute if nothing more were used in this one."""
        return max(self.acceleration.start, self._used + self.acceleration.growth)

    def _roll_minute(self, now: float) -> None:
        minute = int(now // _MINUTE)
        if minute == self._minute + 1:
            self._limit = self.next_minute_limit()
            self._used = 0.0
        elif minute > self._minute:
            self._limit = self.acceleration.start
            self._used = 0.0
        self._minute = minute
