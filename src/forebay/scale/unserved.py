"""The sign that replicas and tasks are not of the same fleet."""

from __future__ import annotations

from forebay.interfaces import Demand
from forebay.scale.target import Replicas


class UnservedTasks:
    """Tasks that wait in the overflow while replicas are ready, short of nothing, and take none.

    Args:
        patience: seconds for which that may last.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: float | None = None
        self._told = False

    def observe(self, now: float, demand: Demand, replicas: Replicas) -> bool:
        """Take a reading in. Return True once when it has lasted too long, and again only after it has ended."""
        idle = demand.spilled > 0 and demand.elsewhere == 0 and replicas.ready > 0 and replicas.limited_by is None
        if not idle:
            self._since, self._told = None, False
            return False
        if self._since is None:
            self._since = now
        if self._told or now < self._since + self._patience:
            return False
        self._told = True
        return True
