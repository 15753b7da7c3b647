"""Probing above the best limit: in small steps that grow while all goes well, and rarely where it does not."""

from __future__ import annotations

from typing import Final

_FIRST_WAIT: Final = 4.0  # seconds after a refusal until the next probe
_MAX_WAIT: Final = 30.0  # seconds; a refused probe doubles the wait up to this, or half of it far below the best limit
_SLOW_WAIT: Final = 60.0  # seconds more while calls are a little slow; bounded, since the expectation may be wrong
_FAST_WAIT: Final = 2.0  # seconds until the first probe after a sudden fall, which may have been a passing fault
_FIRST_STEP: Final = 1 / 8  # of the limit


class LimitProbe:
    """The schedule of probes: when the limit may rise above the best one, and by how much per round.

    Attributes:
        active: whether the limit is above the best one.
        fast_return: whether the limit has just fallen far for the first time. That may have been a passing fault, so
            the first probe comes soon and goes straight for the best limit.
    """

    def __init__(self) -> None:
        self.active = False
        self.fast_return = False
        self._step = 0.0  # calls added per round; 0 before the first
        self._wait = _FIRST_WAIT
        self._due_at = 0.0

    def is_due(self, now: float, *, fast: bool) -> bool:
        """Return whether a probe may begin or go on; if calls are not `fast`, only after a longer wait."""
        return now >= self._due_at + (0.0 if fast else _SLOW_WAIT)

    def increment_per_success(self, level: float) -> float:
        """Begin or continue a probe; return what one success adds to `level`, so that a round adds one step."""
        self.active = True
        self._step = self._step or max(1.0, _FIRST_STEP * level)
        return self._step / level

    def increment_per_accepted(self) -> float:
        """Begin or continue a fast return; return what one accepted call adds to the limit."""
        self.active = True
        return 1.0

    def record_clean_round(self, level: float) -> None:
        """Double the step: a round went without refusals."""
        if self.active:
            self._step = min(2 * self._step, max(1.0, level / 2))

    def record_failure(self, *, low: bool) -> None:
        """Double the wait: the probe was refused. `low` is far below the best limit, where the wait stays shorter."""
        self._wait = min(_MAX_WAIT / 2 if low else _MAX_WAIT, 2 * self._wait)
        self.fast_return = False

    def record_success(self) -> None:
        """Go back to the shortest wait: the provider serves more than before."""
        self._wait = _FIRST_WAIT
        self.fast_return = False

    def stop(self, now: float, min_wait: float) -> None:
        """End the probe. The next one may begin after the wait, or after `min_wait` seconds if that is longer."""
        self.active = False
        self._step = 0.0
        self._due_at = now + (_FAST_WAIT if self.fast_return else max(self._wait, min_wait))
