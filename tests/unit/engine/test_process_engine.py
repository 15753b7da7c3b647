"""The process engine: how processes are started, reused and ended, and what happens to a task whose process dies."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from tests.contract import engine_handlers
from tests.contract.engine_handlers import plain
from tests.contract.test_engines import TIMEOUT, children, descriptors, over
from tests.support.scripted_life import ScriptedLife

from forebay import BackpressureSupervisor, Task, TaskResult, TaskStatus, WorkerAgent, WorkerState, progress
from forebay.engine import ProcessEngine, ThreadEngine, child_process
from forebay.engine.orphan_reaper import orphan_reaper
from forebay.errors import InvalidHandler, InvalidSetting, NotImportable, ProcessNotStarted, RemoteError, WorkerDied
from forebay.events import WorkerRestarted
from forebay.simulation import simulate

ENGINE = ProcessEngine(grace=0.2)


@pytest.fixture(autouse=True)
async def hurry() -> AsyncIterator[None]:
    async with asyncio.timeout(2 * TIMEOUT):
        yield


@pytest.fixture
async def supervisor() -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor(backpressure_threshold=1.0, max_queue_size=1000) as running:
        yield running
    assert children() == []


def register(supervisor: BackpressureSupervisor, handler: Any = plain, **settings: Any) -> WorkerAgent:
    settings = {"engine": ENGINE, "reset_timeout": None, **settings}
    return supervisor.register_worker("worker", handler=handler, task_types=["worker"], **settings)


async def ended(supervisor: BackpressureSupervisor, *payload: Any) -> TaskResult:
    return await (await supervisor.submit(Task("worker", list(payload))))


async def pid_of(supervisor: BackpressureSupervisor) -> int:
    pid: int = await supervisor.run(Task("worker", ["where"]))
    return pid


# --- handlers of these tests -----------------------------------------------------------------------------------------


def channel() -> Any:
    """Return the process's own channel to its supervisor, which no handler should know."""
    runtime = next(thing for thing in gc.get_objects() if type(thing).__name__ == "ChildRuntime")
    return runtime._channel


def sleep_a_little(_: Task) -> list[int]:
    """Return the process's id, after long enough that another task needs another process."""
    time.sleep(0.3)  # noqa: TID251 - a handler that takes its time, in a process of its own
    return [os.getpid(), 0]


def send_garbage(task: Task) -> None:
    """Send bytes on the channel that are not a message, then hang."""
    channel().sendall(task.payload)
    signal.pause()


