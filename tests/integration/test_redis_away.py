"""Supervisors whose Redis hangs, is away, is slow or full: a verdict within a bound, no result lost, and recovery."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
from tests.support.callers import running
from tests.support.cutting_proxy import CuttingProxy, Side
from tests.support.held_handler import HeldHandler
from tests.support.redis_servers import RedisServer, StandaloneRedis, redis_server, until
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, Task, TaskStatus, Verdict, clock
from forebay.errors import StoreUnavailable
from forebay.interfaces import RecordState
from forebay.overflow import open_task_store
from forebay.storage import redis_master
from forebay.supervisor.spill.maintenance import StoreMaintenance

NAMES = itertools.count()
BOUND = 15.0  # seconds for a verdict: the master is looked for, and its answer awaited, a few seconds each


@pytest.fixture(scope="module")
def server() -> Iterator[StandaloneRedis]:
    with redis_server(proxied=True) as started:
        yield started


@pytest.fixture
def proxy(server: StandaloneRedis) -> Iterator[CuttingProxy]:
    [proxy] = server.proxies
    yield proxy
    proxy.delay(0.0)
    proxy.go_on()
    proxy.accept()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a server that does not answer up sooner."""
    monkeypatch.setattr(redis_master, "_ANSWER_TIMEOUT", 0.3)
    monkeypatch.setattr(redis_master, "_PATIENCE", 0.5)


@pytest.fixture
def urls(server: StandaloneRedis) -> tuple[str, str]:
    """Return the URLs of a new overflow, by way of the proxy and past it."""
    name = f"away-{next(NAMES)}"
    return f"{server.url}?name={name}", f"redis://127.0.0.1:{server.servers[0].port}/0?name={name}"


@asynccontextmanager
async def supervisor_on(
    url: str, handler: Callable[[Task], Any], **settings: Any
) -> AsyncIterator[BackpressureSupervisor]:
    settings = {"max_queue_size": 0, "lease": 10.0, "zombie_grace": 1.0, **settings}
    async with BackpressureSupervisor(overflow=url, **settings) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        yield supervisor


async def in_thread(work: Callable[[], object]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, work)


async def state_of(url: str, task_id: str) -> RecordState | None:
    store = open_task_store(url)
    await store.open()
    try:
        found = await store.find(task_id)
    finally:
        await store.close()
    return None if found is None else found[0]


async def check_rejected(supervisor: BackpressureSupervisor, task_id: str) -> None:
    """Submit a task to a store that cannot take it."""
    async with asyncio.timeout(BOUND):
        ticket = await supervisor.submit(Task("work", task_id=task_id))
    assert (ticket.verdict, ticket.limited_by) == (Verdict.REJECTED, "overflow")
    assert "the overflow" in str(ticket.reason)


# --- at submit -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_server_that_hangs_at_submit_rejects_within_a_bound(
    server: StandaloneRedis, urls: tuple[str, str]
) -> None:
    """With the real timeouts, and a server that is stopped: its connections stay open."""
    handler = HeldHandler()
    async with supervisor_on(urls[1], handler) as supervisor:
        await supervisor.submit(Task("work", "running"))
        server.servers[0].stop()
        try:
            await check_rejected(supervisor, "rejected")
            with pytest.raises(StoreUnavailable):
                async with asyncio.timeout(BOUND):
                    await supervisor.submit(Task("work", task_id="durable", durable=True))
        finally:
            server.servers[0].go_on()
        handler.may_end.set()
        assert await supervisor.run(Task("work", "next", durable=True)) == "result of next"
    assert [await state_of(urls[1], task_id) for task_id in ("rejected", "durable")] == [None, None]
    assert handler.started == ["running", "next"]


