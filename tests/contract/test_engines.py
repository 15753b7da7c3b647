"""What every engine promises, asked of each with each kind of handler. In real time: processes keep no other."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.contract import engine_handlers
from tests.contract.conftest import ASIDE, KILLS, SHARES, STOPS, EngineCase

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Overloaded,
    Priority,
    Task,
    TaskFailed,
    TaskResult,
    TaskStatus,
    Ticket,
    WorkerAgent,
)
from forebay.errors import NotTransferable, RemoteError
from forebay.events import Event, TaskProgress
from forebay.interfaces import WorkerState

PATIENCE = 30.0  # seconds that nothing here takes
MOMENT = 0.1  # seconds: a timeout that is meant to pass


@pytest.fixture(autouse=True)
async def hurry() -> AsyncIterator[None]:
    """Nothing waits for ever."""
    async with asyncio.timeout(2 * PATIENCE):
        yield


class ProgressListener:
    """Hears the progress of every task, from its beginning: a sink."""

    def __init__(self) -> None:
        self.told: dict[str, list[Any]] = defaultdict(list)
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TaskProgress):
            self.told[event.task_id].append(event.value)
            self._news.set()

    async def began(self, ticket: Ticket) -> Any:
        """Wait until the handler tells that it has begun, by its first progress."""
        while not self.told[ticket.task_id]:
            assert not ticket.done(), ticket.result
            self._news.clear()
            await self._news.wait()
        return self.told[ticket.task_id][0]


@pytest.fixture
def ears() -> ProgressListener:
    return ProgressListener()


@pytest.fixture
async def supervisor(ears: ProgressListener) -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor(zombie_grace=PATIENCE, on_event=ears) as house:
        yield house


@pytest.fixture
def worker(place: EngineCase, supervisor: BackpressureSupervisor) -> WorkerAgent:
    return place.register(supervisor, max_concurrent=2, reset_timeout=None)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Who reads it waits until `release`."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


async def release(fifo: Path, text: str = "go on") -> None:
    """Let one who reads the fifo go on."""
    await asyncio.get_running_loop().run_in_executor(None, fifo.write_text, text)


def work(*payload: Any, **options: Any) -> Task:
    return Task("worker", list(payload), **options)


async def stopped(supervisor: BackpressureSupervisor) -> None:
    """Wait until every handler has really ended, and every slot is free."""
    report = await supervisor.drain()
    assert report.orphans == ()
    assert all(worker.current_tasks == 0 for worker in supervisor.workers.values())


async def over(pid: int) -> None:
    """Wait for the end of a process that is no child of ours."""
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
    """Whether a process runs: a dead one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_a_value_comes_back(supervisor: BackpressureSupervisor) -> None:
    for value in (None, 7, "ü", b"\xff", [1, (2.5,)], {"a": {"b": [True]}}):
        assert await supervisor.run(work("echo", value)) == value


@pytest.mark.usefixtures("worker")
async def test_a_large_value_comes_back(supervisor: BackpressureSupervisor) -> None:
    large = os.urandom(5_000_000)
    assert await supervisor.run(work("echo", large)) == large


@pytest.mark.usefixtures("worker")
async def test_an_object_stays_itself_or_is_refused(supervisor: BackpressureSupervisor, place: EngineCase) -> None:
    thing = object()
    out, back = await ended(supervisor, "echo", thing), await ended(supervisor, "object")
    if SHARES in place.can:
        assert out.result is thing
        assert back.success
        return
    for result in (out, back):
        assert isinstance(result.cause, NotTransferable)
        assert "holds a object" in (result.error or "")
    assert (await ended(supervisor, "echo", 1)).success


async def test_what_is_larger_than_its_bound_is_refused(supervisor: BackpressureSupervisor, place: EngineCase) -> None:
    if SHARES in place.can:
        pytest.skip(f"{place.name} has no bound")
    place.register(supervisor)
    result = await ended(supervisor, "echo", bytes(16_000_001))
    assert isinstance(result.cause, NotTransferable)
    assert "16000000" in str(result.cause)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_an_exception_is_the_cause(supervisor: BackpressureSupervisor, place: EngineCase) -> None:
    with pytest.raises(TaskFailed, match="ValueError: no such river") as caught:
        await supervisor.run(work("raise", "ValueError"))
    cause = caught.value.__cause__
    if SHARES in place.can:
        assert isinstance(cause, ValueError)
    else:
        assert isinstance(cause, RemoteError)
        assert (cause.type, cause.message) == ("ValueError", "no such river")
        assert "in _raise" in cause.traceback
        assert "in _raise" in cause.__notes__[0]


async def test_a_handler_may_raise_anything(
    supervisor: BackpressureSupervisor, worker: WorkerAgent, place: EngineCase
) -> None:
    for kind in engine_handlers.ERRORS:
        worker.revive()
        result = await ended(supervisor, "raise", kind)
        assert result.status is TaskStatus.FAILED
        # A coroutine cannot raise StopIteration: Python itself turns it into a RuntimeError.
        expected = "RuntimeError" if kind == "StopIteration" and place.handler == "coroutine" else kind
        assert (result.error or "").startswith(expected)
        assert (await ended(supervisor, "echo", 1)).result == 1


