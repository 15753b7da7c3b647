"""Events, progress and statistics."""

from __future__ import annotations

import asyncio
import gc
import traceback
import weakref
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, error_of, flood, now, results, run_ready, virtual

from forebay import BackpressureSupervisor, Overloaded, Task, TaskStatus, Ticket, Verdict, WorkerState, progress
from forebay.events import Event, TaskFinished, TaskProgress, TaskRefilled, TaskStarted, TaskSubmitted


async def reports(task: Task) -> str:
    for percent in (30, 60):
        await asyncio.sleep(1.0)
        progress({"percent": percent})
    return f"{task.payload} done"


async def events_of(ticket: Any) -> list[Event]:
    return [event async for event in ticket.events()]


# --- of a ticket -----------------------------------------------------------------------------------------------------


@virtual
async def test_a_tickets_events_are_started_progress_and_last_finished() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=reports, task_types=["work"])
        _, ticket = flood(supervisor, "work", 2)
        events = await events_of(ticket)
    assert [event.kind for event in events] == ["started", "progress", "progress", "finished"]
    started, first, second, finished = events
    assert isinstance(started, TaskStarted)
    assert (started.worker_id, started.attempt, started.at) == ("worker", 1, approximately(2.0))
    assert isinstance(first, TaskProgress)
    assert isinstance(second, TaskProgress)
    assert [first.value, second.value] == [{"percent": 30}, {"percent": 60}]
    assert isinstance(finished, TaskFinished)
    assert finished.result is ticket.result


@virtual
async def test_a_late_listener_gets_the_start_and_the_end_again() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=reports, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        await asyncio.sleep(1.5)
        late = await events_of(ticket)
        assert [(event.kind, event.at) for event in late] == [
            ("started", approximately(0.0)),
            ("progress", approximately(2.0)),
            ("finished", approximately(2.0)),
        ]
        assert [event.kind for event in await events_of(ticket)] == ["finished"]


@virtual
async def test_several_may_listen_and_one_may_leave() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=reports, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)

        async def leaves() -> str:
            async for event in ticket.events():
                return event.kind
            return "nothing"

        kinds, first = await asyncio.gather(events_of(ticket), leaves())
    assert len(kinds) == 4
    assert first == "started"


@virtual
async def test_several_may_read_one_subscription_and_none_waits_in_vain() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        async with supervisor.events() as events:
            readers = [asyncio.ensure_future(anext(events)) for _ in range(4)]
            await run_ready()
            readers[0].cancel()
            await supervisor.submit_nowait(Task("work"))
            read = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(read[0], asyncio.CancelledError)
    assert [getattr(event, "kind", None) for event in read[1:]] == ["submitted", "started", "finished"]


@virtual
async def test_a_closed_subscription_ends_for_each_of_its_readers() -> None:
    async with BackpressureSupervisor() as supervisor:
        events = supervisor.events()
        readers = [asyncio.ensure_future(anext(events, None)) for _ in range(3)]
        await run_ready()
        events.close()
        assert await asyncio.gather(*readers) == [None, None, None]


@virtual
async def test_listening_to_a_rejected_ticket_raises_overloaded() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=reports, task_types=["work"])
        assert isinstance(await error_of(events_of(flood(supervisor, "work", 2)[1])), Overloaded)


@virtual
async def test_a_cancelled_tasks_events_end_with_finished_too() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        running, waiting = flood(supervisor, "work", 2)
        listening = asyncio.gather(events_of(running), events_of(waiting))
        await asyncio.sleep(1.0)
        waiting.cancel()
        running.cancel()
        of_running, of_waiting = await listening
    assert [event.kind for event in of_running] == ["started", "finished"]
    assert [event.kind for event in of_waiting] == ["finished"]


@virtual
async def test_the_newest_thousand_unread_progress_events_are_kept() -> None:
    async def talks(_: Task) -> None:
        await asyncio.sleep(1.0)
        for number in range(5000):
            progress(number)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=talks, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        values = [event.value for event in await events_of(ticket) if isinstance(event, TaskProgress)]
    assert values == list(range(4000, 5000))


@virtual
async def test_progress_of_a_nested_task_is_its_own() -> None:
    async def parent(_: Task) -> Any:
        progress("parent")
        return await supervisor.run(Task("child"))

    async def child(_: Task) -> None:
        progress("child")

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("parents", handler=parent, task_types=["parent"])
        supervisor.register_worker("children", handler=child, task_types=["child"])
        (ticket,) = flood(supervisor, "parent", 1)
        values = [event.value for event in await events_of(ticket) if isinstance(event, TaskProgress)]
    assert values == ["parent"]


