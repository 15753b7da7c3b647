"""The ledgers of what callers may use, such as tenants and issued keys: one for all processes that share a store."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Final

from forebay.quota import Budget, Quota
from forebay.upstream.shared.leases.account_lease import AccountLease
from forebay.upstream.shared.leases.leased_budget import LeasedBudget
from forebay.upstream.shared.leases.link import LedgerLink
from forebay.upstream.shared.ledger.messages import LedgerTerms, QuotaTerms, ledger_key
from forebay.upstream.shared.stores.open_store import open_ledger_store

_PATIENCE: Final = 10.0  # seconds without a call after which a process leaves the ledgers of a caller: there are many


class CallerLedgers:
    """The ledgers of the callers of one gateway, in a store. Names of callers are stored as hashes.

    Rates and slots have a ledger for each set of them: with other limits a caller begins with another ledger, so that
    processes that learn of the change one after the other never disagree. A budget has one, whatever its amount.

    Args:
        link: to the store.
    """

    def __init__(self, link: LedgerLink) -> None:
        self.link = link

    @classmethod
    def open(cls, shared: str) -> CallerLedgers:
        """Return the ledgers in a store, which is not connected yet.

        Args:
            shared: its URL, see `Upstream`.

        Raises:
            InvalidSetting: it is not the URL of a store.
            StoreNotInstalled: the library for Redis is missing.
        """
        return cls(LedgerLink(open_ledger_store("gateway", shared), "the callers of this gateway"))

    def close(self) -> None:
        """Leave all ledgers: what is held is free for other processes."""
        self.link.begin_close()

    def account(self, caller: str, quotas: Sequence[Quota], max_concurrent: int | None) -> AccountLease | None:
        """Return the lease on the rates and slots of a caller; None if it has neither.

        Args:
            caller: its kind and name, such as ``"tenant:acme"``.
            quotas: its rates.
            max_concurrent: its calls in progress at a time; None for any.
        """
        if not quotas and max_concurrent is None:
            return None
        of_quotas = sorted(
            (QuotaTerms(quota.counted, quota.amount, quota.seconds) for quota in quotas),
            key=lambda quota: (quota.unit, quota.seconds, quota.amount),
        )
        terms = LedgerTerms(quotas=tuple(of_quotas), max_concurrent=max_concurrent)
        key = ledger_key("caller", _digest(caller), str(terms))
        lease = self.link.lease(key, lambda: AccountLease(self.link, key, terms, patience=_PATIENCE))
        assert isinstance(lease, AccountLease)  # noqa: S101 - the key is that of rates and slots
        return lease

    def budget(
        self, caller: str, name: str, budget: Budget, *, spent: Callable[[str | None, float], float] | None = None
    ) -> LeasedBudget:
        """Return the lease on the budget of a caller.

        Args:
            caller: its kind and name, which rejections have.
            name: of the budget, in messages.
            budget: the amount and its period.
            spent: returns the dollars that were spent in the period of an epoch time, with which a new ledger begins;
                None for nothing.
        """
        key = ledger_key("caller_budget", _digest(caller))
        history = None if spent is None else _CallerHistory(spent)
        make = functools.partial(LeasedBudget, self.link, key, name, budget, owner=caller, history=history)
        lease = self.link.lease(key, make)
        assert isinstance(lease, LeasedBudget)  # noqa: S101 - the key is that of a budget
        if lease.budget != budget:
            lease.change(budget)
        return lease


class _CallerHistory:
    """The money that a caller has spent before. See `BudgetHistory`."""

    def __init__(self, spent: Callable[[str | None, float], float]) -> None:
        self.spent = spent

    def alerted(self, period: float) -> float:  # noqa: ARG002 - budgets of callers give no alerts
        """See `BudgetHistory`."""
        return 0.0


def _digest(caller: str) -> str:
    return hashlib.sha256(caller.encode("utf-8", "surrogateescape")).hexdigest()
