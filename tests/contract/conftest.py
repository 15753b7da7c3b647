"""The implementations of each interface.

A new one is added to ALL_STORES, BACKENDS (of accounts) or ENGINES, and is tested for every promise.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.contract import engine_handlers
from tests.support.account_backends import (
    BACKENDS,
    PAIRED_BACKENDS,
    AccountBackend,
    AccountProcesses,
    OpenAccounts,
)
from tests.support.task_stores import ALL_STORES, PROMPT, SLOW_STORES, StoreBackend

from forebay import BackpressureSupervisor, WorkerAgent
from forebay.engine import Engine, ProcessEngine
from forebay.interfaces import Lease, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.task import Priority


@pytest.fixture(
    params=[pytest.param(each, marks=pytest.mark.slow if each in SLOW_STORES else ()) for each in ALL_STORES],
    ids=str,
)
def backend(request: pytest.FixtureRequest) -> StoreBackend:
    chosen: StoreBackend = request.param
    chosen.start_server()
    return chosen


OpenStore = Callable[..., Awaitable[TaskStore]]


@pytest.fixture
async def open_store(backend: StoreBackend, tmp_path: Path) -> AsyncIterator[OpenStore]:
    """Return a function that opens the one store of this test, again or with another bound."""
    opened: list[TaskStore] = []

    async def open_one(bound: int = 10_000) -> TaskStore:
        store = open_task_store(backend.url(tmp_path, bound=bound))
        opened.append(store)
        await store.open()
        return store

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: OpenStore) -> TaskStore:
    return await open_store()


@dataclass
class MakeRecord:
    """Makes records that differ only in what a test passes, and in their order."""

    count: itertools.count[int] = field(default_factory=itertools.count)

    def __call__(  # noqa: PLR0913 - the fields of a record
        self,
        task_id: str | None = None,
        *,
        of: str = "research",
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        key: str | None = None,
        envelope: bytes = b"envelope",
        thread: str | None = None,
        enqueued_at: float | None = None,
        tenant: str = "default",
        not_before: float | None = None,
    ) -> TaskRecord:
        number = next(self.count)
        return TaskRecord(
            task_id=f"task-{number}" if task_id is None else task_id,
            task_type=of,
            priority=priority,
            envelope=envelope,
            enqueued_at=1_000.0 + number if enqueued_at is None else enqueued_at,
            deadline=deadline,
            key=key,
            thread_id=thread,
            tenant=tenant,
            not_before=not_before,
        )


@pytest.fixture
def record() -> MakeRecord:
    return MakeRecord()


Take = Callable[..., Awaitable[list[Lease]]]


@pytest.fixture
def take(store: TaskStore, backend: StoreBackend) -> Take:
    """Return a function that leases from the store; by default all records of type research, until 100.

    A store that is not PROMPT is asked again while records wait, as a supervisor does.
    """

    async def lease(limit: int = 10_000, *, of: str = "research", until: float = 100.0) -> list[Lease]:
        leases = list(await store.lease(of, limit, until=until))
        while PROMPT not in backend.can and len(leases) < limit and any(key[0] == of for key in await store.depths()):
            leases += await store.lease(of, limit - len(leases), until=until)
        return leases

    return lease


# --- engines ---------------------------------------------------------------------------------------------------------

KILLS = "kills"  # a handler that does not stop is killed
SHARES = "shares"  # memory: a payload or result is the object itself
STOPS = "stops"  # a waiting handler stops when it is cancelled
ISOLATES = "isolates"  # a blocking handler delays no other task


@dataclass(frozen=True)
class EngineCase:
    """An engine with a kind of handler, and the promises that it makes beyond those that all make."""

    name: str
    engine: str | Engine
    handler: str  # of `engine_handlers`
    can: frozenset[str] = frozenset()

    def needs(self, capability: str) -> None:
        if capability not in self.can:
            pytest.skip(f"{self.name} lacks: {capability}")

    def register(self, supervisor: BackpressureSupervisor, **settings: Any) -> WorkerAgent:
        """Register a worker with this engine, of the name and the task type "worker"."""
        given = {"handler": getattr(engine_handlers, self.handler), "task_types": ["worker"], **settings}
        return supervisor.register_worker("worker", engine=self.engine, **given)


PROCESSES = ProcessEngine(grace=0.2)
ENGINES = [
    EngineCase("loop", "loop", "coroutine", frozenset({SHARES, STOPS})),
    EngineCase("thread, plain", "thread", "plain", frozenset({SHARES, ISOLATES})),
    EngineCase("thread, async", "thread", "coroutine", frozenset({SHARES, STOPS, ISOLATES})),
    EngineCase("process, plain", PROCESSES, "plain", frozenset({KILLS, STOPS, ISOLATES})),
    EngineCase("process, async", PROCESSES, "coroutine", frozenset({KILLS, STOPS, ISOLATES})),
]


@pytest.fixture(params=ENGINES, ids=lambda engine_case: engine_case.name)
def engine_case(request: pytest.FixtureRequest) -> EngineCase:
    chosen: EngineCase = request.param
    return chosen


# --- accounts --------------------------------------------------------------------------------------------------------


def _processes(backends: Sequence[AccountBackend], count: int) -> list[Any]:
    """Return parameters: that many processes that have an account open on each backend."""
    return [
        pytest.param(
            (backend, count),
            id=str(backend) if count == 1 else f"{count} on {backend}",
            marks=pytest.mark.blocks if backend.blocks else (),
        )
        for backend in backends
    ]


@pytest.fixture(params=_processes(BACKENDS, 1))
def accounts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenAccounts]:
    """Return what opens upstreams whose account is on one backend."""
    backend, _ = request.param
    with backend.accounts(tmp_path) as opened:
        yield opened


@pytest.fixture(params=_processes(BACKENDS, 1) + _processes(PAIRED_BACKENDS, 2))
def processes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AccountProcesses]:
    """Return what opens an account on one backend, in one process or in two."""
    backend, count = request.param
    with backend.accounts(tmp_path) as opened:
        yield AccountProcesses(opened, count)
