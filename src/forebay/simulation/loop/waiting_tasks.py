"""Source positions at which tasks wait, for the messages of `Deadlock` and `SimulationBoundExceeded`."""

from __future__ import annotations

import asyncio
import gc
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

_ASYNCIO: Final = Path(asyncio.__file__).parent
_MAX_NAMES: Final = 20  # task names printed for one position; the error's `waiting` holds all of them
_MAX_DEPTH: Final = 1_000  # awaits followed; a deeper chain is a recursion, whose end adds nothing to the message


@dataclass(frozen=True, slots=True)
class WaitingTask:
    """A task that is not done, and the source position at which it waits."""

    task: str
    where: str


def describe_waiting(tasks: Iterable[asyncio.Task[Any]]) -> tuple[WaitingTask, ...]:
    """Return each of `tasks` with the position at which it waits."""
    return tuple(WaitingTask(task.get_name(), _position(task)) for task in tasks)


def format_waiting(waiting: Iterable[WaitingTask]) -> str:
    """Return `waiting` as text, one line for each position."""
    names_at: dict[str, list[str]] = {}
    for task in waiting:
        names_at.setdefault(task.where, []).append(task.task)
    lines = [f"\n  {_join(names)} {where}" for where, names in names_at.items()]
    return "".join(lines) or "\n  (no task: the run waits for a bare future)"


def _join(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _position(task: asyncio.Task[Any]) -> str:
    """Return the innermost line of `task` outside asyncio, then asyncio's own line, then the task that it awaits."""
    outside_asyncio: FrameType | None = None
    innermost: FrameType | None = None
    awaited = ""
    for awaitable in _await_chain(task.get_coro()):
        if isinstance(awaitable, asyncio.Task):
            awaited = f", for {awaitable.get_name()}"
        elif (frame := _frame(awaitable)) is not None:
            innermost = frame
            if Path(frame.f_code.co_filename).parent != _ASYNCIO:
                outside_asyncio = frame
    if innermost is None:
        return f"at an unknown position{awaited}"
    if outside_asyncio is None or outside_asyncio is innermost:
        return f"at {_line(innermost)}{awaited}"
    return f"at {_line(outside_asyncio)}, inside {_line(innermost)}{awaited}"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _await_chain(awaitable: object) -> Iterator[object]:
    """Yield `awaitable`, the object that it awaits, and so on to the innermost one."""
    for _ in range(_MAX_DEPTH):
        if awaitable is None:
            return
        yield awaitable
        awaitable = _awaited_by(awaitable)


def _awaited_by(awaitable: object) -> object:
    for attribute in ("cr_await", "gi_yieldfrom", "ag_await"):
        if hasattr(awaitable, attribute):
            return getattr(awaitable, attribute)
    if isinstance(awaitable, asyncio.Future):
        return None
    # An iterator in the middle of the chain (as in `async for`) shows the next awaitable to the garbage collector only.
    return next(filter(_is_awaitable, gc.get_referents(awaitable)), None)


def _is_awaitable(thing: object) -> bool:
    return inspect.iscoroutine(thing) or inspect.isasyncgen(thing) or isinstance(thing, asyncio.Future)


def _frame(awaitable: object) -> FrameType | None:
    for attribute in ("cr_frame", "gi_frame", "ag_frame"):
        frame: FrameType | None = getattr(awaitable, attribute, None)
        if frame is not None:
            return frame
    return None
