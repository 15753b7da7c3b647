"""Processes that drive sagas, and kill or pause themselves at a given moment.

`SagaProcesses` starts them as forks of one process that has imported everything. Their moments are counted: before and
after each write to the log, and each request to the effect server. The leases of a killed process have expired for the
next one, whose time in the log is later, so no test waits for that.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import msgspec
from tests.support.effect_server import EffectServer

from forebay import BackpressureSupervisor, Retry, Task, clock
from forebay.errors import SagaCompensated, SagaParked, SagaTaken
from forebay.saga import Done, Saga, SagaLog, SagaRun, held_saga, open_saga_log, redis_log, saga, sqlite_log
from forebay.saga.records import UNFINISHED, LogWrite, SagaHeader, StoredSaga
from forebay.supervisor import saga_driver

_IMPORTED = (redis_log, sqlite_log)  # here, and not in each fork

ROOT = Path(__file__).parents[2]
LEASE = 30.0  # seconds
LATER = 2 * LEASE  # seconds by which the clock of a process is later than that of the one before it
MAX_LIVES = 1000  # processes, one after the other
FAILURES = 7  # of a compensation that is parked twice, and then succeeds
QUICK = Retry(max_attempts=3, base_delay=0.001, max_delay=0.001)
SLOWER = Retry(max_attempts=3, base_delay=0.01, max_delay=0.01)


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """One process.

    Attributes:
        url: of the log.
        effects: the file of the effect server.
        saga_id: of the saga.
        name: of the saga.
        how: what goes wrong in it.
        number: of the process; its clock is by so much later than that of the first.
        crash_at: the moment at which it kills itself, from 1; None: it does not.
        pause_at: the moment at which it stops, until it is continued after its lease has expired; None: it does not.
        pauses_between: it stops after a request alone, and not between its look at its lease and a request.
        submits: whether it submits the saga again, as its caller would; else it takes it from the log.
        linger: turns of the event loop in which the end of a step waits to be written with the start of the next.
    """

    url: str
    effects: str
    saga_id: str
    name: str
    how: str
    number: int = 0
    crash_at: int | None = None
    pause_at: int | None = None
    pauses_between: bool = False
    submits: bool = True
    linger: int = 0


class Moments:
    """The moments of a process, at one of which it kills itself, or stops.

    Attributes:
        paused_in: what it was about to do, or had done, when it stopped; None: it has not.
        behind: seconds by which its time is behind the machine's, in the log.
        commits: a lock; while it is held, no commit is under way.
    """

    def __init__(self, life: Life) -> None:
        self.paused_in: str | None = None
        self.behind = LATER * (MAX_LIVES - life.number)
        self._life = life
        self._passed = 0
        self.commits: AbstractContextManager[Any] = nullcontext()

    def passes(self, what: str) -> None:
        """Let a moment pass, or be killed or stopped at it."""
        self._passed += 1
        if self._passed == self._life.crash_at:
            _send(signal.SIGKILL)
        at = self._life.pause_at
        if at is None or self._passed < at or self.paused_in is not None:
            return
        if what == "after request" or not self._life.pauses_between:
            self.paused_in = what
            with self.commits:  # a process that is stopped within one keeps all others from the file
                _send(signal.SIGSTOP)
            self._see_time()

    def note_outcome(self, error: BaseException | None) -> None:
        """Note for the test what the task has raised, if the process was stopped."""
        if self.paused_in is not None:
            Path(f"{self._life.effects}.paused").write_text(f"{self.paused_in}\n{type(error).__name__}")

    def _see_time(self) -> None:
        """Set the clock to that of the process which is to be the next one."""
        ahead = LATER * (int(lives_file(self._life).read_text()) - self._life.number)
        now = clock.now
        clock.now = lambda: now() + ahead
        self.behind -= ahead


def _send(number: signal.Signals) -> None:
    """Send a signal to the process, by this thread, which gets no further: sent to another, it takes a moment."""
    signal.pthread_kill(threading.get_ident(), number)


def lives_file(life: Life) -> Path:
    """Return the file with the number of the next process, for those that were stopped."""
    return Path(f"{life.effects}.lives")


class CrashingLog:
    """A saga log, before and after each write of which a moment passes.

    Attributes:
        ended: set once the saga has ended.
    """

    durable = True

    def __init__(self, log: SagaLog, moments: Moments) -> None:
        self.ended = asyncio.Event()
        self._log = log
        self._moments = moments
        if isinstance(log, sqlite_log.SqliteSagaLog):
            moments.commits = log._writer._connection_lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def begin(self, header: SagaHeader, restart: bytes, *, fence: str, until: float, now: float) -> StoredSaga:
        self._moments.passes("before begin")
        behind = self._moments.behind
        stored = await self._log.begin(header, restart, fence=fence, until=until - behind, now=now - behind)
        self._moments.passes("after begin")
        return self._by_own_time(stored)

    async def claim(
        self, names: Sequence[str], *, limit: int, fence: str, until: float, now: float
    ) -> Sequence[StoredSaga]:
        behind = self._moments.behind
        claimed = await self._log.claim(names, limit=limit, fence=fence, until=until - behind, now=now - behind)
        if claimed:
            self._moments.passes("after claim")
        return [self._by_own_time(stored) for stored in claimed]

    def _by_own_time(self, stored: StoredSaga) -> StoredSaga:
        return msgspec.structs.replace(stored, until=stored.until + self._moments.behind)

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        self._moments.passes("before append")
        written = await self._log.append(saga_id, write, fence=fence, now=now - self._moments.behind)
        self._moments.passes("after append")
        if written and write.state not in UNFINISHED:
            self.ended.set()
        return written

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        return await self._log.renew(holders, until=until - self._moments.behind)

    async def release(self, saga_id: str, *, fence: str) -> None:
        self._moments.passes("before release")
        await self._log.release(saga_id, fence=fence)
        self._moments.passes("after release")


class Calls:
    """What the steps of the sagas call: requests to the effect server, before and after each of which a moment passes.

    What is called by ``plain_`` functions runs in threads.
    """

    def __init__(self, server: EffectServer, moments: Moments) -> None:
        self.server = server
        self._moments = moments

    def do(self, step: str) -> Callable[..., Any]:
        """Return a step that has an effect."""

        async def do(*_: Any, key: str) -> str:
            return self._do(step, key)

        return do

    def plain_do(self, step: str) -> Callable[..., Any]:
        def do(*_: Any, key: str) -> str:
            return self._do(step, key)

        return do

    def do_and_raise(self, step: str, error: Exception) -> Callable[..., Any]:
        """Return a step that has an effect, and raises all the same."""

        async def do(*_: Any, key: str) -> str:
            self._do(step, key)
            raise error

        return do

    def stumble(self, step: str, *, until: int) -> Callable[..., Any]:
        """Return a step that is rejected at first; then it has an effect."""

        async def do(*_: Any, key: str) -> str:
            if self.server.count("stumble", step) < until:
                self.server.stumble(step, key)
                raise OSError("not now")
            return self._do(step, key)

        return do

    def undo(self, step: str, *, stumbles: int = 0) -> Callable[..., Any]:
        """Return the compensation of a step; it raises so often at first."""

        async def undo(_: Any, *, key: str) -> None:
            if self.server.count("stumble", f"undo {step}") < stumbles:
                self.server.stumble(f"undo {step}", key)
                raise OSError("not now")
            self._undo(step, key)

        return undo

    def plain_undo(self, step: str) -> Callable[..., Any]:
        def undo(_: Any, *, key: str) -> None:
            self._undo(step, key)

        return undo

    def check(self, step: str) -> Callable[..., Any]:
        """Return the check of a step."""

        async def check(*, key: str) -> Done | None:
            self._moments.passes("before request")
            found = self.server.check(step, key)
            self._moments.passes("after request")
            return None if found is None else Done(found)

        return check

    def _do(self, step: str, key: str) -> str:
        self._moments.passes("before request")
        output = self.server.do(step, key)
        self._moments.passes("after request")
        return output

    def _undo(self, step: str, key: str) -> None:
        self._moments.passes("before request")
        self.server.undo(step, key)
        self._moments.passes("after request")


def chain_of(calls: Calls) -> Saga:
    """Return a saga of steps one after the other, each of which can be repeated or looked up."""

    @saga("chain", undo_retry=QUICK)
    async def chain(run: SagaRun, how: str) -> list[str]:
        stumbles = {"undo stumbles": 2, "undo fails": FAILURES}.get(how, 0)
        notes = await run.step(
            "research",
            calls.do("research"),
            compensate=calls.undo("research", stumbles=stumbles),
            idempotent=True,
        )
        text = await run.step(
            "summarize",
            calls.plain_do("summarize"),
            notes,
            compensate=calls.plain_undo("summarize"),
            check=calls.check("summarize"),
        )
        tried = await run.step(
            "try", calls.stumble("try", until=1), compensate=calls.undo("try"), retry=QUICK, idempotent=True
        )
        if how in ("step fails", "undo stumbles", "undo fails"):
            broken = calls.do_and_raise("break", ValueError("no"))
            await run.step("break", broken, text, compensate=calls.undo("break"), idempotent=True)
        if how == "function fails":
            raise ValueError(how)
        act = calls.do("act")
        if how == "pivot fails":
            act = calls.stumble("act", until=1_000_000)
        if how == "pivot has no answer":
            act = calls.do_and_raise("act", TimeoutError("no answer"))
        sent = await run.step("act", act, text, pivot=True, check=calls.check("act"))
        told = await run.step("tell", calls.stumble("tell", until=2), sent, idempotent=True, retry=QUICK)
        filed = await run.step("file", calls.plain_do("file"), sent, check=calls.check("file"))
        return [notes, text, tried, sent, told, filed]

    return chain


def branches_of(calls: Calls) -> Saga:
    """Return a saga of steps side by side, of which the left branch is the shorter one."""

    @saga("branches", undo_retry=QUICK)
    async def branches(run: SagaRun, how: str) -> list[str]:
        async def branch(name: str, *, length: int) -> str:
            if how == f"{name} fails":  # after the other branch has gone on
                failing = calls.stumble(f"{name} fails", until=1_000_000)
                await run.step(f"{name} fails", failing, retry=SLOWER, idempotent=True)
            first: str = await run.step(
                f"{name} 1", calls.do(f"{name} 1"), compensate=calls.undo(f"{name} 1"), idempotent=True
            )
            for number in range(2, length + 1):
                step = f"{name} {number}"
                await run.step(step, calls.plain_do(step), compensate=calls.plain_undo(step), check=calls.check(step))
            return first

        left, right = await asyncio.gather(branch("left", length=1), branch("right", length=3))
        sent = await run.step("act", calls.do("act"), left, right, pivot=True, idempotent=True)
        return [left, right, sent]

    return branches


def unrepeatable_of(calls: Calls) -> Saga:
    """Return a saga of steps that can be neither repeated nor looked up."""

    @saga("unrepeatable", undo_retry=QUICK)
    async def unrepeatable(run: SagaRun, how: str) -> list[str]:
        first = await run.step("first", calls.do("first"), compensate=calls.undo("first"))
        second = await run.step("second", calls.plain_do("second"), compensate=calls.plain_undo("second"))
        if how == "step fails":
            await run.step("break", calls.do_and_raise("break", ValueError("no")), compensate=calls.undo("break"))
        sent = await run.step("act", calls.do("act"), pivot=True)
        told = await run.step("tell", calls.do("tell"))
        return [first, second, sent, told]

    return unrepeatable


SAGAS: Mapping[str, Callable[[Calls], Saga]] = {
    "chain": chain_of,
    "branches": branches_of,
    "unrepeatable": unrepeatable_of,
}


# --- the forks ---


async def live(life: Life) -> None:
    """Drive a saga to its end, unless a moment kills the process."""
    held_saga._LINGER = life.linger
    saga_driver._POLL = 0.01  # it may have been taken for its worker just before its task comes
    moments = Moments(life)
    log = CrashingLog(open_saga_log(life.url), moments)
    calls = Calls(EffectServer(Path(life.effects)), moments)
    saga = SAGAS[life.name](calls)
    async with BackpressureSupervisor(saga_log=log, lease=LEASE, max_attempts=3) as supervisor:
        supervisor.register_worker(saga.name, handler=saga, task_types=[saga.name])
        stored = await log.get(life.saga_id)
        async with asyncio.timeout(20):
            if life.submits or stored is None:
                ticket = await supervisor.submit(Task(saga.name, life.how, key=life.saga_id))
                result = await ticket
                assert result.success or isinstance(result.cause, SagaCompensated | SagaParked | SagaTaken), result
                moments.note_outcome(result.cause)
            elif stored.header.state in UNFINISHED:
                await log.ended.wait()


def fork(life: Life) -> int:
    """Run `live` in a fork; return its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            asyncio.run(live(life))
            status = 0
        except BaseException:  # noqa: BLE001 - its parent reads the status
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def serve() -> None:
    """Run a process for each `Life` of the standard input, or continue that of a process id; print how it ends."""
    logging.getLogger("forebay").setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()  # else each fork would copy what a collection visits
    for line in sys.stdin:
        request = msgspec.json.decode(line, type=Life | int)
        if isinstance(request, Life):
            pid = fork(request)
        else:
            pid = request
            os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, os.WUNTRACED)
        ended = End(stopped=pid) if os.WIFSTOPPED(status) else End(status=os.waitstatus_to_exitcode(status))
        print(msgspec.json.encode(ended).decode(), flush=True)


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a process has ended.

    Attributes:
        status: its exit status, negative if a signal has killed it.
        stopped: its id, if it has not ended, but stopped.
    """

    status: int = 0
    stopped: int | None = None


class SagaProcesses:
    """Processes that drive sagas, as a context manager."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.support.killed_sagas"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
        )
        return self

    def run(self, life: Life) -> bool:
        """Run a process; return whether it was killed."""
        end = self._request(life)
        assert end.stopped is None
        return end.status != 0

    def pause(self, life: Life) -> int | None:
        """Run a process until it stops, and return its id; None: it has ended."""
        return self._request(life).stopped

    def resume(self, pid: int) -> None:
        """Continue a process, and wait for its end."""
        assert self._request(pid) == End(status=0)

    def _request(self, request: Life | int) -> End:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(request).decode() + "\n")
        self._process.stdin.flush()
        end = msgspec.json.decode(self._process.stdout.readline(), type=End)
        assert end.status in (0, -signal.SIGKILL), f"it has failed, see its standard error: {request}"
        return end

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also those that a failed test has left stopped
        self._process.communicate()


if __name__ == "__main__":
    serve()
