"""Leases that are held: renewed together, and dropped when they are lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from forebay.interfaces import Lease, TaskRecord, TaskStore
from forebay.supervisor.spill.leases import HeldLeases
from forebay.task import Priority


class RenewingStore:
    """As much of a task store as renewing needs."""

    def __init__(self, lost: Sequence[str] = ()) -> None:
        self.lost = lost
        self.renewed: list[str] = []

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:  # noqa: ARG002 - part of the interface
        self.renewed = [lease.record.task_id for lease in leases]
        return [lease for lease in leases if lease.record.task_id in self.lost]


def store(*lost: str) -> Any:
    return cast("TaskStore", RenewingStore(lost))


def lease(task_id: str, until: float = 10.0) -> Lease:
    record = TaskRecord(
        task_id=task_id, task_type="work", priority=Priority.NORMAL, envelope=b"", enqueued_at=0.0, attempts=0
    )
    return Lease(record=record, fence=f"fence of {task_id}", until=until)


def test_a_lease_is_valid_until_its_end() -> None:
    held = HeldLeases()
    held.hold(lease("a", until=10.0))
    assert held.is_valid("a", 9.9)
    assert not held.is_valid("a", 10.0)
    assert not held.is_valid("b", 0.0)


def test_renewing_extends_every_lease() -> None:
    held = HeldLeases()
    for task_id in "ab":
        held.hold(lease(task_id))
    renewing = store()
    held.renew(renewing, until=20.0)
    assert renewing.renewed == ["a", "b"]
    assert held.is_valid("a", 19.0)
    assert held.is_valid("b", 19.0)


def test_a_lost_lease_is_not_valid_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    held = HeldLeases()
    for task_id in "ab":
        held.hold(lease(task_id))
    held.renew(store("a"), until=20.0)
    assert not held.is_valid("a", 0.0)
    assert held.is_valid("b", 19.0)
    assert "the lease on task 'a' was lost" in caplog.text


def test_dropping_a_lease_returns_its_fence_once() -> None:
    held = HeldLeases()
    held.hold(lease("a"))
    assert held.drop("a") == "fence of a"
    assert held.drop("a") is None


def test_taking_all_leaves_none() -> None:
    held = HeldLeases()
    for task_id in "ab":
        held.hold(lease(task_id))
    assert [each.record.task_id for each in held.take_all()] == ["a", "b"]
    assert held.take_all() == []
