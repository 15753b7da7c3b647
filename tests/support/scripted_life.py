"""ScriptedLife: the life of a worker, which a test ends."""

from __future__ import annotations

import asyncio
from typing import Any


class ScriptedLife:
    """A life, as the `start` of a worker returns it, that a test ends.

    Starts and ends are logged, as ``"name starts"``.

    Attributes:
        name: of the worker.
        log: of all lives that share it.
        lives: one future for each start that did not fail.
        start_errors: the messages of the errors that the next starts raise.
    """

    def __init__(self, name: str = "worker", log: list[str] | None = None, *, start_error: str = "") -> None:
        self.name = name
        self.log = [] if log is None else log
        self.lives: list[asyncio.Future[None]] = []
        self.start_errors = [start_error] if start_error else []

    def start(self) -> Any:
        """Begin a life, or fail to."""
        if self.start_errors:
            self.log.append(f"{self.name} fails to start")
            raise OSError(self.start_errors.pop(0))
        self.log.append(f"{self.name} starts")
        life: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        life.add_done_callback(lambda _: self.log.append(f"{self.name} ends"))
        self.lives.append(life)
        return life

    @property
    def alive(self) -> bool:
        """True from its start to its end."""
        return bool(self.lives) and not self.lives[-1].done()

    def crash(self) -> None:
        """End the life by an exception."""
        self.lives[-1].set_exception(ValueError("broken"))

    def returns(self) -> None:
        """End the life normally."""
        self.lives[-1].set_result(None)

    def is_cancelled(self) -> None:
        """End the life by a cancellation."""
        self.lives[-1].cancel()


async def settle() -> None:
    """Let everything happen that happens at once, in virtual time."""
    await asyncio.sleep(1e-4)
