"""The messages about a stoppage of calls: a breaker that is open, a pause after refusals, a spend suspension."""

from __future__ import annotations

import msgspec


class StoppageRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stoppage as a member knows it, and what has become of its calls.

    Attributes:
        epoch: of the stoppage, as the ledger told it last; -1 if it has not.
        changed: calls were stopped, or let through again, by what the member has seen since then.
        openings: how often in a row calls were stopped; 0: they are let through.
        seconds: for which no call is sent, from now on; 0 if calls may probe.
        passed: probes that have succeeded since calls were stopped.
        passes: those of them that the member has not reported yet.
        calls: sent by the member while calls were let through, and not reported yet.
        faults: the part of them that failed.
        probes: of the member, in flight or allowed and not sent yet.
        wanted: probes of the member in flight, and calls that wait to be probes.
        most_probes: that all members may have in flight.
        successes: probes that must succeed for calls to be let through.
        details: numbers that only members understand.
    """

    epoch: int = -1
    changed: bool = False
    openings: int = 0
    seconds: float = 0.0
    passed: int = 0
    passes: int = 0
    calls: int = 0
    faults: int = 0
    probes: int = 0
    wanted: int = 0
    most_probes: int = 1
    successes: int = 1
    details: tuple[float, ...] = ()


class StoppageReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stoppage after an exchange, if there is anything new.

    Attributes:
        epoch: how often calls were stopped, or let through again.
        accepted: what has changed in the member holds for all now.
        openings: how often in a row calls were stopped; 0: they are let through.
        seconds: for which no call is sent; 0 if calls may probe.
        passed: probes that have succeeded since calls were stopped.
        probes: that the member may have in flight.
        elsewhere: probes that other members have, or may have.
        calls: of other members, since the member's last exchange.
        faults: the part of them that failed.
        details: of the member that stopped the calls, or let them through.
        age: seconds since it told them.
    """

    epoch: int
    accepted: bool = False
    openings: int = 0
    seconds: float = 0.0
    passed: int = 0
    probes: int = 0
    elsewhere: int = 0
    calls: int = 0
    faults: int = 0
    details: tuple[float, ...] = ()
    age: float = 0.0
