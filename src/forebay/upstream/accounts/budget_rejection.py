"""A budget in words, and the rejection of a call for which it has no dollars."""

from __future__ import annotations

import math
from typing import Final

from forebay.quota import Budget
from forebay.upstream.call_request import Rejected

_RETURNED_AFTER: Final = 4.0  # seconds, on average, after which reserved dollars may have been returned


def describe_amount(budget: Budget) -> str:
    """Return the amount and the period of a budget in words."""
    period = "in all" if budget.per is None else f"a{'n' if budget.per == 'hour' else ''} {budget.per}"
    return f"{budget.usd:,.12g} USD {period}"


def budget_rejection(  # noqa: PLR0913 - the facts about a budget
    name: str,
    budget: Budget,
    usd: float,
    *,
    used: float,
    resets_in: float | None,
    affordable_later: bool,
    draw: float,
    owner: str = "",
) -> Rejected:
    """Return the rejection of a call for which `usd` dollars cannot be reserved now.

    Args:
        name: of the budget.
        budget: its amount and period.
        usd: dollars of the call.
        used: dollars that are spent or reserved.
        resets_in: seconds until the budget renews; None for never.
        affordable_later: the call could be paid if nothing were reserved.
        draw: a random number from [0, 1).
        owner: see `Rejected`.
    """
    retry_after = None if usd > budget.usd else resets_in
    if affordable_later:  # calls under way hold the most that they may cost, and return what they do not
        retry_after = min(_RETURNED_AFTER * (0.5 + draw), math.inf if retry_after is None else retry_after)
    reserved = budget.usd * budget.reserved_share
    kept = f", {reserved:,.3g} of it for HIGH and CRITICAL alone" if reserved else ""
    advice = ": ask for less, or raise that budget" if retry_after is None else ""
    reason = (
        f"{name} would be overspent: it has {describe_amount(budget)}{kept}, of which {used:,.3g} are"
        f" spent or reserved, and this may cost {usd:,.3g}{advice}"
    )
    return Rejected(reason, "budget", math.inf if retry_after is None else used / budget.usd, retry_after, owner)
