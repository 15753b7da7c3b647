"""Dead letters: stored tasks that are not tried again by themselves, for a person to look at."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, error_of, find_result, virtual

from forebay import BackpressureSupervisor, Overloaded, Priority, Task, TaskStatus
from forebay.clock import wall_time
from forebay.errors import InvalidSetting, UnknownTask
from forebay.events import Event, TaskDeadLettered
from forebay.interfaces import PutResult, TaskRecord
from forebay.overflow import EnvelopeDamaged, SqliteTaskStore, encode_task

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spill.db"


def dead_record(task: Task, *, attempts: int, envelope: bytes | None = None) -> TaskRecord:
    return TaskRecord(
        task_id=task.task_id,
        task_type=task.task_type,
        priority=task.priority,
        envelope=encode_task(task, task.payload, bound=1000) if envelope is None else envelope,
        enqueued_at=wall_time(),
        key=task.key,
        attempts=attempts,
    )


async def leave(path: Path, *records: TaskRecord, bound: int = 100_000) -> None:
    """Store records under leases that lapse, as a process does that dies."""
    store = SqliteTaskStore(path, bound=bound)
    await store.open()
    for each in records:
        assert await store.put(each, fence="of the dead", until=wall_time() - 1.0) is PutResult.STORED
    await store.close()


def make_supervisor(path: Path, agent: Any, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=f"sqlite:///{path}", max_attempts=3, **options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"])
    return supervisor


def poison(name: str, **options: Any) -> Task:
    return Task("work", {"secret": name}, task_id=name, **options)


@virtual
async def test_a_task_that_was_started_too_often_is_a_dead_letter(path: Path) -> None:
    agent = Agent()
    await leave(
        path,
        dead_record(poison("a", priority=Priority.HIGH, key="k"), attempts=3),
        dead_record(poison("b"), attempts=2),
    )
    async with make_supervisor(path, agent) as supervisor:
        (letter,) = [letter async for letter in supervisor.dead_letters]
        assert (letter.task_id, letter.task_type, letter.priority, letter.key) == ("a", "work", Priority.HIGH, "k")
        assert letter.attempts == 3
        assert "LeaseLost" in letter.error
        assert letter.submitted_at <= letter.died_at <= wall_time()
        assert "secret" not in repr(letter)
        assert (await supervisor.dead_letters.task("a")).payload == {"secret": "a"}
        assert (await find_result(supervisor, "a")).status is TaskStatus.FAILED
        assert (await find_result(supervisor, "b")).attempts == 3  # its last
    assert agent.started == [{"secret": "b"}]


@virtual
async def test_an_envelope_that_cannot_be_read_is_a_dead_letter_and_kept_as_it_is(path: Path) -> None:
    received: list[Event] = []
    await leave(
        path, dead_record(poison("a"), attempts=0, envelope=b"\xc1 garbage"), dead_record(poison("b"), attempts=0)
    )
    async with make_supervisor(path, Agent(), on_event=received.append) as supervisor:
        assert (await find_result(supervisor, "b")).success
        (letter,) = await supervisor.dead_letters.page()
        assert (letter.task_id, letter.attempts) == ("a", 0)
        assert "EnvelopeDamaged" in letter.error
        assert isinstance(await error_of(supervisor.dead_letters.task("a")), EnvelopeDamaged)
    (died,) = [event for event in received if isinstance(event, TaskDeadLettered)]
    assert (died.task_id, died.task_type, died.attempts, died.error) == ("a", "work", 0, letter.error)


@virtual
async def test_a_requeued_letter_is_tried_again_as_often_as_a_new_task(path: Path) -> None:
    agent = Agent()
    await leave(path, dead_record(poison("a"), attempts=3))
    async with make_supervisor(path, agent) as supervisor:
        assert not (await find_result(supervisor, "a")).success
        await supervisor.dead_letters.requeue("a")
        result = await find_result(supervisor, "a")
        assert (result.status, result.attempts) == (TaskStatus.SUCCEEDED, 1)
        assert await supervisor.dead_letters.page() == ()
    assert agent.started == [{"secret": "a"}]


@virtual
async def test_a_requeued_letter_may_run_in_a_process_that_saw_the_task_die(path: Path) -> None:
    await leave(path, dead_record(poison("a"), attempts=3))
    other = BackpressureSupervisor(overflow=f"sqlite:///{path}")
    async with other, make_supervisor(path, Agent()) as supervisor:
        assert not (await find_result(supervisor, "a")).success
        await other.dead_letters.requeue("a")
        await asyncio.sleep(60.0)
        assert (await find_result(supervisor, "a")).success


@virtual
async def test_a_dropped_letter_is_gone_and_its_key_is_free(path: Path) -> None:
    agent = Agent()
    await leave(path, dead_record(poison("a", key="k"), attempts=3))
    async with make_supervisor(path, agent) as supervisor:
        await supervisor.dead_letters.drop("a")
        assert await supervisor.dead_letters.page() == ()
        assert await supervisor.find("a") is None
        assert await supervisor.run(Task("work", "again", key="k")) == "again"


@virtual
async def test_letters_are_read_in_pages(path: Path) -> None:
    await leave(path, *(dead_record(poison(f"{number:03}"), attempts=3) for number in range(250)))
    async with make_supervisor(path, Agent()) as supervisor:
        first = await supervisor.dead_letters.page(limit=2)
        second = await supervisor.dead_letters.page(limit=2, after=first[-1])
        assert [letter.task_id for letter in (*first, *second)] == ["000", "001", "002", "003"]
        assert len({letter.task_id async for letter in supervisor.dead_letters}) == 250


@pytest.mark.parametrize("limit", [0, -1, 1001, 1.0, True])
@virtual
async def test_a_page_has_a_bound(path: Path, limit: Any) -> None:
    async with make_supervisor(path, Agent()) as supervisor:
        assert isinstance(await error_of(supervisor.dead_letters.page(limit=limit)), InvalidSetting)


@virtual
async def test_a_letter_cannot_be_requeued_into_a_full_overflow(path: Path) -> None:
    await leave(path, dead_record(poison("a"), attempts=3))
    supervisor = BackpressureSupervisor(overflow=f"sqlite:///{path}?bound=1", max_queue_size=0)
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    async with supervisor:
        await supervisor.submit(Task("work", 1))
        await supervisor.submit(Task("work", 2))
        error = await error_of(supervisor.dead_letters.requeue("a"))
        assert isinstance(error, Overloaded)
        assert error.limited_by == "overflow"
        assert len(await supervisor.dead_letters.page()) == 1


@pytest.mark.parametrize("task_id", ["waits", "never was"])
@virtual
async def test_a_task_that_is_not_dead_is_no_letter(path: Path, task_id: str) -> None:
    async with make_supervisor(path, Agent(), max_queue_size=0) as supervisor:
        await supervisor.submit(Task("work", 1))
        await supervisor.submit(Task("work", 2, task_id="waits"))
        for act in (supervisor.dead_letters.task, supervisor.dead_letters.requeue, supervisor.dead_letters.drop):
            assert isinstance(await error_of(act(task_id)), UnknownTask)


@virtual
async def test_without_an_overflow_there_are_no_letters() -> None:
    async with BackpressureSupervisor() as supervisor:
        assert [letter async for letter in supervisor.dead_letters] == []
        assert isinstance(await error_of(supervisor.dead_letters.requeue("a")), UnknownTask)
