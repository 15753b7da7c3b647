"""Room: producers that wait until the supervisor would admit their task, in a line for each tenant, by priority."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from forebay.supervisor.ticket_registry import TicketRegistry
from forebay.task import Priority, Task

if TYPE_CHECKING:
    from forebay.supervisor.runs.timers import Timer, Timers

_RECHECK: Final = 1.0  # seconds after which the first try again in any case: an upstream's load falls unannounced
_MAX_WOKEN: Final = 16  # lines of one task type whose first producer tries again when a task has ended

_Line: TypeAlias = "tuple[dict[RoomTurn, None], ...]"  # the producers of one tenant by priority, as they came


class RoomQueue:
    """The producers that wait for room, by task type and tenant: by priority, then in the order in which they came.

    When a task has ended, and every second, the first producer of each line tries again; once it has left, the next one
    does. Each tenant has a line of its own, since it has room of its own. Of many tenants some try at a time, in turn.
    So room for one task wakes few producers, however many wait. One that is blocked, whom room would not help now, lets
    those behind it pass: its conversation is full, which may wait for what they submit; or it is a fan-out that nobody
    reads. The very first of a line tries though it is blocked, because the overflow may have room for its message.

    Args:
        loop: the event loop.
        timers: the timers of the supervisor.
        registry: calls a listener whenever a task has ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, timers: Timers, registry: TicketRegistry) -> None:
        self._loop = loop
        self._timers = timers
        self._timer: Timer | None = None
        self._registry = registry
        self._lines: dict[str, dict[str, _Line]] = {}  # by task type and tenant; the next to be woken is the first
        self._notified = False

    def enter(
        self,
        task: Task,
        on_turn: Callable[[], object],
        is_blocked: Callable[[], bool] | None = None,
        group: Hashable = None,
    ) -> RoomTurn:
        """Put the producer of `task` in line.

        Args:
            task: its task.
            on_turn: called, not within another call, whenever it is to try again.
            is_blocked: returns whether room would not help it now, so that those behind it pass; None: it always would.
            group: of those that are blocked at the same time.
        """
        if not self._lines:
            self._registry.add_listener(self._task_ended)
            self._arm()
        turn = RoomTurn(task, on_turn, is_blocked, group)
        lines = self._lines.setdefault(task.task_type, {})
        lines.setdefault(task.tenant, tuple({} for _ in Priority))[task.priority][turn] = None
        return turn

    def leave(self, turn: RoomTurn) -> None:
        """Take a producer out of line; the one behind it may try, and one of the next tenant. Twice does nothing."""
        lines = self._lines.get(turn.task_type, {})
        line = lines.get(turn.tenant)
        if line is None or turn not in line[turn.priority]:
            return
        del line[turn.priority][turn]
        if any(line):
            self._wake_soon(line)
        else:
            del lines[turn.tenant]
        if not lines:
            del self._lines[turn.task_type]
            if not self._lines:
                self._registry.remove_listener(self._task_ended)
                self._timers.cancel(self._timer)
        elif len(lines) > _MAX_WOKEN:  # otherwise all of them have been woken
            self._wake(lines, 1)

    def pass_turn(self, turn: RoomTurn) -> None:
        """Have the next producer try, if one that is in line is blocked: there may be room for others."""
        if turn.blocked and (following := _first(self._lines[turn.task_type][turn.tenant])) is not None:
            self._loop.call_soon(following.on_turn)

    def is_first(self, turn: RoomTurn) -> bool:
        """Return whether a producer that is in line is the very first, or nobody that is not blocked is before it."""
        line = self._lines[turn.task_type][turn.tenant]
        return turn is next(_in_order(line)) or turn is _first(line)

    def is_behind(self, task: Task) -> bool:
        """Return whether the producer of `task`, if it came now, would stand behind another one."""
        line = self._lines.get(task.task_type, {}).get(task.tenant)
        if line is None:
            return False
        ahead = line[: task.priority + 1]
        if task.thread_id is not None and any(turn.thread_id == task.thread_id for turn in _in_order(ahead)):
            return True
        return _first(ahead) is not None

    def waiting(self, task_type: str) -> int:
        """Return how many producers of tasks of a type are in line."""
        return sum(len(turns) for line in self._lines.get(task_type, {}).values() for turns in line)

    def wake_all(self) -> None:
        """Have every producer try again, because the supervisor admits nothing any more."""
        for lines in self._lines.values():
            for line in lines.values():
                for turn in _in_order(line):
                    self._loop.call_soon(turn.on_turn)

    def _task_ended(self) -> None:
        """Wake the first of each line soon, but not now: the slot of the task is about to be returned."""
        if not self._notified:
            self._notified = True
            self._loop.call_soon(self._wake_first)

    def _arm(self) -> None:
        self._timer = self._timers.at(self._loop.time() + _RECHECK, self._recheck)

    def _recheck(self) -> None:
        self._arm()
        self._wake_first()

    def _wake_first(self) -> None:
        self._notified = False
        for lines in self._lines.values():
            self._wake(lines, _MAX_WOKEN)

    def _wake_soon(self, line: _Line) -> None:
        """Wake the first of a line soon."""
        for turn in _leading(line):
            self._loop.call_soon(turn.on_turn)

    @staticmethod
    def _wake(lines: dict[str, _Line], count: int) -> None:
        """Wake the first producers of the next `count` lines, which go to the end."""
        for tenant in tuple(islice(lines, count)):
            line = lines[tenant] = lines.pop(tenant)
            for turn in _leading(line):
                turn.on_turn()


class RoomTurn:
    """The place of one producer in line."""

    __slots__ = ("_is_blocked", "group", "on_turn", "priority", "task_type", "tenant", "thread_id")

    def __init__(
        self, task: Task, on_turn: Callable[[], object], is_blocked: Callable[[], bool] | None, group: Hashable
    ) -> None:
        self.task_type = task.task_type
        self.tenant = task.tenant
        self.thread_id = task.thread_id
        self.priority = task.priority
        self.on_turn = on_turn
        self.group = group
        self._is_blocked = is_blocked

    @property
    def blocked(self) -> bool:
        """True if room would not help the producer now."""
        return self._is_blocked is not None and self._is_blocked()


def _in_order(line: _Line) -> Iterator[RoomTurn]:
    return (turn for turns in line for turn in turns)


def _leading(line: _Line) -> tuple[RoomTurn, ...]:
    """Return the very first producer of a line, and the first that is not blocked if that is another one."""
    very_first, first = next(_in_order(line), None), _first(line)
    return tuple(dict.fromkeys(turn for turn in (very_first, first) if turn is not None))


def _first(line: _Line) -> RoomTurn | None:
    blocked = set[Hashable]()  # groups: thousands of messages may wait for one conversation
    for turn in _in_order(line):
        if turn.group not in blocked:
            if not turn.blocked:
                return turn
            blocked.add(turn.group)
    return None
