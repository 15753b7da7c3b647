"""Checks of what an upstream promises: no limit is exceeded, and no resource of a finished call is kept."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.supervisor_checks import fail_if_any

from forebay.upstream import Upstream
from forebay.upstream.accounts.spend import UpstreamBudget
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount

_ROUNDING = 1e-9  # dollars


def check_upstream(upstream: Upstream) -> None:
    """Check that an upstream at rest holds no slot, queue entry, quota, money or probe, and expects no calls.

    Also check that never more calls were in flight than its `max_concurrent`, if it has one.

    Args:
        upstream: all of its calls have ended, and no supervisor that depends on it runs tasks.

    Raises:
        InvariantViolation: it holds something, or exceeded its limit.
    """
    violations = [line for account in upstream.core.accounts for line in _held(account)]
    violations += [line for budget in upstream.core.budgets.all_budgets() for line in _reserved(budget)]
    fail_if_any("an upstream at rest holds nothing", violations)
    limit = upstream.core.settings.max_concurrent
    if limit is not None:
        peaks = {account.name: account.account.peak_in_flight for account in upstream.core.accounts}
        fail_if_any(
            "no more calls are in flight than max_concurrent",
            [f"{name} had {peak} calls in flight of {limit}" for name, peak in peaks.items() if peak > limit],
        )


def _held(shared: ThreadSafeAccount) -> Iterator[str]:
    account = shared.account
    if account.in_flight:
        yield f"{shared.name} counts {account.in_flight} calls in flight"
    if account.queue:
        yield f"{len(account.queue)} calls are queued in {shared.name}"
    if reserved := account.quotas._open:
        yield f"{len(reserved)} calls hold quotas of {shared.name}"
    if probes := account.breaker._out:
        yield f"the breaker of {shared.name} waits for {probes} probes"
    if account.expected_calls:
        yield f"{shared.name} expects {account.expected_calls} calls"


def _reserved(budget: UpstreamBudget) -> Iterator[str]:
    count, usd = budget.reserved()
    if count or abs(usd) > _ROUNDING:
        yield f"{count} calls hold ${usd:.6g} of {budget.name}"