async def test_an_overload_further_on_is_told_as_one(supervisor: BackpressureSupervisor, worker: WorkerAgent) -> None:
    for _ in range(6):
        with pytest.raises(Overloaded, match="full") as caught:
            await supervisor.run(work("raise", "Overloaded"))
        assert (caught.value.limited_by, caught.value.load, caught.value.retry_after) == ("key", 1.0, 7.0)
    assert worker.state is WorkerState.IDLE


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_a_cancelled_handler_stops(
    supervisor: BackpressureSupervisor, place: EngineCase, tmp_path: Path, ears: ProgressListener
) -> None:
    place.needs(STOPS)
    ticket = await supervisor.submit(work("wait", str(tmp_path / "stopped")))
    await ears.began(ticket)
    assert ticket.cancel()
    assert (await ticket).status is TaskStatus.CANCELLED
    await stopped(supervisor)
    assert (tmp_path / "stopped").exists()


@pytest.mark.usefixtures("worker")
async def test_a_handler_out_of_time_stops(
    supervisor: BackpressureSupervisor, place: EngineCase, tmp_path: Path
) -> None:
    place.needs(STOPS)
    await supervisor.run(work("echo", 1))  # it is there: the timeout is not its start's
    assert (await ended(supervisor, "wait", str(tmp_path / "stopped"), timeout=MOMENT)).status is TaskStatus.TIMED_OUT
    await stopped(supervisor)
    assert (tmp_path / "stopped").exists()


@pytest.mark.usefixtures("worker")
async def test_a_deadline_ends_what_runs(supervisor: BackpressureSupervisor, place: EngineCase, tmp_path: Path) -> None:
    place.needs(STOPS)
    await supervisor.run(work("echo", 1))
    result = await ended(supervisor, "wait", str(tmp_path / "stopped"), deadline=Deadline.within(MOMENT))
    assert result.status is TaskStatus.EXPIRED


async def test_a_handler_that_swallows_its_cancellation_keeps_its_slot_until_it_ends(
    supervisor: BackpressureSupervisor, worker: WorkerAgent, place: EngineCase, fifo: Path, ears: ProgressListener
) -> None:
    ticket = await supervisor.submit(work("stubborn", str(fifo)))
    await ears.began(ticket)
    ticket.cancel()
    assert (await ticket).status is TaskStatus.CANCELLED
    assert worker.current_tasks == 1
    if KILLS not in place.can:
        await release(fifo)
    await stopped(supervisor)


async def test_what_is_stuck_is_killed_and_its_slot_serves_the_next(
    supervisor: BackpressureSupervisor, place: EngineCase
) -> None:
    place.needs(KILLS)
    place.register(supervisor)
    pid = await supervisor.run(work("where"))
    stuck = await supervisor.submit(work("hang", timeout=MOMENT))
    following = await supervisor.submit(work("where"))
    assert (await stuck).status is TaskStatus.TIMED_OUT
    other = (await following).result
    assert pid != other
    assert not is_there(pid)


@pytest.mark.usefixtures("worker")
async def test_what_a_stuck_handler_has_started_is_killed_with_it(
    supervisor: BackpressureSupervisor, place: EngineCase, ears: ProgressListener
) -> None:
    place.needs(KILLS)
    ticket = await supervisor.submit(work("with a child"))
    grandchild = await ears.began(ticket)
    assert is_there(grandchild)
    ticket.cancel()
    await stopped(supervisor)
    await over(grandchild)


@pytest.mark.blocks
async def test_a_handler_that_blocks_holds_up_nobody_else(
    supervisor: BackpressureSupervisor, worker: WorkerAgent, place: EngineCase, fifo: Path, ears: ProgressListener
) -> None:
    place.needs(ASIDE)
    ticket = await supervisor.submit(work("block", str(fifo)))
    await ears.began(ticket)
    assert await supervisor.run(work("echo", 1)) == 1
    assert worker.current_tasks == 1
    await release(fifo)
    assert (await ticket).result == "go on"


@pytest.mark.usefixtures("worker")
async def test_cancelled_before_it_began_nothing_runs(supervisor: BackpressureSupervisor, tmp_path: Path) -> None:
    ticket = supervisor.submit_nowait(work("wait", str(tmp_path / "stopped")))
    ticket.cancel()
    await stopped(supervisor)
    assert not (tmp_path / "stopped").exists()


# --- what a handler sees ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
async def test_progress_comes_in_order_and_before_the_end(supervisor: BackpressureSupervisor) -> None:
    ticket = await supervisor.submit(work("progress", 500))
    kinds, values = [], []
    async for event in ticket.events():
        kinds.append(event.kind)
        if isinstance(event, TaskProgress):
            values.append(event.value)
    assert values == list(range(500))
    assert kinds[-1] == "finished"


@pytest.mark.usefixtures("worker")
async def test_nothing_leaks_from_one_run_to_the_next(supervisor: BackpressureSupervisor) -> None:
    assert [await supervisor.run(work("scribble")) for _ in range(10)] == ["blank"] * 10


