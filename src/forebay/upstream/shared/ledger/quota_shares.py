"""The quotas of a ledger: a bucket each, from which members are granted chunks. Pure.

What members hold does not refill meanwhile: a level and all that is held of it are one amount at most. So no span of
time gets more than was granted, whenever the holders use it.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from typing import Final

from forebay.upstream.shared.ledger.absent_members import quota_of_the_absent
from forebay.upstream.shared.ledger.ledger_state import LedgerState, MemberState
from forebay.upstream.shared.ledger.messages import QuotaReply, QuotaRequest
from forebay.upstream.shared.ledger.observed_quota import ObservedQuota

_CHUNK: Final = 0.02  # of the amount: what a member may hold beyond its need
_QUICK_CHUNK: Final = 0.02  # seconds of refill that one grant may have beyond its need although others wait
_EPSILON: Final = 1e-9  # relative: a member that has waited exactly as long as it was told must get its need
_LEAST_WAIT: Final = 0.002  # seconds


def refill_quotas(state: LedgerState, elapsed: float) -> None:
    """Refill all quotas for the time that has passed."""
    for number, quota in enumerate(state.quotas):
        if isinstance(quota, ObservedQuota):
            level = quota.refilled(state.levels[number], state.held(number), state.time, elapsed)
        else:
            level = state.levels[number] + elapsed * quota.amount / quota.seconds
        state.levels[number] = level
        bound_level(state, number)


def report_quotas(state: LedgerState, member: MemberState, asked: tuple[QuotaRequest, ...]) -> None:
    """Count what a member has used, and take back what it does not want to hold any more."""
    for number, quota in enumerate(asked):
        used = quota.used
        if used > 0.0:  # what an earlier lease of its own held when it ended was counted as used already
            used = max(0.0, used - member.lost[number])
        member.lost[number] = 0.0
        held = member.held[number] - used
        if held < 0.0:  # a debt: calls have used more than they reserved
            state.levels[number] += held
            held = 0.0
        member.held[number] = quota.kept(held)
        state.levels[number] += held - member.held[number]
        bound_level(state, number)


def grant_quotas(state: LedgerState, name: str, asked: tuple[QuotaRequest, ...]) -> list[float]:
    """Grant a member what it needs of all quotas, or nothing; then more, up to a chunk. Return the waits, in seconds.

    All or nothing: two members that each hold a part of what the other one waits for would wait for long.
    """
    member = state.members[name]
    before = state.others_before(name)
    member.short = [max(0.0, quota.needed - member.held[number]) for number, quota in enumerate(asked)]
    waits = [_wait(state, number, member, before) for number in range(len(asked))]
    if any(wait > 0.0 for wait in waits):
        return waits
    for number, quota in enumerate(asked):
        needed = member.short[number]
        member.held[number] += needed
        state.levels[number] -= needed
        member.short[number] = 0.0
        chunk = _chunk(state, number, name, before, max(quota.wanted, quota.needed))
        member.held[number] += chunk
        state.levels[number] -= chunk
    return waits


def quota_replies(state: LedgerState, member: MemberState, waits: list[float]) -> tuple[QuotaReply, ...]:
    """Return the state of each quota for a member."""
    return tuple(
        QuotaReply(held=member.held[number], level=state.levels[number], wait=wait) for number, wait in enumerate(waits)
    )


def return_quotas(state: LedgerState, member: MemberState) -> None:
    """Take back all that a member holds."""
    for number, held in enumerate(member.held):
        state.levels[number] += held
        member.held[number] = 0.0
        bound_level(state, number)


def bound_level(state: LedgerState, number: int) -> None:
    """Lose what does not fit into a quota beside what is held of it."""
    quota = state.quotas[number]
    state.levels[number] = min(state.levels[number], quota.amount - state.held(number))
    if isinstance(quota, ObservedQuota):  # headers correct the rest of a debt
        state.levels[number] = max(state.levels[number], -quota.amount)


def _level(state: LedgerState, number: int) -> float:
    """Return what can be granted of a quota."""
    return state.levels[number] - quota_of_the_absent(state, number)


def _wait(state: LedgerState, number: int, member: MemberState, before: list[MemberState]) -> float:
    """Return the seconds until a member can get its need, if those before it get theirs first; 0 for now."""
    quota = state.quotas[number]
    if member.short[number] <= 0.0:
        return 0.0
    needed = member.short[number] + sum(other.short[number] for other in before)
    missing = needed + _margin(state, number, needed) - _level(state, number)
    if isinstance(quota, ObservedQuota):
        wait = quota.wait(missing if missing > _EPSILON * quota.amount else 0.0, state.time)
        return max(_LEAST_WAIT, wait) if wait > 0.0 else 0.0
    if missing <= _EPSILON * quota.amount:
        return 0.0
    return max(_LEAST_WAIT, missing * quota.seconds / quota.amount)


def _margin(state: LedgerState, number: int, needed: float) -> float:
    """Return what is to be left of a quota when `needed` is taken."""
    quota = state.quotas[number]
    return quota.margin(needed, state.held(number)) if isinstance(quota, ObservedQuota) else 0.0


def _chunk(state: LedgerState, number: int, name: str, before: list[MemberState], wanted: float) -> float:
    """Return what a member gets beyond its need: what nobody else waits for, or a moment's refill."""
    quota, member = state.quotas[number], state.members[name]
    if isinstance(quota, ObservedQuota) and quota.wait(0.0, state.time) > 0.0:
        return 0.0
    level = _level(state, number) - _margin(state, number, 0.0)
    waiting = sum(other.short[number] for other in state.others(name) if other.wishes(state.time))
    ahead = sum(other.short[number] for other in before)
    available = max(level - waiting, min(level - ahead, _QUICK_CHUNK * quota.amount / quota.seconds))
    missing = min(wanted, _CHUNK * quota.amount) - member.held[number]
    return max(0.0, min(missing, available))
