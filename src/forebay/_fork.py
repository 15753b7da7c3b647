"""Processes made by fork: a child has its parent's objects, but not its threads, calls and waiting callers."""

from __future__ import annotations

import os
import sys
from typing import Protocol
from weakref import WeakSet


class ForkAware(Protocol):
    """An object with state that a forked child must not inherit, such as a lock that another thread may hold."""

    def reset_after_fork(self) -> None:
        """Make new locks, and forget the calls of the parent. It runs in the child, where no other thread does."""


_objects: WeakSet[ForkAware] = WeakSet()
reset_in_child = _objects.add
"""Let an object be reset in each child that is forked from this process."""


class _Process:
    """This process, as far as it is known to be the child of another one that runs the same program."""

    is_child = False


def mark_child() -> None:
    """Note that this process was started by another one for its work."""
    _Process.is_child = True


def is_child() -> bool:
    """Return whether this process is one of several that run the same program: forked, or started for their work."""
    started_by = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)
    return _Process.is_child or (started_by is not None and started_by() is not None)


def _reset() -> None:
    mark_child()
    for each in list(_objects):
        each.reset_after_fork()


os.register_at_fork(after_in_child=_reset)
