"""The executor of daemon threads: it never queues, never joins, and reuses its threads."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from forebay._threads import DaemonThreadExecutor

TIMEOUT = 20.0  # seconds; nothing here takes as long


@pytest.fixture
def threads() -> Iterator[DaemonThreadExecutor]:
    pool = DaemonThreadExecutor()
    yield pool
    pool.shutdown()


def idle(threads: DaemonThreadExecutor, count: int) -> None:
    """Wait until `count` threads are idle."""
    for _ in range(20_000):
        with threads._lock:
            if threads._free == count:
                return
        threading.Event().wait(0.001)
    pytest.fail(f"{threads._free} are idle, not {count}")


def test_a_job_returns_its_value_or_its_exception(threads: DaemonThreadExecutor) -> None:
    assert threads.submit(pow, 2, 10).result(TIMEOUT) == 1024
    assert threads.submit(int, "11", base=2).result(TIMEOUT) == 3
    assert isinstance(threads.submit(lambda: 1 / 0).exception(TIMEOUT), ZeroDivisionError)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), StopIteration()])
def test_a_job_may_raise_anything_and_its_thread_goes_on(threads: DaemonThreadExecutor, error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert threads.submit(fail).exception(TIMEOUT) is error
    idle(threads, 1)
    first = threads.submit(threading.get_ident).result(TIMEOUT)
    idle(threads, 1)
    assert threads.submit(threading.get_ident).result(TIMEOUT) == first


def test_no_job_waits_for_another(threads: DaemonThreadExecutor) -> None:
    together = threading.Barrier(100)
    jobs = [threads.submit(together.wait, TIMEOUT) for _ in range(100)]
    assert sorted(job.result(TIMEOUT) for job in jobs) == list(range(100))


def test_an_idle_thread_is_reused(threads: DaemonThreadExecutor) -> None:
    seen = set()
    for _ in range(50):
        seen.add(threads.submit(threading.get_ident).result(TIMEOUT))
        idle(threads, 1)
    assert len(seen) == 1


def test_there_are_never_more_threads_than_simultaneous_jobs(threads: DaemonThreadExecutor) -> None:
    seen = set()
    for _ in range(20):
        together = threading.Barrier(5)

        def job(together: threading.Barrier = together) -> int:
            together.wait(TIMEOUT)
            return threading.get_ident()

        seen |= {one.result(TIMEOUT) for one in [threads.submit(job) for _ in range(5)]}
        idle(threads, 5)
    assert len(seen) == 5


def test_with_one_thread_jobs_wait_for_each_other_in_their_order() -> None:
    threads, go_on, order = DaemonThreadExecutor(max_threads=1), threading.Event(), list[int]()

    def job(number: int) -> int | None:
        go_on.wait(TIMEOUT)
        order.append(number)
        return threading.current_thread().ident

    jobs = [threads.submit(job, number) for number in range(20)]
    threads.shutdown()  # what waits is done all the same
    go_on.set()
    assert len({each.result(TIMEOUT) for each in jobs}) == 1
    assert order == list(range(20))


def test_its_threads_are_daemons(threads: DaemonThreadExecutor) -> None:
    assert threads.submit(lambda: threading.current_thread().daemon).result(TIMEOUT)
    assert threads.submit(lambda: threading.current_thread().name).result(TIMEOUT).startswith("forebay-")


def test_a_job_that_never_ends_does_not_keep_the_interpreter_from_exiting() -> None:
    program = """
import threading
from forebay._threads import DaemonThreadExecutor
began = threading.Event()
DaemonThreadExecutor().submit(lambda: (began.set(), threading.Event().wait()))
began.wait()
print("at the end", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "at the end\n"


def test_a_job_cancelled_before_it_began_never_runs(
    threads: DaemonThreadExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    starting: list[threading.Thread] = []

    def keep(thread: threading.Thread) -> None:
        starting.append(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", keep)
        job = threads.submit(ran.append, 1)
    assert job.cancel()
    starting[0].start()
    idle(threads, 1)
    assert ran == []


def test_after_shutdown_it_takes_no_job(threads: DaemonThreadExecutor) -> None:
    threads.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        threads.submit(int)
    threads.shutdown()


def test_shutdown_ends_idle_threads_and_lets_the_others_finish(threads: DaemonThreadExecutor) -> None:
    began, go_on = threading.Event(), threading.Event()

    def job() -> threading.Thread:
        began.set()
        assert go_on.wait(TIMEOUT)
        return threading.current_thread()

    spare = threads.submit(threading.current_thread).result(TIMEOUT)
    idle(threads, 1)
    running = threads.submit(job)
    assert began.wait(TIMEOUT)
    resting = threads.submit(threading.current_thread).result(TIMEOUT)
    idle(threads, 1)
    threads.shutdown(wait=True)  # which it does not do
    resting.join(TIMEOUT)
    assert not resting.is_alive()
    assert not running.done()
    go_on.set()
    worker = running.result(TIMEOUT)
    worker.join(TIMEOUT)
    assert not worker.is_alive()
    assert spare in (worker, resting)


def test_a_thread_that_cannot_start_raises_in_submit_and_the_job_never_runs(
    threads: DaemonThreadExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def refuse(_: threading.Thread) -> None:
        message = "can't start new thread"
        raise RuntimeError(message)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            threads.submit(ran.append, 1)
    assert threads.submit(pow, 2, 3).result(TIMEOUT) == 8
    assert threads.submit(pow, 2, 4).result(TIMEOUT) == 16
    assert ran == []


class Large:
    """An object whose release the test can observe."""


def test_the_arguments_of_a_job_are_not_kept_by_its_thread(threads: DaemonThreadExecutor) -> None:
    thing = Large()
    gone = weakref.ref(thing)
    threads.submit(id, thing).result(TIMEOUT)
    idle(threads, 1)
    del thing
    gc.collect()
    assert gone() is None


def test_many_threads_may_submit_at_once(threads: DaemonThreadExecutor) -> None:
    jobs: list[Future[Any]] = []
    lock = threading.Lock()

    def submit() -> None:
        for number in range(200):
            job = threads.submit(pow, number, 2)
            with lock:
                jobs.append(job)

    submitters = [threading.Thread(target=submit) for _ in range(8)]
    for one in submitters:
        one.start()
    for one in submitters:
        one.join(TIMEOUT)
    assert sum(job.result(TIMEOUT) for job in jobs) == 8 * sum(number * number for number in range(200))
