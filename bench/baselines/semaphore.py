"""A fixed semaphore around calls that retry inside it, as SDKs do."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from bench.calls.limit_run import Callers
from forebay.limit import FixedLimit

SEMAPHORE: Final = "semaphore"
_ATTEMPTS: Final = 6


def semaphore(slots: int) -> FixedLimit:
    """Return a guess at the capacity, twice too high."""
    return FixedLimit(2 * slots)


def retrying_inside(callers: Callers) -> Callers:
    """Return callers that hold their slot of the semaphore while they back off, as in ``async with semaphore: ...``."""
    return replace(callers, holds_slot_while_retrying=True, max_attempts=_ATTEMPTS)
