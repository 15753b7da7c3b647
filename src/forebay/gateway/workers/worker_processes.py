"""The worker processes of one gateway: they accept from one socket, are started again when they die, end together."""

from __future__ import annotations

import atexit
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, NoReturn, Protocol

from forebay import clock
from forebay.errors import ForebayError
from forebay.events import log
from forebay.gateway.address import Address
from forebay.gateway.workers.connection_counts import ConnectionCounts
from forebay.gateway.workers.worker_listener import WorkerListener

_BACKLOG: Final = 1024
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 30.0  # seconds until a worker that died is started again
_SETTLED: Final = 30.0  # seconds after which a worker's death does not count with those before
_FAILED: Final = 1  # exit status


class WorkersNotSupported(ForebayError):
    """Several workers need fork, which {platform} does not have. Run one, or several gateways with shared=."""


class CannotListen(ForebayError, OSError):
    """The gateway cannot listen on {listen}: {problem}. Give another address, or stop the program that uses it."""


class Listening(Protocol):
    """A server that listens."""

    @property
    def port(self) -> int:
        """The port on which it listens."""


def restart_delay(deaths: int) -> float:
    """Return the seconds until a worker is started again that has died so many times, each soon after its start."""
    return float(min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(deaths - 1, 10)))


@dataclass(slots=True)
class _Worker:
    """One worker process."""

    number: int
    pid: int = 0  # 0: it does not run
    started_at: float = 0.0
    start_at: float = 0.0
    deaths: int = 0  # in a row, each soon after its start
    is_ready: bool = False


