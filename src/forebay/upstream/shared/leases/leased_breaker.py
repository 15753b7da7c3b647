"""A circuit breaker that several processes share: the ledger of their account has its state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from forebay.breaker import Breaker, BreakerRules, BreakerState
from forebay.interfaces import Outcome
from forebay.upstream.shared.leases.fault_row import FaultRow
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest

_SUCCESSES: Final = 0.25  # seconds after which successes are reported, with the next exchange
_YIELD: Final = 2.0  # seconds for which a process leaves the probes to others once its own calls have opened it


class LeasedBreaker(Breaker):
    """The circuit breaker of an account in one of the processes that share it. It is a `CallStoppage`.

    It counts the calls of all processes and decides as a `Breaker` does. What it decides holds for all, and what
    another process has decided first holds for this one. The faults of some processes alone, which may have a network
    of their own that is broken, do not open it while the calls of the others succeed.

    Args:
        rules: see `Breaker`; the same in all processes.
        draw: see `Breaker`.

    Attributes:
        changes: see `CallStoppage`.
        passes: see `CallStoppage`.
    """

    __slots__ = (
        "_elsewhere",
        "_elsewhere_until",
        "_others",
        "_own",
        "_told_at",
        "_told_calls",
        "_told_faults",
        "_yielded",
        "changes",
        "passes",
    )

    def __init__(self, rules: BreakerRules, *, draw: Callable[[], float]) -> None:
        self.changes = self.passes = 0
        self._elsewhere = 0  # probes of other processes ...
        self._elsewhere_until = -math.inf  # ... which count until then
        self._told_calls = self._told_faults = 0  # of the window: reported to the others, or told by them
        self._told_at = -math.inf
        self._own, self._others = FaultRow(), FaultRow()
        self._yielded = 0.0  # seconds for which it is open here for longer than elsewhere
        super().__init__(rules, draw=draw)
        self.changes = 0

    # --- see CallStoppage ---

    def is_stopping(self, now: float) -> bool:
        """See `CallStoppage`."""
        return not self._closed_epoch and self.state(now) is not BreakerState.CLOSED

    def is_probing(self, now: float) -> bool:
        """See `CallStoppage`."""
        return not self._closed_epoch and self.state(now) is BreakerState.HALF_OPEN

    def probes(self, now: float) -> int:
        """See `CallStoppage`."""
        return self._out if self.is_probing(now) else 0

    def has_faults_to_tell(self) -> bool:
        """See `CallStoppage`."""
        return self._closed_epoch != 0 and self._window.faults > self._told_faults

    def is_quiet(self, now: float) -> bool:
        """See `CallStoppage`. Successes are not worth telling at each exchange."""
        if not self._closed_epoch or self._window.faults > self._told_faults:
            return False
        return self._window.calls == self._told_calls or now < self._told_at + _SUCCESSES

    def describe(self, now: float) -> StoppageRequest:
        """See `CallStoppage`."""
        calls = faults = 0
        self._told_at = now
        is_open = self.state(now) is BreakerState.OPEN
        if self._closed_epoch:
            calls, faults = self._window.calls - self._told_calls, self._window.faults - self._told_faults
            self._told_calls, self._told_faults = self._window.calls, self._window.faults
        return StoppageRequest(
            openings=self._openings,
            seconds=self._until - now if is_open else 0.0,
            passed=self._passed,
            calls=calls,
            faults=faults,
            probes=self.probes(now),
            most_probes=self._rules.probes,
            successes=self._rules.successes,
        )

    def adopt(self, now: float, reply: StoppageReply) -> None:
        """See `CallStoppage`. Calls in flight do not count: they were sent before."""
        self._yielded = 0.0
        if not reply.openings:
            self._others.record_success(now)
            self._close()
            return
        self._enter(BreakerState.OPEN)
        self._overdue_epoch = 0
        self._openings = reply.openings
        self._until = now + reply.seconds
        self._passed = reply.passed

    def refresh(self, now: float, reply: StoppageReply, *, passes: int, alone: bool) -> None:
        """See `CallStoppage`."""
        if self._closed_epoch:
            return
        succeeds_elsewhere, self._passed = reply.passed + passes > self._passed, reply.passed + passes
        if succeeds_elsewhere:
            self._others.record_success(now)
        if self._state is not BreakerState.OPEN:
            return
        if reply.accepted and not alone:  # its faults may be of this process alone: others probe first
            self._yielded = _YIELD
            self._until += _YIELD
        # A late probe of another process may have ended it.
        self._until = min(self._until, now + reply.seconds + self._yielded)
        if succeeds_elsewhere:
            self._until = max(self._until, now + self._yielded)

    def note_elsewhere(self, now: float, until: float, reply: StoppageReply) -> None:
        """See `CallStoppage`."""
        self._elsewhere, self._elsewhere_until = reply.elsewhere, until
        if reply.faults:
            self._others.record_fault(now)
        elif reply.calls:
            self._others.record_success(now)
        before = self._window.calls, self._window.faults
        if self._closed_epoch and self.add_evidence(now, reply.calls, reply.faults) is None:
            self._told_calls += self._window.calls - before[0]
            self._told_faults += self._window.faults - before[1]

    # --- see Breaker ---

    def record(self, now: float, outcome: Outcome, epoch: int) -> BreakerState | None:
        """See `Breaker`."""
        if outcome is Outcome.SUCCESS:
            self._own.end(now)
        elif outcome is Outcome.FAULT and epoch:
            self._own.record_fault(now)
        return super().record(now, outcome, epoch)

    def _is_triggered(self) -> bool:
        if self._own.is_empty or self._own.is_contradicted_by(self._others):
            return False  # a process whose own calls fail decides
        return super()._is_triggered()

    def _may_probe(self, now: float) -> bool:
        elsewhere = self._elsewhere if now < self._elsewhere_until else 0
        return self._out + elsewhere < self._rules.probes

    def _record_probe_success(self, now: float) -> None:
        self.passes += 1
        super()._record_probe_success(now)

    def _open(self, now: float) -> BreakerState:
        self.changes += 1
        self._yielded = 0.0
        return super()._open(now)

    def _close(self) -> None:
        self.changes += 1
        self._told_calls = self._told_faults = 0
        super()._close()
