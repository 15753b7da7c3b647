"""Rates as a provider enforces them: buckets that refill, fixed windows, and a limit on growth.

Pure: every method takes `now`, which never goes backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forebay.simulation.provider.provider_config import AccelerationLimit, SimulatedRateLimit, Unit

_EPSILON = 1e-9  # relative: a caller that waits exactly as long as it was told must get in
_MINUTE = 60.0


class RateMeter:
    """How much of one allowance is left: a bucket that refills all the time, from `now` on."""

    def __init__(self, allowance: SimulatedRateLimit, now: float) -> None:
        self.rate_limit = allowance
        self._size = allowance.size
        self._rate = allowance.amount / allowance.period
        self._level = self._size
        self._at = now

    def level(self, now: float) -> float:
        """What can be had now; below zero is a debt."""
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level

    def wait_time(self, now: float, amount: float) -> float:
        """Seconds until `amount` can be taken: 0 is now, infinity never."""
        if amount > self._size * (1 + _EPSILON):
            return math.inf
        missing = amount - self.level(now)
        return missing / self._rate if missing > _EPSILON * self._size else 0.0

    def take(self, now: float, amount: float) -> None:
        """Take `amount`, into debt if it must be."""
        self._level = self.level(now) - amount

    def full_in(self, now: float) -> float:
        """Seconds until everything is there again."""
        return (self._size - self.level(now)) / self._rate


class FixedWindowMeter(RateMeter):
    """The same, in fixed windows: everything returns at once when a period ends."""

    def level(self, now: float) -> float:
        """What is left of the present window."""
        period = self.rate_limit.period
        if now // period > self._at // period:
            self._level = self._size
        self._at = now
        return self._level

    def wait_time(self, now: float, amount: float) -> float:
        """Seconds until `amount` can be taken: 0 is now, else the next window, infinity never."""
        if amount > self._size:
            return math.inf
        return 0.0 if amount <= self.level(now) else self._window_ends_in(now)

    def full_in(self, now: float) -> float:
        """Seconds until the next window, 0 if nothing was taken in this one."""
        return 0.0 if self.level(now) == self._size else self._window_ends_in(now)

    def _window_ends_in(self, now: float) -> float:
        period = self.rate_limit.period
        left = (now // period + 1) * period - now
        return left if (now + left) // period > now // period else left + period * _EPSILON


@dataclass(frozen=True, slots=True)
class MeterReading:
    """One allowance as its headers tell it."""

    unit: Unit
    limit: float
    remaining: float
    full_in: float  # seconds


@dataclass(frozen=True, slots=True)
class RateShortage:
    """Why a call was not granted, and when it would be."""

    unit: Unit
    limit: float
    remaining: float
    requested: float
    wait: float  # seconds; infinity: the call is larger than the bucket
    per: float = _MINUTE  # seconds in which the limit is granted


class AccountMeters:
    """All allowances of one account: a call takes from each of them or from none."""

    def __init__(self, allowances: Iterable[SimulatedRateLimit], now: float) -> None:
        self._meters = [(FixedWindowMeter if a.fixed_window else RateMeter)(a, now) for a in allowances]
        self.units = frozenset(meter.rate_limit.unit for meter in self._meters)

    def shortage(self, now: float, amounts: Mapping[Unit, float]) -> RateShortage | None:
        """The allowance that makes a call of these amounts wait longest; None if it may go now."""
        worst: RateShortage | None = None
        for meter in self._meters:
            unit = meter.rate_limit.unit
            requested = amounts.get(unit, 0.0)
            wait = meter.wait_time(now, requested)
            if wait > 0 and (worst is None or wait > worst.wait):
                allowance = meter.rate_limit
                worst = RateShortage(unit, allowance.amount, meter.level(now), requested, wait, allowance.period)
        return worst

    def take(self, now: float, unit: Unit, amount: float) -> None:
        """Take `amount` from every allowance of `unit`, into debt if it must be."""
        for meter in self._meters:
            if meter.rate_limit.unit is unit:
                meter.take(now, amount)

    def take_at_most(self, now: float, unit: Unit, amount: float) -> None:
        """Take `amount` from every allowance of `unit`, but no more than is there."""
        for meter in self._meters:
            if meter.rate_limit.unit is unit:
                meter.take(now, max(0.0, min(amount, meter.level(now))))

    def readings(self, now: float) -> list[MeterReading]:
        """One reading a unit, of its tightest allowance."""
        tightest: dict[Unit, tuple[float, MeterReading]] = {}
        for meter in self._meters:
            allowance = meter.rate_limit
            left = meter.level(now)
            share = left / allowance.size
            if allowance.unit not in tightest or share < tightest[allowance.unit][0]:
                reading = MeterReading(allowance.unit, allowance.amount, max(0.0, left), meter.full_in(now))
                tightest[allowance.unit] = (share, reading)
        return [reading for _, reading in tightest.values()]


class AccelerationMeter:
    """How much an account may use this minute, given what it used in the one before."""

    def __init__(self, acceleration: AccelerationLimit) -> None:
        self.acceleration = acceleration
        self._minute = 0
        self._used = 0.0
        self._allowed = acceleration.start

    def shortage(self, now: float, amounts: Mapping[Unit, float]) -> RateShortage | None:
        """Why a call of these amounts would grow use too fast; None if it would not."""
        self._roll_minute(now)
        requested = amounts.get(self.acceleration.unit, 0.0)
        left = self._allowed - self._used
        if requested <= left:
            return None
        wait = (self._minute + 1) * _MINUTE - now
        return RateShortage(self.acceleration.unit, self._allowed, left, requested, max(wait, _EPSILON))

    def take(self, now: float, amounts: Mapping[Unit, float]) -> None:
        """Count what was granted."""
        self._roll_minute(now)
        self._used += amounts.get(self.acceleration.unit, 0.0)

    def next_minute_limit(self) -> float:
        """What the next minute would allow if nothing more were used in this one."""
        return max(self.acceleration.start, self._used + self.acceleration.growth)

    def _roll_minute(self, now: float) -> None:
        minute = int(now // _MINUTE)
        if minute == self._minute + 1:
            self._allowed = self.next_minute_limit()
            self._used = 0.0
        elif minute > self._minute:
            self._allowed = self.acceleration.start
            self._used = 0.0
        self._minute = minute
