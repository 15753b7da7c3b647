"""Statistics of an upstream: a frozen snapshot."""

from __future__ import annotations

import msgspec

from forebay import clock
from forebay._json import JsonStruct
from forebay.call_usage import CallUsage
from forebay.quota import QuotaLevel
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.core import UpstreamCore
from forebay.upstream.usage_table import UsageRow


class AccountStatistics(JsonStruct, frozen=True, kw_only=True):
    """One account, at one moment.

    Attributes:
        name: as in readings; an API key is shown as eight digits of its hash.
        in_flight: calls under way.
        limit: how many calls may be under way.
        queued: calls in its queue.
        expected_calls: runs that have started, or are held back for its sake, and have not made their first call.
        breaker: ``"closed"``, ``"open"`` or ``"half_open"``.
        load: expected wait of the next typical call over the longest allowed.
        limited_by: the part of the account that causes that wait.
        typical_latency: seconds that a call takes.
        served_by_fallback: calls that another account has served, by a fallback.
        quotas: the level of each, those learned from headers included.
        sent: attempts that were sent since the account was opened. Those under way, those cut off by their caller and
            invalid requests are in none of the next three.
        succeeded: attempts that were answered.
        throttled: attempts that the provider throttled (402, 429, 503, 529): for a rate, for congestion, for lack of
            capacity or of money (``insufficient_quota``).
        failed: attempts that failed in another way, without a mistake of the caller.
        unattributed: attempts outside of any task.
        rejected: calls that were not sent, and retries that were not.
        input_tokens: used, as its quotas count them; where a call does not report them, as expected.
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


class UpstreamStatistics(JsonStruct, frozen=True, kw_only=True):
    """An upstream, at one moment.

    Attributes:
        name: the upstream's.
        spent_usd: dollars spent in this period of its budget, by all processes if it is shared; None without a budget,
            and while a shared one is not known yet. See `Upstream.statistics`.
        unpriced: calls whose price was not known, which were rejected or counted as free; 0 with neither a budget
            nor a spend log.
        accounts: each of its accounts.
        used: of all calls that have ended: tokens, dollars by the price list, with or without a budget.
        usage: the same by tenant, model and API key, those that have cost most first. Each row stays, so they sum up to
            `used`; once there are 2,000, calls of others are added up as ``"other"``.
    """

    name: str
    spent_usd: float | None
    unpriced: int
    accounts: tuple[AccountStatistics, ...]
    used: CallUsage
    usage: tuple[UsageRow, ...]


def snapshot(core: UpstreamCore) -> UpstreamStatistics:
    """Return the statistics of an upstream now."""
    now = clock.now()
    return UpstreamStatistics(
        name=core.name,
        spent_usd=core.budgets.spent(),
        unpriced=core.unpriced_calls,
        accounts=tuple(_account_statistics(account, now) for account in core.accounts),
        used=core.recorder.table.total,
        usage=tuple(core.recorder.table.rows()),
    )


def _account_statistics(shared: ThreadSafeAccount, now: float) -> AccountStatistics:
    account = shared.account
    load, limited_by = shared.load()
    return AccountStatistics(
        name=shared.name,
        in_flight=account.in_flight,
        limit=account.limit.limit(now),
        queued=len(account.queue),
        expected_calls=account.expected_calls,
        breaker=account.breaker.state(now).value,
        load=load,
        limited_by=limited_by,
        typical_latency=account.durations.typical,
        served_by_fallback=shared.served_by_fallback,
        quotas=tuple(shared.quota_levels()),
        **msgspec.structs.asdict(account.counts),
    )
