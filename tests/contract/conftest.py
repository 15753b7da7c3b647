"""The backends of each seam. A new one adds a line here, and every promise is asked of it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from forebay.overflow import open_ledger
from forebay.task import Priority
from forebay.typing import Lease, Ledger, Row

DURABLE = "durable"  # what it holds is there when it is opened again
SHARED = "shared"  # several may have it open at once


@dataclass(frozen=True)
class Backend:
    """A kind of ledger, and which promises it makes beyond those that all make."""

    name: str
    url: str  # {path} is a fresh directory
    can: frozenset[str] = frozenset()

    def needs(self, capability: str) -> None:
        if capability not in self.can:
            pytest.skip(f"{self.name} is not {capability}")


LEDGERS = [
    Backend("memory", "memory://?bound={bound}"),
    Backend("sqlite", "sqlite:///{path}/ledger.db?bound={bound}", frozenset({DURABLE, SHARED})),
]


@pytest.fixture(params=LEDGERS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


OpenLedger = Callable[..., Awaitable[Ledger]]


@pytest.fixture
async def another(backend: Backend, tmp_path: Path) -> AsyncIterator[OpenLedger]:
    """Opens the one place of this test, once more or with another bound."""
    opened: list[Ledger] = []

    async def open_one(bound: int = 10_000) -> Ledger:
        ledger = open_ledger(backend.url.format(path=tmp_path, bound=bound))
        opened.append(ledger)
        await ledger.open()
        return ledger

    yield open_one
    for ledger in opened:
        await ledger.close()


@pytest.fixture
async def ledger(another: OpenLedger) -> Ledger:
    return await another()


@dataclass
class Rows:
    """Makes rows that differ in what a test says, and takes what it leases down."""

    count: itertools.count[int] = field(default_factory=itertools.count)

    def __call__(  # noqa: PLR0913 - the fields of a row
        self,
        task_id: str | None = None,
        *,
        of: str = "research",
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        key: str | None = None,
        envelope: bytes = b"envelope",
    ) -> Row:
        number = next(self.count)
        return Row(
            task_id=f"task-{number}" if task_id is None else task_id,
            task_type=of,
            priority=priority,
            envelope=envelope,
            enqueued_at=1_000.0 + number,
            deadline=deadline,
            key=key,
        )


@pytest.fixture
def row() -> Rows:
    return Rows()


Take = Callable[..., Awaitable[list[Lease]]]


@pytest.fixture
def take(ledger: Ledger) -> Take:
    """Leases from the ledger, by default all research until 100."""

    async def lease(limit: int = 10_000, *, of: str = "research", until: float = 100.0) -> list[Lease]:
        return list(await ledger.lease(of, limit, until=until))

    return lease
