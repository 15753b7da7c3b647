"""The Retry-After of rejected work: each rejection reserves a later retry slot, so that callers return one by one."""

from __future__ import annotations

_DRAIN_SHARE = 0.97  # of the drain rate that is promised: at the full rate the last callers would find no room
_JITTER = 0.1


class RetryAfterSchedule:
    """A schedule of retry slots, one drain interval apart.

    If every rejected caller got the same ``retry_after``, they would return together and nearly all be rejected again.
    With one slot each, nearly all are admitted.
    """

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0.0

    def reserve(self, now: float, drain_rate: float | None, draw: float) -> float | None:
        """Reserve the next free slot; return the seconds until then, or None if the drain rate is unknown.

        Args:
            now: seconds, on any clock that does not go back.
            drain_rate: tasks a second that leave; None or 0 is unknown.
            draw: a random number in [0, 1), for jitter of up to a tenth.
        """
        if not drain_rate:
            return None
        self._next = max(self._next, now) + 1 / (_DRAIN_SHARE * drain_rate)
        return (self._next - now) * (1 + _JITTER * draw)
