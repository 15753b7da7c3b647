"""The tenants of a gateway: their limits over all targets, and the place of their calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from forebay.events import log
from forebay.gateway.callers.caller_ledgers import CallerLedgers
from forebay.gateway.callers.caller_limits import CallerLimits, spent_before
from forebay.gateway.settings import OTHER_TENANTS, TenantSettings
from forebay.spend_log import SpendLog
from forebay.task import Priority
from forebay.upstream.call_request import Caller
from forebay.upstream.weak_lru import WeakLRU

_MAX_OTHERS: Final = 10_000  # tenants without settings of their own whose limits are kept; in use, none is forgotten


class Tenants:
    """The tenants of one gateway.

    Callers choose the names of tenants without settings of their own. When more of them than the table holds have used
    something of their limits, further ones share one set of limits.

    Args:
        settings: of tenants.
        spend_log: with what it has of their present period their budgets begin; open. None: with nothing.
        ledgers: of their limits, which processes share; None: they are this process's.
    """

    def __init__(
        self,
        settings: Sequence[TenantSettings],
        spend_log: SpendLog | None = None,
        ledgers: CallerLedgers | None = None,
    ) -> None:
        self._spend_log = spend_log
        self._ledgers = ledgers
        self._settings: Mapping[str, TenantSettings] = {}
        self._named: dict[str, CallerLimits] = {}
        self._others: WeakLRU[str, CallerLimits] = WeakLRU(
            _MAX_OTHERS, expendable=lambda _, limits: limits.is_fresh(), overflow=self._limits_of_further
        )
        self._further: CallerLimits | None = None
        self.change(settings)

    def change(self, settings: Sequence[TenantSettings]) -> None:
        """Set other limits. What tenants have used and spent stays used and spent."""
        self._settings = {each.name: each for each in settings}
        for name in self._settings:
            if name != OTHER_TENANTS and name not in self._named:  # it may have been one of the others
                self._named[name] = self._others.get(name, self._new_limits)
        for name, limits in self._named.items():
            _apply(self._settings.get(name) or self._settings.get(OTHER_TENANTS), limits)
        for limits in (*self._others.values(), *([self._further] if self._further else [])):
            if limits not in self._named.values():
                _apply(self._settings.get(OTHER_TENANTS), limits)

    def limits_of(self, tenant: str) -> CallerLimits | None:
        """Return the limits of a tenant; None if it has none."""
        if not self._settings:
            return None
        if tenant in self._named:
            return self._named[tenant]
        if OTHER_TENANTS not in self._settings:
            return None
        return self._others.get(tenant, self._new_limits)

    def caller(self, caller: Caller, *, names_priority: bool) -> Caller:
        """Return a caller with the priority and the weight of its tenant.

        Args:
            caller: as its headers say.
            names_priority: a header says its priority.
        """
        settings = self._settings.get(caller.tenant) or self._settings.get(OTHER_TENANTS)
        if settings is None:
            return caller
        asked = caller.priority
        if not names_priority and settings.priority is not None:
            asked = Priority[settings.priority.upper()]
        best = Priority[settings.max_priority.upper()]
        return msgspec.structs.replace(caller, priority=max(asked, best), weight=settings.weight)

    def _new_limits(self, tenant: str) -> CallerLimits:
        spent = spent_before(self._spend_log, "tenant_budget", tenant)
        limits = CallerLimits(f"tenant:{tenant}", f"tenant {tenant!r}", spent=spent, ledgers=self._ledgers)
        _apply(self._settings.get(tenant) or self._settings.get(OTHER_TENANTS), limits)
        return limits

    def _limits_of_further(self, tenant: str) -> CallerLimits:
        """Return the limits that a tenant beyond the bound of the table shares with others. Called under its lock."""
        del tenant
        if self._further is None:
            log.warning("more than %d tenants use their limits: others share one set of limits", _MAX_OTHERS)
            self._further = CallerLimits("tenant:*", f"all tenants beyond {_MAX_OTHERS:,}", ledgers=self._ledgers)
            _apply(self._settings.get(OTHER_TENANTS), self._further)
        return self._further


def _apply(settings: TenantSettings | None, limits: CallerLimits) -> None:
    """Give limits the values of settings; none if there are no settings."""
    if settings is None:
        limits.change()
        return
    limits.change(
        quotas=settings.quotas(),
        max_concurrent=settings.max_concurrent,
        budget=settings.budget(),
        max_wait=settings.max_wait,
    )


def with_limits(caller: Caller, limits: Sequence[CallerLimits]) -> Caller:
    """Return a caller whose calls spend from the budgets of these limits, and are metered for their rates."""
    if not limits:
        return caller
    budgets = tuple(budget for each in limits for budget in each.budgets)
    return msgspec.structs.replace(caller, budgets=budgets, metered=any(each.is_metered for each in limits))
