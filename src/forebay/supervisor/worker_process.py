"""A supervisor as a worker process of a shared overflow: it runs until a signal, drains, and exits.

``forebay worker module:supervisor`` runs this; so does ``python -m forebay.supervisor.worker_process``, which needs no
library beyond Forebay's own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import msgspec

from forebay._validate import check_choice
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
        raise InvalidSetting(owner=_OWNER, name="supervisor", value=path, expected=expected)
    if not {"", os.getcwd()} & set(sys.path):  # noqa: PTH109 - a string among strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        found = import_object(path)
    except AttributeError as error:
        if error.name != name.rpartition(".")[2]:
            raise
        raise InvalidSetting(owner=_OWNER, name="supervisor", value=path, expected=expected) from error
    if not isinstance(found, BackpressureSupervisor) and callable(found):
        found = found()
    if not isinstance(found, BackpressureSupervisor):
        raise InvalidSetting(owner=_OWNER, name="supervisor", value=path, expected=expected)
    return found


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


def run_worker(
    supervisor: BackpressureSupervisor,
    *,
    drain_timeout: float | None = None,
    report_to: int | None = None,
    listen: tuple[str, int] | None = None,
    protection: MachineProtection | None = None,
) -> int:
    """Run a supervisor until SIGTERM or SIGINT, drain it, and return the exit status: 0, or 1 if it was cut short.

    A second signal cancels what runs. What is stored in the overflow is left to other processes either way.

    Args:
        supervisor: one with an overflow.
        drain_timeout: seconds that what runs may take to end; then it goes back to the overflow. None: no limit.
        report_to: a socket of the process that manages this one. It gets a line of JSON every second, the first once
            the supervisor has started; when it is closed, this process drains and exits.
        listen: host and port of the probes and reports over HTTP: see `ReportServer`. None for none.
        protection: of the machine, which is on while tasks may begin. When the machine is to go, this process drains.

    Raises:
        InvalidSetting: the supervisor has no overflow, or it cannot listen there.
        ScalingFailed: the machine cannot be protected.
        Others: as `BackpressureSupervisor.start`.
    """
    return asyncio.run(_WorkerProcess(supervisor, drain_timeout, report_to, listen, protection).run())


class _WorkerProcess:
    """One run of a supervisor in a process of its own."""

    def __init__(
        self,
        supervisor: BackpressureSupervisor,
        drain_timeout: float | None,
        report_to: int | None,
        listen: tuple[str, int] | None,
        protection: MachineProtection | None,
    ) -> None:
        self._supervisor = supervisor
        self._drain_timeout = drain_timeout
        self._report_to = report_to
        self._listen = listen
        self._started = False
        self._protection = None if protection is None else WorkerProtection(supervisor, protection)
        self._stop = asyncio.Event()
        self._cut_short = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
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
                await asyncio.wait((opened,))

    async def _run(self) -> int:
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._supervisor.start()
            await self._check_overflow()
            self._started = True
            if self._report_to is not None:
                tasks.append(asyncio.ensure_future(self._report(self._report_to)))
            if self._protection is not None:
                tasks.append(asyncio.ensure_future(self._guard(self._protection)))
            await self._stop.wait()
            return await self._drain()
        finally:
            for task in tasks:
                task.cancel()
            await self._supervisor.close()

    async def _guard(self, protection: WorkerProtection) -> None:
        """Keep the protection of the machine right; drain when the machine is to go, or if that cannot be known."""
        try:
            await protection.run(self._stop.set)
        except Exception:  # noqa: BLE001 - whatever it is, no task may begin on a machine that may go
            log.exception("the protection of this machine has failed: its worker drains")
            self._stop.set()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._cut_short.set()
        self._stop.set()

    async def _check_overflow(self) -> None:
        if (await self._demand(ask_overflow=True)).elsewhere is None:
            expected = 'a supervisor with an overflow that other processes use, such as overflow="redis://host/0"'
            raise InvalidSetting(owner=_OWNER, name="supervisor", value="one without it", expected=expected)

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
        return ReplicaReport(running=demand.running, service=demand.service, limited_by=demand.limited_by)

    async def _report(self, descriptor: int) -> None:
        """Report every second, until the other end is closed: then stop."""
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
        closed = asyncio.ensure_future(reader.read(1))
        try:
            while not closed.done():
                writer.write(msgspec.json.encode(await self._reading()) + b"\n")
                await asyncio.wait((closed,), timeout=REPORT_INTERVAL)
        except ForebayError:  # it is closing
            await asyncio.wait((closed,))
        finally:
            if not closed.cancel():
                closed.exception()  # a reset connection is closed, too
            writer.close()
            if not self._stop.is_set():
                log.warning("the process that manages this worker is gone: it drains")
                self._stop.set()

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
    """Run the supervisor at an import path; return the exit status. A mistake, or a store that is away, is one line."""
    try:
        return run_worker(
            load_supervisor(path),
            drain_timeout=drain_timeout,
            report_to=report_to,
            listen=listen,
            protection=open_protection(protect, drain_hook=drain_hook),
        )
    except (InvalidSetting, StoreNotInstalled, StoreUnavailable, ScalingFailed, ModuleNotFoundError) as error:
        sys.stderr.write(f"forebay: {error}\n")
        return 1 if isinstance(error, StoreUnavailable | ScalingFailed) else _USAGE_ERROR


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
