"""The frozen snapshot of an upstream."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from forebay import clock
from forebay.quota import QuotaLevel
from forebay.upstream.account_registry import UpstreamBudgets
from forebay.upstream.shared_account import SharedAccount


class AccountStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One account, at one moment.

    Attributes:
        name: as in readings; a key is shown by eight digits of its hash.
        in_flight: calls under way.
        limit: how many may be.
        waiting: calls in its line.
        coming: runs that have begun, or are held back for its sake, and have not made their first call.
        breaker: ``"closed"``, ``"open"`` or ``"half_open"``.
        load: expected wait of the next typical call over the longest allowed.
        binding: what that wait is for.
        typical: seconds that a call takes.
        sent_on: calls that another account has served, by a fallback.
        quotas: what each has left, those that were learned from headers too.
        sent: attempts that were let go since it was opened. What is under way, or was cut short by its caller, or was
            wrong, is in none of the next three.
        succeeded: attempts that were answered.
        turned_away: attempts that the provider refused for now: for a rate, for congestion, for want of capacity.
        failed: attempts that failed otherwise, and through no fault of ours.
        unattributed: attempts that were made outside of any task.
        refused: calls that were not let go.
        input_tokens: used, as its quotas count them; of calls that do not tell, what they were expected to use.
        output_tokens: likewise.
    """

    name: str
    in_flight: int
    limit: int
    queued: int
    expected_calls: int
    breaker: str
    load: float
    limited_by: str
    typical_latency: float
    served_by_fallback: int
    quotas: tuple[QuotaLevel, ...]
    sent: int
    succeeded: int
    throttled: int
    failed: int
    unattributed: int
    rejected: int
    input_tokens: int
    output_tokens: int


class UpstreamStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream, at one moment.

    Attributes:
        name: the upstream's.
        spent_usd: dollars spent in this period of its budget, or None without one.
        unpriced: calls of models whose price is not known, and which so count as free; 0 without a budget.
        accounts: each account.
    """

    name: str
    spent_usd: float | None
    unpriced: int
    accounts: tuple[AccountStatistics, ...]


def snapshot(name: str, desks: Iterable[SharedAccount], money: UpstreamBudgets, *, unpriced: int) -> UpstreamStatistics:
    """What an upstream is now."""
    now = clock.now()
    own = money.upstream_budget
    return UpstreamStatistics(
        name=name,
        spent_usd=None if own is None else own.spent(),
        unpriced=unpriced,
        accounts=tuple(_of(desk, now) for desk in desks),
    )


def _of(desk: SharedAccount, now: float) -> AccountStatistics:
    account = desk.account
    load, binding = desk.load()
    return AccountStatistics(
        name=desk.name,
        in_flight=account.in_flight,
        limit=account.limit.limit(now),
        queued=len(account.queue),
        expected_calls=account.expected_calls,
        breaker=account.breaker.state(now).value,
        load=load,
        limited_by=binding,
        typical_latency=account.durations.typical,
        served_by_fallback=desk.served_by_fallback,
        quotas=tuple(desk.quota_levels()),
        **msgspec.structs.asdict(account.counts),
    )