class WorkerProcesses:
    """The worker processes of a gateway. Its process has no threads and no event loop, so that it can fork at any time.

    SIGTERM and SIGINT drain all workers, and a second one aborts them. A reload has a process of its own, and there is
    one at a time: a SIGHUP that comes meanwhile leads to another one after it.

    Args:
        address: on which they listen.
        count: how many there are.
        serve: serves in a worker until it is stopped; it is given what accepts, the worker's number, a file descriptor
            that ends when this process does, and what to call once it accepts. It returns the exit status.
        ready: called with these processes once all workers accept connections.
        reload: lets all workers reload, in a process that is forked for it; it returns the exit status.
        effect_of_hang_up: returns what a SIGHUP does now.

    Raises:
        WorkersNotSupported: this system cannot fork.
    """

    def __init__(  # noqa: PLR0913 - what a parent decides, and what it is given
        self,
        address: Address,
        count: int,
        serve: Callable[[WorkerListener, int, int, Callable[[], object]], int],
        ready: Callable[[Listening], object],
        *,
        reload: Callable[[], int],
        effect_of_hang_up: Callable[[], Literal["reload", "stop", "none"]],
    ) -> None:
        if not hasattr(os, "fork"):
            raise WorkersNotSupported(platform=sys.platform)
        self._address = address
        self._workers = [_Worker(number) for number in range(count)]
        self._serve = serve
        self._ready = ready
        self._reload = reload
        self._effect_of_hang_up = effect_of_hang_up
        self._reloading = 0  # the process id of the reload that is under way
        self._reload_again = False
        self._is_stopping = False
        self._status = 0
        self._has_begun = False  # all workers have been ready

    @property
    def port(self) -> int:
        """The port on which they listen."""
        port: int = self._socket.getsockname()[1]
        return port

    def run(self) -> int:
        """Run the workers until they are stopped; return the exit status.

        Raises:
            CannotListen: the address is in use, or not one of this machine.
        """
        self._socket = _listen(self._address)
        self._counts = ConnectionCounts(len(self._workers))
        self._lifeline, self._held_lifeline = os.pipe()  # workers see its end when this process has gone
        self._ready_reader, self._ready_writer = os.pipe()  # a byte for each worker that is ready
        self._signal_reader, self._signal_writer = os.pipe()
        for end in (self._ready_reader, self._signal_reader, self._signal_writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._signal_writer)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._ready_reader, selectors.EVENT_READ)
            selector.register(self._signal_reader, selectors.EVENT_READ)
            while not (self._is_stopping and not any(worker.pid for worker in self._workers)):
                self._start_those_due()
                selector.select(self._seconds_to_wait())
                self._look()
        self._counts.close()
        return self._status

    def _look(self) -> None:
        """See which signals have come, which workers are ready, and which have ended."""
        with suppress(BlockingIOError):
            for number in os.read(self._signal_reader, 4096):
                self._handle(number)
        with suppress(BlockingIOError):
            for number in os.read(self._ready_reader, 4096):
                self._workers[number].is_ready = True
        self._reap()
        if not self._has_begun and all(worker.is_ready for worker in self._workers):
            self._has_begun = True
            self._ready(self)

    def _handle(self, number: int) -> None:
        effect = self._effect_of_hang_up() if number == signal.SIGHUP else "none"
        if number in (signal.SIGTERM, signal.SIGINT) or effect == "stop":
            self._stop()
        elif effect == "reload":
            self._begin_reload()

    def _begin_reload(self) -> None:
        """Reload in a process of its own, or after the reload that is under way."""
        self._reload_again = bool(self._reloading)
        if not self._reloading and not self._is_stopping:
            self._reloading = os.fork() or self._run_child(self._reload)

    def _stop(self) -> None:
        """Let all workers drain; the second time they abort."""
        self._is_stopping = True
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.pid:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    def _reap(self) -> None:
        """Take note of processes that have ended."""
        if self._reloading and os.waitpid(self._reloading, os.WNOHANG)[0]:
            self._reloading = 0
            if self._reload_again:
                self._begin_reload()
        now = clock.monotonic()
        for worker in self._workers:
            if worker.pid and os.waitpid(worker.pid, os.WNOHANG)[0]:
                worker.pid, was_ready = 0, worker.is_ready
                self._counts.withdraw(worker.number)
                if self._is_stopping:
                    continue
                if not was_ready and not self._has_begun:  # it has said why
                    self._status = _FAILED
                    self._stop()
                    continue
                worker.deaths = 1 if now - worker.started_at >= _SETTLED else worker.deaths + 1
                delay = restart_delay(worker.deaths)
                worker.start_at = now + delay
                log.error("worker %d of the gateway has died: it is started again in %.2f s", worker.number, delay)

    def _start_those_due(self) -> None:
        now = clock.monotonic()
        for worker in self._workers:
            if not worker.pid and not self._is_stopping and worker.start_at <= now:
                worker.started_at, worker.is_ready = now, False
                worker.pid = os.fork() or self._run_worker(worker.number)

    def _seconds_to_wait(self) -> float | None:
        due = [worker.start_at for worker in self._workers if not worker.pid and not self._is_stopping]
        return max(0.0, min(due) - clock.monotonic()) if due else None

    def _run_worker(self, number: int) -> NoReturn:
        """Serve, as a worker that was forked."""

        def serve() -> int:
            listener = WorkerListener(self._socket, self._counts, number)
            return self._serve(listener, number, self._lifeline, lambda: announce_ready(self._ready_writer, number))

        self._run_child(serve)

    def _run_child(self, run: Callable[[], int]) -> NoReturn:
        """Run a function, as a process that was forked, and end."""
        status = _FAILED
        try:
            os.setpgid(0, 0)  # what a terminal sends goes to the parent, which passes it on
            signal.set_wakeup_fd(-1)
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(each, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent reloads
            for end in (self._held_lifeline, self._ready_reader, self._signal_reader, self._signal_writer):
                os.close(end)
            status = run()
        except ForebayError as error:
            print(f"forebay: {error}", file=sys.stderr)  # noqa: T201 - of a program
        except BaseException:  # noqa: BLE001 - nothing of the parent's stack may run here
            log.exception("a process of the gateway ends by a bug")
        finally:
            _end_process(status)


def announce_ready(writer: int, number: int) -> None:
    """Tell the parent that a worker is ready. If the parent has died meanwhile, the worker's lifeline ends it."""
    with suppress(BrokenPipeError):
        os.write(writer, bytes([number]))


def _end_process(status: int) -> NoReturn:
    """End this process, after what was registered for the end, but with nothing of its parent's stack."""
    with suppress(BaseException):
        atexit._run_exitfuncs()  # noqa: SLF001 - leaves the shared accounts; `os.fork` has no other way
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _listen(address: Address) -> socket.socket:
    """Return a socket that listens.

    Raises:
        CannotListen: the address is in use, or not one of this machine.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = min(found, key=lambda each: each[0] != socket.AF_INET)
        listening = socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        problem = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise CannotListen(listen=f"{address.host}:{address.port}", problem=problem) from None
    listening.setblocking(False)
    return listening
