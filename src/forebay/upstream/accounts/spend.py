"""The money of an upstream: budgets that several accounts spend from."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

from forebay import clock
from forebay.events import log
from forebay.quota import Budget, BudgetReservation, BudgetTracker
from forebay.task import Priority
from forebay.upstream.accounts.budget_rejection import budget_rejection
from forebay.upstream.call_request import CallRequest, Rejected, SpendReservation
from forebay.upstream.shared.leased_budget import LeasedBudget
from forebay.upstream.shared.link import LedgerLink
from forebay.upstream.shared.messages import ledger_key
from forebay.upstream.weak_lru import WeakLRU

_MAX_TENANTS: Final = 131_072  # budgets of tenants: of those that have spent none is forgotten in its period
_KEEP_TASK: Final = 30 * 86400.0  # seconds for which the budget of a task without calls is kept for all processes
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
            resets_in = self._tracker.resets_in(now)
            affordable_later = self._tracker.can_afford_unreserved(now, usd, priority)
        return budget_rejection(
            self.name,
            budget,
            usd,
            used=used,
            resets_in=resets_in,
            affordable_later=affordable_later,
            draw=clock.draw() if affordable_later else 0.0,
        )

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


UpstreamBudget: TypeAlias = SharedBudget | LeasedBudget


class UpstreamBudgets:
    """The budgets of an upstream: one for all calls, one for each tenant and one for each task, where these are set.

    Both tables are bounded. When more tenants have spent in their period than the table holds, further ones share one
    budget. A task's name is its caller's to choose, so its budget is forgotten once that many others came later.

    Args:
        name: of the upstream.
        budget: of all calls.
        tenant: of each tenant.
        task: of each task.
        link: to the ledgers of the budgets, for all processes that share them; None: they are this process's.
    """

    def __init__(
        self,
        name: str,
        budget: Budget | None,
        tenant: Budget | None,
        task: Budget | None,
        *,
        link: LedgerLink | None = None,
    ) -> None:
        self._name = name
        self._link = link
        self.upstream_budget = None
        if budget is not None:
            self.upstream_budget = self._open(f"the budget of {name}", budget, "budget")
        self.has_budgets = any(budget is not None for budget in (budget, tenant, task))
        self._tenant = tenant
        self._task = task
        self._further_tenants: UpstreamBudget | None = None
        self._tenants: WeakLRU[str, UpstreamBudget] = WeakLRU(
            _MAX_TENANTS, expendable=lambda _, budget: budget.is_fresh(), overflow=self._budget_of_further_tenants
        )
        self._tasks: WeakLRU[str, UpstreamBudget] = WeakLRU(_MAX_TASKS)

    def _open(self, name: str, budget: Budget, *key: str) -> UpstreamBudget:
        """Return a budget: of this process, or leased from its ledger."""
        link = self._link
        if link is None:
            return SharedBudget(name, budget)
        kept = _KEEP_TASK if key[0] == "task" else None
        ledger = ledger_key(key[0], self._name, *key[1:])
        lease = link.lease(ledger, lambda: LeasedBudget(link, ledger, name, budget, forget_after=kept))
        assert isinstance(lease, LeasedBudget)  # noqa: S101 - the key is that of a budget
        return lease

    def for_request(self, request: CallRequest) -> Sequence[UpstreamBudget]:
        """Return the budgets that a call spends from."""
        if not self.has_budgets or request.free:
            return ()
        budgets = [] if self.upstream_budget is None else [self.upstream_budget]
        if self._tenant is not None:
            budgets.append(self._tenants.get(request.tenant, self._new_tenant_budget))
        if self._task is not None and request.task_id is not None:
            budgets.append(self._tasks.get(request.task_id, self._new_task_budget))
        return budgets

    def lease_wait(self, request: CallRequest) -> float:
        """Return the seconds until the money of a call is expected to be leased; 0 if it is. It is asked for then."""
        return max((budget.wait(request.usd, request.priority) for budget in self._leased(request)), default=0.0)

    def _leased(self, request: CallRequest) -> Iterator[LeasedBudget]:
        return (budget for budget in self.for_request(request) if isinstance(budget, LeasedBudget))

    def reset_after_fork(self) -> None:
        """See `ForkAware`."""
        self._tenants.reset_after_fork()
        self._tasks.reset_after_fork()
        for budget in self.all_budgets():
            budget.reset_after_fork()

    def all_budgets(self) -> Sequence[UpstreamBudget]:
        """Return all budgets that exist now."""
        single = [budget for budget in (self.upstream_budget, self._further_tenants) if budget is not None]
        return [*single, *self._tenants.values(), *self._tasks.values()]

    def _new_tenant_budget(self, tenant: str) -> UpstreamBudget:
        assert self._tenant is not None  # noqa: S101 - tenants have budgets
        return self._open(f"the budget of tenant {tenant!r}", self._tenant, "tenant", tenant)

    def _new_task_budget(self, task_id: str) -> UpstreamBudget:
        assert self._task is not None  # noqa: S101 - tasks have budgets
        return self._open(f"the budget of task {task_id!r}", self._task, "task", task_id)

    def _budget_of_further_tenants(self, tenant: str) -> UpstreamBudget:
        """Return the budget that a tenant beyond the bound of the table shares with others. Called under its lock."""
        del tenant
        if self._further_tenants is None:
            assert self._tenant is not None  # noqa: S101 - tenants have budgets
            log.warning(
                "more than %d tenants have spent: others share one budget until its period is over", _MAX_TENANTS
            )
            name = f"the budget that all tenants beyond {_MAX_TENANTS:,} share"
            self._further_tenants = self._open(name, self._tenant, "tenants")
        return self._further_tenants
