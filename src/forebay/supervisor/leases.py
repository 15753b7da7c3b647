"""The leases that this house holds: timed rights to stored tasks."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from forebay.typing import Lease


class Leases:
    """Leases by task id."""

    def __init__(self) -> None:
        self._held: dict[str, Lease] = {}

    def hold(self, lease: Lease) -> None:
        """Take note of a lease."""
        self._held[lease.row.task_id] = lease

    def drop(self, task_id: str) -> str | None:
        """Forget a lease; return its fence, if there was one."""
        lease = self._held.pop(task_id, None)
        return None if lease is None else lease.fence

    def valid(self, task_id: str, now: float) -> bool:
        """Whether the lease on a task has not lapsed at `now`, in epoch seconds."""
        lease = self._held.get(task_id)
        return lease is not None and now < lease.until

    def all(self) -> Sequence[Lease]:
        """Every lease."""
        return list(self._held.values())

    def take_all(self) -> Sequence[Lease]:
        """Every lease, forgotten here."""
        leases = self.all()
        self._held.clear()
        return leases

    def renewed(self, leases: Sequence[Lease], *, lost: Sequence[Lease], until: float) -> None:
        """Note that those of `leases` which were not `lost` last until `until`, in epoch seconds."""
        gone = {lease.fence for lease in lost}
        for lease in leases:
            held = self._held.get(lease.row.task_id)
            if held is not None and held.fence == lease.fence and lease.fence not in gone:
                self.hold(msgspec.structs.replace(lease, until=until))
