"""The inside of a process that runs one worker's handler: one task at a time, until its supervisor hangs up.

The handler has the main thread, as in a program of its own: a coroutine in an event loop that lives as long as the
process, a plain callable without one. A second thread listens, so that a cancellation or the end of the supervisor is
heard while the handler works.
"""

from __future__ import annotations

import asyncio
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
from typing import Any

from forebay import context
from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec
from forebay.adapters.import_paths import import_object
from forebay.engine import messages as wire
from forebay.errors import InvalidSetting, NotSerializable, Overloaded, PayloadTooLarge
from forebay.events import log
from forebay.overflow import decode_result, decode_task, encode_result
from forebay.task import Deadline, Task

_CHUNK = 1 << 16  # bytes read at a time


def main(fd: int) -> None:
    """Serve the supervisor at the other end of the socket `fd`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # what is not written when it is killed is lost
    line = socket.socket(fileno=fd)
    line.set_inheritable(False)
    ChildRuntime(line).serve()


class ChildTaskContext:
    """The task that is running here, as its calls see it: what `forebay.context` knows."""

    def __init__(self, task: Task, deadline: Deadline | None, attempt: int, report: Callable[[Any], None]) -> None:
        self.task = task
        self.deadline = deadline
        self.attempt = attempt
        self.report = report


class ChildRuntime:
    """The process: its line to the supervisor, its handler, the run under way."""

    def __init__(self, line: socket.socket) -> None:
        self._channel: socket.socket | None = line
        self._pid = os.getpid()
        self._inbox: queue.SimpleQueue[wire.RunTask | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._writing = False  # the main thread is in the middle of a message
        self._warned = False
        self._busy = True
        self._grace = 1.0  # seconds; the supervisor says its own
        self._bound = 0
        self._handler = Handler(call=lambda _: None)
        self._runner = asyncio.Runner()
        # of the run under way
        self._state = threading.Lock()
        self._number = 0
        self._task: Task | None = None
        self._cancel_requested = False  # to stop
        self._interruptible = False  # a plain handler has the main thread
        self._running: asyncio.Task[Any] | None = None

    def serve(self) -> None:
        """Load the handler, run what comes, end when the supervisor hangs up."""
        os.register_at_fork(after_in_child=self._after_fork)
        signal.signal(signal.SIGTERM, self._on_term)
        frames = wire.FrameDecoder(_BOUND_OF_LOAD)
        loading = self._receive_load(frames)
        if loading is None:
            return
        threading.Thread(
            target=self._listen, args=(wire.FrameDecoder(loading.bound),), name="forebay-line", daemon=True
        ).start()
        try:
            wire.ImportState.importing = True
            self._load(loading)
            wire.ImportState.importing = False
        except BaseException as exc:  # noqa: BLE001 - told to the supervisor; this process ends
            self._send(wire.HandlerNotLoaded(failure_of(exc)))
            return
        self._busy = False
        self._send(wire.HandlerReady())
        try:
            while (begin := self._inbox.get()) is not None:
                self._serve_one(begin)
        finally:
            if self._handler.stop is not None:
                self._runner.run(_awaited(self._handler.stop()))
            self._runner.close()

    def _receive_load(self, frames: wire.FrameDecoder) -> wire.LoadHandler | None:
        assert self._channel is not None  # noqa: S101 - just made
        while data := self._channel.recv(_CHUNK):
            for body in frames.feed(data):
                message = wire.decode_for_child(body)
                assert isinstance(message, wire.LoadHandler)  # noqa: S101 - the first always is
                return message
        return None

    def _load(self, loading: wire.LoadHandler) -> None:
        if loading.version != wire.VERSION:
            message = (
                f"Forebay was upgraded on disk (version {loading.version} of the wire, here {wire.VERSION}): restart"
            )
            raise RuntimeError(message)
        self._bound, self._grace = loading.bound, loading.grace
        config: Any = None if loading.config is None else decode_result(loading.config)
        if loading.config_path is not None:
            config = import_object(loading.config_path)
        recipe = HandlerSpec(worker=loading.worker, handler=loading.handler, factory=loading.factory, config=config)
        handler = recipe.build()
        if handler.nested_supervisor is not None or handler.load is not None:
            expected = "left out: a supervisor cannot be reached inside of another process"
            raise InvalidSetting(owner=f"worker {loading.worker!r}", name="engine", value="process", expected=expected)
        self._handler = handler
        if handler.start is not None:
            self._runner.run(_awaited(handler.start()))

    # --- the listening thread ---

    def _listen(self, frames: wire.FrameDecoder) -> None:
        with contextlib.suppress(OSError):
            while self._channel is not None and (data := self._channel.recv(_CHUNK)):
                for body in frames.feed(data):
                    self._on_message(wire.decode_for_child(body))
        # The supervisor has hung up, or is dead.
        self._inbox.put(None)
        if not self._busy:
            threading.Event().wait(self._grace)
        _kill_all()

    def _on_message(self, message: wire.LoadHandler | wire.RunTask | wire.CancelRun) -> None:
        if isinstance(message, wire.RunTask):
            with self._state:
                self._busy, self._number, self._cancel_requested = True, message.number, False
            self._inbox.put(message)
        elif isinstance(message, wire.CancelRun):
            with self._state:
                if message.number != self._number or not self._busy:
                    return
                self._cancel_requested = True
                aio = self._running
            if aio is not None:
                with contextlib.suppress(RuntimeError):
                    aio.get_loop().call_soon_threadsafe(self._cancel_coroutine, aio)
            else:
                self._cancel_blocking()

    def _cancel_coroutine(self, aio: asyncio.Task[Any]) -> None:
        """In the loop: stop a coroutine."""
        asked = self._call_on_cancel()
        if inspect.isawaitable(asked):
            asyncio.ensure_future(asked)  # noqa: RUF006 - the loop runs on at least until the run has ended
        aio.cancel()

    def _cancel_blocking(self) -> None:
        """Stop a plain callable: raise in the main thread, which a signal reaches in most that it may wait for."""
        asked = self._call_on_cancel()
        if inspect.isawaitable(asked):
            asyncio.run(_awaited(asked))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _call_on_cancel(self) -> object:
        try:
            if self._handler.on_cancel is not None and self._task is not None:
                return self._handler.on_cancel(self._task)
        except Exception:  # noqa: BLE001 - it is the user's, and the run must be stopped all the same
            log.exception("on_cancel failed")
        return None

    def _on_term(self, *_: object) -> None:
        """A signal without a request, such as one to a whole service that is to drain, is passed over."""
        if self._cancel_requested and self._interruptible and not self._writing:
            self._interruptible = False
            raise asyncio.CancelledError

    # --- the main thread ---

    def _serve_one(self, begin: wire.RunTask) -> None:
        task = self._task = decode_task(begin.task)
        deadline = None if begin.deadline is None else Deadline(begin.deadline)
        visit = ChildTaskContext(task, deadline, begin.attempt, lambda value: self._report(begin.number, value))
        own = contextvars.copy_context()
        own.run(context.set_running_task, visit)
        value, cause = self._run(own, task)
        if os.getpid() != self._pid:  # the handler forked, and its copy has come back here
            os._exit(0)
        with self._state:
            self._busy, self._task, self._cancel_requested = False, None, False
        if self._handler.on_end is not None:
            self._handler.on_end(task)
        failure = None if cause is None else failure_of(cause)
        encoded = None
        if failure is None:
            try:
                encoded = encode_result(value, task_id=task.task_id, bound=self._bound)
            except (NotSerializable, PayloadTooLarge) as error:
                failure = wire.RemoteFailure(wire.NOT_TRANSFERABLE, wire.why_not_transferable(error), "")
        self._send(wire.RunFinished(begin.number, encoded, failure))

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
        except BaseException as exc:  # noqa: BLE001 - told to the supervisor
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
        except BaseException as exc:  # noqa: BLE001 - told to the supervisor
            return None, exc
        finally:
            with self._state:
                self._running = None

    # --- the line ---

    def _report(self, number: int, value: Any) -> None:
        try:
            self._send(wire.ProgressMessage(number, encode_result(value, task_id="", bound=self._bound)))
        except (NotSerializable, PayloadTooLarge) as error:
            if not self._warned:
                self._warned = True
                log.warning("progress that cannot leave its process is dropped: %s", wire.why_not_transferable(error))
        if self._cancel_requested and self._interruptible and threading.current_thread() is threading.main_thread():
            self._interruptible = False  # the signal came while the message was written
            raise asyncio.CancelledError

    def _send(self, message: Any) -> None:
        line = self._channel
        if line is None:
            return
        here = threading.current_thread() is threading.main_thread()
        try:
            if here:
                self._writing = True
            with self._sending, contextlib.suppress(OSError):  # the listening thread sees to the end of the supervisor
                line.sendall(wire.encode_frame(message))
        finally:
            if here:
                self._writing = False

    def _after_fork(self) -> None:
        """In a process that the handler forked: the line is not its to use, nor to hold open."""
        line, self._channel = self._channel, None
        if line is not None:
            line.close()


_BOUND_OF_LOAD = 1 << 30  # bytes; what the supervisor itself has bound already


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def failure_of(exc: BaseException) -> wire.RemoteFailure:
    """An exception, as it travels."""
    try:
        message = str(exc)
    except Exception:  # noqa: BLE001 - a broken __str__ must not lose the task
        message = "(its message cannot be shown)"
    try:
        trace = "".join(traceback.format_exception(exc))
    except Exception:  # noqa: BLE001 - as above
        trace = ""
    overloaded = None
    if isinstance(exc, Overloaded):
        overloaded = (exc.reason, exc.limited_by, exc.load, exc.retry_after)
    cancelled = isinstance(exc, asyncio.CancelledError)
    kind = type(exc).__name__
    return wire.RemoteFailure.truncated(
        type=kind, message=message, traceback=trace, cancelled=cancelled, overloaded=overloaded
    )


def _kill_all() -> None:
    """End this process and whatever it started, at once."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
