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
from forebay._fork import reset_in_child
from forebay._validate import check_name, check_not_negative, check_positive, check_whole, reject
from forebay.events import log
from forebay.retry import Retry
from forebay.scale.target import ReplicaReport, Replicas, sum_up

_OWNER: Final = "ProcessTarget"
_COMMAND: Final = (sys.executable, "-m", "forebay.supervisor.worker_process")
_GRACE: Final = 10.0  # seconds beyond the drain timeout, after which a process that does not end is killed
_LONG_LIFE: Final = 60.0  # seconds after which the death of a process says nothing of the next one's
_BACKOFF: Final = Retry(base_delay=1.0, max_delay=60.0)
_LOOK: Final = 1.0  # seconds between two looks whether a process still reports, which it does as often
_MIN_REPORT_TIMEOUT: Final = 5.0  # seconds: some reports
_SILENCE: Final = 10.0  # seconds without a report, after which a process that is never killed for that is not ready


class _ReplicaProcess:
    """One replica: a process, and what it last reported.

    Attributes:
        process: None until it was started.
        draining: whether it has been told to drain, or drains by itself.
        last_report: None until it takes tasks.
        silent: seconds since its last report, or its start. Looks are counted, and not the time: while this process
            stands still, it reads no report.
    """

    def __init__(self, started_at: float) -> None:
        self.started_at = started_at
        self.process: asyncio.subprocess.Process | None = None
        self.draining = False
        self.last_report: ReplicaReport | None = None
        self.silent = 0.0
        self._lives_long = False
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The id of its process, once that was started."""
        return None if self.process is None else self.process.pid

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Return a pair of sockets for its reports: the first is read here, and closed in forks of this process.

        A fork that kept it open would keep the process alive when this one has died.
        """
        ours, theirs = socket.socketpair()
        self._socket = ours
        reset_in_child(self)
        return ours, theirs

    def reset_after_fork(self) -> None:
        """Close the socket of the reports in a fork of this process."""
        if self._socket is not None:
            self._socket.close()

    def start(self, process: asyncio.subprocess.Process) -> None:
        """Record that it was started; one that is to drain already is told so now."""
        self.process = process
        self.silent = 0.0
        if self.draining:
            self.signal(signal.SIGTERM)

    def drain(self) -> None:
        """Have it drain and exit."""
        self.draining = True
        self.signal(signal.SIGTERM)

    def drains_itself(self) -> bool:
        """Record that it drains, and has not been told to by this process; return False if that is not so."""
        began = self.last_report is not None and self.last_report.draining and not self.draining
        self.draining = self.draining or began
        return began

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def report(self, line: bytes) -> None:
        """Take a report in. One that cannot be read changes nothing."""
        with contextlib.suppress(msgspec.DecodeError):  # of which a ValidationError is one
            self.last_report = msgspec.json.decode(line, type=ReplicaReport)
            self.silent = 0.0

    def look(self, seconds: float) -> None:
        """Count the seconds since the last look as silence."""
        self.silent += seconds

    def has_lived_long(self, now: float) -> bool:
        """Return whether its death says nothing of the next one's."""
        return self.last_report is not None and now > self.started_at + _LONG_LIFE

    def begins_long_life(self, now: float) -> bool:
        """Return whether it has lived long, once."""
        began = not self._lives_long and self.has_lived_long(now)
        self._lives_long = self._lives_long or began
        return began


