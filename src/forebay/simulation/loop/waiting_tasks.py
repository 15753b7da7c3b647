"""Where tasks wait: what a deadlock has to say for itself."""

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
_NAMED: Final = 20  # tasks named for each place in a message; the error's `waiting` has them all
_DEPTH: Final = 1_000  # awaits followed; deeper is a recursion, and its end says no more than this


@dataclass(frozen=True, slots=True)
class WaitingTask:
    """A task that is not done, and the place where it waits."""

    task: str
    where: str


def describe_waiting(tasks: Iterable[asyncio.Task[Any]]) -> tuple[WaitingTask, ...]:
    """Say for each of `tasks` where it waits."""
    return tuple(WaitingTask(task.get_name(), _where(task)) for task in tasks)


def format_waiting(waits: Iterable[WaitingTask]) -> str:
    """Text of `waits`, a line for each place."""
    places: dict[str, list[str]] = {}
    for wait in waits:
        places.setdefault(wait.where, []).append(wait.task)
    lines = [f"\n  {_names(names)} {where}" for where, names in places.items()]
    return "".join(lines) or "\n  (no task: the run waits for a bare future)"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _where(task: asyncio.Task[Any]) -> str:
    """The innermost line of `task` that is not asyncio's own, then asyncio's, then the task that it waits for."""
    mine: FrameType | None = None
    inner: FrameType | None = None
    awaited = ""
    for step in _awaits(task.get_coro()):
        if isinstance(step, asyncio.Task):
            awaited = f", for {step.get_name()}"
        elif (frame := _frame(step)) is not None:
            inner = frame
            if Path(frame.f_code.co_filename).parent != _ASYNCIO:
                mine = frame
    if inner is None:
        return f"at an unknown place{awaited}"
    if mine is None or mine is inner:
        return f"at {_line(inner)}{awaited}"
    return f"at {_line(mine)}, inside {_line(inner)}{awaited}"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _awaits(step: object) -> Iterator[object]:
    """Follow a chain of awaits from the outermost coroutine to what it waits for in the end."""
    for _ in range(_DEPTH):
        if step is None:
            return
        yield step
        step = _next(step)


def _next(step: object) -> object:
    for attribute in ("cr_await", "gi_yieldfrom", "ag_await"):
        if hasattr(step, attribute):
            return getattr(step, attribute)
    if isinstance(step, asyncio.Future):
        return None
    # An iterator that stands between two of the chain, such as of `async for`: it shows its next only to the collector.
    return next(filter(_waits, gc.get_referents(step)), None)


def _waits(thing: object) -> bool:
    return inspect.iscoroutine(thing) or inspect.isasyncgen(thing) or isinstance(thing, asyncio.Future)


def _frame(step: object) -> FrameType | None:
    for attribute in ("cr_frame", "gi_frame", "ag_frame"):
        frame: FrameType | None = getattr(step, attribute, None)
        if frame is not None:
            return frame
    return None
