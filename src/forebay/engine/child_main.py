"""The program of a worker's process: it runs one handler, one task at a time, until its supervisor closes the channel.

The handler has the main thread, as in a program of its own: a coroutine in an event loop that lives as long as the
process, a plain callable without a loop. A second thread listens to the channel, so that a cancellation or the end of
the supervisor is noticed while the handler works.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import inspect
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forebay import context
from forebay._fork import mark_child
from forebay._hooks import await_hook, call_hook, call_plain_hook, is_awaitable
from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec
from forebay.adapters.import_paths import import_object
from forebay.carried_context import restore_context
from forebay.engine import messages
from forebay.engine.process_tree import descendants, kill_all
from forebay.errors import InvalidSetting, NotSerializable, Overloaded, PayloadTooLarge
from forebay.events import log
from forebay.overflow import decode_envelope, decode_result, encode_result
from forebay.task import Deadline, Task

_CHUNK = 1 << 16  # bytes read at a time
_MAX_LOAD_BYTES = 1 << 30  # of the first message, whose content the supervisor has bounded already


def main(fd: int) -> None:
    """Serve the supervisor at the other end of the socket `fd`."""
    mark_child()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # what is buffered when the process is killed is lost
    atexit.register(_kill_descendants, os.getpid())  # the first to be registered is the last to run
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)
    ChildRuntime(channel).serve()


def _kill_descendants(pid: int) -> None:
    """Kill what this process has started and not ended, unless this is a fork of it."""
    if os.getpid() == pid:
        kill_all(descendants(pid))


@dataclass(slots=True)
class ChildTaskContext:
    """The task that is running in this process, as `forebay.context` shows it to the handler's calls."""

    task: Task
    deadline: Deadline | None
    attempt: int
    submission: float
    report: Callable[[Any], None]
    tenant_weight: float = 1.0  # the upstreams of this process have no other run at a time


