"""Calls of user code at hooks: event sinks, `on_cancel`, `on_end`, codecs, load functions.

Whatever a hook raises, its caller goes on: nothing that was taken is lost, and what happened is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger("forebay")


def call_hook(what: str, hook: Callable[[*Ts], T], *arguments: *Ts) -> T | None:
    """Call user code and return its value; if it raises anything, log that and return None.

    Args:
        what: the hook, for the log, such as ``"on_cancel of worker 'writer'"``.
        hook: the user's callable.
        arguments: its arguments.
    """
    try:
        return hook(*arguments)
    except BaseException as error:  # noqa: BLE001 - user code: the caller must go on
        report_failure(what, error)
    return None


def call_plain_hook(what: str, hook: Callable[[*Ts], object], *arguments: *Ts) -> None:
    """Call user code whose value nobody needs. An awaitable that it returns is not awaited, which is logged."""
    value = call_hook(what, hook, *arguments)
    if value is not None and is_awaitable(value):
        log.error("%s returned an awaitable, which nothing awaits: make it a plain function", what)
        if inspect.iscoroutine(value):
            value.close()  # Python would warn of it again


async def await_hook(what: str, awaitable: Any) -> None:
    """Await what a hook returned; if it raises anything, log that."""
    try:
        await awaitable
    except BaseException as error:  # noqa: BLE001 - user code: a SystemExit must not end the loop and all tasks
        raise_if_cancelled(error)
        report_failure(what, error)


def raise_if_cancelled(error: BaseException) -> None:
    """Raise the cancellation of the running asyncio task again. One that user code has raised is an error like any."""
    if issubclass(type(error), asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error


def report_failure(what: str, error: BaseException) -> None:
    """Log an exception of user code. A KeyboardInterrupt is also raised again, where it interrupts nothing."""
    with contextlib.suppress(Exception):  # a log filter is user code too
        log.error("%s raised %s; the supervisor goes on", what, type(error).__name__, exc_info=error)
    raise_again_if_interrupt(error)


def raise_again_if_interrupt(error: BaseException | None) -> None:
    """Raise a Ctrl-C in a turn of the running loop of its own: it ends the loop, but leaves no work half done."""
    if error is not None and is_interrupt(error):
        loop = asyncio._get_running_loop()  # noqa: SLF001 - public by `__all__`; None where there is no loop
        if loop is None:
            raise error
        loop.call_soon(_raise, error)


def is_interrupt(error: BaseException) -> bool:
    """Return whether `error` is a Ctrl-C. No thread but the main one receives one."""
    return issubclass(type(error), KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def _raise(error: BaseException) -> NoReturn:
    raise error


def is_async(function: object) -> bool:
    """Return whether a call of `function` has to be awaited."""
    return unwrapped_is(function, inspect.iscoroutinefunction) or unwrapped_is(function, inspect.isasyncgenfunction)


def unwrapped_is(function: object, check: Callable[[object], bool]) -> bool:
    """Return whether `check` holds for a callable, the function that it is a partial of, or its ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    return check(function) or check(getattr(type(function), "__call__", None))  # noqa: B004 - of the class, as Python does


def is_awaitable(value: object) -> bool:
    """Return whether `value` can be awaited, even if looking at it fails."""
    try:
        return inspect.isawaitable(value)
    except BaseException:  # noqa: BLE001 - a value that cannot be looked at cannot be awaited
        return False


def name_of(function: object) -> str:
    """Return the name of a callable, for messages; never its repr, which is user code."""
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__
