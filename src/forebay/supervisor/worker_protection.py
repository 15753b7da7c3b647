"""A worker process takes tasks only while its machine is protected from being removed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Protocol

from forebay import clock
from forebay.errors import ForebayError, ScalingFailed, StoreUnavailable
from forebay.events import log
from forebay.retry import Retry
from forebay.supervisor.supervisor import BackpressureSupervisor

IDLE: Final = 30.0  # seconds without a task after which the protection is taken off
_INTERVAL: Final = 1.0  # seconds between two looks
_START_ATTEMPTS: Final = 8  # to protect a machine, before its worker gives up: some minutes, if none is answered
_CLOSE_TIMEOUT: Final = 10.0  # seconds that the last call may take
_BACKOFF: Final = Retry(base_delay=1.0, max_delay=60.0)


class MachineProtection(Protocol):
    """The protection of the machine that a process runs on. It is on or off, and known to whoever removes machines."""

    @property
    def name(self) -> str:
        """Names the machine, in messages."""

    async def open(self) -> None:
        """Prepare. It is called once."""

    async def wait_until_in_service(self) -> None:
        """Return when the machine can be protected. It is called again after a failure."""

    async def close(self) -> None:
        """Release what it holds; the protection stays as it is."""

    async def protect(self) -> bool:
        """Protect the machine. Return False if it is leaving: then nothing keeps it."""

    async def unprotect(self) -> None:
        """Let the machine be removed."""

    async def is_leaving(self) -> bool:
        """Return whether the machine is to go. It is asked every second."""

    async def keep_waiting(self) -> None:
        """Have a machine that is leaving wait for its worker, until this is cancelled."""

    async def complete(self) -> None:
        """Let a machine that is leaving go: its worker has drained."""


class WorkerProtection:
    """Keeps the machine of a worker process protected while the process takes tasks.

    Before the first task the protection is on. After `idle` seconds without a task, and without one that waits, the
    types of the workers are paused, and the protection is taken off. When a task waits again, it is put on, and the
    types are resumed once that is confirmed. So no task begins on a machine that may be chosen to go, and each period
    without a task costs two calls at most.

    Args:
        supervisor: that of the process.
        machine: the protection of its machine.
        idle: seconds.
    """

    def __init__(self, supervisor: BackpressureSupervisor, machine: MachineProtection, *, idle: float = IDLE) -> None:
        self._supervisor = supervisor
        self._machine = machine
        self._idle = idle
        self._paused: list[str] | None = None  # the types that are paused here, while no task may begin
        self._protected: bool | None = False  # None: a call has failed, and may have been carried out
        self._leaving = False
        self._draining = False
        self._started = 0  # handlers, at the last look
        self._busy_at = 0.0
        self._failed = 0  # calls in a row
        self._retry_at = 0.0

    async def open(self) -> bool:
        """Protect the machine, before the supervisor starts. Return False if it is leaving.

        Raises:
            ScalingFailed: it cannot be protected, after some attempts if that may pass; the message says why.
        """
        await self._machine.open()
        for call in (self._machine.wait_until_in_service, self._protect):
            for attempt in range(1, _START_ATTEMPTS + 1):
                try:
                    await call()
                    break
                except ScalingFailed as error:
                    if attempt == _START_ATTEMPTS:
                        raise
                    log.warning("%s; its worker takes no tasks until this succeeds", error)
                    await asyncio.sleep(_BACKOFF.delay(attempt, draw=clock.draw()) or 0.0)
        return not self._leaving

    async def run(self, on_leaving: Callable[[], None]) -> None:
        """Put the protection on and take it off until this is cancelled; call back once if the machine is leaving."""
        self._busy_at = asyncio.get_running_loop().time()
        while not self._leaving:
            await asyncio.sleep(_INTERVAL)
            if await self._machine.is_leaving():
                self._leaving = True
            elif not self._draining:
                await self._look(asyncio.get_running_loop().time())
        log.warning("%s is to go: its worker drains", self._machine.name)
        on_leaving()
        await self._machine.keep_waiting()

    def drain(self) -> None:
        """Leave the protection as it is from now on, and only see whether the machine is leaving."""
        self._draining = True

    async def close(self) -> None:
        """Let the machine go, since its worker has ended."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                if self._leaving:
                    await self._machine.complete()
                elif self._protected is not False:
                    await self._machine.unprotect()
        except (ScalingFailed, TimeoutError) as error:
            log.warning("%s may stay protected though its worker has ended (%s)", self._machine.name, error)
        finally:
            await self._machine.close()

    # --- looks ---

    async def _look(self, now: float) -> None:
        if now < self._retry_at:
            return
        try:
            if self._paused is not None:
                self._pause()  # types that have come since
                if await self._has_work():
                    await self._take_tasks()
                elif self._protected is None:
                    await self._unprotect()
            elif self._is_busy():
                self._busy_at = now
            elif now >= self._busy_at + self._idle and not await self._has_work():
                await self._take_none()
        except StoreUnavailable:
            return  # the supervisor says so
        except ScalingFailed as error:
            self._failure(now, error)

    def _is_busy(self) -> bool:
        """Return whether a task has run since the last look, or waits here."""
        statistics = self._supervisor.statistics()
        started, self._started = self._started, statistics.started
        return bool(statistics.running or statistics.suspended or statistics.waiting or statistics.started != started)

    async def _has_work(self) -> bool:
        """Return whether a task waits, here or in the overflow."""
        demand = await self._supervisor.demand(self._task_types())
        return demand.spilled > 0 or self._supervisor.statistics().waiting > 0

    async def _take_none(self) -> None:
        """Let no task begin any more, and then take the protection off; unless one has begun."""
        self._pause()
        if self._is_busy():
            self._resume()
        else:
            await self._unprotect()

    async def _unprotect(self) -> None:
        self._protected = None
        await self._machine.unprotect()
        self._protected, self._failed = False, 0

    async def _take_tasks(self) -> None:
        """Put the protection on, and then let tasks begin."""
        await self._protect()
        if not self._leaving:
            self._resume()

    async def _protect(self) -> None:
        self._protected = None
        self._leaving = not await self._machine.protect()
        self._protected, self._failed = not self._leaving, 0

    def _failure(self, now: float, error: ScalingFailed) -> None:
        self._failed += 1
        self._retry_at = now + (_BACKOFF.delay(self._failed, draw=clock.draw()) or 0.0)
        log.warning("%s; its worker takes no tasks until this succeeds", error)

    # --- tasks ---

    def _task_types(self) -> list[str]:
        """Return the types that the workers take, or would take if they were not paused here."""
        workers = self._supervisor.workers.values()
        others = set(self._supervisor.statistics().paused).difference(self._paused or ())
        return sorted({each for worker in workers for each in worker.task_types} - others)

    def _pause(self) -> None:
        paused = self._paused = self._paused or []
        for each in self._task_types():
            self._supervisor.pause(each)
            if each not in paused:
                paused.append(each)

    def _resume(self) -> None:
        paused, self._paused = self._paused or (), None
        self._busy_at = asyncio.get_running_loop().time()
        for each in paused:
            with contextlib.suppress(ForebayError):  # its worker was unregistered, or the supervisor is closing
                self._supervisor.resume(each)