class ChildRuntime:
    """The state of the process: its channel to the supervisor, its handler, the current run."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel: socket.socket | None = channel
        self._pid = os.getpid()
        self._inbox: queue.SimpleQueue[messages.RunTask | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._writing = False  # the main thread is in the middle of a message
        self._warned = False
        self._busy = True
        self._grace = 1.0  # seconds; replaced by the supervisor's setting
        self._bound = 0
        self._handler = Handler(call=lambda _: None)
        self._runner = asyncio.Runner()
        # Of the current run; guarded by _state.
        self._state = threading.Lock()
        self._number = 0
        self._task: Task | None = None
        self._cancel_requested = False
        self._interruptible = False  # a plain callable has the main thread, and may be interrupted by a signal
        self._running: asyncio.Task[Any] | None = None

    def serve(self) -> None:
        """Load the handler, run the tasks that arrive, and return when the supervisor closes the channel."""
        os.register_at_fork(after_in_child=self._after_fork)
        signal.signal(signal.SIGTERM, self._on_term)
        request = self._receive_load(messages.FrameDecoder(_MAX_LOAD_BYTES))
        if request is None:
            return
        threading.Thread(
            target=self._listen, args=(messages.FrameDecoder(request.bound),), name="forebay-channel", daemon=True
        ).start()
        try:
            messages.ImportState.importing = True
            self._load(request)
            messages.ImportState.importing = False
        except BaseException as exc:  # noqa: BLE001 - sent to the supervisor; this process ends
            self._send(messages.HandlerNotLoaded(failure_of(exc)))
            return
        self._busy = False
        self._send(messages.HandlerReady())
        try:
            while (run := self._inbox.get()) is not None:
                self._serve_one(run)
        finally:
            if self._handler.stop is not None:
                self._runner.run(await_hook("stop", self._handler.stop()))
            self._runner.close()

    def _receive_load(self, decoder: messages.FrameDecoder) -> messages.LoadHandler | None:
        assert self._channel is not None  # noqa: S101 - just created
        while data := self._channel.recv(_CHUNK):
            for body in decoder.feed(data):
                message = messages.decode_for_child(body)
                assert isinstance(message, messages.LoadHandler)  # noqa: S101 - the first message always is
                return message
        return None

    def _load(self, request: messages.LoadHandler) -> None:
        if request.version != messages.VERSION:
            message = (
                f"Forebay was upgraded on disk (the supervisor's messages have version {request.version}, this"
                f" process's {messages.VERSION}): restart the program"
            )
            raise RuntimeError(message)
        self._bound, self._grace = request.bound, request.grace
        config: Any = None if request.config is None else decode_result(request.config)
        if request.config_path is not None:
            config = import_object(request.config_path)
        spec = HandlerSpec(worker=request.worker, handler=request.handler, factory=request.factory, config=config)
        handler = spec.build()
        if handler.nested_supervisor is not None or handler.load is not None:
            expected = "left out: a supervisor cannot be reached inside another process"
            raise InvalidSetting(owner=f"worker {request.worker!r}", name="engine", value="process", expected=expected)
        self._handler = handler
        if handler.start is not None:
            self._runner.run(_awaited(handler.start()))

    # --- the listening thread ---

    def _listen(self, decoder: messages.FrameDecoder) -> None:
        with contextlib.suppress(OSError):
            while self._channel is not None and (data := self._channel.recv(_CHUNK)):
                for body in decoder.feed(data):
                    self._on_message(messages.decode_for_child(body))
        # The supervisor has closed the channel, or is dead.
        self._inbox.put(None)
        if not self._busy:
            threading.Event().wait(self._grace)
        _kill_all()

    def _on_message(self, message: messages.LoadHandler | messages.RunTask | messages.CancelRun) -> None:
        if isinstance(message, messages.RunTask):
            with self._state:
                self._busy, self._number, self._cancel_requested = True, message.number, False
            self._inbox.put(message)
        elif isinstance(message, messages.CancelRun):
            with self._state:
                if message.number != self._number or not self._busy:
                    return
                self._cancel_requested = True
                running = self._running
            if running is not None:
                with contextlib.suppress(RuntimeError):
                    running.get_loop().call_soon_threadsafe(self._cancel_coroutine, running)
            else:
                self._cancel_blocking()

    def _cancel_coroutine(self, running: asyncio.Task[Any]) -> None:
        """Cancel a coroutine. Called in the loop."""
        stopping = self._call_on_cancel()
        if is_awaitable(stopping):
            asyncio.ensure_future(await_hook("on_cancel", stopping))  # noqa: RUF006 - the loop outlives the run
        running.cancel()

    def _cancel_blocking(self) -> None:
        """Cancel a plain callable: a signal interrupts most calls that the main thread may block in, and raises."""
        stopping = self._call_on_cancel()
        if is_awaitable(stopping):
            asyncio.run(await_hook("on_cancel", stopping))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _call_on_cancel(self) -> object:
        if self._handler.on_cancel is None or self._task is None:
            return None
        return call_hook("on_cancel", self._handler.on_cancel, self._task)

    def _on_term(self, *_: object) -> None:
        """Raise in a plain callable that is to be cancelled; ignore any other SIGTERM, such as a service manager's."""
        if self._cancel_requested and self._interruptible and not self._writing:
            self._interruptible = False
            raise asyncio.CancelledError

    # --- the main thread ---

    def _serve_one(self, run: messages.RunTask) -> None:
        task, carried = decode_envelope(run.task)
        self._task = task
        deadline = None if run.deadline is None else Deadline(run.deadline)
        task_context = ChildTaskContext(
            task, deadline, run.attempt, run.submission, lambda value: self._report(run.number, value)
        )
        own = contextvars.copy_context()
        own.run(context.set_running_task, task_context)
        if carried is not None:
            own.run(restore_context, carried)
        value, cause = self._run(own, task)
        if os.getpid() != self._pid:  # the handler forked, and its copy has returned to this point
            os._exit(0)
        with self._state:
            self._busy, self._task, self._cancel_requested = False, None, False
        if self._handler.on_end is not None:
            call_plain_hook("on_end", self._handler.on_end, task)
        failure = None if cause is None else failure_of(cause)
        encoded = None
        if failure is None:
            try:
                encoded = encode_result(value, task_id=task.task_id, bound=self._bound)
            except (NotSerializable, PayloadTooLarge) as error:
                why = messages.why_not_transferable(error)
                failure = messages.RemoteFailure(messages.NOT_TRANSFERABLE, why, "")
            except BaseException as error:  # noqa: BLE001 - a value of the user's, which may do anything
                failure = failure_of(error)
        self._send(messages.RunFinished(run.number, encoded, failure))

    def _run(self, own: contextvars.Context, task: Task) -> tuple[Any, BaseException | None]:
        if not self._handler.blocking:
            return self._run_in_loop(own, lambda: self._handler.call(task))
        value, cause = self._run_blocking(own, task)
        if cause is None and inspect.isawaitable(value):
            return self._run_in_loop(own, lambda: value)
        return value, cause

    def _run_blocking(self, own: contextvars.Context, task: Task) -> tuple[Any, BaseException | None]:
        try:
            try:
                self._interruptible = True
                if self._cancel_requested:
                    raise asyncio.CancelledError
                return own.run(self._handler.call, task), None
            finally:
                self._interruptible = False
        except BaseException as exc:  # noqa: BLE001 - sent to the supervisor
            return None, exc

    def _run_in_loop(self, own: contextvars.Context, begin: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        async def run() -> Any:
            with self._state:
                self._running = asyncio.current_task()
                if self._cancel_requested:
                    raise asyncio.CancelledError
            value = begin()
            return await value if inspect.isawaitable(value) else value

        try:
            return self._runner.run(run(), context=own), None
        except BaseException as exc:  # noqa: BLE001 - sent to the supervisor
            return None, exc
        finally:
            with self._state:
                self._running = None

    # --- the channel ---

    def _report(self, number: int, value: Any) -> None:
        try:
            self._send(messages.ProgressMessage(number, encode_result(value, task_id="", bound=self._bound)))
        except (NotSerializable, PayloadTooLarge) as error:
            if not self._warned:
                self._warned = True
                why = messages.why_not_transferable(error)
                log.warning("a progress value that cannot be sent to the supervisor's process is dropped: %s", why)
        main_thread = threading.current_thread() is threading.main_thread()
        if self._cancel_requested and self._interruptible and main_thread:
            self._interruptible = False  # the signal arrived while the message was being written
            raise asyncio.CancelledError

    def _send(self, message: Any) -> None:
        channel = self._channel
        if channel is None:
            return
        main_thread = threading.current_thread() is threading.main_thread()
        try:
            if main_thread:
                self._writing = True
            with self._sending, contextlib.suppress(OSError):  # the listening thread handles the supervisor's end
                channel.sendall(messages.encode_frame(message))
        finally:
            if main_thread:
                self._writing = False

    def _after_fork(self) -> None:
        """Close the channel in a process that the handler forked: it must neither use it nor keep it open."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def failure_of(exc: BaseException) -> messages.RemoteFailure:
    """Return an exception in the form in which it is sent."""
    try:
        message = str(exc)
    except BaseException:  # noqa: BLE001 - a broken __str__ must not lose the task
        message = "(its message cannot be shown)"
    try:
        trace = "".join(traceback.format_exception(exc))
    except Exception:  # noqa: BLE001 - as above
        trace = ""
    overloaded = None
    if isinstance(exc, Overloaded):
        overloaded = (exc.reason, exc.limited_by, exc.load, exc.retry_after)
    cancelled = isinstance(exc, asyncio.CancelledError)
    return messages.RemoteFailure.truncated(
        type=type(exc).__name__, message=message, traceback=trace, cancelled=cancelled, overloaded=overloaded
    )


def _kill_all() -> None:
    """Kill this process and everything that it has started, at once."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
