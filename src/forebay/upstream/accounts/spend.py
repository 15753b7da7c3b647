"""The money of an upstream: budgets that several accounts spend from."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Final

from forebay import clock
from forebay.events import log
from forebay.quota import Budget, BudgetReservation, BudgetTracker
from forebay.task import Priority
from forebay.upstream.call_request import CallBudget, CallRequest, Rejected, SpendReservation
from forebay.upstream.weak_lru import WeakLRU

_RETURNED_AFTER: Final = 4.0  # seconds, on average, after which reserved dollars may have been returned
_MAX_TENANTS: Final = 131_072  # budgets of tenants: of those that have spent none is forgotten in its period
_MAX_TASKS: Final = 131_072  # budgets of tasks; that of the task whose last call is longest ago is forgotten first


class SharedBudget:
    """A budget that the calls of several accounts spend from. Safe to use from any thread."""

    __slots__ = ("__weakref__", "_lock", "_tracker", "name")

    def __init__(self, name: str, budget: Budget) -> None:
        self.name = name
        self._tracker = BudgetTracker(budget)
        self._lock = threading.Lock()

    def can_afford(self, usd: float, priority: Priority) -> bool:
        """Return whether `usd` dollars may be reserved; False, even for 0, once the budget is spent."""
        with self._lock:
            return self._tracker.can_afford(clock.wall_time(), usd, priority)

    def rejection(self, usd: float, priority: Priority) -> Rejected:
        """Return the rejection of a call for which `usd` dollars cannot be reserved now."""
        now = clock.wall_time()
        with self._lock:
            budget = self._tracker.budget
            used = budget.usd - self._tracker.remaining(now)
            retry_after = None if usd > budget.usd else self._tracker.resets_in(now)
            affordable_later = self._tracker.can_afford_unreserved(now, usd, priority)
        if affordable_later:  # calls under way hold the most that they may cost, and return what they do not
            retry_after = min(_RETURNED_AFTER * (0.5 + clock.draw()), math.inf if retry_after is None else retry_after)
        period = "in all" if budget.per is None else f"a{'n' if budget.per == 'hour' else ''} {budget.per}"
        reserved = budget.usd * budget.reserved_share
        kept = f", {reserved:,.3g} of it for HIGH and CRITICAL alone" if reserved else ""
        advice = ": ask for less, or raise that budget" if retry_after is None else ""
        reason = (
            f"{self.name} would be overspent: it has {budget.usd:,.12g} USD {period}{kept}, of which {used:,.3g} are"
            f" spent or reserved, and this may cost {usd:,.3g}{advice}"
        )
        return Rejected(reason, "budget", math.inf if retry_after is None else used / budget.usd, retry_after)

    def try_reserve(self, usd: float, priority: Priority) -> SpendReservation | None:
        """Reserve `usd` dollars, or return None if they may not be: check and take are one step, under one lock."""
        with self._lock:
            reservation = self._tracker.try_reserve(clock.wall_time(), usd, priority)
        return None if reservation is None else _HeldDollars(self, reservation)

    def settle(self, reservation: BudgetReservation, usd: float) -> None:
        """Replace a reservation by the dollars that its call has cost."""
        with self._lock:
            self._tracker.settle(clock.wall_time(), reservation, usd)

    def revise(self, reservation: BudgetReservation, usd: float) -> None:
        """Correct the cost of a call that was settled before its usage was known."""
        with self._lock:
            self._tracker.revise(clock.wall_time(), reservation, usd)

    @property
    def budget(self) -> Budget:
        """The amount and its period."""
        return self._tracker.budget

    def change(self, budget: Budget) -> None:
        """Set another amount or period. What was spent and is reserved stays so."""
        with self._lock:
            self._tracker.change(clock.wall_time(), budget)

    def spent(self) -> float:
        """Return the dollars spent in this period."""
        with self._lock:
            return self._tracker.spent(clock.wall_time())

    def reserved(self) -> tuple[int, float]:
        """Return the number of calls that hold dollars, and the dollars."""
        with self._lock:
            return self._tracker.reserved()

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The dollars that the parent's calls hold are the parent's; what was spent stays spent."""
        self._lock = threading.Lock()
        self._tracker.drop_reservations()

    def is_fresh(self) -> bool:
        """Return whether nothing is spent or reserved, so that another budget in its place would be the same."""
        with self._lock:
            return not self._tracker.spent(clock.wall_time()) and not self._tracker.reserved()[0]

    def resets_in(self) -> float | None:
        """Return the seconds until the budget is full again; None for never."""
        with self._lock:
            return self._tracker.resets_in(clock.wall_time())


