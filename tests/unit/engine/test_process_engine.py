"""Processes of a worker: how they are started, used again, ended, and what becomes of a task whose process dies."""

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
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from tests.contract import engine_handlers
from tests.contract.engine_handlers import plain
from tests.contract.test_engines import PATIENCE, children, descriptors, over

from forebay import BackpressureSupervisor, Task, TaskResult, TaskStatus, WorkerAgent, progress
from forebay.engine import ProcessEngine, ThreadEngine
from forebay.engine.orphan_reaper import orphan_reaper
from forebay.errors import InvalidHandler, InvalidSetting, NotImportable, ProcessNotStarted, RemoteError, WorkerDied
from forebay.simulation import simulate

ENGINE = ProcessEngine(grace=0.2)


@pytest.fixture(autouse=True)
async def hurry() -> AsyncIterator[None]:
    async with asyncio.timeout(2 * PATIENCE):
        yield


@pytest.fixture
async def supervisor() -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor(backpressure_threshold=1.0, max_queue_size=1000) as house:
        yield house
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


def line() -> Any:
    """The process's own line to its supervisor, as no handler should know it."""
    inside = next(thing for thing in gc.get_objects() if type(thing).__name__ == "Inside")
    return inside._line


def garble(task: Task) -> None:
    """Say on the line what is no message, then hang."""
    line().sendall(task.payload)
    signal.pause()


