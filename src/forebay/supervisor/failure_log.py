"""The log of what fails in the background: a store that is away is named now and then, not once for each task."""

from __future__ import annotations

import math

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.events import log

_INTERVAL = 10.0  # seconds between two lines that say the same of a store that is away


class FailureLog:
    """Logs failures. Those of a store that is away are one line each, at most one in ten seconds for each message."""

    def __init__(self) -> None:
        self._silent_until: dict[str, float] = {}  # by message; by `clock.now`
        self._left_out: dict[str, int] = {}  # by message: since the last line

    def report(self, message: str, *arguments: object, error: BaseException) -> None:
        """Log `error` behind a message, whose text is a constant. From any thread."""
        if not isinstance(error, StoreUnavailable):
            log.error(message, *arguments, exc_info=error)
            return
        now = clock.now()
        if now < self._silent_until.get(message, -math.inf):
            self._left_out[message] = self._left_out.get(message, 0) + 1
            return
        self._silent_until[message] = now + _INTERVAL
        left_out = self._left_out.pop(message, 0)
        log.error(f"{message}: %s%s", *arguments, error, f" ({left_out} more were not logged)" if left_out else "")