@virtual
async def test_progress_in_a_slot_reaches_the_supervisors_listeners() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        with_progress = []
        async with supervisor.events() as events:
            async with supervisor.slot("work") as slot:
                progress("half way")
            events.close()
            with_progress = [event async for event in events if isinstance(event, TaskProgress)]
    assert [(event.task_id, event.value) for event in with_progress] == [(slot.task_id, "half way")]


# --- of a supervisor -------------------------------------------------------------------------------------------------


@virtual
async def test_the_supervisor_reports_every_verdict_start_and_end() -> None:
    seen: list[Event] = []
    async with BackpressureSupervisor(max_queue_size=4, on_event=seen.append) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        tickets = flood(supervisor, "work", 6)
    submitted = [event for event in seen if isinstance(event, TaskSubmitted)]
    assert [event.verdict for event in submitted] == [ticket.verdict for ticket in tickets]
    assert [(event.reason, event.limited_by) for event in submitted] == [
        (ticket.reason, ticket.limited_by) for ticket in tickets
    ]
    ids = [ticket.task_id for ticket in tickets if ticket]
    assert [event.task_id for event in seen if isinstance(event, TaskStarted)] == ids
    assert [event.task_id for event in seen if isinstance(event, TaskFinished)] == ids


@virtual
async def test_the_supervisor_reports_refilled_tasks() -> None:
    async with BackpressureSupervisor(max_queue_size=1, overflow="memory://") as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        async with supervisor.events() as events:
            tickets = [await supervisor.submit(Task("work", n)) for n in range(4)]
            await results(tickets)
            events.close()
            back = [event.task_id async for event in events if isinstance(event, TaskRefilled)]
    assert back == [ticket.task_id for ticket in tickets if ticket.verdict is Verdict.SPILLED]


@virtual
async def test_the_supervisors_events_end_when_it_closes() -> None:
    supervisor = BackpressureSupervisor()
    await supervisor.start()
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    events = supervisor.events()
    flood(supervisor, "work", 1)
    await supervisor.drain()
    await supervisor.close()
    assert [event.kind async for event in events] == ["submitted", "started", "finished"]


@virtual
async def test_a_slow_reader_loses_the_oldest_events_and_knows_how_many() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        async with supervisor.events(bound=5) as events:
            await results(flood(supervisor, "work", 10))
            events.close()
            kept = [event async for event in events]
    assert len(kept) == 5
    assert events.dropped == 25
    assert kept[-1].kind == "finished"


@virtual
async def test_a_sink_that_fails_is_logged_and_affects_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Event] = []

    def fails(_: Event) -> None:
        raise ValueError

    async with BackpressureSupervisor(on_event=[fails, seen.append]) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        assert await supervisor.run(Task("work", 7)) == 7
    assert [event.kind for event in seen] == ["submitted", "started", "finished"]
    assert "event sink" in caplog.text


@virtual
async def test_a_sink_may_submit_and_cancel() -> None:
    tickets: list[Ticket] = []

    def sink(event: Event) -> None:
        if isinstance(event, TaskFinished) and len(tickets) < 5:
            tickets.append(supervisor.submit_nowait(Task("work")))
        if isinstance(event, TaskSubmitted) and len(tickets) == 3:
            tickets[-1].cancel()

    supervisor = BackpressureSupervisor(on_event=sink)
    async with supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        flood(supervisor, "work", 1)
        await asyncio.sleep(60.0)
        assert worker.current_tasks == 0
    assert len(tickets) == 5
    assert all(ticket.done() for ticket in tickets)


# --- statistics ------------------------------------------------------------------------------------------------------


@virtual
async def test_statistics_count_verdicts_and_results() -> None:
    async with BackpressureSupervisor(max_queue_size=10) as supervisor:
        supervisor.register_worker("good", handler=Agent(), task_types=["good"])
        supervisor.register_worker("bad", handler=Agent(error=ValueError()), task_types=["bad"])
        tickets = [*flood(supervisor, "good", 20), *flood(supervisor, "bad", 2)]
        tickets += flood(supervisor, "bad", 1, timeout=0.5)
        tickets[3].cancel()
        await results(ticket for ticket in tickets if ticket)
        counted = supervisor.statistics()
    assert counted.submitted == 23
    assert counted.admitted + counted.rejected == 23
    assert counted.rejected == sum(not ticket for ticket in tickets)
    assert (counted.succeeded, counted.failed, counted.timed_out, counted.cancelled) == (8, 2, 1, 1)
    assert counted.started == 8 + 3


