"""Leases as their holders have them."""

from __future__ import annotations

import msgspec

from forebay.call_usage import CallUsage
from forebay.interfaces import Lease


def after_failure(lease: Lease, *, wait: float = 1.0, error: str = "no", usage: CallUsage | None = None) -> Lease:
    """Return a lease as its holder has it after an attempt that has failed, and is repeated in `wait` seconds."""
    record = lease.record
    failed = msgspec.structs.replace(
        record,
        attempts=record.attempts + 1,
        failures=record.failures + 1,
        total_delay=record.total_delay + wait,
        last_error=error,
        usage=usage or record.usage,
    )
    return msgspec.structs.replace(lease, record=failed)
