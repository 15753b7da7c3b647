"""Feeling the way up: beyond what held, a little at a time, faster while all goes well, seldom where it does not."""

from __future__ import annotations

from typing import Final

_FIRST_WAIT: Final = 4.0  # seconds after a refusal until the next probe
_LONGEST_WAIT: Final = 30.0  # seconds; a probe that is refused doubles the wait up to this, or half of this where the
# limit is far below what held
_UNSURE: Final = 60.0  # seconds more where calls are a little slow; not for ever, for the expectation may be wrong
_DOUBT: Final = 2.0  # seconds after a fall until it is asked whether it was called for
_SHARE: Final = 1 / 8  # of the limit: the first step


class LimitProbe:
    """When the limit may go beyond what held, and by how much for each round.

    Attributes:
        active: whether it has gone beyond what held.
        bold: the limit has just fallen far, for the first time. It may have been a passing spell, so the first probe
            comes soon and goes straight for the level that held.
    """

    def __init__(self) -> None:
        self.active = False
        self.fast_return = False
        self._step = 0.0  # calls in flight more for each round; 0 before the first
        self._wait = _FIRST_WAIT
        self._at = 0.0

    def is_due(self, now: float, *, fast: bool) -> bool:
        """Whether a probe may begin, or go on; unless calls are `brisk`, not before long."""
        return now >= self._at + (0.0 if fast else _UNSURE)

    def increment_per_success(self, level: float) -> float:
        """What one success adds to `level`, so that a round of them adds the step."""
        self.active = True
        self._step = self._step or max(1.0, _SHARE * level)
        return self._step / level

    def increment_per_accepted(self) -> float:
        """What one acceptance adds in a bold probe."""
        self.active = True
        return 1.0

    def record_clean_round(self, level: float) -> None:
        """A round went well: take the next with twice the step."""
        if self.active:
            self._step = min(2 * self._step, max(1.0, level / 2))

    def record_failure(self, *, low: bool) -> None:
        """What was probed was too much: wait twice as long for the next; `low`: more than this held before."""
        self._wait = min(_LONGEST_WAIT / 2 if low else _LONGEST_WAIT, 2 * self._wait)
        self.fast_return = False

    def record_success(self) -> None:
        """There is more room than there was: no reason to wait long."""
        self._wait = _FIRST_WAIT
        self.fast_return = False

    def stop(self, now: float, min_wait: float) -> None:
        """Go back, and probe no sooner than after the wait, or `least` seconds if that is longer."""
        self.active = False
        self._step = 0.0
        self._at = now + (_DOUBT if self.fast_return else max(self._wait, min_wait))
