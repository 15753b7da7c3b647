"""An answer that is still coming: metered as it passes, and its permit closed exactly once, however it ends."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from forebay import context
from forebay.interfaces import Outcome
from forebay.upstream.call_request import Permit
from forebay.upstream.providers import ErrorKind, UsageFilter, UsageMeter

if TYPE_CHECKING:
    from forebay.upstream.exchange import Exchange


class MeteredStream:
    """Fed the bytes of one open answer; it returns those that the caller gets.

    Args:
        exchange: whose answer it is.
        permit: which it closes.
        meter: reads the usage; None where there is none to read.
        keep: keeps what the caller did not ask for.
        judged: whether an end that comes too early can be told from an end.
    """

    __slots__ = ("_exchange", "_judged", "_keep", "_lock", "_meter", "_permit", "_running", "settled")

    def __init__(
        self,
        exchange: Exchange,
        permit: Permit,
        meter: UsageMeter | None,
        usage_filter: UsageFilter | None,
        *,
        detects_truncation: bool,
    ) -> None:
        self._exchange = exchange
        self._permit = permit
        self._meter = meter
        self._keep = usage_filter
        self._judged = detects_truncation
        self._lock = threading.Lock()
        self._running = context.call_observer()
        self.settled = False

    def feed(self, chunk: bytes) -> bytes:
        """The next bytes; returns what may be passed on now."""
        if self._meter is not None:
            self._meter.feed(chunk)
        return chunk if self._keep is None else self._keep.feed(chunk)

    def end(self) -> bytes:
        """The provider has closed the answer; returns what was held back."""
        rest = b"" if self._keep is None else self._keep.end()
        meter = self._meter
        if meter is not None:
            meter.end()
        if meter is None or meter.complete or not self._judged:
            self._settle(Outcome.SUCCESS)
        else:
            self._settle(Outcome.FAULT)
        return rest

    def fail(self) -> None:
        """The connection failed."""
        self._settle(Outcome.FAULT)

    def abandon(self) -> None:
        """Whoever read it has gone. After the end that is no news."""
        complete = self._meter is not None and self._meter.complete
        self._settle(Outcome.SUCCESS if complete else Outcome.IGNORED)

    def _settle(self, outcome: Outcome) -> None:
        with self._lock:
            if self.settled:
                return
            self.settled = True
        meter = self._meter
        error: ErrorKind | None = None if meter is None else meter.error_kind
        if error is not None:
            outcome = error.outcome
        if outcome is Outcome.FAULT and self._running is not None:
            self._running.record_upstream_fault()
        ended = self._exchange.call_outcome(self._permit, outcome, None if meter is None else meter.usage)
        self._exchange.account.settle(self._permit, ended)
        self._running = None