@pytest.mark.parametrize("fault", ["hangs", "is away", "loses the answer"])
@pytest.mark.usefixtures("impatient")
async def test_a_rejected_task_is_not_stored_and_the_next_is(
    fault: str, proxy: CuttingProxy, urls: tuple[str, str]
) -> None:
    handler = HeldHandler()
    async with supervisor_on(urls[0], handler) as supervisor:
        await supervisor.submit(Task("work", "running"))
        if fault == "hangs":
            proxy.hold()
        elif fault == "is away":
            proxy.refuse()
        else:
            proxy.cut_at(1, "answer", having=b"rejected", then_refuse=True)
        await check_rejected(supervisor, "rejected")
        proxy.go_on()
        proxy.accept()
        assert (await supervisor.submit(Task("work", task_id="stored"))).verdict is Verdict.SPILLED
        assert await state_of(urls[1], "stored") is RecordState.WAITING
        assert await state_of(urls[1], "rejected") is None
        again = await supervisor.submit(Task("work", "again", task_id="rejected"))
        assert again.verdict is Verdict.SPILLED
        handler.may_end.set()
        assert (await again).result == "result of again"


@pytest.mark.usefixtures("impatient")
async def test_a_rejected_task_is_not_stored_though_its_supervisor_closes_next(
    proxy: CuttingProxy, urls: tuple[str, str]
) -> None:
    handler = HeldHandler()
    async with supervisor_on(urls[0], handler) as supervisor:
        await supervisor.submit(Task("work", "running"))
        proxy.cut_at(1, "answer", having=b"rejected", then_refuse=True)
        await check_rejected(supervisor, "rejected")
        assert await state_of(urls[1], "rejected") is RecordState.WAITING
        proxy.accept()
        handler.may_end.set()
    assert await state_of(urls[1], "rejected") is None


@pytest.mark.slow
async def test_a_server_that_hangs_lets_nobody_wait_for_a_start_or_a_close(
    server: StandaloneRedis, urls: tuple[str, str]
) -> None:
    handler = HeldHandler()
    async with asyncio.timeout(2 * BOUND + 5.0):
        async with supervisor_on(urls[1], handler) as supervisor:
            await supervisor.submit(Task("work", "running", durable=True))
            server.servers[0].stop()
            closing = asyncio.ensure_future(supervisor.close())
            try:
                with pytest.raises(StoreUnavailable):
                    await BackpressureSupervisor(overflow=urls[1]).start()
                await closing
            finally:
                server.servers[0].go_on()


# --- while tasks run, and at their ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["hangs", "is away", "loses the answer"])
@pytest.mark.usefixtures("impatient")
async def test_a_result_is_kept_while_the_server_is_away_and_delivered_when_it_is_back(
    fault: str, proxy: CuttingProxy, urls: tuple[str, str]
) -> None:
    here, elsewhere = HeldHandler(), HeldHandler()
    async with supervisor_on(urls[0], here) as first, supervisor_on(urls[1], elsewhere, lease=3.0) as second:
        ticket = await first.submit(Task("work", "once", task_id="once", durable=True))
        await here.at_work.wait()
        if fault == "hangs":
            proxy.hold()
        elif fault == "is away":
            proxy.refuse()
        else:
            proxy.cut_at(1, "answer", having=b"once", then_refuse=True)
        here.may_end.set()
        async with asyncio.timeout(BOUND):
            assert (await ticket).result == "result of once"
        proxy.go_on()
        proxy.accept()
        found = await second.find("once")
        assert found is not None
        async with asyncio.timeout(BOUND):
            result = await found
        assert (result.result, result.attempts) == ("result of once", 1)
    assert (here.started, elsewhere.started) == (["once"], [])


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
async def test_a_server_that_is_killed_and_comes_back_with_its_disk_loses_nothing() -> None:
    with redis_server(appendonly="yes", appendfsync="always") as durable:
        url = f"{durable.url}?fsync=yes"
        handler = HeldHandler()
        async with supervisor_on(url, handler) as supervisor:
            running = await supervisor.submit(Task("work", "running", durable=True))
            await handler.at_work.wait()
            stored = [await supervisor.submit(Task("work", f"{number}")) for number in range(50)]
            assert {ticket.verdict for ticket in stored} == {Verdict.SPILLED}
            await in_thread(durable.servers[0].kill)
            await check_rejected(supervisor, "rejected")
            handler.may_end.set()
            assert (await running).result == "result of running"
            await in_thread(durable.servers[0].start)
            async with asyncio.timeout(60.0):
                results = [await ticket for ticket in stored]
        assert {result.status for result in results} == {TaskStatus.SUCCEEDED}
        assert sorted(handler.started) == sorted(["running", *(f"{number}" for number in range(50))])
        assert await state_of(url, running.task_id) is RecordState.DONE


