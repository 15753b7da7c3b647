"""How often a saga is written to its log: each write is a commit that the saga waits for."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.task_plane import run_ready, virtual

from forebay import BackpressureSupervisor, Task
from forebay.saga import MemorySagaLog, Saga, SagaRun, saga
from forebay.saga.records import DoneEntry, Entry, FinishedEntry, LogWrite, StartedEntry, decode_entries


class WriteLog(MemorySagaLog):
    """A log in memory that takes its time, and keeps what it is given together.

    Attributes:
        writes: the entries of each write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[list[type[Entry]]] = []

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        await asyncio.sleep(0.01)
        self.writes.append([type(entry) for entry in decode_entries(saga_id, write.entries)])
        return await super().append(saga_id, write, fence=fence, now=now)


async def answer(value: Any) -> Any:
    return value


def supervisor_of(log: MemorySagaLog, definition: Saga) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None)
    supervisor.register_worker("worker", handler=definition, task_types=["work"])
    return supervisor


@virtual
async def test_the_end_of_a_step_is_written_with_the_start_of_the_next() -> None:
    @saga("three steps")
    async def definition(run: SagaRun, payload: Any) -> Any:
        first = await run.step("first", answer, payload)
        second = await run.step("second", answer, first)
        return await run.step("third", answer, second)

    async with supervisor_of(log := WriteLog(), definition) as supervisor:
        assert await supervisor.run(Task("work", 1)) == 1
    assert log.writes == [
        [StartedEntry],
        [DoneEntry, StartedEntry],
        [DoneEntry, StartedEntry],
        [DoneEntry, FinishedEntry],
    ]


@virtual
async def test_so_it_is_for_branches_side_by_side() -> None:
    @saga("branches")
    async def definition(run: SagaRun, payload: Any) -> Any:
        await asyncio.gather(*(run.step(f"branch {n}", answer, payload) for n in range(3)))
        return await run.step("last", answer, payload)

    async with supervisor_of(log := WriteLog(), definition) as supervisor:
        await supervisor.run(Task("work", 1))
    assert log.writes[-2:] == [[DoneEntry, DoneEntry, DoneEntry, StartedEntry], [DoneEntry, FinishedEntry]]


@virtual
async def test_the_end_of_a_step_is_written_soon_if_nothing_follows() -> None:
    goes_on = asyncio.Event()

    @saga("one step")
    async def definition(run: SagaRun, payload: Any) -> None:
        await run.step("only", answer, payload)
        await goes_on.wait()

    async with supervisor_of(log := WriteLog(), definition) as supervisor:
        ticket = await supervisor.submit(Task("work", 1))
        await asyncio.sleep(0.03)
        await run_ready()
        assert log.writes == [[StartedEntry], [DoneEntry]]
        goes_on.set()
        await ticket
    assert log.writes[-1] == [FinishedEntry]
