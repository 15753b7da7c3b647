"""The operations on a store that blocks: they run in a thread of the store's own, in groups.

Operations that arrive while a group is on its way share the next one, so that a commit, or a round trip, serves many.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from forebay._fork import reset_in_child
from forebay._threads import DaemonThreadExecutor
from forebay.errors import StoreUnavailable

_C = TypeVar("_C")
_O = TypeVar("_O")
_T = TypeVar("_T")

_MAX_PART_BYTES = 2 << 20  # a slow network sends that in a second

_Pending: TypeAlias = tuple[asyncio.Future[Any], _O]  # the caller's future, and its operation


class OperationError(NamedTuple):
    """The exception that an operation raised, in place of its value."""

    error: BaseException


class OperationQueue(Generic[_C, _O]):
    """The pending operations on a store, and the connection and the thread that they run with.

    Everything that blocks goes through ``loop.run_in_executor``.

    Args:
        where: names the store in errors.
        thread_name: names its thread.
        max_group: operations in one group: more would delay the last of them, and other processes.
        connect: connects. It blocks.
        run: runs a group, and returns the value of each operation or an OperationError; if it raises, all have failed.
            It blocks.
        disconnect: disconnects. It blocks.
        diagnose: returns what to raise for an error.
    """

    def __init__(  # noqa: PLR0913 - what a store is made of
        self,
        *,
        where: str,
        thread_name: str,
        max_group: int,
        connect: Callable[[], _C],
        run: Callable[[_C, Sequence[_O]], Sequence[Any]],
        disconnect: Callable[[_C], None],
        diagnose: Callable[[BaseException], BaseException],
    ) -> None:
        self._where = where
        self._thread_name = thread_name
        self._max_group = max_group
        self._connect = connect
        self._run = run
        self._disconnect = disconnect
        self._diagnose = diagnose
        self._loop: asyncio.AbstractEventLoop  # set by open()
        self._connection: _C | None = None
        self._process: int | None = None  # that opened it
        self._is_inherited = False  # it was opened in the process that this one was forked from
        self._pending: deque[_Pending[_O]] = deque()
        self._flushing = False
        self._opening: asyncio.Future[None] | None = None  # done once the last call of open() has ended
        self._closed: asyncio.Future[None] | None = None  # set by close(), done once the store is closed
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        """Note that a store which is open belongs to the parent."""
        self._is_inherited = self._process is not None

    async def open(self) -> None:
        """Connect. Idempotent.

        Raises:
            StoreUnavailable: it cannot; the message says why and what to do.
        """
        if self._connection is not None and self._loop.is_closed():
            self._abandon_connection(self._connection)
        while others := [each for each in (self._closed, self._opening) if each is not None and not each.done()]:
            await asyncio.wait(others)
        if self._connection is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._process, self._is_inherited = os.getpid(), False
        ended = self._opening = self._loop.create_future()
        try:
            await self._open()
        finally:
            ended.set_result(None)

    async def _open(self) -> None:
        executor = self._executor = DaemonThreadExecutor(self._thread_name, max_threads=1)
        opening = self._run_in_thread(self._connect)
        try:
            self._connection = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(partial(self._close_late_connection, executor))
            raise
        except BaseException:
            executor.shutdown(wait=False)
            raise
        self._closed = None

    def _abandon_connection(self, connection: _C) -> None:
        """Close the connection of an event loop that ended before the store was closed: nobody waits for it."""
        self._connection = self._opening = self._closed = None
        self._pending.clear()
        self._flushing = False
        with suppress(RuntimeError):  # its thread has ended already
            self._executor.submit(self._disconnect, connection)
        self._executor.shutdown(wait=False)

    def _close_late_connection(self, executor: DaemonThreadExecutor, opening: asyncio.Future[_C]) -> None:
        """Close a store that was opened after `open` had been cancelled; by now another `open` may have succeeded."""
        if not opening.cancelled() and opening.exception() is None:
            with suppress(RuntimeError):  # the interpreter is shutting down and starts no more threads
                self._loop.run_in_executor(executor, self._disconnect, opening.result())
        executor.shutdown(wait=False)  # jobs that were already submitted still run

    async def close(self) -> None:
        """Finish the pending operations and disconnect. Idempotent."""
        if self._connection is None:
            return
        if self._closed is None:
            self._closed = self._loop.create_future()
            self._schedule_flush()
        await asyncio.shield(self._closed)

    @property
    def connection(self) -> _C | None:
        """The connection, until the store is closed."""
        return self._connection

    @property
    def is_open(self) -> bool:
        """True between `open` and `close`."""
        return self._connection is not None and self._closed is None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that opened the store."""
        return self._loop

    def check_open(self) -> _C:
        """Return the connection of an open store, for a thread that uses it beside the queue.

        Raises:
            StoreUnavailable: the store is not open, or was opened in the process that this one was forked from: a
                forked child has neither its thread nor its loop.
        """
        if self._is_inherited:
            why = f"it was opened in process {self._process}, and this is a child that was forked from it"
            raise StoreUnavailable(where=self._where, why=why, advice="Open a store of its own here.")
        if (connection := self._connection) is None or self._closed is not None:
            advice = "Use it between open() and close()."
            raise StoreUnavailable(where=self._where, why="it is not open", advice=advice)
        return connection

    def submit(self, operation: _O) -> asyncio.Future[Any]:
        """Run `operation` in the next group; the future gets its value.

        Cancelling the future before its group has begun cancels the operation; later it happens anyway.

        Raises:
            StoreUnavailable: as `check_open`.
        """
        self.check_open()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._pending.append((future, operation))
        self._schedule_flush()
        return future

    def _schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)  # not at once: callers that run in this turn of the loop join the group

    def _flush(self) -> None:
        pending, group = self._pending, list[_Pending[_O]]()
        while pending and not group:
            some = [pending.popleft() for _ in range(min(self._max_group, len(pending)))]
            group = [each for each in some if not each[0].cancelled()]
        if self._connection is None or not (group or self._closed):
            self._flushing = False
        elif group:
            running = self._run_in_thread(self._run, self._connection, [operation for _, operation in group])
            running.add_done_callback(partial(self._deliver, group))
        else:
            self._run_in_thread(self._disconnect, self._connection).add_done_callback(self._on_closed)

    def _run_in_thread(self, work: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
        try:
            return self._loop.run_in_executor(self._executor, work, *args)
        except RuntimeError as error:  # the interpreter is shutting down and starts no more threads
            job = self._loop.create_future()
            job.set_exception(error)
            return job

    def _deliver(self, group: Sequence[_Pending[_O]], job: asyncio.Future[Sequence[Any]]) -> None:
        """Give each caller its value or its error, and start the next group."""
        outcomes = _outcomes(job, len(group))
        for (future, _), outcome in zip(group, outcomes, strict=True):
            if future.done():  # its caller was cancelled
                continue
            if isinstance(outcome, OperationError):
                future.set_exception(self._diagnose(outcome.error))
            else:
                future.set_result(outcome)
        self._loop.call_soon(self._flush)  # after the callers just woken, so that their next operations join the group

    def _on_closed(self, closing: asyncio.Future[None]) -> None:
        self._connection = None
        self._flushing = False
        self._executor.shutdown(wait=False)
        if self._closed is None or self._closed.done():
            return
        if not closing.cancelled() and (error := closing.exception()) is not None:
            self._closed.set_exception(error)
        else:
            self._closed.set_result(None)


def in_parts(group: Sequence[_O], sizes: Sequence[int]) -> Sequence[Sequence[_O]]:
    """Return a group in parts that are each sent in one round trip.

    Args:
        group: the operations.
        sizes: the bytes of the data of each. Those of a part are not too many, unless it has one operation.
    """
    if sum(sizes) <= _MAX_PART_BYTES:
        return [group]
    parts, total = [list[_O]()], 0
    for op, size in zip(group, sizes, strict=True):
        if total + size > _MAX_PART_BYTES and parts[-1]:
            parts.append([])
            total = 0
        parts[-1].append(op)
        total += size
    return parts


def _outcomes(job: asyncio.Future[Sequence[Any]], count: int) -> Sequence[Any]:
    """Return the value or the error of each of the `count` operations of a group."""
    if job.cancelled():
        return [OperationError(RuntimeError("the event loop cancelled the write before it was done"))] * count
    error = job.exception()
    return job.result() if error is None else [OperationError(error)] * count
