"""A streaming answer: metered as it passes, and its permit released exactly once, however it ends."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

from forebay import clock, context
from forebay.interfaces import Outcome
from forebay.upstream.providers import UsageFilter, UsageMeter


class StreamEnd(NamedTuple):
    """The end of a streaming answer.

    Attributes:
        kind: the evidence about the provider.
        ended: the provider has closed it; else it broke off, or its reader has left.
        output_at: the time when its output began; None if none came.
    """

    kind: Outcome
    ended: bool
    output_at: float | None


class MeteredStream:
    """One streaming answer: it takes the provider's bytes, and returns those that the caller gets.

    Args:
        settle: releases the permit; takes the end of the answer.
        judge: returns what an exception that ends the answer says about the provider.
        meter: reads the usage; None if there is none to read.
        usage_filter: removes usage that the caller did not ask for; None if there is none to remove.
        detects_truncation: whether a truncated answer can be told from a complete one.

    Attributes:
        settled: the permit is released.
        unread_since: when its reader got the latest part; infinity while it waits for the next one.
    """

    __slots__ = (
        *("_detects_truncation", "_judge", "_lock", "_meter", "_output_at", "_run", "_settle", "_usage_filter"),
        *("__weakref__", "settled", "unread_since"),
    )

    def __init__(
        self,
        settle: Callable[[StreamEnd], None],
        judge: Callable[[Exception], Outcome],
        meter: UsageMeter | None,
        usage_filter: UsageFilter | None,
        *,
        detects_truncation: bool,
    ) -> None:
        self._settle = settle
        self._judge = judge
        self._meter = meter
        self._usage_filter = usage_filter
        self._detects_truncation = detects_truncation
        self._lock = threading.Lock()
        self._output_at: float | None = None
        self._run = context.call_observer()
        self.settled = False
        self.unread_since = clock.now()

    def passed_on(self) -> None:
        """Note that the reader gets a part now."""
        self.unread_since = clock.now()

    def awaited(self) -> None:
        """Note that the reader waits for the next part."""
        self.unread_since = math.inf

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes, and return what may be passed on now."""
        if self._meter is not None:
            self._meter.feed(chunk)
            if self._output_at is None and self._meter.has_output:
                self._output_at = clock.now()
        return chunk if self._usage_filter is None else self._usage_filter.feed(chunk)

    def end(self) -> bytes:
        """Note that the provider has closed the answer, and return the bytes that were held back."""
        rest = b"" if self._usage_filter is None else self._usage_filter.end()
        meter = self._meter
        if meter is not None:
            meter.end()
        complete = meter is None or meter.complete or not self._detects_truncation
        self._settle_once(Outcome.SUCCESS if complete else Outcome.FAULT, ended=True)
        return rest

    def fail(self, error: Exception) -> None:
        """Note that the connection failed, or that the caller stopped waiting: by which exception."""
        if not self.settled:
            self._settle_once(self._judge(error))

    def abandon(self) -> None:
        """Note that the reader has gone. After the end of the answer this changes nothing."""
        complete = self._meter is not None and self._meter.complete
        self._settle_once(Outcome.SUCCESS if complete else Outcome.IGNORED)

    def _settle_once(self, kind: Outcome, *, ended: bool = False) -> None:
        with self._lock:
            if self.settled:
                return
            self.settled = True
        meter = self._meter
        if meter is not None and meter.error_kind is not None:
            kind = meter.error_kind.rule.outcome
        if kind is Outcome.FAULT and self._run is not None:
            self._run.record_upstream_fault()
        self._settle(StreamEnd(kind, ended, self._output_at))
        self._run = None
