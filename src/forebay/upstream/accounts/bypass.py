"""Head-of-line bypass: a call may overtake a head blocked on a quota if nobody ahead of it is delayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

from forebay.quota import HeldCharge, QuotaHeadroom, RateLimiter
from forebay.upstream.accounts.call_queue import QueuedCall
from forebay.upstream.call_request import CallBudget, CallRequest

LOOK_AHEAD: Final = 16
"""The number of calls that are considered, the head included."""


def find_bypass(  # noqa: PLR0913 - the parts of an account
    now: float,
    queue: Iterable[QueuedCall],
    quotas: RateLimiter,
    budgets: Callable[[CallRequest], Sequence[CallBudget]],
    *,
    slots: int,
    held: Callable[[CallRequest], Sequence[HeldCharge]] = lambda _: (),
) -> tuple[float, QueuedCall | None]:
    """Return the seconds until a call may overtake, 0 for now, and that call; infinity and None if none may.

    A call overtakes only if it leaves enough for all calls ahead of it: of each quota that it takes from, as much as
    they need by the time at which the head could go, even if the calls in flight return all that they hold; one slot
    for each, however long this call runs; and the money. This is exact as long as calls use no more than they reserved.

    Args:
        now: the time.
        queue: the queued calls, the head first. The head has a slot, and waits for a quota.
        quotas: of the account.
        budgets: returns the budgets that a call spends from.
        slots: free ones, at least one.
        held: returns what a call has to leave for those that come back to be retried.
    """
    queue = islice(queue, LOOK_AHEAD)
    ahead = [call.request for call in islice(queue, 1)]
    soonest, found = math.inf, None
    headroom = quotas.headroom(now, ahead[0].charge)
    scarce = headroom[0].unit if headroom and headroom[0].spare < 1.0 else None
    if scarce == "requests":
        return soonest, found  # every call takes one
    for call in islice(queue, slots - 1):
        request = call.request
        if (
            (scarce is None or not getattr(request.charge, scarce))
            and all(_leaves_enough(quota, request, ahead) for quota in headroom)
            and _can_afford(budgets(request), request, ahead)
        ):
            seconds = quotas.wait(now, request.charge, held=held(request)).seconds
            if seconds < soonest:
                soonest, found = seconds, call
            if not seconds:
                break
        ahead.append(request)
    return soonest, found


def _leaves_enough(quota: QuotaHeadroom, request: CallRequest, ahead: Sequence[CallRequest]) -> bool:
    """Return whether a quota has enough left for the calls ahead."""
    unit = quota.unit
    amount: int = getattr(request.charge, unit)
    if not amount or amount > quota.spare:
        return not amount
    needed: int = sum(getattr(other.charge, unit) for other in ahead)
    return quota.level - amount >= min(quota.capacity, needed)


def _can_afford(budgets: Sequence[CallBudget], request: CallRequest, ahead: Sequence[CallRequest]) -> bool:
    """Return whether there is money for the call and those ahead, by the share of the lowest priority among them."""
    if not budgets:
        return True
    usd = request.usd + sum(other.usd for other in ahead)
    lowest = max(request.priority, *(other.priority for other in ahead))
    return all(budget.can_afford(usd, lowest) for budget in budgets)
