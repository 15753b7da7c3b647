"""How tasks end: with a value, by any exception, by a timeout, by cancelling; and when the slot is returned."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.task_plane import Agent, UncancellableHandler, approximately, flood, now, results, run_ready, virtual

from forebay import BackpressureSupervisor, Overloaded, Task, TaskStatus, WorkerState, progress
from forebay.events import ZombieEnded, ZombieFound


class UnprintableError(Exception):
    """An exception whose str() fails."""

    def __str__(self) -> str:
        raise RuntimeError


class UnknownBaseException(BaseException):
    """An exception that is no Exception and that asyncio does not know."""


ALL_KINDS = [
    ValueError("x"),
    UnknownBaseException("x"),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(7),
    StopAsyncIteration(),
    MemoryError(),
    RecursionError(),
    TimeoutError(),
    ConnectionError("gone"),
    ExceptionGroup("two", [ValueError(), KeyError()]),
    BaseExceptionGroup("two", [SystemExit(), KeyboardInterrupt()]),
    UnprintableError(),
]
KINDS_AND_PLACES = [
    pytest.param(error, in_thread, id=f"{type(error).__name__}-{'thread' if in_thread else 'async'}")
    for error in ALL_KINDS
    for in_thread in (False, True)
    if in_thread or not isinstance(error, KeyboardInterrupt)  # in the loop it is a Ctrl-C: see below
]


def raising(error: BaseException, *, in_thread: bool) -> Callable[[Task], Any]:
    """Return a handler that raises `error` for the payload "bad"."""

    async def agent(task: Task) -> Any:
        await asyncio.sleep(1.0)
        if task.payload == "bad":
            raise error
        return task.payload

    def function(task: Task) -> Any:
        if task.payload == "bad":
            raise error
        return task.payload

    return function if in_thread else agent


# --- exceptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "in_thread"), KINDS_AND_PLACES)
@virtual
async def test_whatever_a_handler_raises_ends_its_own_task_and_no_other(
    error: BaseException, *, in_thread: bool
) -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker(
            "worker", handler=raising(error, in_thread=in_thread), task_types=["work"], max_concurrent=3
        )
        tickets = [supervisor.submit_nowait(Task("work", payload)) for payload in ("good", "bad", "fine", "later")]
        before, bad, beside, after = await results(tickets)
        assert supervisor.statistics().running == 0
    assert bad.status is TaskStatus.FAILED
    assert [result.result for result in (before, beside, after)] == ["good", "fine", "later"]


@pytest.mark.parametrize(("error", "in_thread"), KINDS_AND_PLACES)
@virtual
async def test_what_a_handler_raised_is_named_in_its_result(error: BaseException, *, in_thread: bool) -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=raising(error, in_thread=in_thread), task_types=["work"])
        result = await supervisor.submit_nowait(Task("work", "bad"))
    if isinstance(error, StopIteration) and not in_thread:
        assert result.error == "RuntimeError: coroutine raised StopIteration"  # because of Python
    else:
        assert result.cause is error
        assert (result.error or "").startswith(type(error).__name__)


@pytest.mark.parametrize("in_thread", [False, True], ids=["async", "thread"])
@virtual
async def test_a_handler_that_raises_a_cancellation_ends_cancelled_and_affects_no_other(*, in_thread: bool) -> None:
    async with BackpressureSupervisor() as supervisor:
        handler = raising(asyncio.CancelledError(), in_thread=in_thread)
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        bad, good = await results([supervisor.submit_nowait(Task("work", payload)) for payload in ("bad", "good")])
    assert bad.status is TaskStatus.CANCELLED
    assert bad.error == "its handler was cancelled, and not by its supervisor"
    assert good.success


@virtual
async def test_an_exception_that_cannot_be_shown_still_ends_its_task() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(error=UnprintableError()), task_types=["work"])
        result = await supervisor.submit_nowait(Task("work"))
    assert result.error == "UnprintableError: (its message cannot be shown)"


@virtual
async def test_an_exception_that_cannot_be_looked_at_ends_its_own_task_and_no_other() -> None:
    class HidingError(Exception):
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise SystemExit(5)

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=raising(HidingError(), in_thread=False), task_types=["work"]
        )
        tickets = [supervisor.submit_nowait(Task("work", payload)) for payload in ("bad", "good")]
        bad, good = await results(tickets)
        assert (bad.status, bad.error) == (TaskStatus.FAILED, "HidingError")
        assert good.result == "good"
        assert worker.current_tasks == 0


@virtual
async def test_an_overloaded_raised_inside_a_handler_is_passed_on_unchanged() -> None:
    async with BackpressureSupervisor() as supervisor:
        overload = Overloaded("the well is dry", limited_by="well", load=1.0, retry_after=3.0)
        supervisor.register_worker("worker", handler=Agent(error=overload), task_types=["work"])
        with pytest.raises(Overloaded) as caught:
            await supervisor.run(Task("work"))
    error = caught.value
    assert (error.reason, error.limited_by, error.load, error.retry_after) == ("the well is dry", "well", 1.0, 3.0)
    assert error.__cause__ is overload


# --- timeouts and zombies --------------------------------------------------------------------------------------------


@virtual
async def test_a_tasks_own_timeout_goes_before_the_workers() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(100.0), task_types=["work"], timeout=5.0, max_concurrent=3)
        shorter, longer, workers = (supervisor.submit_nowait(Task("work", timeout=t)) for t in (2.0, 8.0, None))
        ends = {}
        for name, ticket in (("shorter", shorter), ("workers", workers), ("longer", longer)):
            result = await ticket
            ends[name] = now()
            assert result.status is TaskStatus.TIMED_OUT
    assert ends == {"shorter": approximately(2.0), "workers": approximately(5.0), "longer": approximately(8.0)}


@virtual
async def test_a_timeout_counts_running_and_not_waiting() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(3.0), task_types=["work"])
        tickets = flood(supervisor, "work", 4, timeout=4.0)
        assert all(result.success for result in await results(tickets))


@virtual
async def test_a_handler_that_stops_at_its_timeout_returns_its_slot_at_once() -> None:
    agent = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        first, _second = flood(supervisor, "work", 2, timeout=2.0)
        assert (await first).status is TaskStatus.TIMED_OUT
        await run_ready()
        assert agent.started == [0, 1]
        assert supervisor.statistics().zombies == 0


@virtual
async def test_a_handler_that_has_stopped_is_not_called_a_zombie_later() -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        assert (await supervisor.submit_nowait(Task("work", timeout=2.0))).status is TaskStatus.TIMED_OUT
        await asyncio.sleep(5.0)
        assert supervisor.statistics().zombies == 0


@virtual
async def test_a_zombie_keeps_its_slot_and_counts_in_the_load_until_it_really_ends() -> None:
    async with BackpressureSupervisor(max_queue_size=9) as supervisor:
        worker = supervisor.register_worker("worker", handler=UncancellableHandler(4.0), task_types=["work"])
        first, second = flood(supervisor, "work", 2, timeout=1.0)
        assert (await first).status is TaskStatus.TIMED_OUT
        assert now() == approximately(1.0)
        assert worker.current_tasks == 1
        assert worker.state is WorkerState.OVERLOADED
        assert supervisor.system_load() == 2 / 10
        await asyncio.sleep(2.9)
        assert second.status is TaskStatus.WAITING
        await asyncio.sleep(0.2)
        assert second.status.value == "running"


@virtual
async def test_a_zombie_is_reported_when_it_is_found_and_when_it_ends() -> None:
    events: list[Any] = []
    async with BackpressureSupervisor(zombie_grace=3.0, on_event=events.append) as supervisor:
        supervisor.register_worker("worker", handler=UncancellableHandler(20.0), task_types=["work"], max_concurrent=2)
        await supervisor.submit_nowait(Task("work", timeout=2.0, task_id="z"))
        await asyncio.sleep(30.0)
        assert supervisor.statistics().zombies == 1
        assert supervisor.workers["worker"].current_tasks == 0
    (found,) = (event for event in events if isinstance(event, ZombieFound))
    (ended,) = (event for event in events if isinstance(event, ZombieEnded))
    assert (found.task_id, found.worker_id, found.at) == ("z", "worker", approximately(5.0))
    assert (ended.task_id, ended.after) == ("z", approximately(18.0))


@virtual
async def test_a_zombie_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        supervisor.register_worker("worker", handler=UncancellableHandler(20.0), task_types=["work"])
        await supervisor.submit_nowait(Task("work", "a secret", timeout=2.0, task_id="z"))
        await asyncio.sleep(2.0)
    assert "task 'z' has ended, but its handler on worker 'worker' did not stop" in caplog.text
    assert "a secret" not in caplog.text


@virtual
async def test_what_a_zombie_returns_changes_nothing() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=UncancellableHandler(20.0), task_types=["work"])
        ticket = supervisor.submit_nowait(Task("work", timeout=2.0))
        result = await ticket
        await asyncio.sleep(30.0)
        assert await ticket is result
        assert supervisor.statistics().succeeded == 0


@virtual
async def test_a_worker_whose_every_slot_a_zombie_holds_is_failed_until_they_end() -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=UncancellableHandler(60.0), task_types=["work"], max_concurrent=2, reset_timeout=5.0
        )
        await results(flood(supervisor, "work", 2, timeout=2.0))
        await asyncio.sleep(1.5)
        assert worker.state is WorkerState.FAILED
        ticket = supervisor.submit_nowait(Task("work"))
        assert ticket.reason == "every worker for 'work' is FAILED"
        await asyncio.sleep(90.0)
        assert worker.current_tasks == 0
        assert supervisor.submit_nowait(Task("work"))


@virtual
async def test_a_plain_callable_that_outlives_its_timeout_holds_its_slot_until_it_returns() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=lambda _: "late", task_types=["work"])
        # in virtual time a thread takes between 0.1 and 5 ms
        result = await supervisor.submit_nowait(Task("work", timeout=1e-5))
        assert result.status is TaskStatus.TIMED_OUT
        assert worker.current_tasks == 1
        await asyncio.sleep(0.01)
        assert worker.current_tasks == 0


@virtual
async def test_on_cancel_is_called_once_with_the_task_that_is_to_stop() -> None:
    stop = asyncio.Event()
    asked: list[str] = []

    async def ignores_cancellation(_: Task) -> None:
        while not stop.is_set():
            try:
                await stop.wait()
            except asyncio.CancelledError:
                continue

    def on_cancel(task: Task) -> None:
        asked.append(task.task_id)
        stop.set()

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=ignores_cancellation, task_types=["work"], on_cancel=on_cancel
        )
        result = await supervisor.submit_nowait(Task("work", task_id="t1", timeout=2.0))
        await run_ready()
        assert worker.current_tasks == 0
    assert asked == ["t1"]
    assert result.status is TaskStatus.TIMED_OUT


@virtual
async def test_on_cancel_may_be_async() -> None:
    stop = asyncio.Event()

    async def ignores_cancellation(_: Task) -> None:
        while not stop.is_set():
            try:
                await stop.wait()
            except asyncio.CancelledError:
                continue

    async def on_cancel(_: Task) -> None:
        await asyncio.sleep(1.0)
        stop.set()

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=ignores_cancellation, task_types=["work"], on_cancel=on_cancel
        )
        await supervisor.submit_nowait(Task("work", timeout=2.0))
        await asyncio.sleep(1.1)
        assert worker.current_tasks == 0


@pytest.mark.parametrize("asynchronous", [False, True])
@virtual
async def test_an_on_cancel_that_fails_does_not_keep_the_run_from_being_stopped(
    *, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Task) -> None:
        raise ValueError

    async def fails_later(_: Task) -> None:
        raise ValueError

    agent = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        on_cancel = fails_later if asynchronous else fails
        supervisor.register_worker("worker", handler=agent, task_types=["work"], on_cancel=on_cancel)
        await supervisor.submit_nowait(Task("work", timeout=2.0))
        await run_ready()
        assert agent.running == 0
    assert "ValueError" in caplog.text


@virtual
async def test_a_handler_that_returns_in_spite_of_its_cancellation_is_still_timed_out() -> None:
    async def swallows(_: Task) -> str:
        try:
            await asyncio.sleep(10.0)
        except asyncio.CancelledError:
            return "too late"
        return "in time"

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=swallows, task_types=["work"])
        result = await supervisor.submit_nowait(Task("work", timeout=2.0))
        await run_ready()
        assert worker.current_tasks == 0
    assert result.status is TaskStatus.TIMED_OUT
    assert result.result is None


# --- cancelling ------------------------------------------------------------------------------------------------------


@virtual
async def test_cancelling_a_waiting_task_removes_it_from_the_queue_at_once() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        first, second, third = flood(supervisor, "work", 3)
        assert second.cancel("no longer wanted")
        assert second.done()
        assert supervisor.statistics().waiting == 1
        result = await second
        await results([first, third])
    assert (result.status, result.error, result.worker_id) == (TaskStatus.CANCELLED, "no longer wanted", None)
    assert agent.started == [0, 2]


@virtual
async def test_cancelling_a_running_task_ends_it_at_once_and_stops_its_handler() -> None:
    agent = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        await asyncio.sleep(1.0)
        assert ticket.cancel()
        assert ticket.status is TaskStatus.CANCELLED
        result = await ticket
        assert now() == approximately(1.0)
        await run_ready()
        assert agent.running == 0
    assert (result.worker_id, result.duration_ms) == ("worker", approximately(1000.0))


@virtual
async def test_cancelling_before_the_handlers_first_step_means_that_it_takes_none() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        ticket.cancel()
        await run_ready()
        assert worker.current_tasks == 0
    assert agent.started == []


@virtual
async def test_cancelling_an_ended_or_rejected_task_returns_false() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        ended, rejected = flood(supervisor, "work", 2)
        await ended
        assert not ended.cancel()
        assert not rejected.cancel()
        assert ended.status is TaskStatus.SUCCEEDED


@virtual
async def test_cancelling_twice_is_cancelling_once() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=UncancellableHandler(9.0), task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        await run_ready()
        assert ticket.cancel("first")
        assert not ticket.cancel("second")
        assert (await ticket).error == "first"
        await asyncio.sleep(20.0)
        assert supervisor.statistics().cancelled == 1


@virtual
async def test_a_task_cancelled_the_moment_it_starts_runs_no_further() -> None:
    agent = Agent(10.0)

    def sink(event: Any) -> None:
        if event.kind == "started":
            supervisor.ticket(event.task_id).cancel()

    supervisor = BackpressureSupervisor(on_event=sink)
    async with supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        await run_ready()
        assert ticket.status is TaskStatus.CANCELLED
        assert worker.current_tasks == 0
    assert agent.started == []


# --- contexts --------------------------------------------------------------------------------------------------------

note: contextvars.ContextVar[str] = contextvars.ContextVar("note", default="blank")


@pytest.mark.parametrize("in_thread", [False, True], ids=["async", "thread"])
@virtual
async def test_what_a_task_writes_into_its_context_no_other_task_reads(*, in_thread: bool) -> None:
    def write_context(task: Task) -> str:
        before = note.get()
        note.set(task.payload)
        return before

    async def write_context_async(task: Task) -> str:
        return write_context(task)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker(
            "worker", handler=write_context if in_thread else write_context_async, task_types=["work"]
        )
        tickets = [supervisor.submit_nowait(Task("work", name)) for name in "abc"]
        assert [result.result for result in await results(tickets)] == ["blank"] * 3
        assert note.get() == "blank"


@virtual
async def test_the_context_in_which_the_supervisor_was_started_reaches_every_task() -> None:
    token = note.set("of the supervisor")
    try:
        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("worker", handler=lambda _: note.get(), task_types=["work"])
            assert await supervisor.run(Task("work")) == "of the supervisor"
    finally:
        note.reset(token)


@virtual
async def test_progress_outside_of_a_task_does_nothing() -> None:
    progress("no listener")


# --- payloads --------------------------------------------------------------------------------------------------------


@virtual
async def test_no_message_about_a_task_contains_its_payload(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "forebay")
    secret = "sk-very-secret"  # noqa: S105 - a word to look for
    events: list[Any] = []
    messages: list[object] = []
    async with BackpressureSupervisor(
        overflow="memory://?bound=2", max_queue_size=2, zombie_grace=0.5, on_event=events.append
    ) as supervisor:
        supervisor.register_worker(
            "fails", handler=Agent(error=ValueError()), task_types=["fail"], max_concurrent=9, reset_timeout=1.0
        )
        supervisor.register_worker("ignores_cancellation", handler=UncancellableHandler(5.0), task_types=["hang"])
        tickets = [await supervisor.submit(Task("fail", {"key": secret})) for _ in range(20)]
        tickets += [await supervisor.submit(Task("hang", {"key": secret}, timeout=1.0)) for _ in range(3)]
        messages += [repr(ticket) for ticket in tickets] + [repr(ticket.task) for ticket in tickets]
        messages += [ticket.reason for ticket in tickets]
        messages += [str(await ticket) for ticket in tickets if ticket]
        messages += [str(ticket.refusal()) for ticket in tickets if not ticket]
        messages += [repr(supervisor.workers), str(supervisor.statistics())]
    messages += [str(event) for event in events]
    assert len(messages) > 50
    assert secret not in f"{messages}{caplog.text}"


@pytest.mark.parametrize("attempts", [1, 3])
@virtual
async def test_handlers_that_do_not_stop_while_they_wait_for_sub_tasks_take_the_next_slots(attempts: int) -> None:
    at_work = peak = 0
    supervisor = BackpressureSupervisor()

    async def parent(_: Task) -> None:
        nonlocal at_work, peak
        for _attempt in range(attempts):
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor.run(Task("child"))
        at_work += 1
        peak = max(peak, at_work)
        await asyncio.sleep(100.0)
        at_work -= 1

    supervisor.register_worker("parent", handler=parent, task_types=["parent"], max_concurrent=1)
    supervisor.register_worker("child", handler=Agent(60.0), task_types=["child"], max_concurrent=100)
    async with supervisor:
        for _ in range(20):
            ticket = supervisor.submit_nowait(Task("parent"))
            await asyncio.sleep(0.02)
            ticket.cancel()
        await asyncio.sleep(1.0)
        assert supervisor.workers["parent"].current_tasks == 1
        await asyncio.sleep(1_000.0)
        assert 1 <= peak <= 2  # the second one had begun when the first did not stop
        assert (at_work, supervisor.workers["parent"].current_tasks) == (0, 0)
        assert await supervisor.submit(Task("parent"))