def die_in_the_middle(_: Task) -> None:
    """Die while a message is half written."""
    channel().sendall(struct.pack(">I", 1000) + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def disconnect(_: Task) -> None:
    """Close the channel, and hang."""
    channel().shutdown(socket.SHUT_WR)
    signal.pause()


def misbehave(task: Task) -> Any:
    """Do what the payload says: end well, raise, or die in one of several ways."""
    match task.payload % 20:
        case 1:
            os._exit(3)
        case 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 5:
            raise ValueError(task.payload)
    return task.payload


def outer() -> Callable[[Task], None]:
    def inner(_: Task) -> None:
        """Is defined inside of a function."""

    return inner


def configured(task: Task) -> dict[str, Any]:
    return {"configurable": {"thread_id": task.task_id}}


# --- the life of a process -------------------------------------------------------------------------------------------


async def test_a_process_is_reused_and_no_other_is_started(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, max_concurrent=4)
    assert len({await pid_of(supervisor) for _ in range(20)}) == 1


async def test_a_process_is_replaced_after_max_tasks(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, engine=ProcessEngine(max_tasks=2))
    pids = [await pid_of(supervisor) for _ in range(6)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 2]


async def test_a_worker_that_is_resized_has_as_many_processes(supervisor: BackpressureSupervisor) -> None:
    async def pids(count: int) -> set[int]:
        return {pid for pid, _ in await asyncio.gather(*(supervisor.run(slow_task()) for _ in range(count)))}

    def slow_task() -> Task:
        return Task("worker", None)

    worker = register(supervisor, handler=sleep_a_little)
    assert len(await pids(3)) == 1
    worker.resize(3)
    started = await pids(3)
    assert len(started) == 3
    worker.resize(1)
    (left,) = await pids(3)
    for pid in started - {left}:
        await over(pid)


async def test_a_worker_that_is_restarted_has_processes_again(supervisor: BackpressureSupervisor) -> None:
    life = ScriptedLife()
    register(supervisor, start=life.start)
    before = await pid_of(supervisor)
    async with supervisor.events() as events:
        life.crash()
        async for event in events:
            if isinstance(event, WorkerRestarted):
                break
    assert await pid_of(supervisor) != before
    await over(before)


async def test_an_idle_process_is_ended(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, engine=ProcessEngine(idle_timeout=0.01))
    first = await pid_of(supervisor)
    await over(first)
    assert await pid_of(supervisor) != first


async def test_an_idle_process_that_dies_is_replaced(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    first = await pid_of(supervisor)
    os.kill(first, signal.SIGKILL)
    await over(first)
    result = await ended(supervisor, "where")
    assert result.success or isinstance(result.cause, WorkerDied)  # its death may not have been noticed yet
    assert await pid_of(supervisor) != first


async def test_a_signal_to_the_whole_service_does_not_end_a_run(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    pid = await pid_of(supervisor)
    result = await ended(supervisor, "signal", int(signal.SIGTERM))
    assert result.success
    assert await pid_of(supervisor) == pid


async def test_a_process_does_not_get_the_interrupt_of_the_terminal(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    pid = await pid_of(supervisor)
    assert os.getsid(pid) == os.getpgid(pid) == pid


# --- its death -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "how"),
    [
        (("exit", 3), "it exited with code 3"),
        (("exit", 0), "it exited with code 0"),
        (("signal", int(signal.SIGSEGV)), "it was ended by SIGSEGV"),
        (("signal", int(signal.SIGKILL)), "it was ended by SIGKILL. If nobody killed it, the system may have run out"),
    ],
)
async def test_a_task_whose_process_dies_fails_and_says_how_it_died(
    supervisor: BackpressureSupervisor, payload: tuple[Any, ...], how: str
) -> None:
    register(supervisor)
    pid = await pid_of(supervisor)
    result = await ended(supervisor, *payload)
    assert result.status is TaskStatus.FAILED
    assert isinstance(result.cause, WorkerDied)
    assert (result.cause.pid, result.cause.worker, result.cause.task_id) == (pid, "worker", result.task_id)
    assert how in str(result.cause)
    assert await pid_of(supervisor) != pid


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        (struct.pack(">I", 3) + b"\xff\xff\xff", "it sent an invalid message"),
        (struct.pack(">I", 4) + b"\x93\xa4evil"[:4], "it sent an invalid message"),
        (b"GET / HTTP/1.1\r\n", "a message of 1195725856 bytes was announced"),
    ],
)
async def test_a_process_that_sends_an_invalid_message_is_killed(
    supervisor: BackpressureSupervisor, sent: bytes, what: str
) -> None:
    register(supervisor, send_garbage)
    result = await (await supervisor.submit(Task("worker", sent)))
    assert isinstance(result.cause, WorkerDied)
    assert what in str(result.cause)


async def test_a_process_that_dies_in_the_middle_of_a_message_is_reported_as_dead(
    supervisor: BackpressureSupervisor,
) -> None:
    register(supervisor, die_in_the_middle)
    assert isinstance((await ended(supervisor)).cause, WorkerDied)


async def test_a_process_that_closes_its_channel_is_killed(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, disconnect)
    assert isinstance((await ended(supervisor)).cause, WorkerDied)


async def test_what_a_process_has_started_is_not_listed_in_the_event_loop(
    supervisor: BackpressureSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed_by: set[threading.Thread] = set()

    def descendants(_: int) -> list[int]:
        listed_by.add(threading.current_thread())
        return []

    monkeypatch.setattr(child_process, "descendants", descendants)
    register(supervisor, send_garbage)
    result = await (await supervisor.submit(Task("worker", b"GET / HTTP/1.1\r\n")))
    assert isinstance(result.cause, WorkerDied)
    assert listed_by
    assert threading.current_thread() not in listed_by


async def test_output_of_a_handler_does_not_disturb_the_channel(
    supervisor: BackpressureSupervisor, capfd: pytest.CaptureFixture[str]
) -> None:
    register(supervisor)
    assert (await ended(supervisor, "print", "\x00\x01 garbage\n")).success
    assert capfd.readouterr().out == "\x00\x01 garbage\n"


async def test_a_fork_made_by_a_handler_ends_where_the_handler_ends(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    assert (await ended(supervisor, "fork")).result == 0
    assert (await ended(supervisor, "echo", 1)).result == 1


async def test_a_progress_value_that_cannot_be_sent_is_dropped_and_the_run_goes_on(
    supervisor: BackpressureSupervisor, capfd: pytest.CaptureFixture[str]
) -> None:
    register(supervisor, f"{__name__}:report_an_object")
    ticket = await supervisor.submit(Task("worker"))
    values = [event.value async for event in ticket.events() if event.kind == "progress"]  # type: ignore[attr-defined]
    assert values == ["sent"]
    assert capfd.readouterr().err.count("a progress value that cannot be sent to the supervisor's process") == 1


def report_an_object(_: Task) -> None:
    progress(object())
    progress(object())
    progress("sent")


@pytest.mark.slow
async def test_tasks_over_four_processes_that_crash_all_end() -> None:
    before = descriptors()
    async with BackpressureSupervisor(backpressure_threshold=1.0, max_queue_size=300) as supervisor:
        worker = register(supervisor, misbehave, max_concurrent=4)
        tickets = []
        for number in range(60):  # six crashes, each with a new process, which is what takes the time
            worker.revive()
            tickets.append(await supervisor.submit(Task("worker", number)))
        for number, ticket in enumerate(tickets):
            result = await ticket
            worker.revive()
            assert ticket.task.payload == number
            match number % 20:
                case 1 | 3:
                    assert isinstance(result.cause, WorkerDied)
                case 5:
                    assert isinstance(result.cause, RemoteError)
                    assert result.error == f"ValueError: {number}"
                case _:
                    assert result.result == number
    assert children() == []
    assert descriptors() <= before


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (lambda _: None, "is a lambda: it has no name"),
        (outer(), "it is defined inside a function"),
        (partial(plain), "only functions and classes have an import path"),
        (engine_handlers.StatefulAgent(), "is a StatefulAgent: only functions and classes have an import path"),
        ("engine_handlers", "not of the form"),
    ],
)
def test_a_handler_that_no_process_could_import_is_rejected_at_registration(handler: Any, why: str) -> None:
    with pytest.raises(NotImportable) as caught:
        register(BackpressureSupervisor(), handler)
    assert why in str(caught.value)
    assert "or its import path" in str(caught.value) or "the import path of it" in str(caught.value)


def test_a_function_hidden_by_a_decorator_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_handlers, "plain", lambda _: None)
    with pytest.raises(NotImportable, match="is another object"):
        register(BackpressureSupervisor(), plain)


