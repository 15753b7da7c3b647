"""How many tasks of a pool wait in the overflow, by priority and tenant."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from forebay.task import Priority


class SpilledCounts:
    """The records of one task type that wait in the overflow, as far as is known, and tasks on their way there.

    Attributes:
        totals: how many records wait, by priority.
        spilling: how many tasks are on their way, by priority.
    """

    __slots__ = ("_spilling", "_waiting", "spilling", "totals")

    def __init__(self) -> None:
        self.totals = dict.fromkeys(Priority, 0)
        self.spilling = dict.fromkeys(Priority, 0)
        self._waiting: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}  # by tenant
        self._spilling: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}

    def __bool__(self) -> bool:
        return any(self.totals.values())

    def set(self, priority: Priority, tenant: str, count: int) -> None:
        """Replace the count of a tenant's records."""
        waiting = self._waiting[priority]
        self.totals[priority] += count - waiting.get(tenant, 0)
        if count:
            waiting[tenant] = count
        else:
            waiting.pop(tenant, None)

    def begin_spill(self, priority: Priority, tenant: str) -> None:
        """Count a task that is on its way."""
        self.spilling[priority] += 1
        spilling = self._spilling[priority]
        spilling[tenant] = spilling.get(tenant, 0) + 1

    def end_spill(self, priority: Priority, tenant: str) -> None:
        """Stop counting a task as on its way."""
        self.spilling[priority] -= 1
        spilling = self._spilling[priority]
        spilling[tenant] -= 1
        if not spilling[tenant]:
            del spilling[tenant]

    def of(self, priority: Priority) -> Mapping[str, int]:
        """Return how many records of a priority wait, by tenant."""
        return self._waiting[priority]

    def servable(self, blocked: Collection[str]) -> Mapping[Priority, int]:
        """Return how many records wait by priority, without those of the tenants that are blocked."""
        if not blocked:
            return self.totals
        return {
            priority: sum(count for tenant, count in waiting.items() if tenant not in blocked)
            for priority, waiting in self._waiting.items()
        }

    def better(self, priority: Priority) -> int:
        """Return how many tasks of better priorities wait there, or are on their way."""
        return sum(self.totals[better] + self.spilling[better] for better in Priority if better < priority)

    def own(self, priority: Priority, tenant: str) -> int:
        """Return how many tasks of a tenant and of a priority wait there, or are on their way."""
        return self._waiting[priority].get(tenant, 0) + self._spilling[priority].get(tenant, 0)
