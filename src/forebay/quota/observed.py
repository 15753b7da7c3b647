"""Rate limits observed from a provider's headers.

The headers correct our own count only where it does not explain them. A header describes a moment between the sending
of its call and its arrival here. Calls sent in between may have been counted or not, and output under way in part. That
leaves a range of numbers that our count explains, and a number in that range corrects nothing.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from forebay.interfaces import RateLimitHeaders
from forebay.quota.bucket import Bucket
from forebay.quota.quota import PERIODS
from forebay.quota.quota_doubt import QuotaDoubt

_TOLERANCE: Final = 0.02  # of a period: error of a reset through rounding and the network
_CLOCK_ERROR: Final = 0.5  # of a period, by which a reset may be longer: a busy server's Date is many seconds old
_MARGIN: Final = 0.01  # of a bucket that is never taken: estimates err, calls overtake. It costs no throughput
_MAX_DEBT_SHARE: Final = 1.0  # of the limit: headers correct the rest, and one of them may be wrong
_ROUNDING: Final = 1.0  # units: headers leave out the fraction of a bucket
_WINDOW_DELAY: Final = 0.2  # seconds at the start of a window in which nothing is sent, because clocks differ
_LATE_WINDOW_WAIT: Final = 1.0  # seconds to wait for a window that has not reset by the provider's clock, but by ours
_MIN_SPENT: Final = 5  # units; with fewer spent, rounding hides how fast they come back
_STUCK: Final = 8  # accepted calls in a row with the same `remaining`, from which it is not believed
_ROOM: Final = 0.5  # of a limit: with less left at first it is suspect; with more after a trial, our count was wrong
_MIN_RISE: Final = 2.0  # units
_RISES: Final = 0.9  # of a period: two rises within it are not those of its windows
_MAX_RETURNED: Final = 4  # limits that come back until they are not believed
_APART: Final = 1.5  # times that one limit is the other: nearer ones may be one that changes, and both can be kept
_STEADY: Final = 50  # headers in a row with the same limit, which make up for a limit that came back
_STALE_PERIODS: Final = 2.0  # periods without headers after which a limit is stale
_MIN_STALE: Final = 60.0  # seconds


class QuotaSnapshot(NamedTuple):
    """The state of an observed limit when a call was sent, with the call itself taken off."""

    level: float
    corrected: float  # the limit's sum of corrections at that time
    window_number: int
    reserved: float  # by all calls under way, this one included: the provider may have counted any part of it
    counted: float  # the use of all processes


class SeenRemaining(NamedTuple):
    """The amount that an answer said to be left, for the other processes that share the account.

    Attributes:
        sent: when the call was sent; the number was right at some moment since then.
        remaining: of the limit.
        counted: the use of all processes that was known here when the call was sent.
        throttled: the call was refused.
    """

    sent: float
    remaining: float
    counted: float
    throttled: bool


class _ResetObservation(NamedTuple):
    """The reset that a header reported, for comparison with the next one."""

    sent: float
    full_at: tuple[float, float]  # range of the moment when the limit is full, in seconds of our clock
    holds: tuple[float, float]  # if it refills all the time, the range of what it holds when full


class _Remaining(NamedTuple):
    """The amount that a header said to be left, for comparison with the next one."""

    sent: float
    arrived: float
    remaining: int
    window_number: int


class ObservedLimit:
    """One rate limit of a provider, learned from its headers.

    Args:
        limit: what it grants in a period.
        period: seconds, until the headers show another.
        now: the present, in the clock's seconds.
        level: what is left now.
        exact: what a call takes is known before it ends, so nothing of it comes back.

    Attributes:
        bucket: the limit, as the calls of this process and their headers show it.
        share: the part that this process may use; it is `bucket` unless other processes share the account.
        doubt: of the limit.
        seen: the latest believable number of what is left; None once the others have been told.
    """

    __slots__ = (
        "_accepted",
        "_candidate",
        "_counted_since",
        "_earlier_limit",
        "_exact",
        "_last_limit",
        "_latest",
        "_longest_reset",
        "_made_up",
        "_remaining",
        "_repeated",
        "_repeated_since",
        "_reset",
        "_returned",
        "_rose_at",
        "_steady",
        "_taken_off",
        "_taken_off_in",
        "_used",
        "bucket",
        "corrected",
        "doubt",
        "full_at",
        "latest_sent",
        "seen",
        "share",
        "updated_at",
    )

    def __init__(self, limit: int, period: float, now: float, level: float, *, exact: bool = True) -> None:
        self.bucket = Bucket(float(limit), period, now, max_debt_share=_MAX_DEBT_SHARE)
        self.bucket.level = max(self.bucket.lowest, min(level, float(limit)))
        self.bucket.margin_share = _MARGIN
        self.share = self.bucket
        self.seen: SeenRemaining | None = None
        self.bucket.window_delay = _WINDOW_DELAY
        self.corrected = 0.0  # sum of all corrections, so that older snapshots can be compared
        self.updated_at = now
        self.latest_sent = -math.inf  # when the latest call was sent whose headers have arrived
        self.doubt = QuotaDoubt(now, float(limit), self.bucket.rate)
        if level < _ROOM * limit:  # somebody else has used it, or it is wrong
            self.doubt.suspect(now)
        self.full_at = math.inf  # when it is full again, by the latest header
        self._exact = exact
        self._counted_since = -math.inf
        self._accepted = 0  # calls since then
        self._longest_reset = 0.0  # that was reported since then
        self._latest: _Remaining | None = None
        self._rose_at = -math.inf  # when `remaining` last rose by more than had come back
        self._earlier_limit = limit  # before the last one
        self._returned = self._steady = 0  # limits that came back, and headers since with the same one
        self._last_limit = limit  # a new limit must be seen twice: one wrong header must not block an account
        self._candidate: tuple[float, _ResetObservation] | None = None  # a new period, likewise, and its first header
        self._reset: _ResetObservation | None = None
        self._remaining = int(level)  # as the latest header said
        self._repeated = -1  # how often it was repeated since; the first header comes once more, as an update
        self._repeated_since = now
        self._used = 0  # by the calls that repeated it, at least
        self._made_up = False  # what comes back does not explain that it was repeated: it is the same at any time
        self._taken_off = limit - self.bucket.level  # by accepted calls' headers, since the first with this `remaining`
        self._taken_off_in = 0  # number of the window in which that was

    def _is_stale(self, now: float) -> bool:
        """Return whether the last headers are so old that the limit may have changed."""
        return abs(now - self.updated_at) > max(_MIN_STALE, _STALE_PERIODS * self.bucket.period)

    def holds(self, now: float, amount: float = math.inf) -> bool:
        """Return whether a call of `amount` waits for it.

        Not if its headers are not believed; nor for a stale limit that is too small, because the answer will show the
        new one.
        """
        return self.doubt.is_believed(now) and not (amount > self.bucket.amount and self._is_stale(now))

    def shift_clock(self, by: float) -> None:
        """Move all times by `by` seconds, because the clock has gone back."""
        self.updated_at += by
        self.latest_sent += by
        self._reset = self._latest = None
        self._counted_since += by
        self._repeated_since += by
        self._rose_at += by
        self.full_at += by
        self.doubt.shift_clock(by)

    def snapshot(self, reserved: float) -> QuotaSnapshot:
        """Return the present state, to be kept with a call that is sent now and has been taken off."""
        bucket = self.bucket
        return QuotaSnapshot(bucket.level, self.corrected, bucket.window_number, reserved, self.share.counted)

    def update_from_headers(  # noqa: PLR0913 - what an answer says
        self,
        now: float,
        headers: RateLimitHeaders,
        *,
        sent: float,
        snapshot: QuotaSnapshot | None,
        used: int = 0,
        returned: float = 0.0,
    ) -> None:
        """Correct the limit by the headers of one answer.

        Args:
            now: when they arrived.
            headers: what they say, without impossible values.
            sent: when the call was sent.
            snapshot: from that moment; None if this limit was not known yet.
            used: by the call when its headers were made, at least.
            returned: what was taken for this call and has been refunded, if it was throttled and so not counted.
        """
        bucket = self.bucket
        bucket.refill(now)
        self.updated_at = now
        self.latest_sent = max(self.latest_sent, sent)
        self._update_limit(now, headers.limit)
        if self._exact and not returned:
            self._count_accepted(now, sent, headers.reset)
            self._watch_rises(now, sent, headers.remaining)
        if headers.remaining is None or (snapshot is not None and snapshot.window_number != bucket.window_number):
            return  # of a window that is over
        self.full_at = now + headers.reset if headers.reset else math.inf
        if self._is_stuck(now, sent, headers.remaining, used=used, throttled=returned > 0):
            return
        remaining = min(float(headers.remaining), bucket.amount)
        if bucket.window_end is not None and not headers.reset and remaining < bucket.amount:
            if returned:
                bucket.window_end = min(bucket.window_end, now + _LATE_WINDOW_WAIT)
            return  # of a window that should be over
        since = 0.0
        if snapshot is not None:
            since = snapshot.level + self.corrected - snapshot.corrected + returned - bucket.level
        if headers.reset and remaining < bucket.amount:
            self._update_reset(now, sent, remaining, headers.reset)
        if snapshot is None:
            return
        self.seen = SeenRemaining(sent, remaining, snapshot.counted, throttled=returned > 0)
        if snapshot.window_number != bucket.window_number:  # the reset showed that another window began before the call
            bucket.level = remaining - max(0.0, since)
        else:
            level_then = bucket.level + since
            self._correct(now - sent, remaining, level_then, snapshot.reserved, throttled=returned > 0)

    def _is_stuck(self, now: float, sent: float, remaining: int, *, used: int, throttled: bool) -> bool:
        """Return whether `remaining` is not believed, because it is the same after each call, and calls are accepted.

        What it has taken off wrongly is returned. A refusal is believed, and shows that what was taken off before it
        was right. So are the headers after it, unless `remaining` is made up: the first of them would leave nothing of
        the next window.
        """
        if throttled:
            self._taken_off = 0.0
        if remaining != self._remaining or (throttled and not self._made_up):
            self._remaining, self._repeated, self._used, self._taken_off = remaining, 0, 0, 0.0
            self._repeated_since, self._made_up = sent, False
            return False
        if throttled:
            return False
        self._repeated += 1
        self._used += used
        if self._repeated >= _STUCK and not (self._made_up or self._is_repetition_explained()):
            self._made_up = True
            if self._exact:
                self.doubt.suspect(now)
        if self._repeated == _STUCK:
            self._forget_earlier_windows()
            self.bucket.level = min(self.bucket.capacity, self.bucket.level + self._taken_off)
            self.corrected += self._taken_off
        return self._repeated >= _STUCK

    def _is_repetition_explained(self) -> bool:
        """Return whether so much has come back that `remaining` may have stayed the same."""
        come_back = (self.latest_sent - self._repeated_since) * self.bucket.rate
        return come_back >= self._used / 2  # half, since calls reach the provider in bunches

    def _forget_earlier_windows(self) -> None:
        """Forget what headers took off windows that are over: the present one began with its whole amount."""
        if self._taken_off_in != self.bucket.window_number:
            self._taken_off, self._taken_off_in = 0.0, self.bucket.window_number

    def trial_wait(self, now: float, amount: float) -> float:
        """Return the seconds until a call of `amount` may be sent although too little is left; infinity for never."""
        if not self.share.lacks(now, amount):
            return math.inf
        # Calls of other processes, whose headers are not seen here, make that later.
        promised = self.full_at if self.share.is_sole else math.inf
        return self.doubt.trial_wait(now, promised)

    def try_begin_trial(self, now: float, amount: float) -> bool:
        """Return whether a call of `amount` that is sent now is a trial; if so, count what is missing as left."""
        self.bucket.refill(now)
        if self.trial_wait(now, amount) > 0.0 or not self.doubt.is_believed(now):
            if now >= self.full_at:  # from now on our own calls explain what is missing
                self.full_at = math.inf
            return False
        missing = max(0.0, amount - self.bucket.level)
        self.bucket.level += missing
        self.corrected += missing
        if self.share is not self.bucket:
            self.share.refund(now, amount)
        self.doubt.record_sent()
        return True

    def cancel_trial(self, now: float, amount: float) -> None:
        """Note that a trial of `amount` says nothing; what it has not used is refunded besides."""
        self.doubt.cancel(now)
        self.take_back_trial(now, amount)

    def record_trial_unanswered(self, now: float, amount: float) -> None:
        """Note that a trial of `amount` was left before its answer; what it has not used is refunded besides."""
        self.doubt.record_unanswered(now)
        self.take_back_trial(now, amount)

    def take_back_trial(self, now: float, amount: float) -> None:
        """Take back what a trial of `amount` was granted, which is refunded besides."""
        self.lower(amount)
        if self.share is not self.bucket:
            self.share.take(now, amount)

    def record_trial_accepted(self, now: float, amount: float, headers: RateLimitHeaders | None) -> None:
        """Note that a trial was accepted that took `amount`. `headers`: of its answer."""
        room = headers is not None and (headers.remaining or 0) >= _ROOM * self.bucket.amount
        only_miscounted = room and self._repeated < _STUCK  # our count was wrong, and the quota may be right
        self.doubt.record_trial_accepted(now, 0.0 if only_miscounted else amount)

    def adopt(self, now: float, amount: float, period: float, window_end: float | None) -> None:
        """Take over what another process has learned of the amount, the period and the window."""
        bucket = self.bucket
        bucket.refill(now)
        self._earlier_limit, self._last_limit = self._last_limit, round(amount)
        gained = amount - bucket.amount
        bucket.resize(amount, period)
        if gained > 0:
            bucket.level += gained
            self.corrected += gained
        bucket.window_end = window_end
        self._candidate = self._reset = None
        self._counted_since = -math.inf
        self.doubt.begin(now, amount, bucket.rate)

    def record_used_up(self, now: float, left: float) -> None:
        """Note that a refusal shows that only `left` can be left; below 0 is a debt."""
        bucket = self.bucket
        bucket.refill(now)
        if bucket.level > left:
            self.lower(bucket.level - left)
        self.seen = SeenRemaining(now, left, self.share.counted, throttled=True)

    def lower(self, by: float) -> None:
        """Take off what the provider has counted and we have not."""
        before = self.bucket.level
        self.bucket.level = max(before - by, self.bucket.lowest)
        self.corrected += self.bucket.level - before

    def _correct(self, age: float, remaining: float, level_then: float, reserved: float, *, throttled: bool) -> None:
        """Move the level to the nearest one that explains `remaining`.

        Args:
            age: seconds since the call was sent; the header may be from any moment in between.
            remaining: what the header said.
            level_then: our level when the call was sent.
            reserved: what open calls had reserved at that time, and the provider need not have counted.
            throttled: the call was refused.
        """
        bucket = self.bucket
        refills = bucket.window_end is None
        refilled = age * bucket.rate if refills else 0.0
        lowest = min(level_then, bucket.level) - (_ROUNDING if refills else 0.0)
        highest = max(level_then + refilled, bucket.level) + reserved
        if remaining < lowest:
            before = bucket.level
            self.lower(min(level_then, before) - remaining)
            if not throttled:
                self._forget_earlier_windows()
                self._taken_off += before - bucket.level
        elif remaining > highest:
            raised = min(bucket.capacity - bucket.level, remaining - highest)
            bucket.level += raised
            self.corrected += raised

    def _update_limit(self, now: float, limit: int | None) -> None:
        if limit is None:
            return
        if limit == self._last_limit:
            self._steady += 1
            if self._steady >= _STEADY:
                self._steady, self._returned = 0, 0
        else:
            apart = max(limit, self._last_limit) >= _APART * min(limit, self._last_limit)
            if limit == self._earlier_limit and apart:  # there and back: these are the headers of several limits
                self._returned += 1
                if self._returned >= _MAX_RETURNED:
                    self._returned = 0
                    self.doubt.refute(now)
            self._steady, self._earlier_limit = 0, self._last_limit
        if limit != self.bucket.amount and limit == self._last_limit:
            self._counted_since = -math.inf
            gained = limit - self.bucket.amount
            self.bucket.resize(float(limit), self.bucket.period)
            if gained > 0:  # the gain is available at once, as a header will confirm
                self.bucket.level += gained
                self.corrected += gained
            self.doubt.begin(now, self.bucket.amount, self.bucket.rate)
        self._last_limit = limit

    def _count_accepted(self, now: float, sent: float, reset: float | None) -> None:
        """Count an accepted call, and learn from more of them than this limit grants, if its period is right.

        A window grants at most its amount in each period, the one that began before the count included.
        """
        bucket = self.bucket
        if now - self._counted_since > bucket.period:
            self._counted_since, self._accepted, self._longest_reset = sent, 0, 0.0
        if sent < self._counted_since:
            return
        self._accepted += 1
        self._longest_reset = max(self._longest_reset, reset or 0.0)
        seconds = now - self._counted_since
        if self._accepted <= bucket.amount * (seconds / bucket.period + 2.0):
            return
        for period in sorted(PERIODS.values(), reverse=True):
            explains = self._accepted <= bucket.amount * (seconds / period + 2.0)
            if period < bucket.period and explains and self._longest_reset <= period * (1 + _TOLERANCE) + 1.0:
                self._set_period(now, period)
                bucket.window_end = None
                return
        self._counted_since = -math.inf
        self.doubt.refute(now)

    def _watch_rises(self, now: float, sent: float, remaining: int | None) -> None:
        """Suspect a limit whose `remaining` is higher than before, and by more than has come back, twice in a period.

        The start of a window explains one such rise.
        """
        last, bucket = self._latest, self.bucket
        if remaining is None or (last is not None and sent < last.arrived):
            return  # the provider may have counted the two in any order
        self._latest = _Remaining(sent, now, remaining, bucket.window_number)
        if last is None or last.window_number != bucket.window_number:
            return
        rise = remaining + 1 - last.remaining
        if rise < _MIN_RISE or rise <= (now - last.sent) * bucket.rate + _ROUNDING:
            return
        if now - self._rose_at < _RISES * bucket.period:
            self.doubt.suspect(now)
        self._rose_at = last.sent  # or later

    def _set_period(self, now: float, period: float) -> None:
        self.bucket.resize(self.bucket.amount, period)
        self._candidate = self._reset = None
        self._counted_since = -math.inf
        self.doubt.begin(now, self.bucket.amount, self.bucket.rate)

    def _update_reset(self, now: float, sent: float, remaining: float, reset: float) -> None:
        bucket = self.bucket
        if not self._is_plausible(now, sent, remaining, reset):
            return
        last = self._reset
        if last is None or sent - last.sent >= 3 * _TOLERANCE * bucket.period:  # else too soon to tell them apart
            seen = self._reset = self._reset_observation(now, sent, remaining, reset)
            if last is not None:
                self._tell_bucket_from_window(last, seen)
        if bucket.window_end is not None:
            self._follow_window_end(sent + reset, now + reset)

    def _reset_observation(self, now: float, sent: float, remaining: float, reset: float) -> _ResetObservation:
        rate = self.bucket.rate
        holds = remaining + reset * rate
        return _ResetObservation(sent, (sent + reset, now + reset), (holds, holds + (now - sent) * rate))

    def _is_plausible(self, now: float, sent: float, remaining: float, reset: float) -> bool:
        """Return whether a reset fits the period; two in a row that fit another period make that the period."""
        bucket = self.bucket
        fits = reset <= bucket.period * (1 + _CLOCK_ERROR) + 1
        present = bucket.period if fits else 0.0
        other = _only_period(bucket.amount, bucket.amount - remaining, reset, now - sent, present)
        if other is None and not fits:
            other = next((period for period in PERIODS.values() if reset <= period), None)
        if other is None or other == bucket.period:
            self._candidate = None
            return fits
        seen = self._reset_observation(now, sent, remaining, reset)
        if self._candidate is None or self._candidate[0] != other:
            self._candidate = other, seen
        elif not self._explains(self._candidate[1], seen):
            self._set_period(now, other)
            if bucket.window_end is not None:
                bucket.window_end = bucket.updated_at + reset
            return True
        return fits

    def _explains(self, one: _ResetObservation, other: _ResetObservation) -> bool:
        """Return whether a bucket of this period, holding less than it grants in one, explains two observations."""
        rounding = self.bucket.rate  # resets may be rounded to whole seconds
        holds = max(one.holds[0], other.holds[0])
        return holds <= self.bucket.amount + rounding and _gap(one.holds, other.holds) <= rounding

    def _tell_bucket_from_window(self, last: _ResetObservation, seen: _ResetObservation) -> None:
        """Tell a bucket, which holds the same when full, from a window, which is full at the same moment.

        A window may move, where each begins with its first call. Seen only when it starts it holds the same each time,
        but more than any bucket: what is left, and a whole amount besides.
        """
        bucket = self.bucket
        tolerance = _TOLERANCE * bucket.period
        moved = _gap(last.full_at, seen.full_at, bucket.period) > tolerance
        changed = _gap(last.holds, seen.holds) - _ROUNDING > tolerance * bucket.rate
        if changed and not moved:
            if bucket.window_end is None:
                bucket.window_end = seen.full_at[1]
                bucket.capacity = bucket.amount
        elif moved and not changed and seen.holds[0] <= bucket.amount + bucket.rate + _ROUNDING:
            bucket.window_end = None
            bucket.capacity = min(bucket.amount, max(1.0, seen.holds[1]))
            bucket.level = min(bucket.level, bucket.capacity)

    def _follow_window_end(self, earliest: float, latest: float) -> None:
        """Keep the end of the window in the range that the headers allow; late rather than early."""
        bucket = self.bucket
        ends = bucket.window_end or latest
        if not earliest <= ends <= latest:
            if latest - ends > bucket.period / 2:  # the next window has begun already
                bucket.window_number += 1
            bucket.window_end = latest


def _gap(one: tuple[float, float], other: tuple[float, float], circle: float = math.inf) -> float:
    """Return the least distance between two ranges, on a circle of the given length if it is finite."""
    middle = (other[0] + other[1]) / 2 - (one[0] + one[1]) / 2
    apart = abs(middle) if circle == math.inf else abs(math.remainder(middle, circle))
    return max(0.0, apart - (one[1] - one[0] + other[1] - other[0]) / 2)


def _only_period(limit: float, spent: float, reset: float, age: float, present: float) -> float | None:
    """Return the only period in which `spent` of `limit` comes back in `reset` seconds; None if there is not just one.

    Also None if the present period explains it.
    """
    if spent < _MIN_SPENT:
        return None
    slowest = (reset + age) * limit / spent
    fastest = (reset - 1.0) * limit / (spent + 1)  # resets may be in whole seconds, and what is left rounded
    if fastest <= present <= slowest:
        return None
    fitting = [period for period in PERIODS.values() if fastest <= period <= slowest]
    return fitting[0] if len(fitting) == 1 else None
