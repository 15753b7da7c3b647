"""An executor of daemon threads for plain callables.

asyncio's default executor has few threads, shared by everyone, and is joined at exit. Here those who submit are the
bound, such as the slots of the workers, so every job starts at once; and a handler that never ends, or a disk that
never answers, cannot keep the interpreter from exiting.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_IDLE_TIMEOUT = 30.0  # seconds after which a thread without a job ends

#: The threads of all executors that wait for a job: they do nothing, and end by themselves.
idle_threads: set[threading.Thread] = set()


class DaemonThreadExecutor(Executor):
    """An executor that starts a daemon thread whenever none is idle, and never joins one.

    It is passed to ``loop.run_in_executor``, the only way that blocking work takes; a virtual-time loop runs the job
    inline there.

    Args:
        name: what the names of its threads begin with.
        max_threads: how many there may be; further jobs wait for one, in their order.
    """

    def __init__(self, name: str = "forebay", *, max_threads: float = math.inf) -> None:
        self._name = name
        self._max_threads = max_threads
        self._threads = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._free = 0  # threads that wait for a job, minus jobs that wait for a thread
        self._closed = False
        self._numbers = itertools.count(1)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in a thread: at once, unless there are `max_threads`.

        Raises:
            RuntimeError: the executor was shut down, or no thread can be started; `fn` is not run then.
        """
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as exc:  # noqa: BLE001 - it is delivered through the future
                    future.set_exception(exc)

        with self._lock:
            if self._closed:
                message = "this executor was shut down"
                raise RuntimeError(message)
            self._jobs.put(job)
            self._free -= 1
            missing = self._free < 0 and self._threads < self._max_threads
            if missing:
                self._free += 1  # the thread that is started below
                self._threads += 1
        if missing:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{next(self._numbers)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads
                with self._lock:
                    self._free -= 1
                    self._threads -= 1
                if future.cancel():  # else a thread that became idle has taken the job
                    raise
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002, ARG002
        """End the idle threads; one that runs a job ends after it, and after those that wait. Returns at once."""
        with self._lock:
            self._closed = True
            for _ in range(self._free):
                self._jobs.put(None)

    def _work(self) -> None:
        thread = threading.current_thread()
        while True:
            idle_threads.add(thread)
            try:
                job = self._jobs.get(timeout=_IDLE_TIMEOUT)
            except queue.Empty:
                with self._lock:
                    if self._free > 0:  # no job has counted on this thread in the meantime
                        self._free -= 1
                        self._threads -= 1
                        return
                continue
            finally:
                idle_threads.discard(thread)
            if job is None:
                return
            job()
            del job  # an idle thread must not keep a payload alive
            with self._lock:
                if self._closed and self._free >= 0:
                    return
                self._free += 1


class LoopExecutor(ThreadPoolExecutor):
    """A default executor of an event loop, some of whose jobs run elsewhere.

    Args:
        before: what was the default executor until now; it runs all other jobs. None: asyncio would make one now.
        elsewhere: returns the executor of a job, the callable that is to be run; None: the default one. Called in the
            context of who gives the job to the loop.
    """

    def __init__(self, before: Executor | None, elsewhere: Callable[[Callable[..., Any]], Executor | None]) -> None:
        super().__init__(thread_name_prefix="asyncio")
        self._before = before
        self._elsewhere = elsewhere

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in a thread."""
        executor = self._elsewhere(fn) or self._before
        return super().submit(fn, *args, **kwargs) if executor is None else executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - the base's
        """Shut down the default executor; the others belong to those who chose them."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        if self._before is not None:
            self._before.shutdown(wait, cancel_futures=cancel_futures)