@virtual
async def test_statistics_are_a_snapshot() -> None:
    async with BackpressureSupervisor(max_queue_size=6) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=2)
        flood(supervisor, "work", 5)
        before = supervisor.statistics()
        await run_ready()
        assert (before.running, before.waiting, before.outside) == (2, 3, 0)
        assert (before.load, before.limited_by, before.utilization) == (5 / 8, "pool:work", 1.0)
        (worker,) = before.workers
        assert (worker.name, worker.state, worker.load_factor) == ("worker", WorkerState.OVERLOADED, 1.0)
        await asyncio.sleep(10.0)
        after = supervisor.statistics()
    assert (before.running, after.running, after.waiting, after.limited_by) == (2, 0, 0, None)
    with pytest.raises(AttributeError):
        before.running = 7  # type: ignore[misc]


@virtual
async def test_the_memory_of_ended_tasks_is_bounded() -> None:
    async with BackpressureSupervisor(keep_results=3) as supervisor:
        supervisor.register_worker("worker", handler=Agent(0.1), task_types=["work"])
        tickets = flood(supervisor, "work", 10)
        await results(tickets)
        found = []
        for ticket in tickets:
            try:
                found.append(supervisor.ticket(ticket.task_id))
            except LookupError:
                continue
    assert found == tickets[-3:]


@virtual
async def test_the_memory_of_ended_tasks_is_bounded_in_bytes() -> None:
    async with BackpressureSupervisor(keep_results_bytes=350_000) as supervisor:
        supervisor.register_worker("worker", handler=Agent(0.1), task_types=["work"])
        large, small = "x" * 50_000, "x"
        tickets = [supervisor.submit_nowait(Task("work", payload)) for payload in [large] * 10 + [small]]
        tickets.append(
            supervisor.submit_nowait(Task("work", {"parts": [f"{large}{number}" for number in range(100)]}))
        )  # its result is its payload
        *others, huge = tickets
        await results(others)
        kept = [ticket for ticket in others if error_unless_found(supervisor, ticket) is None]
        assert kept == others[-4:]  # three of 100,000 bytes each, payload and result, and the small one
        await huge
        assert error_unless_found(supervisor, huge) is not None


def error_unless_found(supervisor: BackpressureSupervisor, ticket: Ticket) -> LookupError | None:
    """Look a ticket up, and return the error of a failure to find it."""
    try:
        supervisor.ticket(ticket.task_id)
    except LookupError as error:
        return error
    return None


class LargeObject:
    """An object that a handler holds in a local variable."""


@pytest.mark.parametrize("key", [None, "key"])
@virtual
async def test_an_ended_task_keeps_no_local_variable_of_its_handler(key: str | None) -> None:
    async def agent(_: Task) -> None:
        large = LargeObject()
        held.append(weakref.ref(large))
        raise ValueError("large")

    held: list[weakref.ref[LargeObject]] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        task = Task("work", key=key)
        result = await supervisor.submit_nowait(task)
        assert result.cause is not None  # whoever awaits the task has the exception and its traceback
        assert result.cause.__traceback__ is not None
        del result
        gc.collect()
        assert held[0]() is None
        ended = supervisor.ticket(task.task_id)
        assert (await ended).error == "ValueError: large"
        assert ended.status is TaskStatus.FAILED
        if key is not None:  # which remembers success only
            again = supervisor.submit_nowait(Task("work", key=key))
            assert again is not ended
            assert (await again).error == "ValueError: large"
            assert len(held) == 2


@virtual
async def test_an_error_that_is_raised_again_and_again_collects_no_traceback() -> None:
    async def overloaded(_: Task) -> None:
        raise Overloaded("the key is busy", retry_after=3.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=overloaded, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        await ticket
        lengths = []
        for _ in range(3):
            error = await error_of(ticket.value())
            assert isinstance(error, Overloaded)
            assert error.retry_after == 3.0
            lengths.append(len(traceback.extract_tb(error.__traceback__)))
    assert len(set(lengths)) == 1


@virtual
async def test_a_result_says_how_long_the_last_attempt_ran_and_not_how_long_it_waited() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(2.0), task_types=["work"])
        _, waited = flood(supervisor, "work", 2)
        result = await waited
        assert now() == approximately(4.0)
    assert result.duration_ms == approximately(2000.0)
    assert result.status is TaskStatus.SUCCEEDED
