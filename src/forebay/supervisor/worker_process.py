"""A supervisor as a worker process of a shared overflow: it runs until a signal, drains, and exits.

``forebay worker module:supervisor`` runs this; so does ``python -m forebay.supervisor.worker_process``, which needs no
library beyond Forebay's own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import inspect
import math
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import msgspec

from forebay._fork import reset_in_child
from forebay._hooks import is_async
from forebay._threads import DaemonThreadExecutor
from forebay._validate import check_choice, reject
from forebay.adapters.import_paths import import_object
from forebay.errors import ForebayError, InvalidSetting, ScalingFailed, StoreNotInstalled, StoreUnavailable
from forebay.events import log
from forebay.interfaces import Demand
from forebay.scale import ReplicaReport
from forebay.supervisor.report_server import ReportServer
from forebay.supervisor.supervisor import BackpressureSupervisor
from forebay.supervisor.worker_protection import MachineProtection, WorkerProtection

PROTECTIONS: Final = ("ec2",)
REPORT_INTERVAL: Final = 1.0  # seconds between two reports to whoever manages the process
_OWNER: Final = "forebay worker"
_USAGE_ERROR: Final = 2
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_SAME_SIGNAL: Final = 1.0  # seconds within which a second SIGTERM is the first one, from another sender
_STOP_TIME: Final = 1.0  # seconds that user code has to stop when all is over; a handler has had its grace already
_OPEN_TIME: Final = 10.0  # seconds that a start may take to end once it was cancelled
_EXIT_TIME: Final = 10.0  # seconds that the end of the process may take after that
_MAX_UNSENT: Final = 64 * 1024  # bytes of reports that nobody reads
_MAX_FRAMES: Final = 4  # of an error of the program, to be shown
_PACKAGE: Final = str(Path(__file__).parents[1])


def load_supervisor(path: str) -> BackpressureSupervisor:
    """Return the supervisor at an import path, ``module:name`` or ``file.py:name``, or the one that a function makes.

    Modules are looked for in the working directory too.

    Raises:
        InvalidSetting: the path leads to something else, or nowhere.
        Exception: any exception that importing the module, or the function, raises.
    """
    expected = 'the import path of a supervisor, or of a function that returns one, such as "app:supervisor"'
    module, _, name = path.rpartition(":")
    if not module or not name:
        reject(_OWNER, "supervisor", path, expected)
    if not {"", os.getcwd()} & set(sys.path):  # noqa: PTH109 - a string among strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        found = import_object(path)
    except AttributeError as error:
        if error.name != name.rpartition(".")[2]:
            raise
        raise InvalidSetting(owner=_OWNER, name="supervisor", value=path, expected=expected) from error
    if not isinstance(found, BackpressureSupervisor) and callable(found):
        if is_async(found) or not _takes_no_arguments(found):
            reject(_OWNER, "supervisor", path, f"{expected}; the function takes no arguments, and is not async")
        found = found()
    if not isinstance(found, BackpressureSupervisor):
        reject(_OWNER, "supervisor", path, expected)
    return found


def _takes_no_arguments(function: Any) -> bool:
    """Return False if a callable cannot be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # one of C, without a signature
        pass
    return True


def open_protection(kind: str | None, *, drain_hook: str | None = None) -> MachineProtection | None:
    """Return the protection of the machine that this process runs on; None for none.

    Args:
        kind: one of `PROTECTIONS`.
        drain_hook: the lifecycle hook that keeps an EC2 instance until its worker has drained.

    Raises:
        InvalidSetting: `kind` is another, or is missing.
        StoreNotInstalled: the library that it needs is not installed.
    """
    if kind is None and drain_hook is not None:
        raise InvalidSetting(owner=_OWNER, name="--drain-hook", value=drain_hook, expected="given with --protect ec2")
    if kind is None:
        return None
    check_choice(_OWNER, "--protect", kind, PROTECTIONS)
    try:
        from forebay.scale.ec2_protection import Ec2Protection  # noqa: PLC0415 - needs botocore
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "botocore":
            raise
        raise StoreNotInstalled(where="--protect ec2", library="botocore", extra="ec2") from None
    return Ec2Protection(drain_hook=drain_hook)