def test_a_handler_that_cannot_take_a_task_is_rejected_as_by_other_engines() -> None:
    for handler in (outer, None, 7):
        with pytest.raises(InvalidHandler):
            register(BackpressureSupervisor(), handler)
    with pytest.raises(InvalidHandler):
        register(BackpressureSupervisor(), None, factory=7)


@pytest.mark.parametrize("engine", ["fork", 7, ProcessEngine, ThreadEngine, object()])
def test_an_invalid_engine_is_rejected(engine: Any) -> None:
    with pytest.raises(InvalidSetting, match='"process"'):
        register(BackpressureSupervisor(), engine=engine)


@pytest.mark.parametrize(
    "setting",
    [
        {"grace": 0}, {"grace": "1"}, {"grace": float("inf")}, {"idle_timeout": 0}, {"start_timeout": -1},
        {"max_tasks": 0}, {"max_tasks": True}, {"max_message_bytes": 0}, {"max_message_bytes": 2**31},
    ],
    ids=str,
)  # fmt: skip
def test_an_invalid_setting_is_rejected(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=f"ProcessEngine was given {next(iter(setting))}"):
        ProcessEngine(**setting)


async def test_a_nested_supervisor_is_rejected_outside_its_own_loop() -> None:
    for engine in ("thread", "process"):
        with pytest.raises((InvalidSetting, NotImportable)):
            register(BackpressureSupervisor(), BackpressureSupervisor(), engine=engine)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no.such.module:handler", "No module named 'no'"),
        ("tests.contract.engine_handlers:nobody", "has no attribute 'nobody'"),
        ("tests.unit.engine.breaks_at_import:handler", "ZeroDivisionError: division by zero"),
        ("tests.contract.engine_handlers:ERRORS", "a handler of type dict"),
    ],
)
async def test_a_handler_that_cannot_be_loaded_fails_the_start_of_the_supervisor(path: str, why: str) -> None:
    supervisor = BackpressureSupervisor()
    register(supervisor, path)
    with pytest.raises(ProcessNotStarted, match="could not be started") as caught:
        await supervisor.start()
    assert why in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]
    assert children() == []


