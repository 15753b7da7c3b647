"""Dead letters: stored tasks that are not tried again by themselves, for a person to look at."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, error_of, find_result, find_ticket, virtual

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task, TaskStatus, Verdict
from forebay.clock import wall_time
from forebay.errors import DuplicateKey, InvalidSetting, StoreUnavailable, TaskFailed, UnknownTask
from forebay.events import Event, TaskDeadLettered
from forebay.interfaces import Completion, Lease, PutResult, TaskRecord
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


# --- tasks that have failed for good ----------------------------------------------------------------------------------


class Failing:
    """A handler that fails as often as it is told to, and then succeeds.

    Args:
        times: how often; it takes 5 s for that if it is to time out.
    """

    def __init__(self, times: int, *, slow: bool = False) -> None:
        self.left = times
        self.slow = slow
        self.runs = 0

    async def __call__(self, task: Task) -> str:
        self.runs += 1
        self.left -= 1
        if self.left < 0:
            return "done"
        await asyncio.sleep(5.0 if self.slow else 0.1)
        raise ValueError(task.payload["secret"])


@pytest.mark.parametrize("overflow", ["sqlite:///{path}", "memory://"])
@pytest.mark.parametrize("status", [TaskStatus.FAILED, TaskStatus.TIMED_OUT])
@virtual
async def test_a_stored_task_that_has_failed_for_good_is_a_dead_letter(
    overflow: str, status: TaskStatus, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[Event] = []
    slow = status is TaskStatus.TIMED_OUT
    supervisor = BackpressureSupervisor(overflow=overflow.format(path=path), max_queue_size=0, on_event=received.append)
    supervisor.register_worker("worker", handler=Failing(99, slow=slow), task_types=["work"], timeout=1.0)
    async with supervisor:
        plain = supervisor.submit_nowait(poison("plain"))
        spilled = await supervisor.submit(poison("spilled", key="k"))
        assert spilled.verdict is Verdict.SPILLED
        assert (await plain).status is (result := await spilled).status is status
        (letter,) = await supervisor.dead_letters.page()
        assert (letter.task_id, letter.key, letter.attempts) == ("spilled", "k", 1)
        assert ("timeout" if slow else "ValueError: spilled") in letter.error
        assert letter.error == result.error
        assert (await supervisor.dead_letters.task("spilled")).payload == {"secret": "spilled"}
        again = await find_result(supervisor, "spilled")
        assert (again.status, again.error, again.worker_id) == (status, result.error, "worker")
    (died,) = [event for event in received if isinstance(event, TaskDeadLettered)]
    assert (died.task_id, died.attempts, died.error) == ("spilled", 1, letter.error)
    (logged,) = [entry.getMessage() for entry in caplog.records if "dead letter" in entry.getMessage()]
    assert "ValueError: " not in logged


@virtual
async def test_a_task_that_is_cancelled_or_expires_is_no_letter(path: Path) -> None:
    async with make_supervisor(path, Agent(5.0)) as supervisor:
        runs = await supervisor.submit(poison("runs", durable=True))
        waits = await supervisor.submit(poison("waits", durable=True))
        late = await supervisor.submit(poison("late", durable=True, deadline=Deadline.within(6.0)))
        await asyncio.sleep(1.0)
        runs.cancel()
        waits.cancel()
        assert [(await ticket).status for ticket in (runs, waits)] == [TaskStatus.CANCELLED] * 2
        assert (await late).status in (TaskStatus.SUCCEEDED, TaskStatus.EXPIRED)
        assert await supervisor.dead_letters.page() == ()


@virtual
async def test_a_requeued_task_that_failed_here_runs_again_here(path: Path) -> None:
    handler = Failing(2)
    async with make_supervisor(path, handler) as supervisor:
        for attempt in range(2):
            ticket = await (find_ticket(supervisor, "a") if attempt else supervisor.submit(poison("a", durable=True)))
            assert (await ticket).status is TaskStatus.FAILED
            await supervisor.dead_letters.requeue("a")
        result = await find_result(supervisor, "a")
        assert (result.status, result.attempts, result.result) == (TaskStatus.SUCCEEDED, 1, "done")
        assert await supervisor.dead_letters.page() == ()
    assert handler.runs == 3


@virtual
async def test_a_process_that_waits_for_a_task_that_fails_elsewhere_gets_its_end(path: Path) -> None:
    async with make_supervisor(path, Agent(20.0), max_queue_size=0) as first:
        await first.submit(Task("work", "runs", spill=False))
        waits = await first.submit(poison("a"))
        async with make_supervisor(path, Failing(1)):
            error = await error_of(waits.value())
    assert isinstance(error, TaskFailed)
    assert "ValueError: a" in str(error)


@virtual
async def test_the_key_of_a_task_that_has_failed_may_be_used_again(path: Path) -> None:
    async with make_supervisor(path, Failing(1)) as supervisor:
        assert not (await (await supervisor.submit(poison("first", key="k", durable=True)))).success
    async with make_supervisor(path, Failing(0)) as supervisor:
        second = await supervisor.submit(poison("second", key="k", durable=True))
        assert second.task_id == "second"
        assert await second.value() == "done"
        third = await supervisor.submit(poison("third", key="k", durable=True))
        assert third.task_id == "second"
        error = await error_of(supervisor.dead_letters.requeue("first"))
        assert isinstance(error, DuplicateKey)
        assert "first" in str(error)
        assert [letter.task_id for letter in await supervisor.dead_letters.page()] == ["first"]


@virtual
async def test_the_same_task_submitted_again_by_its_key_takes_the_place_of_its_letter(path: Path) -> None:
    task = poison("a", key="k", durable=True)
    async with make_supervisor(path, Failing(1)) as supervisor:
        assert (await (await supervisor.submit(task))).status is TaskStatus.FAILED
    async with make_supervisor(path, Failing(0)) as supervisor:
        assert await (await supervisor.submit(task)).value() == "done"
        assert await supervisor.dead_letters.page() == ()
        without_key = poison("b", durable=True)
        assert await (await supervisor.submit(without_key)).value() == "done"


class FailingStore(SqliteTaskStore):
    """A store that cannot store the failure of a task at first."""

    fails = 1

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        if self.fails:
            self.fails -= 1
            raise StoreUnavailable(where="here", why="it failed", advice="Wait.")
        return await super().mark_dead(lease, completion)


@virtual
async def test_a_failure_that_could_not_be_stored_is_stored_later_and_the_task_not_run_again(path: Path) -> None:
    handler = Failing(99)
    supervisor = BackpressureSupervisor(overflow=FailingStore(path), lease=3.0)
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    async with supervisor:
        ticket = await supervisor.submit(poison("a", durable=True))
        assert (await ticket).status is TaskStatus.FAILED
        assert await supervisor.dead_letters.page() == ()
        await asyncio.sleep(10.0)
        assert [letter.task_id for letter in await supervisor.dead_letters.page()] == ["a"]
    assert handler.runs == 1


@pytest.mark.parametrize("retention", [60.0, 3600.0])
@virtual
async def test_results_are_kept_for_as_long_as_the_setting_says(path: Path, retention: float) -> None:
    async with make_supervisor(path, Agent(), result_retention=retention, keep_results=0) as supervisor:
        ticket = await supervisor.submit(poison("a", key="k", durable=True))
        assert (await ticket).success
        del ticket
        await asyncio.sleep(retention - 1.0)
        assert (await find_result(supervisor, "a")).success
        await asyncio.sleep(15.0)
        assert await supervisor.find("a") is None


@pytest.mark.parametrize("retention", [0.0, -1.0, float("inf"), None, "day"])
def test_a_retention_is_a_positive_number_of_seconds(retention: Any) -> None:
    with pytest.raises(InvalidSetting, match="result_retention"):
        BackpressureSupervisor(result_retention=retention)


# --- letters ----------------------------------------------------------------------------------------------------------


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