def die_in_the_middle(_: Task) -> None:
    """Die while a message is half written."""
    line().sendall(struct.pack(">I", 1000) + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def hang_up(_: Task) -> None:
    """Close the line, and stay."""
    line().shutdown(socket.SHUT_WR)
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
        """Stands inside of a function."""

    return inner


def configured(task: Task) -> dict[str, Any]:
    return {"configurable": {"thread_id": task.task_id}}


# --- their life ------------------------------------------------------------------------------------------------------


async def test_a_process_is_used_again_and_no_other_is_started(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, max_concurrent=4)
    assert len({await pid_of(supervisor) for _ in range(20)}) == 1


async def test_a_process_is_replaced_after_so_many_tasks(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, engine=ProcessEngine(max_tasks=2))
    pids = [await pid_of(supervisor) for _ in range(6)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 2]


async def test_an_idle_process_is_ended(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, engine=ProcessEngine(idle_timeout=0.01))
    first = await pid_of(supervisor)
    await over(first)
    assert await pid_of(supervisor) != first


async def test_a_process_that_dies_idle_is_missed_by_nobody(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    first = await pid_of(supervisor)
    os.kill(first, signal.SIGKILL)
    await over(first)
    result = await ended(supervisor, "where")
    assert result.success or isinstance(result.cause, WorkerDied)  # it may have been given the task before the news
    assert await pid_of(supervisor) != first


async def test_a_signal_to_all_of_a_service_does_not_end_what_runs(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    pid = await pid_of(supervisor)
    result = await ended(supervisor, "signal", int(signal.SIGTERM))
    assert result.success
    assert await pid_of(supervisor) == pid


async def test_a_process_does_not_hear_the_terminals_interrupt(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    pid = await pid_of(supervisor)
    assert os.getsid(pid) == os.getpgid(pid) == pid


# --- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "how"),
    [
        (("exit", 3), "it exited with code 3"),
        (("exit", 0), "it exited with code 0"),
        (("signal", int(signal.SIGSEGV)), "it was ended by SIGSEGV"),
        (("signal", int(signal.SIGKILL)), "it was ended by SIGKILL. If nobody ended it, the system may have"),
    ],
)
async def test_a_task_whose_process_dies_fails_and_says_how(
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
    ("said", "what"),
    [
        (struct.pack(">I", 3) + b"\xff\xff\xff", "what is no message"),
        (struct.pack(">I", 4) + b"\x93\xa4evil"[:4], "what is no message"),
        (b"GET / HTTP/1.1\r\n", "a message of 1195725856 bytes was announced"),
    ],
)
async def test_a_process_that_speaks_no_sense_is_killed(
    supervisor: BackpressureSupervisor, said: bytes, what: str
) -> None:
    register(supervisor, garble)
    result = await (await supervisor.submit(Task("worker", said)))
    assert isinstance(result.cause, WorkerDied)
    assert what in str(result.cause)


async def test_a_process_that_dies_in_the_middle_of_a_message_is_dead_and_no_more(
    supervisor: BackpressureSupervisor,
) -> None:
    register(supervisor, die_in_the_middle)
    assert isinstance((await ended(supervisor)).cause, WorkerDied)


async def test_a_process_that_hangs_up_is_killed(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, hang_up)
    assert isinstance((await ended(supervisor)).cause, WorkerDied)


async def test_what_a_handler_prints_does_not_disturb(
    supervisor: BackpressureSupervisor, capfd: pytest.CaptureFixture[str]
) -> None:
    register(supervisor)
    assert (await ended(supervisor, "print", "\x00\x01 garbage\n")).success
    assert capfd.readouterr().out == "\x00\x01 garbage\n"


async def test_the_copy_that_a_handler_forks_ends_where_the_handler_does(supervisor: BackpressureSupervisor) -> None:
    register(supervisor)
    assert (await ended(supervisor, "fork")).result == 0
    assert (await ended(supervisor, "echo", 1)).result == 1


async def test_progress_that_cannot_travel_is_dropped_and_the_run_goes_on(
    supervisor: BackpressureSupervisor, capfd: pytest.CaptureFixture[str]
) -> None:
    register(supervisor, f"{__name__}:tell_an_object")
    ticket = await supervisor.submit(Task("worker"))
    values = [event.value async for event in ticket.events() if event.kind == "progress"]  # type: ignore[attr-defined]
    assert values == ["told"]
    assert capfd.readouterr().err.count("progress that cannot leave its process") == 1


def tell_an_object(_: Task) -> None:
    progress(object())
    progress(object())
    progress("told")


async def test_two_hundred_tasks_over_four_processes_that_crash_all_end() -> None:
    before = descriptors()
    async with BackpressureSupervisor(backpressure_threshold=1.0, max_queue_size=300) as supervisor:
        worker = register(supervisor, misbehave, max_concurrent=4)
        tickets = []
        for number in range(200):
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
        (outer(), "it was made inside of a function"),
        (partial(plain), "only functions and classes know theirs"),
        (engine_handlers.Talker(), "is a Talker: only functions and classes know theirs"),
        ("engine_handlers", "not of the form"),
    ],
)
def test_what_no_process_could_import_is_refused_at_registration(handler: Any, why: str) -> None:
    with pytest.raises(NotImportable) as caught:
        register(BackpressureSupervisor(), handler)
    assert why in str(caught.value)
    assert "or its import path" in str(caught.value) or "the import path of it" in str(caught.value)


def test_what_a_decorator_has_hidden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_handlers, "plain", lambda _: None)
    with pytest.raises(NotImportable, match="is another object"):
        register(BackpressureSupervisor(), plain)


def test_what_cannot_be_called_with_a_task_is_refused_as_everywhere() -> None:
    for handler in (outer, None, 7):
        with pytest.raises(InvalidHandler):
            register(BackpressureSupervisor(), handler)
    with pytest.raises(InvalidHandler):
        register(BackpressureSupervisor(), None, factory=7)


@pytest.mark.parametrize("engine", ["fork", 7, ProcessEngine, ThreadEngine, object()])
def test_an_engine_that_is_none_is_refused(engine: Any) -> None:
    with pytest.raises(InvalidSetting, match='"process"'):
        register(BackpressureSupervisor(), engine=engine)


