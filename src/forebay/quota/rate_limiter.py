"""The rate limiter of one account: when a call may be sent, what it takes from the quotas, and what is refunded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from forebay._validate import reject
from forebay.errors import ReservationClosed
from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota.bucket import Bucket
from forebay.quota.observed import ObservedLimit, QuotaSnapshot
from forebay.quota.quota import PERIODS, UNITS, Quota, RateScope, unit_of

_MINUTE: Final = PERIODS["minute"]
_MAX_RESET: Final = 2 * PERIODS["day"]
_MAX_LIMIT: Final = 10**10  # many times the largest limit that is sold; a larger one limits nobody
_MOST_TOKENS: Final = 200_000  # that one call may be counted as: more than models make in one answer ...
_MANY_TIMES: Final = 10  # ... or times what it reserved, if that is more: estimates of input err by less
_ROOMY: Final = 0.5  # of a quota: while this share of each is left, none can run out in the next moment
_MOMENT: Final = 1 / 600  # of a period ...
_MAX_MOMENT: Final = 0.1  # ... in seconds, at most
_NAMES: Final = {seconds: name for name, seconds in PERIODS.items()}


class QuotaDelay(NamedTuple):
    """The wait of a call for its quotas.

    Attributes:
        seconds: 0 is now; infinity is never, because the call is larger than a whole quota.
        limited_by: the quota that it waits for longest, such as ``"requests per minute"``; None if it need not wait.
    """

    seconds: float
    limited_by: str | None


_NO_DELAY: Final = QuotaDelay(0.0, None)  # of most calls: to make one costs as much as to find out that none is needed


class QuotaLevel(msgspec.Struct, frozen=True):
    """The level of one quota, for display.

    Attributes:
        name: such as ``"requests per minute"``.
        amount: granted in a period.
        remaining: of the amount, now; below 0 is a debt.
        learned: True if it was learned from the provider's headers.
    """

    name: str
    amount: float
    remaining: float
    learned: bool


class QuotaHeadroom(NamedTuple):
    """The amount of one quota that others may take without delaying a waiting call.

    Attributes:
        spare: what is available beyond the need of that call, at the time when it could go; below 0 is what it lacks.
        unit: the unit that is counted.
        level: the whole level at that time, without the bound of the capacity.
        capacity: the most that the quota holds; a full quota has lost nothing.
    """

    spare: float
    unit: str
    level: float
    capacity: float


class QuotaReservation(msgspec.Struct, eq=False):
    """The amounts that one call holds of the quotas. It is settled, released or recorded as throttled exactly once."""

    number: int
    reserved_at: float
    charge: Charge
    snapshots: dict[str, QuotaSnapshot]  # of the observed limits that count this call, by unit
    trial_of: tuple[str, ...] = ()  # units of the observed limits that it exceeds: it is a trial call


class HeldCharge(NamedTuple):
    """The needs of a call that comes back: others leave them to it.

    Attributes:
        charge: of the call.
        back_at: when it comes back.
    """

    charge: Charge
    back_at: float


class _GivenQuota(NamedTuple):
    unit: str  # or the most of it that a call may use: what `Quota.counted` says
    name: str
    bucket: Bucket


class ObservedShares(Protocol):
    """The part that this process may use of the limits that all processes of an account observe together."""

    def open(self, unit: str, observed: ObservedLimit) -> Bucket:
        """Return the part of a limit that this process begins to observe."""


class RateLimiter:
    """The rate limiter of one account: of the given quotas, and of those that the provider's headers show.

    Pure. The caller passes the time, in seconds of a clock that does not go back, and where threads share it holds the
    lock. If the clock does go back, the levels stay; if it leaps ahead, each quota is full at most.

    Args:
        quotas: the given ones; several for one unit all hold.
        buckets: their levels, as `new_buckets` made them; None for full ones.

    Raises:
        InvalidSetting: not a Quota.
    """

    def __init__(self, quotas: Iterable[Quota] = (), *, buckets: Sequence[Bucket] | None = None) -> None:
        quotas = tuple(quotas)
        for quota in quotas:
            if not isinstance(quota, Quota):
                reject(
                    "RateLimiter", "quotas", quota, "made of Quota objects, such as Quota(requests=500, per='minute')"
                )
        self._given = tuple(
            _GivenQuota(quota.counted, _name(quota.unit, quota.seconds), bucket)
            for quota, bucket in zip(quotas, new_buckets(quotas) if buckets is None else buckets, strict=True)
        )
        for given in self._given:
            given.bucket.drop_reservations()
        self._observed: dict[str, ObservedLimit] = {}  # by unit
        self._open: dict[int, QuotaReservation] = {}  # by number, in the order in which they were sent
        self._next_number = itertools.count().__next__
        # What the open reservations hold, of the units that a quota counts: each call adds to all, and takes it back.
        self._under_way = dict.fromkeys((given.unit for given in self._given), 0)
        self._quiet_until = -math.inf
        self._now = -math.inf
        self._shares: ObservedShares | None = None

    @property
    def observed(self) -> Mapping[str, ObservedLimit]:
        """The limits that headers show, by unit."""
        return self._observed

    def share_observed(self, shares: ObservedShares) -> None:
        """Use only a share of each limit that headers will show: other processes use the same account."""
        self._shares = shares

    def adopt_observed(self, now: float, unit: str, amount: float, period: float, window_end: float | None) -> None:
        """Take over what another process has observed of a limit."""
        self._advance(now)
        if (observed := self._observed.get(unit)) is not None:
            observed.adopt(now, amount, period, window_end)
            return
        observed = self._observe(now, unit, amount, period, amount)
        observed.bucket.window_end = window_end
        for reservation in self._open.values():
            reservation.snapshots[unit] = observed.snapshot(self._under_way[unit])

    def under_way(self, unit: str) -> float:
        """Return what calls under way have reserved."""
        return self._under_way[unit]

    def quota_too_small_for(self, now: float, charge: Charge) -> str | None:
        """Return the name of a quota that is smaller than the charge even when full, or None."""
        for unit, name, bucket in self._given:
            if getattr(charge, unit) > bucket.amount:
                return name
        for unit, observed in self._observed.items():
            if getattr(charge, unit) > observed.share.amount and observed.holds(now):
                return _name(unit, observed.share.period)
        return None

    def wait(
        self,
        now: float,
        charge: Charge,
        *,
        ahead: Charge | None = None,
        held: Sequence[HeldCharge] = (),
        trial: bool = False,
    ) -> QuotaDelay:
        """Return how long a call of this charge has to wait, and for which quota.

        Args:
            now: the time.
            charge: of the call.
            ahead: of the calls before it, in all.
            held: has to be left for calls that come back.
            trial: it may go as a trial call, which a learned quota does not allow, once one is due.
        """
        if now != self._now:
            self._advance(now)
        longest: float = 0.0
        limited_by: str | None = None
        for unit, name, bucket in self._given:
            left = _held(bucket, now, unit, held) if held else 0.0
            seconds = bucket.wait(now, getattr(charge, unit), 0 if ahead is None else getattr(ahead, unit), left)
            if seconds > longest:
                longest, limited_by = seconds, name
        for unit, observed in self._observed.items():
            amount, bucket = getattr(charge, unit), observed.share
            if not observed.holds(now, amount):
                continue
            left = _held(bucket, now, unit, held) if held else 0.0
            seconds = bucket.wait(now, amount, 0 if ahead is None else getattr(ahead, unit), left)
            if seconds and trial:
                seconds = min(seconds, observed.trial_wait(now, amount))
            if seconds > longest:
                longest, limited_by = seconds, _name(unit, bucket.period)
        return _NO_DELAY if limited_by is None else QuotaDelay(longest, limited_by)

    def headroom(self, now: float, charge: Charge) -> list[QuotaHeadroom]:
        """Return what others may take now without delaying a waiting call of this charge, the scarcest quota first.

        It is computed for the earliest moment at which that call could go, as if the calls under way returned all that
        they hold: what others take before may come back. A window that resets by then is left out.
        """
        self._advance(now)
        buckets = self._buckets()
        seconds = 0.0
        for unit, bucket, _ in buckets:
            amount = getattr(charge, unit)
            if 0 < amount <= bucket.amount:
                needed = min(amount + bucket.margin, bucket.capacity)
                seconds = max(seconds, bucket.time_until(now, needed - self._under_way[unit]))
        headroom = []
        for unit, bucket, _ in buckets:
            level, capacity = bucket.level_in(now, seconds) - bucket.margin, bucket.capacity - bucket.margin
            if level < math.inf:
                spare = level - min(getattr(charge, unit), capacity)
                headroom.append(QuotaHeadroom(spare, unit, level, capacity))
        return sorted(headroom)

    def calls_left(self, now: float, charge: Charge) -> float:
        """Return how many calls of this charge fit into what is left of the quotas now; infinity without any."""
        self._advance(now)
        least = math.inf
        for unit, bucket, observed in self._buckets():
            amount = getattr(charge, unit)
            if amount > 0 and (observed is None or observed.holds(now, amount)):
                least = min(least, (bucket.remaining(now) - bucket.margin) / amount)
        return max(0.0, least)

    def reserve(self, now: float, charge: Charge, *, trial: bool = False) -> QuotaReservation:
        """Take what a call needs as it is sent; into debt if the caller did not ask `wait`.

        `trial`: it is a trial call if a learned quota does not allow it and a trial is due.
        """
        if now != self._now:
            self._advance(now)
        charge = _without_negatives(charge)
        for unit, _, bucket in self._given:
            bucket.reserve(now, getattr(charge, unit))
        under_way = self._under_way
        for unit in under_way:
            under_way[unit] += getattr(charge, unit)
        snapshots: dict[str, QuotaSnapshot] = {}
        trial_of: tuple[str, ...] = ()
        for unit, observed in self._observed.items():
            amount = getattr(charge, unit)
            if trial and observed.try_begin_trial(now, amount):
                trial_of += (unit,)
            observed.bucket.take(now, amount)
            if observed.share is not observed.bucket:
                observed.share.take(now, amount)
            snapshots[unit] = observed.snapshot(under_way[unit])
        reservation = QuotaReservation(self._next_number(), now, charge, snapshots, trial_of)
        self._open[reservation.number] = reservation
        return reservation

    def settle(
        self, now: float, reservation: QuotaReservation, used: Charge, *, failed: bool = False, answered: bool = True
    ) -> None:
        """Replace a reservation by what the call used: an excess is refunded, a shortfall becomes a debt.

        The debt of a given quota is paid back in full. Only what one call can have used is bounded, since usage comes
        from the wire: by a whole amount, by 200,000 tokens or by ten times its reservation, whichever is most.

        Args:
            now: when it ended.
            reservation: of the call.
            used: by the call.
            failed: the provider failed. Some count such a request, others do not. A learned quota takes it as not
                counted, if that was an answer, since the next header corrects that; a given one as counted.
            answered: the provider has answered; else nothing shows that it has accepted the call, or left it uncounted.

        Raises:
            ReservationClosed: it was settled, released or recorded as throttled before.
        """
        self._close(now, reservation)
        charge = reservation.charge
        if used is not charge:  # it has no negative numbers
            used = _without_negatives(used)
        if self._observed:
            self._end_doubt(now, reservation, failed=failed, answered=answered)
        for unit, _, bucket in self._given:
            reserved, counted = getattr(charge, unit), getattr(used, unit)
            if counted > reserved:
                counted = min(counted, max(bucket.amount, _MANY_TIMES * reserved, _MOST_TOKENS))
            bucket.end(now, reserved, counted)
        for unit, observed in self._observed.items():
            reserved, counted = getattr(charge, unit), getattr(used, unit)
            if failed and answered and unit == "requests":
                counted = 0
            snapshot = reservation.snapshots.get(unit)
            if snapshot is None or (counted < reserved and snapshot.window_number != observed.bucket.window_number):
                continue  # that window is over, and with it what was reserved in it
            if counted > reserved and unit != "output_tokens" and observed.latest_sent >= reservation.reserved_at:
                continue  # headers of this call, or of a later one, have counted it already
            observed.bucket.end(now, reserved, counted)
            if observed.share is not observed.bucket:
                observed.share.end(now, reserved, counted)

    def release(self, now: float, reservation: QuotaReservation) -> None:
        """Refund a call that was never sent.

        Raises:
            ReservationClosed: it was settled, released or recorded as throttled before.
        """
        self._close(now, reservation)
        self._end_trial(now, reservation)
        for unit, _, bucket in self._given:
            bucket.end(now, getattr(reservation.charge, unit), 0)
        for unit, observed in self._observed.items():
            snapshot = reservation.snapshots.get(unit)
            if snapshot is not None:
                observed.bucket.refill(now)
                if snapshot.window_number == observed.bucket.window_number:
                    observed.bucket.refund(now, getattr(reservation.charge, unit))
                    if observed.share is not observed.bucket:
                        observed.share.refund(now, getattr(reservation.charge, unit))

    def record_throttled(
        self,
        now: float,
        reservation: QuotaReservation,
        retry_after: float | None = None,
        headers: Sequence[RateLimitHeaders] = (),
        *,
        scope: RateScope | None = None,
    ) -> None:
        """Release a call that the provider refused for a rate (429), and lower the quota that the refusal fits.

        Args:
            now: when the refusal came.
            reservation: of the call.
            retry_after: seconds, or None if the provider gave none.
            headers: the rate limit headers of the refusal; do not pass them to `update_from_headers` again.
            scope: the rate that the refusal names. Without it no given quota is lowered, and of the learned ones only
                those of at most a minute, which are soon full again if another one was meant.

        Raises:
            ReservationClosed: it was settled, released or recorded as throttled before.
        """
        trial_of, reservation.trial_of = reservation.trial_of, ()
        for unit, observed in self._observed.items():
            if scope is None or scope.unit in (None, unit):
                observed.doubt.record_refused(now)
            if unit in trial_of:
                observed.take_back_trial(now, getattr(reservation.charge, unit))
        self.release(now, reservation)
        self.update_from_headers(now, headers, reservation, throttled=True)
        wanted = 0.0 if retry_after is None or not retry_after > 0 else retry_after
        if wanted or scope is not None or not self._observed:
            self._empty_tightest(now, reservation.charge, wanted, scope)

    def needs_headers(self, now: float) -> bool:
        """Return whether the headers of a success can change a decision now; if not, they need not be parsed.

        They cannot for a moment after headers that left more than half of every quota. Those of a throttled call always
        matter.
        """
        return now >= self._quiet_until

    def update_from_headers(
        self,
        now: float,
        headers: Sequence[RateLimitHeaders],
        reservation: QuotaReservation,
        *,
        throttled: bool = False,
    ) -> None:
        """Learn from the rate limit headers of an answer, before or after its call was settled.

        Quotas that were not given are learned; of all others, `remaining` and `reset` correct our own count. A
        `throttled` call was not counted by the provider, or is refunded as if it was not.
        """
        self._advance(now)
        sent = min(reservation.reserved_at, now)
        for raw in headers:
            header = _without_impossible_values(raw)
            unit = header.unit
            if unit not in UNITS:
                continue
            amount = getattr(reservation.charge, unit)
            observed = self._observed.get(unit)
            # A limit below the call's own amount cannot be right if the call was accepted.
            if observed is None and (throttled or (header.limit or math.inf) >= amount):
                observed = self._learn_limit(now, header, reservation)
            if observed is not None:
                returned = amount if throttled else 0.0
                snapshot = reservation.snapshots.get(unit)
                used = _used_as_it_begins(unit, reservation.charge)
                observed.update_from_headers(now, header, sent=sent, snapshot=snapshot, used=used, returned=returned)
                if unit in reservation.trial_of:
                    observed.record_trial_accepted(now, amount, header)
                    reservation.trial_of = tuple(other for other in reservation.trial_of if other != unit)
        if headers:  # an answer without headers says nothing, and must not prolong the moment
            self._quiet_until = now + self._quiet_seconds()

    def is_full(self, now: float) -> bool:
        """Return whether no quota is used."""
        return all(bucket.is_full(now) for _, bucket, _ in self._buckets())

    def levels(self, now: float) -> list[QuotaLevel]:
        """Return what is left of each quota."""
        self._advance(now)
        levels = []
        for unit, bucket, observed in self._buckets():
            name = _name(unit, bucket.period)
            levels.append(QuotaLevel(name, bucket.amount, bucket.remaining(now), learned=observed is not None))
        return levels

    def _buckets(self) -> list[tuple[str, Bucket, ObservedLimit | None]]:
        """Return the unit and the bucket of each quota, and the observed limit that it belongs to, if any."""
        buckets: list[tuple[str, Bucket, ObservedLimit | None]] = [
            (unit, bucket, None) for unit, _, bucket in self._given
        ]
        return buckets + [(unit, observed.share, observed) for unit, observed in self._observed.items()]

    def _advance(self, now: float) -> None:
        """Set the time; if the clock went back, keep the remaining seconds of all waits."""
        if now < self._now:
            back = now - self._now
            self._quiet_until = -math.inf
            for observed in self._observed.values():
                observed.shift_clock(back)
        self._now = now

    def _close(self, now: float, reservation: QuotaReservation) -> None:
        if self._open.pop(reservation.number, None) is not reservation:
            raise ReservationClosed
        if now != self._now:
            self._advance(now)
        under_way = self._under_way
        for unit in under_way:
            under_way[unit] -= getattr(reservation.charge, unit)

    def _end_doubt(self, now: float, reservation: QuotaReservation, *, failed: bool, answered: bool) -> None:
        """Note for learned quotas how a call has ended."""
        if not answered:
            self._end_unanswered_trial(now, reservation)
        elif failed:
            self._end_trial(now, reservation)
        else:
            self._record_accepted(now, reservation)

    def _record_accepted(self, now: float, reservation: QuotaReservation) -> None:
        """Note for the doubts of quotas that a call was accepted."""
        trial_of, reservation.trial_of = reservation.trial_of, ()
        for unit, observed in self._observed.items():
            if unit in trial_of:
                observed.record_trial_accepted(now, getattr(reservation.charge, unit), None)
            elif not observed.doubt.is_believed(now):
                observed.doubt.record_accepted(getattr(reservation.charge, unit))

    def _end_trial(self, now: float, reservation: QuotaReservation) -> None:
        """Note that a trial call says nothing, and take back what it was granted."""
        for unit in reservation.trial_of:
            self._observed[unit].cancel_trial(now, getattr(reservation.charge, unit))
        reservation.trial_of = ()

    def _end_unanswered_trial(self, now: float, reservation: QuotaReservation) -> None:
        """Note that a trial call may have been refused: nobody has seen its answer. Take back what it was granted."""
        for unit in reservation.trial_of:
            self._observed[unit].record_trial_unanswered(now, getattr(reservation.charge, unit))
        reservation.trial_of = ()

    def _learn_limit(self, now: float, header: RateLimitHeaders, reservation: QuotaReservation) -> ObservedLimit | None:
        """Begin to observe a limit that a header shows for the first time; None if the header says too little."""
        unit = header.unit
        given = [bucket for given_unit, _, bucket in self._given if unit_of(given_unit) == unit]
        limit = header.limit or (int(given[0].amount) if given else None)
        if limit is None or header.remaining is None:
            return None
        period = next((bucket.period for bucket in given if bucket.amount == limit), _MINUTE)
        observed = self._observe(now, unit, limit, period, min(header.remaining, limit))
        reservation.snapshots[unit] = observed.snapshot(0.0)
        for other in self._open.values():  # `remaining` does not count calls sent later yet, nor output under way
            if other.number > reservation.number or unit == "output_tokens":
                observed.bucket.take(now, getattr(other.charge, unit))
                other.snapshots[unit] = observed.snapshot(self._under_way[unit])
        return observed

    def _observe(self, now: float, unit: str, limit: float, period: float, level: float) -> ObservedLimit:
        """Begin to observe a limit, and count what open reservations hold of its unit."""
        observed = ObservedLimit(round(limit), period, now, level, exact=unit == "requests")
        self._observed[unit] = observed
        if unit not in self._under_way:
            self._under_way[unit] = sum(getattr(each.charge, unit) for each in self._open.values())
        if self._shares is not None:
            observed.share = self._shares.open(unit, observed)
        return observed

    def _quiet_seconds(self) -> float:
        """Return the seconds for which the headers of successes need not be parsed."""
        moment = _MAX_MOMENT if self._observed else 0.0
        for observed in self._observed.values():
            bucket = observed.bucket
            if bucket.level < _ROOMY * bucket.amount:
                return 0.0
            moment = min(moment, _MOMENT * bucket.period)
        return moment

    def _empty_tightest(self, now: float, charge: Charge, wanted: float, scope: RateScope | None) -> None:
        """Lower the tightest of the quotas that a refusal fits, which is most likely the one that was used up.

        What is left is just enough for the same call again in `wanted` seconds. A given quota is lowered only by a
        refusal that names a rate: any other may have another cause, such as what the call asks for, and nothing would
        correct that. Callers that are always refused would use a quota up for all others.
        """

        def tightness(quota: tuple[str, Bucket, ObservedLimit | None]) -> tuple[float, float]:
            unit, bucket, _ = quota
            return bucket.time_until(now, getattr(charge, unit)), -bucket.level / bucket.amount

        fitting = [
            (unit, bucket, observed)
            for unit, bucket, observed in self._buckets()
            if getattr(charge, unit) and _fits(unit, bucket.period, wanted, scope)
        ]
        if not fitting:
            return
        unit, bucket, observed = max(fitting, key=tightness)
        amount = getattr(charge, unit)
        window_end = bucket.window_end if observed is None else observed.bucket.window_end
        likely = max(-bucket.amount, amount - wanted * bucket.rate) if window_end is None else 0.0
        if observed is None:
            if scope is not None:
                bucket.lower_to(likely)
        elif bucket.level > likely or bucket is not observed.bucket:
            observed.record_used_up(now, likely)
            if window_end is not None and unit != "requests":
                self._forget_reserved(unit)

    def _forget_reserved(self, unit: str) -> None:
        """Refund nothing to a used-up window for calls under way: the provider has counted what they took, not more."""
        for reservation in self._open.values():
            reservation.snapshots.pop(unit, None)


def new_buckets(quotas: Iterable[Quota]) -> tuple[Bucket, ...]:
    """Return full levels of quotas, to be kept by somebody who outlives the `RateLimiter`."""
    return tuple(Bucket(float(quota.amount), quota.seconds, -math.inf, strict=quota.strict) for quota in quotas)


def resize_buckets(
    now: float, before: Sequence[Quota], buckets: Sequence[Bucket], quotas: Sequence[Quota]
) -> tuple[Bucket, ...]:
    """Return the levels of changed quotas: what is missing of a quota of the same unit and period stays missing.

    Args:
        now: the time.
        before: the quotas until now.
        buckets: their levels.
        quotas: from now on.
    """
    old = {(quota.counted, quota.per): bucket for quota, bucket in zip(before, buckets, strict=True)}
    resized = new_buckets(quotas)
    for quota, bucket in zip(quotas, resized, strict=True):
        if (earlier := old.get((quota.counted, quota.per))) is not None:
            bucket.take(now, max(0.0, earlier.capacity - earlier.remaining(now)))
    return resized


def _fits(unit: str, period: float, wanted: float, scope: RateScope | None) -> bool:
    """Return whether a refusal that asks to wait `wanted` seconds can be for a quota of this unit and period."""
    unit = unit_of(unit)
    if scope is None or scope.period is None:
        return period <= _MINUTE and wanted <= period and (scope is None or scope.unit in (None, unit))
    return scope.period == period and scope.unit in (None, unit)


def _name(unit: str, seconds: float) -> str:
    return f"{unit_of(unit).replace('_', ' ')} per {_NAMES[seconds]}"


def _used_as_it_begins(unit: str, charge: Charge) -> int:
    """Return what an accepted call has used of a unit when its answer begins, at least: no output."""
    if unit == "requests":
        return charge.requests
    return charge.input_tokens if unit != "output_tokens" else 0


def _held(bucket: Bucket, now: float, unit: str, held: Sequence[HeldCharge]) -> float:
    """Return how much of a quota has to be left for calls that come back."""
    bucket.refill(now)
    amounts = [(getattr(call.charge, unit), call.back_at) for call in held]
    total: float = sum(amount for amount, back_at in amounts if bucket.must_hold(now, amount, back_at))
    return total


def _without_negatives(charge: Charge) -> Charge:
    """Return a charge without negative numbers, which would refill a quota: usage comes from the wire."""
    if charge.requests >= 0 and charge.input_tokens >= 0 and charge.output_tokens >= 0 and charge.tokens >= 0:
        return charge  # of the most that it may use, no more than is expected counts if it is negative
    return Charge(**{name: max(0, getattr(charge, name)) for name in Charge.__struct_fields__})


def _without_impossible_values(headers: RateLimitHeaders) -> RateLimitHeaders:
    """Return headers without values that no provider would send."""
    plausible = 1 <= (headers.limit or 0) <= _MAX_LIMIT
    if plausible and (headers.remaining or 0) >= 0 and 0 < (headers.reset or 0.0) <= _MAX_RESET:
        return headers
    limit = headers.limit if plausible else None
    remaining = None if headers.remaining is None else max(0, headers.remaining)
    reset = headers.reset if headers.reset is not None and 0 < headers.reset <= _MAX_RESET else None
    return RateLimitHeaders(unit=headers.unit, limit=limit, remaining=remaining, reset=reset)
