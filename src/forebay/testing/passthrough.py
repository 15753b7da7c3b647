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
    """A supervisor that admits every task at any load, and records its events.

    Otherwise it is a real supervisor: workers keep their limits, other tasks wait in the queue, and timeouts,
    deadlines, cancellation and nested tasks work as usual. A worker that becomes FAILED is revived at once. It takes
    the settings of a `BackpressureSupervisor`; by default it does not monitor the event loop.

    Attributes:
        record: the record of its events.
    """

    def __init__(self, *, lag_bound: float | None = None, **settings: Any) -> None:
        super().__init__(lag_bound=lag_bound, **settings)
        self.record = EventRecord(self)
        self._bus.add_observer(self._revive_failed_worker)

    async def start(self) -> None:
        """Start on the running event loop, without priority thresholds."""
        await super().start()
        self._admission_here().thresholds = _NoThresholds(1.0)

    def _revive_failed_worker(self, event: Event) -> None:
        if isinstance(event, WorkerFailed) and self.loop is not None:
            self.loop.call_soon(self.workers[event.worker_id].revive)


class _NoThresholds(PriorityThresholds):
    """Priority thresholds that reject nothing."""

    __slots__ = ()

    def threshold_for(self, priority: Priority) -> float:  # noqa: ARG002 - the same for all
        return math.inf

    def rejects(self, priority: Priority, load: float) -> bool:  # noqa: ARG002 - as above
        return False
