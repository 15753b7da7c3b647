"""A target whose replicas are processes on this machine, each a supervisor that takes tasks from a shared overflow."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from forebay import clock
from forebay._validate import check_name, check_not_negative, check_positive, check_whole, reject
from forebay.events import log
from forebay.retry import Retry
from forebay.scale.target import ReplicaReport, Replicas, sum_up

_OWNER: Final = "ProcessTarget"
_COMMAND: Final = (sys.executable, "-m", "forebay.supervisor.worker_process")
_GRACE: Final = 10.0  # seconds beyond the drain timeout, after which a process that does not end is killed
_LONG_LIFE: Final = 60.0  # seconds after which the death of a process says nothing of the next one's
_BACKOFF: Final = Retry(base_delay=1.0, max_delay=60.0)


class _ReplicaProcess:
    """One replica: a process, and what it last reported.

    Attributes:
        process: None until it was started.
        draining: whether it has been told to drain.
        last_report: None until it takes tasks.
    """

    def __init__(self, started_at: float) -> None:
        self.started_at = started_at
        self.process: asyncio.subprocess.Process | None = None
        self.draining = False
        self.last_report: ReplicaReport | None = None

    @property
    def ready(self) -> bool:
        """True if it has reported."""
        return self.last_report is not None

    def start(self, process: asyncio.subprocess.Process) -> None:
        """Record that it was started; one that is to drain already is told so now."""
        self.process = process
        if self.draining:
            self.signal(signal.SIGTERM)

    def drain(self) -> None:
        """Have it drain and exit."""
        self.draining = True
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def report(self, line: bytes) -> None:
        """Take a report in. One that cannot be read changes nothing."""
        with contextlib.suppress(msgspec.DecodeError):  # of which a ValidationError is one
            self.last_report = msgspec.json.decode(line, type=ReplicaReport)


class ProcessTarget:
    """Processes on this machine, each of which runs a supervisor as a worker of a shared overflow.

    Each runs ``python -m forebay.supervisor.worker_process`` with the import path of a supervisor; see ``forebay
    worker``. One that is to go gets SIGTERM: it takes no more tasks, finishes what it runs, gives back what waits, and
    exits. One that dies is replaced, later and later if they keep dying; what it ran is leased again by another. If
    this process dies, they drain and exit.

    Args:
        supervisor: the import path of the supervisor, ``"module:name"`` or ``"file.py:name"``, or of a function that
            returns it. Its overflow must be the one of the supervisor here, and survive a process.
        drain_timeout: seconds that a process may take to finish what it runs; then that goes back to the overflow.
            None: no limit.
        start_timeout: seconds within which a process must have started; otherwise it is killed, and started again.
        env: environment variables of the processes, beside those of this one.
        command: the program and its first arguments, instead of this Python and the module above.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    outside = True

    def __init__(
        self,
        supervisor: str,
        *,
        drain_timeout: float | None = None,
        start_timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        check_name(_OWNER, "supervisor", supervisor)
        if not all(supervisor.rpartition(":")[::2]):
            reject(_OWNER, "supervisor", supervisor, 'the import path of a supervisor, such as "app:supervisor"')
        check_not_negative(_OWNER, "drain_timeout", drain_timeout, unit="seconds", none="for no limit")
        check_positive(_OWNER, "start_timeout", start_timeout, unit="seconds")
        self._path = supervisor
        self._drain_timeout = drain_timeout
        self._start_timeout = start_timeout
        self._env = dict(env or {})
        self._command = tuple(command)
        self._wanted = 0
        self._processes: dict[_ReplicaProcess, asyncio.Task[None]] = {}
        self._failures = 0  # in a row: processes that did not live long
        self._restart: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """``"process:"`` and the import path."""
        return f"process:{self._path}"

    async def open(self) -> None:
        """Do nothing: the first `scale` starts processes."""

    async def replicas(self) -> Replicas:
        """Return the processes; what most of the ready ones are short of, and their mean service time."""
        live = (each for each in self._processes if not each.draining)
        return sum_up(self._wanted, [each.last_report for each in live if each.last_report is not None])

    async def scale(self, replicas: int) -> None:
        """Start so many processes as are missing, or have so many as are too many drain: those that run least."""
        check_whole(_OWNER, "replicas", replicas, minimum=0)
        self._wanted = replicas
        self._adjust()

    async def close(self) -> None:
        """Have all processes drain, and wait for their end. If this is cancelled, they are killed."""
        self._wanted = 0
        try:
            self._adjust()
            if self._processes:
                await asyncio.wait(tuple(self._processes.values()))
        except BaseException:
            for each, running in self._processes.items():
                each.signal(signal.SIGKILL)
                if each.process is None:
                    running.cancel()
            raise
        finally:
            if self._restart is not None:
                self._restart.cancel()
                self._restart = None

    @property
    def pids(self) -> Sequence[int]:
        """The ids of the processes that run, those that drain included."""
        return [each.process.pid for each in self._processes if each.process is not None]

    # --- processes ---

    def _adjust(self) -> None:
        """Start or drain processes until as many as are wanted remain."""
        loop = asyncio.get_running_loop()
        live = [each for each in self._processes if not each.draining]
        if len(live) < self._wanted and self._restart is None:
            for _ in range(self._wanted - len(live)):
                each = _ReplicaProcess(loop.time())
                self._processes[each] = loop.create_task(self._run(each))
        live.sort(key=lambda each: -1 if each.last_report is None else each.last_report.running)
        for each in live[: max(0, len(live) - self._wanted)]:
            each.drain()
            if self._drain_timeout is not None:
                loop.call_later(self._drain_timeout + _GRACE, each.signal, signal.SIGKILL)

    async def _run(self, each: _ReplicaProcess) -> None:
        """Run one process from its start to its end."""
        status: int | None = None
        try:
            status = await self._run_process(each)
        except Exception as error:  # noqa: BLE001 - it could not be started: as if it had died
            log.warning("%s: a process could not be started (%s: %s)", self.name, type(error).__name__, error)
        finally:
            del self._processes[each]
        if not each.draining:
            self._died(each, status)
        elif status and each.ready:  # else it was told before it could listen
            log.warning("%s: a process that drained ended with status %s", self.name, status)

    async def _run_process(self, each: _ReplicaProcess) -> int:
        ours, theirs = socket.socketpair()
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        try:
            try:
                process = await self._spawn(theirs.fileno())
            finally:
                theirs.close()
            each.start(process)
            try:
                await self._read_reports(each, reader)
                return await process.wait()
            except BaseException:
                each.signal(signal.SIGKILL)
                raise
        finally:
            writer.close()

    async def _spawn(self, report_to: int) -> asyncio.subprocess.Process:
        options = ["--report-to", str(report_to)]
        if self._drain_timeout is not None:
            options += ["--drain-timeout", f"{self._drain_timeout:g}"]
        return await asyncio.create_subprocess_exec(
            *self._command,
            self._path,
            *options,
            pass_fds=(report_to,),
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, **self._env},
            start_new_session=True,  # a Ctrl-C is for this process, which has them drain
        )

    async def _read_reports(self, each: _ReplicaProcess, reader: asyncio.StreamReader) -> None:
        """Take reports in until the process closes its end. Kill one that does not report in time."""
        try:
            async with asyncio.timeout(self._start_timeout):
                while not each.ready:
                    if not (line := await reader.readline()):
                        return
                    each.report(line)
        except TimeoutError:
            log.warning("%s: a process has not started within %g s, and is killed", self.name, self._start_timeout)
            each.signal(signal.SIGKILL)
            return
        while line := await reader.readline():
            each.report(line)

    def _died(self, each: _ReplicaProcess, status: int | None) -> None:
        """Replace a process that has ended by itself; the more of them have not lived long, the later."""
        loop = asyncio.get_running_loop()
        self._failures = 0 if each.ready and loop.time() - each.started_at > _LONG_LIFE else self._failures + 1
        delay = (_BACKOFF.delay(self._failures, draw=clock.draw()) or 0.0) if self._failures else 0.0
        if status is not None:
            log.warning("%s: a process ended with status %s; another is started in %.1f s", self.name, status, delay)
        if self._restart is None:
            self._restart = loop.call_later(delay, self._start_missing)

    def _start_missing(self) -> None:
        self._restart = None
        self._adjust()
