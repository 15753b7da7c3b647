"""An overflow that does not answer, for a while or to the end: nobody waits longer than the task may take."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, error_of, find_result, now, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Task, TaskStatus
from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, PutResult, RecordState, TaskRecord
from forebay.overflow import MemoryTaskStore

pytestmark = pytest.mark.blocks


class SilentStore(MemoryTaskStore):
    """A store that survives the process, as far as a supervisor can tell, and answers once it is told to.

    Args:
        silent: the methods that wait until `answers` is set; the others answer at once.
    """

    durable = True

    def __init__(self, *silent: str) -> None:
        super().__init__(bound=1000)
        self._silent = silent
        self.answers = asyncio.Event()

    async def _answer(self, method: str) -> None:
        if method in self._silent:
            await self.answers.wait()

    async def put(self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0) -> PutResult:
        await self._answer("put")
        return await super().put(record, fence=fence, until=until)

    async def find_key(self, key: str) -> str | None:
        await self._answer("find_key")
        return await super().find_key(key)

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        await self._answer("find")
        return await super().find(task_id)

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None = None) -> bool:
        await self._answer("finish")
        return await super().finish(task_id, completion, fence=fence)


def make_supervisor(store: SilentStore, agent: Agent, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=store, zombie_grace=2.0, **options)
    supervisor.register_worker("quick", handler=agent, task_types=["work"], timeout=5.0)
    supervisor.register_worker("slow", handler=agent, task_types=["work"], timeout=30.0)
    return supervisor


@pytest.mark.parametrize(
    ("method", "task", "seconds"),
    [
        ("put", {"durable": True}, 30.0),  # the longest timeout of a worker
        ("put", {"durable": True, "timeout": 3.0}, 3.0),
        ("put", {"durable": True, "deadline": 2.0}, 2.0),
        ("put", {"durable": True, "key": "k", "timeout": 3.0}, 3.0),
        ("find_key", {"key": "k", "timeout": 3.0}, 3.0),
        ("find_key", {"key": "k", "deadline": 2.0}, 2.0),
        ("put", {"timeout": 3.0}, 3.0),  # it is spilled
    ],
    ids=str,
)
@virtual
async def test_nobody_waits_for_the_overflow_for_longer_than_the_task_may_take(
    method: str, task: dict[str, Any], seconds: float
) -> None:
    agent = Agent()
    supervisor = make_supervisor(SilentStore(method), agent, **({"max_queue_size": 0} if len(task) == 1 else {}))
    if "deadline" in task:
        task = {**task, "deadline": Deadline.within(task["deadline"])}
    async with supervisor:
        running = [await supervisor.submit(Task("work", 60.0)) for _ in range(2 if task == {"timeout": 3.0} else 0)]
        origin = now()
        error = await error_of(supervisor.submit(Task("work", **task)))
        assert isinstance(error, StoreUnavailable)
        assert "has not answered about task" in str(error)
        assert now() - origin == approximately(seconds)
        assert len(agent.started) == len(running)
        await supervisor.close()


@virtual
async def test_a_task_whose_id_the_overflow_still_looks_for_runs() -> None:
    supervisor = make_supervisor(SilentStore("find"), Agent())
    async with supervisor:
        asked = asyncio.ensure_future(supervisor.find("mine"))
        await run_ready()
        assert await supervisor.run(Task("work", 1.0, task_id="mine", timeout=3.0)) == 1.0
        assert not asked.done()
        await supervisor.close()
    assert isinstance(await error_of(asked), StoreUnavailable)


@virtual
async def test_the_end_of_whoever_looks_for_a_task_ends_the_question() -> None:
    async with make_supervisor(SilentStore("find"), Agent()) as supervisor:
        for _ in range(100):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await supervisor.find("mine")
        origin = now()
        await supervisor.drain()
        assert now() == origin


@virtual
async def test_callers_that_join_by_the_key_wait_no_longer_than_their_own_task_may_take() -> None:
    supervisor = make_supervisor(SilentStore("put"), Agent())
    async with supervisor:
        first = asyncio.ensure_future(supervisor.submit(Task("work", durable=True, key="k", timeout=60.0)))
        await asyncio.sleep(1.0)
        origin = now()
        assert isinstance(await error_of(supervisor.submit(Task("work", key="k", timeout=3.0))), StoreUnavailable)
        assert now() - origin == approximately(3.0)
        assert not first.done()
        await supervisor.close()
        assert isinstance(await error_of(first), StoreUnavailable)


@virtual
async def test_a_task_that_is_stored_when_its_submitter_has_given_up_is_cancelled() -> None:
    store, agent = SilentStore("put"), Agent()
    async with make_supervisor(store, agent) as supervisor:
        task = Task("work", durable=True, timeout=3.0)
        assert isinstance(await error_of(supervisor.submit(task)), StoreUnavailable)
        store.answers.set()
        await run_ready()
        result = await find_result(supervisor, task.task_id)
        assert result.status is TaskStatus.CANCELLED
        assert agent.started == []


@virtual
async def test_a_submitter_that_is_cancelled_does_not_wait_for_the_overflow() -> None:
    supervisor = make_supervisor(SilentStore("put"), Agent())
    async with supervisor:
        submitting = asyncio.ensure_future(supervisor.submit(Task("work", durable=True)))
        await asyncio.sleep(1.0)
        origin = now()
        submitting.cancel()
        assert isinstance(await error_of(submitting), asyncio.CancelledError)
        assert now() - origin == approximately(0.0)
        await supervisor.close()


@virtual
async def test_draining_reports_the_tasks_whose_end_the_overflow_has_not_stored() -> None:
    supervisor = make_supervisor(SilentStore("finish"), Agent())
    async with supervisor:
        ended = [await supervisor.submit(Task("work", 1.0, durable=True)) for _ in range(2)]
        await asyncio.sleep(10.0)
        plain = await supervisor.submit(Task("work", 1.0))
        report = await supervisor.drain(timeout=5.0)
        assert not any(ticket.done() for ticket in ended)
        assert plain.done()
        assert (report.finished, report.spilled, report.cancelled, report.unanswered) == (1, 0, 0, 2)
        await supervisor.close()


@virtual
async def test_draining_reports_the_tasks_that_the_overflow_has_not_decided() -> None:
    supervisor = make_supervisor(SilentStore("put"), Agent())
    async with supervisor:
        submitting = asyncio.ensure_future(supervisor.submit(Task("work", durable=True)))
        await asyncio.sleep(1.0)
        report = await supervisor.drain(timeout=5.0)
        assert (report.finished, report.spilled, report.cancelled, report.unanswered) == (0, 0, 0, 1)
        await supervisor.close()
        assert isinstance(await error_of(submitting), StoreUnavailable)
