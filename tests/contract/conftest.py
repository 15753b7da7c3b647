"""The backends of each seam. A new one adds a line here, and every promise is asked of it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.contract import engine_handlers

from forebay import BackpressureSupervisor, WorkerAgent
from forebay.engine import Engine, ProcessEngine
from forebay.interfaces import Lease, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.task import Priority

DURABLE = "durable"  # what it holds is there when it is opened again
SHARED = "shared"  # several may have it open at once


@dataclass(frozen=True)
class StoreBackend:
    """A kind of ledger, and which promises it makes beyond those that all make."""

    name: str
    url: str  # {path} is a fresh directory
    can: frozenset[str] = frozenset()

    def needs(self, capability: str) -> None:
        if capability not in self.can:
            pytest.skip(f"{self.name} is not {capability}")


LEDGERS = [
    StoreBackend("memory", "memory://?bound={bound}"),
    StoreBackend("sqlite", "sqlite:///{path}/ledger.db?bound={bound}", frozenset({DURABLE, SHARED})),
]


@pytest.fixture(params=LEDGERS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> StoreBackend:
    chosen: StoreBackend = request.param
    return chosen


OpenStore = Callable[..., Awaitable[TaskStore]]


@pytest.fixture
async def another(backend: StoreBackend, tmp_path: Path) -> AsyncIterator[OpenStore]:
    """Opens the one place of this test, once more or with another bound."""
    opened: list[TaskStore] = []

    async def open_one(bound: int = 10_000) -> TaskStore:
        ledger = open_task_store(backend.url.format(path=tmp_path, bound=bound))
        opened.append(ledger)
        await ledger.open()
        return ledger

    yield open_one
    for ledger in opened:
        await ledger.close()


@pytest.fixture
async def ledger(another: OpenStore) -> TaskStore:
    return await another()


@dataclass
class MakeRecord:
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
    ) -> TaskRecord:
        number = next(self.count)
        return TaskRecord(
            task_id=f"task-{number}" if task_id is None else task_id,
            task_type=of,
            priority=priority,
            envelope=envelope,
            enqueued_at=1_000.0 + number,
            deadline=deadline,
            key=key,
        )


@pytest.fixture
def row() -> MakeRecord:
    return MakeRecord()


Take = Callable[..., Awaitable[list[Lease]]]


@pytest.fixture
def take(ledger: TaskStore) -> Take:
    """Leases from the ledger, by default all research until 100."""

    async def lease(limit: int = 10_000, *, of: str = "research", until: float = 100.0) -> list[Lease]:
        return list(await ledger.lease(of, limit, until=until))

    return lease


# --- engines ---------------------------------------------------------------------------------------------------------

KILLS = "kills"  # what does not stop is ended all the same
SHARES = "shares"  # memory: what goes in and out is the object itself
STOPS = "stops"  # a handler that waits stops when it is asked to
ASIDE = "aside"  # a handler that blocks holds up nobody else


@dataclass(frozen=True)
class EngineCase:
    """An engine, a kind of handler, and which promises it makes beyond those that all make."""

    name: str
    engine: str | Engine
    handler: str  # of `engine_handlers`
    can: frozenset[str] = frozenset()

    def needs(self, capability: str) -> None:
        if capability not in self.can:
            pytest.skip(f"{self.name} lacks: {capability}")

    def register(self, supervisor: BackpressureSupervisor, **settings: Any) -> WorkerAgent:
        """A worker there, of the name and the type "worker"."""
        given = {"handler": getattr(engine_handlers, self.handler), "task_types": ["worker"], **settings}
        return supervisor.register_worker("worker", engine=self.engine, **given)


IN_PROCESS = ProcessEngine(grace=0.2)
PLACES = [
    EngineCase("loop", "loop", "coroutine", frozenset({SHARES, STOPS})),
    EngineCase("thread, plain", "thread", "plain", frozenset({SHARES, ASIDE})),
    EngineCase("thread, async", "thread", "coroutine", frozenset({SHARES, STOPS, ASIDE})),
    EngineCase("process, plain", IN_PROCESS, "plain", frozenset({KILLS, STOPS, ASIDE})),
    EngineCase("process, async", IN_PROCESS, "coroutine", frozenset({KILLS, STOPS, ASIDE})),
]


@pytest.fixture(params=PLACES, ids=lambda place: place.name)
def place(request: pytest.FixtureRequest) -> EngineCase:
    chosen: EngineCase = request.param
    return chosen
