"""Who may go before a head that waits for a quota, while nobody who stands before it is served any later for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final, Protocol, TypeVar

from forebay.quota import QuotaHeadroom, RateLimiter
from forebay.upstream.call_request import CallBudget, CallRequest

LOOK_AHEAD: Final = 16
"""How many places from the head on are looked at."""


class HasRequest(Protocol):
    """A call in a line."""

    request: CallRequest


W = TypeVar("W", bound=HasRequest)


def find_bypass(
    now: float,
    queue: Iterable[W],
    quotas: RateLimiter,
    budgets: Callable[[CallRequest], Sequence[CallBudget]],
    *,
    slots: int,
) -> tuple[float, W | None]:
    """Who may pass, and in how many seconds: 0 is now; infinity, and None, is nobody.

    A call passes only what it does not need: of each quota that it draws on there is so much that all who stand before
    it find theirs as early as the head could have it at all, were the calls under way to give back whatever they hold.
    So too with the slots, of which each of those keeps one however long this call runs, and with the money. That holds
    as far as calls use no more than was reserved for them.

    Args:
        now: the present.
        row: those who wait, the head first. It has room, and waits for a quota.
        quotas: of the account.
        purses: the money that a call needs.
        slots: that are free, at least one.
    """
    queue = islice(queue, LOOK_AHEAD)
    over = [waiting.request for waiting in islice(queue, 1)]
    soonest, who = math.inf, None
    spare = quotas.headroom(now, over[0].charge)
    scarce = spare[0].unit if spare and spare[0].spare < 1.0 else None
    if scarce == "requests":
        return soonest, who  # of which each takes one
    for waiting in islice(queue, slots - 1):
        ask = waiting.request
        if (
            (scarce is None or not getattr(ask.charge, scarce))
            and all(_spares(quota, ask, over) for quota in spare)
            and _afford(budgets(ask), ask, over)
        ):
            seconds = quotas.wait(now, ask.charge).seconds
            if seconds < soonest:
                soonest, who = seconds, waiting
            if not seconds:
                break
        over.append(ask)
    return soonest, who


def _spares(quota: QuotaHeadroom, ask: CallRequest, over: Sequence[CallRequest]) -> bool:
    """Whether those whom it passes find their share of a quota."""
    unit = quota.unit
    amount: int = getattr(ask.charge, unit)
    if not amount or amount > quota.spare:
        return not amount
    needed: int = sum(getattr(other.charge, unit) for other in over)
    return quota.level - amount >= min(quota.capacity, needed)


def _afford(purses: Sequence[CallBudget], ask: CallRequest, over: Sequence[CallRequest]) -> bool:
    """Whether its money is there beside that of those whom it passes, by the share of the lowest of them."""
    if not purses:
        return True
    usd = ask.usd + sum(other.usd for other in over)
    lowest = max(ask.priority, *(other.priority for other in over))
    return all(purse.can_afford(usd, lowest) for purse in purses)