class _HeldDollars:
    """The dollars of a shared budget that are held for one call. It keeps the budget alive. See `SpendReservation`."""

    __slots__ = ("_budget", "_reservation")

    def __init__(self, budget: SharedBudget, reservation: BudgetReservation) -> None:
        self._budget = budget
        self._reservation = reservation

    def settle(self, usd: float) -> None:
        self._budget.settle(self._reservation, usd)

    def revise(self, usd: float) -> None:
        self._budget.revise(self._reservation, usd)


class UpstreamBudgets:
    """The budgets of an upstream: one for all calls, one for each tenant and one for each task, where these are set.

    Both tables are bounded. When more tenants have spent in their period than the table holds, further ones share one
    budget. A task's name is its caller's to choose, so its budget is forgotten once that many others came later.
    """

    def __init__(self, name: str, budget: Budget | None, tenant: Budget | None, task: Budget | None) -> None:
        self.upstream_budget = SharedBudget(f"the budget of {name}", budget) if budget is not None else None
        self.has_budgets = any(budget is not None for budget in (budget, tenant, task))
        self._tenant = tenant
        self._task = task
        self._further_tenants: SharedBudget | None = None
        self._tenants: WeakLRU[str, SharedBudget] = WeakLRU(
            _MAX_TENANTS, expendable=lambda _, budget: budget.is_fresh(), overflow=self._budget_of_further_tenants
        )
        self._tasks: WeakLRU[str, SharedBudget] = WeakLRU(_MAX_TASKS)

    def for_request(self, request: CallRequest) -> Sequence[CallBudget]:
        """Return the budgets that a call spends from, those of its caller included."""
        if request.free:
            return ()
        if not self.has_budgets:
            return request.budgets
        budgets: list[CallBudget] = list(request.budgets)
        if self.upstream_budget is not None:
            budgets.append(self.upstream_budget)
        if self._tenant is not None:
            budgets.append(self._tenants.get(request.tenant, self._new_tenant_budget))
        if self._task is not None and request.task_id is not None:
            budgets.append(self._tasks.get(request.task_id, self._new_task_budget))
        return budgets

    def change_to(self, other: UpstreamBudgets) -> None:
        """Take the amounts and periods of other budgets. What was spent and is reserved stays so."""
        if self.upstream_budget is None or other.upstream_budget is None:
            self.upstream_budget = other.upstream_budget
        else:
            self.upstream_budget.change(other.upstream_budget.budget)
        self._tenant, self._task, self.has_budgets = other._tenant, other._task, other.has_budgets
        tenants = [*self._tenants.values(), *([] if self._further_tenants is None else [self._further_tenants])]
        for budgets, amount in ((tenants, self._tenant), (self._tasks.values(), self._task)):
            if amount is not None:
                for budget in budgets:
                    budget.change(amount)

    def reset_after_fork(self) -> None:
        """See `ForkAware`."""
        self._tenants.reset_after_fork()
        self._tasks.reset_after_fork()
        for budget in self.all_budgets():
            budget.reset_after_fork()

    def all_budgets(self) -> Sequence[SharedBudget]:
        """Return all budgets that exist now."""
        single = [budget for budget in (self.upstream_budget, self._further_tenants) if budget is not None]
        return [*single, *self._tenants.values(), *self._tasks.values()]

    def _new_tenant_budget(self, tenant: str) -> SharedBudget:
        assert self._tenant is not None  # noqa: S101 - tenants have budgets
        return SharedBudget(f"the budget of tenant {tenant!r}", self._tenant)

    def _new_task_budget(self, task_id: str) -> SharedBudget:
        assert self._task is not None  # noqa: S101 - tasks have budgets
        return SharedBudget(f"the budget of task {task_id!r}", self._task)

    def _budget_of_further_tenants(self, tenant: str) -> SharedBudget:
        """Return the budget that a tenant beyond the bound of the table shares with others. Called under its lock."""
        del tenant
        if self._further_tenants is None:
            assert self._tenant is not None  # noqa: S101 - tenants have budgets
            log.warning(
                "more than %d tenants have spent: others share one budget until its period is over", _MAX_TENANTS
            )
            name = f"the budget that all tenants beyond {_MAX_TENANTS:,} share"
            self._further_tenants = SharedBudget(name, self._tenant)
        return self._further_tenants