async def test_a_handler_that_takes_too_long_to_load_is_abandoned() -> None:
    supervisor = BackpressureSupervisor()
    register(supervisor, "tests.unit.engine.hangs_at_import:handler", engine=ProcessEngine(start_timeout=0.5))
    with pytest.raises(ProcessNotStarted, match=r"not loaded its handler after 500 ms"):
        await supervisor.start()
    assert children() == []


async def test_a_process_that_does_not_start_fails_the_tasks_that_wait_for_it(
    supervisor: BackpressureSupervisor,
) -> None:
    worker = register(supervisor, "no.such.module:handler")
    for result in await asyncio.gather(*(ended(supervisor, "echo", 1) for _ in range(3))):
        assert isinstance(result.cause, ProcessNotStarted)
        assert "No module named 'no'" in str(result.cause)
    assert worker.state is WorkerState.FAILED


@pytest.mark.parametrize("fails", [1, 2], ids=["the process", "the orphan reaper"])
async def test_a_start_that_the_system_refuses_fails_the_task_and_the_next_one_tries_again(
    supervisor: BackpressureSupervisor, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    popen, started = subprocess.Popen, itertools.count(1)

    def fail(*args: Any, **options: Any) -> Any:
        if next(started) == fails:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return popen(*args, **options)

    before = descriptors()
    register(supervisor, engine=ProcessEngine(idle_timeout=0.001))
    await over(await pid_of(supervisor))  # the one that was started with the worker
    await asyncio.get_running_loop().run_in_executor(None, wait_for_the_end_of_the_reaper)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", fail)
        result = await ended(supervisor, "echo", 1)
        assert isinstance(result.cause, ProcessNotStarted)
        assert "the system refused: [Errno 11]" in str(result.cause)
        assert children() == []
        assert descriptors() <= before
        assert (await ended(supervisor, "echo", 1)).result == 1


def wait_for_the_end_of_the_reaper() -> None:
    """Wait until the reaper has ended, which it does when the last process has been reaped."""
    while orphan_reaper._process is not None:
        threading.Event().wait(0.001)


async def test_an_orphan_reaper_that_was_killed_is_replaced(
    supervisor: BackpressureSupervisor,
) -> None:
    register(supervisor, max_concurrent=2)
    await pid_of(supervisor)
    first = orphan_reaper._process
    assert first is not None
    first.kill()
    first.wait()
    assert isinstance((await ended(supervisor, "exit", 3)).cause, WorkerDied)
    assert (await ended(supervisor, "echo", 1)).result == 1
    assert orphan_reaper._process not in (None, first)


async def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    supervisor = BackpressureSupervisor()
    register(supervisor, "tests.unit.engine.hangs_at_import:handler", engine=ProcessEngine(start_timeout=1.0))
    starting = asyncio.ensure_future(supervisor.start())
    for _ in range(5):  # by then a thread is starting the process
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() == []


def test_there_are_no_processes_in_virtual_time() -> None:
    async def main() -> None:
        supervisor = BackpressureSupervisor()
        register(supervisor)
        with pytest.raises(ProcessNotStarted, match="there are no processes in virtual time"):
            await supervisor.start()

    simulate(main)


@pytest.mark.parametrize("engine", ["loop", "thread"])
def test_in_virtual_time_the_other_engines_run_inline(engine: str) -> None:
    async def main() -> None:
        async with BackpressureSupervisor() as supervisor:
            register(supervisor, engine_handlers.coroutine, engine=engine)
            assert (await ended(supervisor, "echo", 1)).result == 1
            ticket = await supervisor.submit(Task("worker", ["read", "/nowhere"], timeout=60))
            assert (await ticket).status is TaskStatus.FAILED
            waiting = await supervisor.submit(Task("worker", ["wait", os.devnull], timeout=60))
            assert (await waiting).status is TaskStatus.TIMED_OUT

    simulate(main)


def test_a_config_is_sent_if_it_is_plain_data_or_has_an_import_path() -> None:
    graph = "my_agents:graph"
    with pytest.raises(InvalidSetting, match="plain data"):
        register(BackpressureSupervisor(), graph, config={"callbacks": [object()]})
    with pytest.raises(NotImportable, match="its config is a lambda"):
        register(BackpressureSupervisor(), graph, config=lambda _: {})
    register(BackpressureSupervisor(), graph, config={"tags": ["mine"]})
    register(BackpressureSupervisor(), graph, config=configured)
