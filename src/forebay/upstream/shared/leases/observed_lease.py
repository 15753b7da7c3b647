"""The lease of this process on the limits that all processes of an account observe from a provider's headers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from forebay.interfaces import Charge
from forebay.quota import RateLimiter
from forebay.quota.observed import ObservedLimit
from forebay.upstream.shared.leases.lease import LedgerLease
from forebay.upstream.shared.leases.leased_bucket import LeasedBucket
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest, QuotaRequest, QuotaTerms
from forebay.upstream.shared.ledger.observed_messages import ObservedRemaining, ObservedReply, ObservedRequest

_SAME_END: Final = 0.1  # seconds by which two processes may differ over the end of a window


@dataclass(slots=True)
class _ObservedShare:
    """One limit: its share here, and the latest word of the ledger.

    Attributes:
        bucket: what this process may use of it.
        told: the latest reply; None before the first.
        told_at: when that came.
        window_end: by that reply, in seconds of this process's clock.
    """

    bucket: LeasedBucket
    told: ObservedReply | None = None
    told_at: float = -math.inf
    window_end: float | None = None


class ObservedLease:
    """The shares of this process in the limits that all processes of an account observe. It is an `ObservedShares`.

    Args:
        lease: on the account's ledger. Its lock guards this.
    """

    def __init__(self, lease: LedgerLease) -> None:
        self._lease = lease
        self._limiter: RateLimiter | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what is held: this process is a new member."""
        self._shares: dict[str, _ObservedShare] = {}
        for unit, observed in () if self._limiter is None else self._limiter.observed.items():
            observed.share = self.open(unit, observed)

    def bind(self, limiter: RateLimiter) -> RateLimiter:
        """Use the limits that an account observes, and return its rate limiter."""
        self._limiter = limiter
        self.reset()
        limiter.share_observed(self)
        return limiter

    def open(self, unit: str, observed: ObservedLimit) -> LeasedBucket:
        """See `ObservedShares`."""
        bucket = LeasedBucket(QuotaTerms(unit, observed.bucket.amount, observed.bucket.period), self._lease)
        self._shares[unit] = _ObservedShare(bucket)
        return bucket

    def _limits(self) -> Iterator[tuple[str, ObservedLimit, _ObservedShare]]:
        if self._limiter is not None:
            for unit, observed in self._limiter.observed.items():
                yield unit, observed, self._shares[unit]

    def buckets(self, now: float) -> Iterator[tuple[str, LeasedBucket]]:
        """Yield the unit and the share of each limit that calls wait for."""
        for unit, observed, share in self._limits():
            if observed.holds(now):
                yield unit, share.bucket

    def is_full(self, now: float) -> bool:
        """Return whether nothing is held, and nothing is to be reported."""
        return all(share.bucket.is_full(now) for share in self._shares.values())

    def needs_exchange(self, now: float) -> bool:
        """Return whether a share is low, or others need to know a new or changed limit, or a refusal."""
        if not self._shares:  # most accounts; each call asks twice
            return False
        return any(
            self._is_changed(observed, share)
            or self._doubt(now, observed, share) is not None
            or (observed.seen is not None and observed.seen.throttled)
            or (observed.holds(now) and share.bucket.is_low(now))
            for _, observed, share in self._limits()
        )

    # --- exchanges ---

    def report(
        self, now: float, charges: Sequence[Charge], *, leaving: bool
    ) -> tuple[tuple[QuotaRequest, ...], tuple[ObservedRequest, ...]]:
        """Return what to report of each limit, and to ask for, for calls that wait."""
        quotas, limits = [], []
        for unit, observed, share in self._limits():
            waits = observed.holds(now)
            amounts = [float(getattr(charge, unit)) for charge in charges] if waits else []
            first, waiting = (amounts[0], sum(amounts)) if amounts else (0.0, 0.0)
            quotas.append(share.bucket.report(now, first=first, waiting=waiting, leaving=leaving or not waits))
            limits.append(self._observed_request(now, unit, observed, share))
            observed.seen = None
        return tuple(quotas), tuple(limits)

    def _observed_request(
        self, now: float, unit: str, observed: ObservedLimit, share: _ObservedShare
    ) -> ObservedRequest:
        assert self._limiter is not None  # noqa: S101 - it has the limit
        bucket, seen = observed.bucket, observed.seen
        bucket.refill(now)  # so that the end of a window is in the future
        return ObservedRequest(
            unit=unit,
            amount=bucket.amount,
            seconds=bucket.period,
            epoch=-1 if share.told is None else share.told.epoch,
            ends_in=None if bucket.window_end is None else bucket.window_end - now,
            is_changed=self._is_changed(observed, share),
            under_way=float(self._limiter.under_way(unit)),
            seen=None
            if seen is None
            else ObservedRemaining(seen.remaining, max(0.0, now - seen.sent), seen.counted, seen.throttled),
            doubt=self._doubt(now, observed, share),
        )

    def _is_changed(self, observed: ObservedLimit, share: _ObservedShare) -> bool:
        """Return whether this process has learned something else than the ledger told it."""
        told, bucket = share.told, observed.bucket
        if told is None or (told.amount, told.seconds) != (bucket.amount, bucket.period):
            return True
        return not _is_same_end(bucket.window_end, share.window_end, bucket.period)

    def _doubt(self, now: float, observed: ObservedLimit, share: _ObservedShare) -> float | None:
        """Return the news that the limit was disproved, or is believed again; None if there is none."""
        told = share.told
        if told is None:
            return None
        known = told.doubt > 0.0 and now < share.told_at + told.doubt
        doubted = observed.doubt.seconds_disbelieved(now)
        return doubted if known != (doubted > 0.0) else None

    def receive(self, now: float, request: ExchangeRequest, reply: ExchangeReply) -> None:
        """Take over what was granted, and what others have learned."""
        limiter = self._limiter
        if limiter is None:
            return
        sent = {each.unit: each for each in request.observed}
        for told in reply.observed:
            self._adopt(now, limiter, sent.get(told.unit), told)
        granted = dict(
            zip((each.unit for each in reply.observed), reply.quotas[len(request.terms.quotas) :], strict=True)
        )
        for unit in sent:
            self._shares[unit].bucket.receive(now, granted.get(unit), reply.competing)

    def _adopt(self, now: float, limiter: RateLimiter, sent: ObservedRequest | None, told: ObservedReply) -> None:
        """Take over what others have learned of one limit, unless this process has learned something newer."""
        window_end = None if told.ends_in is None else now + told.ends_in
        observed = limiter.observed.get(told.unit)
        if observed is None:
            limiter.adopt_observed(now, told.unit, told.amount, told.seconds, window_end)
            observed = limiter.observed[told.unit]
        share = self._shares[told.unit]
        before = share.told
        is_news = before is None or before.epoch != told.epoch
        own = sent is not None and (sent.amount, sent.seconds) == (told.amount, told.seconds)
        if is_news and not (own and _is_same_end(observed.bucket.window_end, window_end, told.seconds)):
            limiter.adopt_observed(now, told.unit, told.amount, told.seconds, window_end)
        share.told, share.told_at, share.window_end = told, now, window_end
        bucket = share.bucket
        if (bucket.amount, bucket.period) != (told.amount, told.seconds):
            bucket.resize(told.amount, told.seconds)
        bucket.counted_by_all = told.counted
        was_doubted = before is not None and before.doubt > 0.0
        if (told.doubt > 0.0) != was_doubted and (told.doubt > 0.0) == observed.doubt.is_believed(now):
            observed.doubt.adopt(now, told.doubt)

    def keep_unreported(self) -> None:
        """Note that the latest request was not counted."""
        for share in self._shares.values():
            share.bucket.keep_unreported()


def _is_same_end(one: float | None, other: float | None, period: float) -> bool:
    """Return whether two ends are those of windows that reset at the same times, or both None."""
    if one is None or other is None:
        return one is other
    return abs(math.remainder(one - other, period)) <= _SAME_END
