"""Text that a store may not be able to hold: surrogates, NULs and error texts of any length."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, error_of, find_result, virtual

from forebay import BackpressureSupervisor, Task, TaskStatus
from forebay.errors import InvalidSetting, NotSerializable, StoreUnavailable, UnknownTask
from forebay.interfaces import Completion, RecordState, TaskRecord
from forebay.overflow import MemoryTaskStore

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

HALF = "half a pair: \udc80"
OTHERS = ["\0", "a\0b", "\ufffe\uffff", "\U0001f600", "\u202e"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db?fsync=no"


def make_supervisor(url: str, handler: object) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=url)
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    return supervisor


class Unspeakable(Exception):
    """An exception whose text is a string of a kind of its own."""

    def __str__(self) -> str:
        class Text(str):
            __slots__ = ()

            def __format__(self, spec: str) -> str:
                raise ValueError(spec)

        return Text("text")


@pytest.mark.parametrize("error", [ValueError(HALF), ValueError("a\0b"), ValueError("x" * 5_000_000), Unspeakable()])
@virtual
async def test_an_error_of_any_text_is_stored_and_its_task_not_run_again(error: Exception, url: str) -> None:
    agent = Agent(0.1, error=error)
    async with make_supervisor(url, agent) as supervisor:
        ticket = await supervisor.submit(Task("work", durable=True))
        ended = await ticket
        await asyncio.sleep(60.0)  # two leases
    async with make_supervisor(url, agent) as supervisor:
        known = await find_result(supervisor, ticket.task_id)
        await asyncio.sleep(60.0)
        letters = [letter async for letter in supervisor.dead_letters]
    assert [(letter.task_id, letter.attempts, letter.error) for letter in letters] == [(ended.task_id, 1, ended.error)]
    assert len(agent.started) == 1
    assert known.status is ended.status is TaskStatus.FAILED
    assert known.error == ended.error
    assert ended.error is not None
    assert len(ended.error) < 20_000
    assert ended.error.startswith(f"{type(error).__name__}: ")
    ended.error.encode()


@virtual
async def test_a_reason_for_cancelling_may_be_any_text(url: str) -> None:
    async with make_supervisor(url, Agent(60.0)) as supervisor:
        ticket = await supervisor.submit(Task("work", durable=True))
        ticket.cancel(HALF)
        assert (await ticket).status is TaskStatus.CANCELLED
    async with make_supervisor(url, Agent()) as supervisor:
        assert (await find_result(supervisor, ticket.task_id)).error == "half a pair: \\udc80"


@pytest.mark.parametrize("text", OTHERS)
@virtual
async def test_any_other_text_is_stored_as_it_is(text: str, url: str) -> None:
    async with make_supervisor(url, Agent()) as supervisor:
        task = Task("work", text, task_id=f"id{text}", key=f"key{text}", tenant=text, thread_id=text, durable=True)
        ticket = await supervisor.submit(task)
        other = await supervisor.submit(Task("work", key="key", task_id="id", durable=True))
        assert (await ticket).result == text
        await other
    async with make_supervisor(url, Agent()) as supervisor:
        assert (await find_result(supervisor, f"id{text}")).result == text
        assert (await (await supervisor.submit(Task("work", key=f"key{text}")))).task_id == f"id{text}"
        assert (await (await supervisor.submit(Task("work", key="key")))).task_id == "id"


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("field", ["task_id", "key", "tenant", "thread_id", "payload"])
@virtual
async def test_half_a_surrogate_pair_in_a_task_is_an_error_that_names_its_place(
    field: str, url: str, *, durable: bool
) -> None:
    async with make_supervisor(url, Agent()) as supervisor:
        fields: dict[str, Any] = {field: HALF}
        with pytest.raises(NotSerializable, match=field):
            await supervisor.submit(Task("work", durable=durable, **fields))
        good = await supervisor.submit(Task("work", "good", durable=durable))
        assert (await good).result == "good"


@virtual
async def test_a_task_that_is_never_stored_may_have_any_text(url: str) -> None:
    async with make_supervisor(url, Agent()) as supervisor:
        task = Task("work", HALF, task_id=HALF, key=HALF, tenant=HALF, thread_id=HALF, spill=False)
        assert (await (await supervisor.submit(task))).result == HALF


@virtual
async def test_an_id_that_cannot_be_stored_is_unknown(url: str) -> None:
    async with make_supervisor(url, Agent()) as supervisor:
        async with asyncio.timeout(10.0):
            assert await supervisor.find(HALF) is None
            assert await supervisor.find(key=HALF) is None
            assert isinstance(await error_of(supervisor.dead_letters.task(HALF)), UnknownTask)
            assert isinstance(await error_of(supervisor.dead_letters.requeue(HALF)), UnknownTask)
            assert isinstance(await error_of(supervisor.dead_letters.drop(HALF)), UnknownTask)


def test_a_worker_or_a_task_type_that_could_not_be_stored_is_an_error() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match="valid Unicode"):
        supervisor.register_worker(HALF, handler=Agent(), task_types=["work"])
    with pytest.raises(InvalidSetting, match="valid Unicode"):
        supervisor.register_worker("worker", handler=Agent(), task_types=[HALF])


class FaultyStore(MemoryTaskStore):
    """A store that raises what no store should raise."""

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        raise ZeroDivisionError(task_id)


@virtual
async def test_whatever_the_store_raises_when_it_is_asked_is_one_error() -> None:
    supervisor = BackpressureSupervisor(overflow=FaultyStore())
    async with supervisor, asyncio.timeout(10.0):
        assert isinstance(await error_of(supervisor.find("a")), StoreUnavailable)
