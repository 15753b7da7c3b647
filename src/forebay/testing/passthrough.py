"""A supervisor for unit tests that are not about overload."""

from __future__ import annotations

import math
from typing import Any

from forebay.admission import PriorityThresholds
from forebay.events import Event, WorkerFailed
from forebay.supervisor import BackpressureSupervisor
from forebay.task import Priority
from forebay.testing.event_record import EventRecord


class PassthroughSupervisor(BackpressureSupervisor):
    """A supervisor that admits everything, whatever its load, and records what happens.

    It is a real one otherwise: workers keep their limits and what does not fit waits in line; timeouts, deadlines,
    cancellation and nested work are as ever. No worker stays FAILED. It takes the settings of a
    `BackpressureSupervisor`, and does not watch the event loop unless told to.

    Attributes:
        record: everything that happened, see `Record`.
    """

    def __init__(self, *, lag_bound: float | None = None, **settings: Any) -> None:
        super().__init__(lag_bound=lag_bound, **settings)
        self.record = EventRecord(self)
        self._bus.add_sink(self._revive_failed_worker)

    async def start(self) -> None:
        """Start here, on the running event loop, with an open gate."""
        await super().start()
        self._running().thresholds = _NoThresholds(1.0)

    def _revive_failed_worker(self, event: Event) -> None:
        if isinstance(event, WorkerFailed) and self.loop is not None:
            self.loop.call_soon(self.workers[event.worker_id].revive)


class _NoThresholds(PriorityThresholds):
    """Refuses nobody."""

    __slots__ = ()

    def threshold_for(self, priority: Priority) -> float:  # noqa: ARG002 - the same for all
        return math.inf

    def rejects(self, priority: Priority, load: float) -> bool:  # noqa: ARG002 - as above
        return False
