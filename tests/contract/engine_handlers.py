"""The handlers of the engine tests: the payload names a behaviour and its arguments. Processes import this module."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebay import Overloaded, Price, Task, Upstream, context, progress
from forebay.adapters import Handler

note: contextvars.ContextVar[str] = contextvars.ContextVar("note", default="blank")
upstream = Upstream("llm", prices={"m": Price(input=0, output=10_000)})


class NotAnException(BaseException):
    """An error that is not an Exception."""


class UnprintableError(Exception):
    """An exception whose message fails."""

    def __str__(self) -> str:
        raise SystemExit(5)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("no such river"),
    "SystemExit": lambda: SystemExit(4),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "NotAnException": lambda: NotAnException("strange"),
    "UnprintableError": UnprintableError,
    "StopIteration": lambda: StopIteration(1),
    "StopAsyncIteration": lambda: StopAsyncIteration(1),
    "TimeoutError": lambda: TimeoutError("mine"),
    "Overloaded": lambda: Overloaded("full", limited_by="key", load=1.0, retry_after=7.0),
}


def plain(task: Task) -> Any:
    """Run the behaviour that the payload names."""
    what, *rest = task.payload
    return {**IMMEDIATE, **PLAIN}[what](*rest)


async def coroutine(task: Task) -> Any:
    """Run the behaviour that the payload names, in a coroutine."""
    await asyncio.sleep(0)
    what, *rest = task.payload
    return IMMEDIATE[what](*rest) if what in IMMEDIATE else await ASYNC[what](*rest)


class HostileHooks:
    """An agent whose hooks, and the message of whose error, raise SystemExit."""

    def __init__(self, call: Callable[[Task], Any]) -> None:
        self._call = call

    def __forebay_handler__(self) -> Handler:
        return Handler(call=self._call, blocking=self._call is plain, on_cancel=_exit, on_end=_exit)


def _exit(_: Task) -> None:
    raise SystemExit(6)


hostile_plain = HostileHooks(plain)
hostile_coroutine = HostileHooks(coroutine)


class StatefulAgent:
    """An agent that carries state from run to run, as a factory makes it."""

    def __init__(self) -> None:
        self.payloads: list[Any] = []

    async def __call__(self, task: Task) -> list[Any]:
        self.payloads.append(task.payload)
        return self.payloads


# --- behaviours that neither wait nor block --------------------------------------------------------------------------


def _raise(kind: str) -> None:
    error = ERRORS[kind]()
    raise error


def _report(count: int) -> None:
    for number in range(count):
        progress(number)


def _set_note() -> str:
    before = note.get()
    note.set("changed")
    return before


def _context() -> dict[str, Any]:
    running = context.running_task()
    assert running is not None
    return {
        "task_id": running.task.task_id,
        "task_type": running.task.task_type,
        "tenant": running.task.tenant,
        "priority": running.task.priority.name,
        "attempt": running.attempt,
        "deadline": running.deadline is not None and running.deadline.at,
    }


def _call(output_tokens: int) -> None:
    """Call a model that costs a cent a token, in a thread as a coroutine must not wait."""

    def call() -> None:
        with upstream.call("m") as made:
            made.settle(input_tokens=5, output_tokens=output_tokens)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(call,))
    thread.start()
    thread.join()


def _fork() -> Any:
    return "in the fork" if os.fork() == 0 else os.wait()[1]


IMMEDIATE: dict[str, Callable[..., Any]] = {
    "echo": lambda value: value,
    "raise": _raise,
    "progress": _report,
    "progress of": progress,
    "set note": _set_note,
    "context": _context,
    "call": _call,
    "object": object,
    "where": os.getpid,
    "exit": os._exit,
    "signal": lambda number: os.kill(os.getpid(), number),
    "print": sys.stdout.write,
    "fork": _fork,
}


# --- behaviours that wait or block, in a plain handler ---------------------------------------------------------------


def _read(fifo: str) -> str:
    """Wait until the test writes to the fifo."""
    return Path(fifo).read_text()


def _block(fifo: str) -> str:
    progress("began")
    return _read(fifo)


def _wait(mark: str) -> None:
    """Wait until cancelled, and leave a mark."""
    try:
        progress("began")
        threading.Event().wait()
    finally:
        Path(mark).touch()


def _stubborn(fifo: str) -> str:
    """Swallow every cancellation."""
    while True:
        try:
            progress("began")
            return _read(fifo)
        except asyncio.CancelledError:
            continue


def _hang() -> None:
    """Hang like a library written in C: no signal interrupts it."""
    progress("began")
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    threading.Event().wait()


def _with_a_child() -> None:
    with subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"]) as process:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with contextlib.suppress(asyncio.CancelledError):  # it may be cancelled by now, and does not stop
            progress(process.pid)
        threading.Event().wait()


def _with_strangers(mark: str) -> None:
    """Start a process in a session of its own, and by a process that ends at once a second one."""
    waits = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    daemon = f"import subprocess; print(subprocess.Popen({waits!r}, stdout=2, start_new_session=True).pid)"
    orphan = subprocess.run([sys.executable, "-c", daemon], stdout=subprocess.PIPE, check=True).stdout
    child = subprocess.Popen(waits, start_new_session=True, env={})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with contextlib.suppress(asyncio.CancelledError):  # it may be cancelled by now, and does not stop
        progress([child.pid, int(orphan)])
    _read(mark)


PLAIN: dict[str, Callable[..., Any]] = {
    "read": _block,
    "block": _block,
    "wait": _wait,
    "stubborn": _stubborn,
    "hang": _hang,
    "with a child": _with_a_child,
    "with strangers": _with_strangers,
    "loop": lambda: asyncio.run(asyncio.sleep(0, "looped")),
}


# --- the same in a coroutine -----------------------------------------------------------------------------------------


async def _reads(fifo: str) -> str:
    progress("began")
    return await asyncio.get_running_loop().run_in_executor(None, _read, fifo)


async def _blocks(fifo: str) -> str:
    return _block(fifo)


async def _waits(mark: str) -> None:
    try:
        progress("began")
        await asyncio.Event().wait()
    finally:
        Path(mark).touch()  # noqa: ASYNC240 - it is quick


async def _is_stubborn(fifo: str) -> str:
    reading = asyncio.get_running_loop().run_in_executor(None, _read, fifo)
    progress("began")
    while True:
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            continue


async def _hangs() -> None:
    _hang()


async def _has_strangers(mark: str) -> None:
    _with_strangers(mark)


async def _has_a_child() -> None:
    _with_a_child()


async def _loops() -> str:
    assert asyncio.current_task() is not None
    try:
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()
    except TimeoutError:
        return "looped"
    return ""


ASYNC: dict[str, Callable[..., Any]] = {
    "read": _reads,
    "block": _blocks,
    "wait": _waits,
    "stubborn": _is_stubborn,
    "hang": _hangs,
    "with a child": _has_a_child,
    "with strangers": _has_strangers,
    "loop": _loops,
}
