"""Processes made by fork: a child has its parent's objects, but not its threads, calls and waiting callers."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class ForkAware(Protocol):
    """An object with state that a forked child must not inherit, such as a lock that another thread may hold."""

    def reset_after_fork(self) -> None:
        """Make new locks, and forget the calls of the parent. It runs in the child, where no other thread does."""


_objects: WeakSet[ForkAware] = WeakSet()
reset_in_child = _objects.add
"""Let an object be reset in each child that is forked from this process."""


def _reset() -> None:
    for each in list(_objects):
        each.reset_after_fork()


os.register_at_fork(after_in_child=_reset)