@pytest.mark.usefixtures("worker")
async def test_a_handler_knows_its_task(supervisor: BackpressureSupervisor) -> None:
    deadline = Deadline.within(PATIENCE)
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


async def test_a_factory_makes_a_fresh_agent_for_each_task(
    supervisor: BackpressureSupervisor, place: EngineCase
) -> None:
    place.register(supervisor, handler=None, factory=engine_handlers.Talker)
    assert [await supervisor.run(Task("worker", number)) for number in range(3)] == [[0], [1], [2]]


async def test_a_handler_may_be_named_by_its_import_path(supervisor: BackpressureSupervisor, place: EngineCase) -> None:
    place.register(supervisor, handler=f"tests.contract.engine_handlers:{place.handler}")
    assert await supervisor.run(work("echo", 1)) == 1


# --- many ------------------------------------------------------------------------------------------------------------


async def test_as_many_run_at_once_as_there_are_slots(
    supervisor: BackpressureSupervisor, place: EngineCase, tmp_path: Path, ears: ProgressListener
) -> None:
    worker = place.register(supervisor, max_concurrent=3)
    fifos = [tmp_path / f"fifo-{number}" for number in range(3)]
    for fifo in fifos:
        os.mkfifo(fifo)
    tickets = [await supervisor.submit(work("read", str(fifo))) for fifo in fifos]
    for ticket in tickets:
        await ears.began(ticket)
    assert worker.current_tasks == 3
    for fifo in fifos:
        await release(fifo, fifo.name)
    assert [(await ticket).result for ticket in tickets] == [fifo.name for fifo in fifos]


async def test_many_tasks_all_end(place: EngineCase) -> None:
    async with BackpressureSupervisor(backpressure_threshold=1.0, max_queue_size=300) as supervisor:
        place.register(supervisor, max_concurrent=4)
        tickets = [await supervisor.submit(work("echo", number)) for number in range(300)]
        assert [(await ticket).result for ticket in tickets] == list(range(300))


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_draining_lets_a_handler_finish(
    supervisor: BackpressureSupervisor, place: EngineCase, fifo: Path, ears: ProgressListener
) -> None:
    place.register(supervisor)
    ticket = await supervisor.submit(work("read", str(fifo)))
    await ears.began(ticket)
    draining = asyncio.ensure_future(supervisor.drain())
    await release(fifo)
    assert (await draining).finished == 1
    assert (await ticket).result == "go on"


@pytest.mark.usefixtures("worker")
async def test_draining_past_its_limit_stops_a_handler(
    supervisor: BackpressureSupervisor, place: EngineCase, tmp_path: Path, ears: ProgressListener
) -> None:
    place.needs(STOPS)
    ticket = await supervisor.submit(work("wait", str(tmp_path / "stopped")))
    await ears.began(ticket)
    report = await supervisor.drain(timeout=0)
    assert (report.cancelled, report.orphans) == (1, ())
    assert (await ticket).status is TaskStatus.CANCELLED
    assert (tmp_path / "stopped").exists()


async def test_closing_while_handlers_run_ends_them_all(
    place: EngineCase, tmp_path: Path, ears: ProgressListener
) -> None:
    place.needs(STOPS)
    supervisor = BackpressureSupervisor(zombie_grace=PATIENCE, on_event=ears)
    await supervisor.start()
    place.register(supervisor, max_concurrent=3)
    tickets = [await supervisor.submit(work("wait", str(tmp_path / f"stopped-{n}"))) for n in range(3)]
    for ticket in tickets:
        await ears.began(ticket)
    await supervisor.close()
    assert [(await ticket).status for ticket in tickets] == [TaskStatus.CANCELLED] * 3
    assert all((tmp_path / f"stopped-{n}").exists() for n in range(3))


async def test_closing_waits_for_nothing_that_can_be_killed(place: EngineCase, ears: ProgressListener) -> None:
    place.needs(KILLS)
    supervisor = BackpressureSupervisor(zombie_grace=0.01, on_event=ears)
    await supervisor.start()
    place.register(supervisor)
    pid = await supervisor.run(work("where"))
    ticket = await supervisor.submit(work("hang"))
    await ears.began(ticket)
    await supervisor.close()
    assert (await ticket).status is TaskStatus.CANCELLED
    assert not is_there(pid)


async def test_a_house_leaves_neither_processes_nor_descriptors(place: EngineCase) -> None:
    before = descriptors()
    async with BackpressureSupervisor() as supervisor:
        place.register(supervisor, max_concurrent=2)
        for number in range(4):
            await supervisor.run(work("echo", number))
    assert children() == []
    assert descriptors() <= before


def descriptors() -> set[str]:
    """The sockets and pipes that are open here."""
    links = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())  # noqa: PTH115
    return {link for link in links if link.startswith(("socket", "pipe"))}


def children() -> list[str]:
    """What an engine has started and not reaped: by its own session, which no other test's process has."""
    found: list[str] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += (thread / "children").read_text().split()
    return [pid for pid in found if os.getsid(int(pid)) == int(pid)]
