"""A target whose replicas are slots of a worker of the supervisor itself."""

from __future__ import annotations

from typing import Protocol

from forebay._validate import check_whole
from forebay.scale.target import Replicas


class ResizableWorker(Protocol):
    """A worker, as far as its target needs it: `supervisor.register_worker` returns one."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def max_concurrent(self) -> int:
        """Its slots."""

    @property
    def slots(self) -> int:
        """The number of tasks that may run now: none while it is FAILED."""

    def resize(self, max_concurrent: int) -> None:
        """Change its slots. More take waiting tasks at once; fewer end no run."""


class WorkerTarget:
    """Makes a worker of the supervisor larger and smaller. A replica is one slot.

    With ``engine="process"`` a slot is a process of its own. Fewer slots end no run: nothing new begins until enough
    runs have ended. A worker keeps one slot at least.

    Args:
        worker: what `register_worker` returned.
    """

    outside = False

    def __init__(self, worker: ResizableWorker) -> None:
        self._worker = worker

    @property
    def name(self) -> str:
        """``"worker:"`` and the name of the worker."""
        return f"worker:{self._worker.name}"

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Leave the worker as it is."""

    async def replicas(self) -> Replicas:
        """Return its slots."""
        return Replicas(current=self._worker.max_concurrent, ready=self._worker.slots)

    async def scale(self, replicas: int) -> None:
        """Resize the worker."""
        check_whole("WorkerTarget", "replicas", replicas, minimum=0)
        self._worker.resize(max(1, replicas))
