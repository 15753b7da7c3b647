"""Tenants: their weights, and the bounds of what each has running and waiting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, TypeGuard

import msgspec

from forebay._validate import check_whole, is_positive, reject

_OWNER: Final = "BackpressureSupervisor"
_MIN_WEIGHT, _MAX_WEIGHT = 1e-6, 1e6  # beyond, the turns of others are lost to rounding
_WEIGHTS: Final = f"a weight from {_MIN_WEIGHT:.6f} to {_MAX_WEIGHT:,.0f}"
RESOURCE_PREFIX: Final = "tenant:"  # of the name of a tenant as a resource


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """The share and the bounds of one tenant: a customer, a user or a team.

    Attributes:
        weight: its share of turns beside the others that have work waiting, from a millionth to a million; 1.0 is that
            of a tenant that is not named.
        max_running: slots that its tasks may hold at a time, nested ones included. None: no bound.
        max_waiting: tasks of it that may wait inside, of all types. They are a resource, of which each priority is
            rejected from a load of its own. None: as many as the queues have room for.

    Raises:
        InvalidSetting: one of them is invalid.
    """

    weight: float = 1.0
    max_running: int | None = None
    max_waiting: int | None = None

    def __post_init__(self) -> None:
        if not _is_weight(self.weight):
            reject("Tenant", "weight", self.weight, _WEIGHTS)
        check_whole("Tenant", "max_running", self.max_running, none="for no bound")
        check_whole("Tenant", "max_waiting", self.max_waiting, minimum=0, none="for no bound")


def tenant_settings(tenants: object) -> dict[str, Tenant]:
    """Return the tenants that a supervisor is given, each a Tenant or its weight.

    Raises:
        InvalidSetting: `tenants` is something else.
    """
    expected = 'a weight or a Tenant by name, such as {"acme": 3, "free": Tenant(max_running=5)}'
    if tenants is None:
        return {}
    if not isinstance(tenants, Mapping):
        reject(_OWNER, "tenants", tenants, expected)
    found = {}
    for name, setting in tenants.items():
        if not isinstance(name, str) or not name:
            reject(_OWNER, "tenants", tenants, expected)
        if not isinstance(setting, Tenant) and not _is_weight(setting):
            reject(_OWNER, f"tenants[{name!r}]", setting, f"{_WEIGHTS}, or a Tenant")
        found[name] = setting if isinstance(setting, Tenant) else Tenant(weight=float(setting))
    return found


def _is_weight(value: object) -> TypeGuard[float]:
    return is_positive(value) and _MIN_WEIGHT <= value <= _MAX_WEIGHT


class _Use:
    """The running and the waiting work of a tenant with a bound.

    Attributes:
        running: slots that its tasks hold.
        claims: its runs that have begun and that only its bound keeps from a free slot. They go before new tasks.
        waiting: how many of its tasks wait, by task type.
    """

    __slots__ = ("claims", "running", "tenant", "waiting")

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.running = 0
        self.claims = 0
        self.waiting: dict[str, int] = {}


class Tenants:
    """The tenants of one supervisor that have settings; the others have a weight of 1.0 and no bounds.

    Attributes:
        weights: the weight of each.
        blocked: those of which no new task may begin. Their tasks hold as many slots as they may, or runs that have
            begun claim the rest.
        bounded: True if any tenant has a bound.
    """

    def __init__(self, settings: Mapping[str, Tenant]) -> None:
        self.weights: dict[str, float] = {name: tenant.weight for name, tenant in settings.items()}
        self.blocked: set[str] = set()
        self._uses = {
            name: _Use(tenant)
            for name, tenant in settings.items()
            if tenant.max_running is not None or tenant.max_waiting is not None
        }
        self.bounded = bool(self._uses)

    def weight(self, name: str) -> float:
        """Return the weight of a tenant."""
        return self.weights.get(name, 1.0)

    def max_running(self, name: str) -> int | None:
        """Return how many slots tasks of a tenant may hold at a time; None if it has no bound."""
        use = self._uses.get(name)
        return None if use is None else use.tenant.max_running

    def room(self, name: str) -> float:
        """Return how many more slots new tasks of a tenant may take; infinity if it has no bound."""
        use = self._uses.get(name)
        if use is None or use.tenant.max_running is None:
            return math.inf
        return max(0, use.tenant.max_running - use.running - use.claims)

    def load(self, name: str) -> float:
        """Return what a tenant has waiting over what it may have; 0.0 if it has no bound."""
        use = self._uses.get(name)
        if use is None or use.tenant.max_waiting is None:
            return 0.0
        return sum(use.waiting.values()) / use.tenant.max_waiting if use.tenant.max_waiting else 1.0

    def waiting_types(self, name: str) -> tuple[str, ...]:
        """Return the types of the tasks that wait of a tenant with a bound."""
        return tuple(self._uses[name].waiting)

    def count_waiting(self, name: str, task_type: str, by: int) -> None:
        """Count `by` more tasks of a tenant and of `task_type` as waiting."""
        use = self._uses.get(name)
        if use is not None:
            use.waiting[task_type] = use.waiting.get(task_type, 0) + by
            if not use.waiting[task_type]:
                del use.waiting[task_type]

    def count_running(self, name: str, by: int) -> bool:
        """Count `by` more slots as held by tasks of a tenant; return whether it is blocked now and was not, or was."""
        use = self._uses.get(name)
        if use is None or use.tenant.max_running is None:
            return False
        use.running += by
        return self._update_blocked(name, use, use.tenant.max_running)

    def count_claims(self, name: str, by: int) -> bool:
        """Count `by` more runs that only the bound keeps from a slot; return whether that changed if it is blocked."""
        use = self._uses[name]
        use.claims += by
        return use.tenant.max_running is not None and self._update_blocked(name, use, use.tenant.max_running)

    def may_resume(self, name: str) -> bool:
        """Return whether a run of a tenant that has begun may take a slot, by the bound of the tenant."""
        use = self._uses.get(name)
        return use is None or use.tenant.max_running is None or use.running < use.tenant.max_running

    def has_claims(self, name: str) -> bool:
        """Return whether only the bound of a tenant keeps a run of it that has begun from a slot."""
        use = self._uses.get(name)
        return use is not None and use.claims > 0

    def _update_blocked(self, name: str, use: _Use, max_running: int) -> bool:
        if (use.running + use.claims >= max_running) is (name in self.blocked):
            return False
        if name in self.blocked:
            self.blocked.remove(name)
        else:
            self.blocked.add(name)
        return True
