"""The lease of this process on the ledger of one account: its quotas, its slots, and the limit of these."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Final, Protocol

from forebay.interfaces import Charge
from forebay.limit import Limit
from forebay.upstream.accounts.call_queue import CallQueue, QueuedCall
from forebay.upstream.accounts.latency import CallDurations
from forebay.upstream.accounts.refusals import RefusalControl
from forebay.upstream.shared.leases.call_stoppage import CallStoppage
from forebay.upstream.shared.leases.lease import ExchangeLink, LedgerLease
from forebay.upstream.shared.leases.leased_bucket import LEAST_LOOK, LeasedBucket
from forebay.upstream.shared.leases.leased_limit import LeasedLimit
from forebay.upstream.shared.leases.leased_stoppages import LeasedStoppages
from forebay.upstream.shared.leases.observed_lease import ObservedLease
from forebay.upstream.shared.leases.rate_lease import RateLease
from forebay.upstream.shared.ledger.messages import (
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    QuotaRequest,
    SlotReply,
    SlotRequest,
)

_LOOK_AHEAD: Final = 64  # waiting calls whose needs are added up
_PATIENCE: Final = 600.0  # seconds without a call after which the process leaves the ledger
_PATIENT: Final = 4.0  # times that of a process which has none
_SLOT_POLL: Final = (0.005, 0.05)  # seconds between two requests for a slot, at least and at most ...
_SLOT_POLL_SHARE: Final = 0.02  # ... and of the time for which a call holds one
_RAISED: Final = 0.05  # seconds after which others are told that the limit has risen
_REFUSED: Final = 0.01  # ... or that a call was refused, which the others count as evidence
_CALLED: Final = 30.0  # seconds after a call in which it is to be known soon that calls are let through again
_IDLE_SLOTS: Final = 0.05  # seconds after which free slots are returned


class CallDemand(Protocol):
    """The part of an `Account` that its lease looks at.

    Attributes:
        in_flight: calls under way.
        queue: the calls that wait.
        durations: how long calls take.
        stoppages: of its calls, which are shared, by kind.
    """

    in_flight: int
    queue: CallQueue
    durations: CallDurations
    stoppages: Mapping[str, CallStoppage]

    @property
    def refusals(self) -> RefusalControl:
        """The calls that were refused."""

    def is_paused(self, now: float) -> bool:
        """Return whether no call is sent now, whatever the ledger grants."""


class AccountLease(LedgerLease):
    """The lease of this process on the quotas and the slots of one account.

    Its lock is that of the account, which is held where a method does not say otherwise.

    Args:
        link: see `LedgerLease`.
        key: see `LedgerLease`.
        terms: see `LedgerLease`.
        patience: see `LedgerLease`.

    Attributes:
        buckets: the quotas, in the order of the terms.
        is_bounded: the ledger bounds the calls in flight.
        observed: the shares in the limits that headers show.
        rate: the share in the rate that is learned from refusals.
        called_at: when the latest call came, whatever became of it.
    """

    def __init__(self, link: ExchangeLink, key: str, terms: LedgerTerms, *, patience: float = _PATIENCE) -> None:
        self.buckets: tuple[LeasedBucket, ...] = ()
        self._asked_buckets: tuple[LeasedBucket, ...] = ()  # of the latest request
        self._demand: CallDemand | None = None
        self._look: Callable[[], None] = _do_nothing
        self._learned: LeasedLimit | None = None
        self._stoppages = LeasedStoppages({})
        self.is_bounded = terms.max_concurrent is not None or terms.limit is not None
        self.observed = ObservedLease(self)
        self.rate = RateLease()
        super().__init__(link, key, terms, patience=patience)
        self.buckets = self._asked_buckets = tuple(LeasedBucket(quota, self) for quota in terms.quotas)

    def reset(self) -> None:
        """See `LedgerLease`."""
        super().reset()
        for bucket in self.buckets:
            bucket.reset_lease()
        self.observed.reset()
        self.rate.reset()
        self._slots = SlotReply(allowed=0)
        self._others = 0  # calls that other processes may have in flight
        self._allowed = 0  # calls in flight
        self._peak = 0  # calls in flight at most, since the latest request
        self._counted = 0  # slots that this process holds, as the ledger has it
        self._retry_at = math.inf  # when to ask again for what was not granted
        self.called_at = -math.inf

    def change_terms(self, now: float, terms: LedgerTerms) -> None:
        """See `LedgerLease`. Calls of its account go on by the old quotas, as far as there are such ones yet."""
        known = {
            (each.unit, each.seconds): bucket for each, bucket in zip(self.terms.quotas, self.buckets, strict=True)
        }
        kept = [known.get((quota.unit, quota.seconds)) for quota in terms.quotas]
        self.buckets = tuple(
            LeasedBucket(quota, self) if bucket is None else bucket
            for quota, bucket in zip(terms.quotas, kept, strict=True)
        )
        for bucket in known.values():
            bucket.is_unbounded = bucket not in kept
        if terms.limit is None:
            self._learned = None
        self.is_bounded = terms.max_concurrent is not None or terms.limit is not None
        super().change_terms(now, terms)

    def bind(self, demand: CallDemand, lock: threading.RLock, look: Callable[[], None]) -> None:
        """Use the calls of an account, its lock, and what serves its queue."""
        self._demand, self.lock, self._look = demand, lock, look
        self._stoppages = LeasedStoppages(demand.stoppages)
        self.rate.bind(demand.refusals)

    def bind_limit(self, limit: Limit) -> Limit:
        """Return the limit of an account, learned together with other processes if the terms say so."""
        if self.terms.limit is None:
            return limit
        self._learned = LeasedLimit(limit, self._in_flight_elsewhere)
        return self._learned

    def bucket(self, unit: str, amount: float, seconds: float) -> LeasedBucket:
        """Return the bucket of a quota of the terms."""
        return next(
            bucket
            for quota, bucket in zip(self.terms.quotas, self.buckets, strict=True)
            if (quota.unit, quota.amount, quota.seconds) == (unit, amount, seconds)
        )

    # --- slots ---

    def _limit(self, now: float) -> int:
        """Return the calls that all processes may have in flight, where the ledger bounds them."""
        return self._learned.limit(now) if self._learned is not None else self.terms.max_concurrent or 0

    def slots(self, now: float) -> float:
        """Return how many calls may be in flight in this process now."""
        if not self.is_bounded:
            return math.inf
        if now < self.until:  # `is_leased` inlined: each call asks
            if self._demand is not None and self._stoppages.needs_probe(now):
                return min(self._allowed, self._demand.in_flight)
            return self._allowed if self._learned is None else self._left_by_cut(now, self._learned)
        return self._fair_slots(now) if self.is_away(now) else 0

    def _left_by_cut(self, now: float, limit: LeasedLimit) -> int:
        """Return the calls that may be in flight here. A cut of this process is taken from what it was allowed itself.

        The others may have all that is left, and go on until they know of the cut.
        """
        if not limit.is_cut_alone:
            return self._allowed
        return max(0, min(self._allowed, limit.limit(now) - self._others))

    def likely_slots(self, now: float) -> float:
        """Return how many calls this process can expect to have in flight, if it asks for them; at least one."""
        if not self.is_bounded:
            return math.inf
        if self.is_leased(now):
            return max(1, self._allowed + self._slots.free)
        return max(1, self._fair_slots(now) if self.is_away(now) else self._limit(now))

    def slot_wait(self, now: float, in_flight: int) -> float:
        """Return the seconds until a slot is here, if the ledger has one: 0, or those of an exchange."""
        return 0.0 if in_flight < self.slots(now) else self.link.exchange_time

    def exchange_wait(self) -> float:
        """Return the seconds until something is here that the ledger has."""
        return max(LEAST_LOOK, self.link.exchange_time)

    def record_end(self) -> None:
        """Note that a call has ended. Its slot is not used again if others wait for it and take turns."""
        if self._slots.give_back and self._demand is not None:
            self._allowed = min(self._allowed, self._demand.in_flight)

    def _fair_slots(self, now: float) -> int:
        """Return the share of this process while the store is away."""
        limit = self._limit(now)
        return limit // self.members + (self.rank < limit % self.members)

    def _in_flight_elsewhere(self, now: float, in_flight: int) -> int:
        """Return the calls in flight of other processes; while the store is away each is taken to have as many."""
        if self.is_leased(now):
            return self._others
        return (self.members - 1) * in_flight if self.is_away(now) else 0

    # --- exchanges ---

    def is_busy(self, now: float) -> bool:
        """See `LedgerLease`."""
        calls = self._demand is not None and (self._demand.in_flight or self._demand.queue.length)
        if calls or (now < self.called_at + _CALLED and self._stoppages.is_stopping(now)):
            return True
        if not self.observed.is_full(now):
            return True
        return not all(bucket.is_full(now) for bucket in self.buckets)

    def make_request(self, now: float, *, leaving: bool) -> ExchangeRequest:
        """See `LedgerLease`."""
        demand, self._asked_buckets = self._demand, self.buckets
        waiting: list[QueuedCall] = []
        if demand is not None and not leaving and demand.queue.length and not demand.is_paused(now):
            waiting = list(islice(demand.queue.in_order(), _LOOK_AHEAD))
        charges = [call.request.charge for call in waiting]
        limit = None
        slots = self._slot_request(now, demand.queue.length if demand is not None and waiting else 0)
        if self._learned is not None:
            lapsed = -math.inf < self.until < now
            limit = self._learned.report(now, members=max(1, self.members) if lapsed else 1)
        observed_quotas, observed = self.observed.report(now, charges, leaving=leaving)
        return self.new_request(
            leaving=leaving,
            priority=int(waiting[0].priority) if waiting else 0,
            quotas=tuple(
                _report(now, quota.unit, bucket, charges, leaving=leaving)
                for quota, bucket in zip(self.terms.quotas, self.buckets, strict=True)
            )
            + observed_quotas,
            slots=slots,
            limit=limit,
            stoppages=self._stoppages.report(now, 0 if demand is None or not waiting else demand.queue.length),
            observed=observed,
            rate=self.rate.report(now, 0 if demand is None else demand.queue.length),
        )

    def _slot_request(self, now: float, waiting: int) -> SlotRequest | None:
        """Return what to report of the slots, and to ask for, for `waiting` calls; None if the ledger bounds none.

        A slot that was in use since the request before is kept, though it may be free now: between two short calls it
        is, and would have to be asked for again. Not if others take turns for it.
        """
        if not self.is_bounded:
            return None
        in_use = 0 if self._demand is None else self._demand.in_flight
        wanted = in_use + min(waiting, max(1, self._limit(now)))
        if not self.is_leased(now):
            self._allowed = 0
        else:
            if self._learned is not None:
                self._allowed = self._left_by_cut(now, self._learned)
            if not self._slots.give_back:
                wanted = max(wanted, min(self._peak, self._allowed))
        self._peak = in_use
        self._allowed = min(self._allowed, wanted)
        return SlotRequest(in_use=in_use, held=max(in_use, self._allowed), wanted=wanted)

    def receive(self, now: float, request: ExchangeRequest, reply: ExchangeReply) -> None:
        """See `LedgerLease`."""
        quotas = reply.quotas[: len(self._asked_buckets)] or (None,) * len(self._asked_buckets)
        self.observed.receive(now, request, reply)
        self.rate.receive(now, request, reply)
        for bucket, quota in zip(self._asked_buckets, quotas, strict=True):
            bucket.receive(now, quota, reply.competing)
        retry_in = math.inf if reply.retry_in is None else reply.retry_in
        if reply.slots is not None and request.slots is not None:
            self._slots = reply.slots
            self._allowed = reply.slots.allowed
            self._counted = max(request.slots.held, self._allowed)
            if reply.retry_in is None and reply.slots.allowed < request.slots.wanted:
                retry_in = self._slot_poll()
        if self._learned is not None and request.limit is not None and reply.limit is not None:
            self._learned.receive(now, request.limit, reply.limit)
            self._others = reply.limit.others
            retry_in = max(retry_in, reply.limit.silence)
        if request.stoppages is not None and reply.stoppages is not None:  # else there is nothing new
            alone = self.members <= 1
            self._stoppages.receive(now, self.until, request.stoppages, reply.stoppages, alone=alone)
        self._retry_at = now + retry_in

    def keep_unreported(self) -> None:
        """See `LedgerLease`."""
        for bucket in self._asked_buckets:
            bucket.keep_unreported()
        self.observed.keep_unreported()
        self._allowed = 0
        self._stoppages.keep_unreported()

    def _slot_poll(self) -> float:
        """Return the seconds after which to ask for a slot again."""
        least, most = _SLOT_POLL
        if self._allowed:
            least *= _PATIENT
        held = 0.0 if self._demand is None else self._demand.durations.held
        return min(most, max(least, _SLOT_POLL_SHARE * held))

    def update(self, now: float) -> None:
        """See `LedgerLease`. Each call asks twice, and most find that nothing is needed."""
        demand = self._demand
        if demand is None:
            return
        self.rate.set_share(leased=now < self.until, members=self.members)
        self._peak = max(self._peak, demand.in_flight)
        if self._pending is not None or self.due <= now:
            return  # the exchange that is under way, or due, brings what is needed
        when = self._next_exchange(now, demand)
        if when < self.due and not self.link.is_failing():  # the next attempt does, if it is failing
            self.ask_at(when)

    def _next_exchange(self, now: float, demand: CallDemand) -> float:
        """Return when the next exchange is needed, for calls and for what is to be told; infinity for never."""
        if now >= self.until:
            return now if demand.queue.length or self.is_busy(now) else math.inf
        for bucket in self.buckets:
            if bucket.is_low(now):
                return now
        if self.observed.needs_exchange(now) or self.rate.has_news(demand.queue.length):
            return now
        when = self._next_for_calls(now, demand) if demand.queue.length else math.inf
        if self._learned is not None and self._learned.has_news(now):
            if self._learned.is_cut(now):
                return now
            when = min(when, now + _RAISED)
        if self._learned is not None and self._learned.has_refusals:
            when = min(when, now + _REFUSED)
        when = min(when, self._stoppages.ask_at(now, waiting=demand.queue.length > 0))
        if self.is_bounded and demand.in_flight < self._counted:  # `_allowed` is never more than that
            if self._allowed < self._counted:  # others wait for what was given back
                return now
            when = min(when, now + _IDLE_SLOTS)
        return when

    def _next_for_calls(self, now: float, demand: CallDemand) -> float:
        """Return when to ask for what the first waiting call needs; infinity if it waits for something else."""
        head = demand.queue.head()
        if head is None or demand.is_paused(now):
            return math.inf
        charge: Charge = head[2].request.charge
        if not self._is_short_for(now, demand, charge):
            return math.inf
        return self._retry_at if self._has_asked_for(now, charge) else now

    def _is_short_for(self, now: float, demand: CallDemand, charge: Charge) -> bool:
        """Return whether a call waits for the ledger."""
        if demand.in_flight >= self.slots(now):
            return True
        return any(bucket.time_until(now, getattr(charge, unit)) > 0.0 for unit, bucket in self._all_buckets(now))

    def _all_buckets(self, now: float) -> Iterator[tuple[str, LeasedBucket]]:
        """Yield the unit and the bucket of each quota that calls wait for."""
        for quota, bucket in zip(self.terms.quotas, self.buckets, strict=True):
            yield quota.unit, bucket
        yield from self.observed.buckets(now)

    def _has_asked_for(self, now: float, charge: Charge) -> bool:
        """Return whether the ledger was asked for such a call, and has not granted it yet."""
        if self._retry_at == math.inf:
            return False
        return all(getattr(charge, unit) <= bucket.asked for unit, bucket in self._all_buckets(now))

    def wake(self) -> None:
        """See `LedgerLease`."""
        self._look()


def _do_nothing() -> None:
    """Do nothing: no account is bound yet."""


def _report(now: float, unit: str, bucket: LeasedBucket, charges: list[Charge], *, leaving: bool) -> QuotaRequest:
    """Return what to report of one quota, and to ask for, for calls that wait."""
    amounts = [float(getattr(charge, unit)) for charge in charges]
    return bucket.report(now, first=amounts[0] if amounts else 0.0, waiting=sum(amounts), leaving=leaving)
