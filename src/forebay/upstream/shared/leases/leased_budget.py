"""A budget that processes share: this process leases dollars of it, and spends them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from forebay import clock
from forebay.quota import Budget
from forebay.quota.budget import SMALL_CALLS, check_dollars
from forebay.task import Priority
from forebay.upstream.accounts.budget_rejection import budget_rejection
from forebay.upstream.call_request import Rejected, SpendReservation
from forebay.upstream.shared.leases.lease import ExchangeLink, LedgerLease
from forebay.upstream.shared.ledger.messages import (
    BudgetReply,
    BudgetRequest,
    BudgetTerms,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
)
from forebay.upstream.shared.ledger.periods import period_end, period_start

_PATIENCE: Final = 10.0  # seconds without a call after which the process leaves the ledger
_CHUNK_TIME: Final = 0.5  # seconds of spending that a chunk lasts
_IDLE: Final = 1.0  # seconds without a call after which what is held is returned
_CHUNK: Final = 0.01  # of the budget: what is leased at most beyond what calls need
_LOW: Final = 0.5  # of the idle dollars after an exchange
_MEMORY: Final = 1.0  # seconds over which the spending is measured
_EPSILON: Final = 1e-12  # relative
_REPORT: Final = 0.1  # seconds until what was spent is reported, at most
_OLD: Final = 1.0  # seconds after which the ledger is asked again for what all have spent, if somebody wants to know
_READ: Final = 1.0  # seconds for which a process that only asks stays in the ledger, at least


class BudgetHistory(Protocol):
    """The part of a spend log that is about one budget."""

    def spent(self, per: str | None, now: float) -> float:
        """Return the dollars that were spent in the period of `now`, in epoch seconds."""

    def alerted(self, period: float) -> float:
        """Return the highest share for which an alert was given in a period, by its start; 0 for none."""


class LeasedBudget(LedgerLease):
    """The lease of this process on a budget, which the calls of several accounts spend from. See `ThreadSafeBudget`.

    Safe to use from any thread. Money that was granted for a HIGH or CRITICAL call, and may come out of the share that
    is reserved for them, is spent by such calls only.

    Args:
        link: see `LedgerLease`.
        key: see `LedgerLease`.
        name: of the budget, in rejections.
        budget: the amount and its period.
        owner: whose it is, in rejections; empty for the account. See `Rejected`.
        forget_after: see `BudgetTerms`.
        history: with which the ledger begins if it is new; None: with nothing spent.
        on_alert: called once an alert is due that this process is to give for all, with the share of the budget and the
            dollars that all processes have spent. It may not block, or use the budget.
    """

    def __init__(  # noqa: PLR0913 - which ledger, and which budget
        self,
        link: ExchangeLink,
        key: str,
        name: str,
        budget: Budget,
        *,
        owner: str = "",
        forget_after: float | None = None,
        history: BudgetHistory | None = None,
        on_alert: Callable[[float, float], None] | None = None,
    ) -> None:
        self.name = name
        self.budget = budget
        self._owner = owner
        self._forget_after = forget_after
        self._history = history
        self._on_alert = on_alert
        self._terms = BudgetTerms(budget.usd, budget.per, budget.reserved_share, forget_after)
        super().__init__(link, key, LedgerTerms(budget=self._terms), patience=_PATIENCE)
        self.lock = threading.RLock()

    def reset(self) -> None:
        """See `LedgerLease`."""
        super().reset()
        self._period = -1.0  # its start, as the ledger told it
        self._period_until = math.inf  # when it ends, at the earliest ...
        self._renewed_at = math.inf  # ... and at the latest
        self._held = 0.0  # dollars of this process, as the ledger has it
        self._spent = 0.0  # not reported yet
        self._reported = 0.0  # by the request that is under way
        self._returning = 0.0  # by that request
        self._reserved = 0.0  # for calls in flight
        self._open = 0  # calls in flight
        self._kept = 0.0  # the idle part of what is held that only HIGH and CRITICAL calls may spend
        self._is_asked = False  # a call waits, which was not asked for yet
        self._asked = 0.0  # dollars of the largest call that waits
        self._asked_in_all = 0.0
        self._asked_important = False
        self._low_mark = 0.0  # idle dollars below which another chunk is asked for
        self._recall = False  # others wait for what is idle here
        self._retry_at = -math.inf
        self._reply: BudgetReply | None = None
        self._told_at = -math.inf  # when that reply came
        self._alerted = 0.0  # the highest share of this period that any process has given an alert for
        self._is_exhausted = False  # a small call was rejected, which the ledger is to know
        self._reserved_then = 0.0  # here, when that reply was asked for
        self._away_left: float | None = None  # dollars of its own share while the store is away
        self._paced = 0.0  # dollars reserved since the pace was measured
        self._pace = 0.0  # dollars reserved in a second
        self._measured_at = self._used_at = -math.inf

    @property
    def usd(self) -> float:
        """The dollars that may be spent in each period."""
        return self.budget.usd

    def change(self, budget: Budget) -> None:
        """Set another amount or period: it holds once all processes have it. What was spent stays so."""
        with self.lock:
            self.budget = budget
            self._terms = BudgetTerms(budget.usd, budget.per, budget.reserved_share, self._forget_after)
            self.change_terms(clock.now(), LedgerTerms(budget=self._terms))

    # --- calls ---

    def can_afford(self, usd: float, priority: Priority) -> bool:
        """Return whether `usd` dollars may be reserved now, or once they are leased; False once the budget is spent."""
        now = clock.now()
        check_dollars(usd)
        with self.lock:
            self.count_suspension()
            if self.is_away(now):
                left = self._own_share(now, priority)
                return left > 0.0 and usd <= left * (1.0 + _EPSILON)
            if self.unusable(now) is not None:
                return False
            left = self._total(priority) - self._taken(now)
            return left > 0.0 and usd <= left + self.budget.usd * _EPSILON

    def wait(self, usd: float, priority: Priority) -> float:
        """Return the seconds until `usd` dollars are expected to be leased; 0 if they are. It asks for them."""
        now = clock.now()
        with self.lock:
            self.count_suspension()
            if self._covers(now, usd, priority):
                return 0.0
            self._is_asked = True
            self._asked = max(self._asked, usd)
            self._asked_in_all += usd
            self._asked_important = self._asked_important or priority <= Priority.HIGH
            self.update(now)
            return max(self.link.exchange_time, self._retry_at - now)

    def try_reserve(self, usd: float, priority: Priority) -> SpendReservation | None:
        """Reserve `usd` dollars, or return None if they are not leased."""
        now = clock.now()
        with self.lock:
            self.count_suspension()
            if not self._covers(now, usd, priority):
                return None
            kept = min(self._kept, usd) if priority <= Priority.HIGH else 0.0
            self._kept -= kept
            self._reserved += usd
            self._open += 1
            self._paced += usd
            self._used_at = now
            if self.is_away(now):
                self._away_left = (self._away_left or 0.0) - usd
            self.update(now)
            return LeasedDollars(self, usd, kept, self._period)

    def settle(self, dollars: LeasedDollars, usd: float) -> None:
        """Replace dollars that are reserved by those that their call has cost."""
        check_dollars(usd)
        now = clock.now()
        with self.lock:
            dollars.cost = usd
            if not self._counts(dollars):
                return
            self._open -= 1
            self._reserved = self._reserved - dollars.usd if self._open else 0.0
            self._spent += usd
            self._kept += max(0.0, dollars.kept - usd)
            if self._away_left is not None:
                self._away_left += dollars.usd - usd
            self.update(now)

    def revise(self, dollars: LeasedDollars, usd: float) -> None:
        """Correct the cost of a call that was settled before its usage was known."""
        check_dollars(usd)
        now = clock.now()
        with self.lock:
            if self._counts(dollars):
                self._spent += usd - dollars.cost
                self.update(now)
            dollars.cost = usd

    def _counts(self, dollars: LeasedDollars) -> bool:
        """Return whether dollars are of this process, and of a period that is not over."""
        return dollars.member == self.link.member and dollars.period >= self._period

    def rejection(self, usd: float, priority: Priority) -> Rejected:
        """Return the rejection of a call for which `usd` dollars cannot be reserved, now or soon."""
        now = clock.now()
        with self.lock:
            self.count_suspension()
            if (unusable := self.unusable(now)) is not None:
                return unusable._replace(owner=self._owner)
            away = self.is_away(now)
            used = self.budget.usd - max(0.0, self._own_share(now, priority)) if away else self._taken(now)
            spent = used if away else used - self._reserved_by_all(now)
            resets_in = self._resets_in(now)
            if not away:
                self._report_rejection(now, spent, usd)
        name = f"{self.name}, of which this process has its share alone while the store is away," if away else self.name
        left = self._total(priority) - spent
        affordable_later = left > 0.0 and usd <= left and not away
        return budget_rejection(
            name,
            self.budget,
            usd,
            used=used,
            resets_in=resets_in,
            affordable_later=affordable_later,
            draw=clock.draw() if affordable_later else 0.0,
            owner=self._owner,
        )

    # --- statistics ---

    def spent(self) -> float | None:
        """Return the dollars that all processes have spent in this period, by the latest reply, and this one since.

        None until the first reply. See `ask_spent`.
        """
        now = clock.now()
        with self.lock:
            if self._reply is None:
                return None
            return (0.0 if now >= self._period_until else self._reply.spent) + self._spent

    def ask_spent(self) -> None:
        """Ask the ledger what all processes have spent, unless it has just told it."""
        now = clock.now()
        with self.lock:
            if self.is_asking or self.link.is_failing() or now - self._told_at < _OLD:
                return
            self._busy_at = max(self._busy_at, now - _PATIENCE + _READ)  # it leaves soon, if it has no calls
            self.ask_at(now)

    def reserved(self) -> tuple[int, float]:
        """Return the number of calls of this process that hold dollars, and the dollars."""
        with self.lock:
            return self._open, self._reserved

    def is_fresh(self) -> bool:
        """Return whether it holds nothing, so that another one in its place would be the same: the ledger has all."""
        with self.lock:
            return self.members == 0 and not self.is_busy(0.0)

    def resets_in(self) -> float | None:
        """Return the seconds until the budget is full again; None for never."""
        with self.lock:
            return self._resets_in(clock.now())

    def _resets_in(self, now: float) -> float | None:
        if self.budget.per is None:
            return None
        if now < self._renewed_at < math.inf:
            return self._renewed_at - now
        wall = clock.wall_time()
        return (period_end(self.budget.per, period_start(self.budget.per, wall)) or wall) - wall

    def reset_after_fork(self) -> None:
        """See `ForkAware`. Its link resets it."""

    # --- the money ---

    def _total(self, priority: Priority) -> float:
        """Return the dollars that calls of a priority may spend in a period."""
        return self.budget.usd * (1.0 if priority <= Priority.HIGH else 1.0 - self.budget.reserved_share)

    def _idle(self, priority: Priority) -> float:
        """Return the dollars that are leased, for calls of a priority, and that no call has."""
        idle = self._held - self._spent - self._reserved - self._returning
        return idle if priority <= Priority.HIGH else idle - self._kept

    def _covers(self, now: float, usd: float, priority: Priority) -> bool:
        """Return whether `usd` dollars can be reserved out of what is leased."""
        if self.is_leased(now) and now < self._period_until:
            return usd <= self._idle(priority) + self.budget.usd * _EPSILON
        return self.is_away(now) and usd <= self._own_share(now, priority) + self.budget.usd * _EPSILON

    def _reserved_by_all(self, now: float) -> float:
        """Return the dollars that calls in flight may cost, of all processes, by the latest reply."""
        if self._reply is None or now >= self._period_until or not self.is_leased(now):
            return self._reserved
        return max(0.0, self._reply.reserved - self._reserved_then) + self._reserved

    def _taken(self, now: float) -> float:
        """Return the dollars that are spent or reserved by all processes, by the latest reply."""
        if self._reply is None or now >= self._period_until or not self.is_leased(now):
            return self._reserved  # the next reply tells
        return self._reply.spent + self._spent + self._reserved_by_all(now)

    def _own_share(self, now: float, priority: Priority) -> float:
        """Return the dollars that are left of this process's share while the store is away."""
        if self._reply is not None and self._away_left is None:
            left = self.budget.usd - self._reply.spent - self._reply.reserved
            self._away_left = max(0.0, left / self.members - self._spent)
        if now >= self._period_until and self.budget.per is not None:
            wall = clock.wall_time()
            self._begin_period(period_start(self.budget.per, wall))
            self._period_until = now + (period_end(self.budget.per, self._period) or wall) - wall
            self._away_left = self.budget.usd / self.members
        kept = 0.0 if priority <= Priority.HIGH else self.budget.reserved_share * self.budget.usd / self.members
        return (self._away_left or 0.0) - kept

    def _begin_period(self, start: float) -> None:
        """Forget what belongs to a period that is over, if another one has begun."""
        if self._period < 0.0 or start > self._period:
            self._spent = self._reported = self._kept = self._alerted = 0.0
            self._open, self._reserved = 0, 0.0
        self._period = start

    # --- exchanges ---

    def is_busy(self, now: float) -> bool:  # noqa: ARG002 - see `LedgerLease`
        """See `LedgerLease`."""
        return bool(self._open or self._spent or self._held or self._is_asked or self._is_exhausted)

    def make_request(self, now: float, *, leaving: bool) -> ExchangeRequest:
        """See `LedgerLease`. Calls that are in flight when the process ends cost what was reserved for them."""
        self._measure(now)
        spent, reserved = self._spent, self._reserved
        needed, wanted, important = self._demand(now)
        if leaving:
            spent, reserved, needed, wanted, important = spent + reserved, 0.0, 0.0, 0.0, False
        request = BudgetRequest(
            period=self._period,
            spent=spent,
            reserved=reserved,
            needed=needed,
            important=important,
            wanted=wanted,
            known_spent=0.0 if self._reply is None else self._reply.spent,
            alert=self.budget.alert or 0.0,
            alerted=self._alerted,
            exhausted=self._is_exhausted,
        )
        if self._history is not None and self._period < 0.0:  # the ledger has not told it yet
            request = _with_history(request, self._history, self.budget.per)
        balance = max(0.0, self._held - spent)
        self._reported = spent
        self._reserved_then = reserved
        self._returning = balance - max(min(reserved, balance), request.kept(balance))
        self._kept = max(0.0, self._kept - self._returning)
        return self.new_request(leaving=leaving, budget=request)

    def _demand(self, now: float) -> tuple[float, float, bool]:
        """Return the dollars to hold at least and at most, and whether a HIGH or CRITICAL call waits for them."""
        asked, important = self._asked, self._asked_important
        if self._kept > 0.0 and not important and (self._is_asked or self._recall):
            # First return what no other call may spend; then ask.
            return 0.0, max(self._reserved, self._held - self._spent - self._kept), False
        chunk = min(_CHUNK * self.budget.usd, max(self._pace * _CHUNK_TIME, self._asked_in_all))
        if self._recall or (not self._is_asked and now - self._used_at >= _IDLE):
            chunk = 0.0
        needed = self._reserved + asked if self._is_asked else 0.0
        self._is_asked, self._asked, self._asked_in_all, self._asked_important = False, 0.0, 0.0, False
        return needed, max(needed, self._reserved + chunk), important

    def _measure(self, now: float) -> None:
        """Measure how fast calls reserve dollars, over about a second."""
        passed = min(now - self._measured_at, _MEMORY)
        if passed > 0.0:
            self._pace += (1.0 - math.exp(-passed / _MEMORY)) * (self._paced / passed - self._pace)
            self._paced, self._measured_at = 0.0, now

    def receive(self, now: float, request: ExchangeRequest, reply: ExchangeReply) -> None:
        """See `LedgerLease`."""
        self._spent -= self._reported
        expected = self._held - self._reported - self._returning
        self._reported = self._returning = 0.0
        self._away_left = None
        budget = reply.budget
        if budget is None:  # it has left
            self._held = self._kept = 0.0
            return
        self._reply, self._told_at = budget, now
        if budget.period != self._period:
            self._begin_period(budget.period)
            expected = 0.0
        ends_in = math.inf if budget.ends_in is None else budget.ends_in
        self._period_until, self._renewed_at = self._sent_at + ends_in, now + ends_in
        if request.budget is not None and request.budget.important:
            self._kept += max(0.0, min(budget.held, request.budget.needed) - max(0.0, expected))
        self._held = budget.held
        self._kept = max(0.0, min(self._kept, self._held - self._spent - self._reserved))
        self._low_mark = _LOW * (self._held - self._spent - self._reserved)
        self._recall = budget.recall
        self._retry_at = -math.inf if reply.retry_in is None else now + reply.retry_in
        self._alerted = budget.alerted
        if request.budget is not None and request.budget.exhausted:
            self._is_exhausted = False
        if budget.alert > 0.0 and self._on_alert is not None:
            self._on_alert(budget.alert, budget.spent)

    def _report_rejection(self, now: float, spent: float, usd: float) -> None:
        """Tell the ledger that a call was rejected, if it is one after which the budget counts as spent.

        See `BudgetTracker.take_alert`. The process that the ledger tells then gives the alert.
        """
        if self._alerted < 1.0 and spent + usd > self.budget.usd >= usd * SMALL_CALLS:
            self._is_exhausted = True
            self.update(now)

    def keep_unreported(self) -> None:
        """See `LedgerLease`."""
        self._reported = self._returning = self._held = self._kept = 0.0

    def update(self, now: float) -> None:
        """See `LedgerLease`."""
        if self.is_asking or self.link.is_failing():
            return
        if not self.is_leased(now) or now >= self._period_until:
            if self.is_busy(now):
                self.ask_at(now)
            return
        idle = self._held - self._spent - self._reserved
        if self._is_asked:
            self.ask_at(max(now, self._retry_at))
        if idle < self._low_mark or (self._recall and idle > 0.0):
            self.ask_at(now)
        if self._is_exhausted:
            self.ask_at(now)
        if self._spent:
            self.ask_at(now + _REPORT)

    def wake(self) -> None:
        """See `LedgerLease`. Those who wait have told its link."""


def _with_history(request: BudgetRequest, history: BudgetHistory, per: str | None) -> BudgetRequest:
    """Return a request with what the spend log has of the present period."""
    now = clock.wall_time()
    period = period_start(per, now)
    return msgspec.structs.replace(
        request, logged_period=period, logged_spent=history.spent(per, now), alerted=history.alerted(period)
    )


class LeasedDollars:
    """The dollars of a leased budget that are held for one call. It keeps the budget alive. See `SpendReservation`."""

    __slots__ = ("budget", "cost", "kept", "member", "period", "usd")

    def __init__(self, budget: LeasedBudget, usd: float, kept: float, period: float) -> None:
        self.budget = budget
        self.usd = usd
        self.kept = kept  # of these, out of the share that is reserved for HIGH and CRITICAL
        self.period = period
        self.member = budget.link.member  # a forked child is another one, and has none of the calls
        self.cost = 0.0  # that it was settled for

    def settle(self, usd: float) -> None:
        """See `SpendReservation`."""
        self.budget.settle(self, usd)

    def revise(self, usd: float) -> None:
        """See `SpendReservation`."""
        self.budget.revise(self, usd)
