"""A supervisor for unit tests that are not about overload."""

from __future__ import annotations

import math
from typing import Any

from forebay.admission import Ladder
from forebay.events import Event, WorkerFailed
from forebay.supervisor import BackpressureSupervisor
from forebay.task import Priority
from forebay.testing.record import Record


class Passthrough(BackpressureSupervisor):
    """A supervisor that admits everything, whatever its load, and records what happens.

    It is a real one otherwise: workers keep their limits and what does not fit waits in line; timeouts, deadlines,
    cancellation and nested work are as ever. No worker stays FAILED. It takes the settings of a
    `BackpressureSupervisor`, and does not watch the event loop unless told to.

    Attributes:
        record: everything that happened, see `Record`.
    """

    def __init__(self, *, lag_bound: float | None = None, **settings: Any) -> None:
        super().__init__(lag_bound=lag_bound, **settings)
        self.record = Record(self)
        self._bus.listen(self._keep_alive)

    async def start(self) -> None:
        """Start here, on the running event loop, with an open gate."""
        await super().start()
        self._running().ladder = _OpenLadder(1.0)

    def _keep_alive(self, event: Event) -> None:
        if isinstance(event, WorkerFailed) and self.loop is not None:
            self.loop.call_soon(self.workers[event.worker_id].revive)


class _OpenLadder(Ladder):
    """Refuses nobody."""

    __slots__ = ()

    def of(self, priority: Priority) -> float:  # noqa: ARG002 - the same for all
        return math.inf

    def refuses(self, priority: Priority, load: float) -> bool:  # noqa: ARG002 - as above
        return False
