"""The protection of a machine, and the end of it, as a test sets them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from forebay.errors import ScalingFailed


class SimulatedMachine:
    """A machine that a worker process runs on.

    Attributes:
        protected: whether it is; what removes machines sees only this.
        leaving: it is to go, and cannot be protected any more.
        log: what its worker has done, in order.
        faults: how many of the next calls fail; the last `late` of them after they were carried out.
        faults_at_start: how many looks at whether it is in service fail.
        before_unprotect: called first by each `unprotect`.
    """

    name = "machine"

    def __init__(self) -> None:
        self.protected = False
        self.leaving = False
        self.log: list[str] = []
        self.faults = 0
        self.late = 0
        self.faults_at_start = 0
        self.seconds = 0.0
        self.before_unprotect: Callable[[], None] = lambda: None
        self.kept_waiting = False

    async def open(self) -> None:
        """Prepare."""
        self.log.append("open")

    async def wait_until_in_service(self) -> None:
        """Return at once, unless the test wants failures."""
        if self.faults_at_start:
            self.faults_at_start -= 1
            raise ScalingFailed(what=self.name, why="the test says so, at the start")

    async def close(self) -> None:
        """Release."""
        self.log.append("close")

    async def protect(self) -> bool:
        """Protect it."""
        await self._call("protect")
        if self.leaving:
            return False
        self.protected = True
        self._fail_late()
        return True

    async def unprotect(self) -> None:
        """Let it be removed."""
        self.before_unprotect()
        await self._call("unprotect")
        self.protected = False
        self._fail_late()

    async def is_leaving(self) -> bool:
        """Return whether it is to go."""
        return self.leaving

    async def keep_waiting(self) -> None:
        """Wait."""
        self.kept_waiting = True
        await asyncio.Event().wait()

    async def complete(self) -> None:
        """Let it go."""
        self.log.append("complete")

    async def _call(self, name: str) -> None:
        self.log.append(name)
        await asyncio.sleep(self.seconds)
        if self.faults > self.late:
            self.faults -= 1
            raise ScalingFailed(what=self.name, why="the test says so")

    def _fail_late(self) -> None:
        if self.faults:
            self.faults -= 1
            self.late -= 1
            raise ScalingFailed(what=self.name, why="the test says so, later")
