"""What a side tells of itself, once a second, as a line of JSON on its standard output; and what it is told to do."""

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


class Kind(StrEnum):
    """Whose process it is."""

    CLASSIC = "classic"
    FOREBAY = "forebay"
    RESUME = "resume"  # Forebay again, going on with what is on disk


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What a side's process is started with, on its command line; the key comes by the environment."""

    kind: Kind
    settings: Settings
    provider: Provider


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A side at one moment; counts are totals since it began.

    Attributes:
        t: seconds since it began.
        stage: what it is doing, in a word.
        submitted: tasks that its supervisor has accepted.
        running: runs begun and not ended; with the classic also those between two attempts.
        queued: calls of these that wait for their turn at the key; the classic's do not.
        waiting: tasks accepted and not begun, in its memory.
        spilled: tasks kept on disk.
        done, failed: how tasks ended.
        done_by: done, by priority, CRITICAL first.
        latencies: seconds from submission to done, of those done since the last sample.
        calls: HTTP attempts, the SDK's retries included; `calls_429` and `calls_5xx` of them were answered so.
        answered: calls that brought an answer.
        input_tokens, output_tokens, usd: of the answers, by their own `usage`.
        useful_tokens, useful_usd: of the answers that a done task is made of, each once.
        rss_mb, cpu_s: of its process.
        load, binding, workers: what Forebay says of itself: its load, what binds, workers by state.
        scarce: what the next call would wait for at the key, such as ``"requests per minute"``; None for nothing.
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
    binding: str | None = None
    scarce: str | None = None
    workers: dict[str, int] = {}

    @property
    def tokens(self) -> int:
        """All tokens of the answers."""
        return self.input_tokens + self.output_tokens

    @property
    def useless(self) -> float:
        """Share of the answers' tokens that are in no done task, or not yet; 0 before the first answer."""
        return 1 - self.useful_tokens / self.tokens if self.tokens else 0.0

    @property
    def inside(self) -> int:
        """Tasks in its memory: running and waiting."""
        return self.running + self.waiting


def _lately(samples: Sequence[Sample], window: float) -> tuple[Sample, Sample]:
    """The first of those of the last `window` seconds, and the last; there must be one."""
    last = samples[-1]
    return next(sample for sample in samples if sample.t >= last.t - window), last


def pace(samples: Sequence[Sample], window: float = 20.0) -> float:
    """Tasks done a minute, over the last `window` seconds of `samples` or as long as there are."""
    if not samples:
        return 0.0
    since, last = _lately(samples, window)
    seconds = last.t - since.t
    return 60 * (last.done - since.done) / seconds if seconds > 0 else 0.0


def refused(samples: Sequence[Sample], window: float = 20.0) -> float:
    """Share of the HTTP attempts of the last `window` seconds of `samples` that were answered 429; 0 if none left."""
    if not samples:
        return 0.0
    since, last = _lately(samples, window)
    calls = last.calls - since.calls
    return (last.calls_429 - since.calls_429) / calls if calls else 0.0


def own_use() -> tuple[float, float]:
    """Resident megabytes and processor seconds of this process."""
    if _STATM.exists():
        resident = int(_STATM.read_text().split()[1]) * _PAGE / _MB
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident = peak / _MB if sys.platform == "darwin" else peak / 1024
    return resident, time.process_time()
