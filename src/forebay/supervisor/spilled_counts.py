"""How many tasks of a pool wait in the overflow, by priority and tenant, and which tenant's turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from forebay.admission import TenantTurns
from forebay.task import Priority


class SpilledCounts:
    """The records of one task type that wait in the overflow, as far as is known, and tasks on their way there.

    Attributes:
        totals: how many records wait, by priority.
        spilling: how many tasks are on their way, by priority.
    """

    __slots__ = ("_spilling", "_turns", "_waiting", "spilling", "totals")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.totals = dict.fromkeys(Priority, 0)
        self.spilling = dict.fromkeys(Priority, 0)
        self._waiting: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}  # by tenant
        self._spilling: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}
        self._turns = {priority: TenantTurns(weights) for priority in Priority}  # of the tenants with records

    def __bool__(self) -> bool:
        return any(self.totals.values())

    def add(self, priority: Priority, tenant: str, by: int = 1) -> None:
        """Count `by` more records, but not less than none of a tenant: the count may be out of date."""
        waiting = self._waiting[priority]
        before = waiting.get(tenant, 0)
        self._set(priority, tenant, max(0, before + by))

    def replace(self, priority: Priority, counts: Mapping[str, int]) -> None:
        """Replace the counts of a priority, by tenant."""
        for tenant in [tenant for tenant in self._waiting[priority] if tenant not in counts]:
            self._set(priority, tenant, 0)
        for tenant, count in counts.items():
            self._set(priority, tenant, count)

    def _set(self, priority: Priority, tenant: str, count: int) -> None:
        waiting = self._waiting[priority]
        self.totals[priority] += count - waiting.get(tenant, 0)
        if count:
            waiting[tenant] = count
            self._turns[priority].join(tenant)
        elif tenant in waiting:
            del waiting[tenant]
            self._turns[priority].leave(tenant)

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

    def own_ahead(self, priority: Priority, tenant: str) -> int:
        """Return how many tasks of `tenant` and of `priority` or better wait there, or are on their way."""
        return sum(
            counts[better].get(tenant, 0)
            for counts in (self._waiting, self._spilling)
            for better in Priority
            if better <= priority
        )

    def ahead(self, priority: Priority, tenant: str) -> int:
        """Return how many of them would start, at most, before a new one of `tenant`."""
        ahead = sum(self.totals[better] + self.spilling[better] for better in Priority if better < priority)
        own = self._waiting[priority].get(tenant, 0) + self._spilling[priority].get(tenant, 0)
        turns = self._turns[priority].turns_before
        others = ((name, count) for name, count in self._waiting[priority].items() if name != tenant)
        return ahead + own + sum(min(count, turns(tenant, own + 1, name)) for name, count in others)

    # --- turns ---

    def in_turn(self, priority: Priority) -> Iterator[str]:
        """Iterate over the tenants with records of a priority, the one with the next turn first."""
        return self._turns[priority].in_order()

    def count_turns(self, priority: Priority, tenant: str, turns: int) -> None:
        """Count that `turns` records of a tenant have come back, in as many turns."""
        if tenant in self._turns[priority]:
            for _ in range(turns):
                self._turns[priority].serve(tenant)
