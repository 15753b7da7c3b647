"""Counts of the tasks of a pool that wait in the overflow, by priority and tenant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from forebay.task import Priority


class SpilledCounts:
    """The records of one task type that wait in the overflow, as far as is known, and tasks on their way there.

    Args:
        weight: returns the weight of a tenant.

    Attributes:
        totals: how many records wait, by priority.
        spilling: how many tasks are on their way, by priority.
    """

    __slots__ = ("_spilling", "_tenants", "_waiting", "_weight", "spilling", "totals")

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self.totals = dict.fromkeys(Priority, 0)
        self.spilling = dict.fromkeys(Priority, 0)
        self._waiting: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}  # by tenant
        self._spilling: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}

        # How many tenants have so many records, by weight: there may be far more tenants than different counts.
        self._tenants: dict[Priority, dict[tuple[float, int], int]] = {priority: {} for priority in Priority}

    def __bool__(self) -> bool:
        return any(self.totals.values())

    def set(self, priority: Priority, tenant: str, count: int) -> None:
        """Replace the count of a tenant's records."""
        waiting = self._waiting[priority]
        before = waiting.get(tenant, 0)
        if count == before:
            return
        self.totals[priority] += count - before
        tenants, weight = self._tenants[priority], self._weight(tenant)
        if count:
            tenants[weight, count] = tenants.get((weight, count), 0) + 1
        if before:
            tenants[weight, before] -= 1
            if not tenants[weight, before]:
                del tenants[weight, before]
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

    def tenants(self, priority: Priority) -> Mapping[tuple[float, int], int]:
        """Return how many tenants have records of a priority, by their weight and the number of these records."""
        return self._tenants[priority]

    def servable(self, blocked: Collection[str]) -> Mapping[Priority, int]:
        """Return how many records wait by priority, without those of the tenants that are blocked."""
        if not blocked:
            return self.totals
        return {
            priority: self.totals[priority] - sum(waiting.get(tenant, 0) for tenant in blocked)
            for priority, waiting in self._waiting.items()
        }

    def better(self, priority: Priority) -> int:
        """Return how many tasks of better priorities wait there, or are on their way."""
        return sum(self.totals[better] + self.spilling[better] for better in Priority if better < priority)

    def own(self, priority: Priority, tenant: str) -> int:
        """Return how many tasks of a tenant and of a priority wait there, or are on their way."""
        return self._waiting[priority].get(tenant, 0) + self._spilling[priority].get(tenant, 0)
