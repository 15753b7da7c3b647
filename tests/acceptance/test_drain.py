"""Draining with an overflow: everything within the limit, in group commits, and counted for what it is."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, UncancellableHandler, approximately, error_of, flood, now, virtual

from forebay import BackpressureSupervisor, Task, TaskStatus, Ticket, Verdict
from forebay.errors import StillSpilled, StoreUnavailable
from forebay.interfaces import Lease, PutResult, RecordState, TaskRecord
from forebay.overflow import MemoryTaskStore, decode_task
from forebay.supervisor.drain import Drain

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

FSYNC = 0.03  # seconds


class SlowStore(MemoryTaskStore):
    """A store that survives the process, as far as a supervisor can tell; writes that are made at once take one fsync.

    Args:
        seconds: what a write takes.
        fails_until: loop time until which writes fail.
    """

    durable = True

    def __init__(self, seconds: float = FSYNC, *, fails_until: float = 0.0, bound: int = 100_000) -> None:
        super().__init__(bound=bound)
        self.seconds = seconds
        self.fails_until = fails_until

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        await asyncio.sleep(self.seconds)
        if asyncio.get_running_loop().time() < self.fails_until:
            raise StoreUnavailable(where="disk", why="it is full", advice="None.")
        return await super().put(record, fence=fence, until=until, now=now)


def make_supervisor(handler: Any, store: Any, *, slots: int = 1, **options: Any) -> BackpressureSupervisor:
    options = {"max_queue_size": 100_000, "backpressure_threshold": 1.0, **options}
    supervisor = BackpressureSupervisor(overflow=store, **options)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=slots)
    return supervisor


async def ends(tickets: list[Ticket]) -> Counter[str]:
    """Return how many tickets ended in each way. None of them may be open."""
    assert all(ticket.done() for ticket in tickets)
    return Counter("still spilled" if ticket.result is None else ticket.result.status.value for ticket in tickets)


async def state_in(store: MemoryTaskStore, ticket: Ticket) -> RecordState:
    """Return the state of a task in a store that its process has closed."""
    await store.open()
    found = await store.find(ticket.task_id)
    assert found is not None
    return found[0]


async def waiting_in(store: MemoryTaskStore) -> int:
    await store.open()
    return sum((await store.depths()).values())


# --- within the limit ------------------------------------------------------------------------------------------------


@virtual
async def test_draining_moves_the_whole_queue_to_the_overflow_within_its_limit() -> None:
    store = SlowStore()
    async with make_supervisor(Agent(60.0), store) as supervisor:
        tickets = flood(supervisor, "work", 4_001)
        await asyncio.sleep(0.01)
        origin = now()
        report = await supervisor.drain(timeout=1.0)
        assert now() - origin == approximately(1.0)  # for the one that runs
        assert (report.spilled, report.cancelled, report.finished) == (4_000, 1, 0)
    assert await ends(tickets) == {"still spilled": 4_000, "cancelled": 1}
    assert await waiting_in(store) == 4_000


@virtual
async def test_the_time_that_moving_takes_counts_towards_the_limit() -> None:
    store = SlowStore(0.4)  # for a thousand tasks
    async with make_supervisor(Agent(60.0), store) as supervisor:
        tickets = flood(supervisor, "work", 6_001)
        await asyncio.sleep(0.01)
        origin = now()
        report = await supervisor.drain(timeout=1.0)
        assert now() - origin == pytest.approx(1.2, abs=0.01)  # the write that has begun is waited for
        assert (report.spilled, report.cancelled) == (3_000, 3_001)
    assert await ends(tickets) == {"still spilled": 3_000, "cancelled": 3_001}
    assert await waiting_in(store) == 3_000


@pytest.mark.parametrize("limit", [0.0, 1.0])
@virtual
async def test_a_store_that_does_not_answer_delays_a_drain_by_its_grace_at_most(limit: float) -> None:
    supervisor = make_supervisor(Agent(60.0), SlowStore(3600.0), zombie_grace=2.0)
    await supervisor.start()
    tickets = flood(supervisor, "work", 11)
    await asyncio.sleep(0.01)
    origin = now()
    report = await supervisor.drain(timeout=limit)
    assert now() - origin == approximately(limit + 2.0)
    assert (report.spilled, report.cancelled, report.unanswered) == (0, 1, 10)
    assert await ends(tickets) == {"cancelled": 11}
    assert "the overflow had answered" in str((await tickets[-1]).error)
    await supervisor.close()


@virtual
async def test_a_submit_that_the_store_does_not_answer_delays_a_drain_by_its_grace_at_most() -> None:
    supervisor = make_supervisor(Agent(60.0), SlowStore(3600.0), zombie_grace=2.0)
    await supervisor.start()
    submitting = asyncio.ensure_future(supervisor.submit(Task("work", durable=True)))
    await asyncio.sleep(0.01)
    origin = now()
    report = await supervisor.drain(timeout=1.0)
    assert now() - origin == approximately(3.0)
    assert report.spilled == 0
    submitting.cancel()
    await asyncio.wait([submitting])
    await supervisor.close()


@virtual
async def test_what_could_not_be_moved_in_time_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with make_supervisor(Agent(60.0), SlowStore(0.4)) as supervisor:
        flood(supervisor, "work", 6_001)
        await asyncio.sleep(0.01)
        await supervisor.drain(timeout=1.0)
    assert "3000 waiting tasks were cancelled" in caplog.text


@virtual
async def test_a_store_that_fails_for_a_while_is_tried_again_within_the_limit() -> None:
    store = SlowStore(fails_until=2.5)
    async with make_supervisor(Agent(60.0), store) as supervisor:
        tickets = flood(supervisor, "work", 2_001)
        report = await supervisor.drain(timeout=10.0)
        assert (report.spilled, report.cancelled) == (2_000, 1)
    assert await ends(tickets) == {"still spilled": 2_000, "cancelled": 1}


@virtual
async def test_a_store_that_keeps_failing_lets_the_tasks_finish_here() -> None:
    agent = Agent(1.0)
    async with make_supervisor(agent, SlowStore(fails_until=3600.0), slots=10) as supervisor:
        tickets = flood(supervisor, "work", 50)
        report = await supervisor.drain()
        assert (report.finished, report.spilled, report.cancelled) == (50, 0, 0)
    assert await ends(tickets) == {"succeeded": 50}


@virtual
async def test_a_store_that_keeps_failing_does_not_keep_a_drain_from_ending() -> None:
    agent = Agent(0.1, error=ValueError())
    supervisor = make_supervisor(agent, SlowStore(fails_until=3600.0))
    supervisor.register_worker("dead", handler=agent, task_types=["other"], reset_timeout=None)
    async with supervisor:
        tickets = flood(supervisor, "other", 8)
        await asyncio.sleep(1.0)  # five have failed: the worker stays FAILED until it is revived
        report = await supervisor.drain()
        assert report.cancelled == 3
    assert await ends(tickets) == {"failed": 5, "cancelled": 3}


@pytest.mark.parametrize("options", [{}, {"overflow": "memory://", "max_queue_size": 0}], ids=["queued", "stored"])
@virtual
async def test_a_message_behind_one_that_no_worker_can_take_does_not_keep_a_drain_from_ending(
    options: dict[str, Any],
) -> None:
    async def broken(_: Task) -> None:
        await asyncio.sleep(0.1)
        raise ValueError

    supervisor = BackpressureSupervisor(**options)
    supervisor.register_worker("broken", handler=broken, task_types=["broken"], reset_timeout=None)
    supervisor.register_worker("healthy", handler=Agent(), task_types=["work"])
    async with supervisor:
        for _ in range(5):  # then the worker stays FAILED until it is revived
            await supervisor.submit(Task("broken"))
        messages = [await supervisor.submit(Task(task_type, thread_id="c")) for task_type in ("broken", "work")]
        await asyncio.sleep(2.0)
        assert not any(ticket.done() for ticket in messages)
        async with asyncio.timeout(10.0):
            await supervisor.drain()
        assert [ticket.status for ticket in messages] == [TaskStatus.CANCELLED] * 2


@virtual
async def test_closing_ends_a_submission_that_the_store_does_not_answer() -> None:
    store = SlowStore(math.inf)
    supervisor = make_supervisor(Agent(), store)
    await supervisor.start()
    keys = (None, "k", "k")
    submitting = [asyncio.ensure_future(supervisor.submit(Task("work", durable=True, key=key))) for key in keys]
    await asyncio.sleep(1.0)
    ticket = supervisor.submit_nowait(Task("work", key="k"))
    await supervisor.close()
    async with asyncio.timeout(1.0):
        errors = [await error_of(each) for each in submitting]
    assert [type(error) for error in errors] == [StoreUnavailable] * 3
    assert ticket.done()


@virtual
async def test_what_a_full_overflow_does_not_take_finishes_here() -> None:
    store = SlowStore(bound=5)
    async with make_supervisor(Agent(1.0), store) as supervisor:
        tickets = flood(supervisor, "work", 9)
        report = await supervisor.drain()
        assert (report.finished, report.spilled) == (4, 5)
    assert await ends(tickets) == {"succeeded": 4, "still spilled": 5}


@virtual
async def test_closing_moves_the_queue_out_and_starts_nothing_more() -> None:
    store, agent = SlowStore(1.0), Agent(60.0)
    supervisor = make_supervisor(agent, store, slots=3, zombie_grace=0.1)
    await supervisor.start()
    tickets = flood(supervisor, "work", 2_003)
    await asyncio.sleep(0.01)
    origin = now()
    await supervisor.close()
    assert now() - origin == pytest.approx(2.0, abs=0.2)
    assert len(agent.started) == 3
    assert await ends(tickets) == {"still spilled": 2_000, "cancelled": 3}
    assert await waiting_in(store) == 2_000


@virtual
async def test_closing_ends_though_the_overflow_does_not_answer() -> None:
    supervisor = make_supervisor(Agent(60.0), SlowStore(3600.0))
    await supervisor.start()
    tickets = flood(supervisor, "work", 20)
    await asyncio.sleep(0.01)
    origin = now()
    await supervisor.close()
    assert now() - origin < 11.0
    assert await ends(tickets) == {"cancelled": 20}


class SilentStore(SlowStore):
    """A store that does not answer when leases are returned."""

    async def release(self, leases: Sequence[Lease]) -> None:  # noqa: ARG002 - the parameter of a TaskStore
        await asyncio.sleep(3600.0)


@virtual
async def test_closing_ends_though_the_overflow_does_not_take_the_leases_back() -> None:
    supervisor = make_supervisor(Agent(60.0), SilentStore())
    await supervisor.start()
    ticket = await supervisor.submit(Task("work", durable=True))
    origin = now()
    await supervisor.close()
    assert now() - origin < 16.0
    assert isinstance(await error_of(ticket), StillSpilled)


@virtual
async def test_a_task_cancelled_by_its_submitter_while_it_moves_is_not_in_the_overflow() -> None:
    store = SlowStore(0.5)
    async with make_supervisor(Agent(60.0), store) as supervisor:
        tickets = flood(supervisor, "work", 5)
        await asyncio.sleep(0.01)
        draining = asyncio.ensure_future(supervisor.drain(timeout=2.0))
        await asyncio.sleep(0.1)
        assert tickets[2].cancel()
        assert (await draining).spilled == 3
        assert (await tickets[2]).status is TaskStatus.CANCELLED
        assert (await tickets[2]).error == "cancelled by its submitter"
    assert await waiting_in(store) == 3


@virtual
async def test_the_work_of_a_drain_grows_with_the_tasks_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = 0
    original = Drain._is_unfinished

    def counting(self: Drain, ticket: Ticket) -> bool:
        nonlocal checks
        checks += 1
        return original(self, ticket)

    monkeypatch.setattr(Drain, "_is_unfinished", counting)
    async with make_supervisor(Agent(0.1), "memory://", slots=4) as supervisor:
        flood(supervisor, "work", 2_000)
        assert (await supervisor.drain()).finished == 2_000
    assert checks < 10 * 2_000


# --- leases and attempts ---------------------------------------------------------------------------------------------


@virtual
async def test_orderly_stops_are_no_crashes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db?fsync=no"
    for _ in range(5):
        supervisor = make_supervisor(Agent(60.0), url, max_attempts=2)
        async with supervisor:
            ticket = await supervisor.submit(Task("work", durable=True, key="the work"))
            await asyncio.sleep(1.0)
            assert (await supervisor.drain(timeout=1.0)).spilled == 1
        assert isinstance(await error_of(ticket), StillSpilled)
    async with make_supervisor(Agent(1.0), url, max_attempts=2) as supervisor:
        assert [letter async for letter in supervisor.dead_letters] == []
        result = await (await supervisor.submit(Task("work", durable=True, key="the work")))
        assert (result.status, result.attempts) == (TaskStatus.SUCCEEDED, 1)


@virtual
async def test_leaving_by_an_error_is_no_crash_either(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db?fsync=no"
    for _ in range(5):
        with contextlib.suppress(KeyError):
            async with make_supervisor(Agent(60.0), url, max_attempts=2) as supervisor:
                await supervisor.submit(Task("work", durable=True, key="the work"))
                await asyncio.sleep(1.0)
                raise KeyError
    async with make_supervisor(Agent(1.0), url, max_attempts=2) as supervisor:
        result = await (await supervisor.submit(Task("work", durable=True, key="the work")))
        assert (result.status, result.attempts) == (TaskStatus.SUCCEEDED, 1)


@virtual
async def test_a_stored_task_that_waits_here_is_free_for_other_processes_once_draining_starts() -> None:
    store = SlowStore()
    async with make_supervisor(Agent(60.0), store) as supervisor:
        running, waiting = [await supervisor.submit(Task("work", durable=True)) for _ in range(2)]
        draining = asyncio.ensure_future(supervisor.drain())
        await asyncio.sleep(1.0)
        found = await store.find(waiting.task_id)
        assert found is not None
        assert found[0] is RecordState.WAITING
        assert (await draining).spilled == 1
        assert running.status is TaskStatus.SUCCEEDED


@virtual
async def test_a_stored_message_behind_one_that_only_this_process_has_is_not_free_while_it_runs() -> None:
    store = SlowStore()
    async with make_supervisor(Agent(60.0), store) as supervisor:
        running = await supervisor.submit(Task("work", thread_id="c"))
        waiting = await supervisor.submit(Task("work", thread_id="c", durable=True))
        draining = asyncio.ensure_future(supervisor.drain())
        await asyncio.sleep(1.0)
        assert not await store.lease("work", 1, until=1e12)
        assert (await draining).spilled == 1
        assert running.status is TaskStatus.SUCCEEDED
    assert await state_in(store, waiting) is RecordState.WAITING


@virtual
async def test_a_message_that_is_stored_once_draining_has_begun_is_not_free_while_those_before_it_run() -> None:
    store = SlowStore()
    async with make_supervisor(Agent(60.0), store) as supervisor:
        await supervisor.submit(Task("work", thread_id="c"))
        submitting = asyncio.ensure_future(supervisor.submit(Task("work", thread_id="c", durable=True)))
        await asyncio.sleep(FSYNC / 2)
        draining = asyncio.ensure_future(supervisor.drain())
        assert (message := await submitting).verdict is Verdict.SPILLED
        assert isinstance(await error_of(message), StillSpilled)
        assert not await store.lease("work", 1, until=1e12)
        assert (await draining).spilled == 1
    assert await state_in(store, message) is RecordState.WAITING


@virtual
async def test_a_message_that_is_stored_once_draining_has_begun_does_not_overtake_those_that_move() -> None:
    store, agent = SlowStore(), Agent(60.0)
    supervisor = make_supervisor(agent, store)
    await supervisor.start()
    supervisor.submit_nowait(Task("work", "other"))
    first = supervisor.submit_nowait(Task("work", "first", thread_id="c"))
    submitting = asyncio.ensure_future(supervisor.submit(Task("work", "second", thread_id="c", durable=True)))
    await asyncio.sleep(FSYNC / 2)
    store.seconds = 1000.0  # the write of the first hangs, and that of the second does not
    draining = asyncio.ensure_future(supervisor.drain(timeout=2000.0))
    await submitting
    await asyncio.sleep(100.0)
    assert agent.started == ["other"]
    assert not await store.lease("work", 1, until=1e12)
    assert (await draining).spilled == 2
    assert isinstance(await error_of(first), StillSpilled)
    await supervisor.close()


@virtual
async def test_a_drain_that_was_cancelled_leaves_closing_its_time() -> None:
    store = SlowStore(1.0)
    supervisor = make_supervisor(Agent(60.0), store)
    await supervisor.start()
    tickets = flood(supervisor, "work", 3_001)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await supervisor.drain()
    await supervisor.close()
    assert await ends(tickets) == {"still spilled": 3_000, "cancelled": 1}
    assert await waiting_in(store) == 3_000


# --- conversations that move in part ---


class PartlyFailingStore(SlowStore):
    """A store that fails for some of the tasks, by their payloads, until a loop time."""

    def __init__(self, *payloads: int, until: float) -> None:
        super().__init__(0.0)
        self.failing = set(payloads)
        self.until = until

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        if asyncio.get_running_loop().time() < self.until and decode_task(record.envelope).payload in self.failing:
            raise StoreUnavailable(where="disk", why="it is busy", advice="None.")
        return await super().put(record, fence=fence, until=until, now=now)


async def drain_a_conversation(store: SlowStore) -> tuple[list[int], list[Ticket], list[int]]:
    """Drain six messages that wait behind other work; return what ran here, their tickets, and what the store has."""
    ran: list[int] = []

    async def handle(task: Task) -> None:
        ran.append(task.payload)
        await asyncio.sleep(60.0 if task.payload < 0 else 0.1)

    async with make_supervisor(handle, store) as supervisor:
        supervisor.submit_nowait(Task("work", -1))
        tickets = flood(supervisor, "work", 6, thread_id="c")
        await asyncio.sleep(0.01)
        await supervisor.drain()
    assert all(ticket.done() for ticket in tickets)
    return ran, tickets, [number for number, ticket in enumerate(tickets) if ticket.result is None]


@virtual
async def test_messages_do_not_run_past_earlier_ones_that_moved_when_the_overflow_is_full() -> None:
    ran, tickets, stored = await drain_a_conversation(SlowStore(0.0, bound=3))
    assert (ran, stored) == ([-1], [0, 1, 2])
    for ticket in tickets[3:]:
        assert (await ticket).status is TaskStatus.CANCELLED
        assert "earlier tasks of its conversation" in str((await ticket).error)


@pytest.mark.parametrize("failing", [(0, 1), (2, 3), (5,)])
@virtual
async def test_messages_that_the_store_failed_to_take_follow_the_others_of_their_conversation(
    failing: tuple[int, ...],
) -> None:
    ran, _, stored = await drain_a_conversation(PartlyFailingStore(*failing, until=3.0))
    assert (ran, stored) == ([-1], [0, 1, 2, 3, 4, 5])


@virtual
async def test_a_store_that_fails_on_cannot_keep_a_drain_without_a_limit_from_ending() -> None:
    ran, tickets, stored = await drain_a_conversation(PartlyFailingStore(4, 5, until=math.inf))
    assert (ran, stored) == ([-1], [0, 1, 2, 3])
    assert [(await ticket).status for ticket in tickets[4:]] == [TaskStatus.CANCELLED] * 2


# --- handlers that never stop ---


@pytest.mark.parametrize("thread_id", [None, "c"])
@virtual
async def test_what_waits_behind_a_zombie_does_not_keep_a_drain_from_ending(thread_id: str | None) -> None:
    stuck = asyncio.Event()

    async def handle(_: Task) -> None:
        while not stuck.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await stuck.wait()

    supervisor = BackpressureSupervisor(zombie_grace=2.0)
    slots = 1 if thread_id is None else 4
    supervisor.register_worker("w", handler=handle, task_types=["work"], max_concurrent=slots, timeout=1.0)
    async with supervisor:
        first, second = flood(supervisor, "work", 2, thread_id=thread_id)
        assert (await first).status is TaskStatus.TIMED_OUT
        report = await supervisor.drain()
        assert now() == approximately(1.0 + 2.0 + 2.0)
        assert (report.cancelled, report.orphans) == (1, (first.task_id,))
    assert (await second).status is TaskStatus.CANCELLED
    stuck.set()


@virtual
async def test_closing_ends_a_drain_that_is_under_way() -> None:
    supervisor = make_supervisor(Agent(60.0), SlowStore(8.0), zombie_grace=2.0)
    await supervisor.start()
    tickets = flood(supervisor, "work", 3)
    draining = asyncio.ensure_future(supervisor.drain())
    await asyncio.sleep(0.1)
    await supervisor.close()
    report = await draining
    assert (report.cancelled, report.unanswered) == (1, 2)
    assert await ends(tickets) == {"cancelled": 3}


# --- sub-tasks of agents that are to be run again ---


async def run_agents(
    path: Path, agent: Any, *, agents: int, drains: bool, max_queue_size: int | None
) -> list[TaskStatus | str]:
    """Run durable agents, each with a sub-task, and drain meanwhile; return how they ended."""
    supervisor = BackpressureSupervisor(overflow=f"sqlite:///{path}?fsync=no", max_queue_size=max_queue_size)

    async def handle(task: Task) -> Any:
        return await agent(supervisor, task)

    supervisor.register_worker("agent", handler=handle, task_types=["agent"], max_concurrent=agents)
    supervisor.register_worker("tool", handler=Agent(0.02), task_types=["tool"])
    async with supervisor:
        tickets = [await supervisor.submit(Task("agent", durable=True, key=str(number))) for number in range(agents)]
        await asyncio.sleep(0.1)
        if drains:
            await supervisor.drain(timeout=20.0)
        return await asyncio.gather(*(error_of_or_status(ticket) for ticket in tickets))


async def error_of_or_status(ticket: Ticket) -> TaskStatus | str:
    try:
        return (await ticket).status
    except StillSpilled:
        return "left behind"


@virtual
async def test_agents_that_submit_a_sub_task_while_draining_finish(tmp_path: Path) -> None:
    async def agent(supervisor: BackpressureSupervisor, _: Task) -> Any:
        await asyncio.sleep(0.2)
        return await supervisor.run(Task("tool"))

    ends = await run_agents(tmp_path / "store.db", agent, agents=100, drains=True, max_queue_size=None)
    assert ends == [TaskStatus.SUCCEEDED] * 100


async def in_a_group(supervisor: BackpressureSupervisor, _: Task) -> Any:
    async with asyncio.TaskGroup() as group:
        tool = group.create_task(supervisor.run(Task("tool")))
    return tool.result()


async def with_an_error_of_its_own(supervisor: BackpressureSupervisor, _: Task) -> Any:
    try:
        return await supervisor.run(Task("tool"))
    except Exception as exc:
        message = "the tool failed"
        raise RuntimeError(message) from exc


@pytest.mark.parametrize("agent", [in_a_group, with_an_error_of_its_own])
@virtual
async def test_agents_whose_sub_task_is_left_behind_run_again_whatever_they_raise(agent: Any, tmp_path: Path) -> None:
    ends = await run_agents(tmp_path / "store.db", agent, agents=20, drains=True, max_queue_size=0)
    assert set(ends) == {TaskStatus.SUCCEEDED, "left behind"}
    ends = await run_agents(tmp_path / "store.db", agent, agents=20, drains=False, max_queue_size=0)
    assert ends == [TaskStatus.SUCCEEDED] * 20


@pytest.mark.parametrize("works", [0.0, 50.0])  # seconds until it awaits the task: after draining has begun
@pytest.mark.parametrize("how", ["task", "slot"])
@virtual
async def test_what_waits_for_a_task_that_can_never_start_does_not_keep_a_drain_from_ending(
    how: str, works: float
) -> None:
    supervisor = BackpressureSupervisor(zombie_grace=2.0)

    async def parent(_: Task) -> None:
        await asyncio.sleep(works)
        await supervisor.run(Task("stuck"))

    supervisor.register_worker("stuck", handler=UncancellableHandler(500.0), task_types=["stuck"], timeout=1.0)
    supervisor.register_worker("parent", handler=parent, task_types=["parent"], timeout=10_000.0)

    async def hold_a_slot() -> None:
        async with supervisor.slot("parent"):
            await parent(Task("parent"))

    async with supervisor:
        zombie = supervisor.submit_nowait(Task("stuck"))
        await asyncio.sleep(0.1)
        waiting = asyncio.ensure_future(hold_a_slot() if how == "slot" else supervisor.run(Task("parent")))
        assert (await zombie).status is TaskStatus.TIMED_OUT
        report = await supervisor.drain()
        assert now() < works + 20.0
        assert report.orphans == (zombie.task_id,)
        assert isinstance(await error_of(waiting), Exception | asyncio.CancelledError)


@pytest.mark.parametrize("depth", [1, 2])
@virtual
async def test_a_run_that_awaits_a_task_of_the_supervisor_above_finishes_though_others_here_cannot_start(
    depth: int,
) -> None:
    """With two levels the task above needs one here that cannot start: then nobody waits for the run."""
    below, above = BackpressureSupervisor(zombie_grace=2.0), BackpressureSupervisor()

    async def go_up(_: Task) -> Any:
        return await above.run(Task("work"))

    async def work(_: Task) -> str:
        await asyncio.sleep(30.0)
        return "done" if depth == 1 else await above.run(Task("stuck"))

    below.register_worker("up", handler=go_up, task_types=["up"], timeout=10_000.0)
    below.register_worker("stuck", handler=UncancellableHandler(500.0), task_types=["stuck"], timeout=1.0)
    above.register_worker("below", handler=below, task_types=["up", "stuck"], max_concurrent=10, timeout=10_000.0)
    above.register_worker("work", handler=work, task_types=["work"], timeout=10_000.0)
    async with above:
        zombie, stuck = flood(below, "stuck", 2)
        run = await below.submit(Task("up"))
        assert (await zombie).status is TaskStatus.TIMED_OUT
        report = await below.drain()
        assert now() < 60.0
        assert (await run).success == (depth == 1)
        assert (await stuck).status is TaskStatus.CANCELLED
        assert report.orphans == (zombie.task_id,)


class StandingStore(SlowStore):
    """A store that stands still once it is told to, and ignores that it is cancelled."""

    stands = False

    async def release(self, leases: Sequence[Lease]) -> None:
        until = now() + 10_000.0
        while self.stands and now() < until:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(until - now())
        await super().release(leases)


@virtual
async def test_a_store_that_stands_still_keeps_no_supervisor_from_closing() -> None:
    store = StandingStore(0.0)
    supervisor = make_supervisor(Agent(60.0), store, zombie_grace=1.0)
    await supervisor.start()
    ticket = await supervisor.submit(Task("work", durable=True))
    await asyncio.sleep(0.1)
    store.stands = True
    await supervisor.close()
    assert now() < 60.0
    assert ticket.done()
    store.stands = False
