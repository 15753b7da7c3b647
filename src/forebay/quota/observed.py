"""A provider's quota as its headers tell it: what they say is followed where what we know does not explain it.

A header speaks of a moment between the sending of its call and its arrival here. Calls sent in between may have been
counted or not, output under way in part: that is a range in which every number is explained, and corrects nothing.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from forebay.interfaces import RateLimitHeaders
from forebay.quota.bucket import Bucket
from forebay.quota.quota import PERIODS

_TOLERANCE: Final = 0.02  # of a period: what rounding and the network do to a reset
_CUSHION: Final = 0.01  # of a bucket that is never drained: estimates err, calls overtake. It costs no throughput
_ROUNDED: Final = 1.0  # units less than this: a bucket's fraction, which headers leave out
_LATE: Final = 0.2  # seconds of a window that are let pass: clocks differ, and who comes early is refused
_SOON: Final = 1.0  # seconds until a window ends whose end has passed by our clock, but not by the provider's
_LEAST_SPENT: Final = 5  # units; with fewer spent, rounding hides how fast they come back
_FORGET_AFTER: Final = 2.0  # periods without a word
_LEAST_MEMORY: Final = 60.0  # seconds


class QuotaSnapshot(NamedTuple):
    """How a heard quota stood when a call was sent, the call itself taken off."""

    level: float
    corrected: float
    window_number: int
    reserved: (
        float  # what calls under way had reserved, this one too: of it the provider may have counted less, or more
    )


class _Sighting(NamedTuple):
    """What a header said of when it will be full, for comparison with the next."""

    sent: float
    full_at: tuple[float, float]  # it will be full between these, in seconds of our clock
    holds: tuple[float, float]  # if it refills all the time, what it holds when full


class ObservedLimit:
    """One quota of a provider, learned from its headers.

    Args:
        limit: what it grants in a period.
        per: seconds of its period, until the headers tell of another.
        now: the present.
        level: what is left by now.
    """

    __slots__ = ("_anchor", "_candidate", "_limit_seen", "bucket", "corrected", "latest_sent", "updated_at")

    def __init__(self, limit: int, per: float, now: float, level: float) -> None:
        self.bucket = Bucket(float(limit), per, now)
        self.bucket.level = max(-float(limit), min(level, float(limit)))
        self.bucket.margin_share = _CUSHION
        self.bucket.window_delay = _LATE
        self.corrected = 0.0  # all that headers and refusals have added, so that older marks can be compared
        self.updated_at = now
        self.latest_sent = -math.inf  # when the latest call was sent whose headers have come
        self._limit_seen = limit  # a limit that differs must be said twice: one slip must not lock an account
        self._candidate: tuple[float, _Sighting] | None = None  # a period that differs, likewise, and who said so first
        self._anchor: _Sighting | None = None

    def is_stale(self, now: float) -> bool:
        """Whether nothing was heard for so long that it need not be true any more."""
        return abs(now - self.updated_at) > max(_LEAST_MEMORY, _FORGET_AFTER * self.bucket.period)

    def shift_clock(self, by: float) -> None:
        """The clock has gone back: keep the distances."""
        self.updated_at += by
        self.latest_sent += by
        self._anchor = None

    def snapshot(self, under_way: float) -> QuotaSnapshot:
        """How it stands; to be kept with a call that is sent now, and has been taken off."""
        return QuotaSnapshot(self.bucket.level, self.corrected, self.bucket.window_number, under_way)

    def update_from_headers(
        self,
        now: float,
        headers: RateLimitHeaders,
        *,
        sent: float,
        snapshot: QuotaSnapshot | None,
        returned: float = 0.0,
    ) -> None:
        """Take what the answer to a call said.

        Args:
            now: when its headers came.
            notice: what they said, within reason.
            sent: when the call was sent.
            mark: from then; None if this quota was not known yet.
            refused: what was taken for this call and has come back, if it was refused and so not counted.
        """
        bucket = self.bucket
        bucket.refill(now)
        self.updated_at = now
        self.latest_sent = max(self.latest_sent, sent)
        if headers.limit is not None:
            self._hear_limit(headers.limit)
        if headers.remaining is None or (snapshot is not None and snapshot.window_number != bucket.window_number):
            return  # of a window that has passed
        remaining = min(float(headers.remaining), bucket.amount)
        if bucket.window_end is not None and not headers.reset and remaining < bucket.amount:
            if returned:
                bucket.window_end = min(bucket.window_end, now + _SOON)
            return  # of a window that should have passed
        since = (
            0.0 if snapshot is None else snapshot.level + self.corrected - snapshot.corrected + returned - bucket.level
        )
        if headers.reset and remaining < bucket.amount:
            self._hear_reset(now, sent, remaining, headers.reset)
        if snapshot is None:
            return
        if (
            snapshot.window_number != bucket.window_number
        ):  # the reset has told that another window began before this call
            bucket.level = remaining - max(0.0, since)
        else:
            self._correct(now - sent, remaining, bucket.level + since, snapshot.reserved)

    def lower(self, by: float) -> None:
        """Take off what the provider has counted and we have not."""
        before = self.bucket.level
        self.bucket.level = max(before - by, -self.bucket.amount)
        self.corrected += self.bucket.level - before

    def _correct(self, late: float, remaining: float, then: float, under_way: float) -> None:
        """Follow what is left as far as nothing that we know explains it.

        Args:
            late: seconds since the call was sent; the header may be from any moment in between.
            remaining: what it said.
            then: what we thought was left when the call was sent.
            under_way: what open calls had reserved at that time, and the provider need not have counted.
        """
        bucket = self.bucket
        refills = bucket.window_end is None
        refilled = late * bucket.rate if refills else 0.0
        lowest = min(then, bucket.level) - (_ROUNDED if refills else 0.0)
        highest = max(then + refilled, bucket.level) + under_way
        if remaining < lowest:
            self.lower(min(then, bucket.level) - remaining)
        elif remaining > highest:
            raised = min(bucket.capacity - bucket.level, remaining - highest)
            bucket.level += raised
            self.corrected += raised

    def _hear_limit(self, limit: int) -> None:
        if limit != self.bucket.amount and limit == self._limit_seen:
            gained = limit - self.bucket.amount
            self.bucket.resize(float(limit), self.bucket.period)
            if gained > 0:  # what it gained is there, as a header will confirm
                self.bucket.level += gained
                self.corrected += gained
        self._limit_seen = limit

    def _hear_reset(self, now: float, sent: float, remaining: float, reset: float) -> None:
        bucket = self.bucket
        if not self._plausible(now, sent, remaining, reset):
            return
        anchor = self._anchor
        if anchor is None or sent - anchor.sent >= 3 * _TOLERANCE * bucket.period:  # else too soon to tell them apart
            seen = self._anchor = self._sighting(now, sent, remaining, reset)
            if anchor is not None:
                self._compare(anchor, seen)
        if bucket.window_end is not None:
            self._follow(sent + reset, now + reset)

    def _sighting(self, now: float, sent: float, remaining: float, reset: float) -> _Sighting:
        rate = self.bucket.rate
        holds = remaining + reset * rate
        return _Sighting(sent, (sent + reset, now + reset), (holds, holds + (now - sent) * rate))

    def _plausible(self, now: float, sent: float, remaining: float, reset: float) -> bool:
        """Whether a reset fits the period; if two in a row fit another one, that is the period from now on."""
        bucket = self.bucket
        fits = reset <= bucket.period * (1 + _TOLERANCE) + 1
        other = _period(bucket.amount, bucket.amount - remaining, reset, now - sent, bucket.period if fits else 0.0)
        if other is None and not fits:
            other = next((per for per in PERIODS.values() if reset <= per), None)
        if other is None or other == bucket.period:
            self._candidate = None
            return fits
        seen = self._sighting(now, sent, remaining, reset)
        if self._candidate is None or self._candidate[0] != other:
            self._candidate = other, seen
        elif not self._explained(self._candidate[1], seen):
            bucket.resize(bucket.amount, other)
            self._candidate = self._anchor = None
            if bucket.window_end is not None:
                bucket.window_end = bucket.updated_at + reset
            return True
        return fits

    def _explained(self, one: _Sighting, other: _Sighting) -> bool:
        """Whether a bucket of this period explains two sightings: one that holds less than it grants in a period."""
        rounding = self.bucket.rate  # of resets to whole seconds
        holds = max(one.holds[0], other.holds[0])
        return holds <= self.bucket.amount + rounding and _gap(one.holds, other.holds) <= rounding

    def _compare(self, anchor: _Sighting, seen: _Sighting) -> None:
        """Bucket or window? The first keeps what it holds when full, the second the moment when it is full."""
        bucket = self.bucket
        tolerance = _TOLERANCE * bucket.period
        moved = _gap(anchor.full_at, seen.full_at, bucket.period) > tolerance
        changed = _gap(anchor.holds, seen.holds) - _ROUNDED > tolerance * bucket.rate
        if changed and not moved:
            if bucket.window_end is None:
                bucket.window_end = seen.full_at[1]
                bucket.capacity = bucket.amount
        elif moved and not changed:
            bucket.window_end = None
            bucket.capacity = min(bucket.amount, max(1.0, seen.holds[1]))
            bucket.level = min(bucket.level, bucket.capacity)

    def _follow(self, earliest: float, latest: float) -> None:
        """Keep the end of the window where the headers say that it can be; late rather than early."""
        bucket = self.bucket
        ends = bucket.window_end or latest
        if not earliest <= ends <= latest:
            if latest - ends > bucket.period / 2:  # the next window has begun already
                bucket.window_number += 1
            bucket.window_end = latest


def _gap(one: tuple[float, float], other: tuple[float, float], period: float = math.inf) -> float:
    """How far apart two ranges are, at least; around a circle of `period` if that is given."""
    middle = (other[0] + other[1]) / 2 - (one[0] + one[1]) / 2
    apart = abs(middle) if period == math.inf else abs(math.remainder(middle, period))
    return max(0.0, apart - (one[1] - one[0] + other[1] - other[0]) / 2)


def _period(limit: float, spent: float, reset: float, late: float, present: float) -> float | None:
    """The only period in which `spent` of `limit` comes back in `reset` seconds, as written; None: cannot tell.

    Where the present one explains it nothing need be told: another one would have to be the only one.
    """
    if spent < _LEAST_SPENT:
        return None
    slowest = (reset + late) * limit / spent
    fastest = (reset - 1.0) * limit / (spent + 1)  # resets may be written in whole seconds, and what is left rounded
    if fastest <= present <= slowest:
        return None
    fitting = [per for per in PERIODS.values() if fastest <= per <= slowest]
    return fitting[0] if len(fitting) == 1 else None
