"""The breaker: after faults it refuses for a while, then asks carefully whether all is well again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from forebay.breaker.triggers import FaultCountTrigger, FaultWindow, MinimumSampleTrigger, Trigger, consecutive_faults
from forebay.errors import InvalidSetting
from forebay.interfaces import Outcome

_SUCCESS = Outcome.SUCCESS  # a global is half the price of an enum's attribute, and this is asked for each task
_FAULT = Outcome.FAULT


class BreakerState(Enum):
    """Whether calls are let through: all, none, or a few that find out."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """When a breaker opens, how long it sleeps, and what it takes to close it.

    The n-th opening in a row sleeps for between half and all of ``min(max_reset_timeout, reset_timeout * 2**(n - 1))`` seconds:
    jitter, so that many breakers of one dependency do not wake together.

    Attributes:
        triggers: it opens as soon as one of these says so.
        reset_timeout: seconds of the first sleep at most; None keeps it open until `Breaker.reset`.
        max_reset_timeout: seconds of any sleep at most. What is well again waits up to so long to be found out.
        probes: calls let through at a time while half-open.
        successes: probes that must succeed, with no fault in between, for it to close. One fault opens it again.
        probe_timeout: seconds in which an answer must come while probes are out, else it opens again: a probe that hangs
            says what a fault says. Its success still counts when it comes late.

    Raises:
        InvalidSetting: a number makes no sense.
    """

    triggers: tuple[Trigger, ...] = (MinimumSampleTrigger(), FaultCountTrigger(faults=50, calls=1000))
    reset_timeout: float | None = 10.0
    max_reset_timeout: float = 60.0
    probes: int = 1
    successes: int = 2
    probe_timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.triggers:
            self._refuse("triggers", "at least one trigger, for example consecutive(5)")
        if self.reset_timeout is not None and not 0 < self.reset_timeout < math.inf:
            self._refuse("reset_timeout", "a positive number of seconds, or None to stay open until reset")
        if not (self.reset_timeout or 0.0) <= self.max_reset_timeout < math.inf:
            self._refuse("max_reset_timeout", "a number of seconds, not below reset_timeout")
        for name in ("probes", "successes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                self._refuse(name, "a whole number of at least 1")
        if not 0 < self.probe_timeout < math.inf:
            self._refuse("probe_timeout", "a positive number of seconds")

    def _refuse(self, name: str, expected: str) -> None:
        raise InvalidSetting(owner="BreakerRules", name=name, value=getattr(self, name), expected=expected)

    def open_duration(self, opening: int, *, draw: float) -> float:
        """Seconds that the `opening`-th opening in a row sleeps (1 is the first); `chance` is a draw from [0, 1)."""
        if self.reset_timeout is None:
            return math.inf
        longest = min(self.max_reset_timeout, self.reset_timeout * 2.0 ** min(opening - 1, 64))
        return longest * (0.5 + 0.5 * draw)


UPSTREAM_RULES = BreakerRules()
WORKER_RULES = BreakerRules(triggers=(consecutive_faults(5), FaultCountTrigger(faults=50, calls=1000)))


class Breaker:
    """Lets calls through while all is well, none while it is open, and a few probes in between.

    A call is let through by `allow`, which answers with the *era*: a number, never 0, that changes whenever the breaker
    changes. It is given back with the outcome, exactly once for each call let through, cancelled ones too (IGNORED). By
    it the breaker knows a probe from a call begun in an earlier era, whose outcome no longer says anything.

    Pure: its holder brings the time and, where it is shared by threads, the lock.

    Args:
        rules: when it opens, sleeps and closes.
        draw: a source of draws from [0, 1), asked once for each opening.
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
        self._window = FaultWindow(
            seconds=max(arm.seconds for arm in rules.triggers), span=max(arm.calls for arm in rules.triggers)
        )
        self._epoch = 0
        self.reset()

    def allow(self, now: float) -> int:
        """Let a call through, if that may be.

        Returns:
            The era, to be given to `record`; 0 if the call is refused.
        """
        return self._closed_epoch or self._allow_probe(now)

    def record(self, now: float, outcome: Outcome, epoch: int) -> BreakerState | None:
        """Take the outcome of a call that `allow` let through under `era`.

        Returns:
            The new state if the breaker changed, else None.
        """
        if epoch == self._closed_epoch:
            window = self._window
            if outcome is _SUCCESS:
                if now >= window.bucket_ends:
                    window.begin_bucket(now)
                window.calls += 1
            elif outcome is _FAULT and epoch:  # 0 was refused: there is nothing to take
                window.add_fault(now)
                if any(arm.should_open(window) for arm in self._rules.triggers):
                    return self._open(now)
            return None
        return self._record_late_or_probe(now, outcome, epoch)

    def trip(self, now: float) -> BreakerState | None:
        """Open it for a reason of the caller's. While it is open that changes nothing.

        Returns:
            OPEN if it was not open before, else None.
        """
        self._advance(now)
        return None if self._state is BreakerState.OPEN else self._open(now)

    def reset(self) -> None:
        """Close it and forget all that it saw; calls under way no longer count."""
        self._close()

    def ready(self, now: float) -> bool:
        """Whether `allow` would let a call through; takes nothing."""
        if self._closed_epoch:
            return True
        self._advance(now)
        return self._state is BreakerState.HALF_OPEN and self._out < self._rules.probes

    def state(self, now: float) -> BreakerState:
        """The state at `now`; a breaker that has slept long enough is HALF_OPEN."""
        self._advance(now)
        return self._state

    def retry_after(self, now: float, *, probe_duration: float = math.inf) -> float | None:
        """Seconds until a refused call may come again; 0 if it need not wait, None if only `reset` helps.

        While all probes are out, that is when they are given up at the latest, or after `probes_take` seconds.
        """
        if self.ready(now):
            return 0.0
        if self._state is BreakerState.OPEN:
            return None if self._until == math.inf else self._until - now
        return min(probe_duration, self._answer_by - now)

    def _allow_probe(self, now: float) -> int:
        self._advance(now)
        if self._state is not BreakerState.HALF_OPEN or self._out >= self._rules.probes:
            return 0
        if self._out == 0:
            self._answer_by = now + self._rules.probe_timeout
        self._out += 1
        return self._epoch

    def _record_late_or_probe(self, now: float, outcome: Outcome, era: int) -> BreakerState | None:
        before = self._state
        self._advance(now)
        if era == self._epoch and self._out:
            self._out -= 1
            if outcome is _FAULT:
                self._open(now)
            elif outcome is _SUCCESS:
                self._pass(now)
        elif era == self._overdue_epoch and outcome is _SUCCESS:
            # Given up too early: what serves is slow, not broken. Were it ignored, a dependency whose every answer
            # takes longer than probe_time would stay refused for ever.
            if self._state is BreakerState.OPEN:
                self._half_open()
            self._pass(now)
        return self._state if self._state is not before else None

    def _advance(self, now: float) -> None:
        """Make the changes that time alone has brought."""
        if self._state is BreakerState.HALF_OPEN and self._out and now >= self._answer_by:
            overdue, passed = self._epoch, self._passed
            self._open(self._answer_by)  # when it fell due, not when somebody looked
            self._overdue_epoch, self._passed = overdue, passed  # silence is no fault: what passed before still counts
        if self._state is BreakerState.OPEN and now >= self._until:
            self._half_open()

    def _pass(self, now: float) -> None:
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

    def _half_open(self) -> None:
        self._enter(BreakerState.HALF_OPEN)

    def _close(self) -> None:
        self._enter(BreakerState.CLOSED)
        self._closed_epoch = self._epoch
        self._overdue_epoch = 0
        self._passed = 0
        self._openings = 0
        self._window.clear()

    def _enter(self, state: BreakerState) -> None:
        self._state = state
        self._epoch += 1  # what was let through before is late from now on
        self._closed_epoch = 0
        self._out = 0
        self._answer_by = math.inf
        self._until = math.inf
