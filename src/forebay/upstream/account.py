"""An account: one decision over slot, request rate, token rate, money and breaker, and the line before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from forebay.admission import RetryAfterSchedule
from forebay.breaker import Breaker, BreakerState
from forebay.interfaces import Outcome, RateLimitHeaders
from forebay.limit import Limit
from forebay.quota import RateLimiter
from forebay.task import Priority
from forebay.upstream.bypass import find_bypass
from forebay.upstream.call_counts import CallCounts
from forebay.upstream.call_durations import CallDurations
from forebay.upstream.call_queue import CallQueue
from forebay.upstream.call_request import (
    Admitted,
    CallBudget,
    CallOutcome,
    CallRequest,
    Permit,
    Queued,
    Rejected,
    scale_charge,
)
from forebay.upstream.fair_order import FairOrder
from forebay.upstream.latency_model import LatencyModel
from forebay.upstream.outage_detector import OutageDetector
from forebay.upstream.waiters import QueuedCall, Waiter

_LINE = 10_000  # calls that may wait, however short that is expected to be
_SILENCE = 1.0  # seconds without a refusal after which a call counts as accepted
_PUNCTUAL = 0.01  # seconds before its deadline: who leaves from then on leaves for that
_PROBED = 1.0  # seconds after which one may ask again, at least, while a breaker's probes are out


class Account:
    """What has limits of its own within an upstream: a key and a model group.

    Pure: its holder brings the time and holds the lock. Every permit that it gives is closed exactly once, by `settle`.

    Args:
        name: how it is called in readings and refusals.
        limit: how many calls may be in flight.
        quotas: what it may take of requests and tokens.
        breaker: whether it is asked at all.
        purses: the money that a call needs, by call.
        own: what all its calls draw on, if there is a budget of that kind; one of the `purses` of each.
        longest_wait: seconds that a call may be expected to wait; beyond that it is refused.
        draw: a source of draws from [0, 1).
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
        draw: Callable[[], float],
    ) -> None:
        self.name = name
        self.limit = limit
        self.quotas = quotas
        self.breaker = breaker
        self.order = FairOrder()
        self.latency_model = LatencyModel()
        self.in_flight = 0
        self.peak_in_flight = 0
        self.expected_calls = 0  # runs that have begun, or are held back, and have not made their first call
        self.durations = CallDurations()
        self.counts = CallCounts()
        self.queue = CallQueue(self.order)
        self._purses = budgets
        self._own = upstream_budget
        self._longest_wait = max_wait
        self._draw = draw
        self._seats = RetryAfterSchedule()
        self._stopped_until = -math.inf
        self._outage = OutageDetector(limit, max_wait)
        self._young: deque[Permit] = deque()  # given within the last second, and some that have ended since

    # --- a call comes ---

    def try_acquire(self, now: float, ask: CallRequest) -> Admitted | Queued | Rejected:
        """Let a call go, or say how long it would wait, or why it will not be let at all.

        Go has taken everything that the call needs. Wait has taken nothing: its caller may `join` the line.
        """
        self._ripen(now)
        ask.asked_at = min(ask.asked_at, now)
        at_once = not self.queue.length and self._room(now) and self.quotas.wait(now, ask.charge)[0] <= 0.0
        refusal = self._refusal(now, ask, fits=at_once)
        if refusal is not None:
            return refusal
        if at_once:
            return self._late(now, ask) or self._let_go(now, ask)
        seconds, binding = self.expected_wait(now, ask)
        if len(self.queue) >= _LINE:
            return Rejected(f"{_LINE} calls wait already", "line", 1.0, self._seat(now, ask, seconds))
        if seconds > self._longest_wait:
            reason = (
                f"a call would wait about {seconds:.3g} s for {binding}, and {self._longest_wait:g} s is the longest"
            )
            return Rejected(reason, binding, seconds / self._longest_wait, self._seat(now, ask, seconds))
        if seconds > self.durations.acceptable_wait(now, ask):
            time = ask.deadline - now
            reason = f"it would wait about {seconds:.3g} s for {binding}, too much of the {time:.3g} s to its deadline"
            return Rejected(reason, binding, seconds / self._longest_wait, self._seat(now, ask, seconds))
        return Queued(seconds, binding)

    def enqueue(self, now: float, ask: CallRequest, waiter: Waiter) -> QueuedCall:
        """Stand in the line."""
        return self.queue.enqueue(now, ask, waiter)

    def withdraw(self, waiting: QueuedCall) -> None:
        """Give a place in the line up. Leaving twice, or after the answer, does nothing."""
        self.queue.withdraw(waiting)

    def _refusal(self, now: float, ask: CallRequest, *, fits: bool = False) -> Rejected | None:
        """Why it is not let through, however long it waits; `fits`: no quota is too small for it."""
        if ask.deadline <= now:
            return Rejected("its deadline passed before it was sent: give a later one", "deadline", math.inf, None)
        for purse in self._purses(ask):
            if not purse.can_afford(ask.usd, ask.priority):
                return purse.rejection(ask.usd)
        if not fits and (smaller := self.quotas.quota_too_small_for(now, ask.charge)) is not None:
            reason = f"it is larger than {smaller} will ever be: ask for less (max_tokens counts), or raise that quota"
            return Rejected(reason, smaller, math.inf, None)
        return self._closed(now, free=ask.free)

    def _closed(self, now: float, *, free: bool = False) -> Rejected | None:
        """Why its provider is not asked at all, whatever the call; `free`: it costs nothing there."""
        if now < self._stopped_until and not free:
            return Rejected("its provider says that its money is spent", "budget", 1.0, self._stopped_until - now)
        if not self.breaker.ready(now):
            again = self.breaker.retry_after(now, probe_duration=max(_PROBED, self.durations.typical))
            return Rejected("its breaker is open", "breaker", 1.0, again)
        if (seconds := self._outage.duration(now)) is not None:
            reason = f"its provider has refused everything for {seconds:.0f} s"
            return Rejected(reason, "outage", 1.0, self._outage.retry_after(now, self._draw()))
        return None

    def _late(self, now: float, ask: CallRequest) -> Rejected | None:
        if ask.deadline == math.inf or not self.durations.is_too_late(now, ask, contested=self.queue.length > 0):
            return None
        again = self._seat(now, ask, self.expected_wait(now, ask)[0])
        return Rejected("it could hardly be answered before its deadline any more", "deadline", 1.0, again)

    def _let_go(self, now: float, ask: CallRequest) -> Admitted:
        self.order.record_served(self.order.rank(ask))
        return Admitted(self._take(now, ask))

    def _room(self, now: float) -> bool:
        return self.in_flight < self.limit.limit(now)

    def _take(self, now: float, ask: CallRequest) -> Permit:
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self.counts.sent += 1
        self.counts.unattributed += ask.task_id is None
        reservation = self.quotas.reserve(now, ask.charge)
        sums = [purse.reserve(ask.usd) for purse in self._purses(ask)]
        grant = self.limit.grant(now, self.in_flight)
        permit = Permit(ask, now, grant, self.breaker.allow(now), reservation, sums)
        self._young.append(permit)
        return permit

    # --- the line moves ---

    def serve_queue(self, now: float) -> None:
        """Answer those in the line whose time has come, and have its head look again when time alone will move it."""
        while self.queue.length and (when := self._pump(now)) is not None:
            place = self.queue.head()
            if place is None or place[2].waiter.wake_at(when):
                return
            self.withdraw(place[2])  # its event loop has closed: nobody waits

    def _pump(self, now: float) -> float | None:
        ripe = self._ripen(now)
        while (gone := self.queue.pop_overdue(now)) is not None:
            seconds = self.expected_wait(now, gone.request)[0]
            again = self._seat(now, gone.request, seconds)
            self._answer(gone, Rejected("its deadline passed while it waited", "line", 1.0, again))
        if not self.queue:
            return None
        self.queue.promote(now, self.durations.typical_or_guess)
        while (place := self.queue.head()) is not None:
            waiting: QueuedCall = place[2]
            refusal = self._refusal(now, waiting.request)
            if refusal is not None:
                self._answer(waiting, refusal)
                continue
            if not self._room(now):
                return _earliest(self.limit.reopens_at(now), self.queue.next_deadline(), ripe)
            seconds, _ = self.quotas.wait(now, waiting.request.charge)
            if seconds > 0.0:
                passed = self._let_pass(now)
                if passed > 0.0:
                    return _earliest(now + min(seconds, passed), self.queue.next_deadline(), ripe)
                continue
            self._go(now, self.queue.serve_head(now, place))
        return None

    def _let_pass(self, now: float) -> float:
        """The head waits for a quota: send one behind it that does not delay it.

        Returns:
            0 if one was sent; else seconds until one could be, or infinity.
        """
        slots = self.limit.limit(now) - self.in_flight
        if slots == 1 or len(self.queue) == 1 or self.breaker.state(now) is not BreakerState.CLOSED:
            return math.inf  # the only slot is the head's, and so is a probe
        seconds, waiting = find_bypass(now, self.queue.in_order(), self.quotas, self._purses, slots=slots)
        if waiting is not None and not seconds:
            self._go(now, waiting)
        return seconds

    def _go(self, now: float, waiting: QueuedCall) -> None:
        if (late := self._late(now, waiting.request)) is not None:
            self._answer(waiting, late)
            return
        permit = self._take(now, waiting.request)
        if not self._answer(waiting, Admitted(permit)):
            self.release_unsent(now, permit)

    def _answer(self, waiting: QueuedCall, answer: Admitted | Rejected) -> bool:
        self.queue.withdraw(waiting)
        return waiting.waiter.resolve(answer)

    def reject_queued(self, now: float) -> None:
        """The breaker has opened: nobody need wait any longer."""
        for waiting in list(self.queue):
            refusal = self._refusal(now, waiting.request)
            if refusal is not None:
                self._answer(waiting, refusal)

    # --- a call ends ---

    def answer_began(self, now: float, permit: Permit, notices: Sequence[RateLimitHeaders] = ()) -> None:
        """A call was not refused: its answer has begun, and its headers say this of the quotas."""
        if not permit.closed:
            self._accept(now, permit)
        self._outage.record_accepted()
        self.quotas.update_from_headers(now, notices, permit.reservation)

    def _accept(self, now: float, permit: Permit) -> None:
        if not permit.accepted:
            permit.accepted = True
            self.limit.accepted(now, permit.grant)

    def _ripen(self, now: float) -> float | None:
        """A call that was not refused within a second was accepted; returns when the next one will have been."""
        young = self._young
        while young:
            permit = young[0]
            if not (permit.closed or permit.accepted):
                if now < permit.granted_at + _SILENCE:
                    return permit.granted_at + _SILENCE
                self._accept(now, permit)
            young.popleft()
        return None

    def settle(self, now: float, permit: Permit, ended: CallOutcome) -> None:
        """Take the end of a call: its slot, and what it reserved beyond its use, are free.

        Raises:
            AssertionError: it was closed before: a bug of the caller's.
        """
        assert not permit.closed, "a permit is closed exactly once"  # noqa: S101
        permit.closed = True
        ask, outcome, tally, stretch = permit.request, ended.kind, self.counts, None
        if outcome is Outcome.SUCCESS and ended.latency is not None:
            stretch = self.observe_latency(now, permit, ended.output_tokens, ended.latency)
        if outcome is Outcome.SUCCESS:
            tally.succeeded += 1
            self._outage.record_accepted()
            self._accept(now, permit)
        elif outcome is Outcome.OVERLOAD:
            tally.throttled += 1
            self._outage.record_throttled(now)
        elif outcome is Outcome.FAULT:
            tally.failed += 1
        self.in_flight -= 1
        self.limit.observe(now, permit.grant, outcome, slowdown=stretch)
        if ended.rate_limit_headers and not ended.rate_limited:
            self.quotas.update_from_headers(now, ended.rate_limit_headers, permit.reservation)
        if ended.rate_limited:
            tally.throttled += 1
            self.quotas.record_throttled(now, permit.reservation, ended.retry_after, ended.rate_limit_headers)
        elif ended.released:
            self.quotas.release(now, permit.reservation)
        else:
            used = ask.charge if ended.used is None else ended.used
            tally.input_tokens += used.input_tokens
            tally.output_tokens += used.output_tokens
            self.quotas.settle(now, permit.reservation, used)
        for held in permit.spend:
            held.settle(ask.usd if ended.usd is None else ended.usd)
        took = now - permit.granted_at if ended.latency is None else ended.latency
        late = outcome is Outcome.IGNORED and now > ask.deadline - _PUNCTUAL
        self.durations.observe(took, ended, stretch=stretch, slots=self.limit.limit(now), late=late)
        judged = outcome if ended.final else Outcome.IGNORED
        if self.breaker.record(now, judged, permit.breaker_epoch) is not None:
            self.reject_queued(now)

    def release_unsent(self, now: float, permit: Permit) -> None:
        """Give everything back: nothing has left."""
        self.counts.sent -= 1
        self.counts.unattributed -= permit.request.task_id is None
        self.settle(now, permit, CallOutcome(kind=Outcome.IGNORED, released=True, usd=0.0))

    def suspend(self, now: float, seconds: float) -> None:
        """Its provider says that its money is spent: ask it no more for a while, for it would only refuse."""
        self._stopped_until = now + seconds

    def observe_latency(self, now: float, permit: Permit, tokens: int, seconds: float) -> float | None:
        """A success took so long for its output tokens; returns its stretch, if it made any and that is known.

        Only with at most half of the limit in flight is it taken for normal: else our own load would be.
        """
        if not tokens:
            return None
        light = max(permit.grant.in_flight, self.in_flight) <= max(1, self.limit.limit(now) // 2)
        return self.latency_model.observe(tokens, seconds, light=light)

    # --- what presses ---

    def expected_wait(self, now: float, ask: CallRequest, *, others: int = 0, guess: float = 0.0) -> tuple[float, str]:
        """Seconds until a call like this would be sent, and what it waits for.

        While no call has ended yet, nothing is known of how long a slot is held, and `guess` is what is feared.
        """
        self._ripen(now)
        ahead = self.queue.ahead(ask.priority) + others
        delay = self.quotas.wait(now, ask.charge, ahead=scale_charge(ask.charge, ahead))
        seconds, binding = delay.seconds, delay.limited_by or "nothing"
        limit = self.limit.limit(now)
        free = limit - self.in_flight - ahead
        if free <= 0:
            rounds = (1 - free) / max(1, limit)
            slot = rounds * (self.durations.held or guess)
            if slot > seconds:
                return slot, "concurrency"
        return seconds, binding

    def blocking_reason(self, now: float, usd: float, rung: Priority) -> Rejected | None:
        """Why no call of that price and rung is let through, however long it waits; None if one is."""
        if self._own is not None and not self._own.can_afford(usd, rung):
            return self._own.rejection(usd)
        return self._closed(now)

    def load_for(self, now: float, ask: CallRequest) -> float:
        """Expected wait of this very call over the longest wait allowed; 1.0 or more if it would be refused."""
        refusal = self._refusal(now, ask)
        if refusal is not None:
            return max(1.0, refusal.load)
        seconds, _ = self.expected_wait(now, ask)
        return math.inf if seconds > self.durations.acceptable_wait(now, ask) else seconds / self._longest_wait

    def load(self, now: float, ask: CallRequest, rung: Priority) -> tuple[float, str]:
        """Expected wait of the next typical call over the longest wait allowed, and what binds; 1.0 while shut."""
        if (no := self.blocking_reason(now, ask.usd, rung)) is not None:
            return 1.0, no.limited_by
        seconds, binding = self.expected_wait(now, ask, others=self.expected_calls)
        return seconds / self._longest_wait, binding

    def time_until_below(self, now: float, ask: CallRequest, load: float) -> tuple[float, float]:
        """Seconds until the load will have fallen to that if no more come; and how many one call more adds to it."""
        seconds, _ = self.expected_wait(now, ask, others=self.expected_calls)
        if seconds == math.inf:
            return math.inf, 0.0
        return max(0.0, seconds - load * self._longest_wait), self._each(now, ask, seconds, others=self.expected_calls)

    def _each(self, now: float, ask: CallRequest, seconds: float, *, others: int = 0) -> float:
        """What one call more adds to a wait of so many `seconds`; 0 if that is not known."""
        each = self.expected_wait(now, ask, others=others + 1)[0] - seconds
        return each if each > 0.0 else self.durations.held / max(1, self.limit.limit(now))

    def _seat(self, now: float, ask: CallRequest, seconds: float) -> float | None:
        """When one who would wait `seconds` may come again: not before that has fallen to what it may be."""
        if seconds == math.inf:
            return None  # it has become larger than its bucket: no seat for it, nor a hole before everybody else's
        early = max(0.0, seconds - self._longest_wait)
        each = self._each(now, ask, seconds)
        seat = self._seats.reserve(now + early, 1.0 / each if each else None, self._draw())
        return max(early + (seat or 0.0), seconds - self.durations.acceptable_wait(ask.asked_at, ask)) or None


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)
