"""All the quotas of one account: may a call go now, what does it take, what comes back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from forebay.errors import InvalidSetting, ReservationClosed
from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota.bucket import Bucket
from forebay.quota.observed import ObservedLimit, QuotaSnapshot
from forebay.quota.quota import PERIODS, UNITS, Quota

RETRY_AFTER: Final = "retry-after"
"""What binds while a provider has asked us to hold."""

_MINUTE: Final = PERIODS["minute"]
_LONGEST_RESET: Final = 2 * PERIODS["day"]
_LARGEST: Final = 10**10  # many times the largest limit that is sold; what claims more binds nobody
_ROOMY: Final = 0.5  # of a quota: while so much is left of each, nobody can have used one up in the next moment
_MOMENT: Final = 1 / 600  # of a period ...
_LONGEST_MOMENT: Final = 0.1  # ... in seconds, at most
_NAMES: Final = {seconds: name for name, seconds in PERIODS.items()}


class QuotaDelay(NamedTuple):
    """How long a call must wait.

    Attributes:
        seconds: 0 is now; infinity never, for the call is larger than a whole bucket.
        binding: which quota makes it wait longest, such as ``"requests per minute"``; None if it need not wait.
    """

    seconds: float
    limited_by: str | None


class QuotaLevel(msgspec.Struct, frozen=True):
    """What one quota has left, for people to look at.

    Attributes:
        name: such as ``"requests per minute"``.
        amount: granted in a period.
        left: of it, now; negative is a debt.
        learned: whether it comes from the provider's headers.
    """

    name: str
    amount: float
    remaining: float
    learned: bool


class QuotaHeadroom(NamedTuple):
    """What one quota has beyond what a call needs that waits.

    Attributes:
        beyond: so much is there by the time at which it could go; below zero is what it waits for.
        unit: what it counts.
        left: of it, at that time, were it to grow without a bound.
        full: what it holds at most; who finds that has lost nothing.
    """

    spare: float
    unit: str
    level: float
    capacity: float


class QuotaReservation(msgspec.Struct, eq=False):
    """What one call holds of the quotas until it is settled, released or refused: exactly one of them, once."""

    number: int
    reserved_at: float
    charge: Charge
    snapshots: dict[
        str, QuotaSnapshot
    ]  # how the quotas stood that were learned from headers, where this call counts in them


class _Given(NamedTuple):
    unit: str
    name: str
    bucket: Bucket


class RateLimiter:
    """The quotas of one account: those that were given, and those that its provider's headers tell of.

    Pure. Its holder brings the time, in seconds of a clock that does not go back, and where threads share it the lock.
    Should the clock go back after all, what was there stays; if it leaps, each quota is full at most.

    Args:
        quotas: several for one unit all hold.
    """

    def __init__(self, quotas: Iterable[Quota] = ()) -> None:
        quotas = tuple(quotas)
        for quota in quotas:
            if not isinstance(quota, Quota):
                expected = "made of Quota objects, for example Quota(requests=500, per='minute')"
                raise InvalidSetting(owner="Quotas", name="quotas", value=quota, expected=expected)
        self._given = tuple(
            _Given(quota.unit, _name(quota.unit, quota.seconds), Bucket(float(quota.amount), quota.seconds, -math.inf))
            for quota in quotas
        )
        self._heard: dict[str, ObservedLimit] = {}
        self._open: dict[int, QuotaReservation] = {}  # by their number, in the order in which they were sent
        self._numbers = itertools.count().__next__
        self._under_way = dict.fromkeys(UNITS, 0)  # what the open ones hold in all
        self._hold_until = -math.inf
        self._quiet_until = -math.inf
        self._now = -math.inf

    def quota_too_small_for(self, now: float, charge: Charge) -> str | None:
        """The name of a quota that is smaller than this charge at its fullest, or None: so it can go some time."""
        for unit, name, bucket in self._given:
            if getattr(charge, unit) > bucket.amount:
                return name
        for unit, heard in self._heard.items():
            if getattr(charge, unit) > heard.bucket.amount and not heard.is_stale(now):
                return _name(unit, heard.bucket.period)
        return None

    def wait(self, now: float, charge: Charge, *, ahead: Charge | None = None) -> QuotaDelay:
        """How long until a call of this charge could go, if calls of `ahead` in all go first, and what it waits for."""
        self._pass(now)
        longest, binding = 0.0, None
        if self._hold_until > now:
            longest, binding = self._hold_until - now, RETRY_AFTER
        for unit, name, bucket in self._given:
            seconds = bucket.wait(now, getattr(charge, unit), 0 if ahead is None else getattr(ahead, unit))
            if seconds > longest:
                longest, binding = seconds, name
        for unit, heard in self._heard.items():
            amount, bucket = getattr(charge, unit), heard.bucket
            if amount > bucket.amount and heard.is_stale(now):
                continue  # a limit that was heard of long ago must not lock for ever: this call will tell
            seconds = bucket.wait(now, amount, 0 if ahead is None else getattr(ahead, unit))
            if seconds > longest:
                longest, binding = seconds, _name(unit, bucket.period)
        return QuotaDelay(longest, binding)

    def headroom(self, now: float, charge: Charge) -> list[QuotaHeadroom]:
        """What others may take now without delaying a call of this charge that waits: the scarcest comes first.

        Before the earliest moment at which it could go, even if calls under way gave back all that they hold, what
        others take may come back. A window that has turned by then is not told of.
        """
        self._pass(now)
        buckets = [(given.unit, given.bucket) for given in self._given]
        buckets += [(unit, heard.bucket) for unit, heard in self._heard.items()]
        seconds = max(0.0, self._hold_until - now)
        for unit, bucket in buckets:
            amount = getattr(charge, unit)
            if 0 < amount <= bucket.amount:
                needed = min(amount + bucket.margin, bucket.capacity)
                seconds = max(seconds, bucket.time_until(now, needed - self._under_way[unit]))
        spare = []
        for unit, bucket in buckets:
            left, full = bucket.level_in(now, seconds) - bucket.margin, bucket.capacity - bucket.margin
            if left < math.inf:
                spare.append(QuotaHeadroom(left - min(getattr(charge, unit), full), unit, left, full))
        return sorted(spare)

    def reserve(self, now: float, charge: Charge) -> QuotaReservation:
        """Take what a call needs, as it is sent; into debt if its holder did not ask `wait`."""
        self._pass(now)
        charge = _sane_charge(charge)
        for unit, _, bucket in self._given:
            bucket.take(now, getattr(charge, unit))
        under_way = self._under_way
        for unit in under_way:
            under_way[unit] += getattr(charge, unit)
        marks = {}
        for unit, heard in self._heard.items():
            heard.bucket.take(now, getattr(charge, unit))
            marks[unit] = heard.snapshot(under_way[unit])
        reservation = QuotaReservation(self._numbers(), now, charge, marks)
        self._open[reservation.number] = reservation
        return reservation

    def settle(self, now: float, reservation: QuotaReservation, used: Charge) -> None:
        """The call has ended and used this: what it reserved too much comes back, what it used too much is a debt.

        Raises:
            ReservationClosed: it was settled, released or refused before.
        """
        self._close(now, reservation)
        used = _sane_charge(used)
        for unit, _, bucket in self._given:
            _adjust(bucket, now, getattr(reservation.charge, unit) - getattr(used, unit))
        for unit, heard in self._heard.items():
            spare = getattr(reservation.charge, unit) - getattr(used, unit)
            mark = reservation.snapshots.get(unit)
            if mark is None or (spare > 0 and mark.window_number != heard.bucket.window_number):
                continue  # that window has passed, and with it what was reserved in it
            if spare < 0 and unit != "output_tokens" and heard.latest_sent >= reservation.reserved_at:
                continue  # headers of this call, or a later one, have counted it already
            _adjust(heard.bucket, now, spare)

    def release(self, now: float, reservation: QuotaReservation) -> None:
        """The call never left: everything comes back.

        Raises:
            ReservationClosed: it was settled, released or refused before.
        """
        self._close(now, reservation)
        for unit, _, bucket in self._given:
            bucket.refund(now, getattr(reservation.charge, unit))
        for unit, heard in self._heard.items():
            mark = reservation.snapshots.get(unit)
            if mark is not None:
                heard.bucket.refill(now)
                if mark.window_number == heard.bucket.window_number:
                    heard.bucket.refund(now, getattr(reservation.charge, unit))

    def record_throttled(
        self,
        now: float,
        reservation: QuotaReservation,
        retry_after: float | None = None,
        headers: Sequence[RateLimitHeaders] = (),
    ) -> None:
        """The provider refused the call for its rate: it took nothing, and until `retry_after` nothing more is sent.

        Args:
            now: when the refusal came.
            reservation: of the call; it is released.
            retry_after: seconds, or None if that was not said. Longer than the longest period here is not believed.
            notices: what the refusal's headers said; they are heard here, not by `hear`.

        Raises:
            ReservationClosed: it was settled, released or refused before.
        """
        self.release(now, reservation)
        self.update_from_headers(now, headers, reservation, throttled=True)
        wanted = 0.0 if retry_after is None or not retry_after > 0 else min(retry_after, self._longest_period())
        self._hold_until = max(self._hold_until, now + wanted)
        if wanted or not self._heard:
            self._empty_tightest(now, reservation.charge, wanted)

    def needs_headers(self, now: float) -> bool:
        """Whether what the headers of a success say may matter: else they need not be read, nor given to `hear`.

        A moment after others were heard that left half of everything they can tell nothing that changes a decision.
        Those of a refusal always matter.
        """
        return now >= self._quiet_until

    def update_from_headers(
        self, now: float, headers: Sequence[RateLimitHeaders], reservation: QuotaReservation, *, throttled: bool = False
    ) -> None:
        """The headers of a call's answer have come; before or after it was settled.

        Quotas that were not given are learned from them; of all that they tell of, `remaining` and `reset` correct what
        we thought. A call that was `refused` has not been counted.
        """
        self._pass(now)
        sent = min(reservation.reserved_at, now)
        for told in headers:
            notice = _sane_notice(told)
            unit = notice.unit
            if unit not in self._under_way:
                continue
            amount = getattr(reservation.charge, unit)
            heard = self._heard.get(unit)
            if heard is None and (throttled or (notice.limit or math.inf) >= amount):  # else it was not let in by that
                heard = self._meet(now, notice, reservation)
            if heard is not None:
                amount = amount if throttled else 0.0
                heard.update_from_headers(
                    now, notice, sent=sent, snapshot=reservation.snapshots.get(unit), returned=amount
                )
        if headers:  # silence tells nothing, and must not go on for ever
            self._quiet_until = now + self._moment()

    def levels(self, now: float) -> list[QuotaLevel]:
        """What each quota has left."""
        self._pass(now)
        buckets = [(name, bucket, False) for _, name, bucket in self._given]
        buckets += [(_name(unit, heard.bucket.period), heard.bucket, True) for unit, heard in self._heard.items()]
        for _, bucket, _ in buckets:
            bucket.refill(now)
        return [QuotaLevel(name, bucket.amount, bucket.level, learned) for name, bucket, learned in buckets]

    def _pass(self, now: float) -> None:
        if now < self._now:  # back: what was to come is as far away as before
            back = now - self._now
            self._hold_until += back
            self._quiet_until = -math.inf
            for heard in self._heard.values():
                heard.shift_clock(back)
        self._now = now

    def _close(self, now: float, reservation: QuotaReservation) -> None:
        if self._open.pop(reservation.number, None) is not reservation:
            raise ReservationClosed
        self._pass(now)
        under_way = self._under_way
        for unit in under_way:
            under_way[unit] -= getattr(reservation.charge, unit)

    def _meet(self, now: float, notice: RateLimitHeaders, reservation: QuotaReservation) -> ObservedLimit | None:
        """A quota is told of for the first time."""
        unit = notice.unit
        given = [bucket for of, _, bucket in self._given if of == unit]
        limit = notice.limit or (int(given[0].amount) if given else None)
        if limit is None or notice.remaining is None:
            return None
        per = next((bucket.period for bucket in given if bucket.amount == limit), _MINUTE)
        heard = self._heard[unit] = ObservedLimit(limit, per, now, min(notice.remaining, limit))
        reservation.snapshots[unit] = heard.snapshot(0.0)
        for other in self._open.values():  # what was sent later is not in `remaining` yet, nor is output under way
            if other.number > reservation.number or unit == "output_tokens":
                heard.bucket.take(now, getattr(other.charge, unit))
                other.snapshots[unit] = heard.snapshot(self._under_way[unit])
        return heard

    def _moment(self) -> float:
        """Seconds for which the headers of successes are not missed."""
        moment = _LONGEST_MOMENT if self._heard else 0.0
        for heard in self._heard.values():
            bucket = heard.bucket
            if bucket.level < _ROOMY * bucket.amount:
                return 0.0
            moment = min(moment, _MOMENT * bucket.period)
        return moment

    def _longest_period(self) -> float:
        buckets = [*(given.bucket for given in self._given), *(heard.bucket for heard in self._heard.values())]
        return max((bucket.period for bucket in buckets), default=_MINUTE)

    def _empty_tightest(self, now: float, charge: Charge, wanted: float) -> None:
        """Somewhere there is less than we thought: most likely where we thought that there was least.

        There must be just enough for the call again in `wanted` seconds.
        """
        tightest: tuple[float, float, Bucket, ObservedLimit | None, float] | None = None
        candidates: list[tuple[str, Bucket, ObservedLimit | None]] = [
            (unit, bucket, None) for unit, _, bucket in self._given
        ]
        candidates += [(unit, heard.bucket, heard) for unit, heard in self._heard.items()]
        for unit, bucket, heard in candidates:
            amount = getattr(charge, unit)
            key = (bucket.time_until(now, amount), -bucket.level / bucket.amount)
            if amount and (tightest is None or key > tightest[:2]):
                tightest = (*key, bucket, heard, amount)
        if tightest is None:
            return
        _, _, bucket, heard, amount = tightest
        believed = max(-bucket.amount, amount - wanted * bucket.rate) if bucket.window_end is None else 0.0
        if bucket.level > believed:
            if heard is None:
                bucket.level = believed
            else:
                heard.lower(bucket.level - believed)


def _name(unit: str, seconds: float) -> str:
    return f"{unit.replace('_', ' ')} per {_NAMES[seconds]}"


def _adjust(bucket: Bucket, now: float, spare: float) -> None:
    if spare >= 0:
        bucket.refund(now, spare)
    else:
        bucket.take(now, -spare)


def _sane_charge(charge: Charge) -> Charge:
    """A charge without what would refill: usage comes from the wire."""
    if min(charge.requests, charge.input_tokens, charge.output_tokens, charge.tokens) >= 0:
        return charge
    return Charge(**{unit: max(0, getattr(charge, unit)) for unit in UNITS})


def _sane_notice(notice: RateLimitHeaders) -> RateLimitHeaders:
    """A notice without what cannot be meant."""
    sane = 1 <= (notice.limit or 0) <= _LARGEST
    if sane and (notice.remaining or 0) >= 0 and 0 < (notice.reset or 0.0) <= _LONGEST_RESET:
        return notice
    limit = notice.limit if sane else None
    remaining = None if notice.remaining is None else max(0, notice.remaining)
    reset = notice.reset if notice.reset is not None and 0 < notice.reset <= _LONGEST_RESET else None
    return RateLimitHeaders(unit=notice.unit, limit=limit, remaining=remaining, reset=reset)
