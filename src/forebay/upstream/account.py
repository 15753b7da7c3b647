"""An account: one decision over slot, request rate, token rate, money and breaker, and the line before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from forebay.admission import BookedSeats
from forebay.breaker import Breaker, BreakerState
from forebay.quota import Quotas
from forebay.task import Priority
from forebay.typing import Limit, Notice, Outcome
from forebay.upstream.ask import Ask, Ended, Go, No, Permit, Purse, Wait, times
from forebay.upstream.line import CallLine
from forebay.upstream.order import Order
from forebay.upstream.outage import Outage
from forebay.upstream.pace import Pace
from forebay.upstream.passing import first_to_pass
from forebay.upstream.service import Service
from forebay.upstream.tally import Tally
from forebay.upstream.waiting import Waiter, Waiting

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
        quotas: Quotas,
        breaker: Breaker,
        purses: Callable[[Ask], Sequence[Purse]],
        own: Purse | None = None,
        longest_wait: float,
        draw: Callable[[], float],
    ) -> None:
        self.name = name
        self.limit = limit
        self.quotas = quotas
        self.breaker = breaker
        self.order = Order()
        self.pace = Pace()
        self.in_flight = 0
        self.peak = 0
        self.coming = 0  # runs that have begun, or are held back, and have not made their first call
        self.service = Service()
        self.tally = Tally()
        self.line = CallLine(self.order)
        self._purses = purses
        self._own = own
        self._longest_wait = longest_wait
        self._draw = draw
        self._seats = BookedSeats()
        self._stopped_until = -math.inf
        self._outage = Outage(limit, longest_wait)
        self._young: deque[Permit] = deque()  # given within the last second, and some that have ended since

    # --- a call comes ---

    def admit(self, now: float, ask: Ask) -> Go | Wait | No:
        """Let a call go, or say how long it would wait, or why it will not be let at all.

        Go has taken everything that the call needs. Wait has taken nothing: its caller may `join` the line.
        """
        self._ripen(now)
        ask.since = min(ask.since, now)
        at_once = not self.line.length and self._room(now) and self.quotas.wait(now, ask.charge)[0] <= 0.0
        refusal = self._refusal(now, ask, fits=at_once)
        if refusal is not None:
            return refusal
        if at_once:
            return self._late(now, ask) or self._let_go(now, ask)
        seconds, binding = self.expected_wait(now, ask)
        if len(self.line) >= _LINE:
            return No(f"{_LINE} calls wait already", "line", 1.0, self._seat(now, ask, seconds))
        if seconds > self._longest_wait:
            reason = (
                f"a call would wait about {seconds:.3g} s for {binding}, and {self._longest_wait:g} s is the longest"
            )
            return No(reason, binding, seconds / self._longest_wait, self._seat(now, ask, seconds))
        if seconds > self.service.bearable(now, ask):
            time = ask.deadline - now
            reason = f"it would wait about {seconds:.3g} s for {binding}, too much of the {time:.3g} s to its deadline"
            return No(reason, binding, seconds / self._longest_wait, self._seat(now, ask, seconds))
        return Wait(seconds, binding)

    def join(self, now: float, ask: Ask, waiter: Waiter) -> Waiting:
        """Stand in the line."""
        return self.line.stand(now, ask, waiter)

    def leave(self, waiting: Waiting) -> None:
        """Give a place in the line up. Leaving twice, or after the answer, does nothing."""
        self.line.withdraw(waiting)

    def _refusal(self, now: float, ask: Ask, *, fits: bool = False) -> No | None:
        """Why it is not let through, however long it waits; `fits`: no quota is too small for it."""
        if ask.deadline <= now:
            return No("its deadline passed before it was sent: give a later one", "deadline", math.inf, None)
        for purse in self._purses(ask):
            if not purse.affords(ask.usd, ask.priority):
                return purse.refusal(ask.usd)
        if not fits and (smaller := self.quotas.outgrown(now, ask.charge)) is not None:
            reason = f"it is larger than {smaller} will ever be: ask for less (max_tokens counts), or raise that quota"
            return No(reason, smaller, math.inf, None)
        return self._closed(now, free=ask.free)

    def _closed(self, now: float, *, free: bool = False) -> No | None:
        """Why its provider is not asked at all, whatever the call; `free`: it costs nothing there."""
        if now < self._stopped_until and not free:
            return No("its provider says that its money is spent", "budget", 1.0, self._stopped_until - now)
        if not self.breaker.ready(now):
            again = self.breaker.remaining(now, probes_take=max(_PROBED, self.service.typical))
            return No("its breaker is open", "breaker", 1.0, again)
        if (seconds := self._outage.lasts(now)) is not None:
            reason = f"its provider has refused everything for {seconds:.0f} s"
            return No(reason, "outage", 1.0, self._outage.again(now, self._draw()))
        return None

    def _late(self, now: float, ask: Ask) -> No | None:
        if ask.deadline == math.inf or not self.service.hopeless(now, ask, contested=self.line.length > 0):
            return None
        again = self._seat(now, ask, self.expected_wait(now, ask)[0])
        return No("it could hardly be answered before its deadline any more", "deadline", 1.0, again)

    def _let_go(self, now: float, ask: Ask) -> Go:
        self.order.served(self.order.rank(ask))
        return Go(self._take(now, ask))

    def _room(self, now: float) -> bool:
        return self.in_flight < self.limit.limit(now)

    def _take(self, now: float, ask: Ask) -> Permit:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        self.tally.sent += 1
        self.tally.unattributed += ask.run is None
        reservation = self.quotas.reserve(now, ask.charge)
        sums = [purse.reserve(ask.usd) for purse in self._purses(ask)]
        grant = self.limit.grant(now, self.in_flight)
        permit = Permit(ask, now, grant, self.breaker.allow(now), reservation, sums)
        self._young.append(permit)
        return permit

    # --- the line moves ---

    def pump(self, now: float) -> None:
        """Answer those in the line whose time has come, and have its head look again when time alone will move it."""
        while self.line.length and (when := self._pump(now)) is not None:
            place = self.line.head()
            if place is None or place[2].waiter.look_at(when):
                return
            self.leave(place[2])  # its event loop has closed: nobody waits

    def _pump(self, now: float) -> float | None:
        ripe = self._ripen(now)
        while (gone := self.line.overdue(now)) is not None:
            seconds = self.expected_wait(now, gone.ask)[0]
            again = self._seat(now, gone.ask, seconds)
            self._answer(gone, No("its deadline passed while it waited", "line", 1.0, again))
        if not self.line:
            return None
        self.line.promote(now, self.service.typical_or_guess)
        while (place := self.line.head()) is not None:
            waiting: Waiting = place[2]
            refusal = self._refusal(now, waiting.ask)
            if refusal is not None:
                self._answer(waiting, refusal)
                continue
            if not self._room(now):
                return _earliest(self.limit.next_change(now), self.line.next_deadline(), ripe)
            seconds, _ = self.quotas.wait(now, waiting.ask.charge)
            if seconds > 0.0:
                passed = self._let_pass(now)
                if passed > 0.0:
                    return _earliest(now + min(seconds, passed), self.line.next_deadline(), ripe)
                continue
            self._go(now, self.line.send(now, place))
        return None

    def _let_pass(self, now: float) -> float:
        """The head waits for a quota: send one behind it that does not delay it.

        Returns:
            0 if one was sent; else seconds until one could be, or infinity.
        """
        slots = self.limit.limit(now) - self.in_flight
        if slots == 1 or len(self.line) == 1 or self.breaker.state(now) is not BreakerState.CLOSED:
            return math.inf  # the only slot is the head's, and so is a probe
        seconds, waiting = first_to_pass(now, self.line.row(), self.quotas, self._purses, slots=slots)
        if waiting is not None and not seconds:
            self._go(now, waiting)
        return seconds

    def _go(self, now: float, waiting: Waiting) -> None:
        if (late := self._late(now, waiting.ask)) is not None:
            self._answer(waiting, late)
            return
        permit = self._take(now, waiting.ask)
        if not self._answer(waiting, Go(permit)):
            self.never_sent(now, permit)

    def _answer(self, waiting: Waiting, answer: Go | No) -> bool:
        self.line.withdraw(waiting)
        return waiting.waiter.answer(answer)

    def refuse_all(self, now: float) -> None:
        """The breaker has opened: nobody need wait any longer."""
        for waiting in list(self.line):
            refusal = self._refusal(now, waiting.ask)
            if refusal is not None:
                self._answer(waiting, refusal)

    # --- a call ends ---

    def began(self, now: float, permit: Permit, notices: Sequence[Notice] = ()) -> None:
        """A call was not refused: its answer has begun, and its headers say this of the quotas."""
        if not permit.closed:
            self._accept(now, permit)
        self._outage.over()
        self.quotas.hear(now, notices, permit.reservation)

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
                if now < permit.at + _SILENCE:
                    return permit.at + _SILENCE
                self._accept(now, permit)
            young.popleft()
        return None

    def settle(self, now: float, permit: Permit, ended: Ended) -> None:
        """Take the end of a call: its slot, and what it reserved beyond its use, are free.

        Raises:
            AssertionError: it was closed before: a bug of the caller's.
        """
        assert not permit.closed, "a permit is closed exactly once"  # noqa: S101
        permit.closed = True
        ask, outcome, tally, stretch = permit.ask, ended.outcome, self.tally, None
        if outcome is Outcome.SUCCESS and ended.seconds is not None:
            stretch = self.paced(now, permit, ended.made, ended.seconds)
        if outcome is Outcome.SUCCESS:
            tally.succeeded += 1
            self._outage.over()
            self._accept(now, permit)
        elif outcome is Outcome.OVERLOAD:
            tally.turned_away += 1
            self._outage.refused(now)
        elif outcome is Outcome.FAULT:
            tally.failed += 1
        self.in_flight -= 1
        self.limit.observe(now, permit.grant, outcome, stretch=stretch)
        if ended.notices and not ended.rate:
            self.quotas.hear(now, ended.notices, permit.reservation)
        if ended.rate:
            tally.turned_away += 1
            self.quotas.refused(now, permit.reservation, ended.retry_after, ended.notices)
        elif ended.released:
            self.quotas.release(now, permit.reservation)
        else:
            used = ask.charge if ended.used is None else ended.used
            tally.input_tokens += used.input_tokens
            tally.output_tokens += used.output_tokens
            self.quotas.settle(now, permit.reservation, used)
        for held in permit.sums:
            held.settle(ask.usd if ended.usd is None else ended.usd)
        took = now - permit.at if ended.seconds is None else ended.seconds
        late = outcome is Outcome.IGNORED and now > ask.deadline - _PUNCTUAL
        self.service.ended(took, ended, stretch=stretch, slots=self.limit.limit(now), late=late)
        judged = outcome if ended.final else Outcome.IGNORED
        if self.breaker.record(now, judged, permit.era) is not None:
            self.refuse_all(now)

    def never_sent(self, now: float, permit: Permit) -> None:
        """Give everything back: nothing has left."""
        self.tally.sent -= 1
        self.tally.unattributed -= permit.ask.run is None
        self.settle(now, permit, Ended(outcome=Outcome.IGNORED, released=True, usd=0.0))

    def stop(self, now: float, seconds: float) -> None:
        """Its provider says that its money is spent: ask it no more for a while, for it would only refuse."""
        self._stopped_until = now + seconds

    def paced(self, now: float, permit: Permit, tokens: int, seconds: float) -> float | None:
        """A success took so long for its output tokens; returns its stretch, if it made any and that is known.

        Only with at most half of the limit in flight is it taken for normal: else our own load would be.
        """
        if not tokens:
            return None
        light = max(permit.grant.in_flight, self.in_flight) <= max(1, self.limit.limit(now) // 2)
        return self.pace.stretch(tokens, seconds, light=light)

    # --- what presses ---

    def expected_wait(self, now: float, ask: Ask, *, others: int = 0, guess: float = 0.0) -> tuple[float, str]:
        """Seconds until a call like this would be sent, and what it waits for.

        While no call has ended yet, nothing is known of how long a slot is held, and `guess` is what is feared.
        """
        self._ripen(now)
        ahead = self.line.ahead(ask.priority) + others
        delay = self.quotas.wait(now, ask.charge, ahead=times(ask.charge, ahead))
        seconds, binding = delay.seconds, delay.binding or "nothing"
        limit = self.limit.limit(now)
        free = limit - self.in_flight - ahead
        if free <= 0:
            rounds = (1 - free) / max(1, limit)
            slot = rounds * (self.service.held or guess)
            if slot > seconds:
                return slot, "concurrency"
        return seconds, binding

    def shut(self, now: float, usd: float, rung: Priority) -> No | None:
        """Why no call of that price and rung is let through, however long it waits; None if one is."""
        if self._own is not None and not self._own.affords(usd, rung):
            return self._own.refusal(usd)
        return self._closed(now)

    def load_for(self, now: float, ask: Ask) -> float:
        """Expected wait of this very call over the longest wait allowed; 1.0 or more if it would be refused."""
        refusal = self._refusal(now, ask)
        if refusal is not None:
            return max(1.0, refusal.load)
        seconds, _ = self.expected_wait(now, ask)
        return math.inf if seconds > self.service.bearable(now, ask) else seconds / self._longest_wait

    def load(self, now: float, ask: Ask, rung: Priority) -> tuple[float, str]:
        """Expected wait of the next typical call over the longest wait allowed, and what binds; 1.0 while shut."""
        if (no := self.shut(now, ask.usd, rung)) is not None:
            return 1.0, no.binding
        seconds, binding = self.expected_wait(now, ask, others=self.coming)
        return seconds / self._longest_wait, binding

    def room(self, now: float, ask: Ask, load: float) -> tuple[float, float]:
        """Seconds until the load will have fallen to that if no more come; and how many one call more adds to it."""
        seconds, _ = self.expected_wait(now, ask, others=self.coming)
        if seconds == math.inf:
            return math.inf, 0.0
        return max(0.0, seconds - load * self._longest_wait), self._each(now, ask, seconds, others=self.coming)

    def _each(self, now: float, ask: Ask, seconds: float, *, others: int = 0) -> float:
        """What one call more adds to a wait of so many `seconds`; 0 if that is not known."""
        each = self.expected_wait(now, ask, others=others + 1)[0] - seconds
        return each if each > 0.0 else self.service.held / max(1, self.limit.limit(now))

    def _seat(self, now: float, ask: Ask, seconds: float) -> float | None:
        """When one who would wait `seconds` may come again: not before that has fallen to what it may be."""
        if seconds == math.inf:
            return None  # it has become larger than its bucket: no seat for it, nor a hole before everybody else's
        early = max(0.0, seconds - self._longest_wait)
        each = self._each(now, ask, seconds)
        seat = self._seats.book(now + early, 1.0 / each if each else None, self._draw())
        return max(early + (seat or 0.0), seconds - self.service.bearable(ask.since, ask)) or None


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)
