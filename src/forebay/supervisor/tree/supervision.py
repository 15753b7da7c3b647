"""Supervision: workers whose life has ended are started again, alone or with others, unless that happens too often."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from forebay._hooks import raise_if_cancelled, report_failure
from forebay._text import format_duration
from forebay.events import WorkerExited, WorkerRestarted, log
from forebay.supervisor.core import RESUME_DELAY, Core
from forebay.supervisor.runs.completion import RunCompletion, describe_error
from forebay.supervisor.runs.stopping import RunStopper, StoppingDispatcher
from forebay.supervisor.tree.restart_intensity import RestartIntensity
from forebay.supervisor.tree.restart_policy import ExitKind, RestartType, Strategy
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forebay.supervisor.nested_supervisor import NestedSupervisor
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.tree.worker_life import Exit
    from forebay.supervisor.worker import WorkerAgent
    from forebay.supervisor.worker_starts import WorkerStarts


class SupervisionDispatcher(StoppingDispatcher, Protocol):
    """The dispatcher, as far as supervision needs it."""

    @property
    def workers(self) -> Mapping[str, WorkerAgent]:
        """The workers, in the order of their registration."""

    @property
    def completion(self) -> RunCompletion:
        """The ends of its runs, and what they mean for the breakers of its workers."""

    @property
    def starts(self) -> WorkerStarts:
        """The first starts of its workers."""

    def fail_all_waiting(self, pool: Pool, error: str, *, worker_id: str | None = None) -> None:
        """End every task that waits in a pool whose workers will not come, or leave it to its store."""

    def update_slots(self, worker: WorkerAgent) -> None:
        """Count the slots that `worker` has now, and dispatch to it."""


class Supervision:
    """Handles the ends of lives one after the other, in a background task that runs while there are any.

    A restart stops the workers that the strategy names, in reverse order, with what runs on them, and starts them in
    order. Tasks that wait keep waiting. A start that fails is followed by another restart, once the ends that wait have
    been handled. If there are too many of them, a supervisor that is a worker of another one gives up, so that the
    other restarts it as a whole; any other makes the workers FAILED until they are revived. No worker is FAILED but by
    its breaker.

    Args:
        core: the objects that the parts of the supervisor share.
        dispatcher: the dispatcher.
        strategy: which workers are restarted together.
        intensity: how many restarts are too many.
        grace: seconds that a cancelled handler has to stop.
        max_attempts: of a stored task under which the lives of its workers end.
        remove: begins to unregister a worker, whose life has ended for good.
    """

    def __init__(  # noqa: PLR0913 - the shared objects, and the settings of a supervisor
        self,
        core: Core,
        dispatcher: SupervisionDispatcher,
        *,
        strategy: Strategy,
        intensity: RestartIntensity,
        grace: float,
        max_attempts: int,
        remove: Callable[[WorkerAgent], None],
    ) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._stopper = RunStopper(core, dispatcher)
        self._strategy = strategy
        self._intensity = intensity
        self._grace = grace
        self._max_attempts = max_attempts
        self._remove = remove
        self._jobs: deque[partial[Coroutine[Any, Any, None]]] = deque()
        self._job: partial[Coroutine[Any, Any, None]] | None = None  # that is being worked on
        self._working: asyncio.Future[None] | None = None
        self._active = False  # the workers were added, and it has neither halted nor closed
        self._halted = self._closed = False
        self._down: dict[WorkerAgent, list[WorkerAgent]] = {}  # FAILED for good, and those that are so with each
        self._unstarted: dict[WorkerAgent, Sequence[WorkerAgent]] = {}  # by the one whose start is to be tried again
        self._watchers: list[asyncio.Future[None]] = []

    # --- its own start and end ---

    def begin(self) -> None:
        """Begin to handle ends of lives, those so far included: every worker has been started."""
        self._active = True
        self._work_on()

    @property
    def halted(self) -> bool:
        """True while its workers are stopped, or are being stopped, until `start_workers`."""
        return self._halted

    def close(self) -> None:
        """Handle no end any more, and start nothing."""
        self._closed = True
        self._interrupt()

    def _interrupt(self) -> None:
        self._active = False
        self._jobs.clear()
        self._unstarted.clear()
        if self._working is not None:
            self._working.cancel()

    def watch(self) -> asyncio.Future[None]:
        """Return a future that is cancelled when it gives up: somebody else decides then what to do."""
        self._watchers = [watcher for watcher in self._watchers if not watcher.done()]
        watcher = self._core.loop.create_future()
        self._watchers.append(watcher)
        return watcher

    async def halt(self) -> None:
        """Stop every worker, in reverse order, until `start_workers`; nothing once it is closed."""
        if self._closed:
            return
        self._halted = True
        working = self._working
        self._interrupt()
        if working is not None:
            await asyncio.wait((working,))
        await self._stop(self._children(), "its supervisor was restarted")

    async def start_workers(self) -> None:
        """Start every worker again, in order, if they were halted.

        Raises:
            BaseException: what a start raised. The workers are halted then.
        """
        if not self._halted or self._closed:
            return
        self._halted = False
        self._intensity.clear()
        try:
            failure = await self._start(self._children())
        except BaseException:  # such as the start_timeout of the worker that this supervisor is
            await self.halt()
            raise
        if failure is not None:
            await self.halt()
            raise failure[1]
        self.begin()

    def fail_workers(self, reason: str) -> None:
        """Make every worker FAILED until the supervisor is started again: they are halted."""
        self._fail(self._children(), reason)

    # --- the ends of lives ---

    def exited(self, worker: WorkerAgent, end: Exit) -> None:
        """Handle the end of a worker's life: soon, because others may be handled at present."""
        if self._halted or self._closed:
            return  # it is to be stopped anyway
        if worker.leaving:
            reason = "the life of its worker, which is being unregistered, has ended"
            stopping = self._stopper.stop(worker, TaskStatus.FAILED, reason, limit=self._grace)
            self._core.run_in_background(stopping)
            return
        error: str | None = None
        why = _EXITS[end.kind]
        if end.error is not None:
            error = describe_error(end.error)
            why = f"{why} {error}"
        log.warning("worker %r has stopped: %s", worker.name, why, exc_info=end.error)
        exited = WorkerExited(at=self._core.loop.time(), worker_id=worker.name, exit=end.kind.value, error=error)
        self._core.bus.emit(exited)
        worker.begin_restart()
        self._begin_to_end_runs(worker, f"worker {worker.name!r} has stopped: {why}")
        self._jobs.append(partial(self._handle_exit, worker, end.kind, why))
        if end.by_program:  # no task may be begun in a loop that ends now
            self._core.timers.at(self._core.loop.time() + RESUME_DELAY, self._work_on)
        else:
            self._work_on()

    def revive(self, worker: WorkerAgent) -> None:
        """Close the breaker of a worker, and start it again if it was stopped, with those that were stopped with it."""
        group = self._down.get(worker)
        if self._halted:
            log.warning("worker %r starts again with its supervisor: revive the worker that this is", worker.name)
        elif group is None:
            self._dispatcher.completion.revive(worker)
        else:
            self._intensity.clear()
            group = [other for other in group if self._down.pop(other, None) is not None and not other.leaving]
            for other in group:
                other.begin_restart()
                self._dispatcher.completion.revive(other)
            self._jobs.append(partial(self._start_or_try_again, group))
            self._work_on()

    def forget(self, worker: WorkerAgent) -> None:
        """Forget a worker that is being unregistered."""
        self._down.pop(worker, None)

    def _work_on(self) -> None:
        if self._active and self._working is None and self._jobs:
            self._working = self._core.run_to_completion(self._work())
            self._working.add_done_callback(self._worked)

    async def _work(self) -> None:
        while self._jobs:
            self._job = self._jobs.popleft()
            await self._job()
            self._job = None

    def _worked(self, working: asyncio.Future[None]) -> None:
        self._working = None
        job, self._job = self._job, None
        if not self._active:
            return
        error = None if working.cancelled() else working.exception()
        if error is not None:
            log.error("the restart of a worker failed", exc_info=error)
        if error is not None or working.cancelled():  # as by a program that cancels every task of asyncio
            self._pick_up(job if error is None else None)
        if working.cancelled():
            self._core.timers.at(self._core.loop.time() + RESUME_DELAY, self._work_on)
        else:
            self._work_on()

    def _pick_up(self, interrupted: partial[Coroutine[Any, Any, None]] | None) -> None:
        """Go on with restarts that were cut off: with the `interrupted` one, unless it has stopped its workers."""
        exits = [job for job in (interrupted, *self._jobs) if job is not None and job.func == self._handle_exit]
        ended = {job.args[0] for job in exits if job.args[0].life.ended}  # and none of them has been stopped
        if interrupted is not None and interrupted in exits and interrupted.args[0] in ended:
            self._jobs.appendleft(interrupted)
        for worker in self._children():
            if worker.starting and worker not in ended and not self._dispatcher.starts.is_starting(worker):
                worker.end_start(ready=False)
                self._dispatcher.completion.fail_start(worker)

    def _children(self) -> list[WorkerAgent]:
        return [worker for worker in self._dispatcher.workers.values() if not worker.leaving]

    # --- what is done about them ---

    async def _handle_exit(self, worker: WorkerAgent, kind: ExitKind, why: str) -> None:
        if worker.leaving or not worker.life.ended:  # it was stopped with another worker meanwhile
            return
        if worker.life.restart.restarts_after(kind):
            await self._restart(worker, why, advice=_RETURNED if kind is ExitKind.NORMAL else "")
            return
        await self._stop([worker], f"it has stopped: {why}")
        if worker.leaving:
            return
        if worker.life.restart is RestartType.TEMPORARY:
            self._remove(worker)
        else:
            restart = worker.life.restart.value
            self._fail([worker], f"{why}, after which a {restart} worker is not started again")

    async def _restart(self, failed: WorkerAgent, why: str, *, advice: str = "") -> None:
        """Stop `failed` and the workers that are restarted with it, and start them; or give up."""
        together = self._strategy.restarted_with(failed, self._children())
        self._unstarted = {other: left for other, left in self._unstarted.items() if not {*left} & {*together}}
        if not self._intensity.allow(self._core.loop.time()):
            await self._give_up(failed, together, why, advice)
            return
        await self._stop(together, f"worker {failed.name!r} was restarted: {why}")
        await self._start_or_try_again(self._remove_temporary(together))

    async def _start_or_try_again(self, workers: Sequence[WorkerAgent]) -> None:
        """Start workers that were stopped. If one cannot be, they are restarted after the ends of lives so far.

        One that does not start again for hours must not keep the others from it.
        """
        if (failure := await self._start(workers)) is not None:
            failed, error = failure
            why = f"its start raised {describe_error(error)}"
            self._unstarted[failed] = workers
            self._jobs.append(partial(self._try_again, failed, why))

    async def _try_again(self, failed: WorkerAgent, why: str) -> None:
        workers = self._unstarted.pop(failed, None)
        if workers is None:  # it was stopped with another one meanwhile
            return
        if failed.leaving:  # it was unregistered meanwhile, and the others are only to be started
            await self._start_or_try_again(workers)
        else:
            await self._restart(failed, why)

    async def _give_up(self, failed: WorkerAgent, together: Sequence[WorkerAgent], why: str, advice: str) -> None:
        intensity = self._intensity
        reason = (
            f"{why}; it would be one restart too many: at most {intensity.max_restarts}"
            f" within {format_duration(intensity.within)}{advice}"
        )
        watchers = [watcher for watcher in self._watchers if not watcher.done()]
        if watchers:
            self._halted = True
            self._jobs.clear()
            self._fail([failed], reason, final=False)
            for watcher in watchers:
                watcher.cancel()
            return
        await self._stop(together, f"worker {failed.name!r} is not restarted any more: {why}")
        kept = self._remove_temporary(together)
        self._fail([worker for worker in kept if worker is failed], reason, group=kept)
        others = [worker for worker in kept if worker is not failed]
        self._fail(others, f"it is restarted with worker {failed.name!r}, which is FAILED", group=kept)

    def _remove_temporary(self, workers: Sequence[WorkerAgent]) -> list[WorkerAgent]:
        """Unregister the temporary ones of workers that were stopped, and return the others."""
        for worker in workers:
            if worker.life.restart is RestartType.TEMPORARY and not worker.leaving:
                self._remove(worker)
        return [worker for worker in workers if not worker.leaving]

    def _fail(
        self,
        workers: Sequence[WorkerAgent],
        reason: str,
        *,
        group: Sequence[WorkerAgent] | None = None,
        final: bool = True,
    ) -> None:
        """Make workers that are stopped FAILED until they are revived, `group` together; end what waits for them.

        If this is not `final`, because it gives up and may be restarted as a whole, what waits keeps waiting.
        """
        for worker in workers:
            self._down[worker] = list(workers if group is None else group)
            worker.end_start(ready=False)
            self._dispatcher.completion.fail_until_revived(worker, reason)
            if final and worker.handler.nested_supervisor is not None:
                cast("NestedSupervisor", worker.handler.nested_supervisor).fail_workers(reason)
        if final:
            for worker in workers:
                worker.give_up()
            for worker in workers:
                for pool in self._core.pools.by_worker[worker].pools:
                    if not (pool.slots or pool.paused):
                        revival = f"supervisor.workers[{worker.name!r}].revive()"
                        error = f"it waited, and no worker takes it before {revival}: {reason}"
                        self._dispatcher.fail_all_waiting(pool, error, worker_id=worker.name)

    async def _stop(self, workers: Sequence[WorkerAgent], error: str) -> None:
        """Stop workers in reverse order: each ends what runs on it, FAILED unless it is stored, then its life."""
        for worker in workers:
            worker.begin_restart()
        for worker in reversed(workers):
            await self._dispatcher.starts.cancel(worker)
            worker.begin_restart()
            max_attempts = self._max_attempts if worker.life.ended else None
            await self._end_runs(worker, error, max_attempts=max_attempts)
            await worker.life.stop(grace=self._grace, for_good=False)

    def _begin_to_end_runs(self, worker: WorkerAgent, error: str) -> None:
        """End what runs on a worker whose life has ended: restarts that are handled before its own may take long."""
        self._core.run_in_background(self._end_runs(worker, error, max_attempts=self._max_attempts))

    async def _end_runs(self, worker: WorkerAgent, error: str, *, max_attempts: int | None) -> None:
        """End what runs on a worker, and wait for the handlers for at most the grace."""
        await self._stopper.stop(worker, TaskStatus.FAILED, error, limit=self._grace, max_attempts=max_attempts)

    async def _start(self, workers: Sequence[WorkerAgent]) -> tuple[WorkerAgent, BaseException] | None:
        """Start workers in order; return the first one whose start failed, and why, or None."""
        for worker in workers:
            if worker.leaving or worker.ready:  # another job has started it meanwhile
                continue
            try:
                await worker.life.start(self._core.base_context, partial(self.exited, worker))
            except BaseException as error:  # noqa: BLE001 - user code
                raise_if_cancelled(error)
                report_failure(f"start of worker {worker.name!r}", error)
                return worker, error
            if worker.leaving:  # it was unregistered meanwhile, and stopped before this start had ended
                await worker.life.stop(grace=self._grace)
            else:
                self._started(worker)
        return None

    def _started(self, worker: WorkerAgent) -> None:
        worker.end_start(ready=True)
        worker.count_restart()
        at = self._core.loop.time()
        self._core.bus.emit(WorkerRestarted(at=at, worker_id=worker.name, restarts=worker.restarts))
        if self._down.pop(worker, None) is not None or worker.start_failed or worker.probing:
            self._dispatcher.completion.revive(worker)
        else:
            self._dispatcher.update_slots(worker)
        self._core.registry.notify_progress()


_RETURNED = (
    "; what an async start awaits is the life of its worker, which ends when it returns: have it wait for the end of"
    " what it has opened, or await asyncio.Event().wait(), or make it a plain function that returns nothing"
)
_EXITS = {
    ExitKind.NORMAL: "its life ended by returning",
    ExitKind.SHUTDOWN: "its life was cancelled",
    ExitKind.ABNORMAL: "its life raised",
}
