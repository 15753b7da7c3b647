"""The checker of what an upstream promises: nothing above a limit, and nothing kept of what a call held."""

from __future__ import annotations

from collections.abc import Iterator

from forebay.testing.promises import fail_if_wrong
from forebay.upstream import Upstream
from forebay.upstream.shared_account import SharedAccount
from forebay.upstream.spend import SharedBudget

_DUST = 1e-9  # dollars


def check_upstream(upstream: Upstream) -> None:
    """An upstream at rest holds nothing: no slot, place in line, quota, money or probe, and it expects no run.

    Nor were more calls in flight at any time than its `max_concurrent`, if it was given one.

    Args:
        upstream: whose calls have all ended, and on which no supervisor draws that still runs tasks.

    Raises:
        BrokenPromise: it holds something, or held too much.
    """
    wrong = [line for desk in upstream.core.accounts for line in _held(desk)]
    wrong += [line for till in upstream.core.accounts.budgets.all_budgets() for line in _reserved(till)]
    fail_if_wrong("An upstream at rest holds nothing", wrong)
    most = upstream.core.settings.max_concurrent
    crowds = [(desk.name, desk.account.peak_in_flight) for desk in upstream.core.accounts]
    fail_if_wrong(
        "Nothing is granted while in flight is at a limit",
        [f"{name} had {peak} calls in flight of {most}" for name, peak in crowds if most is not None and peak > most],
    )


def _held(desk: SharedAccount) -> Iterator[str]:
    account = desk.account
    if account.in_flight:
        yield f"{desk.name} counts {account.in_flight} calls in flight"
    if account.queue:
        yield f"in the line of {desk.name} wait {len(account.queue)} calls"
    if reserved := account.quotas._open:  # noqa: SLF001 - what is left behind is inside
        yield f"{len(reserved)} calls hold quotas of {desk.name}"
    if probes := account.breaker._out:  # noqa: SLF001 - as above
        yield f"the breaker of {desk.name} waits for {probes} probes"
    if account.expected_calls:
        yield f"{desk.name} expects {account.expected_calls} runs"


def _reserved(till: SharedBudget) -> Iterator[str]:
    count, usd = till.reserved()
    if count or abs(usd) > _DUST:
        yield f"{count} calls hold ${usd:.6g} of {till.name}"
