"""The record of one call of a caller: what it is for, and how long it has waited."""

from __future__ import annotations


class CallRecord:
    """The record of one call, from its request to the end of its response. Times are seconds of `forebay.clock.now`.

    Args:
        target: that its caller asked for.
        received_at: when its request arrived.

    Attributes:
        target: that its caller asked for.
        received_at: when its request arrived.
        model: that its caller asked for; empty until the request is read, or if it names none.
        waited: seconds that it has waited for permits so far; None if it has not asked for one.
    """

    __slots__ = ("_waits_since", "model", "received_at", "target", "waited")

    def __init__(self, target: str, received_at: float) -> None:
        self.target = target
        self.received_at = received_at
        self.model = ""
        self.waited: float | None = None
        self._waits_since: float | None = None

    def begin_wait(self, now: float) -> None:
        """Note that it waits for a permit, or would: an attempt has ended."""
        self._waits_since = now
        if self.waited is None:
            self.waited = 0.0

    def end_wait(self, now: float) -> None:
        """Note that it got a permit, or its answer, or that it was rejected, or its caller has left."""
        if self._waits_since is not None and self.waited is not None:
            self.waited += max(0.0, now - self._waits_since)
            self._waits_since = None
