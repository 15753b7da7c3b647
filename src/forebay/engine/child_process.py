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
from typing import Any, NamedTuple, cast

import msgspec

from forebay._threads import DaemonThreadExecutor
from forebay.call_usage import CallUsage
from forebay.engine import messages
from forebay.engine.orphan_reaper import orphan_reaper
from forebay.engine.process_tree import MARK, descendants, kill_all, kill_marked
from forebay.errors import NotTransferable, Overloaded, RemoteError, WorkerDied
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_result

# The first code of the new interpreter: it makes the same modules importable as in this one.
_BOOT = (
    "import sys; fd, sys.path[:] = int(sys.argv[1]), sys.argv[2:]; sys.argv[1:] = []; "
    "from forebay.engine.child_main import main; main(fd)"
)
_MAX_LAG = 1.0  # seconds between the two signs of a process's end: its exit, and the end of its channel


class SpawnedProcess(NamedTuple):
    """A process that has just been started.

    Attributes:
        process: itself.
        channel: this side of the channel to it.
        mark: the value of `MARK` in its environment, and in that of all that it starts.
    """

    process: subprocess.Popen[bytes]
    channel: socket.socket
    mark: str


def spawn() -> SpawnedProcess:
    """Start an interpreter in a session of its own, so that it can be killed with all that it starts. Blocks.

    Raises:
        OSError: the system has no more processes, descriptors or memory.
    """
    channel, other = socket.socketpair()
    process = None
    mark = os.urandom(16).hex()
    try:
        with other:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-c", _BOOT, str(other.fileno()), *sys.path],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, MARK: mark},
            )
        orphan_reaper.watch(process.pid, mark)
    except BaseException:
        channel.close()
        if process is not None:
            process.kill()
            process.wait()
        raise
    return SpawnedProcess(process, channel, mark)


class _RunEnd(NamedTuple):
    """The end of a run: a value, or an exception of any kind."""

    value: Any
    failure: messages.RemoteFailure | None
    usage: CallUsage | None

    def unwrap(self, task_id: str) -> Any:
        """Return the value, or raise the exception."""
        failure = self.failure
        if failure is None:
            return self.value
        if failure.overloaded is not None:
            reason, limited_by, load, retry_after = failure.overloaded
            raise Overloaded(reason, limited_by=limited_by, load=load, retry_after=retry_after)
        if failure.cancelled:
            raise asyncio.CancelledError
        if failure.type == messages.NOT_TRANSFERABLE:
            raise NotTransferable(what="result", task_id=task_id, why=failure.message)
        raise RemoteError(type=failure.type, message=failure.message, traceback=failure.traceback)