def run_worker(  # noqa: PLR0913 - the options of the command
    supervisor: BackpressureSupervisor,
    *,
    path: str,
    drain_timeout: float | None = None,
    manager: Manager | None = None,
    listen: tuple[str, int] | None = None,
    protection: MachineProtection | None = None,
) -> int:
    """Run a supervisor until SIGTERM or SIGINT, drain it, and return the exit status: 0, or 1 if it was cut short.

    A second signal cancels what runs. What is stored in the overflow is left to other processes either way. The process
    must end after this: a few seconds later it is ended, whatever user code still does.

    Args:
        supervisor: one with an overflow.
        path: its import path, for messages.
        drain_timeout: seconds that what runs may take to end; then it goes back to the overflow. None: no limit.
        manager: the process that manages this one, which gets reports. When it is gone, this process drains and exits.
            Only SIGINT cuts the draining short then: its service manager may have sent SIGTERM to both.
        listen: host and port of the probes and reports over HTTP: see `ReportServer`. None for none.
        protection: of the machine, which is on while tasks may begin. When the machine is to go, this process drains.

    Raises:
        InvalidSetting: the supervisor has no overflow, or it cannot listen there.
        ScalingFailed: the machine cannot be protected.
        Others: as `BackpressureSupervisor.start`.
    """
    process = _WorkerProcess(
        supervisor, path=path, drain_timeout=drain_timeout, manager=manager, listen=listen, protection=protection
    )
    runner = asyncio.Runner()
    status = 1
    try:
        status = runner.run(process.run())
        return status
    finally:
        _end_within(_EXIT_TIME, status)
        if process.stopped:  # else closing would wait for what does not stop
            runner.close()
        _ignore_signals()


def _end_within(seconds: float, status: int) -> None:
    """End this process after some seconds, if threads, exit hooks or child processes of the program keep it."""

    def end() -> None:
        threading.Event().wait(seconds)
        log.error("the program does not end by itself: it is ended with status %s", status)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    DaemonThreadExecutor("forebay-exit").submit(end)


class Manager:
    """The process that manages this one, at the other end of a socket. That it is gone is seen in two ways.

    Its end of the socket is closed; or this process has another parent, which helps if something that it has forked
    holds that end open.

    Args:
        descriptor: of the socket, which this process has inherited.
    """

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.socket.set_inheritable(False)
        self._parent = os.getppid()
        reset_in_child(self)

    def reset_after_fork(self) -> None:
        """Close the socket in a fork of this process."""
        self.socket.close()

    def is_gone(self) -> bool:
        """Return whether this process has another parent than at its start."""
        return os.getppid() != self._parent


