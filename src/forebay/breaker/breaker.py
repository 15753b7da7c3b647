"""The circuit breaker: closed, open after faults, half-open to probe for recovery."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum

from forebay._hooks import call_hook
from forebay._renamed import renamed_arguments
from forebay._validate import check_positive, check_whole, is_number, reject
from forebay.breaker.fault_window import FaultWindow
from forebay.breaker.triggers import FaultCountTrigger, MinimumSampleTrigger, Trigger, consecutive_faults
from forebay.interfaces import Outcome

_SUCCESS = Outcome.SUCCESS  # a global costs half of an enum's attribute, and each task asks for it
_FAULT = Outcome.FAULT


class BreakerState(Enum):
    """The state of a circuit breaker: it lets all calls through, none, or a few probes."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@renamed_arguments(arms="triggers", cool_off="reset_timeout", ceiling="max_reset_timeout", probe_time="probe_timeout")
@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """The rules of a breaker: when it opens, how long it stays open, and what closes it again.

    The n-th opening in a row lasts between half and all of ``min(max_reset_timeout, reset_timeout * 2**(n - 1))``
    seconds. The jitter keeps the breakers of one dependency from probing it together.

    Attributes:
        triggers: the breaker opens as soon as one of these says so. By default it opens once chance does not explain
            that half of the calls or more fail: it would refuse more good calls than it spares bad ones otherwise.
            Without any, ``()``, no fault opens it while it is closed.
        reset_timeout: seconds that the first opening lasts at most; None keeps it open until `Breaker.reset`.
        max_reset_timeout: seconds that any opening lasts at most. A recovery is noticed with up to this delay.
        probes: calls let through at a time while half-open.
        successes: probes that must succeed, with no fault in between, for it to close. One fault opens it again.
        probe_timeout: seconds in which a probe must answer, else the breaker opens again. The success of a late probe
            still counts.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    triggers: tuple[Trigger, ...] = (MinimumSampleTrigger(share=0.5), FaultCountTrigger(faults=20, calls=25))
    reset_timeout: float | None = 10.0
    max_reset_timeout: float = 60.0
    probes: int = 1
    successes: int = 2
    probe_timeout: float = 60.0

    def __post_init__(self) -> None:
        owner, longest = "BreakerRules", self.max_reset_timeout
        if not isinstance(self.triggers, tuple) or not all(hasattr(each, "should_open") for each in self.triggers):
            expected = "a tuple of triggers, such as (consecutive_faults(5),), or () for a breaker that no fault opens"
            reject(owner, "triggers", self.triggers, expected)
        check_positive(owner, "reset_timeout", self.reset_timeout, unit="seconds", none="to stay open until reset")
        if not is_number(longest) or not (self.reset_timeout or 0.0) <= longest < math.inf:
            reject(owner, "max_reset_timeout", longest, "a finite number of seconds, not below reset_timeout")
        check_whole(owner, "probes", self.probes)
        check_whole(owner, "successes", self.successes)
        check_positive(owner, "probe_timeout", self.probe_timeout, unit="seconds")

    @property
    def summary(self) -> str:
        """The settings that differ from the default, for messages. A trigger without a ``repr`` goes by its class."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        given = [
            f"{name}={_show_triggers(value) if name == 'triggers' else repr(value)}"
            for name, value in shown.items()
            if value != getattr(UPSTREAM_RULES, name)
        ]
        return f"BreakerRules({', '.join(given)})"

    def open_duration(self, opening: int, *, draw: float) -> float:
        """Return for how many seconds the `opening`-th opening in a row lasts (1 is the first); `draw` is in [0, 1)."""
        if self.reset_timeout is None:
            return math.inf
        longest = min(self.max_reset_timeout, self.reset_timeout * 2.0 ** min(opening - 1, 64))
        return longest * (0.5 + 0.5 * draw)


def _show_triggers(triggers: tuple[Trigger, ...]) -> str:
    shown = [
        type(trigger).__qualname__ if type(trigger).__repr__ is object.__repr__ else repr(trigger)
        for trigger in triggers
    ]
    return f"({', '.join(shown)}{',' * (len(shown) == 1)})"


UPSTREAM_RULES = BreakerRules()
WORKER_RULES = BreakerRules(triggers=(consecutive_faults(5), FaultCountTrigger(faults=50, calls=1000)))


