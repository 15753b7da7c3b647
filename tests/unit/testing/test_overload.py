"""Overload on demand, and a supervisor without admission control."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_stores import STORES, StoreBackend

from forebay import (
    BackpressureSupervisor,
    Deadline,
    ForebayError,
    Overloaded,
    Priority,
    Task,
    TaskStatus,
    Verdict,
    WorkerState,
)
from forebay.errors import NotStarted
from forebay.testing import (
    FlakyHandler,
    HeldHandler,
    PassthroughSupervisor,
    SlowHandler,
    no_leaks,
    now,
    overload,
    run_ready,
    virtual,
)


def make_supervisor(**settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**settings)
    supervisor.register_worker("w", handler=SlowHandler(1.0), task_types=["work", "play"], max_concurrent=10)
    return supervisor


# --- overload ---------------------------------------------------------------------------------------------------------


@virtual
async def test_all_tasks_are_rejected_inside_the_block() -> None:
    async with make_supervisor() as supervisor:
        task = Task("work")
        with overload(supervisor) as refused:
            ticket = await supervisor.submit(task)
            assert not ticket
            assert (ticket.verdict, ticket.status, ticket.load) == (Verdict.REJECTED, TaskStatus.REJECTED, 1.0)
            assert (ticket.limited_by, ticket.retry_after) == ("pool:work", None)
            assert ticket.reason == "pool:work is at 100%, and NORMAL is rejected"
            assert not supervisor.submit_nowait(Task("play", priority=Priority.CRITICAL))
            with pytest.raises(Overloaded, match="pool:play"):
                await supervisor.run(Task("play"))
            with pytest.raises(Overloaded):
                async with supervisor.slot("work"):
                    pass
        assert len(refused) == 4
        assert refused.tasks[0] is task
        assert await supervisor.submit(Task("work"))
        assert supervisor.statistics().rejected == 4


@virtual
async def test_reason_limited_by_and_load_of_the_ticket_can_be_set() -> None:
    async with make_supervisor() as supervisor:
        with (
            overload(supervisor, reason="the key is spent", limited_by="openai", load=1.5, retry_after=7.0),
            pytest.raises(Overloaded, match=r"the key is spent; come back in 7 s") as refused,
        ):
            await supervisor.run(Task("work"))
        assert (refused.value.limited_by, refused.value.load, refused.value.retry_after) == ("openai", 1.5, 7.0)


@virtual
async def test_retry_after_is_by_default_the_estimate_of_admission() -> None:
    async with make_supervisor() as supervisor:
        for _ in range(3):
            await supervisor.run(Task("work"))
        with overload(supervisor):
            first, second = [await supervisor.submit(Task("work")) for _ in range(2)]
        assert first.retry_after is not None
        assert second.retry_after is not None
        assert 0 < first.retry_after < second.retry_after


@pytest.mark.parametrize(
    ("chosen", "refused"),
    [
        ({"task_types": "work"}, {("work", "LOW"), ("work", "HIGH")}),
        ({"task_types": ["play"]}, {("play", "LOW"), ("play", "HIGH")}),
        ({"priorities": Priority.LOW}, {("work", "LOW"), ("play", "LOW")}),
        ({"priorities": [Priority.NORMAL, Priority.HIGH], "task_types": ["work"]}, {("work", "HIGH")}),
        ({"task_types": []}, set()),
    ],
)
@virtual
async def test_task_types_and_priorities_can_be_chosen(chosen: dict[str, Any], refused: set[tuple[str, str]]) -> None:
    async with make_supervisor() as supervisor:
        with overload(supervisor, **chosen):
            tasks = [
                Task(kind, priority=priority) for kind in ("work", "play") for priority in (Priority.LOW, Priority.HIGH)
            ]
            tickets = [await supervisor.submit(task) for task in tasks]
    assert {(ticket.task.task_type, ticket.priority.name) for ticket in tickets if not ticket} == refused


@pytest.mark.parametrize("overflow", STORES, ids=str)
@pytest.mark.blocks
@virtual
async def test_with_an_overflow_tasks_are_spilled_and_refilled_afterwards(
    overflow: StoreBackend, tmp_path: Any
) -> None:
    async with make_supervisor(overflow=overflow.fast_url(tmp_path)) as supervisor:
        with overload(supervisor, task_types="work"):
            ticket = await supervisor.submit(Task("work", "later"))
            assert (ticket.verdict, ticket.limited_by) == (Verdict.SPILLED, "pool:work")
            assert not await supervisor.submit(Task("work", spill=False))
            assert await supervisor.run(Task("play")) is None
            await asyncio.sleep(100.0)
            assert (ticket.status, supervisor.statistics().outside) == (TaskStatus.SPILLED, 1)
        assert await ticket.value() == "later"
        assert 101.0 < now() < 102.5


@virtual
async def test_spilling_can_be_disabled() -> None:
    async with make_supervisor(overflow="memory://") as supervisor:
        with overload(supervisor, spill=False):
            assert (await supervisor.submit(Task("work"))).verdict is Verdict.REJECTED


@virtual
async def test_nested_blocks_end_independently() -> None:
    async with make_supervisor() as supervisor:
        with overload(supervisor, task_types="work", reason="outer"):
            with overload(supervisor, task_types="play", reason="inner"):
                tickets = [await supervisor.submit(Task(kind)) for kind in ("work", "play")]
                assert [ticket.reason for ticket in tickets] == ["outer", "inner"]
            assert await supervisor.submit(Task("play"))
            assert not await supervisor.submit(Task("work"))
        assert await supervisor.submit(Task("work"))


@virtual
async def test_an_exception_in_the_block_restores_admission() -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(KeyError), overload(supervisor):
            raise KeyError
        assert await supervisor.submit(Task("work"))


def test_overload_needs_a_started_supervisor() -> None:
    with pytest.raises(NotStarted), overload(make_supervisor()):
        pass


# --- passthrough ------------------------------------------------------------------------------------------------------


@virtual
async def test_passthrough_admits_every_task_and_keeps_worker_limits() -> None:
    slow = SlowHandler(1.0)
    async with no_leaks(), PassthroughSupervisor(max_queue_size=1) as supervisor:
        supervisor.register_worker("w", handler=slow, task_types=["work"], max_concurrent=2)
        tickets = [supervisor.submit_nowait(Task("work", n, priority=Priority(n % 4))) for n in range(200)]
        assert all(ticket.verdict is Verdict.ADMITTED for ticket in tickets)
        assert all([(await ticket).success for ticket in tickets])
    assert slow.peak == 2
    assert len(supervisor.record.results) == 200
    check_supervisor(supervisor.record, tickets=tickets)


@virtual
async def test_passthrough_revives_failed_workers() -> None:
    async with PassthroughSupervisor() as supervisor:
        supervisor.register_worker("w", handler=FlakyHandler(50), task_types=["work"], reset_timeout=None)
        for _ in range(50):
            assert not (await (await supervisor.submit(Task("work")))).success
        assert await supervisor.submit(Task("work"))
        assert supervisor.workers["w"].state is not WorkerState.FAILED
        assert now() == 0.0


@virtual
async def test_passthrough_records_submitted_tasks() -> None:
    async def agents_code(supervisor: BackpressureSupervisor) -> str:
        notes = await supervisor.run(Task("research", "rivers", priority=Priority.HIGH))
        return f"{notes}!"

    passthrough = PassthroughSupervisor()
    passthrough.register_worker("w", handler=SlowHandler(result="notes"), task_types=["research"])
    async with passthrough:
        assert await agents_code(passthrough) == "notes!"
    (submitted,) = passthrough.record.submitted
    assert (submitted.task_type, submitted.priority) == ("research", Priority.HIGH)
    assert passthrough.record.tasks[submitted.task_id].payload == "rivers"


@virtual
async def test_passthrough_is_otherwise_an_ordinary_supervisor() -> None:
    held = HeldHandler()
    async with PassthroughSupervisor() as supervisor:
        supervisor.register_worker("w", handler=held, task_types=["work"])
        late = await supervisor.submit(Task("work", deadline=Deadline.within(1.0)))
        assert (await late).status is TaskStatus.EXPIRED
        cancelled = await supervisor.submit(Task("work"))
        await run_ready()
        cancelled.cancel()
        assert (await cancelled).status is TaskStatus.CANCELLED
        with pytest.raises(ForebayError, match="No worker is registered for task type 'paint'"):
            await supervisor.submit(Task("paint"))
