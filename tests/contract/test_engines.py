"""The promises of every engine, with each kind of handler. In real time, because processes have no virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.contract import engine_handlers
from tests.contract.conftest import ISOLATES, KILLS, SHARES, STOPS, EngineCase

from forebay import (
    BackpressureSupervisor,
    CallUsage,
    Deadline,
    Overloaded,
    Priority,
    Retry,
    Task,
    TaskFailed,
    TaskResult,
    TaskStatus,
    Ticket,
    WorkerAgent,
)
from forebay.engine.process_tree import kill_all
from forebay.errors import NotTransferable, RemoteError
from forebay.events import Event, TaskProgress
from forebay.interfaces import WorkerState

TIMEOUT = 30.0  # seconds; nothing here takes as long
SHORT = 0.1  # seconds: a timeout that is meant to pass


@pytest.fixture(autouse=True)
async def hurry() -> AsyncIterator[None]:
    """Bound every test."""
    async with asyncio.timeout(2 * TIMEOUT):
        yield


class ProgressListener:
    """An event sink that keeps the progress of every task."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = defaultdict(list)
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TaskProgress):
            self.values[event.task_id].append(event.value)
            self._changed.set()

    async def began(self, ticket: Ticket) -> Any:
        """Wait for the first progress of a handler, which says that it has begun, and return it."""
        while not self.values[ticket.task_id]:
            assert not ticket.done(), ticket.result
            self._changed.clear()
            await self._changed.wait()
        return self.values[ticket.task_id][0]


@pytest.fixture
def progress() -> ProgressListener:
    return ProgressListener()


@pytest.fixture
async def supervisor(progress: ProgressListener) -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor(zombie_grace=TIMEOUT, on_event=progress) as running:
        yield running


@pytest.fixture
def worker(engine_case: EngineCase, supervisor: BackpressureSupervisor) -> WorkerAgent:
    return engine_case.register(supervisor, max_concurrent=2, reset_timeout=None)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Return a named pipe; a handler that reads it waits until `release`."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


async def release(fifo: Path, text: str = "go on") -> None:
    """Let one reader of the fifo go on."""
    await asyncio.get_running_loop().run_in_executor(None, fifo.write_text, text)


def work(*payload: Any, **options: Any) -> Task:
    return Task("worker", list(payload), **options)


async def stopped(supervisor: BackpressureSupervisor) -> None:
    """Wait until every handler has really ended, and every slot is free."""
    report = await supervisor.drain()
    assert report.orphans == ()
    assert all(worker.current_tasks == 0 for worker in supervisor.workers.values())


