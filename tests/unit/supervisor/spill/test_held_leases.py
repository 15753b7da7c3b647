"""Leases that are held: renewed together, and dropped when they are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
from tests.support.leases import after_failure
from tests.support.task_plane import virtual

from forebay import clock
from forebay.interfaces import Lease, TaskRecord, TaskStore
from forebay.simulation import virtual_loop
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


def lease(task_id: str, seconds: float = 10.0) -> Lease:
    record = TaskRecord(
        task_id=task_id, task_type="work", priority=Priority.NORMAL, envelope=b"", enqueued_at=0.0, attempts=0
    )
    return Lease(record=record, fence=f"fence of {task_id}", until=clock.wall_time() + seconds)


@virtual
async def test_a_lease_is_valid_until_its_end() -> None:
    held = HeldLeases(30.0)
    held.hold(lease("a", 10.0))
    await asyncio.sleep(9.9)
    assert held.is_valid("a")
    await asyncio.sleep(0.2)
    assert not held.is_valid("a")
    assert not held.is_valid("b")


@pytest.mark.parametrize("step", [-3600.0, -5.0, 5.0, 3600.0])
@virtual
async def test_a_lease_lasts_as_long_whatever_the_wall_clock_is_set_to(step: float) -> None:
    held = HeldLeases(30.0)
    held.hold(lease("a", 30.0))
    virtual_loop().step_wall_time(step)
    await asyncio.sleep(29.9)
    assert held.is_valid("a")
    await asyncio.sleep(0.2)
    assert not held.is_valid("a")


@virtual
async def test_renewing_extends_every_lease() -> None:
    held = HeldLeases(30.0)
    for task_id in "ab":
        held.hold(lease(task_id))
    await asyncio.sleep(9.0)
    renewing = store()
    held.renew(renewing)
    assert renewing.renewed == ["a", "b"]
    await asyncio.sleep(29.0)
    assert held.is_valid("a")
    assert held.is_valid("b")


@virtual
async def test_a_lost_lease_is_not_valid_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    held = HeldLeases(30.0)
    for task_id in "ab":
        held.hold(lease(task_id))
    held.renew(store("a"))
    assert not held.is_valid("a")
    assert held.is_valid("b")
    assert "the lease on task 'a' was lost" in caplog.text


def test_dropping_a_lease_returns_it_once() -> None:
    held = HeldLeases(30.0)
    held.hold(kept := lease("a"))
    assert held.drop("a") is kept
    assert held.drop("a") is None


def test_taking_all_leaves_none() -> None:
    held = HeldLeases(30.0)
    for task_id in "ab":
        held.hold(lease(task_id))
    assert [each.record.task_id for each in held.take_all()] == ["a", "b"]
    assert held.take_all() == []


@virtual
async def test_a_lease_that_is_lost_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    held = HeldLeases(30.0)
    held.hold(lease("a"))
    for _ in range(3):
        held.renew(store("a"))
    assert [record.getMessage() for record in caplog.records] == [
        "the lease on task 'a' was lost: the result of its handler will not be stored"
    ]


@virtual
async def test_a_lease_that_was_lost_is_valid_again_once_it_is_extended() -> None:
    held, one = HeldLeases(30.0), lease("a")
    held.hold(one)
    held.renew(store("a"))
    assert held.extend(one, clock.wall_time() + 5.0)
    await asyncio.sleep(4.9)
    assert held.is_valid("a")
    await asyncio.sleep(0.2)
    assert not held.is_valid("a")
    other = msgspec.structs.replace(one, fence="another fence")
    assert not held.extend(other, clock.wall_time() + 5.0)


@virtual
async def test_a_lease_that_counts_a_failure_lasts_as_long_and_is_the_one_that_is_returned() -> None:
    held, one = HeldLeases(30.0), lease("a")
    held.hold(one)
    held.extend(one, clock.wall_time() + 20.0)
    failed = after_failure(one)
    held.update(failed)
    held.update(msgspec.structs.replace(one, fence="another fence"))
    held.update(lease("b"))
    await asyncio.sleep(15.0)
    assert held.is_valid("a")
    assert held.holds(one)
    assert list(held.take_all()) == [failed]
