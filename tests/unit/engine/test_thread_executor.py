"""Threads of our own: they never queue, never join, and are used again."""

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

from forebay.engine import DaemonThreadExecutor

PATIENCE = 20.0  # seconds that nothing here takes


@pytest.fixture
def threads() -> Iterator[DaemonThreadExecutor]:
    pool = DaemonThreadExecutor()
    yield pool
    pool.shutdown()


def idle(threads: DaemonThreadExecutor, count: int) -> None:
    """Wait until so many threads are idle."""
    for _ in range(20_000):
        with threads._lock:
            if threads._free == count:
                return
        threading.Event().wait(0.001)
    pytest.fail(f"{threads._free} are idle, not {count}")


def test_a_job_gives_its_value_or_its_exception(threads: DaemonThreadExecutor) -> None:
    assert threads.submit(pow, 2, 10).result(PATIENCE) == 1024
    assert threads.submit(int, "11", base=2).result(PATIENCE) == 3
    assert isinstance(threads.submit(lambda: 1 / 0).exception(PATIENCE), ZeroDivisionError)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), StopIteration()])
def test_a_job_may_raise_anything_and_its_thread_goes_on(threads: DaemonThreadExecutor, error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert threads.submit(fail).exception(PATIENCE) is error
    idle(threads, 1)
    first = threads.submit(threading.get_ident).result(PATIENCE)
    idle(threads, 1)
    assert threads.submit(threading.get_ident).result(PATIENCE) == first


def test_no_job_waits_for_another(threads: DaemonThreadExecutor) -> None:
    together = threading.Barrier(100)
    jobs = [threads.submit(together.wait, PATIENCE) for _ in range(100)]
    assert sorted(job.result(PATIENCE) for job in jobs) == list(range(100))


def test_a_thread_is_used_again(threads: DaemonThreadExecutor) -> None:
    seen = set()
    for _ in range(50):
        seen.add(threads.submit(threading.get_ident).result(PATIENCE))
        idle(threads, 1)
    assert len(seen) == 1


def test_there_are_never_more_threads_than_jobs_at_a_time(threads: DaemonThreadExecutor) -> None:
    seen = set()
    for _ in range(20):
        together = threading.Barrier(5)

        def job(together: threading.Barrier = together) -> int:
            together.wait(PATIENCE)
            return threading.get_ident()

        seen |= {one.result(PATIENCE) for one in [threads.submit(job) for _ in range(5)]}
        idle(threads, 5)
    assert len(seen) == 5


def test_its_threads_are_daemons(threads: DaemonThreadExecutor) -> None:
    assert threads.submit(lambda: threading.current_thread().daemon).result(PATIENCE)
    assert threads.submit(lambda: threading.current_thread().name).result(PATIENCE).startswith("forebay-")


def test_a_job_that_never_ends_does_not_hold_up_the_interpreter() -> None:
    program = """
import threading
from forebay.engine import Threads
began = threading.Event()
Threads().submit(lambda: (began.set(), threading.Event().wait()))
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


def test_after_its_shutdown_it_takes_nothing(threads: DaemonThreadExecutor) -> None:
    threads.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        threads.submit(int)
    threads.shutdown()


def test_its_shutdown_ends_idle_threads_and_lets_the_others_finish(threads: DaemonThreadExecutor) -> None:
    began, go_on = threading.Event(), threading.Event()

    def job() -> threading.Thread:
        began.set()
        assert go_on.wait(PATIENCE)
        return threading.current_thread()

    spare = threads.submit(threading.current_thread).result(PATIENCE)
    idle(threads, 1)
    running = threads.submit(job)
    assert began.wait(PATIENCE)
    resting = threads.submit(threading.current_thread).result(PATIENCE)
    idle(threads, 1)
    threads.shutdown(wait=True)  # does not
    resting.join(PATIENCE)
    assert not resting.is_alive()
    assert not running.done()
    go_on.set()
    worker = running.result(PATIENCE)
    worker.join(PATIENCE)
    assert not worker.is_alive()
    assert spare in (worker, resting)


def test_a_thread_that_cannot_start_is_told_to_who_asked_and_the_job_never_runs(
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
    assert threads.submit(pow, 2, 3).result(PATIENCE) == 8
    assert threads.submit(pow, 2, 4).result(PATIENCE) == 16
    assert ran == []


class Large:
    """Something worth freeing."""


def test_what_a_job_worked_on_is_not_kept_by_its_thread(threads: DaemonThreadExecutor) -> None:
    thing = Large()
    gone = weakref.ref(thing)
    threads.submit(id, thing).result(PATIENCE)
    idle(threads, 1)
    del thing
    gc.collect()
    assert gone() is None


def test_it_stands_up_to_many_who_submit_at_once(threads: DaemonThreadExecutor) -> None:
    jobs: list[Future[Any]] = []
    lock = threading.Lock()

    def submit() -> None:
        for number in range(200):
            job = threads.submit(pow, number, 2)
            with lock:
                jobs.append(job)

    crowd = [threading.Thread(target=submit) for _ in range(8)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join(PATIENCE)
    assert sum(job.result(PATIENCE) for job in jobs) == 8 * sum(number * number for number in range(200))
