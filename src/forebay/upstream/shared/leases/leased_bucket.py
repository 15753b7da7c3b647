"""The level of one quota of a shared account, as far as this process may use it: a chunk that it leases."""

from __future__ import annotations

import math
from typing import Final

from forebay.quota.bucket import EPSILON, Bucket
from forebay.upstream.shared.leases.lease import LedgerLease
from forebay.upstream.shared.ledger.messages import QuotaReply, QuotaRequest, QuotaTerms

_CHUNK: Final = 0.02  # of the amount: what is leased at most beyond what waiting calls need
_CHUNK_TIME: Final = 0.25  # seconds that a chunk lasts, at the present pace
_LOW: Final = 0.5  # of the chunk, below which another one is asked for
_IDLE: Final = 1.0  # seconds without use after which the chunk is returned
_MEMORY: Final = 1.0  # seconds over which the use is measured

LEAST_LOOK: Final = 0.005
"""Seconds that a call waits at least for what the ledger has."""


class LeasedBucket(Bucket):
    """The chunk of one quota that this process leases.

    What calls take, return and owe changes the chunk, and is reported with the next exchange. While the store is away
    it is a bucket of its own, with the fair share of the rate, which is empty at first.

    Args:
        terms: of the quota.
        lease: on the ledger that has the quota.

    Attributes:
        asked: what the first waiting call needed when it was last asked for.
        counted_by_all: the use that the ledger has counted, if it does, at the latest reply.
        missing: from the quota, if the ledger is opened by this process; 0 for nothing.
        is_unbounded: the ledger has no such quota any more.
    """

    __slots__ = (
        "_away",
        "_away_used",
        "_call",
        "_competing",
        "_granted",
        "_known_at",
        "_known_level",
        "_known_wait",
        "_lease",
        "_low_mark",
        "_measured_at",
        "_pace",
        "_reported",
        "_returning",
        "_taken",
        "_taken_at",
        "_used",
        "asked",
        "counted_by_all",
        "is_unbounded",
        "missing",
    )

    def __init__(self, terms: QuotaTerms, lease: LedgerLease) -> None:
        strict = terms.unit.endswith("_at_most")
        super().__init__(terms.amount, terms.seconds, -math.inf, strict=strict)
        self._lease = lease
        self.missing = 0.0
        self.is_unbounded = False
        self.reset_lease()

    def reset_lease(self) -> None:
        """Forget what is held: this process is a new member."""
        self.held = 0.0
        self.asked = 0.0
        self.counted_by_all = 0.0
        self._granted = 0.0  # held by this process, as the ledger has it
        self._used = 0.0  # of that; not reported yet
        self._reported = 0.0  # by the request that is under way
        self._returning = 0.0  # by that request
        self._low_mark = 0.0  # what is usable when another chunk is asked for
        self._call = 0.0  # what the latest call took
        self._taken = 0.0  # since the pace was measured
        self._taken_at = self._measured_at = -math.inf
        self._pace = 0.0  # used in a second
        self._known_level = self.amount  # of the ledger, at the latest reply
        self._known_wait = 0.0
        self._known_at = -math.inf
        self._competing = 1
        self._away: Bucket | None = None  # while the store is away
        self._away_used = 0.0

    # --- the bucket ---

    def usable(self, now: float) -> float:
        """Return what calls may take now; below 0 is a debt."""
        if self.is_unbounded:
            return self.amount
        if now < self._lease.until:  # `is_leased` inlined: a hot path
            return self._granted - self._used - self._returning - self.held
        if (away := self._own_share(now)) is not None:
            away.refill(now)
            return away.level
        return 0.0

    def wait(self, now: float, amount: float, ahead: float = 0.0, held: float = 0.0) -> float:
        """Return the seconds until `amount` can be taken here. See `Bucket`."""
        usable = self._granted - self._used - self._returning - self.held
        if now < self._lease.until and amount + ahead + held <= usable and amount <= self.amount:
            return 0.0  # as `Bucket` finds for most calls in several steps
        return super().wait(now, amount, ahead, held)

    def refill(self, now: float) -> None:
        """Set the level to what calls may take now."""
        self.level = self.usable(now)
        self.updated_at = now

    def remaining(self, now: float) -> float:
        """Return what is left of the whole quota, by the latest reply, and of what this process holds."""
        self.refill(now)
        return min(self.capacity, self.level + max(0.0, self._estimated_level(now)))

    def time_until(self, now: float, amount: float) -> float:
        """Return the seconds until `amount` is expected to be available here: an exchange, and the time to refill."""
        missing = amount - self.usable(now)
        if missing <= EPSILON * self.amount:
            return 0.0
        if (away := self._own_share(now)) is not None:
            return away.time_until(now, min(amount, away.capacity))
        exchange = max(LEAST_LOOK, self._lease.link.exchange_time)
        short = missing - max(0.0, self._estimated_level(now))
        refill = short * self._competing / self.rate if short > 0.0 else 0.0
        return max(exchange, refill, self._known_at + self._known_wait - now)

    def lacks(self, now: float, amount: float) -> bool:
        """Return whether `amount` has to wait because the ledger has not so much, and can ever have."""
        return self._known_wait > 0.0 and amount <= self.amount and self.usable(now) < amount

    @property
    def is_sole(self) -> bool:
        """True if no other process takes from the same quota."""
        return self._lease.members <= 1

    @property
    def counted(self) -> float:
        """The use of all processes, as far as it is known here."""
        return self.counted_by_all + self._used

    def level_in(self, now: float, seconds: float) -> float:  # noqa: ARG002 - others may use what is refilled
        """Return what calls may take now: nothing more is certain."""
        return self.usable(now)

    def is_full(self, now: float) -> bool:  # noqa: ARG002 - as of any bucket
        """Return whether nothing is held, and nothing is to be reported."""
        return not (self._granted or self._used or self.held or self._away_used)

    def take(self, now: float, amount: float) -> None:
        """Take `amount`, into debt if necessary."""
        self._taken += amount
        self._taken_at = now
        self._use(now, amount)

    def reserve(self, now: float, amount: float) -> None:
        """Take `amount` for a call that is sent. It ends by `end`, once."""
        self._call = amount
        self._taken += amount
        self._taken_at = now
        if not self.strict:
            self._use(now, amount)
            return
        self.held += amount
        if not self._lease.is_leased(now) and (away := self._own_share(now)) is not None:
            away.take(now, amount)

    def end(self, now: float, reserved: float, used: float) -> None:
        """Replace what a call had reserved by what it used: a surplus is refunded, a deficit becomes a debt."""
        if not self.strict:
            self._use(now, used - reserved)
            return
        self.held = max(0.0, self.held - reserved)
        self._use(now, used)
        if self._away is not None:
            self._away.refund(now, reserved)

    def refund(self, now: float, amount: float) -> None:
        """Return `amount`."""
        self._use(now, -amount)

    def lower_to(self, level: float) -> None:
        """Count as used what the whole quota has above `level`: the provider has less, by a refusal."""
        self._used += max(0.0, self._known_level + max(0.0, self._granted - self._used) - level)
        self._known_level = min(self._known_level, level)

    def _use(self, now: float, amount: float) -> None:
        """Count `amount` as used; below 0 it is returned."""
        if now < self._lease.until or (away := self._own_share(now)) is None:  # `is_leased` inlined: a hot path
            self._used += amount
            return
        self._away_used += amount
        if amount >= 0.0:
            away.take(now, amount)
        else:
            away.refund(now, -amount)

    def _own_share(self, now: float) -> Bucket | None:
        """Return the share of this process while the store is away; None if it is not, or this process has none."""
        if not self._lease.is_away(now):
            return None
        if self._away is None:
            self._away = Bucket(self.amount / self._lease.members, self.period, now)
            self._away.level = 0.0
        return self._away

    def _estimated_level(self, now: float) -> float:
        """Return the level of the ledger, by the latest reply and the time since then."""
        passed = max(0.0, now - self._known_at)
        return self.capacity if passed == math.inf else min(self.capacity, self._known_level + passed * self.rate)

    # --- exchanges ---

    def report(self, now: float, *, first: float, waiting: float, leaving: bool) -> QuotaRequest:
        """Return what to report and to ask for.

        Args:
            now: the time.
            first: what the first waiting call needs; 0 if none waits.
            waiting: what the waiting calls need, the first included.
            leaving: everything is returned.
        """
        self._measure(now)
        self.asked = first = min(first, self.amount)
        chunk = min(_CHUNK * self.amount, max(self._pace * _CHUNK_TIME, waiting))
        if leaving or chunk < self._call or (not waiting and now - self._taken_at >= _IDLE):
            chunk = 0.0  # no call could use it here, and it would be missing elsewhere
        target = 0.0 if leaving else max(first, chunk)
        needed = self.held + first if first and not leaving else 0.0
        wanted = self.held + target
        self._reported = self._used
        request = QuotaRequest(used=self._used, reserved=self.held, needed=needed, wanted=wanted, missing=self.missing)
        balance = max(0.0, self._granted - self._used)
        self._returning = balance - request.kept(balance)
        return request

    def receive(self, now: float, reply: QuotaReply | None, competing: int) -> None:
        """Take over what was granted; None: nothing, since this process has left."""
        self._used -= self._reported
        self._reported = self._returning = 0.0
        self._granted = 0.0 if reply is None else reply.held
        if self._away is not None:
            # What was refilled since it was used is not missing any more.
            self._away.refill(now)
            self._used += min(self._away_used, self._away.capacity - self._away.level)
            self._away, self._away_used = None, 0.0
        self._low_mark = _LOW * max(0.0, self._granted - self._used - self.held)
        if reply is not None:
            self._known_level, self._known_wait, self._known_at = reply.level, reply.wait, now
            self._competing = max(1, competing)

    def keep_unreported(self) -> None:
        """Note that the latest request was not counted."""
        self._reported = self._returning = 0.0
        self._granted = 0.0

    def is_low(self, now: float) -> bool:
        """Return whether the chunk runs out soon, or there is a debt to report."""
        if now < self._lease.until:  # as `usable`, without the cost of a call
            return self._granted - self._used - self._returning - self.held < self._low_mark
        return self.usable(now) < self._low_mark

    def _measure(self, now: float) -> None:
        """Measure the pace at which calls use the quota, over about a second."""
        passed = now - self._measured_at
        if passed <= 0.0:
            return
        passed = min(passed, _MEMORY)  # the first time, and after a time without exchanges
        self._pace += (1.0 - math.exp(-passed / _MEMORY)) * (self._taken / passed - self._pace)
        self._taken, self._measured_at = 0.0, now
