"""Who may go before a head that waits for a quota, while nobody who stands before it is served any later for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final, Protocol, TypeVar

from forebay.quota import Quotas, Spare
from forebay.upstream.ask import Ask, Purse

LOOK_AHEAD: Final = 16
"""How many places from the head on are looked at."""


class Waits(Protocol):
    """A call in a line."""

    ask: Ask


W = TypeVar("W", bound=Waits)


def first_to_pass(
    now: float, row: Iterable[W], quotas: Quotas, purses: Callable[[Ask], Sequence[Purse]], *, slots: int
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
    row = islice(row, LOOK_AHEAD)
    over = [waiting.ask for waiting in islice(row, 1)]
    soonest, who = math.inf, None
    spare = quotas.spare(now, over[0].charge)
    scarce = spare[0].unit if spare and spare[0].beyond < 1.0 else None
    if scarce == "requests":
        return soonest, who  # of which each takes one
    for waiting in islice(row, slots - 1):
        ask = waiting.ask
        if (
            (scarce is None or not getattr(ask.charge, scarce))
            and all(_spares(quota, ask, over) for quota in spare)
            and _afford(purses(ask), ask, over)
        ):
            seconds = quotas.wait(now, ask.charge).seconds
            if seconds < soonest:
                soonest, who = seconds, waiting
            if not seconds:
                break
        over.append(ask)
    return soonest, who


def _spares(quota: Spare, ask: Ask, over: Sequence[Ask]) -> bool:
    """Whether those whom it passes find their share of a quota."""
    unit = quota.unit
    amount: int = getattr(ask.charge, unit)
    if not amount or amount > quota.beyond:
        return not amount
    needed: int = sum(getattr(other.charge, unit) for other in over)
    return quota.left - amount >= min(quota.full, needed)


def _afford(purses: Sequence[Purse], ask: Ask, over: Sequence[Ask]) -> bool:
    """Whether its money is there beside that of those whom it passes, by the share of the lowest of them."""
    if not purses:
        return True
    usd = ask.usd + sum(other.usd for other in over)
    lowest = max(ask.priority, *(other.priority for other in over))
    return all(purse.affords(usd, lowest) for purse in purses)
