"""The accounts of an upstream: which call belongs to which, and what each is made of."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from forebay import clock
from forebay.breaker import UPSTREAM_RULES, Breaker, BreakerRules
from forebay.limit import AdaptiveLimit, FixedLimit, Limit
from forebay.quota import Budget, BudgetReservation, BudgetTracker, Quota, RateLimiter
from forebay.task import Priority
from forebay.upstream.account import Account
from forebay.upstream.call_request import CallRequest, Rejected
from forebay.upstream.shared_account import SharedAccount
from forebay.upstream.upstream_settings import (
    check_kind,
    check_models,
    check_quotas,
    check_seconds,
    check_slots,
    check_weights,
)
from forebay.upstream.weak_lru import WeakLRU

_ACCOUNTS = 1_000  # kept, beside those that somebody holds; the longest unused go first
_KNOWN = 1_000  # pairs of model and key whose account is remembered
_PURSES = 10_000  # of tenants and of tasks, likewise


class UpstreamSettings:
    """What an upstream was given to work under, checked."""

    def __init__(  # noqa: PLR0913 - what Upstream takes
        self,
        name: str,
        *,
        models: Mapping[str, Sequence[Quota]] | None,
        quotas: Sequence[Quota],
        max_concurrent: int | None,
        breaker: BreakerRules | None,
        max_wait: float,
        max_start_wait: float | None,
        weights: Mapping[str, float] | None,
    ) -> None:
        owner = f"Upstream {name!r}"
        check_models(owner, models or {})
        check_quotas(owner, "quotas", quotas)
        check_slots(owner, max_concurrent)
        check_kind(owner, "breaker", breaker, BreakerRules, "BreakerRules(reset_timeout=30)")
        check_seconds(owner, "max_wait", max_wait)
        if max_start_wait is not None:
            check_seconds(owner, "max_start_wait", max_start_wait, none=True)
        check_weights(owner, weights or {})
        self.name = name
        self.models = {pattern: tuple(group) for pattern, group in (models or {}).items()}
        self.quotas = tuple(quotas)
        self.max_concurrent = max_concurrent
        self.breaker = breaker or UPSTREAM_RULES
        self.max_wait = max_wait
        self.max_start_wait = max_start_wait
        self.weights = dict(weights or {})

    def model_group(self, model: str) -> str:
        """The model group of `model`: the longest pattern that matches it, or the model itself if none does.

        A model that no pattern knows gets an account of its own, which is learned from headers. Without patterns all
        models share the one account.
        """
        if not self.models:
            return ""
        matching = [pattern for pattern in self.models if fnmatchcase(model, pattern)]
        return max(matching, key=len) if matching else model

    def new_limit(self) -> Limit:
        """A limit for a new account."""
        return AdaptiveLimit() if self.max_concurrent is None else FixedLimit(self.max_concurrent)


class SharedBudget:
    """A purse that may be used by the calls of several accounts at once, at the present time."""

    def __init__(self, name: str, budget: Budget) -> None:
        self.name = name
        self._purse = BudgetTracker(budget)
        self._lock = threading.Lock()

    def can_afford(self, usd: float, priority: Priority) -> bool:
        """Whether so much may be reserved; nothing, once all is spent."""
        with self._lock:
            return self._purse.can_afford(clock.wall_time(), usd, priority)

    def rejection(self, usd: float) -> Rejected:
        """Why so much is not afforded, and when it may be: never, if that is more than there will ever be."""
        now = clock.wall_time()
        with self._lock:
            budget = self._purse.budget
            gone = budget.usd - self._purse.remaining(now)
            again = None if usd > budget.usd else self._purse.resets_in(now)
        period = "in all" if budget.per is None else f"a{'n' if budget.per == 'hour' else ''} {budget.per}"
        kept = (
            f", {budget.usd * budget.reserved_share:,.3g} of it for HIGH and CRITICAL alone"
            if budget.reserved_share
            else ""
        )
        change = ": ask for less, or raise that budget" if again is None else ""
        reason = (
            f"{self.name} would be overspent: it has {budget.usd:,.12g} USD {period}{kept}, of which {gone:,.3g} are"
            f" spent or reserved, and this may cost {usd:,.3g}{change}"
        )
        return Rejected(reason, "budget", math.inf if again is None else gone / budget.usd, again)

    def reserve(self, usd: float) -> SharedReservation:
        """Set so much aside."""
        with self._lock:
            return SharedReservation(self, self._purse.reserve(clock.wall_time(), usd))

    def settle(self, held: BudgetReservation, usd: float) -> None:
        """A call has cost so much."""
        with self._lock:
            self._purse.settle(clock.wall_time(), held, usd)

    def spent(self) -> float:
        """Dollars spent in this period."""
        with self._lock:
            return self._purse.spent(clock.wall_time())

    def reserved(self) -> tuple[int, float]:
        """How many calls hold dollars of it, and how many dollars."""
        with self._lock:
            return self._purse.reserved()

    def resets_in(self) -> float | None:
        """Seconds until all of it is there again; None for never."""
        with self._lock:
            return self._purse.resets_in(clock.wall_time())


class SharedReservation:
    """Dollars set aside of a till."""

    __slots__ = ("_sum", "_till")

    def __init__(self, till: SharedBudget, held: BudgetReservation) -> None:
        self._till = till
        self._sum = held

    def settle(self, usd: float) -> None:
        """It has cost so much."""
        self._till.settle(self._sum, usd)


class UpstreamBudgets:
    """The purses of an upstream: its own, and one a tenant and one a task where these have budgets."""

    def __init__(self, name: str, budget: Budget | None, tenant: Budget | None, task: Budget | None) -> None:
        self.upstream_budget = SharedBudget(f"the budget of {name}", budget) if budget is not None else None
        self.has_budgets = any(budget is not None for budget in (budget, tenant, task))
        self._tenant = tenant
        self._task = task
        self._purses: WeakLRU[str, SharedBudget] = WeakLRU(_PURSES)

    def for_request(self, ask: CallRequest) -> Sequence[SharedBudget]:
        """Those that a call draws on."""
        if not self.has_budgets or ask.free:
            return ()
        purses = [] if self.upstream_budget is None else [self.upstream_budget]
        if self._tenant is not None:
            purses.append(self._purse(f"the budget of tenant {ask.tenant!r}", self._tenant))
        if self._task is not None and ask.task_id is not None:
            purses.append(self._purse(f"the budget of task {ask.task_id!r}", self._task))
        return purses

    def all_budgets(self) -> Sequence[SharedBudget]:
        """All that there are."""
        return [*(() if self.upstream_budget is None else (self.upstream_budget,)), *self._purses.values()]

    def _purse(self, name: str, budget: Budget) -> SharedBudget:
        return self._purses.get(name, lambda name: SharedBudget(name, budget))


class AccountRegistry:
    """Finds the account of a call, and opens it when it is the first."""

    def __init__(self, terms: UpstreamSettings, money: UpstreamBudgets, *, draw: Callable[[], float]) -> None:
        self.settings = terms
        self.budgets = money
        self._draw = draw
        self._desks: WeakLRU[tuple[str, str], SharedAccount] = WeakLRU(_ACCOUNTS)
        self._unopened: dict[str, SharedAccount] = {}  # by group, for those who want to know how it would be to call
        self._known: dict[tuple[str, str], tuple[str, str]] = {}  # a model and a key: no hash, no patterns each time

    def __iter__(self) -> Iterator[SharedAccount]:
        return iter(self._desks.values())

    def account(self, model: str, key: str = "") -> SharedAccount:
        """The desk of the account of `model` under an API key; the key is known by its fingerprint only."""
        where = self._known.get((model, key)) or self._where(model, key)
        return self._desks.get(where, self._open)

    def accounts_of(self, model: str) -> Sequence[SharedAccount]:
        """The accounts of `model` under whatever key, of any model if it is empty; one that is not open if none is."""
        group = self.settings.model_group(model) if model else ""
        found = [desk for (_, other), desk in self._desks.items() if other == group or not model]
        if not found:
            found = [self._unopened.get(group) or self._unopened.setdefault(group, self._open(("", group)))]
        return found

    def _where(self, model: str, key: str) -> tuple[str, str]:
        group = self.settings.model_group(model)
        where = (fingerprint(key), group)
        if len(self._known) >= _KNOWN:
            self._known = {}
        self._known[model, key] = where
        return where

    def _open(self, where: tuple[str, str]) -> SharedAccount:
        mark, group = where
        terms = self.settings
        name = ":".join(part for part in (f"upstream:{terms.name}", mark, group) if part)
        account = Account(
            name,
            limit=terms.new_limit(),
            quotas=RateLimiter(terms.models.get(group, terms.quotas)),
            breaker=Breaker(terms.breaker, draw=self._draw),
            budgets=self.budgets.for_request,
            upstream_budget=self.budgets.upstream_budget,
            max_wait=terms.max_wait,
            draw=self._draw,
        )
        account.order.weights = terms.weights
        return SharedAccount(account, upstream=terms.name, max_start_wait=terms.max_start_wait)


def fingerprint(key: str) -> str:
    """Eight hex digits that stand for an API key wherever something is shown; empty for none."""
    return hashlib.sha256(key.encode()).hexdigest()[:8] if key else ""
