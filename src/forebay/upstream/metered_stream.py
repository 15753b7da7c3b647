"""A streaming answer: metered as it passes, and its permit released exactly once, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from forebay import clock, context
from forebay.interfaces import Outcome
from forebay.upstream.providers import BodyMeter, UsageFilter, UsageMeter
from forebay.upstream.providers.content_encoding import Decompressor

_SILENCE: Final = 2.0  # seconds without output in which a model may have thought
_LINE_COST: Final = 64  # bytes: reading a line takes as long as decompressing them


class StreamEnd(NamedTuple):
    """The end of a streaming answer.

    Attributes:
        kind: the evidence about the provider.
        ended: the provider has closed it; else it broke off, or its reader has left.
        readable: the meter could read all of it.
        output_at: the time when its answer began, after any reasoning; None if it did not.
        silent: seconds of the silences after that: a model may think between two pieces of its answer, too.
        first_chunk_at: the time when its first bytes arrived; None if none did.
    """

    kind: Outcome
    ended: bool
    readable: bool
    output_at: float | None
    silent: float = 0.0
    first_chunk_at: float | None = None


class MeteredStream:
    """One streaming answer: it takes the provider's bytes, and returns those that the caller gets.

    Args:
        settle: releases the permit; takes the end of the answer.
        judge: returns what an exception that ends the answer says about the provider.
        meter: reads the usage; None if there is none to read.
        usage_filter: removes usage that the caller did not ask for; None if there is none to remove.
        detects_truncation: whether a truncated answer can be told from a complete one.
        encoding: the Content-Encoding of the bytes that it takes.

    Attributes:
        decoded: it returns bytes without that Content-Encoding, since there is usage to remove.
        settled: the permit is released.
    """

    __slots__ = (
        "_decompressor", "_detects_truncation", "_first_chunk_at", "_judge", "_lock", "_meter", "_output_at", "_pieces",
        "_run", "_settle", "_silent", "_usage_filter", "_waited", "_waits_since", "decoded", "settled",
    )  # fmt: skip

    def __init__(  # noqa: PLR0913 - the parts of a stream
        self,
        settle: Callable[[StreamEnd], None],
        judge: Callable[[Exception], Outcome],
        meter: UsageMeter | BodyMeter | None,
        usage_filter: UsageFilter | None,
        *,
        detects_truncation: bool,
        encoding: str = "",
    ) -> None:
        self._settle = settle
        self._judge = judge
        self._meter = meter
        self._decompressor = Decompressor(encoding, line_cost=_LINE_COST if isinstance(meter, UsageMeter) else 0)
        self._usage_filter = usage_filter if self._decompressor.readable else None
        self.decoded = self._usage_filter is not None and self._decompressor.compressed
        self._detects_truncation = detects_truncation
        self._lock = threading.Lock()
        self._first_chunk_at: float | None = None
        self._output_at: float | None = None
        self._waits_since: float | None = None  # since when the reader waits for bytes
        self._waited = 0.0  # seconds that it has waited since the latest piece of the answer
        self._pieces = 0  # of the answer so far
        self._silent = 0.0
        self._run = context.call_observer()
        self.settled = False

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes, and return what may be passed on now."""
        meter, usage_filter = self._meter, self._usage_filter
        if self._first_chunk_at is None and chunk:
            self._first_chunk_at = clock.now()
        if meter is None and usage_filter is None:
            return chunk
        self._end_wait()
        passed: list[bytes] = []
        for content in self._decompressor.feed(chunk):
            if meter is not None:
                meter.feed(content)
            if usage_filter is not None:
                passed.append(usage_filter.feed(content))
        if meter is not None and meter.answer_pieces > self._pieces:
            self._pieces = meter.answer_pieces
            self._record_output()
        return chunk if usage_filter is None else b"".join(passed)

    def wait(self) -> None:
        """Note that the reader waits for the next bytes; what it does with the others is no silence of the provider."""
        self._waits_since = clock.now()

    def _end_wait(self) -> None:
        if self._waits_since is not None:
            self._waited += clock.now() - self._waits_since
            self._waits_since = None

    def _record_output(self) -> None:
        if self._output_at is None:
            self._output_at = clock.now()
        else:
            self._add_silence()
        self._waited = 0.0

    def _add_silence(self) -> None:
        if self._waited > _SILENCE:
            self._silent += self._waited

    @property
    def corrupt(self) -> bool:
        """True if bytes to pass on are lost, because they cannot be decompressed."""
        return self.decoded and not self._decompressor.readable

    @property
    def _readable(self) -> bool:
        return self._meter is not None and self._meter.readable and self._decompressor.readable

    def end(self) -> bytes:
        """Note that the provider has closed the answer, and return the bytes that were held back.

        An answer that cannot be read is not a fault: nothing shows that it is truncated.
        """
        rest = b"" if self._usage_filter is None else self._usage_filter.end()
        meter = self._meter
        if meter is not None:
            meter.end()
        complete = meter is None or meter.complete or not (self._detects_truncation and self._readable)
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
        self._end_wait()
        if self._output_at is not None:
            self._add_silence()
        self._settle(StreamEnd(kind, ended, self._readable, self._output_at, self._silent, self._first_chunk_at))
        self._run = None