class Breaker:
    """A circuit breaker: it lets all calls through while closed, none while open, and a few probes in between.

    `allow` lets a call through and returns the *epoch*: a number, never 0, that changes whenever the state changes. The
    epoch is passed to `record` with the outcome, exactly once for each call let through, also for a cancelled one
    (IGNORED). It tells the breaker a probe from a call of an earlier epoch, whose outcome no longer counts.

    Pure: the caller passes the time and, where threads share it, holds the lock.

    Args:
        rules: when it opens, for how long, and when it closes.
        draw: returns a random number in [0, 1); called once for each opening.
    """

    __slots__ = (
        "_answer_by",
        "_closed_epoch",
        "_draw",
        "_epoch",
        "_openings",
        "_out",
        "_overdue_epoch",
        "_passed",
        "_rules",
        "_state",
        "_until",
        "_window",
    )

    def __init__(self, rules: BreakerRules = UPSTREAM_RULES, *, draw: Callable[[], float]) -> None:
        self._until: float
        self._passed: int
        self._rules = rules
        self._draw = draw
        triggers = rules.triggers
        self._window = FaultWindow(
            seconds=max((trigger.seconds for trigger in triggers), default=0),
            span=max((trigger.calls for trigger in triggers), default=0),
        )
        self._epoch = 0
        self.reset()

    def allow(self, now: float) -> int:
        """Let a call through if the state allows it.

        Returns:
            The epoch, to be passed to `record`; 0 if the call is rejected.
        """
        return self._closed_epoch or self._allow_probe(now)

    def record(self, now: float, outcome: Outcome, epoch: int) -> BreakerState | None:
        """Record the outcome of a call that `allow` let through under `epoch`.

        Returns:
            The new state if it changed, else None.
        """
        if epoch == self._closed_epoch:
            window = self._window
            if outcome is _SUCCESS:  # as `add_success`, without the cost of a call
                if now >= window.bucket_ends:
                    window.begin_bucket(now)
                window.calls += 1
            elif outcome is _FAULT and epoch:  # epoch 0 is a rejected call: it counts for nothing
                window.add_fault(now)
                if self._is_triggered():
                    return self._open(now)
            return None
        return self._record_late_or_probe(now, outcome, epoch)

    def add_evidence(self, now: float, calls: int, faults: int) -> BreakerState | None:
        """Count calls of others to the same dependency, up to now; do nothing unless it is closed.

        Their order is not known, so the faults are taken to be spread evenly among them.

        Args:
            now: the time.
            calls: how many there were.
            faults: how many of them failed.

        Returns:
            OPEN if that opens it, else None.
        """
        if not self._closed_epoch or not calls:
            return None
        successes = calls - faults
        for number in range(faults):
            self._window.add_successes(now, (number + 1) * successes // faults - number * successes // faults)
            self._window.add_fault(now)
            if self._is_triggered():
                return self._open(now)
        if not faults:
            self._window.add_successes(now, successes)
        return None

    def _is_triggered(self) -> bool:
        window = self._window  # a user's own trigger may raise, and what ended has ended all the same
        return any(
            call_hook("a trigger of a circuit breaker", trigger.should_open, window) for trigger in self._rules.triggers
        )

    def trip(self, now: float) -> BreakerState | None:
        """Open it for a reason of the caller's; do nothing while it is open.

        Returns:
            OPEN if it was not open before, else None.
        """
        self._advance(now)
        return None if self._state is BreakerState.OPEN else self._open(now)

    def hold_open(self, now: float) -> None:
        """Open it for a reason of the caller's, or keep it open, until `reset`."""
        self._open(now)
        self._until = math.inf

    def reset(self) -> None:
        """Close it and forget all faults; calls under way no longer count."""
        self._close()

    def ready(self, now: float) -> bool:
        """Return whether `allow` would let a call through, without letting one through."""
        if self._closed_epoch:
            return True
        self._advance(now)
        return self._state is BreakerState.HALF_OPEN and self._may_probe(now)

    def state(self, now: float) -> BreakerState:
        """Return the state at `now`; a breaker whose reset timeout has passed is HALF_OPEN."""
        self._advance(now)
        return self._state

    def retry_after(self, now: float, *, probe_duration: float = math.inf) -> float | None:
        """Return the seconds until a rejected call may come again; 0 for now, None if only `reset` helps.

        While all probes are out, that is when the oldest one times out, or after `probe_duration` seconds.
        """
        if self.ready(now):
            return 0.0
        if self._state is BreakerState.OPEN:
            return None if self._until == math.inf else self._until - now
        return min(probe_duration, self._answer_by - now)

    def _allow_probe(self, now: float) -> int:
        self._advance(now)
        if self._state is not BreakerState.HALF_OPEN or not self._may_probe(now):
            return 0
        if self._out == 0:
            self._answer_by = now + self._rules.probe_timeout
        self._out += 1
        return self._epoch

    def _may_probe(self, now: float) -> bool:
        """Return whether another probe may be sent while it is half-open."""
        del now
        return self._out < self._rules.probes

    def _record_late_or_probe(self, now: float, outcome: Outcome, epoch: int) -> BreakerState | None:
        before = self._state
        self._advance(now)
        if epoch == self._epoch and self._out:
            self._out -= 1
            if outcome is _FAULT:
                self._open(now)
            elif outcome is _SUCCESS:
                self._record_probe_success(now)
        elif epoch == self._overdue_epoch and outcome is _SUCCESS:
            # The probe timed out, but the dependency is slow, not broken. Without this, one whose every answer takes
            # longer than probe_timeout would be rejected forever.
            if self._state is BreakerState.OPEN:
                self._enter(BreakerState.HALF_OPEN)
            self._record_probe_success(now)
        return self._state if self._state is not before else None

    def _advance(self, now: float) -> None:
        """Make the transitions that are due by time alone."""
        if self._state is BreakerState.HALF_OPEN and self._out and now >= self._answer_by:
            overdue, passed = self._epoch, self._passed
            self._open(self._answer_by)  # when the probe timed out, not when somebody looked
            self._overdue_epoch, self._passed = overdue, passed  # a timeout is no fault: earlier successes still count
        if self._state is BreakerState.OPEN and now >= self._until:
            self._enter(BreakerState.HALF_OPEN)

    def _record_probe_success(self, now: float) -> None:
        self._passed += 1
        self._answer_by = now + self._rules.probe_timeout
        if self._passed >= self._rules.successes:
            self._close()

    def _open(self, now: float) -> BreakerState:
        self._enter(BreakerState.OPEN)
        self._overdue_epoch = 0
        self._passed = 0
        self._openings += 1
        self._until = now + self._rules.open_duration(self._openings, draw=self._draw())
        return self._state

    def _close(self) -> None:
        self._enter(BreakerState.CLOSED)
        self._closed_epoch = self._epoch
        self._overdue_epoch = 0
        self._passed = 0
        self._openings = 0
        self._window.clear()

    def _enter(self, state: BreakerState) -> None:
        self._state = state
        self._epoch += 1  # calls let through before are late from now on
        self._closed_epoch = 0
        self._out = 0
        self._answer_by = math.inf
        self._until = math.inf