class ChildProcess(asyncio.Protocol):
    """A worker's process, its channel, and the run that it was given, if any. It belongs to one event loop.

    Attributes:
        worker: the name of its worker.
        pid: of the process, and of its process group.
        runs: how many runs it was given.
        ready: done once it has loaded its handler, with None, or with the failure to load it.
        gone: done once it has ended and its channel is closed.
    """

    def __init__(
        self,
        spawned: SpawnedProcess,
        load: messages.LoadHandler,
        *,
        loop: asyncio.AbstractEventLoop,
        threads: DaemonThreadExecutor,
    ) -> None:
        self.worker = load.worker
        self.pid = spawned.process.pid
        self.runs = 0
        self.ready: asyncio.Future[messages.RemoteFailure | None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._load = load
        self._loop = loop
        self._threads = threads
        self._process = spawned.process
        self._mark = spawned.mark
        self._decoder = messages.FrameDecoder(load.bound)
        self._transport: asyncio.Transport | None = None
        self._lock = threading.Lock()  # no kill after its pid is free for another process
        self._reaped = False
        self._exitcode: int | None = None
        self._disconnected = False
        self._retiring = False
        self._bad_message: str | None = None
        self._ended: asyncio.Future[_RunEnd | None] | None = None
        self._report: Callable[[Any], None] | None = None
        self._kill_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        """True if it may be given a run."""
        return not self._retiring and not self._disconnected and self._exitcode is None

    # --- a run ---

    async def run(
        self,
        request: messages.RunTask,
        *,
        task_id: str,
        report: Callable[[Any], None],
        record_usage: Callable[[CallUsage], None],
        grace: float,
    ) -> Any:
        """Run a task in the process, and wait until the handler has really ended.

        Args:
            request: the task; its number is set here.
            task_id: of the task, for messages.
            report: called with each value that the handler passes to ``progress``.
            record_usage: called with what the handler's calls have used, if it made any. Of a process that ends before
                its handler does, nothing is known.
            grace: seconds that a cancelled handler has to stop; then the process is killed.

        Raises:
            RemoteError, Overloaded, CancelledError: the handler raised.
            NotTransferable: its result cannot be sent between processes.
            WorkerDied: the process ended first.
        """
        self.runs += 1
        ended = self._ended = self._loop.create_future()
        self._report = report
        self._send(msgspec.structs.replace(request, number=self.runs))
        cancelled = False
        while not ended.done() or not (self.usable or self.gone.done()):
            try:
                await asyncio.shield(self.gone if ended.done() else ended)
            except asyncio.CancelledError:
                if not cancelled:
                    cancelled = True
                    self._send(messages.CancelRun(self.runs))
                    self.kill_after(grace)
        self._cancel_kill()
        self._ended = self._report = None
        if (end := ended.result()) is None:
            if cancelled:
                raise asyncio.CancelledError
            raise self._died_error(task_id)
        if end.usage is not None:
            record_usage(end.usage)
        return end.unwrap(task_id)

    def _died_error(self, task_id: str) -> WorkerDied:
        how, advice = self.exit_description(), "A new process takes its place."
        if self._exitcode == -signal.SIGKILL and self._bad_message is None:
            advice = f"If nobody killed it, the system may have run out of memory. {advice}"
        return WorkerDied(
            worker=self.worker, task_id=task_id, pid=self.pid, exitcode=self._exitcode, how=how, advice=advice
        )

    def exit_description(self) -> str:
        """Return in words how it ended."""
        code = self._exitcode
        if self._bad_message is not None:
            return f"it sent {self._bad_message}, and was killed"
        if code is None:
            return "it is still running"
        return f"it exited with code {code}" if code >= 0 else f"it was ended by {_signal_name(-code)}"

    # --- its end ---

    def retire(self, grace: float) -> None:
        """Close the channel to it: it ends by itself, or is killed after `grace` seconds. It must run nothing."""
        self._retiring = True
        self.cancel_idle_timer()
        if self._transport is not None and not self._disconnected:
            self._transport.write_eof()
        self.kill_after(grace)

    def kill(self) -> None:
        """Kill it and everything that it has started, in a thread: on a busy machine it takes long to list."""
        self._retiring = True
        if self._exitcode is None:
            try:
                self._loop.run_in_executor(self._threads, self._kill_tree)
            except RuntimeError:  # the system has no more threads
                self._kill_tree()

    def _kill_tree(self) -> None:
        with self._lock:
            if not self._reaped:
                started = descendants(self.pid)  # now: later they have another parent
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
                kill_all(started)

    def kill_after(self, seconds: float) -> None:
        """Kill it in `seconds`, unless it has ended or its run has by then."""
        self._cancel_kill()
        self._kill_timer = self._loop.call_later(seconds, self.kill)

    def _cancel_kill(self) -> None:
        if self._kill_timer is not None:
            self._kill_timer.cancel()
            self._kill_timer = None

    def retire_after(self, idle: float, grace: float) -> None:
        """Retire it, with `grace`, once it has been idle for `idle` seconds."""
        self._idle_timer = self._loop.call_later(idle, self.retire, grace)

    def cancel_idle_timer(self) -> None:
        """Keep it, because it is used again."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def reap(self) -> int:
        """Wait for its end, kill what it has started, and return its exit code. Blocks: for a thread."""
        if hasattr(os, "waitid"):  # wait without reaping: until it is reaped, no other process gets its pid
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:
            self._process.wait()
        self._retiring = True
        self._kill_tree()
        kill_marked([self._mark])
        with self._lock:
            code = self._process.wait()
            self._reaped = True
        orphan_reaper.forget(self.pid)
        return code

    def on_exit(self, code: int) -> None:
        """Record the exit code that `reap` returned. Called in the loop."""
        self._exitcode = code
        if not self._disconnected and self._transport is not None:  # its last messages are still to be read
            self._loop.call_later(_MAX_LAG, self._transport.abort)
        self._finish_if_gone()

    def _finish_if_gone(self) -> None:
        if self._exitcode is None or not self._disconnected:
            return
        self._cancel_kill()
        self.cancel_idle_timer()
        if not self.ready.done():
            self.ready.set_result(messages.RemoteFailure("", self.exit_description(), ""))
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if not self.gone.done():
            self.gone.set_result(None)

    # --- the channel ---

    def _send(self, message: Any) -> None:
        if self._transport is not None and not self._disconnected:
            self._transport.write(messages.encode_frame(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tell it which handler to load, now that its channel is open."""
        self._transport = cast("asyncio.Transport", transport)  # a socket's; uvloop's is no subclass
        self._send(self._load)

    def data_received(self, data: bytes) -> None:
        """Handle its messages, and kill it if they cannot be decoded."""
        if self._bad_message is not None:
            return
        try:
            for body in self._decoder.feed(data):
                self._on_message(messages.decode_from_child(body))
        except messages.FrameTooLarge as error:
            self._kill_for_bad_message(str(error)[0].lower() + str(error)[1:].rstrip("."))
        except (msgspec.DecodeError, EnvelopeDamaged, EnvelopeTooNew, RecursionError, UnicodeDecodeError):
            self._kill_for_bad_message("an invalid message")

    def _kill_for_bad_message(self, what: str) -> None:
        self._bad_message = what
        self.kill()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Record that it has ended, or is about to."""
        self._disconnected = True
        self._loop.call_later(_MAX_LAG, self.kill)  # a process that only closed its channel is useless
        self._finish_if_gone()

    def _on_message(
        self,
        message: messages.HandlerReady | messages.HandlerNotLoaded | messages.ProgressMessage | messages.RunFinished,
    ) -> None:
        if isinstance(message, messages.HandlerReady | messages.HandlerNotLoaded):
            if not self.ready.done():
                self.ready.set_result(message.failure if isinstance(message, messages.HandlerNotLoaded) else None)
        elif self._ended is None or self._ended.done() or message.number != self.runs:
            return  # from a thread that outlived its run
        elif isinstance(message, messages.ProgressMessage):
            if self._report is not None:
                self._report(decode_result(message.value))
        else:
            value = None if message.value is None else decode_result(message.value)
            self._ended.set_result(_RunEnd(value, message.failure, message.usage))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
