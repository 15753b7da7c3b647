"""The Retry-After of rejected work: each rejection reserves a later retry slot, so that callers return one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

_DRAIN_SHARE = 0.97  # of the drain rate that is promised: at the full rate the last callers would find no room
_JITTER = 0.1
_MAX_TENANTS = 1024  # with a schedule of their own; further ones share one
_PURGE_INTERVAL = 1.0  # seconds


class RetryAfterSchedule:
    """A schedule of retry slots, one drain interval apart.

    If every rejected caller got the same ``retry_after``, they would return together and nearly all be rejected again.
    With one slot each, nearly all are admitted.
    """

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0.0

    def reserve(self, now: float, drain_rate: float | None, draw: float) -> float | None:
        """Reserve the next free slot; return the seconds until then, or None if the drain rate is unknown.

        Args:
            now: seconds, on any clock that does not go back.
            drain_rate: tasks a second that leave; None or 0 is unknown.
            draw: a random number in [0, 1), for jitter of up to a tenth.
        """
        if not drain_rate:
            return None
        self._next = max(self._next, now) + 1 / (_DRAIN_SHARE * drain_rate)
        return (self._next - now) * (1 + _JITTER * draw)

    def is_past(self, now: float) -> bool:
        """Return whether no slot is reserved after `now`: then it is as good as new."""
        return self._next <= now


class TenantRetrySchedules:
    """A schedule of retry slots for each tenant, so that the callers of one do not wait for the flood of another.

    The tenants that have slots reserved share the drain rate by their weights.

    Args:
        weight: returns the weight of a tenant.
    """

    __slots__ = ("_by_tenant", "_purge_at", "_total", "_weight")

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._by_tenant: dict[str, RetryAfterSchedule] = {}
        self._total = 0.0  # of their weights
        self._purge_at = 0.0

    def reserve(
        self, tenant: str, now: float, drain_rate: float | None, draw: float, *, most: float = math.inf
    ) -> float | None:
        """Reserve the next free slot of a tenant, of whose tasks `most` leave a second: see `RetryAfterSchedule`."""
        if now >= self._purge_at:
            self._purge(now)
        if tenant not in self._by_tenant and len(self._by_tenant) >= _MAX_TENANTS:
            tenant = ""  # no tenant is called that
        schedule = self._by_tenant.get(tenant)
        if schedule is None:
            schedule = self._by_tenant[tenant] = RetryAfterSchedule()
            self._total += self._weight(tenant)
        return schedule.reserve(now, drain_rate and min(most, drain_rate * self._weight(tenant) / self._total), draw)

    def _purge(self, now: float) -> None:
        """Forget the schedules that are past."""
        self._purge_at = now + _PURGE_INTERVAL
        self._by_tenant = {tenant: each for tenant, each in self._by_tenant.items() if not each.is_past(now)}
        self._total = sum(map(self._weight, self._by_tenant))
