"""A target whose replicas are slots of a worker of the supervisor itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from forebay._validate import check_whole, reject
from forebay.scale.target import Replicas

_OWNER: Final = "WorkerTarget"


class ResizableWorker(Protocol):
    """A worker, as far as its target needs it: `supervisor.register_worker` returns one."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def task_types(self) -> Sequence[str]:
        """The types of its tasks."""

    @property
    def reserve(self) -> int:
        """Those of its slots that only urgent tasks take: it has at least as many."""

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
    runs have ended. A worker keeps one slot at least, beside those that it reserves.

    Args:
        worker: what `register_worker` of the supervisor of the autoscaler returned. It must take all of the task types.

    Raises:
        InvalidSetting: it is something else.
    """

    outside = False

    def __init__(self, worker: ResizableWorker) -> None:
        if isinstance(worker, type) or not callable(getattr(worker, "resize", None)):
            reject(_OWNER, "worker", worker, "what register_worker returned")
        self._worker = worker

    @property
    def name(self) -> str:
        """``"worker:"`` and the name of the worker."""
        return f"worker:{self._worker.name}"

    @property
    def least(self) -> int:
        """The least slots with which the worker takes tasks of every priority: one more than it reserves."""
        return self._worker.reserve + 1

    def check(self, workers: Mapping[str, object], task_types: Sequence[str]) -> None:
        """Check that more slots of the worker would serve the tasks.

        Args:
            workers: those of the supervisor, by name.
            task_types: the types of the tasks.

        Raises:
            InvalidSetting: it is none of these workers, or does not take tasks of all the types.
        """
        if workers.get(self._worker.name) is not self._worker:
            expected = "a WorkerTarget of a worker that is registered with the same supervisor, and has not left it"
            reject("Autoscaler", "target", self.name, expected)
        if missing := sorted({*task_types} - {*self._worker.task_types}):
            reject(
                "Autoscaler",
                "target",
                self.name,
                f"a WorkerTarget of a worker that takes tasks of every type, {missing[0]!r} too",
            )

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Leave the worker as it is."""

    async def replicas(self) -> Replicas:
        """Return its slots."""
        return Replicas(current=self._worker.max_concurrent, ready=self._worker.slots)

    async def scale(self, replicas: int) -> None:
        """Resize the worker."""
        check_whole(_OWNER, "replicas", replicas, minimum=0)
        self._worker.resize(max(self.least, replicas))