async def test_after_the_server_was_away_for_a_lease_no_process_takes_what_another_runs(
    server: StandaloneRedis, proxy: CuttingProxy, urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call fails meanwhile; the process with nothing to do is the first that finds the server again."""
    searched = asyncio.Event()
    original = StoreMaintenance.reap

    async def reap(self: StoreMaintenance) -> None:
        await original(self)
        searched.set()

    monkeypatch.setattr(StoreMaintenance, "reap", reap)
    busy, idle = HeldHandler(), HeldHandler()
    with CuttingProxy(server.servers[0].port) as other:
        other_url = urls[0].replace(f":{proxy.port}/", f":{other.port}/")
        async with (
            supervisor_on(urls[0], busy, lease=1.8) as supervisor,
            supervisor_on(other_url, idle, lease=1.8),
            asyncio.timeout(BOUND),
        ):
            ticket = await supervisor.submit(Task("work", "once", task_id="once", durable=True))
            await busy.at_work.wait()
            proxy.refuse()
            other.refuse()
            await asyncio.sleep(2.0)  # the lease has lapsed
            searched.clear()
            other.accept()
            await searched.wait()
            proxy.accept()
            for _ in range(6):  # two leases long
                searched.clear()
                await searched.wait()
            assert await state_of(urls[1], "once") is RecordState.LEASED
            busy.may_end.set()
            assert (await ticket).attempts == 1
    assert (busy.started, idle.started) == (["once"], [])


# --- slow, and full --------------------------------------------------------------------------------------------------


async def test_the_load_of_a_slow_server_climbs(proxy: CuttingProxy, urls: tuple[str, str]) -> None:
    handler = HeldHandler()
    async with supervisor_on(urls[0], handler, lease=3.0) as supervisor:
        await supervisor.submit(Task("work", "running"))
        assert (await supervisor.submit(Task("work"))).verdict is Verdict.SPILLED
        assert overflow_load(supervisor) < 0.5
        proxy.delay(0.7)
        assert (await supervisor.submit(Task("work"))).verdict is Verdict.SPILLED
        assert overflow_load(supervisor) > 0.5
        proxy.delay(1.2)
        await supervisor.submit(Task("work"))
        assert overflow_load(supervisor) > 1.0
        await check_rejected(supervisor, "rejected")
        proxy.delay(0.0)
        handler.may_end.set()


def overflow_load(supervisor: BackpressureSupervisor) -> float:
    [load] = [reading.load for reading in supervisor.readings() if reading.resource == "overflow"]
    return load


async def test_a_full_memory_rejects_and_what_is_stored_ends() -> None:
    with redis_server() as small:
        [server] = small.servers
        handler = HeldHandler()
        async with supervisor_on(small.url, handler, lease=2.0) as supervisor:
            running = await supervisor.submit(Task("work", "running", durable=True))
            server.ask("CONFIG", "SET", "maxmemory", server.info("memory")["used_memory"] + 500_000)
            stored = []
            while ticket := await supervisor.submit(Task("work", "x" * 10_000)):
                stored.append(ticket)
                assert len(stored) < 1_000
            assert (ticket.verdict, ticket.limited_by) == (Verdict.REJECTED, "overflow")
            full = server.info("memory")["used_memory"] - 100_000  # a put may just fit that is smaller by its buffers
            server.ask("CONFIG", "SET", "maxmemory", full)
            with pytest.raises(StoreUnavailable, match="its memory is full"):
                await supervisor.submit(Task("work", "x" * 10_000, durable=True))
            handler.may_end.set()
            assert (await running).result == "result of running"
            async with asyncio.timeout(60.0):
                results = [await ticket for ticket in stored]
            assert {result.status for result in results} == {TaskStatus.SUCCEEDED}
            assert len(handler.started) == 1 + len(stored)
            server.ask("CONFIG", "SET", "maxmemory", 0)  # the results are as large
            assert await supervisor.run(Task("work", "next", durable=True)) == "result of next"


def save(server: RedisServer, status: str) -> None:
    """Let the server save its data, and return when that has ended with `status`."""
    server.ask("BGSAVE")
    until(lambda: server.info("persistence")["rdb_last_bgsave_status"] == status, f"saving ends with {status}")


async def test_a_full_disk_rejects_until_there_is_room() -> None:
    with redis_server(enable_protected_configs="yes") as small:
        [server] = small.servers
        handler = HeldHandler()
        async with supervisor_on(small.url, handler, lease=2.0) as supervisor:
            running = await supervisor.submit(Task("work", "running", task_id="running", durable=True))
            await handler.at_work.wait()
            server.ask("CONFIG", "SET", "save", "3600 1")
            nowhere = server.directory / "gone"
            nowhere.mkdir()
            server.ask("CONFIG", "SET", "dir", f"{nowhere}")
            nowhere.rmdir()
            await in_thread(partial(save, server, "err"))
            await check_rejected(supervisor, "rejected")
            with pytest.raises(StoreUnavailable, match="it cannot write to its disk"):
                await supervisor.submit(Task("work", durable=True))
            handler.may_end.set()
            assert (await running).result == "result of running"
            server.ask("CONFIG", "SET", "dir", f"{server.directory}")
            await in_thread(partial(save, server, "ok"))
            assert await supervisor.run(Task("work", "next")) == "result of next"
            async with supervisor_on(small.url, handler, lease=2.0) as other, asyncio.timeout(BOUND):
                found = await other.find("running")
                assert found is not None
                assert (await found).result == "result of running"
        assert handler.started == ["running", "next"]


# --- now away and now back, all the time -----------------------------------------------------------------------------


async def trouble(proxy: CuttingProxy, seed: int) -> None:
    """Let the server be away, in one way or another, and be back for a moment."""
    rng = clock.new_random(seed)
    while True:
        match rng.choice(("is away", "hangs", "cuts", "cuts and is away")):
            case "is away":
                proxy.refuse()
            case "hangs":
                proxy.hold()
            case "cuts":
                proxy.cut()
            case _:
                lost: Side = rng.choice(("request", "answer"))
                proxy.cut_at(rng.randint(1, 8), lost, then_refuse=True)
        await asyncio.sleep(rng.uniform(0.1, 1.5))  # longer than the store has patience, and than a lease lasts
        proxy.forget()
        proxy.go_on()
        proxy.accept()
        await asyncio.sleep(rng.uniform(0.1, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("impatient")
async def test_supervisors_whose_server_comes_and_goes_complete_each_accepted_task_once(
    seed: int, proxy: CuttingProxy, urls: tuple[str, str]
) -> None:
    writes, accepted = AcknowledgedWrites(), set[str]()

    async def work(_: Task) -> None:
        await asyncio.sleep(0.05)

    async def submit(caller: int, supervisor: BackpressureSupervisor) -> None:
        for number in range(40):
            task = Task("work", task_id=f"{caller}-{number}", durable=number % 2 == 0)
            with suppress(StoreUnavailable):
                ticket = await supervisor.submit(task)
                if ticket and (task.durable or ticket.verdict is Verdict.SPILLED):
                    accepted.add(task.task_id)
            await asyncio.sleep(0.02)

    async with AsyncExitStack() as stack:
        supervisors = []
        for number in range(3):
            recorded = UnreliableStore(open_task_store(urls[0]), StoreFaults(), writes, clock.new_random(number))
            supervisor = BackpressureSupervisor(overflow=recorded, lease=1.0, max_queue_size=0, max_attempts=100)
            supervisor.register_worker(f"worker {number}", handler=work, task_types=["work"], max_concurrent=3)
            supervisors.append(await stack.enter_async_context(supervisor))
        async with running(trouble(proxy, seed)):
            await asyncio.gather(*(submit(caller, supervisors[caller % 3]) for caller in range(9)))
        proxy.forget()
        proxy.go_on()
        proxy.accept()
        async with asyncio.timeout(60.0):
            for task_id in accepted:
                found = await supervisors[0].find(task_id)
                assert found is not None, task_id
                assert (await found).status is TaskStatus.SUCCEEDED
    assert len(accepted) > 50
    assert max(writes.ended.values()) == 1, writes.ended.most_common(3)
