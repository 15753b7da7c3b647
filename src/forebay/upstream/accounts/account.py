"""An account: one decision over slots, request and token rates, money and breaker, and the queue in front of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import msgspec

from forebay._text import format_duration
from forebay.admission import RetryAfterSchedule
from forebay.breaker import Breaker, BreakerState
from forebay.interfaces import Outcome, RateLimitHeaders
from forebay.limit import Limit
from forebay.quota import HeldCharge, RateLimiter
from forebay.task import Priority
from forebay.upstream.accounts.bypass import find_bypass
from forebay.upstream.accounts.call_queue import CallQueue, QueuedCall
from forebay.upstream.accounts.fair_order import FairOrder
from forebay.upstream.accounts.kept_places import KeptPlaces
from forebay.upstream.accounts.latency import CallDurations, LatencyModel
from forebay.upstream.accounts.open_answers import OpenAnswers
from forebay.upstream.accounts.outage_detector import OutageDetector
from forebay.upstream.accounts.refusals import RefusalControl
from forebay.upstream.accounts.spend_suspension import SpendSuspension, Suspended
from forebay.upstream.accounts.timeout_evidence import TimeoutEvidence
from forebay.upstream.call_request import (
    Admitted,
    CallBudget,
    CallOutcome,
    CallRecord,
    CallRequest,
    Permit,
    Prospect,
    Queued,
    Rejected,
    SpendReservation,
    scale_charge,
)
from forebay.upstream.shared.leases.account_lease import AccountLease
from forebay.upstream.shared.leases.call_stoppage import CallStoppage
from forebay.upstream.shared.leases.lease import SHARED_ACCOUNT
from forebay.upstream.shared.leases.leased_breaker import LeasedBreaker
from forebay.upstream.shared.leases.leased_pause import LeasedPause
from forebay.upstream.shared.leases.leased_suspension import LeasedSuspension

_LOST_LOOK: Final = 1.0  # seconds until permits are looked for that nobody can take, while calls wait
_QUEUE_BOUND: Final = 10_000  # calls that may wait, however short the expected wait is
_ACCEPTED_AFTER: Final = 1.0  # seconds after which a call that was not throttled counts as accepted
_DEADLINE_SLACK: Final = 0.01  # seconds: a call that is cut off so shortly before its deadline ran out of time
_LONGEST_WAIT: Final = 1.5  # times max_wait: a call that waits for longer, against all expectation, is rejected
_RETURN_TIME: Final = 3.0  # seconds in which other processes return what they have leased and do not use
_UNREAD_SHARE: Final = 0.5  # of max_wait: how long nobody may read an answer whose slot others wait for
_PAUSED: Final = "retry-after"  # what a call waits for while nothing is sent because calls were refused
_LEARNED_RATE: Final = "learned rate"  # ... while a rate that was learned from refusals spaces the calls
_UNCERTAIN: Final = ("concurrency", "nothing", _PAUSED, _LEARNED_RATE)  # what is waited for for an unknown time
_NESTED_RETRY: Final = 1.0  # seconds after which a nested call may find a slot, if fewer callers nest calls
_WAITS_FOR_ITSELF: Final = (
    "it waits for a slot that its own caller holds, and all others are held by such callers: a guarded function, or a"
    " block with a permit, must make no calls through the same upstream (guard the function, or bind its client)"
)
_CALLS_OF_A_SLOT: Final = 60  # in a minute: not by measured latency, or what was fast once would get all calls
_PROBE_DURATION: Final = 1.0  # seconds that the probes of a breaker are expected to take, at least


_SUCCESS = Outcome.SUCCESS  # a global costs half of an enum's attribute, and each call that ends asks several times
_OVERLOAD = Outcome.OVERLOAD
_FAULT = Outcome.FAULT


class CallCounts(msgspec.Struct):
    """Counts of an account's attempts since it was opened, by how they ended. See `AccountStatistics`."""

    sent: int = 0
    succeeded: int = 0
    throttled: int = 0
    failed: int = 0
    unattributed: int = 0
    rejected: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Account:
    """The limits of one API key and one model group: it decides which calls are sent, and has their queue.

    Pure: the caller passes the time and holds the lock. Each permit that it grants is closed exactly once, by `settle`.

    Args:
        name: its name in readings and rejections.
        limit: how many calls may be in flight.
        quotas: how many requests and tokens its calls may use.
        breaker: stops calls while its provider fails.
        budgets: returns the budgets that a call spends from.
        upstream_budget: the budget that all its calls spend from, if there is one; `budgets` returns it too.
        max_wait: seconds of expected wait above which a call is rejected.
        weights: tenants' shares of turns; for a tenant that is not named, the weight of its call counts.
        has_key: its calls have an API key, which may be invented.
        lease: on the account's ledger, which counts its quotas and slots for all processes; None: they are this one's.
        money_wait: returns the seconds that a call has to wait for its money, which processes share; None: its money
            is this process's, and can be reserved at once.
        draw: returns random numbers from [0, 1).
        record: returns the record of a call in the spend log, or None for one that is not recorded; None: there is no
            log.
    """

    def __init__(  # noqa: PLR0913 - the parts of an account
        self,
        name: str,
        *,
        limit: Limit,
        quotas: RateLimiter,
        breaker: Breaker,
        budgets: Callable[[CallRequest], Sequence[CallBudget]],
        upstream_budget: CallBudget | None = None,
        max_wait: float,
        weights: Mapping[str, float] | None = None,
        has_key: bool = False,
        lease: AccountLease | None = None,
        money_wait: Callable[[CallRequest], float] | None = None,
        draw: Callable[[], float],
        record: Callable[[CallRequest], CallRecord | None] | None = None,
    ) -> None:
        self.name = name
        self._has_key = has_key
        self.limit = limit
        self.quotas = quotas
        self.breaker = breaker
        self.order = FairOrder(weights or {})
        self.latency_model = LatencyModel()
        self.in_flight = 0
        self.peak_in_flight = 0
        self.expected_calls = 0  # runs that have started, or are held back, and have not made their first call
        self.durations = CallDurations()
        self.timeouts = TimeoutEvidence()
        self.counts = CallCounts()
        self.queue = CallQueue(self.order, longest_wait=_LONGEST_WAIT * max_wait)
        self.places = KeptPlaces()
        self.open_answers = OpenAnswers(patience=_UNREAD_SHARE * max_wait)
        self._budgets = budgets
        self._record = record
        self._upstream_budget = upstream_budget
        self._max_wait = max_wait
        self._lease = lease
        self._money_wait = money_wait
        self._draw = draw
        self._retry_after = RetryAfterSchedule()
        self._suspension = SpendSuspension()
        self._refusals = RefusalControl()
        self.stoppages: Mapping[str, CallStoppage] = {} if lease is None else self._share_stoppages()
        self._outage = OutageDetector(limit, max_wait)
        self._untaken: dict[QueuedCall, Permit] = {}  # granted to callers in the queue that have not woken yet
        self._unconfirmed: deque[Permit] = deque()  # granted within the last second, and some that have ended since

    def change_max_wait(self, seconds: float) -> None:
        """Judge calls from now on by another expected wait above which they are rejected."""
        self._max_wait = seconds

    @property
    def refusals(self) -> RefusalControl:
        """The calls that were refused, and the rate that was learned from them."""
        return self._refusals

    def _share_stoppages(self) -> Mapping[str, CallStoppage]:
        """Use stoppages of calls that processes share, and return them."""
        suspension, pause = LeasedSuspension(), LeasedPause()
        self._suspension, self._refusals = suspension, RefusalControl(pause)
        shared: dict[str, CallStoppage] = {"pause": pause, "suspension": suspension}
        return {**shared, "breaker": self.breaker} if isinstance(self.breaker, LeasedBreaker) else shared

    # --- a call arrives ---

    def _note_arrival(self, now: float, request: CallRequest) -> None:
        request.asked_at = min(request.asked_at, now)
        if self._lease is not None:
            self._lease.called_at = now
        if self.places.kept:
            self.places.drop(request)  # it is back

    def try_acquire(self, now: float, request: CallRequest) -> Admitted | Queued | Rejected:
        """Admit a call, or return how long it would wait, or why it is rejected.

        `Admitted` has taken all that the call needs. `Queued` has taken nothing: the caller may put it into `queue`.
        """
        self._confirm_accepted(now)
        if self._untaken:
            self._release_lost(now)
        self._note_arrival(now, request)
        at_once = (
            not self.queue.length
            and self._has_slot(now)
            and self._refusals.wait(now) <= 0.0
            and self._quota_wait(now, request) <= 0.0
        )
        if at_once and self._money_wait is not None:
            at_once = self._money_wait(request) <= 0.0
        rejection = self._rejection(now, request, fits=at_once)
        if rejection is not None:
            return rejection
        if at_once:
            late = None if request.deadline == math.inf else self._too_late(now, request)
            return late or self._admit(now, request)
        seconds, limited_by = self._expected_wait_of(now, request)
        if self._money_wait is not None and (money := self._money_wait(request)) > seconds:
            seconds, limited_by = money, SHARED_ACCOUNT
        if self._is_queue_full(request):
            reason = f"{_QUEUE_BOUND} calls wait already"
            return Rejected(reason, "queue", 1.0, self._schedule_retry(now, request, seconds))
        wait = f"would wait about {format_duration(seconds)} for {limited_by}"
        if seconds > self._max_wait:
            reason = f"a call {wait}, longer than max_wait allows: {format_duration(self._max_wait)}"
        elif seconds > self._acceptable_wait(now, request, limited_by):
            reason = f"it {wait}, too much of the {format_duration(request.deadline - now)} to its deadline"
        else:
            return Queued(seconds, limited_by)
        retry_after = self._schedule_retry(now, request, seconds)
        return Rejected(reason, limited_by, seconds / self._max_wait, retry_after)

    def _admit(self, now: float, request: CallRequest) -> Admitted | Rejected:
        taken = self._take(now, request)
        if isinstance(taken, Rejected):
            return taken
        self.order.serve(request)
        return Admitted(taken)

    def _held_from(self, now: float, request: CallRequest) -> Sequence[HeldCharge]:
        """Return what a call has to leave for those that come back to be retried."""
        return self.places.held_from(now, request) if self.places.kept else ()

    def _quota_wait(self, now: float, request: CallRequest) -> float:
        """Return the seconds that a call has to wait for its quotas."""
        held, trial = self._held_from(now, request), self._may_try(request)
        return self.quotas.wait(now, request.charge, held=held, trial=trial).seconds

    def _lacks_quota(self, now: float, request: CallRequest) -> bool:
        """Return whether a quota has too little left for a call: not only the part of it that is leased."""
        exchange = 0.0 if self._lease is None else self._lease.exchange_wait()
        return self.quotas.wait(now, request.charge).seconds > exchange

    def is_paused(self, now: float) -> bool:
        """Return whether no call is sent now because calls were refused."""
        return self._refusals.wait(now) > 0.0

    def _may_try(self, request: CallRequest) -> bool:
        """Return whether a call may be a trial call of a quota: it can be retried, and takes no place that is kept."""
        return request.retried and not self.places.kept

    def _is_queue_full(self, request: CallRequest) -> bool:
        """Return whether too many calls wait for this one to join; twice as many may, if most do not go before it."""
        waiting = len(self.queue)
        if waiting < _QUEUE_BOUND:
            return False
        return waiting >= 2 * _QUEUE_BOUND or self.queue.ahead_of(request) >= _QUEUE_BOUND // 2

    def count_rejected(self) -> None:
        """Count a call that was rejected, at once or after it was queued."""
        self.counts.rejected += 1

    def add_expected_calls(self, calls: int) -> None:
        """Add (or, if negative, remove) calls that are expected from runs."""
        self.expected_calls += calls

    def _rejection(self, now: float, request: CallRequest, *, fits: bool = False) -> Rejected | None:
        """Return a rejection if waiting would not help the call; `fits`: no quota is too small for it."""
        if request.unmetered is not None:
            return Rejected(request.unmetered.reason, request.unmetered.limited_by, math.inf, None)
        if request.deadline <= now:
            reason = "its deadline passed before it was sent: give a later one"
            return Rejected(reason, "deadline", math.inf, None)
        for budget in self._budgets(request):
            if not budget.can_afford(request.usd, request.priority):
                return budget.rejection(request.usd, request.priority)
        if not fits and (quota := self.quotas.quota_too_small_for(now, request.charge)) is not None:
            reason = f"it is larger than {quota} will ever be: ask for less (max_tokens counts), or raise that quota"
            return Rejected(reason, quota, math.inf, None)
        return self._provider_unavailable(now, request)

    def _provider_unavailable(self, now: float, request: CallRequest | None = None) -> Rejected | None:
        """Return a rejection if a call is not sent to the provider now.

        Args:
            now: the time.
            request: of the call; None for any. One that has failed there does not probe: it may be at fault itself.
        """
        if self._lease is not None and (unusable := self._lease.unusable(now)) is not None:
            return unusable
        free, failed = (False, False) if request is None else (request.free, request.failed)
        suspended = not free and self._suspension.is_suspended
        if suspended and (left := self._suspension.time_left(now, request, probe_duration=self._probe())) is not None:
            reason = "its provider says that the account's money is spent"
            return Rejected(reason, "budget", 1.0, left)
        if not self.breaker.ready(now) or (failed and self.breaker.state(now) is not BreakerState.CLOSED):
            probe = self._probe()
            retry_after = self.breaker.retry_after(now, probe_duration=probe)
            return Rejected("its breaker is open", "breaker", 1.0, probe if retry_after == 0.0 else retry_after)
        throttled = self._outage.is_throttled
        if throttled and (seconds := self._outage.duration(now, paused=self._refusals.paused(now))) is not None:
            reason = f"its provider has throttled every call for {format_duration(seconds)}"
            pause = self._refusals.wait(now)
            return Rejected(reason, "outage", 1.0, self._outage.retry_after(now, self._draw(), pause=pause))
        return None

    def _probe(self) -> float:
        """Return the seconds that a probe is expected to take."""
        return max(_PROBE_DURATION, self.durations.typical)

    def _too_late(self, now: float, request: CallRequest) -> Rejected | None:
        """Return a rejection if a call about to be sent, which has a deadline, is not expected to end in time."""
        if not self.durations.is_too_late(now, request, contested=self.queue.length > 0):
            return None
        retry_after = self._schedule_retry(now, request, self._expected_wait_of(now, request)[0])
        return Rejected("it is not expected to be answered before its deadline", "deadline", 1.0, retry_after)

    def _has_slot(self, now: float) -> bool:
        if self._lease is not None and self.in_flight >= self._lease.slots(now):
            return False
        return self.in_flight < self._slots(now)

    def _slots(self, now: float) -> int:
        """Return how many calls may be in flight now, by the limit: a ledger may have fewer for this process."""
        return self._refusals.limit(now, self.limit.limit(now))

    def _likely_slots(self, now: float) -> int:
        """Return how many calls can be expected to be in flight."""
        slots = self._slots(now)
        return slots if self._lease is None else int(min(slots, self._lease.likely_slots(now)))

    def _take(self, now: float, request: CallRequest) -> Permit | Rejected:
        """Take dollars, a slot and quotas for a call; a rejection if another account took the dollars meanwhile."""
        spend: Sequence[SpendReservation] = ()
        if budgets := self._budgets(request):
            reserved = _reserve_dollars(budgets, request)
            if isinstance(reserved, Rejected):
                return reserved
            spend = reserved
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self.counts.sent += 1
        self.counts.unattributed += request.task_id is None
        reservation = self.quotas.reserve(now, request.charge, trial=self._may_try(request))
        grant = self.limit.grant(now, self.in_flight)
        self._refusals.record_sent(now)
        permit = Permit(request, now, grant, self.breaker.allow(now), reservation, spend, self)
        if self._record is not None:
            permit.record = self._record(request)
        self._unconfirmed.append(permit)
        if self._suspension.is_suspended:
            self._suspension.record_sent(permit)
        return permit

    # --- the queue moves ---

    def serve_queue(self, now: float) -> None:
        """Answer the queued calls that can be answered, and set a timer for the head if it waits only for time."""
        while self.queue.length and (when := self._serve_queue(now)) is not None:
            entry = self.queue.head()
            if entry is None or entry[2].waiter.wake_at(when):
                return
            self.queue.withdraw(entry[2])  # its event loop is closed: nobody waits

    def _serve_queue(self, now: float) -> float | None:
        """Answer queued calls; return when to look again, or None if only the end of a call can move the queue."""
        confirmed_at = self._confirm_accepted(now)
        self._remove_gone(now)
        if not self.queue:
            return None
        self.queue.promote(now, self.durations.typical_or_guess)
        while (entry := self.queue.head()) is not None:
            call: QueuedCall = entry[2]
            rejection = self._rejection(now, call.request)
            if rejection is not None:
                self._resolve(call, rejection)
                continue
            if not self._has_slot(now):
                if self._reject_deadlocked(now, confirmed_at):
                    continue
                return self._next_look_for_slot(now, confirmed_at)
            pause = self._refusals.wait(now)  # it holds back every call: none can overtake
            if pause <= 0.0 and (seconds := self._quota_wait(now, call.request)) > 0.0:
                bypass = self._bypass_head(now)
                if bypass > 0.0:
                    look, place = now + min(seconds, bypass), self.places.next_end()
                    return _earliest(look, self.queue.next_deadline(), confirmed_at, place)
                continue
            if pause <= 0.0 and self._money_wait is not None:
                pause = self._money_wait(call.request)
            if pause > 0.0:
                return _earliest(now + pause, self.queue.next_deadline(), confirmed_at)
            # A trial call must not be one that may be refused for what it asks.
            untried = self._untried(now) if self._refusals.blocked and call.request.retries else None
            self._send(now, untried or self.queue.serve_head(now, entry))
        return None

    def _reject_deadlocked(self, now: float, confirmed_at: float | None) -> bool:
        """Reject a nested call if only its own kind could free a slot for it; return False if there is none."""
        if confirmed_at is not None or self.in_flight < self._slots(now) or (stuck := self._deadlocked()) is None:
            return False
        self._resolve(stuck, Rejected(_WAITS_FOR_ITSELF, "concurrency", 1.0, _NESTED_RETRY))
        return True

    def _next_look_for_slot(self, now: float, confirmed_at: float | None) -> float | None:
        """Return when to look for a slot again; None if only the end of a call can free one."""
        if self.in_flight < self._slots(now):  # another process may have it: a reply of the ledger wakes the queue
            return _earliest(self.queue.next_deadline(), confirmed_at, now + _LOST_LOOK)
        look = self.open_answers.next_look(now)
        lost_at = now + _LOST_LOOK if self._untaken else None
        return _earliest(self.limit.reopens_at(now), self.queue.next_deadline(), confirmed_at, look, lost_at)

    def _remove_gone(self, now: float) -> None:
        """Remove the calls that nobody waits for any more, and reject those that have waited for too long."""
        if self._untaken:
            self._release_lost(now)
        while (overdue := self.queue.pop_overdue(now)) is not None:
            self._resolve(overdue, self._overdue(now, overdue))
        if self._lease is not None:
            self._reject_futile(now)

    def _reject_futile(self, now: float) -> None:
        """Reject the first calls if their quota keeps them until they are overdue: other processes have used it.

        That was not known when they joined the queue. The ledger has told by now, and others have had the time to
        return what they do not use.
        """
        while (entry := self.queue.head() if self.queue.length else None) is not None:
            call: QueuedCall = entry[2]
            if now - call.enqueued_at < _RETURN_TIME:
                return
            by = min(call.request.deadline, call.enqueued_at + _LONGEST_WAIT * self._max_wait)
            seconds = self._quota_wait(now, call.request)
            if now + seconds <= by or seconds == math.inf:
                return
            seconds, limited_by = self._expected_wait_of(now, call.request)
            duration = format_duration(seconds)
            reason = f"it would wait about {duration} for {limited_by}, which other calls have used meanwhile"
            retry_after = self._schedule_retry(now, call.request, seconds)
            self._resolve(call, Rejected(reason, limited_by, seconds / self._max_wait, retry_after))

    def _deadlocked(self) -> QueuedCall | None:
        """Return a nested call if callers that wait for nested calls of their own hold all slots, else None."""
        if self.queue.nested < max(1, self.in_flight):
            return None
        nested = [call for call in self.queue.in_order() if call.request.holder is not None]
        holders = {id(call.request.holder) for call in nested}
        return nested[-1] if len(holders) >= self.in_flight else None

    def _overdue(self, now: float, call: QueuedCall) -> Rejected:
        """Return the rejection of a call that has waited for too long."""
        seconds, limited_by = self._expected_wait_of(now, call.request)
        retry_after = self._schedule_retry(now, call.request, seconds)
        if call.request.deadline <= now:
            return Rejected("its deadline passed while it waited", "queue", 1.0, retry_after)
        waited, allowed = format_duration(now - call.enqueued_at), format_duration(self._max_wait)
        reason = f"it has waited for {waited}, half as long again as max_wait allows: {allowed}"
        if unread := self.open_answers.unread(now):
            reason += f": nobody reads {unread} streaming answers that hold slots; close a stream that you leave early"
        return Rejected(reason, limited_by if seconds else "queue", 1.0, retry_after)

    def _untried(self, now: float) -> QueuedCall | None:
        """Return the first queued call that has not been tried yet and need not wait for a quota, or None."""
        fresh = (call for call in self.queue.in_order() if not call.request.retries)
        found = next((call for call in fresh if self._quota_wait(now, call.request) <= 0.0), None)
        if found is not None and self._money_wait is not None and self._money_wait(found.request) > 0.0:
            return None
        return found

    def _bypass_head(self, now: float) -> float:
        """Send a call behind the head, which waits for a quota, if that delays nobody ahead of it.

        Returns:
            0 if one was sent; otherwise the seconds until one can be, or infinity.
        """
        slots = self._slots(now) - self.in_flight
        if self._lease is not None:
            slots = int(min(slots, self._lease.slots(now) - self.in_flight))
        if slots == 1 or len(self.queue) == 1 or self.breaker.state(now) is not BreakerState.CLOSED:
            return math.inf  # the only slot, or the probe, is the head's
        held = partial(self._held_from, now)
        seconds, call = find_bypass(now, self.queue.in_order(), self.quotas, self._budgets, slots=slots, held=held)
        if call is not None and not seconds:
            if self._money_wait is not None and (money := self._money_wait(call.request)) > 0.0:
                return money
            self._send(now, call)
        return seconds

    def _send(self, now: float, call: QueuedCall) -> None:
        rejection = None if call.request.deadline == math.inf else self._too_late(now, call.request)
        if rejection is not None:
            self._resolve(call, rejection)
            return
        taken = self._take(now, call.request)
        if isinstance(taken, Rejected):
            self._resolve(call, taken)
        elif self._resolve(call, Admitted(taken)):
            self._untaken[call] = taken
        else:
            self.release_unsent(now, taken)

    def take_grant(self, call: QueuedCall) -> None:
        """Note that the caller of a queued call has its permit: from now on the caller closes it."""
        self._untaken.pop(call, None)

    def withdraw(self, now: float, call: QueuedCall) -> None:
        """Take a call whose caller has gone out of the queue, and close the permit that it was granted."""
        self.queue.withdraw(call)
        if (permit := self._untaken.pop(call, None)) is not None:
            self.release_unsent(now, permit)

    def _release_lost(self, now: float) -> None:
        """Close the permits of callers that will never wake to take them."""
        for call in [call for call in self._untaken if call.waiter.gone]:
            self.withdraw(now, call)

    def _resolve(self, call: QueuedCall, decision: Admitted | Rejected) -> bool:
        if isinstance(decision, Admitted):
            self.queue.take(call)
        else:
            self.queue.withdraw(call)
        return call.waiter.resolve(decision)

    def reject_queued(self, now: float) -> None:
        """Reject the queued calls that no wait can help, for example because the breaker has opened."""
        for call in list(self.queue):
            rejection = self._rejection(now, call.request)
            if rejection is not None:
                self._resolve(call, rejection)

    # --- a call ends ---

    def answer_began(self, now: float, permit: Permit, headers: Sequence[RateLimitHeaders] = ()) -> None:
        """Note that a call was not throttled: its answer has begun. `headers`: its rate-limit headers."""
        if not permit.closed:
            self._accept(now, permit)
        self._outage.record_accepted()
        self.timeouts.record_answer()
        self._suspension.record_accepted(permit)
        self.quotas.update_from_headers(now, headers, permit.reservation)

    def _accept(self, now: float, permit: Permit) -> None:
        if not permit.accepted:
            permit.accepted = True
            self.limit.accepted(now, permit.grant)
            self._refusals.record_accepted(now, permit.granted_at, permit.grant.in_flight)

    def _confirm_accepted(self, now: float) -> float | None:
        """Count calls as accepted that were not throttled within a second; return when the next one will be."""
        unconfirmed = self._unconfirmed
        while unconfirmed:
            permit = unconfirmed[0]
            if not (permit.closed or permit.accepted):
                if now < permit.granted_at + _ACCEPTED_AFTER:
                    return permit.granted_at + _ACCEPTED_AFTER
                self._accept(now, permit)
                self._suspension.record_unrefused(permit)
            unconfirmed.popleft()
        return None

    def settle(self, now: float, permit: Permit, outcome: CallOutcome) -> float:
        """Close a permit: return its slot, and the reserved amounts that were not used.

        Returns:
            The dollars that the call was charged, or would have been by a budget.

        Raises:
            AssertionError: it is closed already: a bug of the caller.
        """
        assert not permit.closed, "a permit is closed exactly once"  # noqa: S101
        permit.closed = True
        request, kind, counts, slowdown = permit.request, outcome.kind, self.counts, None
        cause = kind  # for the limit
        if kind is _SUCCESS:
            if outcome.latency is not None:
                slowdown = self.observe_latency(now, permit, outcome.output_tokens, outcome.latency)
            counts.succeeded += 1
            self._outage.record_accepted()
            self._accept(now, permit)
            self.timeouts.record_success(now - permit.granted_at)
        else:
            cause = self._record_failure(now, permit, outcome)
        counts.throttled += outcome.spend_cap
        self.in_flight -= 1
        if self._lease is not None:
            self._lease.record_end()
        self.limit.observe(now, permit.grant, cause, slowdown=slowdown)
        if outcome.rate_limit_headers and not outcome.rate_limited:
            self.quotas.update_from_headers(now, outcome.rate_limit_headers, permit.reservation)
        if outcome.rate_limited:
            self.quotas.record_throttled(
                now, permit.reservation, outcome.retry_after, outcome.rate_limit_headers, scope=outcome.rate_scope
            )
        elif outcome.released:
            self.quotas.release(now, permit.reservation)
        else:
            used = request.charge if outcome.used is None else outcome.used
            counts.input_tokens += used.input_tokens
            counts.output_tokens += used.output_tokens
            failed = kind is _FAULT or kind is _OVERLOAD  # a refusal for another cause is not counted either
            self.quotas.settle(now, permit.reservation, used, failed=failed, answered=outcome.answered)
        usd = self._unreported_cost(now, permit, kind) if outcome.usd is None else outcome.usd
        if permit.spend or permit.record is not None:
            _settle_dollars(permit, usd, outcome)
        self._suspension.record_end(permit, kind)
        held = now - permit.granted_at if outcome.latency is None else outcome.latency
        late = kind is Outcome.IGNORED and now > request.deadline - _DEADLINE_SLACK
        self.durations.observe(held, outcome, slowdown=slowdown, slots=self.limit.limit(now), late=late)
        if self.breaker.record(now, self._judged(now, outcome), permit.breaker_epoch) is not None:
            self.reject_queued(now)
        return usd

    def _record_failure(self, now: float, permit: Permit, outcome: CallOutcome) -> Outcome:
        """Count an attempt that has not succeeded, and return its outcome for the limit."""
        if outcome.kind is _OVERLOAD or outcome.refused_by_limit:
            self.counts.throttled += 1
            self.timeouts.record_answer()
            self._outage.record_throttled(now)
            return self._blame(now, permit, outcome)
        self.counts.failed += outcome.kind is _FAULT
        return outcome.kind

    def _unreported_cost(self, now: float, permit: Permit, kind: Outcome) -> float:
        """Return the dollars to count for a call that was sent, and whose usage never arrived.

        Before the first success of an account its API key may be invented. Callers who hang up then must not use up the
        budget of all, so their calls cost no more than what can have been made in the time.
        """
        seconds = now - permit.granted_at
        if self._has_key and kind is Outcome.IGNORED and not self.counts.succeeded:
            return permit.request.cost_within(seconds)
        return permit.request.unreported_cost(seconds)

    def _judged(self, now: float, outcome: CallOutcome) -> Outcome:
        """Return the evidence of an attempt for the breaker: only the last of a call counts, but each probe does."""
        counts = outcome.final or self.breaker.state(now) is not BreakerState.CLOSED
        return outcome.kind if counts else Outcome.IGNORED

    def _blame(self, now: float, permit: Permit, outcome: CallOutcome) -> Outcome:
        """Return the outcome of a refused call for the limit: OVERLOAD, unless a rate is the likely cause."""
        if not outcome.refused_by_limit:
            return outcome.kind
        if permit.reservation.trial_of and not self._refusals.blocked:  # a quota is right, which is all that was asked
            return Outcome.IGNORED
        rate = self._refusals.record_refused(
            now,
            permit.granted_at,
            permit.grant.in_flight,
            named=outcome.rate_limited,
            retry_after=outcome.retry_after,
            repeated=permit.request.is_suspect,
            quota_explains=outcome.rate_limited and self._lacks_quota(now, permit.request),
        )
        return Outcome.IGNORED if rate else Outcome.OVERLOAD

    def disbelieves_retry_after(self, outcome: CallOutcome) -> bool:
        """Return whether a refused call need not wait for its Retry-After: the latest of its kind was too long."""
        return outcome.refused_by_limit and self._refusals.disbelieves_retry_after

    def release_unsent(self, now: float, permit: Permit) -> None:
        """Close the permit of a call that was not sent: everything is returned."""
        self.counts.sent -= 1
        self._refusals.record_unsent(permit.granted_at)
        self.counts.unattributed -= permit.request.task_id is None
        self.settle(now, permit, CallOutcome(kind=Outcome.IGNORED, released=True, usd=0.0))

    def confirm_spent(self, now: float, permit: Permit, seconds: float, *, certain: bool) -> Suspended | None:
        """Return for how long no calls are to be sent if a refusal means that money is spent. See `SpendSuspension`."""
        return self._suspension.confirm(now, permit, seconds, certain=certain)

    def suspend(self, now: float, seconds: float, *, since: float = math.inf) -> None:
        """Send no calls for `seconds`, and then one: by the provider's answer, the account's money there is spent.

        Calls go on if one that was sent after `since` was accepted.
        """
        if not self._suspension.accepted_since(since):
            self._suspension.begin(now, seconds)

    def is_expendable(self, now: float) -> bool:
        """Return whether a new account could replace it: it never succeeded, or has no calls, and no quota is used.

        One that is suspended, or whose breaker is open, cannot be replaced. What was learned of limits and durations
        would be learned again.
        """
        if self._suspension.time_left(now, probe_duration=0.0) is not None:
            return False
        if self.breaker.state(now) is not BreakerState.CLOSED:
            return False
        idle = not (self.in_flight or self.queue or self.expected_calls)
        forgettable = idle and self.quotas.is_full(now) and not self._refusals.paused(now)
        return not self.counts.succeeded or forgettable

    def observe_latency(self, now: float, permit: Permit, output_tokens: int, latency: float) -> float | None:
        """Learn from the latency of a success, in seconds, and return its slowdown, if it is known.

        The slowdown is the latency over the one expected for the output tokens. Only calls with at most half of the
        limit in flight teach what to expect: otherwise the account's own load would pass for normal.
        """
        if not output_tokens:
            return None
        light = max(permit.grant.in_flight, self.in_flight) <= max(1, self.limit.limit(now) // 2)
        return self.latency_model.observe(output_tokens, latency, light=light)

    # --- load ---

    def _expected_wait_of(self, now: float, request: CallRequest) -> tuple[float, str]:
        """Return the seconds until this call would be sent, in its turn: calls that it goes before do not count."""
        return self.expected_wait(now, request, ahead=self.queue.ahead_of(request))

    def wait_left(self, now: float, call: QueuedCall) -> float:
        """Return the seconds until a queued call is sent, by its place; infinity while nothing is sent."""
        if self._provider_unavailable(now, call.request) is not None:
            return math.inf
        ahead, guess = self.queue.position(call), self.durations.typical_or_guess
        return self.expected_wait(now, call.request, ahead=ahead, guess=guess)[0]

    def expected_wait(
        self, now: float, request: CallRequest, *, ahead: int | None = None, others: int = 0, guess: float = 0.0
    ) -> tuple[float, str]:
        """Return the seconds until such a call would be sent, and the part of the account that it waits for.

        Args:
            now: the time.
            request: of the call.
            ahead: calls of the queue that go before it; None for all of its priority and of better ones.
            others: calls ahead of it besides those in the queue.
            guess: seconds that a call holds its slot, used until the first call has ended.
        """
        self._confirm_accepted(now)
        ahead = (self.queue.ahead(request.priority) if ahead is None else ahead) + others
        before, held = scale_charge(request.charge, ahead), self._held_from(now, request)
        delay = self.quotas.wait(now, request.charge, ahead=before, held=held)
        seconds, limited_by = delay.seconds, delay.limited_by or "nothing"
        if (paused := self._refusals.expected_wait(now, ahead)) > seconds:
            seconds, limited_by = paused, _PAUSED if self._refusals.paused(now) else _LEARNED_RATE
        limit = self._likely_slots(now)
        free = limit - self.in_flight - ahead
        if free <= 0:
            rounds = (1 - free) / max(1, limit)
            slot_wait = rounds * (self.durations.held or guess)
            if slot_wait > seconds:
                return slot_wait, "concurrency"
        if self._lease is not None and (exchange := self._lease.slot_wait(now, self.in_flight + ahead)) > seconds:
            return exchange, SHARED_ACCOUNT
        return seconds, limited_by

    def blocking_reason(self, now: float, usd: float, priority: Priority) -> Rejected | None:
        """Return a rejection if no call of that cost and priority is sent now, however long it waits; else None."""
        budget = self._upstream_budget
        if budget is not None and not budget.can_afford(usd, priority):
            return budget.rejection(usd, priority)
        return self._provider_unavailable(now)

    def load_for(self, now: float, request: CallRequest) -> float:
        """Return the expected wait of this call over `max_wait`; 1.0 or more if it would be rejected."""
        rejection = self._rejection(now, request)
        if rejection is not None:
            return max(1.0, rejection.load)
        seconds, limited_by = self._expected_wait_of(now, request)
        return math.inf if seconds > self._acceptable_wait(now, request, limited_by) else seconds / self._max_wait

    def prospect_for(self, now: float, request: CallRequest) -> Prospect:
        """Return how soon this call would be sent here, and how many more like it could be, to choose an account."""
        if self._rejection(now, request) is not None:
            return Prospect(math.inf, 0.0)
        typical = self.durations.typical_or_guess
        ahead = self.queue.ahead_of(request)
        seconds, limited_by = self.expected_wait(now, request, ahead=ahead, guess=typical)
        if seconds > self._acceptable_wait(now, request, limited_by):
            seconds = math.inf
        if self._lease is not None and seconds <= self._lease.exchange_wait():
            seconds = 0.0  # nothing is missing: else the account that had the last call would have the next one too
        free = max(0, self._likely_slots(now) - self.in_flight - self.queue.length)
        return Prospect(seconds, min(free * _CALLS_OF_A_SLOT, self.quotas.calls_left(now, request.charge)))

    def _acceptable_wait(self, since: float, request: CallRequest, limited_by: str) -> float:
        """Return the seconds that a call may be expected to wait: longer for a quota, whose wait is known well."""
        return self.durations.acceptable_wait(since, request, certain=limited_by not in _UNCERTAIN)

    def load(self, now: float, request: CallRequest, priority: Priority) -> tuple[float, str]:
        """Return the expected wait of the next such call over `max_wait`, and what limits it; 1.0 while blocked."""
        if (blocked := self.blocking_reason(now, request.usd, priority)) is not None:
            return 1.0, blocked.limited_by
        seconds, limited_by = self.expected_wait(now, request, others=self.expected_calls)
        return seconds / self._max_wait, limited_by

    def time_until_below(self, now: float, request: CallRequest, load: float) -> tuple[float, float]:
        """Return the seconds until the load falls to `load` without more calls, and what one call adds to the wait."""
        seconds, _ = self.expected_wait(now, request, others=self.expected_calls)
        if seconds == math.inf:
            return math.inf, 0.0
        ahead = self.queue.ahead(request.priority) + self.expected_calls
        spacing = self._wait_per_call(now, request, seconds, ahead=ahead)
        return max(0.0, seconds - load * self._max_wait), spacing

    def _wait_per_call(self, now: float, request: CallRequest, seconds: float, *, ahead: int) -> float:
        """Return the seconds that one more call adds to a wait of `seconds` behind `ahead` calls; 0 if not known."""
        added = self.expected_wait(now, request, ahead=ahead + 1)[0] - seconds
        return added if added > 0.0 else self.durations.held / max(1, self._slots(now))

    def _schedule_retry(self, now: float, request: CallRequest, seconds: float) -> float | None:
        """Return the seconds after which a call that would wait `seconds` may try again."""
        if seconds == math.inf:
            return None  # it is larger than a quota now: it gets no retry slot, and leaves no hole before the others
        early = max(0.0, seconds - self._max_wait)
        spacing = self._wait_per_call(now, request, seconds, ahead=self.queue.ahead_of(request))
        slot = self._retry_after.reserve(now + early, 1.0 / spacing if spacing else None, self._draw())
        too_long = seconds - self.durations.acceptable_wait(request.asked_at, request)
        return max(early + (slot or 0.0), too_long) or None


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _reserve_dollars(budgets: Sequence[CallBudget], request: CallRequest) -> Sequence[SpendReservation] | Rejected:
    """Reserve the dollars of a call from all its budgets, or from none.

    Budgets are shared with other accounts, which have locks of their own: only `try_reserve` can tell.
    """
    reserved: list[SpendReservation] = []
    for budget in budgets:
        reservation = budget.try_reserve(request.usd, request.priority)
        if reservation is None:
            for other in reserved:
                other.settle(0.0)
            return budget.rejection(request.usd, request.priority)
        reserved.append(reservation)
    return reserved


def _settle_dollars(permit: Permit, usd: float, outcome: CallOutcome) -> None:
    """Replace the dollars that are held for a call by those that it has cost, and record it in the spend log."""
    for dollars in permit.spend:
        dollars.settle(usd)
    if not usd and outcome.kind is not Outcome.SUCCESS:
        return  # a refused call tells nothing
    if permit.record is not None:  # after its budgets: an alert that is written after what caused it may come twice
        used = permit.request.charge if outcome.used is None else outcome.used
        sent = used.input_tokens if outcome.input_tokens is None else outcome.input_tokens
        permit.record.settle(usd, input_tokens=sent, output_tokens=outcome.output_tokens or used.output_tokens)
