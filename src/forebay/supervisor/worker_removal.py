"""Removal of workers while the supervisor runs: what runs there finishes, and nothing new begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from forebay._text import format_duration
from forebay.events import WorkerUnregistered, log
from forebay.supervisor.nested_supervisor import stop_handlers
from forebay.supervisor.runs.stopping import RunStopper, StoppingDispatcher
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.worker import WorkerAgent
    from forebay.supervisor.worker_starts import WorkerStarts


class RemovalDispatcher(StoppingDispatcher, Protocol):
    """The dispatcher, as far as the removal of workers needs it."""

    @property
    def starts(self) -> WorkerStarts:
        """The starts of handlers in progress."""

    def update_slots(self, worker: WorkerAgent) -> None:
        """Count the slots that `worker` has now, and dispatch to it."""

    def fail_all_waiting(self, pool: Pool, error: str) -> None:
        """End every task that waits in a pool whose workers will not come, or leave it to its store."""

    def unlist_worker(self, worker: WorkerAgent) -> None:
        """Let another worker have the name of `worker`."""

    def forget_worker(self, worker: WorkerAgent) -> list[Pool]:
        """Forget a worker on which nothing runs any more. Return the pools that are gone with it."""

    def remove_pool_if_unused(self, pool: Pool) -> bool:
        """Remove a pool without workers that is not paused."""


class WorkerRemoval:
    """Removes one worker, in three steps: it begins nothing new, what runs there ends, it is forgotten.

    While runs there wait for nested tasks, these still begin there. A task that waits for no other worker ends once the
    worker is gone, unless its type is paused: then another worker is to come.

    Args:
        core: the objects that the parts of the supervisor share.
        dispatcher: the dispatcher.
        grace: seconds that a cancelled handler has to stop.
    """

    def __init__(self, core: Core, dispatcher: RemovalDispatcher, *, grace: float) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._stopper = RunStopper(core, dispatcher)
        self._grace = grace
        self._accepts_nothing = False  # nested tasks neither

    def begin(self, worker: WorkerAgent) -> None:
        """Let nothing new begin on `worker`, but nested tasks for which its runs wait."""
        worker.leave()
        for pool in self._pools(worker):
            pool.worker_leaves()
        self._dispatcher.update_slots(worker)

    async def finish(self, worker: WorkerAgent, timeout: float | None) -> tuple[bool, Sequence[str]]:  # noqa: ASYNC109 - it cuts off, not raises
        """Let what runs on `worker` finish for at most `timeout` seconds, cancel the rest, and stop its handler.

        If this is cancelled, it may be called again.

        Returns:
            True if nothing runs there any more; and the task types that are not known any more. Otherwise `forget` is
            to be called next.
        """
        await self._dispatcher.starts.cancel(worker)
        await self._stopper.wait(worker, timeout)
        if not self._accepts_nothing:
            self._accepts_nothing = True
            worker.accept_nothing()
            for pool in self._pools(worker):
                pool.worker_left()
        cut = len(self._dispatcher.runs.on(worker))
        if cut:
            limit = format_duration(timeout or 0.0)
            error = f"worker {worker.name!r} was unregistered, and it had not ended after {limit}"
            await self._stopper.stop(worker, TaskStatus.CANCELLED, error, limit=self._grace)
        await stop_handlers([worker], grace=self._grace)
        self._end_all_waiting(worker)
        self._dispatcher.unlist_worker(worker)
        self._core.bus.emit(WorkerUnregistered(at=self._core.loop.time(), worker_id=worker.name, cut=cut))
        if left := self._dispatcher.runs.on(worker):
            ids = ", ".join(repr(run.task.task_id) for run in left)
            log.warning("worker %r was unregistered, but handlers on it did not stop: of %s", worker.name, ids)
            return False, ()
        return True, [pool.task_type for pool in self._dispatcher.forget_worker(worker)]

    async def forget(self, worker: WorkerAgent) -> Sequence[str]:
        """Forget a worker once its last zombie has stopped; return the task types that are not known any more."""
        await self._stopper.wait(worker, None)
        self._end_all_waiting(worker)  # what has come since, such as a task that its store did not take back
        return [pool.task_type for pool in self._dispatcher.forget_worker(worker)]

    def _end_all_waiting(self, worker: WorkerAgent) -> None:
        for pool in self._pools(worker):
            self.end_waiting(pool, f"worker {worker.name!r}, the last one for {pool.task_type!r}, was unregistered")

    def end_waiting(self, pool: Pool, error: str) -> None:
        """End the tasks of `pool` that wait, if no worker will take them and none is to come."""
        if not (pool.is_served or pool.paused):
            self._dispatcher.fail_all_waiting(pool, error)
            if (spill := self._dispatcher.spill) is not None:
                spill.stored.fail_waiting(pool.task_type, error)

    def resume(self, pool: Pool) -> bool:
        """End what waits for a task type that was paused and has no worker; return whether its pool is gone."""
        self.end_waiting(pool, f"{pool.task_type!r} was resumed, and no worker is registered for it")
        return self._dispatcher.remove_pool_if_unused(pool)

    def _pools(self, worker: WorkerAgent) -> Sequence[Pool]:
        return self._core.pools.by_worker[worker].pools
