"""Processes made by fork: a child has its parent's objects, but not its threads, calls and waiting callers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakSet


class ForkAware(Protocol):
    """An object with state that a forked child must not inherit, such as a lock that another thread may hold."""

    def reset_after_fork(self) -> None:
        """Make new locks, and forget the calls of the parent. It runs in the child, where no other thread does."""


class HoldsFile(Protocol):
    """An object with an open SQLite file, which must not be open while its process forks.

    SQLite keeps the locks of a file by process. A child that inherits an open one takes itself to hold them: it writes
    to a log that its parent removes when that ends, or finds a lock taken by a thread that it does not have.
    """

    def close_before_fork(self) -> bool:
        """Close the file, keep other threads from opening it until `go_on_after_fork`, and return whether it is closed.

        It may block, for seconds.
        """

    def go_on_after_fork(self) -> None:
        """Let the file be opened again. It runs in the parent, if the file was closed; a child resets its locks."""


_objects: WeakSet[ForkAware] = WeakSet()
reset_in_child = _objects.add
"""Let an object be reset in each child that is forked from this process."""

_files: WeakSet[HoldsFile] = WeakSet()
close_at_fork = _files.add
"""Let an object close its file whenever this process forks. Its child is to reset its locks: see `reset_in_child`."""


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
    _Forking.lock, _Forking.closed = threading.Lock(), ()
    for each in list(_objects):
        each.reset_after_fork()


class _Forking:
    """A fork that is under way: one at a time."""

    lock = threading.Lock()
    closed: Sequence[HoldsFile] = ()


def _close_files() -> None:
    _Forking.lock.acquire()
    _Forking.closed = [each for each in list(_files) if each.close_before_fork()]


def _go_on() -> None:
    closed, _Forking.closed = _Forking.closed, ()
    for each in closed:
        each.go_on_after_fork()
    _Forking.lock.release()


os.register_at_fork(before=_close_files, after_in_parent=_go_on, after_in_child=_reset)
