"""An overflow that does not answer, for a while or to the end: nobody waits longer than the task may take."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tests.support.task_plane import (
    Agent,
    UncancellableHandler,
    approximately,
    error_of,
    find_result,
    now,
    run_ready,
    virtual,
)

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskStatus, clock
from forebay.errors import StillSpilled, StoreUnavailable
from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskRecord
from forebay.overflow import MemoryTaskStore
from forebay.supervisor.settings import MAX_STORE_SILENCE

pytestmark = pytest.mark.blocks


class SilentStore(MemoryTaskStore):
    """A store that survives the process, as far as a supervisor can tell, and answers once it is told to.

    Args:
        silent: the methods that wait until `answers` is set; the others answer at once.
    """

    durable = True

    def __init__(self, *silent: str) -> None:
        super().__init__(bound=10_000)
        self.silent = silent
        self.answers = asyncio.Event()

    async def _answer(self, method: str) -> None:
        if method in self.silent:
            await self.answers.wait()

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        await self._answer("put")
        return await super().put(record, fence=fence, until=until, now=now)

    async def find_key(self, key: str) -> str | None:
        await self._answer("find_key")
        return await super().find_key(key)

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        await self._answer("find")
        return await super().find(task_id)

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None = None) -> bool:
        await self._answer("finish")
        return await super().finish(task_id, completion, fence=fence)

    async def begin_attempt(self, lease: Lease) -> bool:
        await self._answer("begin_attempt")
        return await super().begin_attempt(lease)

    async def lease(self, *of: Any, **how: Any) -> Sequence[Lease]:
        await self._answer("lease")
        return await super().lease(*of, **how)

    async def release(self, leases: Sequence[Lease]) -> None:
        await self._answer("release")
        await super().release(leases)

    async def conversations(self) -> Mapping[str, int]:
        await self._answer("conversations")
        return await super().conversations()

    async def close(self) -> None:
        await self._answer("close")
        await super().close()

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        await self._answer("depths")
        return await super().depths()


class SilentMemoryStore(SilentStore):
    """A silent store that ends with the process: while draining, what waits there comes back and runs."""

    durable = False


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


@virtual
async def test_a_start_that_is_cancelled_does_not_wait_for_the_overflow_to_close() -> None:
    store = SilentStore("conversations", "close")
    supervisor = make_supervisor(store, Agent())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await supervisor.start()
    assert now() < 1.0 + MAX_STORE_SILENCE + 0.1


# --- draining without a limit ----------------------------------------------------------------------------------------

PATIENCE = 2 * MAX_STORE_SILENCE + 2.0  # seconds from the end of what runs; two of them for handlers to stop


def silence(store: SilentStore, *methods: str) -> None:
    store.silent = methods


async def start_one_worker(store: SilentStore, handler: Any, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=store, zombie_grace=2.0, **options)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], timeout=3600.0)
    await supervisor.start()
    return supervisor


@pytest.mark.parametrize("runs", [0.0, 500.0])
@pytest.mark.parametrize("method", ["put", "begin_attempt", "finish"])
@virtual
async def test_draining_without_a_limit_waits_for_what_runs_and_not_for_a_silent_overflow(
    method: str, runs: float
) -> None:
    store = SilentStore()
    supervisor = await start_one_worker(store, Agent(1.0), max_queue_size=10)
    supervisor.register_worker("other", handler=Agent(runs), task_types=["other"], timeout=3600.0)
    long = await supervisor.submit(Task("other", spill=False))
    silence(store, method)
    tickets = [supervisor.submit_nowait(Task("work")) for _ in range(3)]
    submitting = asyncio.ensure_future(supervisor.submit(Task("work", durable=True, timeout=3600.0)))
    await asyncio.sleep(0.1)
    report = await supervisor.drain()
    assert runs < now() < max(runs, 5.0) + PATIENCE
    assert (await long).success
    assert report.unanswered + report.spilled > 0
    assert all(ticket.done() for ticket in tickets)
    await supervisor.close()
    outcome = await asyncio.gather(submitting, return_exceptions=True)
    assert (type(outcome[0]) is StoreUnavailable) == (method == "put")


@pytest.mark.parametrize("method", ["put", "lease", "depths", "begin_attempt", "finish"])
@pytest.mark.parametrize("thread_id", [None, "c"])
@virtual
async def test_draining_without_a_limit_does_not_wait_for_what_a_silent_overflow_would_give_back(
    method: str, thread_id: str | None
) -> None:
    store = SilentMemoryStore()
    supervisor = await start_one_worker(store, Agent(1.0), max_queue_size=0)
    for _ in range(3):
        await supervisor.submit(Task("work", thread_id=thread_id))
    silence(store, method)
    submitting = [asyncio.ensure_future(supervisor.submit(Task("work", timeout=5.0))) for _ in range(2)]
    await asyncio.sleep(0.1)
    await supervisor.drain()
    assert now() < 10.0 + PATIENCE
    await supervisor.close()
    await asyncio.gather(*submitting, return_exceptions=True)


@virtual
async def test_tasks_that_wait_behind_a_start_that_is_not_recorded_do_not_keep_a_drain_from_ending() -> None:
    store = SilentStore("begin_attempt")
    supervisor = await start_one_worker(store, Agent(1.0))
    first = await supervisor.submit(Task("work", durable=True))
    second = await supervisor.submit(Task("work", spill=False))
    report = await supervisor.drain()
    assert now() < PATIENCE
    assert (report.spilled, report.cancelled, report.orphans) == (1, 1, ())
    assert isinstance(await error_of(first), StillSpilled)
    assert (await second).status is TaskStatus.CANCELLED
    await supervisor.close()


@virtual
async def test_a_slot_whose_task_the_silent_overflow_does_not_end_does_not_keep_a_drain_from_ending() -> None:
    store = SilentStore("finish")
    supervisor = await start_one_worker(store, Agent(1.0))
    supervisor.register_worker("parent", handler=Agent(), task_types=["parent"])

    async def hold_a_slot() -> None:
        async with supervisor.slot("parent"):
            await supervisor.run(Task("work", durable=True))

    holding = asyncio.ensure_future(hold_a_slot())
    await asyncio.sleep(0.1)
    await supervisor.drain()
    assert now() < 2.0 + PATIENCE
    assert await error_of(holding) is not None
    await supervisor.close()


@virtual
async def test_a_slow_overflow_that_answers_is_waited_for() -> None:
    class VerySlowStore(SilentStore):
        async def put(
            self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
        ) -> PutResult:
            await asyncio.sleep(0.9 * MAX_STORE_SILENCE)
            return await super().put(record, fence=fence, until=until, now=now)

        async def finish(self, task_id: str, completion: Completion, *, fence: str | None = None) -> bool:
            await asyncio.sleep(0.9 * MAX_STORE_SILENCE)
            return await super().finish(task_id, completion, fence=fence)

    supervisor = await start_one_worker(VerySlowStore(), Agent(1.0), max_queue_size=10_000, backpressure_threshold=1.0)
    first = await supervisor.submit(Task("work", durable=True))
    tickets = [supervisor.submit_nowait(Task("work")) for _ in range(3_500)]
    report = await supervisor.drain()
    assert now() > 3 * MAX_STORE_SILENCE
    assert (report.finished + report.spilled, report.cancelled, report.unanswered) == (3_501, 0, 0)
    assert (await first).success
    assert isinstance(await error_of(tickets[-1]), StillSpilled)
    await supervisor.close()


@virtual
async def test_a_worker_that_is_failed_for_a_while_is_no_silent_overflow() -> None:
    failing = True

    async def handle(_: Task) -> None:
        if failing:
            raise ValueError

    supervisor = BackpressureSupervisor(overflow="memory://", max_queue_size=2)
    supervisor.register_worker("worker", handler=handle, task_types=["work"], reset_timeout=200.0)
    async with supervisor:
        for _ in range(5):
            await supervisor.submit(Task("work"))
        failing = False
        tickets = [await supervisor.submit(Task("work")) for _ in range(5)]
        report = await supervisor.drain()
        assert (report.cancelled, report.unanswered) == (0, 0)
        assert [(await ticket).status for ticket in tickets] == [TaskStatus.SUCCEEDED] * 5


@pytest.mark.parametrize("limit", [None, 1.0])
@virtual
async def test_a_task_that_is_stored_after_its_ticket_has_ended_does_not_run_again(limit: float | None) -> None:
    store = SilentStore()
    supervisor = await start_one_worker(store, Agent(2.0))
    supervisor.submit_nowait(Task("work"))
    ticket = supervisor.submit_nowait(Task("work"))
    await asyncio.sleep(0.1)
    silence(store, "put")
    report = await supervisor.drain(limit)
    assert (report.cancelled, report.unanswered) == (0 if limit is None else 1, 1)
    assert "it may be run again" in str((await ticket).error)
    store.answers.set()
    await run_ready()
    found = await store.find(ticket.task_id)
    assert found is not None
    assert found[0] is RecordState.DONE
    await supervisor.close()


@virtual
async def test_that_an_overflow_is_waited_for_no_longer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = await start_one_worker(SilentStore("finish"), Agent(1.0))
    await supervisor.submit(Task("work", durable=True))
    await supervisor.drain()
    assert "has not answered about 1 tasks for 10 s" in caplog.text
    await supervisor.close()


@virtual
async def test_a_task_that_is_stored_while_draining_ends_before_its_lease_is_returned() -> None:
    store = SilentStore("put", "release")
    supervisor = await start_one_worker(store, Agent(1.0))
    task = Task("work", durable=True)
    submitting = asyncio.ensure_future(supervisor.submit(task))
    await asyncio.sleep(0.1)
    ticket = supervisor.ticket(task.task_id)
    draining = asyncio.ensure_future(supervisor.drain())
    await asyncio.sleep(1.0)
    store.answers, answers = asyncio.Event(), store.answers
    answers.set()  # of the put, and not of the release
    report = await draining
    assert now() < 3.2  # with two seconds for what is under way
    assert report.spilled == 1
    assert isinstance(await error_of(ticket), StillSpilled)
    await supervisor.close()
    await asyncio.gather(submitting, return_exceptions=True)


@pytest.mark.parametrize("turns", range(5))
@virtual
async def test_a_task_that_is_stored_as_draining_begins_does_not_wait_for_the_close(turns: int) -> None:
    supervisor = await start_one_worker(SilentStore(), Agent(60.0), max_queue_size=0)
    await supervisor.submit(Task("work", spill=False))
    submitting = asyncio.ensure_future(supervisor.submit(Task("work")))
    for _ in range(1 + turns):
        await asyncio.sleep(0)
    await supervisor.drain(1.0)
    async with asyncio.timeout(1.0):
        assert isinstance(await error_of(await submitting), StillSpilled)
    await supervisor.close()


@virtual
async def test_draining_waits_for_the_end_of_a_cancelled_task_that_waits_in_the_overflow() -> None:
    store = SilentStore()
    supervisor = await start_one_worker(store, Agent(60.0), max_queue_size=0)
    await supervisor.submit(Task("work", spill=False))
    cancelled = [await supervisor.submit(Task("work")) for _ in range(2)]
    silence(store, "finish")
    for ticket in cancelled:
        ticket.cancel()
    report = await supervisor.drain(1.0)
    assert report.unanswered == 2
    store.answers.set()
    assert [(await ticket).status for ticket in cancelled] == [TaskStatus.CANCELLED] * 2
    await supervisor.close()


class LookupsInTurn(MemoryTaskStore):
    """A store that survives the process, as far as a supervisor can tell, and answers each lookup once it may."""

    durable = True

    def __init__(self) -> None:
        super().__init__(bound=10)
        self.lookups: list[asyncio.Event] = []

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        self.lookups.append(asyncio.Event())
        await self.lookups[-1].wait()
        return await super().find(task_id)


@virtual
async def test_finding_a_task_that_became_known_meanwhile_tells_its_ticket_how_it_has_ended() -> None:
    store = LookupsInTurn()
    async with BackpressureSupervisor(overflow=store) as supervisor:
        record = TaskRecord(
            task_id="a", task_type="elsewhere", priority=Priority.NORMAL, envelope=b"", enqueued_at=clock.wall_time()
        )
        await store.put(record, fence="theirs", until=clock.wall_time() + 60.0)
        finding = [asyncio.ensure_future(supervisor.find("a")) for _ in range(2)]
        await run_ready()
        store.lookups[0].set()
        ticket = await finding[0]
        assert ticket is not None
        assert ticket.status is TaskStatus.SPILLED
        done = Completion(status=TaskStatus.SUCCEEDED.value, finished_at=clock.wall_time())
        await store.finish("a", done, fence="theirs")
        store.lookups[1].set()
        assert await finding[1] is ticket
        assert ticket.done()
        assert (await ticket).success


@virtual
async def test_a_handler_that_does_not_stop_has_one_grace_though_its_end_is_not_stored() -> None:
    store = SilentMemoryStore()
    supervisor = await start_one_worker(store, UncancellableHandler(100.0), max_queue_size=0)
    await supervisor.submit(Task("work", spill=False))
    stored = await supervisor.submit(Task("work"))
    await asyncio.sleep(101.0)
    assert stored.status is TaskStatus.RUNNING
    silence(store, "finish")
    origin = now()
    report = await supervisor.drain(1.0)
    assert now() - origin == approximately(1.0 + 2.0)
    assert report.orphans == (stored.task_id,)
    await supervisor.close()
    await asyncio.sleep(100.0)
