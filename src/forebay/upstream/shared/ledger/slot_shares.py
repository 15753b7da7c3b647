"""The slots of a ledger: how many calls each member may have in flight. Pure.

A member holds as many slots as it has calls in flight, and those that it was allowed for calls that wait. While others
wait, each may have its fair share of the limit; what it has beyond that it gives back as its calls end. It may use what
it was allowed until a reply tells it less, so that counts as held until its next request says that it has less.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from forebay.upstream.shared.ledger.absent_members import absent_members
from forebay.upstream.shared.ledger.ledger_state import LedgerState
from forebay.upstream.shared.ledger.messages import SlotReply, SlotRequest


def grant_slots(state: LedgerState, name: str, asked: SlotRequest, *, may_grow: bool) -> SlotReply:
    """Allow a member as many slots as its share and the free slots are.

    Args:
        state: of the ledger.
        name: of the member.
        asked: its calls.
        may_grow: its calls could be sent with a slot: they do not wait for a quota.
    """
    limit, member = state.slot_limit(), state.members[name]
    assert limit is not None  # noqa: S101 - the ledger counts slots
    wanted = max(asked.in_use, asked.wanted) if may_grow else asked.in_use
    member.slots = max(asked.in_use, asked.held)
    member.slots_wanted = wanted
    held_by_others = sum(other.slots for other in state.others(name))
    held_by_others += sum(ended.slots for ended in absent_members(state) if ended is not member.absence)
    demand = {other: each.slot_demand(state.time) for other, each in state.members.items()}
    allowed = max(0, min(_share(state, name, limit, demand), wanted, limit - held_by_others))
    if allowed > member.slots:
        member.served_at = state.time
    member.slots = max(member.slots, allowed)
    wanting = sum(1 for each in demand.values() if each > 0)
    return SlotReply(allowed=allowed, give_back=wanting > limit, free=max(0, limit - held_by_others - member.slots))


def fair_shares(limit: int, demands: list[int]) -> list[int]:
    """Return max-min fair shares of `limit`: nobody gets more than demanded, and nobody less than the others, or 1.

    What cannot be shared equally goes to the first ones.

    Args:
        limit: to be shared.
        demands: in the order in which the rest is shared out.
    """
    shares = [0] * len(demands)
    left = limit
    open_numbers = [number for number, demand in enumerate(demands) if demand > 0]
    while open_numbers and left >= len(open_numbers):
        each = left // len(open_numbers)
        for number in open_numbers:
            granted = min(each, demands[number] - shares[number])
            shares[number] += granted
            left -= granted
        open_numbers = [number for number in open_numbers if demands[number] > shares[number]]
    for number in open_numbers[:left]:
        shares[number] += 1
    return shares


def _share(state: LedgerState, name: str, limit: int, demand: dict[str, int]) -> int:
    """Return a member's fair share of the slots.

    While there are fewer slots than members that want one, they take turns. Otherwise the rest stays with those that
    have it.
    """
    wanting = sum(1 for each in demand.values() if each > 0)
    members = state.members
    if wanting > limit:
        order = sorted(members, key=lambda other: (members[other].served_at, other))
    else:
        order = sorted(members, key=lambda other: (-members[other].slots, other))
    shares = fair_shares(limit, [demand[other] for other in order])
    return shares[order.index(name)]
