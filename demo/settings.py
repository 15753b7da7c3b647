"""How large the surge is, and under what limits both sides meet it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

ENDLESS: Final = 30 * 86_400.0
"""Seconds: a month, for what goes on until all is done."""
_DRAIN: Final = 16.0  # seconds: nearly every run of an agent ends within; one takes twelve on average


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One demo. Both sides get the same: tasks, time, memory, key, and the SDK's own retries.

    Attributes:
        tasks: size of the surge.
        seconds: wall time of each side, from the moment that it is ready; Forebay's draining is part of it.
        seed: tasks, their priorities and lengths, and the plant's faults come from it.
        workers: how many, each with `slots` agents.
        slots: tasks at a time on one worker.
        memory_mb: resident memory at which a side's process is killed, as a container is.
        sdk_retries: of each call, made by the openai SDK; 2 is its default.
        lease: seconds after which what a killed demo was running may be run again.
        classic_limit: runs at a time on each worker of the classic supervisor; None, as mostly, is no limit.
        speed: the plant's; 10 means a tenth of the latency and ten times the rate.
        folder: where the report, the picture and the spilled tasks are kept.
    """

    tasks: int = 10_000
    seconds: float = 100.0
    seed: int = 7
    workers: int = 10
    slots: int = 5
    memory_mb: int = 512
    sdk_retries: int = 2
    lease: float = 15.0
    classic_limit: int | None = None
    speed: float = 1.0
    folder: str = "build/demo"

    @property
    def agents(self) -> int:
        """How many agents may work at once."""
        return self.workers * self.slots

    @property
    def drain(self) -> float:
        """Seconds at the end in which Forebay starts nothing new, so that little of what was paid for is cut off."""
        return min(_DRAIN / self.speed, self.seconds / 4)

    def file(self, name: str) -> Path:
        """A file in the demo's folder."""
        return Path(self.folder) / name

    @property
    def ledger(self) -> Path:
        """Where spilled tasks are kept."""
        return self.file("spill.db")
