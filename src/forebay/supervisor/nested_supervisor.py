"""A supervisor as the handler of another: fleets nest, and the load below counts above."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from forebay._hooks import await_hook, call_hook, is_awaitable
from forebay.adapters import Handler
from forebay.events import log
from forebay.retry import Retry
from forebay.task import Task

if TYPE_CHECKING:
    from forebay.supervisor.worker import WorkerAgent


_NO_RETRY = Retry(max_attempts=1)
MIN_STOP_TIME = 10.0  # seconds, at least, that a handler has to stop when its supervisor closes


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

    async def run(self, task: Task) -> Any:
        """Run a task and return its value."""

    async def close(self) -> None:
        """Stop it."""


def as_handler(nested: NestedSupervisor) -> Handler:
    """Return the handler by which a supervisor starts `nested`, reads its load, runs tasks on it, and closes it."""

    async def start() -> None:
        await nested.wait_until_started()  # it may be a worker of another supervisor too
        if not nested.running:
            await nested.start()

    async def call(task: Task) -> Any:
        # A durable task is recorded where it was submitted, and its own policy of retries counts there alone.
        if task.durable or task.retry is not None:
            retry = None if task.retry is None else _NO_RETRY
            task = msgspec.structs.replace(task, durable=False, retry=retry)
        return await nested.run(task)

    return Handler(call=call, nested_supervisor=nested, load=nested.load_of, start=start, stop=nested.close)


def contains(supervisor: object, other: object) -> bool:
    """Return whether `other` is `supervisor` or anywhere below it."""
    workers: Iterable[WorkerAgent] = getattr(supervisor, "workers", {}).values()
    return supervisor is other or any(
        contains(worker.handler.nested_supervisor, other)
        for worker in workers
        if worker.handler.nested_supervisor is not None
    )


async def start_handlers(workers: Mapping[str, WorkerAgent]) -> None:
    """Start the handlers that need it, in order, including those of workers that are registered meanwhile.

    If one cannot be started, those before it are stopped again.
    """
    started: list[WorkerAgent] = []
    try:
        while more := list(workers.values())[len(started) :]:
            for worker in more:
                if worker.handler.start is not None:
                    await worker.handler.start()
                worker.end_start(ready=True)
                started.append(worker)
    except BaseException:
        await stop_handlers(started)
        raise


async def stop_handlers(workers: Iterable[WorkerAgent], *, grace: float = 0.0) -> None:
    """Stop the handlers that need it, in reverse order. If one fails, the others are still stopped.

    Each has `grace` seconds, and ten at least; a supervisor has a bound of its own, and takes as long as it needs.
    """
    for worker in reversed(list(workers)):
        if worker.handler.stop is not None:
            what = f"stop of worker {worker.name!r}"
            stopping = call_hook(what, worker.handler.stop)
            if is_awaitable(stopping):
                limit = math.inf if worker.handler.nested_supervisor is not None else max(grace, MIN_STOP_TIME)
                await _await_stop(what, stopping, limit)


async def _await_stop(what: str, awaitable: Any, limit: float) -> None:
    """Await the end of a handler for at most `limit` seconds, even if it ignores its cancellation."""
    stopping = asyncio.ensure_future(await_hook(what, awaitable))
    try:
        await asyncio.wait((stopping,), timeout=None if limit == math.inf else limit)
    finally:
        if not stopping.done():
            stopping.cancel()
            log.error("%s has not returned, and is not waited for any longer", what)