class ProcessTarget:
    """Processes on this machine, each of which runs a supervisor as a worker of a shared overflow.

    Each runs ``python -m forebay.supervisor.worker_process`` with the import path of a supervisor; see ``forebay
    worker``. One that is to go gets SIGTERM: it takes no more tasks, finishes what it runs, gives back what waits, and
    exits; it takes several for one. One that dies, or drains by itself, is replaced, later and later if they keep
    dying; what it ran is leased again by another. They report every second: one that is silent for half of
    `report_timeout` does not count as ready, and after all of it is killed. If this process dies, they drain and exit.

    Args:
        supervisor: the import path of the supervisor, ``"module:name"`` or ``"file.py:name"``, or of a function that
            returns it. Its overflow must be the one of the supervisor here, and survive a process.
        drain_timeout: seconds that a process may take to finish what it runs; then that goes back to the overflow.
            None: no limit.
        start_timeout: seconds within which a process must have started; otherwise it is killed, and started again.
        report_timeout: seconds without a report, after which a process is killed, and started again: it hangs, or a
            handler blocks its event loop. It must be more than such a handler takes. None: it is never killed for that.
        env: environment variables of the processes, beside those of this one.
        command: the program and its first arguments, instead of this Python and the module above.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    outside = True

    def __init__(  # noqa: PLR0913 - the settings
        self,
        supervisor: str,
        *,
        drain_timeout: float | None = None,
        start_timeout: float = 60.0,
        report_timeout: float | None = 20.0,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        check_name(_OWNER, "supervisor", supervisor)
        if not all(supervisor.rpartition(":")[::2]):
            reject(_OWNER, "supervisor", supervisor, 'the import path of a supervisor, such as "app:supervisor"')
        check_not_negative(_OWNER, "drain_timeout", drain_timeout, unit="seconds", none="for no limit")
        check_positive(_OWNER, "start_timeout", start_timeout, unit="seconds")
        check_positive(_OWNER, "report_timeout", report_timeout, unit="seconds", none="for no limit")
        if report_timeout is not None and report_timeout < _MIN_REPORT_TIMEOUT:
            expected = f"at least {_MIN_REPORT_TIMEOUT:g} seconds, or None for no limit"
            reject(_OWNER, "report_timeout", report_timeout, expected)
        _check_env(env)
        _check_command(command)
        self._path = supervisor
        self._drain_timeout = drain_timeout
        self._start_timeout = start_timeout
        self._report_timeout = report_timeout
        self._silence = _SILENCE if report_timeout is None else report_timeout / 2
        self._env = dict(env or {})
        self._command = tuple(command)
        self._wanted = 0
        self._processes: dict[_ReplicaProcess, asyncio.Task[None]] = {}
        self._failures = 0  # in a row: rounds in which processes did not live long
        self._restart: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """``"process:"`` and the import path."""
        return f"process:{self._path}"

    async def open(self) -> None:
        """Do nothing: the first `scale` starts processes."""

    async def replicas(self) -> Replicas:
        """Return the processes; what most of the ready ones are short of, and their mean service time."""
        live = [each for each in self._processes if not each.draining and each.silent < self._silence]
        return sum_up(self._wanted, [each.last_report for each in live if each.last_report is not None])

    async def scale(self, replicas: int) -> None:
        """Start so many processes as are missing, or have so many as are too many drain: those that run least.

        More than before are started at once, also while one that has died waits to be replaced.
        """
        check_whole(_OWNER, "replicas", replicas, minimum=0)
        if replicas > self._wanted:
            self._cancel_restart()
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
            self._cancel_restart()

    @property
    def pids(self) -> Sequence[int]:
        """The ids of the processes that run, those that drain included."""
        return [each.pid for each in self._processes if each.pid is not None]

    # --- processes ---

    def _adjust(self) -> None:
        """Start or drain processes until as many as are wanted remain."""
        loop = asyncio.get_running_loop()
        live = [each for each in self._processes if not each.draining]
        if len(live) < self._wanted and self._restart is None:
            for _ in range(self._wanted - len(live)):
                each = _ReplicaProcess(loop.time())
                self._processes[each] = loop.create_task(self._run(each))
        live.sort(key=self._use)
        for each in live[: max(0, len(live) - self._wanted)]:
            each.drain()
            self._bound_drain(each)

    def _use(self, each: _ReplicaProcess) -> int:
        """Return how many tasks a process runs; -1 if it takes none, or hangs."""
        return -1 if each.last_report is None or each.silent >= self._silence else each.last_report.running

    def _bound_drain(self, each: _ReplicaProcess) -> None:
        """Have a process that drains killed if it does not end in time."""
        if self._drain_timeout is not None:
            asyncio.get_running_loop().call_later(self._drain_timeout + _GRACE, each.signal, signal.SIGKILL)

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
        elif status and each.last_report is not None:  # else it was told before it could listen
            log.warning("%s: a process that drained ended with status %s", self.name, status)

    async def _run_process(self, each: _ReplicaProcess) -> int:
        """Start a process, and wait for its own end: its socket may be held open by what it has started."""
        ours, theirs = each.connect()
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        beside: list[asyncio.Task[None]] = []
        try:
            try:
                process = await self._spawn(theirs.fileno())
            finally:
                theirs.close()
            each.start(process)
            loop = asyncio.get_running_loop()
            beside += loop.create_task(self._read_reports(each, reader)), loop.create_task(self._watch(each))
            try:
                return await process.wait()
            except BaseException:
                each.signal(signal.SIGKILL)
                raise
        finally:
            for task in beside:
                task.cancel()
            writer.close()

    async def _spawn(self, report_to: int) -> asyncio.subprocess.Process:
        options = ["--report-to", str(report_to)]
        if self._drain_timeout is not None:
            options += ["--drain-timeout", str(self._drain_timeout)]
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
        """Take reports in until the process closes its end."""
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # it is too long for a report
                continue
            except OSError:  # it has died with something unread
                return
            if not line:
                return
            each.report(line)
            if each.drains_itself():
                log.warning("%s: process %s drains, and is replaced", self.name, each.pid)
                self._bound_drain(each)
                self._replace(each)

    async def _watch(self, each: _ReplicaProcess) -> None:
        """Kill a process that has not started in time, or that does not report any more."""
        while (left := self._silence_left(each)) > 0:
            look = min(_LOOK, left)
            await asyncio.sleep(look)
            each.look(look)
            if each.begins_long_life(asyncio.get_running_loop().time()):
                self._failures = 0
        if each.last_report is None:
            log.warning("%s: a process has not started within %g s, and is killed", self.name, self._start_timeout)
        else:
            log.warning("%s: process %s has not reported for %g s, and is killed", self.name, each.pid, each.silent)
        each.signal(signal.SIGKILL)

    def _silence_left(self, each: _ReplicaProcess) -> float:
        """Return the seconds for which a process may yet be silent."""
        limit = self._start_timeout if each.last_report is None else self._report_timeout
        return _LOOK if limit is None else limit - each.silent

    def _died(self, each: _ReplicaProcess, status: int | None) -> None:
        """Replace a process that has ended by itself."""
        delay = self._replace(each)
        if status is not None:
            log.warning("%s: a process ended with status %s; another is started in %.1f s", self.name, status, delay)

    def _replace(self, each: _ReplicaProcess) -> float:
        """Start what is missing without this one, in so many seconds: the more have not lived long, the later.

        Those that go while others wait to be replaced are replaced with them, and count with them as one.
        """
        loop = asyncio.get_running_loop()
        if self._restart is not None:
            return max(0.0, self._restart.when() - loop.time())
        self._failures = 0 if each.has_lived_long(loop.time()) else self._failures + 1
        delay = (_BACKOFF.delay(self._failures, draw=clock.draw()) or 0.0) if self._failures else 0.0
        self._restart = loop.call_later(delay, self._start_missing)
        return delay

    def _start_missing(self) -> None:
        self._restart = None
        self._adjust()

    def _cancel_restart(self) -> None:
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None


def _check_env(env: Mapping[str, str] | None) -> None:
    """Check that a process can be started with these environment variables."""
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            reject(_OWNER, "env", name, "a mapping of the names of environment variables to strings")
        if not isinstance(value, str) or "\0" in value:
            reject(_OWNER, f"env[{name!r}]", value, "a string, without a NUL")


def _check_command(command: Sequence[str]) -> None:
    """Check that this can be a program and its first arguments."""
    parts = () if isinstance(command, str) else tuple(command)
    if not parts or not all(isinstance(part, str) and "\0" not in part for part in parts):
        reject(_OWNER, "command", command, 'a program and its first arguments, such as ["python3", "worker.py"]')
