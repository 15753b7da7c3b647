"""The rate that the members of a ledger learn together from refusals, and each one's share of it. Pure.

A rate is learned by whoever is refused, from the calls of all. What a member has learned replaces what is known if it
knew that: of two that learn from the same refusals the first one counts.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from forebay.upstream.shared.ledger.ledger_state import LedgerState, MemberState
from forebay.upstream.shared.ledger.rate_messages import RateReply, RateRequest


def report_rate(state: LedgerState, member: MemberState, asked: RateRequest, *, knows: bool) -> None:
    """Count the calls of a member, and take over what it has learned.

    Args:
        state: of the ledger.
        member: that asks.
        asked: what it reports.
        knows: it has known this ledger before: its epochs are those of this one.
    """
    member.rate_demand = asked.demand
    if asked.trial > 0.0 and not _trial_elsewhere(state, member):
        member.rate_trial_until = state.time + asked.trial
    state.rate_counted += asked.counted
    epoch = asked.epoch if knows else -1
    if asked.learned is not None and (epoch == state.rate_epoch or not state.rate_epoch):
        state.rate = asked.learned
        state.rate_epoch += 1
        state.rate_at = state.time


def rate_reply(state: LedgerState, name: str) -> RateReply:
    """Return the rate for a member."""
    return RateReply(
        epoch=state.rate_epoch,
        counted=state.rate_counted,
        share=_share(state, name),
        learned=state.rate,
        age=state.time - state.rate_at if state.rate_epoch else 0.0,
        trial=_trial_elsewhere(state, state.members[name]),
    )


def _trial_elsewhere(state: LedgerState, member: MemberState) -> float:
    """Return the seconds for which another member tries."""
    until = max((other.rate_trial_until for other in state.members.values() if other is not member), default=0.0)
    return max(0.0, until - state.time)


def _share(state: LedgerState, name: str) -> float:
    """Return a member's max-min fair share of the rate, by demand. One that has no calls takes nothing from others."""
    demands = {
        other: member.rate_demand
        for other, member in sorted(state.members.items())
        if member.rate_demand > 0.0 and member.wishes(state.time) and other != name
    }
    wanted = 0.0
    for demand in demands.values():
        wanted += demand
    own = state.members[name].rate_demand
    rate = wanted + own if state.rate is None or state.rate.rate is None else state.rate.rate
    if rate <= 0.0:
        return 1.0
    demands[name] = own if own > 0.0 else rate
    return min(1.0, fair_rates(rate, dict(sorted(demands.items())))[name] / rate)


def fair_rates(total: float, demands: dict[str, float]) -> dict[str, float]:
    """Return max-min fair parts of `total`: nobody gets less than the others unless it asks for less.

    What nobody asks for is shared out equally.
    """
    parts: dict[str, float] = {}
    left, names = total, list(demands)
    while names:
        each = left / len(names)
        content = [name for name in names if demands[name] <= each]
        if not content:
            parts.update(dict.fromkeys(names, each))
            return parts
        for name in content:
            parts[name] = demands[name]
            left -= demands[name]
        names = [name for name in names if name not in parts]
    return {name: part + left / len(parts) for name, part in parts.items()}
