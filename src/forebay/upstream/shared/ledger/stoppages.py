"""The stoppages of calls that the members of a ledger share: the first to stop calls stops them for all. Pure.

Each change begins a new epoch, and what members report of an earlier one is dropped, since it comes from calls that
were sent before the change. If a store has forgotten an epoch that a member knows, the newest that is known wins.
Probes are leased as slots are: those of a member that dies come back when its lease ends.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from collections.abc import Mapping

from forebay.upstream.shared.ledger.ledger_state import LedgerState
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest
from forebay.upstream.shared.ledger.stoppage_state import StoppageMember, StoppageState


def report_stoppages(state: LedgerState, name: str, asked: Mapping[str, StoppageRequest]) -> None:
    """Take over what a member has found out since its last exchange."""
    for kind, request in asked.items():
        stoppage = state.stoppages.setdefault(kind, StoppageState())
        member = _member(stoppage, name)
        epoch = max(0, request.epoch)  # nobody knows of any yet, or this member does not
        if epoch > stoppage.epoch or (epoch == stoppage.epoch and request.changed):
            stoppage.epoch = epoch + request.changed  # of a later one than this if the store has lost it
            member.accepted = request.changed
            _replace(state.time, stoppage, request)
        elif request.epoch == stoppage.epoch and (request.calls or request.passes):
            _count(state.time, stoppage, member, request)


def stoppage_replies(
    state: LedgerState, name: str, asked: Mapping[str, StoppageRequest]
) -> dict[str, StoppageReply] | None:
    """Allow a member the probes that it wants and nobody else has, and return the state of each stoppage for it.

    Those are left out of which it knows everything, while calls are let through.
    """
    replies = {}
    for kind, request in asked.items():
        stoppage = state.stoppages.setdefault(kind, StoppageState())
        member = _member(stoppage, name)
        quiet = request.epoch == stoppage.epoch and not (stoppage.openings or member.accepted or member.probes)
        if not quiet or member.calls != stoppage.calls:
            replies[kind] = _reply(state.time, stoppage, member, request)
    return replies or None


def end_probes(state: LedgerState, name: str) -> None:
    """Take the probes of a member back: it has ended."""
    for stoppage in state.stoppages.values():
        stoppage.members.pop(name, None)


def _member(stoppage: StoppageState, name: str) -> StoppageMember:
    """Return the part of a member; what was before it came does not count for it."""
    if name not in stoppage.members:
        stoppage.members[name] = StoppageMember(calls=stoppage.calls, faults=stoppage.faults)
    return stoppage.members[name]


def _replace(time: float, stoppage: StoppageState, asked: StoppageRequest) -> None:
    """Take over what a member knows."""
    stoppage.openings = asked.openings
    stoppage.until = time + asked.seconds
    stoppage.passed = asked.passed
    stoppage.details = asked.details
    stoppage.told_at = time
    _forget_calls(stoppage)


def _forget_calls(stoppage: StoppageState) -> None:
    stoppage.calls = stoppage.faults = 0
    for member in stoppage.members.values():
        member.calls = member.faults = 0


def _count(time: float, stoppage: StoppageState, member: StoppageMember, asked: StoppageRequest) -> None:
    """Count calls, and probes that have succeeded."""
    if not stoppage.openings:
        stoppage.calls += asked.calls
        stoppage.faults += asked.faults
        member.calls += asked.calls
        member.faults += asked.faults
    elif asked.passes:
        stoppage.until = min(stoppage.until, time)  # a late answer says that it is slow, not broken
        stoppage.passed += asked.passes
        if stoppage.passed >= asked.successes:
            stoppage.epoch += 1
            stoppage.openings = stoppage.passed = 0
            _forget_calls(stoppage)


def _reply(time: float, stoppage: StoppageState, member: StoppageMember, asked: StoppageRequest) -> StoppageReply:
    elsewhere = sum(other.probes for other in stoppage.members.values()) - member.probes
    member.probes = asked.probes
    if stoppage.openings and time >= stoppage.until:
        member.probes = max(asked.probes, min(asked.wanted, asked.most_probes - elsewhere))
    calls, faults, accepted = stoppage.calls - member.calls, stoppage.faults - member.faults, member.accepted
    member.calls, member.faults, member.accepted = stoppage.calls, stoppage.faults, False
    return StoppageReply(
        epoch=stoppage.epoch,
        accepted=accepted,
        openings=stoppage.openings,
        seconds=max(0.0, stoppage.until - time) if stoppage.openings else 0.0,
        passed=stoppage.passed,
        probes=member.probes,
        elsewhere=elsewhere,
        calls=calls,
        faults=faults,
        details=stoppage.details,
        age=time - stoppage.told_at,
    )
