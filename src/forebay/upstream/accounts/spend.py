"""The money of an upstream: budgets that several accounts spend from."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

from forebay import clock
from forebay.events import BudgetAlert, log
from forebay.quota import Budget, BudgetReservation, BudgetTracker
from forebay.quota.budget import period_start
from forebay.spend_log import SpendLog
from forebay.spend_log.spend_record import AlertPlace, GivenAlert
from forebay.task import Priority
from forebay.upstream.accounts.budget_rejection import budget_rejection, describe_amount
from forebay.upstream.accounts.spend_recorder import SpendRecorder
from forebay.upstream.call_request import CallBudget, CallRequest, Rejected, SpendReservation
from forebay.upstream.shared.leases.leased_budget import LeasedBudget
from forebay.upstream.shared.leases.link import LedgerLink
from forebay.upstream.shared.ledger.messages import ledger_key
from forebay.upstream.weak_lru import WeakLRU

_MAX_TENANTS: Final = 131_072  # budgets of tenants: of those that have spent none is forgotten in its period
_KEEP_TASK: Final = 30 * 86400.0  # seconds for which the budget of a task without calls is kept for all processes
_FIRST_ANSWER: Final = 1.0  # seconds for which the first answer of a ledger is waited for
_MAX_TASKS: Final = 131_072  # budgets of tasks; that of the task whose last call is longest ago is forgotten first


class ThreadSafeBudget:
    """A budget of this process, which the calls of several accounts spend from. Safe to use from any thread.

    Args:
        name: in messages.
        budget: the amount and its period.
        owner: whose it is, in rejections; empty for the account. See `Rejected`.
        on_alert: called once an alert is due, with the share of it and the dollars spent. It may not block, or use the
            budget.
    """

    __slots__ = ("__weakref__", "_lock", "_on_alert", "_owner", "_tracker", "name")

    def __init__(
        self,
        name: str,
        budget: Budget,
        *,
        owner: str = "",
        on_alert: Callable[[float, float], None] | None = None,
    ) -> None:
        self.name = name
        self._owner = owner
        self._tracker = BudgetTracker(budget)
        self._on_alert = on_alert
        self._lock = threading.Lock()

    @property
    def usd(self) -> float:
        """The dollars that may be spent in each period."""
        return self._tracker.budget.usd

    def restore(self, at: float, usd: float, *, alerted: float) -> None:
        """Begin with what was spent before. See `BudgetTracker.restore`."""
        with self._lock:
            self._tracker.restore(at, usd, alerted=alerted)

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
        self._alert_if_due(rejected=usd)
        return budget_rejection(
            self.name,
            budget,
            usd,
            used=used,
            resets_in=resets_in,
            affordable_later=affordable_later,
            draw=clock.draw() if affordable_later else 0.0,
            owner=self._owner,
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
        self._alert_if_due()

    def revise(self, reservation: BudgetReservation, usd: float) -> None:
        """Correct the cost of a call that was settled before its usage was known."""
        with self._lock:
            self._tracker.revise(clock.wall_time(), reservation, usd)
        self._alert_if_due()

    def _alert_if_due(self, *, rejected: float | None = None) -> None:
        now = clock.wall_time()
        with self._lock:
            share = self._tracker.take_alert(now, rejected=rejected)
            spent = 0.0 if share is None else self._tracker.spent(now)
        if share is not None and self._on_alert is not None:
            self._on_alert(share, spent)

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
    """The dollars of a budget that are held for one call. It keeps the budget alive. See `SpendReservation`."""

    __slots__ = ("_budget", "_reservation")

    def __init__(self, budget: ThreadSafeBudget, reservation: BudgetReservation) -> None:
        self._budget = budget
        self._reservation = reservation

    def settle(self, usd: float) -> None:
        self._budget.settle(self._reservation, usd)

    def revise(self, usd: float) -> None:
        self._budget.revise(self._reservation, usd)


class LoggedBudget:
    """The part of a spend log that is about one budget. See `BudgetHistory`.

    Args:
        spend_log: that is open.
        place: of the budget.
    """

    def __init__(self, spend_log: SpendLog, place: AlertPlace) -> None:
        self._log = spend_log
        self._place = place

    def spent(self, per: str | None, now: float) -> float:
        """See `BudgetHistory`."""
        return self._log.spent(self._place, per, now)

    def alerted(self, period: float) -> float:
        """See `BudgetHistory`."""
        return self._log.alerted(self._place, period)


UpstreamBudget: TypeAlias = ThreadSafeBudget | LeasedBudget


class UpstreamBudgets:
    """The budgets of an upstream: one for all calls, one for each tenant and one for each task, where these are set.

    Both tables are bounded. When more tenants have spent in their period than the table holds, further ones share one
    budget. A task's name is its caller's to choose, so its budget is forgotten once that many others came later.

    Args:
        name: of the upstream.
        budget: of all calls.
        tenant: of each tenant.
        task: of each task.
        spend_log: what was spent before, and where spend is recorded; open. None: nothing is kept.
        on_alert: called with each alert. It may not block, or use a budget.
        link: to the ledgers of the budgets, for all processes that share them; None: they are this process's.
    """

    def __init__(  # noqa: PLR0913 - three budgets, and what they share
        self,
        name: str,
        budget: Budget | None,
        tenant: Budget | None,
        task: Budget | None,
        *,
        spend_log: SpendLog | None = None,
        on_alert: Callable[[BudgetAlert], None] | None = None,
        link: LedgerLink | None = None,
    ) -> None:
        self._name = name
        self._spend_log = spend_log
        self._on_alert = on_alert
        self._link = link
        self.upstream_budget = self._new_budget(f"the budget of {name}", budget, "budget") if budget else None
        self.has_budgets = any(budget is not None for budget in (budget, tenant, task))
        self._tenant = tenant
        self._task = task
        self._further_tenants: UpstreamBudget | None = None
        self._tenants: WeakLRU[str, UpstreamBudget] = WeakLRU(
            _MAX_TENANTS, expendable=lambda _, budget: budget.is_fresh(), overflow=self._budget_of_further_tenants
        )
        self._tasks: WeakLRU[str, UpstreamBudget] = WeakLRU(_MAX_TASKS)

    @property
    def counts_dollars(self) -> bool:
        """True if it matters what calls cost."""
        return self.has_budgets or self._spend_log is not None

    def recorder(self, key: str) -> SpendRecorder | None:
        """Return the recorder of an account; None if nothing is recorded.

        Args:
            key: its API key, as it is shown.
        """
        if self._spend_log is None:
            return None
        return SpendRecorder(self._spend_log, self._name, key, by_task=self._task is not None)

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

    def change_leases(self, old: UpstreamBudgets) -> None:
        """Let the leases of budgets that these replace have the amounts of these, for the calls that they have yet."""
        amounts = {place: budget for place, budget in self._given() if budget is not None}
        for place, budgets in old._leased_by_place():
            if (amount := amounts.get(place)) is not None:
                for budget in budgets:
                    budget.change(amount)

    def _given(self) -> Sequence[tuple[str, Budget | None]]:
        whole = None if self.upstream_budget is None else self.upstream_budget.budget
        return ("budget", whole), ("tenant_budget", self._tenant), ("task_budget", self._task)

    def _leased_by_place(self) -> Iterator[tuple[str, Sequence[UpstreamBudget]]]:
        yield "budget", [] if self.upstream_budget is None else [self.upstream_budget]
        yield "tenant_budget", [*self._tenants.values(), *([self._further_tenants] if self._further_tenants else [])]
        yield "task_budget", self._tasks.values()

    def spent(self) -> float | None:
        """Return the dollars spent of the budget of all calls in its period; None without one, or if it is not known.

        The ledger of a shared budget is asked, unless it has just told it. Its first answer is waited for, for a second
        at most, where no event loop is running.
        """
        budget = self.upstream_budget
        if not isinstance(budget, LeasedBudget):
            return None if budget is None else budget.spent()
        budget.ask_spent()
        if self._link is not None and budget.spent() is None and clock.running_loop() is None:
            self._link.wait_until(lambda: budget.spent() is not None or budget.conflict is not None, _FIRST_ANSWER)
        return budget.spent()

    def lease_wait(self, request: CallRequest) -> float:
        """Return the seconds until the money of a call is expected to be leased; 0 if it is. It is asked for then."""
        if not (self.has_budgets or request.budgets):
            return 0.0
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
        return self._new_budget(f"the budget of tenant {tenant!r}", self._tenant, "tenant_budget", tenant)

    def _new_task_budget(self, task_id: str) -> UpstreamBudget:
        assert self._task is not None  # noqa: S101 - tasks have budgets
        return self._new_budget(f"the budget of task {task_id!r}", self._task, "task_budget", task_id)

    def _new_budget(self, name: str, budget: Budget, setting: str, subject: str = "") -> UpstreamBudget:
        """Return a budget that begins with what the spend log has of it, or one that is leased from its ledger.

        A ledger that is new begins with what the spend log has, too.

        Args:
            name: in messages.
            budget: the amount and its period.
            setting: of the upstream, which it is by.
            subject: the tenant or the task; empty for the budget of all calls.
        """
        place = AlertPlace(self._name, setting, subject)
        on_alert = functools.partial(self._alert, name, budget, place)
        if self._link is not None:
            history = None if self._spend_log is None else LoggedBudget(self._spend_log, place)
            return self._lease(self._link, name, budget, setting, subject, history=history, on_alert=on_alert)
        made = ThreadSafeBudget(name, budget, on_alert=on_alert)
        if self._spend_log is not None:
            now = clock.wall_time()
            spent = self._spend_log.spent(place, budget.per, now)
            made.restore(now, spent, alerted=self._spend_log.alerted(place, period_start(budget.per, now)))
        return made

    def _lease(
        self,
        link: LedgerLink,
        name: str,
        budget: Budget,
        *place: str,
        history: LoggedBudget | None = None,
        on_alert: Callable[[float, float], None] | None = None,
    ) -> LeasedBudget:
        key = ledger_key(place[0], self._name, *filter(None, place[1:]))
        kept = _KEEP_TASK if place[0] == "task_budget" else None
        lease = link.lease(
            key,
            lambda: LeasedBudget(link, key, name, budget, forget_after=kept, history=history, on_alert=on_alert),
        )
        assert isinstance(lease, LeasedBudget)  # noqa: S101 - the key is that of a budget
        return lease

    def _alert(self, name: str, budget: Budget, place: AlertPlace, share: float, spent: float) -> None:
        period = period_start(budget.per, clock.wall_time())
        if self._spend_log is not None:
            self._spend_log.record_alert(place, GivenAlert(period, share))
        log.warning("%s: %s", name, _alert_text(budget, share, spent))
        if self._on_alert is not None:
            alert = BudgetAlert(
                at=clock.now(),
                upstream=place.upstream,
                budget=place.budget,
                tenant=place.subject if place.budget == "tenant_budget" else None,
                task=place.subject if place.budget == "task_budget" else None,
                share=share,
                usd=budget.usd,
                spent=spent,
                per=budget.per,
                period=period,
            )
            self._on_alert(alert)

    def _budget_of_further_tenants(self, tenant: str) -> UpstreamBudget:
        """Return the budget that a tenant beyond the bound of the table shares with others. Called under its lock."""
        del tenant
        if self._further_tenants is None:
            assert self._tenant is not None  # noqa: S101 - tenants have budgets
            log.warning(
                "more than %d tenants have spent: others share one budget until its period is over", _MAX_TENANTS
            )
            name = f"the budget that all tenants beyond {_MAX_TENANTS:,} share"
            link = self._link
            self._further_tenants = (
                ThreadSafeBudget(name, self._tenant)
                if link is None
                else self._lease(link, name, self._tenant, "further_tenants")
            )
        return self._further_tenants


def _alert_text(budget: Budget, share: float, spent: float) -> str:
    whole = describe_amount(budget)
    if share < 1.0:
        return f"{share:.0%} of {whole} is spent: {spent:,.4g} USD"
    until = "" if budget.per is None else f" until the next {budget.per}"
    return f"{spent:,.4g} of {whole} are spent; calls are rejected{until}"
