"""Overload on demand: tests of code whose tasks are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from forebay.errors import NotStarted
from forebay.supervisor import BackpressureSupervisor
from forebay.supervisor.ticket import Refusal
from forebay.task import Priority, Task

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.ticket import Ticket


class RefusedTasks:
    """The tasks that `overload` has refused.

    Attributes:
        tasks: the tasks, in order.
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def __len__(self) -> int:
        return len(self.tasks)


@contextmanager
def overload(  # noqa: PLR0913 - each is a word with a default
    supervisor: BackpressureSupervisor,
    *,
    task_types: str | Collection[str] | None = None,
    priorities: Priority | Collection[Priority] | None = None,
    spill: bool = True,
    reason: str | None = None,
    limited_by: str | None = None,
    load: float = 1.0,
    retry_after: float | None = None,
) -> Iterator[RefusedTasks]:
    """Make a started supervisor refuse tasks inside the block, as it does when it is full.

    ``submit`` returns a ticket that is SPILLED if the supervisor has an overflow and the task may be spilled, otherwise
    REJECTED. For a rejected task, ``run`` and ``slot`` raise ``Overloaded``. Spilled tasks stay in the overflow until
    the block ends. Nothing else changes.

    Args:
        supervisor: the supervisor.
        task_types: task types to refuse; None: all.
        priorities: priorities to refuse; None: all.
        spill: True: spill refused tasks if the supervisor has an overflow; False: reject them.
        reason: the ticket's reason; None: the usual text.
        limited_by: the resource that the ticket names; None: the pool of the task's type.
        load: the ticket's load.
        retry_after: seconds after which rejected callers should retry; None: the supervisor's estimate, which is None
            until a task has finished.

    Raises:
        NotStarted: the supervisor has not been started.
    """
    types = {task_types} if isinstance(task_types, str) else task_types
    refused_priorities = {priorities} if isinstance(priorities, Priority) else priorities
    admission, dispatcher = supervisor._admission, supervisor._dispatcher  # noqa: SLF001 - there is no public hook
    if admission is None or dispatcher is None:
        raise NotStarted
    refused, original = RefusedTasks(), admission.try_admit

    def try_admit(ticket: Ticket, pool: Pool, *, may_spill: bool) -> Refusal | None:
        task = ticket.task
        type_admitted = types is not None and task.task_type not in types
        if type_admitted or (refused_priorities is not None and task.priority not in refused_priorities):
            return original(ticket, pool, may_spill=may_spill)
        refused.tasks.append(task)
        name = pool.resource if limited_by is None else limited_by
        text = f"{name} is at {load:.0%}, and {task.priority.name} is rejected" if reason is None else reason
        return Refusal(text, name, load, may_spill and spill, retry_after)

    with _refill_paused(dispatcher, types):
        admission.try_admit = try_admit
        try:
            yield refused
        finally:
            admission.try_admit = original


@contextmanager
def _refill_paused(dispatcher: Dispatcher, types: Collection[str] | None) -> Iterator[None]:
    """Refill no tasks of these types inside the block: their pools are marked as being refilled."""
    spill = dispatcher.spill
    if spill is None:
        yield
        return
    pools = (pool for task_type, pool in dispatcher.core.pools.by_type.items() if types is None or task_type in types)
    paused = spill.refiller.pause(pools)
    try:
        yield
    finally:
        spill.refiller.resume(paused)
