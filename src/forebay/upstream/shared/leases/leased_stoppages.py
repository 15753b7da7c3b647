"""The stoppages of calls that this process shares with others: what it reports, and what it takes over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from forebay.upstream.shared.leases.call_stoppage import CallStoppage
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest

_FAULTS: Final = 0.05  # seconds after which a call that failed is reported
_UNUSED_PROBE: Final = 0.05  # seconds after which a probe that no call waits for is returned


class LeasedStoppages:
    """The stoppages of calls of one account, as this process shares them. See `stoppages`.

    Args:
        stoppages: of this process, by kind.
    """

    def __init__(self, stoppages: Mapping[str, CallStoppage]) -> None:
        self._leased = {kind: _LeasedStoppage(stoppage) for kind, stoppage in stoppages.items()}
        self._each = tuple(self._leased.values())

    def is_stopping(self, now: float) -> bool:
        """Return whether no call is sent, or only probes are."""
        return any(leased.stoppage.is_stopping(now) for leased in self._each)

    def needs_probe(self, now: float) -> bool:
        """Return whether a call that is sent now would be a probe, and the ledger has not allowed this process one."""
        for leased in self._each:  # noqa: SIM110 - asked for each call, and half as fast with `any`
            if leased.stoppage.is_probing(now) and leased.needs_probe(now):
                return True
        return False

    def ask_at(self, now: float, *, waiting: bool) -> float:
        """Return when an exchange is needed; infinity if none is. `waiting`: calls wait."""
        when = math.inf
        for leased in self._each:  # asked twice for each call, and half as fast with a generator
            when = min(when, leased.ask_at(now, waiting=waiting))
        return when

    def report(self, now: float, waiting: int) -> dict[str, StoppageRequest]:
        """Return what to tell the ledger; `waiting`: calls that wait."""
        return {kind: leased.report(now, waiting) for kind, leased in self._leased.items()}

    def receive(
        self,
        now: float,
        until: float,
        requests: Mapping[str, StoppageRequest],
        replies: Mapping[str, StoppageReply],
        *,
        alone: bool = False,
    ) -> None:
        """Take over what the others have found out, and what this process may do until `until`.

        `alone`: no other process shares the account now.
        """
        for kind, leased in self._leased.items():
            if kind in requests and kind in replies:  # else there is nothing new
                leased.receive(now, until, requests[kind], replies[kind], alone=alone)

    def keep_unreported(self) -> None:
        """Note that the latest request was not counted."""
        for leased in self._each:
            leased.keep_unreported()


class _LeasedStoppage:
    """One stoppage of calls, as this process shares it."""

    def __init__(self, stoppage: CallStoppage) -> None:
        self.stoppage = stoppage
        self._epoch = -1
        self._quiet = StoppageRequest()  # with nothing to report
        self._allowed = 0  # probes that the ledger allows this process
        self._told_changes, self._told_passes = stoppage.changes, stoppage.passes
        self._request: StoppageRequest | None = None  # the latest

    def needs_probe(self, now: float) -> bool:
        return self.stoppage.probes(now) >= self._allowed

    def ask_at(self, now: float, *, waiting: bool) -> float:
        stoppage = self.stoppage
        if stoppage.changes != self._told_changes or stoppage.passes != self._told_passes:
            return now
        if stoppage.has_faults_to_tell():
            return now + _FAULTS
        if not waiting and stoppage.is_probing(now) and stoppage.probes(now) < self._allowed:
            return now + _UNUSED_PROBE
        return math.inf

    def report(self, now: float, waiting: int) -> StoppageRequest:
        stoppage = self.stoppage
        told = (self._told_changes, self._told_passes)
        if stoppage.is_quiet(now) and told == (stoppage.changes, stoppage.passes):
            self._request, self._allowed = self._quiet, 0
            return self._quiet
        described = stoppage.describe(now)
        wanted = described.probes + (waiting if stoppage.is_probing(now) else 0)
        self._allowed = min(self._allowed, wanted)
        self._request = msgspec.structs.replace(
            described,
            epoch=self._epoch,
            changed=stoppage.changes != self._told_changes,
            passes=stoppage.passes - self._told_passes,
            probes=max(described.probes, self._allowed),
            wanted=wanted,
        )
        self._told_changes, self._told_passes = stoppage.changes, stoppage.passes
        return self._request

    def receive(self, now: float, until: float, request: StoppageRequest, reply: StoppageReply, *, alone: bool) -> None:
        stoppage = self.stoppage
        if reply.epoch != request.epoch + reply.accepted:  # another process was first
            stoppage.adopt(now, reply)
            self._told_changes, self._told_passes = stoppage.changes, stoppage.passes
        elif stoppage.changes == self._told_changes:
            stoppage.refresh(now, reply, passes=stoppage.passes - self._told_passes, alone=alone)
        if reply.epoch != self._epoch:
            self._quiet = StoppageRequest(epoch=reply.epoch)
        self._epoch, self._allowed = reply.epoch, reply.probes
        stoppage.note_elsewhere(now, until, reply)

    def keep_unreported(self) -> None:
        if self._request is not None:
            self._told_changes -= self._request.changed
            self._told_passes -= self._request.passes
            self._request, self._allowed = None, 0
