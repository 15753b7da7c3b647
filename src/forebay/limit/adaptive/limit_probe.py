"""Probing: when the limit may rise again after a refusal, and how fast."""

from __future__ import annotations

from typing import Final

_FIRST_WAIT: Final = 1.0  # seconds after a refusal until the next probe
_MAX_WAIT: Final = 30.0  # seconds; each probe that gained nothing doubles the wait up to this ...
_MAX_WAIT_FEW: Final = 300.0  # ... or, where calls are so few that a refusal each 30 s is a large share, up to this
_SLOW_WAIT: Final = 30.0  # ... or where more calls would only be slower
_CALLS_PER_PROBE: Final = 100  # calls made between probes: so at most one call in a hundred is refused for them
_FIRST_STEP: Final = 1 / 8  # of the limit


class LimitProbe:
    """The schedule of probes: when the limit may rise above one that was refused, and by how much per round.

    Attributes:
        active: True if the limit has risen since it last fell.
    """

    def __init__(self) -> None:
        self.active = False
        self._step = 0.0  # calls added per round; 0 before the first
        self._wait = _FIRST_WAIT
        self._due_at = 0.0

    def is_due(self, now: float) -> bool:
        """Return whether a probe may begin or go on."""
        return now >= self._due_at

    def begin(self) -> None:
        """Note that the limit rises."""
        self.active = True

    def increment_per_success(self, level: float, *, careful: bool) -> float:
        """Begin or continue a probe; return what one success adds to `level`, so that a round adds one step.

        A `careful` probe begins with a step of one call, because its refusal will come late.
        """
        self.active = True
        self._step = self._step or max(1.0, 0.0 if careful else _FIRST_STEP * level)
        return self._step / level

    def record_clean_round(self, level: float) -> None:
        """Double the step: a round went without refusals."""
        if self.active:
            self._step = min(2 * self._step, max(1.0, level / 2))

    def record_failure(self, calls_per_second: float, *, low: bool) -> None:
        """Double the wait: the probe gained nothing. `low` is far below the best limit, where the wait stays short."""
        longest = max(_MAX_WAIT, min(_MAX_WAIT_FEW, _CALLS_PER_PROBE / calls_per_second))
        self._wait = min(_MAX_WAIT / 2 if low else longest, 2 * self._wait)

    def record_slowdown(self) -> None:
        """Wait long: our load slows the calls, so a higher limit gains nothing until the provider serves more."""
        self._wait = _SLOW_WAIT

    def record_change(self) -> None:
        """Go back to the shortest wait: the provider serves more than before, or less."""
        self._wait = _FIRST_WAIT

    def resume(self, now: float) -> None:
        """Allow a probe at once: an outage is over."""
        self._wait, self._due_at = _FIRST_WAIT, now

    def stop(self, now: float, min_wait: float) -> None:
        """End the probe. The next one may begin after the wait, or after `min_wait` seconds if that is longer."""
        self.active = False
        self._step = 0.0
        self._due_at = now + max(self._wait, min_wait)
