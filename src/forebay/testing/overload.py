"""Overload by order of a test: to see what one's own code does when it is refused."""

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
    """What `overload` has refused so far.

    Attributes:
        tasks: them, in order.
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def __len__(self) -> int:
        return len(self.tasks)


@contextmanager
def overload(  # noqa: PLR0913 - each a word with a default
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
    """While the block lasts, the gate of a started supervisor refuses tasks, as it does when it is full.

    ``submit`` answers SPILLED if the supervisor has an overflow and the task may wait, else REJECTED; ``run`` and
    ``slot`` raise ``Overloaded`` for the latter. What is spilled stays outside until the block is left. Everything else
    goes on as ever.

    Args:
        supervisor: whose gate.
        task_types: which are refused; None: all.
        priorities: which are refused; None: all.
        spill: whether they may be spilled. False: REJECTED in any case.
        reason: what the ticket gives as its reason; None: what the gate would say.
        binding: the resource that the ticket names; None: the pool of the task's type.
        load: what the ticket gives as its load.
        retry_after: seconds after which the rejected are to come back; None: what the gate would say, which is None
            until the first handler has ended.

    Raises:
        NotStarted: the supervisor has not been started.
    """
    kinds = {task_types} if isinstance(task_types, str) else task_types
    rungs = {priorities} if isinstance(priorities, Priority) else priorities
    door, house = supervisor._admission, supervisor._dispatcher  # noqa: SLF001 - the gate is inside
    if door is None or house is None:
        raise NotStarted
    refused, before = RefusedTasks(), door.try_admit

    def offer(ticket: Ticket, pool: Pool, *, may_spill: bool) -> Refusal | None:
        task = ticket.task
        if (kinds is not None and task.task_type not in kinds) or (rungs is not None and task.priority not in rungs):
            return before(ticket, pool, may_spill=may_spill)
        refused.tasks.append(task)
        name = pool.resource if limited_by is None else limited_by
        why = f"{name} is at {load:.0%}, and {task.priority.name} is refused" if reason is None else reason
        return Refusal(why, name, load, may_spill and spill, retry_after)

    with _refill_paused(house, kinds):
        door.try_admit = offer
        try:
            yield refused
        finally:
            door.try_admit = before


@contextmanager
def _refill_paused(house: Dispatcher, kinds: Collection[str] | None) -> Iterator[None]:
    """Nothing of these task types comes in from the overflow: it counts as coming in already."""
    overflow = house.spill
    if overflow is None:
        yield
        return
    pools = (pool for kind, pool in house.core.pools.by_type.items() if kinds is None or kind in kinds)
    held = overflow.refiller.pause(pools)
    try:
        yield
    finally:
        overflow.refiller.resume(held)
