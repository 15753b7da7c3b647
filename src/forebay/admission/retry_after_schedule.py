"""When those sent away may come back: each refusal books the next seat, so that they do not return as a herd."""

from __future__ import annotations

_CAUTION = 0.97  # promise seats a little slower than they fall free, or the last ones promised are not there
_JITTER = 0.1


class RetryAfterSchedule:
    """Seats handed out one drain interval apart.

    With the same ``retry_after`` for everybody, the refused return together and nearly all are refused again; with
    booked seats nearly all are admitted.
    """

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0.0

    def reserve(self, now: float, drain_rate: float | None, draw: float) -> float | None:
        """Seconds until the next free seat; None if the drain rate (tasks a second) is unknown.

        Args:
            now: seconds, on any clock that does not go back.
            drain_rate: tasks a second that leave; None or 0 is unknown.
            chance: a draw from [0, 1), for jitter of up to a tenth.
        """
        if not drain_rate:
            return None
        self._next = max(self._next, now) + 1 / (_CAUTION * drain_rate)
        return (self._next - now) * (1 + _JITTER * draw)
