"""A thread-safe account: where calls get their permits and return them, from any event loop and any thread."""

from __future__ import annotations

import _thread
import contextlib
import gc
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar, overload

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import QuotaLevel
from forebay.retry import Retry
from forebay.task import Priority
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.account_retries import AccountRetries
from forebay.upstream.accounts.call_queue import QueuedCall
from forebay.upstream.accounts.nested_calls import find_holder
from forebay.upstream.accounts.open_answers import OpenAnswer
from forebay.upstream.accounts.timeout_evidence import TimeoutVerdict
from forebay.upstream.accounts.token_estimates import TokenEstimates
from forebay.upstream.accounts.usage_recorder import UsageRecorder
from forebay.upstream.accounts.waiters import AsyncWaiter, ThreadWaiter, Waiter
from forebay.upstream.call_request import (
    UNMETERED,
    Admitted,
    CallOutcome,
    CallRequest,
    Permit,
    Prospect,
    Rejected,
)
from forebay.upstream.shared.leases.account_lease import AccountLease
from forebay.upstream.shared.leases.link import LedgerLink

WaiterT = TypeVar("WaiterT", bound=Waiter)

_FIRST_LOOK: Final = 0.5  # seconds until a call that may leave the queue asks for the first time; then twice as long
_LAST_LOOK: Final = 16.0  # seconds between two such questions at most
_GAIN: Final = 0.05  # weight of the newest call in the typical one
_START_SHARE: Final = 0.25  # of a typical call: the expected wait up to which another run may start


