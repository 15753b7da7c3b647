"""The state of a stoppage of calls, as a ledger keeps it. Times are seconds of the ledger's own clock."""

from __future__ import annotations

import msgspec


class StoppageMember(msgspec.Struct, omit_defaults=True):
    """One member, and a stoppage.

    Attributes:
        probes: that it has in flight, or may have.
        calls: of all members, as far as this one has been told.
        faults: the part of them that failed.
        accepted: what its latest request has changed holds for all.
    """

    probes: int = 0
    calls: int = 0
    faults: int = 0
    accepted: bool = False


class StoppageState(msgspec.Struct, omit_defaults=True):
    """One stoppage: no call is sent for a time, then probes; they let calls through again, or stop them for longer.

    Attributes:
        epoch: how often calls were stopped, or let through again.
        openings: how often in a row calls were stopped; 0: they are let through.
        until: until then no call is sent; later, calls may probe.
        passed: probes that have succeeded since calls were stopped.
        calls: of all members, while they are let through.
        faults: the part of them that failed.
        details: of the member that stopped the calls, or let them through.
        told_at: when it told them.
        members: by id.
    """

    epoch: int = 0
    openings: int = 0
    until: float = 0.0
    passed: int = 0
    calls: int = 0
    faults: int = 0
    details: tuple[float, ...] = ()
    told_at: float = 0.0
    members: dict[str, StoppageMember] = {}
