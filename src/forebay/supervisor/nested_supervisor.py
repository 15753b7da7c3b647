"""A supervisor as the handler of another: fleets nest, and pressure climbs the tree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from forebay.adapters import Handler
from forebay.events import log
from forebay.task import Task

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.supervisor import BackpressureSupervisor
    from forebay.supervisor.worker import WorkerAgent


def as_handler(inner: BackpressureSupervisor) -> Handler:
    """The handler by which a parent starts `inner`, feels its load, runs tasks on it, and closes it."""
    starting: asyncio.Task[None] | None = None

    async def start() -> None:
        nonlocal starting
        if not inner.started:
            starting = asyncio.ensure_future(inner.start())
            await starting

    async def call(task: Task) -> Any:
        if starting is not None and not starting.done():  # registered with a parent that runs already
            await asyncio.shield(starting)
        # What is recorded, is recorded where it was submitted.
        return await inner.run(msgspec.structs.replace(task, durable=False) if task.durable else task)

    return Handler(call=call, nested_supervisor=inner, load=inner.load_of, start=start, stop=inner.close)


def load_of_nested(inner: BackpressureSupervisor, dispatcher: Dispatcher | None, task_type: str) -> float:
    """The load on the path of a task of `task_type` in `inner`, whose house that is, as its gate reads it."""
    if not any(task_type in worker.task_types for worker in inner.workers.values()):
        return 1.0  # nobody there serves it
    pool = None if dispatcher is None else dispatcher.pools.get(task_type)
    return 0.0 if dispatcher is None or pool is None else dispatcher.load.on_path(pool)[0]  # None: it is about to start


def contains(supervisor: object, other: object) -> bool:
    """Whether `house` is `other`, or holds it anywhere below."""
    workers: Iterable[WorkerAgent] = getattr(supervisor, "workers", {}).values()
    return supervisor is other or any(
        contains(worker.handler.nested_supervisor, other)
        for worker in workers
        if worker.handler.nested_supervisor is not None
    )


async def start_handlers(workers: Iterable[WorkerAgent]) -> None:
    """Start what the workers hold, in order. If one cannot start, those before it are stopped again."""
    started: list[WorkerAgent] = []
    try:
        for worker in workers:
            if worker.handler.start is not None:
                await worker.handler.start()
                started.append(worker)
    except BaseException:
        await stop_handlers(started)
        raise


async def stop_handlers(workers: Iterable[WorkerAgent]) -> None:
    """Stop what the workers hold, in reverse; one that fails to keeps no other from it."""
    for worker in reversed(list(workers)):
        if worker.handler.stop is not None:
            try:
                await worker.handler.stop()
            except Exception:  # noqa: BLE001 - logged; the others are to be stopped all the same
                log.exception("what worker %r holds could not be stopped", worker.name)