class ThreadSafeAccount:
    """One account with its lock, its waiting callers, and the runs that watch its load. It is a `LoadSource`.

    Args:
        open_account: returns a new account, which makes the decisions: one now, and one in each forked child.
        upstream: name of the account's upstream, for messages.
        retries: of its calls.
        suspend_key: suspends all accounts of its API key for some seconds, itself included, but those that have
            accepted a call sent after some time.
        max_start_wait: seconds that the next call may be expected to wait for a run to start; None for a quarter of a
            typical call.
        recorder: is told what its calls have used; None: nobody is.
        key: its API key, as it is shown.
        lease: on the account's ledger; None: this process does not share its quotas and slots.
        link: to the ledgers of its upstream; None: this process shares none.

    Attributes:
        token_estimates: the tokens that its calls use, learned from those that have ended.
        served_by_fallback: calls of this account that another account has served.
    """

    def __init__(  # noqa: PLR0913 - the parts of an account
        self,
        open_account: Callable[[], Account],
        *,
        upstream: str,
        retries: AccountRetries,
        suspend_key: Callable[[float, float, ThreadSafeAccount], None],
        max_start_wait: float | None,
        recorder: UsageRecorder | None = None,
        key: str = "",
        lease: AccountLease | None = None,
        link: LedgerLink | None = None,
    ) -> None:
        self.account = open_account()
        self.name = self.account.name
        self._open_account = open_account
        self.retries = retries
        self._recorder = recorder
        self._key = key
        self._suspend_key = suspend_key
        self.token_estimates = TokenEstimates()
        self.served_by_fallback = 0
        self._upstream = upstream
        self._max_start_wait = max_start_wait
        self._lock = threading.RLock()  # reentrant: a waiter may look again while it is being answered
        self._typical = CallRequest()
        self._held_back: dict[object, int] = {}
        self._critical: set[object] = set()  # holders whose next run is CRITICAL: it may start where others may not
        self._on_relief: dict[object, Callable[[], None]] = {}
        self._lease = lease
        self._link = link
        self._bind_lease()

    def _bind_lease(self) -> None:
        if self._lease is not None:
            self._lease.bind(self.account, self._lock, self._look)

    def _update_lease(self, link: LedgerLink, now: float) -> None:
        """Ask the ledger for what is needed, and look again when it answers. The lock is held."""
        if self._lease is not None:
            self._lease.update(now)
        if self.account.queue.length:
            link.add_waiter(self._look)

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The calls, and the runs that wait for its relief, are the parent's.

        Permits that the parent's calls hold are not taken back here: see `settle`.
        """
        self._lock = threading.RLock()
        self.account = self._open_account()
        self._bind_lease()
        self.retries.reset_after_fork()
        self._held_back.clear()
        self._critical.clear()
        self._on_relief.clear()

    def move(self, suspend_key: Callable[[float, float, ThreadSafeAccount], None], retry: Retry) -> None:
        """Belong to another registry from now on. See `__init__` and `AccountRetries`."""
        self._suspend_key = suspend_key
        self.retries.retry = retry

    # --- permits ---

    @overload
    async def acquire(self, request: CallRequest, *, sole_account: bool = True, leave: None = None) -> Permit: ...

    @overload
    async def acquire(
        self, request: CallRequest, *, sole_account: bool = True, leave: Callable[[float], bool] | None
    ) -> Permit | None: ...

    async def acquire(
        self, request: CallRequest, *, sole_account: bool = True, leave: Callable[[float], bool] | None = None
    ) -> Permit | None:
        """Wait for a permit on the running event loop, at most until the call's deadline.

        Args:
            request: of the call.
            sole_account: no other account can serve the call, so the call, and its rejection, are reported to the run
                that makes it.
            leave: asked now and then, with the seconds that are left to wait, whether the call leaves the queue.

        Returns:
            The permit; None if the call has left the queue.

        Raises:
            Overloaded: the call is rejected; ``retry_after`` is the time until a retry may succeed.
        """
        acquired = self._try_acquire(request, AsyncWaiter, sole_account=sole_account)
        if isinstance(acquired, Permit):
            return acquired
        call, waiter = acquired
        try:
            pause = None if leave is None else _FIRST_LOOK
            while (decision := await waiter.wait(pause)) is None:
                assert leave is not None and pause is not None  # noqa: S101, PT018 - else it waits for the decision
                if leave(self._wait_left(call)) and self._leave(call, waiter):
                    return None
                pause = min(_LAST_LOOK, 2.0 * pause)
        except GeneratorExit:  # the coroutine is collected, while any lock may be held, or it is closed
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                _thread.start_new_thread(self._abandon, (call,))
            raise
        except BaseException:
            self._abandon(call)
            raise
        return self._permit_of(call, decision, sole_account=sole_account)

    @overload
    def acquire_blocking(self, request: CallRequest, *, sole_account: bool = True, leave: None = None) -> Permit: ...

    @overload
    def acquire_blocking(
        self, request: CallRequest, *, sole_account: bool = True, leave: Callable[[float], bool] | None
    ) -> Permit | None: ...

    def acquire_blocking(
        self, request: CallRequest, *, sole_account: bool = True, leave: Callable[[float], bool] | None = None
    ) -> Permit | None:
        """Wait for a permit in a plain thread. See `acquire`."""
        acquired = self._try_acquire(request, ThreadWaiter, sole_account=sole_account)
        if isinstance(acquired, Permit):
            return acquired
        call, waiter = acquired
        try:
            pause = None if leave is None else _FIRST_LOOK
            while (decision := waiter.wait(pause)) is None:
                assert leave is not None and pause is not None  # noqa: S101, PT018 - else it waits for the decision
                if leave(self._wait_left(call)) and self._leave(call, waiter):
                    return None
                pause = min(_LAST_LOOK, 2.0 * pause)
        except BaseException:  # a KeyboardInterrupt, for example
            self._abandon(call)
            raise
        return self._permit_of(call, decision, sole_account=sole_account)

    def _try_acquire(
        self, request: CallRequest, make_waiter: Callable[[Callable[[], None]], WaiterT], *, sole_account: bool
    ) -> Permit | tuple[QueuedCall, WaiterT]:
        """Take a permit, or put the call into the queue."""
        if sole_account and (run := context.call_observer()) is not None:
            run.record_call(self)
            if (error := run.rejection_by(self)) is not None:
                raise error
        now = clock.now()
        request.holder = find_holder(self.account)
        with self._lock:  # check and take are one step: no await in here
            if self._lease is not None:
                self._lease.count_suspension()
            decision = self.account.try_acquire(now, request)
            if not request.free and not (isinstance(decision, Rejected) and decision.load == math.inf):
                self._learn_typical(request)  # but not from one that was too large at any time: it would block all runs
            if isinstance(decision, Admitted):
                if self._recorder is not None:
                    self._recorder.begin(decision.permit)
                if self._lease is not None:  # nobody waits who is to look again when the ledger answers
                    self._lease.update(now)
                return decision.permit
            if isinstance(decision, Rejected):
                raise self._overloaded(decision, sole_account=sole_account)
            waiter = make_waiter(self._look)
            call = self.account.queue.enqueue(now, request, waiter)
            self.account.serve_queue(now)
            if self._link is not None:
                self._update_lease(self._link, now)
        return call, waiter

    def _permit_of(self, call: QueuedCall, decision: Admitted | Rejected, *, sole_account: bool) -> Permit:
        if isinstance(decision, Rejected):
            raise self._overloaded(decision, sole_account=sole_account)
        with self._lock:
            self.account.take_grant(call)
        if self._recorder is not None:
            self._recorder.begin(decision.permit)
        return decision.permit

    def _overloaded(self, rejected: Rejected, *, sole_account: bool) -> Overloaded:
        """Count a rejection, and return it as an error."""
        with self._lock:
            self.account.count_rejected()
        owner = rejected.owner
        error = Overloaded(
            rejected.reason if owner else f"{self._upstream}: {rejected.reason}",
            limited_by=f"{owner or self.name}:{rejected.limited_by}",
            load=rejected.load,
            retry_after=rejected.retry_after,
        )
        unmetered = rejected.limited_by in UNMETERED  # it would be so at any time: the run's other calls are not
        if sole_account and not unmetered and (run := context.call_observer()) is not None:
            run.record_rejection(self, error)
        return error

    def _wait_left(self, call: QueuedCall) -> float:
        """Return the seconds that a queued call is expected to wait from now on."""
        with self._lock:
            return self.account.wait_left(clock.now(), call)

    def _leave(self, call: QueuedCall, waiter: Waiter) -> bool:
        """Take a call out of the queue; return False if there is a decision about it by now."""
        with self._lock:
            if waiter.decision is not None:
                return False
            self.account.withdraw(clock.now(), call)
        self._look()
        return True

    def _abandon(self, call: QueuedCall) -> None:
        """Take a call whose caller has gone out of the queue, and release the permit that it may have got."""
        with self._lock:
            self.account.withdraw(clock.now(), call)
        self._look()

    def _look(self) -> None:
        """Answer the queued calls that can be answered now."""
        now = clock.now()
        with self._lock:
            collect = self.account.queue.length > 0 and self.account.open_answers.begin_collection(now)
            overdue = self.account.open_answers.overdue(now) if self.account.queue.length else ()
        if collect:
            gc.collect()
        for answer in overdue:
            answer.take_back()
        with self._lock:
            relieved = self._serve_queue(now)
        for callback in relieved:
            callback()

    def _serve_queue(self, now: float) -> Iterable[Callable[[], None]]:
        """Answer queued calls; return the callbacks of the holders whose runs may start now, to be called unlocked."""
        if self._lease is not None:
            self._lease.count_suspension()
        if self.account.queue.length:
            self.account.serve_queue(now)
        if self._link is not None and self.account.queue.length:
            self._update_lease(self._link, now)
        elif self._lease is not None:
            self._lease.update(now)
        if not self._held_back:
            return ()
        if self._may_start(now, Priority.NORMAL):
            holders: Iterable[object] = self._held_back
        else:
            holders = self._critical if self._critical and self._may_start(now, Priority.CRITICAL) else ()
        return [self._on_relief[holder] for holder in holders if holder in self._on_relief]

    def answer_began(self, permit: Permit, headers: Sequence[RateLimitHeaders] = ()) -> None:
        """Note that the answer of a call has begun. `headers`: its rate-limit headers."""
        now = clock.now()
        with self._lock:
            if permit.account is not self.account:
                return
            self.account.answer_began(now, permit, headers)
            relieved = self._serve_queue(now)
        for callback in relieved:
            callback()

    def settle(self, permit: Permit, outcome: CallOutcome) -> None:
        """Close a permit: return its slot, and the reserved amounts that were not used.

        A permit that was granted in another process, before a fork, is only closed: nothing is held for it here.
        """
        now = clock.now()
        with self._lock:
            if permit.account is not self.account:
                permit.closed = True
                return
            usd = self.account.settle(now, permit, outcome)
            if outcome.estimated_input_tokens is not None and outcome.used is not None:
                self.token_estimates.observe(now, outcome.estimated_input_tokens, outcome.used)
            relieved = self._serve_queue(now)
        if self._recorder is not None:
            self._recorder.end(permit, outcome, usd, api_key=self._key)
        for callback in relieved:
            callback()

    def quota_wait(self, request: CallRequest) -> float:
        """Return the seconds that a call that is retried has to wait for its quotas at least."""
        with self._lock:
            return self.account.quotas.wait(clock.now(), request.charge).seconds

    def disbelieves_retry_after(self, outcome: CallOutcome) -> bool:
        """Return whether a refused call need not wait for its Retry-After. See `Account`."""
        with self._lock:
            return self.account.disbelieves_retry_after(outcome)

    def keep_place(self, request: CallRequest, back_at: float) -> None:
        """Keep the place of a call that comes back at `back_at`, to be retried. See `KeptPlaces`."""
        with self._lock:
            self.account.places.keep(clock.now(), request, back_at)

    def drop_place(self, request: CallRequest) -> None:
        """Free the place of a call: it is back, or does not come back."""
        with self._lock:
            if request not in self.account.places:
                return
            self.account.places.drop(request)
        self._look()

    def add_open_answer(self, answer: OpenAnswer) -> Callable[[float], None]:
        """Note that a streaming answer has begun whose reader may drop it; return what to call if it leaves early."""
        with self._lock:
            self.account.open_answers.add(answer)
            return self.account.open_answers.record_abandoned

    def judge_timeout(self, permit: Permit) -> TimeoutVerdict:
        """Return whether an attempt that its caller cut off now speaks against the provider. See `TimeoutEvidence`."""
        now = clock.now()
        with self._lock:
            return self.account.timeouts.judge(now - permit.granted_at)

    def record_spend_cap(self, permit: Permit, seconds: float, *, certain: bool) -> None:
        """Note that a call was refused because money at the provider is spent.

        If that means the account, and not this call alone, no calls of its API key are sent for `seconds`, or fewer
        while that is in doubt, and those that wait are rejected.

        Args:
            permit: of the call.
            seconds: to wait before the next call is tried.
            certain: it means the account.
        """
        now = clock.now()
        with self._lock:
            suspended = self.account.confirm_spent(now, permit, seconds, certain=certain)
        if suspended is not None:
            self.suspend_alone(suspended.seconds)
            self.suspend(suspended.seconds, since=suspended.since)

    def suspend(self, seconds: float, *, since: float = math.inf) -> None:
        """Send no calls of its API key for `seconds`, and reject those that wait: its money at the provider is gone.

        Calls of an account go on if one of its calls that was sent after `since` was accepted.
        """
        self._suspend_key(seconds, since, self)

    def suspend_alone(self, seconds: float, *, since: float = math.inf) -> None:
        """Send no calls of this account for `seconds`, and reject those that wait. See `Account.suspend`."""
        now = clock.now()
        with self._lock:
            self.account.suspend(now, seconds, since=since)
            self.account.reject_queued(now)
            if self._link is not None:
                self._update_lease(self._link, now)

    def is_expendable(self) -> bool:
        """Return whether a new account could replace it. See `Account.is_expendable`."""
        with self._lock:
            return not self._on_relief and self.account.is_expendable(clock.now())

    def count_served_by_fallback(self) -> None:
        """Count a call of this account that another account has served."""
        with self._lock:
            self.served_by_fallback += 1

    def needs_headers(self) -> bool:
        """Return whether the rate limit headers of a success can matter now; if not, they need not be read."""
        return self.account.quotas.needs_headers(clock.now())  # reads one number: no lock

    def quota_levels(self) -> list[QuotaLevel]:
        """Return the level of each quota."""
        with self._lock:
            return self.account.quotas.levels(clock.now())

    # --- load, for the task plane ---

    @property
    def accounts(self) -> Sequence[ThreadSafeAccount]:
        """See `forebay.interfaces.LoadSource`."""
        return (self,)

    def load_for(self, request: CallRequest | None = None) -> float:
        """Return the expected wait of a call over the longest allowed; 1.0 or more if it would be rejected.

        Runs that have not made their first call do not count.

        Args:
            request: of the call; None for a typical one.
        """
        with self._lock:
            return self.account.load_for(clock.now(), self._typical if request is None else request)

    def prospect_for(self, request: CallRequest | None = None) -> Prospect:
        """Return how soon a call would be sent here, and how many more like it could be. See `Account`.

        Args:
            request: of the call; None for a typical one.
        """
        with self._lock:
            return self.account.prospect_for(clock.now(), self._typical if request is None else request)

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            return self.account.load(clock.now(), self._typical, priority)

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:
        """See `forebay.interfaces.LoadSource`. While calls are blocked, only the time until they are not is known."""
        now = clock.now()
        with self._lock:
            blocked = self.account.blocking_reason(now, self._typical.usd, priority)
            if blocked is None:
                return self.account.time_until_below(now, self._typical, load)
        return (math.inf if blocked.retry_after is None else blocked.retry_after), 0.0

    def may_start(self, priority: Priority) -> bool:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            return self._may_start(clock.now(), priority)

    def _may_start(self, now: float, priority: Priority) -> bool:
        if self._is_blocked(now, priority):
            return False
        allowed = guess = self.account.durations.typical_or_guess
        if priority is not Priority.CRITICAL:
            allowed = _START_SHARE * allowed if self._max_start_wait is None else self._max_start_wait
        # Runs that are held back must not block themselves.
        started = self.account.expected_calls - sum(self._held_back.values())
        # A run of a better priority waits for NORMAL calls too, though its calls overtake them: the runs of these calls
        # have started, and must be able to end.
        low = priority is Priority.LOW
        request = CallRequest(charge=self._typical.charge, priority=priority) if low else self._typical
        return self.account.expected_wait(now, request, others=started, guess=guess)[0] <= allowed

    def typical_latency(self) -> float:
        """See `forebay.interfaces.LoadSource`."""
        return self.account.durations.typical_or_guess

    def blocks(self, priority: Priority) -> bool:
        """See `forebay.interfaces.LoadSource`."""
        now = clock.now()
        with self._lock:
            return self.account.queue.ahead(priority) > 0 or self._is_blocked(now, priority)

    def _is_blocked(self, now: float, priority: Priority) -> bool:
        """Return whether runs must wait because no call is sent. They need not for a budget that never refills."""
        blocked = self.account.blocking_reason(now, self._typical.usd, priority)
        return blocked is not None and (blocked.limited_by != "budget" or blocked.retry_after is not None)

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            self._critical.discard(holder)
            if runs and priority is Priority.CRITICAL:
                self._critical.add(holder)
            self.account.add_expected_calls(runs - self._held_back.get(holder, 0))
            if runs:
                self._held_back[holder] = runs
            else:
                self._held_back.pop(holder, None)

    def add_expected_calls(self, runs: int) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            self.account.add_expected_calls(runs)

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            self._on_relief[holder] = callback

    def forget(self, holder: object) -> None:
        """See `forebay.interfaces.LoadSource`."""
        with self._lock:
            self._on_relief.pop(holder, None)
        self.hold_back(holder, 0)

    def _learn_typical(self, request: CallRequest) -> None:
        """Update the needs of a typical call, which are moving means."""
        usd, old, new = self._typical.usd, self._typical.charge, request.charge
        self._typical.usd = usd + _GAIN * (request.usd - usd) if usd else request.usd
        if new == old:
            return  # as of guarded functions, which use no tokens
        self._typical.charge = Charge(
            requests=1,
            input_tokens=_mean(old.input_tokens, new.input_tokens),
            output_tokens=_mean(old.output_tokens, new.output_tokens),
            tokens=_mean(old.tokens, new.tokens),
            most_output_tokens=_mean(old.most_output_tokens, new.most_output_tokens),
            most_tokens=_mean(old.most_tokens, new.most_tokens),
        )


def _mean(old: int, new: int) -> int:
    return round(old + _GAIN * (new - old)) if old else new