class _WorkerProcess:
    """One run of a supervisor in a process of its own.

    Attributes:
        stopped: whether all that ran on its event loop has ended.
    """

    def __init__(  # noqa: PLR0913 - as `run_worker`
        self,
        supervisor: BackpressureSupervisor,
        *,
        path: str,
        drain_timeout: float | None,
        manager: Manager | None,
        listen: tuple[str, int] | None,
        protection: MachineProtection | None,
    ) -> None:
        self.stopped = False
        self._supervisor = supervisor
        self._path = path
        self._drain_timeout = drain_timeout
        self._manager = manager
        self._listen = listen
        self._started = False
        self._protection = None if protection is None else WorkerProtection(supervisor, protection)
        self._stop = asyncio.Event()
        self._cut_short = asyncio.Event()
        self._signalled_at: float | None = None  # loop time of the first signal
        self._last_report = ReplicaReport()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            return await self._serve()
        finally:
            await self._stop_tasks()

    async def _stop_tasks(self) -> None:
        """Cancel what still runs on this event loop, and wait for a moment: user code may ignore that."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            _, left = await asyncio.wait(left, timeout=_STOP_TIME)
        if left:
            log.error("%d tasks of the program do not stop: the process ends without them", len(left))
        self.stopped = not left

    async def _serve(self) -> int:
        """Run the supervisor, and answer probes meanwhile, if it is to."""
        server = None
        if self._listen is not None:
            server = ReportServer(*self._listen, ready=self._ready, report=self._reading, owner=_OWNER)
            await server.open()
        try:
            return await self._run_protected()
        finally:
            if server is not None:
                await server.close()

    async def _run_protected(self) -> int:
        """Run the supervisor once the machine is protected, if it is to be."""
        if self._protection is None:
            return await self._run()
        try:
            return await self._run() if await self._unless_stopped(self._protection.open()) else 0
        finally:
            await self._protection.close()

    async def _unless_stopped(self, opening: Coroutine[Any, Any, bool]) -> bool:
        """Return what `opening` returns; False if a signal comes first."""
        opened, stopped = asyncio.ensure_future(opening), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((opened, stopped), return_when=asyncio.FIRST_COMPLETED)
            return opened.done() and opened.result()
        finally:
            stopped.cancel()
            if not opened.done():
                opened.cancel()
                await asyncio.wait((opened,), timeout=_OPEN_TIME)  # user code may ignore that

    async def _run(self) -> int:
        tasks: list[asyncio.Task[None]] = []
        try:
            if not await self._unless_stopped(self._start()):
                return 0
            self._started = True
            if self._manager is not None:
                tasks.append(asyncio.ensure_future(self._report(self._manager)))
            if self._protection is not None:
                tasks.append(asyncio.ensure_future(self._guard(self._protection)))
            await self._stop.wait()
            return await self._drain()
        finally:
            try:
                await self._supervisor.close()
            finally:
                for task in tasks:
                    task.cancel()

    async def _start(self) -> bool:
        await self._supervisor.start()
        await self._check_overflow()
        return True

    async def _guard(self, protection: WorkerProtection) -> None:
        """Keep the protection of the machine right; drain when the machine is to go, or if that cannot be known."""
        try:
            await protection.run(self._stop.set)
        except Exception:  # noqa: BLE001 - whatever it is, no task may begin on a machine that may go
            log.exception("the protection of this machine has failed: its worker drains")
            self._stop.set()

    def _on_signal(self, number: int) -> None:
        """Drain at the first signal, and cut that short at the second. Another SIGTERM may be the first one.

        A service manager sends it to each process of a service, and whoever has started this one sends it on: at once,
        or, if it is a target of an autoscaler, at any time.
        """
        now = asyncio.get_running_loop().time()
        if self._signalled_at is None:
            self._signalled_at = now
            self._stop.set()
        elif number == signal.SIGINT or (self._manager is None and now >= self._signalled_at + _SAME_SIGNAL):
            self._cut_short.set()

    async def _check_overflow(self) -> None:
        if (await self._demand(ask_overflow=True)).elsewhere is None:
            expected = "that of a supervisor with an overflow that other processes use"
            reject(_OWNER, "supervisor", self._path, f'{expected}, such as overflow="redis://host/0"')

    async def _drain(self) -> int:
        if self._protection is not None:
            self._protection.drain()
        draining = asyncio.ensure_future(self._supervisor.drain(self._drain_timeout))
        cut_short = asyncio.ensure_future(self._cut_short.wait())
        await asyncio.wait((draining, cut_short), return_when=asyncio.FIRST_COMPLETED)
        cut_short.cancel()
        if draining.done():
            draining.result()
            return 0
        draining.cancel()
        await asyncio.wait((draining,))
        return 1

    # --- reports ---

    def _ready(self) -> bool:
        return self._started and not self._stop.is_set()

    async def _reading(self) -> ReplicaReport:
        demand = await self._demand(ask_overflow=False)
        return ReplicaReport(
            running=demand.running,
            service=demand.service,
            limited_by=demand.limited_by,
            draining=self._stop.is_set(),
        )

    async def _report(self, manager: Manager) -> None:
        """Report every second, and once this process drains, until the manager is gone: then drain."""
        reader, writer = await asyncio.open_connection(sock=manager.socket)
        closed = asyncio.ensure_future(reader.read(1))
        draining = asyncio.ensure_future(self._stop.wait())
        try:
            while not closed.done() and not manager.is_gone():
                await self._write_report(writer)
                wakes = (closed,) if draining.done() else (closed, draining)
                await asyncio.wait(wakes, timeout=REPORT_INTERVAL, return_when=asyncio.FIRST_COMPLETED)
        finally:
            draining.cancel()
            if not closed.cancel():
                closed.exception()  # a reset connection is closed, too
            writer.close()
            if not self._stop.is_set():
                log.warning("the process that manages this worker is gone: it drains")
                self._stop.set()

    async def _write_report(self, writer: asyncio.StreamWriter) -> None:
        """Report, unless nobody has read reports for long. While it closes, it says that it lives."""
        try:
            self._last_report = await self._reading()
        except ForebayError:  # it is closing
            self._last_report = msgspec.structs.replace(self._last_report, draining=True)
        if writer.transport.get_write_buffer_size() < _MAX_UNSENT:
            writer.write(msgspec.json.encode(self._last_report) + b"\n")

    async def _demand(self, *, ask_overflow: bool) -> Demand:
        types = sorted({task_type for worker in self._supervisor.workers.values() for task_type in worker.task_types})
        return await self._supervisor.demand(types, ask_overflow=ask_overflow)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the supervisor that the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m forebay.supervisor.worker_process")
    parser.add_argument("supervisor", help="import path of a supervisor, such as app:supervisor")
    parser.add_argument("--drain-timeout", type=float, default=None, help="seconds that running tasks may take to end")
    parser.add_argument("--protect", choices=PROTECTIONS, default=None, help="what the machine is, to be protected")
    parser.add_argument(
        "--drain-hook", default=None, help="lifecycle hook that keeps the instance until it has drained"
    )
    parser.add_argument("--report-to", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_at(
        options.supervisor,
        drain_timeout=options.drain_timeout,
        report_to=options.report_to,
        protect=options.protect,
        drain_hook=options.drain_hook,
    )


def run_at(  # noqa: PLR0913 - the options of the command
    path: str,
    *,
    drain_timeout: float | None = None,
    report_to: int | None = None,
    listen: tuple[str, int] | None = None,
    protect: str | None = None,
    drain_hook: str | None = None,
) -> int:
    """Run the supervisor at an import path; return the exit status. A mistake, or a store that is away, is one line.

    An error that the program at the path raises is a mistake too; its last frames follow.

    Args:
        path: the import path.
        drain_timeout: as for `run_worker`.
        report_to: a socket of the process that manages this one. It gets a line of JSON every second, the first once
            the supervisor has started; when it is closed, this process drains and exits.
        listen: as for `run_worker`.
        protect: one of `PROTECTIONS`; None for none.
        drain_hook: as for `open_protection`.
    """
    manager = None if report_to is None else Manager(report_to)  # before the program may start processes
    try:
        if drain_timeout is not None and not 0 <= drain_timeout < math.inf:
            expected = "a number of seconds, at least 0; leave it out for no limit"
            reject(_OWNER, "--drain-timeout", drain_timeout, expected)
        protection = open_protection(protect, drain_hook=drain_hook)
        _exit_at_signals()
        supervisor = _load(path)
        return run_worker(
            supervisor, path=path, drain_timeout=drain_timeout, manager=manager, listen=listen, protection=protection
        )
    except _ProgramFailed as error:
        sys.stderr.write(f"forebay: {error}\n")
        return _USAGE_ERROR
    except (ForebayError, ModuleNotFoundError) as error:
        sys.stderr.write(f"forebay: {error}\n")
        return 1 if isinstance(error, StoreUnavailable | ScalingFailed) else _USAGE_ERROR


class _ProgramFailed(Exception):
    """The program at an import path has raised an error; the message says which, and where."""


def _load(path: str) -> BackpressureSupervisor:
    """Return the supervisor at a path.

    Raises:
        ForebayError: the path is wrong, or a setting in the program.
        ModuleNotFoundError: there is no such module.
        _ProgramFailed: the program has raised another error.
    """
    try:
        return load_supervisor(path)
    except (ForebayError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise _ProgramFailed(_describe(path, error)) from error


def _describe(path: str, error: Exception) -> str:
    """Return what is wrong, in one line, and the last frames of the program that have led there."""
    said = " ".join(str(error).split())
    lines = [f"{path} cannot be loaded: {type(error).__name__}{': ' if said else ''}{said}"]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_the_program(frame.filename)]
    lines += [each.rstrip("\n") for each in traceback.format_list(frames[-_MAX_FRAMES:])]
    return "\n".join(lines)


def _is_of_the_program(filename: str) -> bool:
    return not filename.startswith(("<frozen", _PACKAGE)) and filename != importlib.__file__


def _exit_at_signals() -> None:
    """End this process with 0 at the first signal, until it handles signals otherwise: it has begun nothing.

    As process 1 of a container it would get no SIGTERM without that, and would go on to take tasks.
    """
    for number in _SIGNALS:
        signal.signal(number, _exit)


def _exit(_: int, __: FrameType | None) -> NoReturn:
    _ignore_signals()
    sys.exit(0)


def _ignore_signals() -> None:
    """Let no signal change the status of a process that ends already."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