async def over(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop.add_reader(watched, gone.set)
    await gone.wait()
    loop.remove_reader(watched)
    os.close(watched)


async def ended(supervisor: BackpressureSupervisor, *payload: Any, **options: Any) -> TaskResult:
    ticket = await supervisor.submit(work(*payload, **options))
    return await ticket


def is_there(pid: int) -> bool:
    """Return whether a process runs; a dead one that is not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_a_value_is_returned(supervisor: BackpressureSupervisor) -> None:
    for value in (None, 7, "ü", b"\xff", [1, (2.5,)], {"a": {"b": [True]}}):
        assert await supervisor.run(work("echo", value)) == value


@pytest.mark.blocks  # a coroutine that waits for a thread
@pytest.mark.usefixtures("worker")
async def test_what_the_calls_of_a_handler_use_is_in_the_result(supervisor: BackpressureSupervisor) -> None:
    first, second, third = [await ended(supervisor, *payload) for payload in (("call", 7), ("echo", 1), ("call", 30))]
    assert (first.usage.calls, first.usage.input_tokens, first.usage.output_tokens) == (1, 5, 7)
    assert second.usage == CallUsage()
    assert third.usage.usd == pytest.approx(0.3)


@pytest.mark.usefixtures("worker")
async def test_a_large_value_is_returned(supervisor: BackpressureSupervisor) -> None:
    large = os.urandom(5_000_000)
    assert await supervisor.run(work("echo", large)) == large


@pytest.mark.usefixtures("worker")
async def test_an_object_stays_itself_or_is_rejected(
    supervisor: BackpressureSupervisor, engine_case: EngineCase
) -> None:
    thing = object()
    out, back = await ended(supervisor, "echo", thing), await ended(supervisor, "object")
    if SHARES in engine_case.can:
        assert out.result is thing
        assert back.success
        return
    for result in (out, back):
        assert isinstance(result.cause, NotTransferable)
        assert "holds a object" in (result.error or "")
    assert (await ended(supervisor, "echo", 1)).success


async def test_a_payload_beyond_the_bound_is_rejected(
    supervisor: BackpressureSupervisor, engine_case: EngineCase
) -> None:
    if SHARES in engine_case.can:
        pytest.skip(f"{engine_case.name} has no bound")
    engine_case.register(supervisor)
    result = await ended(supervisor, "echo", bytes(16_000_001))
    assert isinstance(result.cause, NotTransferable)
    assert "16000000" in str(result.cause)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_an_exception_is_the_cause(supervisor: BackpressureSupervisor, engine_case: EngineCase) -> None:
    with pytest.raises(TaskFailed, match="ValueError: no such river") as caught:
        await supervisor.run(work("raise", "ValueError"))
    cause = caught.value.__cause__
    if SHARES in engine_case.can:
        assert isinstance(cause, ValueError)
    else:
        assert isinstance(cause, RemoteError)
        assert (cause.type, cause.message) == ("ValueError", "no such river")
        assert "in _raise" in cause.traceback
        assert "in _raise" in cause.__notes__[0]


@pytest.mark.usefixtures("worker")
async def test_a_task_that_says_which_errors_to_retry_is_retried(supervisor: BackpressureSupervisor) -> None:
    retry = Retry(max_attempts=3, base_delay=0.001, on=lambda error: "no such river" in str(error))
    result = await ended(supervisor, "raise", "ValueError", retry=retry)
    assert (result.status, result.attempts) == (TaskStatus.FAILED, 3)


async def test_a_handler_may_raise_anything(
    supervisor: BackpressureSupervisor, worker: WorkerAgent, engine_case: EngineCase
) -> None:
    for kind in engine_handlers.ERRORS:
        if kind == "KeyboardInterrupt" and ISOLATES not in engine_case.can:
            continue  # in the supervisor's own loop it is a Ctrl-C, which ends the loop
        worker.revive()
        result = await ended(supervisor, "raise", kind)
        assert result.status is TaskStatus.FAILED
        # A coroutine cannot raise StopIteration: Python itself turns it into a RuntimeError.
        expected = "RuntimeError" if kind == "StopIteration" and engine_case.handler == "coroutine" else kind
        assert (result.error or "").startswith(expected)
        assert (await ended(supervisor, "echo", 1)).result == 1


async def test_hooks_of_a_handler_may_raise_anything(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, progress: ProgressListener, tmp_path: Path
) -> None:
    hostile = f"tests.contract.engine_handlers:hostile_{engine_case.handler}"
    engine_case.register(supervisor, handler=hostile)
    for number in range(2):
        assert (await ended(supervisor, "echo", number)).result == number
        assert (await ended(supervisor, "raise", "UnprintableError")).status is TaskStatus.FAILED
    if STOPS in engine_case.can:
        ticket = await supervisor.submit(work("wait", str(tmp_path / "mark")))
        await progress.began(ticket)
        ticket.cancel()
        assert (await ended(supervisor, "echo", 1)).result == 1  # in the slot of the other, once that has stopped
    await stopped(supervisor)


async def test_an_overload_inside_the_handler_is_raised_as_one(
    supervisor: BackpressureSupervisor, worker: WorkerAgent
) -> None:
    for _ in range(6):
        with pytest.raises(Overloaded, match="full") as caught:
            await supervisor.run(work("raise", "Overloaded"))
        assert (caught.value.limited_by, caught.value.load, caught.value.retry_after) == ("key", 1.0, 7.0)
    assert worker.state is WorkerState.IDLE


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_a_cancelled_handler_stops(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, tmp_path: Path, progress: ProgressListener
) -> None:
    engine_case.needs(STOPS)
    ticket = await supervisor.submit(work("wait", str(tmp_path / "stopped")))
    await progress.began(ticket)
    assert ticket.cancel()
    assert (await ticket).status is TaskStatus.CANCELLED
    await stopped(supervisor)
    assert (tmp_path / "stopped").exists()


@pytest.mark.usefixtures("worker")
async def test_a_handler_out_of_time_stops(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, tmp_path: Path
) -> None:
    engine_case.needs(STOPS)
    await supervisor.run(work("echo", 1))  # its process is started: the timeout does not include that
    assert (await ended(supervisor, "wait", str(tmp_path / "stopped"), timeout=SHORT)).status is TaskStatus.TIMED_OUT
    await stopped(supervisor)
    assert (tmp_path / "stopped").exists()


@pytest.mark.usefixtures("worker")
async def test_a_deadline_ends_a_running_handler(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, tmp_path: Path
) -> None:
    engine_case.needs(STOPS)
    await supervisor.run(work("echo", 1))
    result = await ended(supervisor, "wait", str(tmp_path / "stopped"), deadline=Deadline.within(SHORT))
    assert result.status is TaskStatus.EXPIRED


async def test_a_handler_that_swallows_its_cancellation_keeps_its_slot_until_it_ends(
    supervisor: BackpressureSupervisor,
    worker: WorkerAgent,
    engine_case: EngineCase,
    fifo: Path,
    progress: ProgressListener,
) -> None:
    ticket = await supervisor.submit(work("stubborn", str(fifo)))
    await progress.began(ticket)
    ticket.cancel()
    assert (await ticket).status is TaskStatus.CANCELLED
    assert worker.current_tasks == 1
    if KILLS not in engine_case.can:
        await release(fifo)
    await stopped(supervisor)


async def test_a_stuck_handler_is_killed_and_its_slot_serves_the_next_task(
    supervisor: BackpressureSupervisor, engine_case: EngineCase
) -> None:
    engine_case.needs(KILLS)
    engine_case.register(supervisor)
    pid = await supervisor.run(work("where"))
    stuck = await supervisor.submit(work("hang", timeout=SHORT))
    following = await supervisor.submit(work("where"))
    assert (await stuck).status is TaskStatus.TIMED_OUT
    other = (await following).result
    assert pid != other
    assert not is_there(pid)


@pytest.mark.usefixtures("worker")
async def test_a_process_that_a_stuck_handler_has_started_is_killed_with_it(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, progress: ProgressListener
) -> None:
    engine_case.needs(KILLS)
    ticket = await supervisor.submit(work("with a child"))
    grandchild = await progress.began(ticket)
    assert is_there(grandchild)
    ticket.cancel()
    await stopped(supervisor)
    await over(grandchild)


@pytest.mark.usefixtures("worker")
@pytest.mark.skipif(sys.platform != "linux", reason="strangers are found by /proc")
@pytest.mark.parametrize("end", ["timeout", "exit"])
async def test_processes_in_sessions_of_their_own_are_killed_with_the_process_that_started_them(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, fifo: Path, progress: ProgressListener, end: str
) -> None:
    engine_case.needs(KILLS)
    ticket = await supervisor.submit(work("with strangers", str(fifo)))
    strangers = await progress.began(ticket)
    try:
        assert all(map(is_there, strangers))
        if end == "timeout":
            ticket.cancel()
        else:
            await release(fifo)
            await ticket
            await supervisor.close()
        await asyncio.gather(*map(over, strangers))
    finally:
        kill_all(strangers)


@pytest.mark.blocks
async def test_a_handler_that_blocks_delays_no_other_task(
    supervisor: BackpressureSupervisor,
    worker: WorkerAgent,
    engine_case: EngineCase,
    fifo: Path,
    progress: ProgressListener,
) -> None:
    engine_case.needs(ISOLATES)
    ticket = await supervisor.submit(work("block", str(fifo)))
    await progress.began(ticket)
    assert await supervisor.run(work("echo", 1)) == 1
    assert worker.current_tasks == 1
    await release(fifo)
    assert (await ticket).result == "go on"


@pytest.mark.usefixtures("worker")
async def test_a_task_cancelled_before_it_began_does_not_run(
    supervisor: BackpressureSupervisor, tmp_path: Path
) -> None:
    ticket = supervisor.submit_nowait(work("wait", str(tmp_path / "stopped")))
    ticket.cancel()
    await stopped(supervisor)
    assert not (tmp_path / "stopped").exists()


# --- the view of a handler -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_progress_arrives_in_order_and_before_the_end(supervisor: BackpressureSupervisor) -> None:
    ticket = await supervisor.submit(work("progress", 500))
    kinds, values = [], []
    async for event in ticket.events():
        kinds.append(event.kind)
        if isinstance(event, TaskProgress):
            values.append(event.value)
    assert values == list(range(500))
    assert kinds[-1] == "finished"


@pytest.mark.usefixtures("worker")
async def test_context_variables_do_not_leak_from_one_run_to_the_next(supervisor: BackpressureSupervisor) -> None:
    assert [await supervisor.run(work("set note")) for _ in range(10)] == ["blank"] * 10


@pytest.mark.usefixtures("worker")
async def test_a_handler_knows_its_task(supervisor: BackpressureSupervisor) -> None:
    deadline = Deadline.within(TIMEOUT)
    seen = await supervisor.run(work("context", task_id="t1", tenant="acme", priority=Priority.HIGH, deadline=deadline))
    assert seen == {
        "task_id": "t1",
        "task_type": "worker",
        "tenant": "acme",
        "priority": "HIGH",
        "attempt": 1,
        "deadline": deadline.at,
    }


@pytest.mark.usefixtures("worker")
async def test_a_handler_may_use_an_event_loop(supervisor: BackpressureSupervisor) -> None:
    assert [await supervisor.run(work("loop")) for _ in range(3)] == ["looped"] * 3


async def test_a_factory_makes_a_new_agent_for_each_task(
    supervisor: BackpressureSupervisor, engine_case: EngineCase
) -> None:
    engine_case.register(supervisor, handler=None, factory=engine_handlers.StatefulAgent)
    assert [await supervisor.run(Task("worker", number)) for number in range(3)] == [[0], [1], [2]]


async def test_a_handler_may_be_named_by_its_import_path(
    supervisor: BackpressureSupervisor, engine_case: EngineCase
) -> None:
    engine_case.register(supervisor, handler=f"tests.contract.engine_handlers:{engine_case.handler}")
    assert await supervisor.run(work("echo", 1)) == 1


# --- many ------------------------------------------------------------------------------------------------------------


async def test_as_many_tasks_run_at_once_as_there_are_slots(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, tmp_path: Path, progress: ProgressListener
) -> None:
    worker = engine_case.register(supervisor, max_concurrent=3)
    fifos = [tmp_path / f"fifo-{number}" for number in range(3)]
    for fifo in fifos:
        os.mkfifo(fifo)
    tickets = [await supervisor.submit(work("read", str(fifo))) for fifo in fifos]
    for ticket in tickets:
        await progress.began(ticket)
    assert worker.current_tasks == 3
    for fifo in fifos:
        await release(fifo, fifo.name)
    assert [(await ticket).result for ticket in tickets] == [fifo.name for fifo in fifos]


async def test_many_tasks_all_end(engine_case: EngineCase) -> None:
    async with BackpressureSupervisor(backpressure_threshold=1.0, max_queue_size=300) as supervisor:
        engine_case.register(supervisor, max_concurrent=4)
        tickets = [await supervisor.submit(work("echo", number)) for number in range(300)]
        assert [(await ticket).result for ticket in tickets] == list(range(300))


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_drain_lets_a_handler_finish(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, fifo: Path, progress: ProgressListener
) -> None:
    engine_case.register(supervisor)
    ticket = await supervisor.submit(work("read", str(fifo)))
    await progress.began(ticket)
    draining = asyncio.ensure_future(supervisor.drain())
    await release(fifo)
    assert (await draining).finished == 1
    assert (await ticket).result == "go on"


@pytest.mark.usefixtures("worker")
async def test_drain_past_its_timeout_cancels_a_handler(
    supervisor: BackpressureSupervisor, engine_case: EngineCase, tmp_path: Path, progress: ProgressListener
) -> None:
    engine_case.needs(STOPS)
    ticket = await supervisor.submit(work("wait", str(tmp_path / "stopped")))
    await progress.began(ticket)
    report = await supervisor.drain(timeout=0)
    assert (report.cancelled, report.orphans) == (1, ())
    assert (await ticket).status is TaskStatus.CANCELLED
    assert (tmp_path / "stopped").exists()


async def test_close_ends_all_running_handlers(
    engine_case: EngineCase, tmp_path: Path, progress: ProgressListener
) -> None:
    engine_case.needs(STOPS)
    supervisor = BackpressureSupervisor(zombie_grace=TIMEOUT, on_event=progress)
    await supervisor.start()
    engine_case.register(supervisor, max_concurrent=3)
    tickets = [await supervisor.submit(work("wait", str(tmp_path / f"stopped-{n}"))) for n in range(3)]
    for ticket in tickets:
        await progress.began(ticket)
    await supervisor.close()
    assert [(await ticket).status for ticket in tickets] == [TaskStatus.CANCELLED] * 3
    assert all((tmp_path / f"stopped-{n}").exists() for n in range(3))


async def test_close_does_not_wait_for_a_handler_that_can_be_killed(
    engine_case: EngineCase, progress: ProgressListener
) -> None:
    engine_case.needs(KILLS)
    supervisor = BackpressureSupervisor(zombie_grace=0.01, on_event=progress)
    await supervisor.start()
    engine_case.register(supervisor)
    pid = await supervisor.run(work("where"))
    ticket = await supervisor.submit(work("hang"))
    await progress.began(ticket)
    await supervisor.close()
    assert (await ticket).status is TaskStatus.CANCELLED
    assert not is_there(pid)


async def test_a_closed_supervisor_leaves_neither_processes_nor_descriptors(engine_case: EngineCase) -> None:
    before = descriptors()
    async with BackpressureSupervisor() as supervisor:
        engine_case.register(supervisor, max_concurrent=2)
        for number in range(4):
            await supervisor.run(work("echo", number))
    assert children() == []
    assert descriptors() <= before


def descriptors() -> set[str]:
    """Return the sockets and pipes that are open in this process."""
    links = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())  # noqa: PTH115
    return {link for link in links if link.startswith(("socket", "pipe"))}


def children() -> list[str]:
    """Return the processes that an engine has started and not reaped: those that lead a session of their own."""
    found: list[str] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended in the meantime
            found += (thread / "children").read_text().split()
    return [pid for pid in found if os.getsid(int(pid)) == int(pid)]
