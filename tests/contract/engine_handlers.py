"""What the engines are asked to run: the payload names a behaviour, and what it needs. Processes import this module."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebay import Overloaded, Task, context, progress

note: contextvars.ContextVar[str] = contextvars.ContextVar("note", default="blank")


class Odd(BaseException):
    """No Exception."""


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("no such river"),
    "SystemExit": lambda: SystemExit(4),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "Odd": lambda: Odd("odd"),
    "StopIteration": lambda: StopIteration(1),
    "StopAsyncIteration": lambda: StopAsyncIteration(1),
    "TimeoutError": lambda: TimeoutError("mine"),
    "Overloaded": lambda: Overloaded("full", limited_by="key", load=1.0, retry_after=7.0),
}


def plain(task: Task) -> Any:
    """The plain handler."""
    what, *rest = task.payload
    return {**AT_ONCE, **PLAIN}[what](*rest)


async def coroutine(task: Task) -> Any:
    """The async handler."""
    await asyncio.sleep(0)
    what, *rest = task.payload
    return AT_ONCE[what](*rest) if what in AT_ONCE else await ASYNC[what](*rest)


class Talker:
    """An agent that carries state from run to run, as a factory makes it."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    async def __call__(self, task: Task) -> list[Any]:
        self.said.append(task.payload)
        return self.said


# --- what neither waits nor blocks -----------------------------------------------------------------------------------


def _raise(kind: str) -> None:
    error = ERRORS[kind]()
    raise error


def _tell(count: int) -> None:
    for number in range(count):
        progress(number)


def _scribble() -> str:
    before = note.get()
    note.set("scribbled")
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


def _fork() -> Any:
    return "of the copy" if os.fork() == 0 else os.wait()[1]


AT_ONCE: dict[str, Callable[..., Any]] = {
    "echo": lambda value: value,
    "raise": _raise,
    "progress": _tell,
    "progress of": progress,
    "scribble": _scribble,
    "context": _context,
    "object": object,
    "where": os.getpid,
    "exit": os._exit,
    "signal": lambda number: os.kill(os.getpid(), number),
    "print": sys.stdout.write,
    "fork": _fork,
}


# --- what does, in a plain handler -----------------------------------------------------------------------------------


def _read(fifo: str) -> str:
    """Wait until somebody writes."""
    return Path(fifo).read_text()


def _block(fifo: str) -> str:
    progress("began")
    return _read(fifo)


def _wait(mark: str) -> None:
    """Wait to be stopped, and leave a mark that it was."""
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
    """Hang as a library does in C: no signal reaches it."""
    progress("began")
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    threading.Event().wait()


def _with_a_child() -> None:
    with subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"]) as process:
        progress(process.pid)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Event().wait()


PLAIN: dict[str, Callable[..., Any]] = {
    "read": _block,
    "block": _block,
    "wait": _wait,
    "stubborn": _stubborn,
    "hang": _hang,
    "with a child": _with_a_child,
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
        Path(mark).touch()  # noqa: ASYNC240 - a moment


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
    "loop": _loops,
}
