"""The spend of each budget in the present hour, day and month and in all, with which budgets begin."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final, TypeAlias

from forebay.quota.budget import period_start
from forebay.spend_log.spend_record import ALL_UPSTREAMS

_MAX_SUBJECTS: Final = 262_144  # tenants and tasks, and as many keys; the oldest are forgotten first

SpentKey: TypeAlias = tuple[str, str, str]
"""The upstream, the budget (as in `AlertPlace`) and the subject: a tenant, a task, a key, or nothing."""


class _Spent:
    """Dollars in the latest hour, day and month, and in all."""

    __slots__ = ("ever", "periods", "usd")

    def __init__(self) -> None:
        self.periods = (0.0, 0.0, 0.0)  # when they began
        self.usd = [0.0, 0.0, 0.0]
        self.ever = 0.0

    def add(self, periods: tuple[float, float, float], usd: float) -> None:
        """Add dollars that were spent in periods that began at these times."""
        self.ever += usd
        amounts = self.usd
        if periods == self.periods:  # as nearly always, on the path of each call
            amounts[0] += usd
            amounts[1] += usd
            amounts[2] += usd
            return
        self._move_on(periods)
        for index, start in enumerate(periods):
            if start == self.periods[index]:
                amounts[index] += usd

    def _move_on(self, periods: tuple[float, float, float]) -> None:
        """Begin those periods that are later than the present ones."""
        for index, start in enumerate(periods):
            if start > self.periods[index]:
                self.usd[index] = 0.0
        self.periods = (
            max(periods[0], self.periods[0]),
            max(periods[1], self.periods[1]),
            max(periods[2], self.periods[2]),
        )


_INDEX: Final = {"hour": 0, "day": 1, "month": 2}


class SpentTotals:
    """The spend of each budget in the present hour, day and month, and in all. Not thread-safe."""

    def __init__(self) -> None:
        self._spent: dict[SpentKey, _Spent] = {}  # of tenants and tasks
        self._of_upstreams: dict[SpentKey, _Spent] = {}  # of which there are few
        self._of_keys: dict[SpentKey, _Spent] = {}  # apart, so that many tenants make no key forgotten

    def add(self, key: SpentKey, hour: int, usd: float) -> None:
        """Add dollars that were spent in the hour that began at `hour`."""
        table = self._table_of(key)
        spent = table.get(key)
        if spent is None:
            if len(table) >= _MAX_SUBJECTS:
                del table[next(iter(table))]
            spent = table[key] = _Spent()
        spent.add(_periods(hour), usd)

    def add_earlier(self, key: SpentKey, usd: float) -> None:
        """Add dollars that were spent in a month that is over."""
        self.add(key, 0, usd)

    def spent(self, key: SpentKey, per: str | None, now: float) -> float:
        """Return the dollars spent in the present period, as `Budget.per` names it."""
        spent = self._table_of(key).get(key)
        if spent is None:
            return 0.0
        if per is None:
            return max(0.0, spent.ever)
        index = _INDEX[per]
        return max(0.0, spent.usd[index]) if spent.periods[index] == period_start(per, now) else 0.0

    def _table_of(self, key: SpentKey) -> dict[SpentKey, _Spent]:
        if not key[2]:
            return self._of_upstreams
        return self._of_keys if key[1] == "key_budget" else self._spent


def places_of(upstream: str, tenant: str, key: str) -> Iterator[SpentKey]:
    """Yield the budgets that spend with these labels counts in, apart from that of a task; `key`: an issued one."""
    yield upstream, "budget", ""
    yield upstream, "tenant_budget", tenant
    yield ALL_UPSTREAMS, "tenant_budget", tenant
    if key:
        yield ALL_UPSTREAMS, "key_budget", key


@lru_cache(maxsize=16)
def _periods(hour: int) -> tuple[float, float, float]:
    return float(hour), period_start("day", hour), period_start("month", hour)
