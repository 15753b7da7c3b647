"""The demand of an overflow, for an autoscaler in a process of its own that runs no tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Self

from forebay._validate import reject
from forebay.events import Event
from forebay.interfaces import Demand, TaskStore
from forebay.overflow import open_task_store

_OWNER: Final = "OverflowDemand"


class OverflowDemand:
    """The tasks that wait and run in an overflow, whoever stored them and runs them. An async context manager.

    It stands for the supervisor of an `forebay.scale.Autoscaler`. It takes no tasks, and sees none that are refused.

    Args:
        overflow: its URL, or a task store that is not open.
        on_event: is called with each event of the autoscaler.

    Raises:
        InvalidOverflowUrl: it is neither.
        InvalidSetting: only the process that has it can use it.
        StoreNotInstalled: the library that the overflow needs is not installed.
    """

    def __init__(self, overflow: str | TaskStore, *, on_event: Callable[[Event], object] | None = None) -> None:
        self._store = open_task_store(overflow)
        self._on_event = on_event
        if not self._store.durable:
            reject(_OWNER, "overflow", "one in memory", 'one that other processes use, such as "redis://host/0"')

    async def __aenter__(self) -> Self:
        await self._store.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._store.close()

    async def demand(self, task_types: Sequence[str]) -> Demand:
        """Return the demand of the tasks of some types.

        Raises:
            StoreUnavailable: the overflow cannot be asked.
        """
        depths, leased = await self._store.depths(), await self._store.leased()
        return Demand(
            spilled=sum(count for (task_type, _, _), count in depths.items() if task_type in task_types),
            elsewhere=sum(leased.get(task_type, 0) for task_type in set(task_types)),
        )

    def emit(self, event: Event) -> None:
        """Pass an event on."""
        if self._on_event is not None:
            self._on_event(event)
