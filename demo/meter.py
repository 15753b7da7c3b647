"""Counters of a side's calls and tasks, and the thread that reports them.

A side counts in its event loop and reports in a thread: the classic side's loop may be too busy to turn for seconds,
and those seconds are the interesting ones.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec

from demo.provider import Provider
from demo.sample import Sample, process_usage
from forebay.task import Priority

_EVERY: Final = 1.0  # seconds


class Meter:
    """Counters of one side.

    Args:
        provider: determines the price of a token.
        write: takes each line of the report; standard output by default.
    """

    def __init__(self, provider: Provider, write: Callable[[bytes], None] | None = None) -> None:
        self.stage = "starting"
        self.submitted = self.running = self.waiting = self.spilled = 0
        self.queued = 0
        self.load: float | None = None
        self.limited_by: str | None = None
        self.waiting_for: str | None = None
        self.workers: dict[str, int] = {}
        self.observe: Callable[[], None] = lambda: None  # called before each report, in its thread
        self._write = write or _to_stdout
        self._price = provider.price
        self._done = self._failed = 0
        self._done_by = [0] * len(Priority)
        self._latencies: list[float] = []
        self._calls = self._calls_429 = self._calls_5xx = self._answered = 0
        self._input_tokens = self._output_tokens = 0
        self._useful_tokens = 0
        self._useful_usd = 0.0
        self._began = time.monotonic()
        self._lock = threading.Lock()  # one line at a time
        self._over = threading.Event()

    # --- calls ---

    def sent(self) -> None:
        """Count an HTTP attempt that is sent, a retry included."""
        self._calls += 1

    def received(self, status: int) -> None:
        """Count the status of an attempt."""
        self._calls_429 += status == 429  # noqa: PLR2004 - Too Many Requests
        self._calls_5xx += status >= 500  # noqa: PLR2004 - the server's fault

    def answered(self, input_tokens: int, output_tokens: int) -> None:
        """Count a call that got an answer."""
        self._answered += 1
        self._input_tokens += input_tokens
        self._output_tokens += output_tokens

    # --- tasks ---

    def done(self, state: Any, *, seconds: float | None, priority: Priority | None) -> None:
        """Count a task done, with its graph's final state, `seconds` after its submission."""
        self._done += 1
        if seconds is not None:
            self._latencies.append(seconds)
        if priority is not None:
            self._done_by[priority] += 1
        asked, answered = state["input_tokens"], state["output_tokens"]
        self._useful_tokens += asked + answered
        self._useful_usd += self._usd(asked, answered)

    def failed(self) -> None:
        """Count a task that failed for good."""
        self._failed += 1

    @property
    def ended(self) -> int:
        """Tasks that are done or have failed."""
        return self._done + self._failed

    @property
    def inside(self) -> int:
        """Tasks in memory, as last observed."""
        return self.running + self.waiting

    def _usd(self, asked: int, answered: int) -> float:
        return 0.0 if self._price is None else self._price.cost(asked, answered)

    # --- reports ---

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def begin(self, stage: str = "surge") -> None:
        """Start the clock and the reports: the side is ready."""
        self._began = time.monotonic()
        self.stage = stage
        self.report()
        threading.Thread(target=self._keep_reporting, name="reports", daemon=True).start()

    def end(self) -> None:
        """Write the last report."""
        self._over.set()
        self.stage = "ended"
        self.report()

    def report(self) -> None:
        """Write a sample now."""
        with self._lock:
            self.observe()
            with suppress(BrokenPipeError):  # the parent is gone; what is in the store still counts
                self._write(msgspec.json.encode(self.sample()) + b"\n")

    def sample(self) -> Sample:
        """Return the counts so far; each latency is in one sample only."""
        latencies, self._latencies = self._latencies, []
        resident, processor = process_usage()
        return Sample(
            t=round(self.seconds, 3),
            stage=self.stage,
            submitted=self.submitted,
            running=self.running,
            queued=self.queued,
            waiting=self.waiting,
            spilled=self.spilled,
            done=self._done,
            failed=self._failed,
            done_by=tuple(self._done_by),
            latencies=tuple(round(seconds, 3) for seconds in latencies),
            calls=self._calls,
            calls_429=self._calls_429,
            calls_5xx=self._calls_5xx,
            answered=self._answered,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            usd=self._usd(self._input_tokens, self._output_tokens),
            useful_tokens=self._useful_tokens,
            useful_usd=self._useful_usd,
            rss_mb=round(resident, 1),
            cpu_s=round(processor, 2),
            load=self.load,
            limited_by=self.limited_by,
            waiting_for=self.waiting_for,
            workers=dict(self.workers),
        )

    def _keep_reporting(self) -> None:
        due = self._began
        while True:
            due += _EVERY
            if self._over.wait(max(0.0, due - time.monotonic())):
                return
            self.report()


def _to_stdout(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
