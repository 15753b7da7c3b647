"""The size of the surge, and the limits that all sides get."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

ENDLESS: Final = 30 * 86_400.0
"""Seconds: a month, for a run that goes on until all tasks are done."""
OVERFLOW: Final = "OVERFLOW"  # in the environment, not on a side's command line: its URL may hold a password
_DRAIN: Final = 16.0  # seconds: nearly every run of an agent ends within; one takes twelve on average


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one demo. Each side gets the same: tasks, time, memory, API key, and the SDK's own retries.

    Attributes:
        tasks: size of the surge.
        seconds: wall time of each side, from the moment it is ready. Forebay drains within it.
        seed: repeats the tasks, their priorities and lengths, and the simulated provider's faults.
        workers: number of workers, each with `slots` agents.
        slots: tasks that one worker runs at a time; the semaphore's size on the semaphore side.
        memory_mb: resident memory, in MB, at which a side's process is killed, as a container is.
        sdk_retries: retries of each call that the openai SDK makes; 2 is its default.
        lease: seconds after which another demo may run what a killed one was running.
        speed: of the simulated provider; 10 means a tenth of the latency and ten times the rate.
        folder: directory of the report, the picture and the spilled tasks.
    """

    tasks: int = 10_000
    seconds: float = 90.0
    seed: int = 7
    workers: int = 10
    slots: int = 5
    memory_mb: int = 512
    sdk_retries: int = 2
    lease: float = 15.0
    speed: float = 1.0
    folder: str = "build/demo"

    @property
    def agents(self) -> int:
        """Number of agents that may work at once."""
        return self.workers * self.slots

    @property
    def drain(self) -> float:
        """Seconds at the end in which Forebay starts nothing, so that few calls that are paid for are cut off."""
        return min(_DRAIN / self.speed, self.seconds / 4)

    def file(self, name: str) -> Path:
        """Return the path of a file in the demo's folder."""
        return Path(self.folder) / name

    @property
    def store_path(self) -> Path:
        """Path of the database of spilled tasks."""
        return self.file("spill.db")

    @property
    def overflow(self) -> str:
        """URL of the store of spilled tasks: the one that the environment names, else a file in the demo's folder."""
        return os.environ.get(OVERFLOW) or f"sqlite:///{self.store_path}"

    @property
    def overflow_name(self) -> str:
        """The store of spilled tasks, for a message."""
        return "the store that OVERFLOW names" if self.own_overflow else str(self.store_path)

    @property
    def own_overflow(self) -> bool:
        """True if the environment names a store, which the demo does not clear."""
        return bool(os.environ.get(OVERFLOW))