@pytest.mark.parametrize(
    "setting",
    [
        {"grace": 0}, {"grace": "1"}, {"grace": float("inf")}, {"idle": 0}, {"start_within": -1}, {"max_tasks": 0},
        {"max_tasks": True}, {"max_message_bytes": 0}, {"max_message_bytes": 2**31},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_cannot_be_meant_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=f"ProcessEngine was given {next(iter(setting))}"):
        ProcessEngine(**setting)


async def test_a_supervisor_keeps_to_its_own_loop() -> None:
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
async def test_a_handler_that_cannot_be_loaded_shows_at_the_start(path: str, why: str) -> None:
    supervisor = BackpressureSupervisor()
    register(supervisor, path)
    with pytest.raises(ProcessNotStarted, match="could not be started") as caught:
        await supervisor.start()
    assert why in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]
    assert children() == []


async def test_a_handler_that_takes_too_long_to_load_is_given_up() -> None:
    supervisor = BackpressureSupervisor()
    register(supervisor, "tests.unit.engine.hangs_at_import:handler", engine=ProcessEngine(start_timeout=0.5))
    with pytest.raises(ProcessNotStarted, match=r"not loaded its handler after 0\.5 s"):
        await supervisor.start()
    assert children() == []


async def test_a_process_that_does_not_start_fails_the_task_and_no_other(supervisor: BackpressureSupervisor) -> None:
    register(supervisor, "no.such.module:handler")
    for _ in range(3):
        result = await ended(supervisor, "echo", 1)
        assert isinstance(result.cause, ProcessNotStarted)
        assert "No module named 'no'" in str(result.cause)


@pytest.mark.parametrize("fails", [1, 2], ids=["the process", "what watches over it"])
async def test_what_the_system_refuses_fails_the_task_and_the_next_has_another_try(
    supervisor: BackpressureSupervisor, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    begin, begun = subprocess.Popen, itertools.count(1)

    def refuse(*args: Any, **options: Any) -> Any:
        if next(begun) == fails:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return begin(*args, **options)

    before = descriptors()
    register(supervisor, engine=ProcessEngine(idle_timeout=0.001))
    await over(await pid_of(supervisor))  # the one that was started with the worker
    await asyncio.get_running_loop().run_in_executor(None, until_nobody_is_watched)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        result = await ended(supervisor, "echo", 1)
        assert isinstance(result.cause, ProcessNotStarted)
        assert "the system refused: [Errno 11]" in str(result.cause)
        assert children() == []
        assert descriptors() <= before
        assert (await ended(supervisor, "echo", 1)).result == 1


def until_nobody_is_watched() -> None:
    """Wait for the end of what watches, which comes when the last process has been reaped."""
    while orphan_reaper._process is not None:
        threading.Event().wait(0.001)


async def test_what_watches_over_the_processes_is_replaced_if_somebody_ends_it(
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
    for _ in range(5):  # a thread is at it by then
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() == []


def test_virtual_time_has_no_processes() -> None:
    async def main() -> None:
        supervisor = BackpressureSupervisor()
        register(supervisor)
        with pytest.raises(ProcessNotStarted, match="virtual time has no processes"):
            await supervisor.start()

    simulate(main)


@pytest.mark.parametrize("engine", ["loop", "thread"])
def test_in_virtual_time_the_other_engines_run_in_line(engine: str) -> None:
    async def main() -> None:
        async with BackpressureSupervisor() as supervisor:
            register(supervisor, engine_handlers.coroutine, engine=engine)
            assert (await ended(supervisor, "echo", 1)).result == 1
            ticket = await supervisor.submit(Task("worker", ["read", "/nowhere"], timeout=60))
            assert (await ticket).status is TaskStatus.FAILED
            waiting = await supervisor.submit(Task("worker", ["wait", os.devnull], timeout=60))
            assert (await waiting).status is TaskStatus.TIMED_OUT

    simulate(main)


def test_a_config_goes_along_if_it_is_plain_or_has_a_name() -> None:
    graph = "my_agents:graph"
    with pytest.raises(InvalidSetting, match="plain data"):
        register(BackpressureSupervisor(), graph, config={"callbacks": [object()]})
    with pytest.raises(NotImportable, match="its config is a lambda"):
        register(BackpressureSupervisor(), graph, config=lambda _: {})
    register(BackpressureSupervisor(), graph, config={"tags": ["mine"]})
    register(BackpressureSupervisor(), graph, config=configured)
