"""A process that runs one worker's handler, as its supervisor sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from forebay.engine import messages as wire
from forebay.engine.orphan_reaper import orphan_reaper
from forebay.errors import NotTransferable, Overloaded, RemoteError, WorkerDied
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_result

# What the new interpreter does first: find the same modules as this one does.
_BOOT = (
    "import sys; fd, sys.path[:] = int(sys.argv[1]), sys.argv[2:]; sys.argv[1:] = []; "
    "from forebay.engine.child_main import main; main(fd)"
)
_LATE = 1.0  # seconds that may lie between the two signs of a process's end


class SpawnedProcess(NamedTuple):
    """A process that has just been started, and this side of the line to it."""

    process: subprocess.Popen[bytes]
    channel: socket.socket


def spawn() -> SpawnedProcess:
    """Start an interpreter in a session of its own, to be killed with all that it starts. Blocks.

    Raises:
        OSError: the system has no more processes, descriptors or memory.
    """
    line, other = socket.socketpair()
    process = None
    try:
        with other:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-c", _BOOT, str(other.fileno()), *sys.path],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        orphan_reaper.watch(process.pid)
    except BaseException:
        line.close()
        if process is not None:
            process.kill()
            process.wait()
        raise
    return SpawnedProcess(process, line)


class _RunEnd(NamedTuple):
    """How a run ended: with a value, or with an exception of any kind."""

    value: Any
    failure: wire.RemoteFailure | None

    def value_of(self, task_id: str) -> Any:
        """The value, or the exception."""
        failure = self.failure
        if failure is None:
            return self.value
        if failure.overloaded is not None:
            reason, binding, load, retry_after = failure.overloaded
            raise Overloaded(reason, limited_by=binding, load=load, retry_after=retry_after)
        if failure.cancelled:
            raise asyncio.CancelledError
        if failure.type == wire.NOT_TRANSFERABLE:
            raise NotTransferable(what="result", task_id=task_id, why=failure.message)
        raise RemoteError(type=failure.type, message=failure.message, traceback=failure.traceback)


class ChildProcess(asyncio.Protocol):
    """One process, its line, and the run that it has been given, if any. It belongs to one event loop.

    Attributes:
        worker: whose it is.
        pid: of the process and of its group.
        runs: how many it has been given.
        ready: done once it has loaded its handler: None, or the failure to.
        gone: done once it has ended, and is known to have.
    """

    def __init__(self, spawned: SpawnedProcess, *, worker: str, bound: int, loop: asyncio.AbstractEventLoop) -> None:
        self.worker = worker
        self.pid = spawned.process.pid
        self.runs = 0
        self.ready: asyncio.Future[wire.RemoteFailure | None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._process = spawned.process
        self._frames = wire.FrameDecoder(bound)
        self._transport: asyncio.Transport | None = None
        self._lock = threading.Lock()  # between its being killed and its id being free for another
        self._reaped = False
        self._exitcode: int | None = None
        self._disconnected = False
        self._retiring = False
        self._bad_message: str | None = None
        self._ended: asyncio.Future[_RunEnd | None] | None = None
        self._report: Callable[[Any], None] | None = None
        self._killer: asyncio.TimerHandle | None = None
        self.idle_timer: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        """Whether it may be given a run."""
        return not self._retiring and not self._disconnected and self._exitcode is None

    # --- a run ---

    async def run(self, begin: wire.RunTask, *, task_id: str, report: Callable[[Any], None], grace: float) -> Any:
        """Have it run a task, and wait until the handler has really ended: cancelled, it is asked, then killed.

        Raises:
            RemoteError, Overloaded, CancelledError: the handler raised.
            CannotCross: what it returned cannot travel.
            WorkerDied: the process ended first.
        """
        self.runs += 1
        ended = self._ended = self._loop.create_future()
        self._report = report
        self._send(msgspec.structs.replace(begin, number=self.runs))
        cancelled = False
        while not ended.done() or not (self.usable or self.gone.done()):
            try:
                await asyncio.shield(self.gone if ended.done() else ended)
            except asyncio.CancelledError:
                if not cancelled:
                    cancelled = True
                    self._send(wire.CancelRun(self.runs))
                    self.kill_after(grace)
        self._cancel_kill()
        self._ended = self._report = None
        if (ending := ended.result()) is None:
            if cancelled:
                raise asyncio.CancelledError
            raise self._died_error(task_id)
        return ending.value_of(task_id)

    def _died_error(self, task_id: str) -> WorkerDied:
        how, advice = self.exit_description(), "Its place is taken by a new one."
        if self._exitcode == -signal.SIGKILL and self._bad_message is None:
            advice = f"If nobody ended it, the system may have, for want of memory. {advice}"
        return WorkerDied(
            worker=self.worker, task_id=task_id, pid=self.pid, exitcode=self._exitcode, how=how, advice=advice
        )

    def exit_description(self) -> str:
        """How it ended, in words."""
        code = self._exitcode
        if self._bad_message is not None:
            return f"it sent {self._bad_message}, and was killed"
        if code is None:
            return "it is still there"
        return f"it exited with code {code}" if code >= 0 else f"it was ended by {_signal_name(-code)}"

    # --- its end ---

    def retire(self, grace: float) -> None:
        """Hang up: it ends by itself, or is killed `patience` seconds later. For one that runs nothing."""
        self._retiring = True
        self.cancel_idle_timer()
        if self._transport is not None and not self._disconnected:
            self._transport.write_eof()
        self.kill_after(grace)

    def kill(self) -> None:
        """Kill it and whatever it has started, now."""
        self._retiring = True
        with self._lock:
            if not self._reaped:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)

    def kill_after(self, seconds: float) -> None:
        """Kill it then, if it is still there and nothing spares it."""
        self._cancel_kill()
        self._killer = self._loop.call_later(seconds, self.kill)

    def _cancel_kill(self) -> None:
        if self._killer is not None:
            self._killer.cancel()
            self._killer = None

    def cancel_idle_timer(self) -> None:
        """It is idle no more."""
        if self.idle_timer is not None:
            self.idle_timer.cancel()
            self.idle_timer = None

    def reap(self) -> int:
        """Wait for its end, and end what it has started. Blocks, for a thread; returns its exit code."""
        if hasattr(os, "waitid"):  # look without reaping: until it is reaped, its number is not given to another
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:
            self._process.wait()
        self.kill()
        with self._lock:
            code = self._process.wait()
            self._reaped = True
        orphan_reaper.forget(self.pid)
        return code

    def on_exit(self, code: int) -> None:
        """For whoever reaped it: in the loop."""
        self._exitcode = code
        if not self._disconnected and self._transport is not None:  # what it sent last is still to be read
            self._loop.call_later(_LATE, self._transport.abort)
        self._finish_if_gone()

    def _finish_if_gone(self) -> None:
        if self._exitcode is None or not self._disconnected:
            return
        self._cancel_kill()
        self.cancel_idle_timer()
        if not self.ready.done():
            self.ready.set_result(wire.RemoteFailure("", self.exit_description(), ""))
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if not self.gone.done():
            self.gone.set_result(None)

    # --- the line ---

    def load(self, loading: wire.LoadHandler) -> None:
        """Tell it what to run."""
        self._send(loading)

    def _send(self, message: Any) -> None:
        if self._transport is not None and not self._disconnected:
            self._transport.write(wire.encode_frame(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio calls it."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a socket's
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it: take what the process says, and end one that does not speak the language."""
        if self._bad_message is not None:
            return
        try:
            for body in self._frames.feed(data):
                self._on_message(wire.decode_from_child(body))
        except wire.FrameTooLarge as error:
            self._kill_for_bad_message(str(error)[0].lower() + str(error)[1:].rstrip("."))
        except (msgspec.DecodeError, EnvelopeDamaged, EnvelopeTooNew, RecursionError, UnicodeDecodeError):
            self._kill_for_bad_message("what is no message")

    def _kill_for_bad_message(self, what: str) -> None:
        self._bad_message = what
        self.kill()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """As asyncio calls it: it has ended, or is about to."""
        self._disconnected = True
        self._loop.call_later(_LATE, self.kill)  # one that only closed its line is of no use any more
        self._finish_if_gone()

    def _on_message(
        self, message: wire.HandlerReady | wire.HandlerNotLoaded | wire.ProgressMessage | wire.RunFinished
    ) -> None:
        if isinstance(message, wire.HandlerReady | wire.HandlerNotLoaded):
            if not self.ready.done():
                self.ready.set_result(message.failure if isinstance(message, wire.HandlerNotLoaded) else None)
        elif self._ended is None or self._ended.done() or message.number != self.runs:
            return  # a thread that outlived its run
        elif isinstance(message, wire.ProgressMessage):
            if self._report is not None:
                self._report(decode_result(message.value))
        else:
            value = None if message.value is None else decode_result(message.value)
            self._ended.set_result(_RunEnd(value, message.failure))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
