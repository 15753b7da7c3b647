"""A supervisor as the handler of another: fleets nest, and pressure climbs the tree."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import msgspec

from forebay.adapters import Handler
from forebay.task import Task

if TYPE_CHECKING:
    from forebay.supervisor.supervisor import BackpressureSupervisor


def as_worker(inner: BackpressureSupervisor) -> Handler:
    """The handler by which a parent starts `inner`, feels its load, runs tasks on it, and closes it."""

    def call(task: Task) -> Awaitable[Any]:
        # What is recorded, is recorded where it was submitted.
        return inner.run(msgspec.structs.replace(task, durable=False) if task.durable else task)

    async def start() -> None:
        if not inner.started:
            await inner.start()

    return Handler(call=call, load=inner.load_of, start=start, stop=inner.close)
