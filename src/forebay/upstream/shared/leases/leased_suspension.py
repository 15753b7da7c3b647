"""A spend suspension that several processes share: the ledger of their account has it."""

from __future__ import annotations

import math

from forebay.upstream.accounts.spend_suspension import LONGEST_PROBE, SpendSuspension
from forebay.upstream.call_request import CallRequest, Permit
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest


class LeasedSuspension(SpendSuspension):
    """The suspension of an account in one of the processes that share it. It is a `CallStoppage`.

    When one process suspends the account, all do. After that, all processes send one probe together, and its success
    ends the suspension for all.

    Attributes:
        changes: see `CallStoppage`.
        passes: see `CallStoppage`; none, since the first probe that succeeds ends the suspension.
    """

    __slots__ = ("_elsewhere_until", "changes", "passes")

    def __init__(self) -> None:
        self.changes = self.passes = 0
        self._elsewhere_until = -math.inf  # another process has a probe in flight
        super().__init__()

    # --- see CallStoppage ---

    def is_stopping(self, now: float) -> bool:
        """See `CallStoppage`."""
        del now
        return self._until is not None

    def is_probing(self, now: float) -> bool:
        """See `CallStoppage`."""
        return self._until is not None and self.time_left(now, probe_duration=math.inf) is None

    def probes(self, now: float) -> int:
        """See `CallStoppage`."""
        return int(self._probe is not None and now - self._probe.granted_at <= LONGEST_PROBE)

    def has_faults_to_tell(self) -> bool:
        """See `CallStoppage`."""
        return False

    def is_quiet(self, now: float) -> bool:
        """See `CallStoppage`."""
        del now
        return self._until is None

    def describe(self, now: float) -> StoppageRequest:
        """See `CallStoppage`."""
        if self._until is None:
            return StoppageRequest()
        return StoppageRequest(
            openings=1,
            seconds=max(0.0, self._until - now),
            probes=self.probes(now),
            details=(self._until_same - now, float(self._refused_size), now - self._doubted_at),
        )

    def adopt(self, now: float, reply: StoppageReply) -> None:
        """See `CallStoppage`."""
        self._probe = None
        if not reply.openings:
            self._until = None
            return
        self._until = now + reply.seconds
        if reply.details:
            (same, size, doubted), told_at = reply.details, now - reply.age
            self._until_same, self._refused_size, self._doubted_at = told_at + same, int(size), told_at - doubted

    def refresh(self, now: float, reply: StoppageReply, *, passes: int, alone: bool) -> None:
        """See `CallStoppage`."""

    def note_elsewhere(self, now: float, until: float, reply: StoppageReply) -> None:
        """See `CallStoppage`."""
        del now
        self._elsewhere_until = until if reply.elsewhere else -math.inf

    # --- see SpendSuspension ---

    def begin(self, now: float, seconds: float) -> None:
        """See `SpendSuspension`."""
        self.changes += 1
        super().begin(now, seconds)

    def time_left(self, now: float, request: CallRequest | None = None, *, probe_duration: float) -> float | None:
        """See `SpendSuspension`."""
        left = super().time_left(now, request, probe_duration=probe_duration)
        if left is None and self._until is not None and now < self._elsewhere_until:
            return probe_duration
        return left

    def record_accepted(self, permit: Permit) -> None:
        """See `SpendSuspension`."""
        was_suspended = self._until is not None
        super().record_accepted(permit)
        self.changes += was_suspended and self._until is None
