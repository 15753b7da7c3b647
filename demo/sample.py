"""Messages between the demo and the process of a side: instructions to it, and a sample a second from it, in JSON."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from demo.provider import Provider
from demo.settings import Settings

_STATM: Final = Path("/proc/self/statm")
_PAGE: Final = resource.getpagesize()
_MB: Final = 1 << 20


class Side(StrEnum):
    """A way to run the surge."""

    CLASSIC = "classic"
    SEMAPHORE = "semaphore"
    FOREBAY = "forebay"
    RESUME = "resume"  # Forebay again, with the tasks in the overflow

    @property
    def stores_tasks(self) -> bool:
        """True if its tasks survive its process."""
        return self in {Side.FOREBAY, Side.RESUME}


SIDES: Final = (Side.CLASSIC, Side.SEMAPHORE, Side.FOREBAY)
"""The sides of one demo, in the order in which they run."""


class Instructions(msgspec.Struct, frozen=True, kw_only=True):
    """Instructions to a side's process, on its command line; the API key is in its environment.

    Attributes:
        side: the side to run.
        settings: of the demo.
        provider: whom its agents call.
    """

    side: Side
    settings: Settings
    provider: Provider


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A side at one moment; counts are totals since it began.

    Attributes:
        t: seconds since it began.
        stage: what it is doing, in a word.
        submitted: tasks that its supervisor has accepted.
        running: runs that have started and not ended; without Forebay also those between two attempts.
        queued: calls of these runs that wait for a permit; 0 without Forebay.
        waiting: tasks in memory that have not started.
        spilled: tasks in the overflow.
        done, failed: tasks that ended so.
        done_by: tasks done, by priority, CRITICAL first.
        latencies: seconds from submission to done, of the tasks done since the last sample.
        calls: HTTP attempts, the SDK's retries included; `calls_429` and `calls_5xx` count those with such a status.
        answered: calls that got an answer.
        input_tokens, output_tokens, usd: of the answers, by their own `usage`.
        useful_tokens, useful_usd: of the answers that tasks done consist of, each counted once.
        rss_mb, cpu_s: memory and processor time of its process.
        load, limited_by, workers: Forebay's load, what limits it, and its workers by state; None or empty without it.
        waiting_for: what the next call would wait for, such as ``"requests per minute"``; None if it need not wait.
    """

    t: float
    stage: str
    submitted: int = 0
    running: int = 0
    queued: int = 0
    waiting: int = 0
    spilled: int = 0
    done: int = 0
    failed: int = 0
    done_by: tuple[int, ...] = (0, 0, 0, 0)
    latencies: tuple[float, ...] = ()
    calls: int = 0
    calls_429: int = 0
    calls_5xx: int = 0
    answered: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    useful_tokens: int = 0
    useful_usd: float = 0.0
    rss_mb: float = 0.0
    cpu_s: float = 0.0
    load: float | None = None
    limited_by: str | None = None
    waiting_for: str | None = None
    workers: dict[str, int] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return self.input_tokens + self.output_tokens

    @property
    def useless(self) -> float:
        """Share of the answers' tokens that belong to no task done so far; 0 before the first answer."""
        return 1 - self.useful_tokens / self.tokens if self.tokens else 0.0

    @property
    def inside(self) -> int:
        """Tasks in memory: running and waiting."""
        return self.running + self.waiting


def _lately(samples: Sequence[Sample], window: float) -> tuple[Sample, Sample]:
    """Return the first sample of the last `window` seconds, and the last of all; there must be one."""
    last = samples[-1]
    return next(sample for sample in samples if sample.t >= last.t - window), last


def pace(samples: Sequence[Sample], window: float = 20.0) -> float:
    """Return the tasks done a minute over the last `window` seconds of `samples`, or over all if they are shorter."""
    if not samples:
        return 0.0
    since, last = _lately(samples, window)
    seconds = last.t - since.t
    return 60 * (last.done - since.done) / seconds if seconds > 0 else 0.0


def refused(samples: Sequence[Sample], window: float = 20.0) -> float:
    """Return the share of 429s among the HTTP attempts of the last `window` seconds of `samples`; 0 if none."""
    if not samples:
        return 0.0
    since, last = _lately(samples, window)
    calls = last.calls - since.calls
    return min(1.0, (last.calls_429 - since.calls_429) / calls) if calls else 0.0  # answers lag behind calls


def process_usage() -> tuple[float, float]:
    """Return the resident megabytes and the processor seconds of this process."""
    if _STATM.exists():
        resident = int(_STATM.read_text().split()[1]) * _PAGE / _MB
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident = peak / _MB if sys.platform == "darwin" else peak / 1024
    return resident, time.process_time()
