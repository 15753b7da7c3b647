"""A supervisor as the handler of another: fleets nest, and the load below counts above."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from forebay.adapters import Handler
from forebay.context import running_task
from forebay.errors import TaskFailed, TaskTimedOut
from forebay.retry import Retry
from forebay.task import ENQUEUE, Task

if TYPE_CHECKING:
    from forebay.supervisor.tree.worker_life import Exit
    from forebay.supervisor.worker import WorkerAgent


_NO_RETRY = Retry(max_attempts=1)


class NestedSupervisor(Protocol):
    """The supervisor below, as far as the one above needs it."""

    @property
    def running(self) -> bool:
        """True from the call of `start` to that of `close`, or to the end of its event loop."""

    def load_of(self, task_type: str) -> float:
        """Return the load on the path of a task."""

    def uses(self, dispatcher: object) -> bool:
        """Return whether `dispatcher` is its own, or that of a supervisor below it."""

    async def start(self) -> None:
        """Start it."""

    async def wait_until_started(self) -> None:
        """Wait for a start in progress."""

    async def start_workers(self) -> None:
        """Start its workers again, if they were halted."""

    async def halt(self) -> None:
        """Stop its workers, to be started again."""

    def watch(self) -> asyncio.Future[None]:
        """Return a future that is cancelled when it gives up."""

    def fail_workers(self, reason: str) -> None:
        """Make its workers, which are halted, FAILED."""

    async def run(self, task: Task) -> Any:
        """Run a task and return its value."""

    def when_stopped(self, task_id: str) -> asyncio.Future[None] | None:
        """Return a future that is done once the handler of a task that has ended has stopped; None if it has."""

    async def close(self) -> None:
        """Stop it."""


class RunAbove(Protocol):
    """The run of a task that is passed on to the supervisor below."""

    @property
    def worker(self) -> WorkerAgent:
        """The worker that the supervisor below is."""

    def fail_early(self, cause: BaseException) -> None:
        """End its task now: it has failed, and its handler waits until what it has begun has stopped."""


def as_handler(nested: NestedSupervisor) -> Handler:
    """Return the handler by which a supervisor starts `nested`, reads its load, runs tasks on it, and closes it."""

    async def start() -> None:
        await nested.wait_until_started()  # it may be a worker of another supervisor too
        if not nested.running:
            await nested.start()
        await nested.start_workers()

    async def call(task: Task) -> Any:
        # A durable task is recorded where it was submitted, and has waited there for its time. Its own policy of
        # retries counts there alone.
        if task.durable or task.retry is not None or task.not_before is not None or task.on_busy != ENQUEUE:
            retry = None if task.retry is None else _NO_RETRY
            task = msgspec.structs.replace(task, durable=False, retry=retry, not_before=None, on_busy=ENQUEUE)
        try:
            return await nested.run(task)
        except (Exception, asyncio.CancelledError) as error:
            # Until the handler below has stopped, no other attempt at the task may begin, nor the next one of its
            # conversation. Its caller does not wait for that.
            if (stopped := nested.when_stopped(task.task_id)) is not None:
                run = cast("RunAbove", running_task())
                if isinstance(error, TaskFailed | TaskTimedOut) and run.worker.handler.nested_supervisor is nested:
                    run.fail_early(error)
                await asyncio.wait((stopped,))
            raise

    return Handler(call=call, nested_supervisor=nested, load=nested.load_of, start=start, stop=nested.close)


def contains(supervisor: object, other: object) -> bool:
    """Return whether `other` is `supervisor` or anywhere below it."""
    workers: Iterable[WorkerAgent] = getattr(supervisor, "workers", {}).values()
    return supervisor is other or any(
        contains(worker.handler.nested_supervisor, other)
        for worker in workers
        if worker.handler.nested_supervisor is not None
    )


async def start_handlers(
    workers: Mapping[str, WorkerAgent], context: Context, on_exit: Callable[[WorkerAgent, Exit], None]
) -> None:
    """Start the workers that need it, in order, including those that are registered meanwhile.

    If one cannot be started, those before it are stopped again.
    """
    started: list[WorkerAgent] = []
    try:
        while more := list(workers.values())[len(started) :]:
            for worker in more:
                await worker.life.start(context, partial(on_exit, worker))
                worker.end_start(ready=True)
                started.append(worker)
    except BaseException:
        await stop_handlers(started)
        raise


async def stop_handlers(workers: Iterable[WorkerAgent], *, grace: float = 0.0) -> None:
    """Stop the workers that need it, in reverse order. If one fails, the others are still stopped.

    Each handler has `grace` seconds, and ten at least; a supervisor has a bound of its own, and takes as long as it
    needs. If this is cancelled, one stop goes on in the background, and the others are still made.
    """
    cancelled: asyncio.CancelledError | None = None
    for worker in reversed(list(workers)):
        try:
            await worker.life.stop(grace=grace)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
