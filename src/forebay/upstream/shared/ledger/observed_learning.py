"""The limits that the members of a ledger observe together: what each has seen of them corrects one count. Pure.

A header was right at some moment between the sending of its call and its arrival. What members have reserved or used
since then, and what they hold and may have used without having reported it, need not be in it. That leaves a range of
numbers that the count explains, and a number in that range corrects nothing. So the use of others is never taken for a
wrong count, and two members that have seen the same correct it once.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from typing import Final

from forebay.upstream.shared.ledger.ledger_state import LedgerState, MemberState
from forebay.upstream.shared.ledger.messages import ExchangeRequest, QuotaRequest
from forebay.upstream.shared.ledger.observed_messages import ObservedRemaining, ObservedReply, ObservedRequest
from forebay.upstream.shared.ledger.observed_quota import ObservedQuota
from forebay.upstream.shared.ledger.quota_shares import bound_level

_NOTHING: Final = QuotaRequest()  # of a limit that a member does not know
_ROUNDING: Final = 1.0  # units: headers leave out the fraction
_MAX_UNITS: Final = 8  # more than there are: a member of another version may know others


def report_observed(state: LedgerState, member: MemberState, request: ExchangeRequest) -> None:
    """Take over what a member has observed since its last exchange, but for what is left: see `correct_observed`."""
    knows = request.epoch == state.epoch
    for asked in request.observed:
        number = _number_of(state, asked.unit)
        if number is None:
            number = _begin(state, asked)
            if number is None:
                continue
        quota = _quota(state, number)
        if knows and asked.epoch == quota.epoch:
            if asked.is_changed:
                _change(state, number, asked)
            if asked.doubt is not None:
                quota.doubted_until = state.time + asked.doubt
        member.under_way[number - len(state.terms.quotas)] = asked.under_way


def quota_requests(state: LedgerState, request: ExchangeRequest) -> tuple[QuotaRequest, ...]:
    """Return what a member asks for of each quota of the ledger, in its order."""
    given = len(state.terms.quotas)
    asked = dict(zip((each.unit for each in request.observed), request.quotas[given:], strict=True))
    return (*request.quotas[:given], *(asked.get(quota.unit, _NOTHING) for quota in state.observed))


def correct_observed(state: LedgerState, member: MemberState, request: ExchangeRequest) -> None:
    """Count what a member has used, and correct what is left by the latest header that it has seen."""
    asked = dict(zip((each.unit for each in request.observed), request.quotas[len(state.terms.quotas) :], strict=True))
    for each in request.observed:
        number = _number_of(state, each.unit)
        if number is None:
            continue
        quota = _quota(state, number)
        quota.counted += max(0.0, asked[each.unit].used)
        if each.seen is not None and each.epoch == quota.epoch and request.epoch == state.epoch:
            _correct(state, member, number, each.seen)


def observed_replies(state: LedgerState) -> tuple[ObservedReply, ...]:
    """Return what all members have observed."""
    return tuple(
        ObservedReply(
            unit=quota.unit,
            amount=quota.amount,
            seconds=quota.seconds,
            epoch=quota.epoch,
            counted=quota.counted,
            ends_in=None if quota.window_end is None else quota.window_end - state.time,
            doubt=max(0.0, quota.doubted_until - state.time),
        )
        for quota in state.observed
    )


def _number_of(state: LedgerState, unit: str) -> int | None:
    """Return the number of an observed limit among all quotas; None if there is none of that unit."""
    for number, quota in enumerate(state.observed):
        if quota.unit == unit:
            return len(state.terms.quotas) + number
    return None


def _quota(state: LedgerState, number: int) -> ObservedQuota:
    return state.observed[number - len(state.terms.quotas)]


def _begin(state: LedgerState, asked: ObservedRequest) -> int | None:
    """Begin with a limit that a member has observed. It is empty if the member has not seen what is left."""
    if len(state.observed) >= _MAX_UNITS:
        return None
    end = None if asked.ends_in is None else state.time + asked.ends_in
    state.observed.append(ObservedQuota(asked.unit, asked.amount, asked.seconds, window_end=end))
    left = 0.0 if asked.seen is None else asked.seen.remaining - asked.under_way
    state.levels.append(max(-asked.amount, min(left, asked.amount)))
    for member in state.members.values():
        for amounts in (member.held, member.short, member.lost, member.under_way):
            amounts.append(0.0)
    return len(state.levels) - 1


def _change(state: LedgerState, number: int, asked: ObservedRequest) -> None:
    """Take over another amount, period or window. What an amount has gained is available at once."""
    quota = _quota(state, number)
    if asked.amount > quota.amount:
        state.levels[number] += asked.amount - quota.amount
    quota.amount, quota.seconds = asked.amount, asked.seconds
    quota.window_end = None if asked.ends_in is None else state.time + asked.ends_in
    quota.epoch += 1
    bound_level(state, number)


def _correct(state: LedgerState, member: MemberState, number: int, seen: ObservedRemaining) -> None:
    """Move a level to the nearest one that explains what is left by a header."""
    quota, level = _quota(state, number), state.levels[number]
    held = state.held(number)
    under_way = sum(each.under_way[number - len(state.terms.quotas)] for each in state.members.values())
    refilled = seen.age * quota.amount / quota.seconds + _ROUNDING if quota.window_end is None else 0.0
    most = seen.remaining + refilled - (held if seen.throttled else member.held[number])
    if level > most:
        state.levels[number] = most
    else:
        used_since = max(0.0, quota.counted - seen.counted)
        state.levels[number] = max(level, seen.remaining - held - under_way - used_since)
    bound_level(state, number)
