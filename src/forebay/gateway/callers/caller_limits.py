"""The limits of a caller, such as a tenant or an issued key: rates, calls in progress, money.

They hold over all targets together. A call takes what it needs of its callers' rates and slots before it asks its
target's account for a permit, and waits for it in a queue of the same kind: by priority and deadline, and with a
Retry-After where the wait would be too long. Dollars are reserved and settled by the account of the target, as those
of its own budgets are, since it knows the price of a call. With `CallerLedgers`, the limits are one for all processes
that share a store.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeAlias

from forebay import clock
from forebay.breaker import Breaker, BreakerRules
from forebay.errors import Overloaded
from forebay.gateway.callers.caller_ledgers import CallerLedgers
from forebay.interfaces import Charge, Outcome
from forebay.limit import Grant, Limit
from forebay.quota import Budget, Quota, RateLimiter
from forebay.quota.bucket import Bucket
from forebay.quota.rate_limiter import new_buckets, resize_buckets
from forebay.retry import Retry
from forebay.spend_log import SpendLog
from forebay.spend_log.spend_record import ALL_UPSTREAMS, AlertPlace
from forebay.task import Priority
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.account_retries import AccountRetries
from forebay.upstream.accounts.spend import ThreadSafeBudget, UpstreamBudget
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.call_request import CallBudget, CallOutcome, CallRequest, Permit
from forebay.upstream.shared.leases.account_lease import AccountLease

_NO_LIMIT: Final = 1_000_000  # calls in progress: more than a gateway has connections
_NEVER_OPENS: Final = BreakerRules(triggers=())
_UNSENT: Final = CallOutcome(kind=Outcome.IGNORED, released=True, usd=0.0)

SpentBefore: TypeAlias = Callable[[str | None, float], float]
"""Returns the dollars that a caller has spent in the period of an epoch time; the period is as `Budget.per` has it."""


def spent_before(spend_log: SpendLog | None, budget: str, subject: str) -> SpentBefore | None:
    """Return what tells what a caller has spent before, over all targets; None without a spend log.

    Args:
        spend_log: of the gateway; None for none.
        budget: ``"key_budget"`` or ``"tenant_budget"``.
        subject: the name of the key, or the tenant.
    """
    if spend_log is None:
        return None
    return functools.partial(spend_log.spent, AlertPlace(ALL_UPSTREAMS, budget, subject))


class CallerSlots(Limit):
    """The number of calls that a caller may have in progress. It can be changed, and learns nothing.

    Args:
        n: calls; None for no limit.

    Attributes:
        n: calls; None for no limit.
    """

    def __init__(self, n: int | None) -> None:
        super().__init__(initial_limit=min(n or _NO_LIMIT, _NO_LIMIT), max_limit=_NO_LIMIT)
        self.n = n

    def change(self, n: int | None) -> None:
        """Set the number; calls in progress beyond it end as they are."""
        self.n = n
        self._set_level(float(min(n or _NO_LIMIT, _NO_LIMIT)))

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """See `Limit`."""


class CallerLimits:
    """The limits of one caller over all targets. Safe to use from any event loop and thread.

    Args:
        name: in the header ``x-forebay-limited-by``, such as ``"tenant:acme"``; never a secret.
        title: in messages, such as ``"tenant 'acme'"``.
        quotas: rates of its requests and tokens.
        max_concurrent: calls in progress at a time, those that wait for a target's account included; None for any.
        budget: dollars that its calls may spend; None for any.
        max_wait: seconds that a call may be expected to wait for a rate or a slot.
        spent: tells what its calls have spent before, with which its budget begins; None for nothing.
        ledgers: that processes share; None: the limits are this process's.

    Attributes:
        budget: of its calls, for `Caller.budgets`; None if there is none.
    """

    def __init__(  # noqa: PLR0913 - what can be limited
        self,
        name: str,
        title: str,
        *,
        quotas: Sequence[Quota] = (),
        max_concurrent: int | None = None,
        budget: Budget | None = None,
        max_wait: float = 600.0,
        spent: SpentBefore | None = None,
        ledgers: CallerLedgers | None = None,
    ) -> None:
        self.name = name
        self.title = title
        self._quotas = tuple(quotas)
        self._slots = CallerSlots(max_concurrent)
        self._limits_slots = max_concurrent is not None
        self._max_wait = max_wait
        self._spent = spent
        self._ledgers = ledgers
        self._buckets: Sequence[Bucket] = new_buckets(self._quotas)
        self._account = self._open()
        self.budget = None if budget is None else self._new_budget(budget)
        self._budget_before: UpstreamBudget | None = None  # that was taken away, and may come back

    def change(
        self,
        *,
        quotas: Sequence[Quota] = (),
        max_concurrent: int | None = None,
        budget: Budget | None = None,
        max_wait: float = 600.0,
    ) -> None:
        """Set other limits. What was used of a rate or spent of a budget stays used and spent.

        Calls that wait for a rate that is changed go on by the old ones.
        """
        resized = self._ledgers is not None and self._slots.n != max_concurrent  # a ledger knows their number
        self._slots.change(max_concurrent)
        self._limits_slots = max_concurrent is not None
        if resized or tuple(quotas) != self._quotas:
            self._buckets = resize_buckets(clock.now(), self._quotas, self._buckets, quotas)
            self._quotas, self._max_wait = tuple(quotas), max_wait
            self._account = self._open()
        elif max_wait != self._max_wait:
            self._max_wait = max_wait
            self._account.account.change_max_wait(max_wait)
        before = self.budget or self._budget_before
        self.budget, self._budget_before = None, before
        if budget is None:
            return
        if before is None:
            before = self._new_budget(budget)
        else:
            before.change(budget)
        self.budget = before

    @property
    def budgets(self) -> tuple[CallBudget, ...]:
        """Its budget, if it has one, as a `Caller` takes it."""
        return () if self.budget is None else (self.budget,)

    @property
    def is_metered(self) -> bool:
        """True if its calls must be readable, because their tokens or dollars are counted."""
        return bool(self._quotas) or self.budget is not None

    @property
    def in_progress(self) -> int:
        """Its calls in progress, without those that wait."""
        return self._account.account.in_flight

    def is_fresh(self) -> bool:
        """Return whether nothing is used, so that new limits in its place would be the same."""
        account = self._account.account
        idle = not (account.in_flight or account.queue)
        budget = self.budget or self._budget_before
        return idle and account.quotas.is_full(clock.now()) and (budget is None or budget.is_fresh())

    async def acquire(self, request: CallRequest) -> CallerPermit:
        """Wait for what a call needs of the rates and slots, at most until its deadline.

        Args:
            request: the needs of the call, as its target's account takes them.

        Raises:
            Overloaded: the call is rejected, also because the budget cannot pay it.
        """
        if self.budget is not None and not request.free:
            self._check_budget(self.budget, request.usd, request.priority)
        if not (self._quotas or self._limits_slots):
            return CallerPermit(self._account, None)
        own = CallRequest(
            charge=request.charge,
            priority=request.priority,
            deadline=request.deadline,
            tenant=request.tenant,
            task_id=request.task_id,
            model=request.model,
            free=request.free,
            unmetered=request.unmetered,
        )
        account = self._account
        permit = await account.acquire(own)
        own.deadline = math.inf  # the target's account judges whether the call ends in time
        return CallerPermit(account, permit)

    def _check_budget(self, budget: UpstreamBudget, usd: float, priority: Priority) -> None:
        """Check that a budget can pay a call, before it waits for anything else.

        Raises:
            Overloaded: it cannot.
        """
        if not budget.can_afford(usd, priority):
            rejected = budget.rejection(usd, priority)
            raise Overloaded(
                rejected.reason,
                limited_by=f"{self.name}:{rejected.limited_by}",
                load=rejected.load,
                retry_after=rejected.retry_after,
            )

    def _new_budget(self, budget: Budget) -> UpstreamBudget:
        name, now = f"the budget of {self.title}", clock.wall_time()
        if self._ledgers is not None:
            return self._ledgers.budget(self.name, name, budget, spent=self._spent)
        spent = 0.0 if self._spent is None else self._spent(budget.per, now)
        made = ThreadSafeBudget(name, budget, owner=self.name)
        made.restore(now, spent, alerted=0.0)
        return made

    def _leased_buckets(self, lease: AccountLease) -> Sequence[Bucket]:
        """Return the levels of the quotas in a ledger. What is missing so far is missing there, if it is new."""
        now, leased = clock.now(), []
        for quota, known in zip(self._quotas, self._buckets, strict=True):
            bucket = lease.bucket(quota.counted, quota.amount, quota.seconds)
            if known is not bucket:
                bucket.missing = max(0.0, known.capacity - known.remaining(now))
            leased.append(bucket)
        return leased

    def _open(self) -> ThreadSafeAccount:
        quotas, max_wait = self._quotas, self._max_wait
        lease = None if self._ledgers is None else self._ledgers.account(self.name, quotas, self._slots.n)
        if lease is not None:
            self._buckets = self._leased_buckets(lease)
        buckets = self._buckets

        def open_account() -> Account:
            return Account(
                self.name,
                limit=self._slots,
                quotas=RateLimiter(quotas, buckets=buckets),
                breaker=Breaker(_NEVER_OPENS, draw=clock.draw),
                budgets=lambda _: (),  # the target's account reserves the dollars
                max_wait=max_wait,
                lease=lease,
                draw=clock.draw,
            )

        return ThreadSafeAccount(
            open_account,
            upstream=self.title,
            retries=AccountRetries(Retry(), draw=clock.draw),  # nothing is retried here
            suspend_key=lambda _seconds, _since, _account: None,
            max_start_wait=None,
            lease=lease,
            link=None if self._ledgers is None else self._ledgers.link,
        )


class CallerPermit(NamedTuple):
    """A permit of one caller's rates and slots for one call. It is closed exactly once.

    Attributes:
        account: that granted it.
        permit: of that account; None if there was nothing to take.
    """

    account: ThreadSafeAccount
    permit: Permit | None

    def settle(self, used: Charge | None) -> None:
        """Return the slot, and replace what was reserved of the rates by what was used.

        Args:
            used: requests and tokens; None for as many as were reserved.
        """
        if self.permit is not None:
            self.account.settle(self.permit, CallOutcome(kind=Outcome.IGNORED, used=used, usd=0.0))

    def release(self) -> None:
        """Return everything: the call was not sent."""
        if self.permit is not None:
            self.account.settle(self.permit, _UNSENT)


class CallerHold:
    """The permits of one call of all its callers, such as its key and its tenant, held while its block runs.

    Entering waits for one caller's limits after the other, in their order, which must be the same for all calls.

    Args:
        limits: of its callers.
        request: the needs of the call.
        used: returns what the call has used, when its block ends: None for as much as was reserved, and no request at
            all for a call that was not sent.
    """

    __slots__ = ("_limits", "_permits", "_request", "_used")

    def __init__(
        self, limits: Sequence[CallerLimits], request: CallRequest, used: Callable[[], Charge | None] = lambda: None
    ) -> None:
        self._limits = limits
        self._request = request
        self._used = used
        self._permits: list[CallerPermit] = []

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def acquire(self) -> None:
        """Wait for the permits; `close` returns them, and must be called unless this raises.

        Raises:
            Overloaded: a caller's limits reject the call; nothing is held then.
        """
        try:
            for limits in self._limits:
                self._permits.append(await limits.acquire(self._request))
        except BaseException:
            permits, self._permits = self._permits, []
            for permit in permits:
                permit.release()
            raise

    def close(self) -> None:
        """Return the permits. Without any this does nothing."""
        if not self._permits:
            return
        permits, self._permits = self._permits, []
        used = self._used()
        for permit in permits:
            if used is not None and not used.requests:
                permit.release()
            else:
                permit.settle(used)
