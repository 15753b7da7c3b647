"""The desk: where calls get their permits and give them back, from any event loop and any thread."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable, Sequence

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import QuotaLevel
from forebay.task import Priority
from forebay.upstream.account import Account
from forebay.upstream.call_request import Admitted, CallOutcome, CallRequest, Permit, Rejected
from forebay.upstream.token_estimates import TokenEstimates
from forebay.upstream.waiters import AsyncWaiter, QueuedCall, ThreadWaiter, Waiter

_GAIN = 0.05  # weight of the newest call in what a typical one asks
_START_SHARE = 0.25  # of a typical call: how long the next may be expected to wait for another run to begin


class SharedAccount:
    """One account, its lock, and those who want to know how full it is. It is the account's `Source`.

    Args:
        account: what decides.
        upstream: whose account it is, for messages.
        start_wait: seconds that the next call may be expected to wait for a run to begin; None: a quarter of a typical
            call.
    """

    def __init__(self, account: Account, *, upstream: str, max_start_wait: float | None) -> None:
        self.name = account.name
        self.account = account
        self._upstream = upstream
        self._start_wait = max_start_wait
        self._lock = threading.RLock()  # a waiter that is told something may look at once
        self._typical = CallRequest()
        self._held: dict[object, int] = {}
        self._urgent: set[object] = set()  # of those, whose next run is CRITICAL: it may start where others may not
        self.token_estimates = TokenEstimates()
        self.served_by_fallback = 0  # calls that another account has served
        self._relief: dict[object, Callable[[], None]] = {}

    # --- permits ---

    async def acquire(self, ask: CallRequest, *, sole_account: bool = True) -> Permit:
        """Wait for a permit, at most until the call's deadline.

        Args:
            ask: what the call asks.
            alone: whether no other account could serve it: the run that is under way meets this one, and its refusal.

        Raises:
            Overloaded: it will not be had in time; ``retry_after`` says when it could.
        """
        asked = self._ask(ask, lambda: AsyncWaiter(self._look), alone=sole_account)
        if isinstance(asked, Permit):
            return asked
        waiting, waiter = asked
        assert isinstance(waiter, AsyncWaiter)  # noqa: S101 - made above
        try:
            answer = await waiter.wait()
        except asyncio.CancelledError:
            self._abandon(waiting)
            raise
        if isinstance(answer, Rejected):
            raise self._refusal(answer, alone=sole_account)
        return answer.permit

    def acquire_blocking(self, ask: CallRequest, *, sole_account: bool = True) -> Permit:
        """As `enter`, in a plain thread."""
        asked = self._ask(ask, lambda: ThreadWaiter(self._look), alone=sole_account)
        if isinstance(asked, Permit):
            return asked
        waiting, waiter = asked
        assert isinstance(waiter, ThreadWaiter)  # noqa: S101 - made above
        try:
            answer = waiter.wait()
        except BaseException:  # a KeyboardInterrupt, say
            self._abandon(waiting)
            raise
        if isinstance(answer, Rejected):
            raise self._refusal(answer, alone=sole_account)
        return answer.permit

    def _ask(self, ask: CallRequest, make: Callable[[], Waiter], *, alone: bool) -> Permit | tuple[QueuedCall, Waiter]:
        if alone and (run := context.call_observer()) is not None:
            self._meet(run)
        now = clock.now()
        with self._lock:  # check and take are one step: no await in here
            if not ask.free:
                self._learn(ask)
            answer = self.account.try_acquire(now, ask)
            if isinstance(answer, Admitted):
                return answer.permit
            if isinstance(answer, Rejected):
                raise self._refusal(answer, alone=alone)
            waiter = make()
            waiting = self.account.enqueue(now, ask, waiter)
            self.account.serve_queue(now)
        return waiting, waiter

    def _abandon(self, waiting: QueuedCall) -> None:
        now = clock.now()
        with self._lock:
            self.account.withdraw(waiting)
            if isinstance(given := waiting.waiter.decision, Admitted):  # in the very moment
                self.account.release_unsent(now, given.permit)
        self._look()

    def _look(self) -> None:
        now = clock.now()
        with self._lock:
            self.account.serve_queue(now)
            relieved = self._relieved(now)
        for callback in relieved:
            callback()

    def quota_levels(self) -> list[QuotaLevel]:
        """What each of its quotas has left."""
        with self._lock:
            return self.account.quotas.levels(clock.now())

    def _refusal(self, answer: Rejected, *, alone: bool) -> Overloaded:
        with self._lock:
            self.account.counts.rejected += 1
        error = Overloaded(
            f"{self._upstream}: {answer.reason}",
            limited_by=f"{self.name}:{answer.limited_by}",
            load=answer.load,
            retry_after=answer.retry_after,
        )
        if alone and (run := context.call_observer()) is not None:
            run.record_rejection(self, error)
        return error

    def _meet(self, run: context.CallObserver) -> None:
        run.record_call(self)
        if run.rejections and (error := run.rejections.get(self)) is not None:
            raise error

    def needs_headers(self) -> bool:
        """Whether what the headers of a success say of the quotas may matter; else they need not be read."""
        return self.account.quotas.needs_headers(clock.now())  # one number is read: no lock

    def answer_began(self, permit: Permit, notices: Sequence[RateLimitHeaders] = ()) -> None:
        """Its answer has begun, and its headers say this of the quotas."""
        now = clock.now()
        with self._lock:
            self.account.answer_began(now, permit, notices)
            self.account.serve_queue(now)
            relieved = self._relieved(now) if self._held else ()
        for callback in relieved:
            callback()

    def suspend(self, seconds: float) -> None:
        """Its provider says that its money is spent: nobody goes for a while, and nobody waits for it."""
        now = clock.now()
        with self._lock:
            self.account.suspend(now, seconds)
            self.account.reject_queued(now)

    def settle(self, permit: Permit, ended: CallOutcome) -> None:
        """Close a permit."""
        now = clock.now()
        with self._lock:
            self.account.settle(now, permit, ended)
            if ended.estimated_input_tokens is not None and ended.used is not None:
                self.token_estimates.observe(ended.estimated_input_tokens, ended.used)
            self.account.serve_queue(now)
            relieved = self._relieved(now) if self._held else ()
        for callback in relieved:
            callback()

    # --- what the task plane feels ---

    @property
    def accounts(self) -> Sequence[SharedAccount]:
        """See `forebay.interfaces.Source`."""
        return (self,)

    def load_for(self, ask: CallRequest | None = None) -> float:
        """How long this call (None: a typical one) would wait if it came now, over the longest wait allowed.

        1.0 or more if it would be refused. Runs that have not called yet do not count.
        """
        with self._lock:
            return self.account.load_for(clock.now(), self._typical if ask is None else ask)

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            return self.account.load(clock.now(), self._typical, priority)

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:
        """See `forebay.interfaces.Source`. While it is shut, what is known is when it opens, and no more."""
        now = clock.now()
        with self._lock:
            no = self.account.blocking_reason(now, self._typical.usd, priority)
            if no is None:
                return self.account.time_until_below(now, self._typical, load)
        return (math.inf if no.retry_after is None else no.retry_after), 0.0

    def may_start(self, priority: Priority) -> bool:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            return self._may_start(clock.now(), priority)

    def _may_start(self, now: float, rung: Priority) -> bool:
        if self._is_shut(now, rung):
            return False
        allowed = guess = self.account.durations.typical_or_guess
        if rung is not Priority.CRITICAL:
            allowed = _START_SHARE * allowed if self._start_wait is None else self._start_wait
        begun = self.account.expected_calls - sum(self._held.values())  # what is held back must not hold itself back
        # A better one waits for NORMAL calls too, which it would overtake: their runs have begun, and are to end.
        ask = CallRequest(charge=self._typical.charge, priority=rung) if rung is Priority.LOW else self._typical
        return self.account.expected_wait(now, ask, others=begun, guess=guess)[0] <= allowed

    def typical_latency(self) -> float:
        """See `forebay.interfaces.Source`."""
        return self.account.durations.typical_or_guess

    def blocks(self, priority: Priority) -> bool:
        """See `forebay.interfaces.Source`."""
        now = clock.now()
        with self._lock:
            return self.account.queue.ahead(priority) > 0 or self._is_shut(now, priority)

    def _is_shut(self, now: float, rung: Priority) -> bool:
        """Whether runs are to wait, for no call is let through. For a budget that never comes back they need not."""
        no = self.account.blocking_reason(now, self._typical.usd, rung)
        return no is not None and (no.limited_by != "budget" or no.retry_after is not None)

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            self._urgent.discard(holder)
            if runs and priority is Priority.CRITICAL:
                self._urgent.add(holder)
            self.account.expected_calls += runs - self._held.get(holder, 0)
            if runs:
                self._held[holder] = runs
            else:
                self._held.pop(holder, None)

    def add_expected_calls(self, runs: int) -> None:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            self.account.expected_calls += runs

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            self._relief[holder] = callback

    def forget(self, holder: object) -> None:
        """See `forebay.interfaces.Source`."""
        with self._lock:
            self._relief.pop(holder, None)
        self.hold_back(holder, 0)

    def _relieved(self, now: float) -> list[Callable[[], None]]:
        if self._may_start(now, Priority.NORMAL):
            told: Iterable[object] = self._held
        else:
            told = self._urgent if self._urgent and self._may_start(now, Priority.CRITICAL) else ()
        return [self._relief[who] for who in told if who in self._relief]

    def _learn(self, ask: CallRequest) -> None:
        """What a typical call asks, as a moving mean."""
        usd = self._typical.usd
        self._typical.usd = usd + _GAIN * (ask.usd - usd) if usd else ask.usd
        old, new = self._typical.charge, ask.charge
        self._typical.charge = Charge(
            requests=1,
            input_tokens=_mean(old.input_tokens, new.input_tokens),
            output_tokens=_mean(old.output_tokens, new.output_tokens),
            tokens=_mean(old.tokens, new.tokens),
        )


def _mean(old: int, new: int) -> int:
    return round(old + _GAIN * (new - old)) if old else new
