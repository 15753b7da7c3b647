"""A Redis that loses its records while supervisors live: emptied, or restarted without a disk."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from tests.support.held_handler import HeldHandler
from tests.support.redis_servers import StandaloneRedis, redis_server

from forebay import BackpressureSupervisor, Task, Ticket
from forebay.errors import StoreUnavailable, UnknownTask
from forebay.interfaces import PutResult, RecordState, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.overflow.redis import RedisTaskStore
from forebay.storage import redis_master
from forebay.storage.redis_master import RedisMaster
from forebay.supervisor.spill.spill import Spill
from forebay.task import Priority, TaskStatus, Verdict

pytestmark = pytest.mark.blocks  # it asks the server from the loop

NAMES = itertools.count()
BOUND = 20.0  # seconds
LEASE = 1.5  # seconds


@pytest.fixture(scope="module")
def server() -> Iterator[StandaloneRedis]:
    with redis_server() as started:
        yield started


@pytest.fixture
def name() -> str:
    return f"lost-{next(NAMES)}"


@pytest.fixture
def url(server: StandaloneRedis, name: str) -> str:
    return f"{server.url}?name={name}"


@pytest.fixture
def empty(server: StandaloneRedis) -> Callable[[], object]:
    return partial(server.servers[0].ask, "FLUSHALL")


@asynccontextmanager
async def supervisor_on(
    url: str, handler: HeldHandler, *, max_concurrent: int = 1, **settings: Any
) -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor(overflow=url, **{"lease": LEASE, **settings}) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=max_concurrent)
        yield supervisor


async def submit(supervisor: BackpressureSupervisor, *names: str, **options: Any) -> list[Ticket]:
    return [await supervisor.submit(Task("work", each, task_id=each, durable=True, **options)) for each in names]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[TaskStore]:
    store = open_task_store(url)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def states_of(url: str, *task_ids: str) -> list[RecordState | None]:
    async with opened(url) as store:
        found = [await store.find(task_id) for task_id in task_ids]
    return [None if each is None else each[0] for each in found]


def spill_of(supervisor: BackpressureSupervisor) -> Spill:
    spill = supervisor._dispatcher_here().spill
    assert spill is not None
    return spill


async def until_restored(url: str, *task_ids: str) -> None:
    async with asyncio.timeout(BOUND):
        while set(await states_of(url, *task_ids)) != {RecordState.LEASED}:  # noqa: ASYNC110 - it is on the server
            await asyncio.sleep(0.05)


async def test_what_runs_and_waits_in_a_live_process_is_stored_again_and_ends(
    url: str, empty: Callable[[], object]
) -> None:
    handler = HeldHandler()
    async with supervisor_on(url, handler) as supervisor, asyncio.timeout(BOUND):
        tickets = await submit(supervisor, "runs", "waits")
        await handler.at_work.wait()
        empty()
        await until_restored(url, "runs", "waits")
        handler.may_end.set()
        results = [await ticket for ticket in tickets]
        assert [result.result for result in results] == ["result of runs", "result of waits"]
        assert handler.started == ["runs", "waits"]
        assert [result.attempts for result in results] == [1, 1]
    assert await states_of(url, "runs", "waits") == [RecordState.DONE] * 2


@pytest.mark.parametrize("ending", ["succeeds", "fails"])
async def test_a_handler_that_ends_before_the_loss_is_noticed_delivers_its_result(
    ending: str, url: str, empty: Callable[[], object]
) -> None:
    may_end = asyncio.Event()

    async def work(_: Task) -> str:
        await may_end.wait()
        if ending == "fails":
            raise ValueError(ending)
        return ending

    async with BackpressureSupervisor(overflow=url, lease=60.0) as supervisor, asyncio.timeout(BOUND):
        supervisor.register_worker("worker", handler=work, task_types=["work"])
        (ticket,) = await submit(supervisor, "runs")
        empty()
        may_end.set()
        expected = TaskStatus.SUCCEEDED if ending == "succeeds" else TaskStatus.FAILED
        assert (await ticket).status is expected


async def test_a_handler_whose_record_has_gone_delivers_its_result(url: str) -> None:
    """Also if the loss is not noticed at all."""
    handler = HeldHandler()
    async with supervisor_on(url, handler, lease=60.0) as supervisor, asyncio.timeout(BOUND):
        (ticket,) = await submit(supervisor, "runs")
        await handler.at_work.wait()
        async with opened(url) as other:
            assert await other.find("runs") is not None
            connection = other._queue.check_open().groups  # type: ignore[attr-defined]
            connection.call(*(("DEL", f"{other._prefix}{key}") for key in ("ids", "tasks", "leased")))  # type: ignore[attr-defined]
        handler.may_end.set()
        assert (await ticket).result == "result of runs"


async def test_a_task_whose_lease_lapsed_while_the_server_was_away_runs_once_it_is_back_without_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_master, "_PATIENCE", 0.2)
    with redis_server() as own:
        handler = HeldHandler()
        async with supervisor_on(own.url, handler) as supervisor, asyncio.timeout(60.0):
            first, second = await submit(supervisor, "runs", "waits")
            await handler.at_work.wait()
            own.servers[0].kill()
            await asyncio.sleep(LEASE + 0.1)  # its lease lapses
            handler.may_end.set()
            assert (await first).result == "result of runs"
            assert second.status is TaskStatus.SPILLED
            own.servers[0].start()
            assert (await second).result == "result of waits"
        assert handler.started == ["runs", "waits"]


async def test_what_another_process_runs_is_not_run_again_after_the_loss(
    url: str, empty: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_renew(*_: Any, **__: Any) -> None:
        raise StoreUnavailable(where="the store", why="it is away", advice="Wait.")

    here, elsewhere = HeldHandler(), HeldHandler()
    async with supervisor_on(url, here) as first, asyncio.timeout(60.0):
        _, waits = await submit(first, "runs", "waits")
        await here.at_work.wait()
        with monkeypatch.context() as patch:
            patch.setattr(spill_of(first).stored.store, "renew", cannot_renew)
            async with supervisor_on(url, elsewhere, max_concurrent=2) as second:
                while "waits" not in elsewhere.started:  # noqa: ASYNC110 - both leases have to lapse
                    await asyncio.sleep(0.05)
                here.may_end.set()
                lost = spill_of(second).stored.lost
                restore, loop = lost._restore_in_background, asyncio.get_running_loop()
                patch.setattr(lost, "_restore_in_background", lambda lease: loop.call_later(LEASE / 2, restore, lease))
                empty()
                await asyncio.sleep(2.5 * LEASE)
                elsewhere.may_end.set()
                assert (await waits).success
    assert (here.started + elsewhere.started).count("waits") == 1


async def test_closing_leaves_what_waits_to_the_next_process_though_the_loss_was_not_noticed(
    url: str, empty: Callable[[], object]
) -> None:
    handler = HeldHandler()
    async with supervisor_on(url, handler, lease=60.0) as supervisor:
        await submit(supervisor, "runs", "waits")
        await handler.at_work.wait()
        empty()
        await supervisor.close()
    assert await states_of(url, "runs", "waits") == [RecordState.WAITING] * 2
    handler.may_end.set()
    async with supervisor_on(url, handler) as supervisor, asyncio.timeout(BOUND):
        found = await supervisor.find("waits")
        assert found is not None
        assert (await found).result == "result of waits"


async def test_a_conversation_goes_on_after_the_loss(url: str, empty: Callable[[], object]) -> None:
    handler = HeldHandler()
    async with supervisor_on(url, handler) as supervisor, asyncio.timeout(BOUND):
        (first,) = await submit(supervisor, "first", thread_id="chat")
        await handler.at_work.wait()
        empty()
        await until_restored(url, "first")
        (second,) = await submit(supervisor, "second", thread_id="chat")
        handler.may_end.set()
        assert [(await ticket).result for ticket in (first, second)] == ["result of first", "result of second"]
        assert handler.started == ["first", "second"]


async def test_what_only_waited_on_the_server_is_unknown_after_the_loss(url: str, empty: Callable[[], object]) -> None:
    handler = HeldHandler()
    async with supervisor_on(url, handler, max_queue_size=0) as supervisor, asyncio.timeout(BOUND):
        await supervisor.submit(Task("work", "runs"))
        spilled = await supervisor.submit(Task("work", "waits"))
        assert spilled.verdict is Verdict.SPILLED
        empty()
        with pytest.raises(UnknownTask):
            await spilled
        handler.may_end.set()


RECORD = TaskRecord(task_id="a", task_type="t", priority=Priority.NORMAL, envelope=b"", enqueued_at=1.0)


async def test_a_store_says_once_that_its_records_are_gone_and_goes_on(
    server: StandaloneRedis, name: str, url: str, empty: Callable[[], object]
) -> None:
    losses: dict[str, int] = {"one": 0, "other": 0}

    def count(which: str) -> None:
        losses[which] += 1

    def nothing() -> None: ...

    async with opened(url) as one, opened(url) as other:
        one.subscribe(on_waiting=nothing, on_ended=nothing, on_lost=partial(count, "one"))
        other.subscribe(on_waiting=nothing, on_ended=nothing, on_lost=partial(count, "other"))
        await one.put(RECORD)
        (lease,) = await other.lease("t", 1, until=9e9)
        empty()
        with pytest.raises(StoreUnavailable, match="its records are gone"):
            await one.put(RECORD)
        assert await one.put(RECORD) is PutResult.STORED
        with pytest.raises(StoreUnavailable, match="its records are gone"):
            other.renew([lease], until=9e9)
        assert other.renew([lease], until=9e9) == [lease]
        assert await other.find("a") is not None
        assert losses == {"one": 1, "other": 1}
    assert server.servers[0].ask("GET", f"{{{name}}}:format") == "1"


async def test_a_store_whose_layout_has_become_another_is_not_written_to(
    server: StandaloneRedis, name: str, url: str, empty: Callable[[], object]
) -> None:
    async with opened(url) as store:
        empty()
        server.servers[0].ask("SET", f"{{{name}}}:format", "2")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="a newer Forebay"):
                await store.put(RECORD)


async def test_a_store_whose_records_go_between_their_writing_and_their_showing_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = list[str]()

    def nothing() -> None: ...

    settle = RedisTaskStore._settle
    with redis_server(appendonly="yes", appendfsync="always") as own:

        def empty_and_settle(store: RedisTaskStore, master: RedisMaster) -> Any:
            if store._unsettled and not losses:
                own.servers[0].ask("FLUSHALL")
            return settle(store, master)

        monkeypatch.setattr(RedisTaskStore, "_settle", empty_and_settle)
        async with opened(f"{own.url}?fsync=yes") as store:
            store.subscribe(on_waiting=nothing, on_ended=nothing, on_lost=lambda: losses.append("lost"))
            assert await store.put(RECORD) is PutResult.STORED  # it was, and is lost since
            assert losses == ["lost"]
            assert await store.find("a") is None
            assert await store.put(RECORD) is PutResult.STORED
            assert await store.find("a") is not None
