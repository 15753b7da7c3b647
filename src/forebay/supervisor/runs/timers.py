"""Timers: one heap and one armed handle of the event loop for all tasks, instead of a handle for each."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from contextvars import copy_context
from typing import TypeVarTuple

Ts = TypeVarTuple("Ts")

# [due, order, callback, *arguments]: a list, so that cancelling changes it in place; the heap drops the timer later
_CALLBACK, _ARGUMENTS = 2, 3
_MAX_LATENESS = 0.1  # seconds; a timer that fires later than that shows that the loop was blocked
_MIN_CANCELLED = 64  # fewer cancelled timers than that are not worth a sweep


class Timer(list):  # type: ignore[type-arg]
    """One timer, to be passed to `Timers.cancel`."""

    __slots__ = ()


class Timers:
    """Callbacks at a loop time, in seconds.

    Timers that fell due while the loop was blocked fire one turn later, because the work that they are about to cancel
    may be ready to finish.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[Timer] = []
        self._order = 0
        self._cancelled = 0
        self._armed: asyncio.TimerHandle | None = None
        self._armed_for = 0.0
        self._closed = False
        self._context = copy_context()  # not that of whoever sets a timer, which may hold anything

    def at(self, when: float, callback: Callable[[*Ts], object], *arguments: *Ts) -> Timer:
        """Call ``callback(*arguments)`` at loop time `when`.

        A method of a class is best passed with its object as the first argument where there may be thousands of timers:
        a bound one would be one more object for each.
        """
        self._order += 1
        timer = Timer((when, self._order, callback, *arguments))
        heapq.heappush(self._heap, timer)
        if self._armed is None or when < self._armed_for:
            self._arm(when)
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """Cancel `timer`; None, or one that has fired or was cancelled, is ignored."""
        if timer is not None and timer[_CALLBACK] is not None:
            timer[_CALLBACK] = None
            del timer[_ARGUMENTS:]
            self._cancelled += 1
            if self._cancelled > _MIN_CANCELLED and 2 * self._cancelled > len(self._heap):
                self._heap = [live for live in self._heap if live[_CALLBACK] is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    @property
    def armed(self) -> bool:
        """True while the loop has a callback scheduled for the timers."""
        return self._armed is not None

    def close(self) -> None:
        """Cancel every timer. One that is set later never fires: background work that is cut off may set some."""
        self._closed = True
        self._heap.clear()
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None

    def _arm(self, when: float) -> None:
        if self._closed:
            return
        if self._armed is not None:
            self._armed.cancel()
        self._armed_for = when
        self._armed = self._loop.call_at(when, self._on_due, context=self._context)

    def _on_due(self) -> None:
        if self._loop.time() - self._armed_for > _MAX_LATENESS:
            self._loop.call_soon(self._fire)
        else:
            self._fire()

    def _fire(self) -> None:
        self._armed = None
        heap = self._heap
        now = self._loop.time()
        try:
            while heap and (heap[0][_CALLBACK] is None or heap[0][0] <= now):
                timer = heapq.heappop(heap)
                callback = timer[_CALLBACK]
                if callback is None:
                    self._cancelled -= 1
                else:
                    timer[_CALLBACK] = None
                    callback(*timer[_ARGUMENTS:])
                heap = self._heap  # a callback that cancels a timer may have replaced it
        finally:
            # A callback may have set a timer and armed the loop for it, though other timers are due sooner.
            if self._heap and (self._armed is None or self._heap[0][0] < self._armed_for):
                self._arm(self._heap[0][0])
