"""Room: producers that wait until the supervisor would admit their task, in line by priority."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from forebay.supervisor.ticket_registry import TicketRegistry
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.supervisor.runs.timers import Timer, Timers

_RECHECK: Final = 1.0  # seconds after which the first tries again in any case: an upstream's load falls unannounced


class RoomQueue:
    """The producers that wait for room, by task type: by priority, then in the order in which they came.

    When a task has ended, and every second, the first producer of each type tries again; once it has left, the next one
    does. So room for one task wakes one producer, however many wait. One that is blocked, whom room would not help now,
    lets those behind it pass: its conversation is full, which may wait for what they submit; or it is a fan-out that
    nobody reads.

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
        self._lines: dict[str, tuple[dict[RoomTurn, None], ...]] = {}  # by task type and priority
        self._notified = False

    def enter(
        self,
        task_type: str,
        priority: Priority,
        on_turn: Callable[[], object],
        is_blocked: Callable[[], bool] | None = None,
        group: Hashable = None,
    ) -> RoomTurn:
        """Put a producer in line.

        Args:
            task_type: of its task.
            priority: of its task.
            on_turn: called, not within another call, whenever it is to try again.
            is_blocked: returns whether room would not help it now, so that those behind it pass; None: it always would.
            group: of those that are blocked at the same time.
        """
        if not self._lines:
            self._registry.add_listener(self._task_ended)
            self._arm()
        turn = RoomTurn(task_type, priority, on_turn, is_blocked, group)
        line = self._lines.setdefault(task_type, tuple({} for _ in Priority))
        line[priority][turn] = None
        return turn

    def leave(self, turn: RoomTurn) -> None:
        """Take a producer out of line; the one behind it may try. A second call does nothing."""
        line = self._lines.get(turn.task_type)
        if line is None or turn not in line[turn.priority]:
            return
        del line[turn.priority][turn]
        if any(line):
            self._wake(line)
            return
        del self._lines[turn.task_type]
        if not self._lines:
            self._registry.remove_listener(self._task_ended)
            self._timers.cancel(self._timer)

    def pass_turn(self, turn: RoomTurn) -> None:
        """Have the next producer try, if one that is in line is blocked: there may be room for others."""
        if turn.blocked:
            self._wake(self._lines[turn.task_type])

    def is_first(self, turn: RoomTurn) -> bool:
        """Return whether nobody that room could help stands in line before a producer that is in line."""
        return _first(self._lines[turn.task_type]) is turn

    def is_behind(self, task_type: str, priority: Priority) -> bool:
        """Return whether a producer that came now would stand behind another one."""
        line = self._lines.get(task_type)
        return line is not None and _first(line[: priority + 1]) is not None

    def wake_all(self) -> None:
        """Have every producer try again, because the supervisor admits nothing any more."""
        for line in self._lines.values():
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
        for line in self._lines.values():
            if (first := _first(line)) is not None:
                first.on_turn()

    def _wake(self, line: tuple[dict[RoomTurn, None], ...]) -> None:
        """Wake the first of a line soon."""
        if (first := _first(line)) is not None:
            self._loop.call_soon(first.on_turn)


class RoomTurn:
    """The place of one producer in line."""

    __slots__ = ("_is_blocked", "group", "on_turn", "priority", "task_type")

    def __init__(
        self,
        task_type: str,
        priority: Priority,
        on_turn: Callable[[], object],
        is_blocked: Callable[[], bool] | None,
        group: Hashable,
    ) -> None:
        self.task_type = task_type
        self.priority = priority
        self.on_turn = on_turn
        self.group = group
        self._is_blocked = is_blocked

    @property
    def blocked(self) -> bool:
        """True if room would not help the producer now."""
        return self._is_blocked is not None and self._is_blocked()


def _in_order(line: Iterable[dict[RoomTurn, None]]) -> Iterator[RoomTurn]:
    return (turn for turns in line for turn in turns)


def _first(line: tuple[dict[RoomTurn, None], ...]) -> RoomTurn | None:
    blocked = set[Hashable]()  # groups: thousands of messages may wait for one conversation
    for turn in _in_order(line):
        if turn.group not in blocked:
            if not turn.blocked:
                return turn
            blocked.add(turn.group)
    return None
