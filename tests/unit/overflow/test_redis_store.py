"""The task store on Redis: what it does when answers are lost, replicas are behind, and memory is full."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pytest
from tests.support.cutting_proxy import CuttingProxy, Side
from tests.support.leases import after_failure
from tests.support.redis_servers import StandaloneRedis, redis_replicated, redis_server, shared, until

from forebay import BackpressureSupervisor, Task, clock
from forebay.errors import StoreAnswerLost, StoreUnavailable
from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskRecord, TaskStore, WakeResult
from forebay.overflow import MemoryTaskStore, open_task_store, redis
from forebay.overflow.redis import RedisTaskStore
from forebay.simulation import simulate
from forebay.storage import operation_queue, redis_clock, redis_listener, redis_master
from forebay.storage.redis_url import RedisTopology, RedisUrl
from forebay.task import Priority

DONE = Completion(status="succeeded", result=b"result", finished_at=50.0)
DEAD = Completion(status="failed", error="it cannot be read", finished_at=50.0)
HOSTILE = ["a\0b", "a\nb\r\n", "{other}", "}{", "a|b|}", "%7C", "'\"\\", "é☃\U0001f600", "x" * 5_000, " "]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of an overflow that only this test has."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]


@pytest.fixture
def server() -> StandaloneRedis:
    return shared(redis_server)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisTaskStore]:
    store = open_task_store(url)
    assert isinstance(store, RedisTaskStore)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(server: StandaloneRedis, name: str) -> AsyncIterator[RedisTaskStore]:
    async with opened(f"{server.url}?name={name}") as store:
        yield store


def record(task_id: str = "a", **fields: Any) -> TaskRecord:
    given = {"task_type": "t", "priority": Priority.NORMAL, "envelope": b"envelope", "enqueued_at": 1.0, **fields}
    return TaskRecord(task_id=task_id, **given)


async def renew(store: TaskStore, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
    return await asyncio.get_running_loop().run_in_executor(None, partial(store.renew, leases, until=until))


async def state(store: TaskStore, task_id: str = "a") -> RecordState | None:
    found = await store.find(task_id)
    return None if found is None else found[0]


# --- texts and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
async def test_any_text_may_be_an_id_a_key_a_type_a_tenant_and_a_thread(
    store: RedisTaskStore, name: str, server: StandaloneRedis, text: str
) -> None:
    fields = {"key": text, "task_type": text, "tenant": text, "thread_id": text, "last_error": text}
    one, other = record(text, **fields), record(text + "|", **{**fields, "key": None, "tenant": text + "|"})
    assert await store.put(one) is PutResult.STORED
    assert await store.put(other) is PutResult.PARKED
    assert await store.find(text) == (RecordState.WAITING, one, None)
    assert await store.find_key(text) == text
    assert await store.depths() == {(text, Priority.NORMAL, text): 1}
    assert await store.conversations() == {text: 2}
    assert await store.lease(text, 1, until=9.0, shares={text + "|": 1}) == []
    (lease,) = await store.lease(text, 1, until=9.0, shares={text: 1})
    assert lease.record == one
    assert await store.leased() == {text: 1}
    assert await renew(store, [lease], until=10.0) == []
    assert await store.delay(after_failure(lease, error=text), due=1.0)
    await store.wake(now=2.0)
    (lease,) = await store.lease(text, 1, until=9.0)
    assert lease.record.last_error == text
    assert await store.finish(text, DONE, fence=lease.fence)
    (lease,) = await store.lease(text, 1, until=9.0)
    assert lease.record == other
    assert await store.mark_dead(lease, DEAD)
    assert [each.record.task_id for each in await store.list_records(RecordState.DEAD, 9)] == [text + "|"]
    with server.servers[0].client() as client:
        keys = [key for key in client.scan_iter() if name in key]
    assert keys
    assert all(key.startswith(f"{{{name}}}:") and len(key) < 100 for key in keys)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
async def test_text_that_is_no_unicode_is_rejected_alone(store: RedisTaskStore, text: str) -> None:
    bad, good = await asyncio.gather(store.put(record(text)), store.put(record("a")), return_exceptions=True)
    assert isinstance(bad, UnicodeEncodeError)
    assert good is PutResult.STORED


@pytest.mark.parametrize("number", [0.1, 1.7e9 + 0.123456789, 2.0**53 + 2])
async def test_times_are_kept_to_the_last_digit(store: RedisTaskStore, number: float) -> None:
    kept = record(enqueued_at=number, deadline=number, total_delay=number, not_before=number)
    await store.put(kept, now=number)
    (lease,) = await store.lease("t", 1, until=number)
    assert lease.record == kept
    (listed,) = await store.list_records(RecordState.LEASED, 1)
    assert listed.until == number
    await store.delay(after_failure(lease, wait=0.2), due=number)
    assert (await store.wake(now=0.0)).next_due == number
    await store.wake(now=number)
    (lease,) = await store.lease("t", 1, until=number)
    assert lease.record.total_delay == number + 0.2


@pytest.mark.parametrize("count", [1999, 2000, 2001])  # the script looks at 2,000 at a time
async def test_leased_records_are_counted_whatever_their_number(store: RedisTaskStore, count: int) -> None:
    await asyncio.gather(*(store.put(record(f"{number}", task_type=f"{number % 2}")) for number in range(count)))
    for task_type in ("0", "1"):
        await store.lease(task_type, count, until=9.0)
    assert await store.leased() == {"0": -(-count // 2), "1": count // 2}


# --- lost answers ----------------------------------------------------------------------------------------------------


def behind_proxy() -> AbstractContextManager[StandaloneRedis]:
    return redis_server(proxied=True)


@pytest.fixture
def proxy() -> CuttingProxy:
    proxy = shared(behind_proxy).proxies[0]
    proxy.forget()
    return proxy


@pytest.fixture
async def remote(proxy: CuttingProxy, name: str) -> AsyncIterator[RedisTaskStore]:  # noqa: ARG001 - it is before the server
    """Return a store behind the proxy."""
    async with opened(f"{shared(behind_proxy).url}?name={name}") as store:
        yield store


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call fail with its first connection."""
    monkeypatch.setattr(redis_master, "_PATIENCE", 0.0)


async def put(store: TaskStore) -> None:
    await store.put(record(key="k"))


async def put_and_lease(store: TaskStore) -> Lease:
    await put(store)
    (lease,) = await store.lease("t", 1, until=9.0)
    return lease


async def put_and_delay(store: TaskStore) -> None:
    await store.delay(after_failure(await put_and_lease(store)), due=5.0)


async def put_and_kill(store: TaskStore) -> None:
    await store.mark_dead(await put_and_lease(store), DEAD)


async def put_and_finish(store: TaskStore) -> None:
    await store.finish("a", DONE, fence=(await put_and_lease(store)).fence)


@dataclass(frozen=True)
class LostCall:
    """A call whose command is lost, or its answer.

    Attributes:
        before: prepares the store, and returns what `call` takes.
        call: the call.
        value: what it returns; for several values, the state of the record too.
        state: of the record afterwards.
    """

    before: Callable[[TaskStore], Awaitable[Any]]
    call: Callable[[TaskStore, Any], Awaitable[Any]]
    value: Any
    state: RecordState | None
    attempts: int = 0
    failures: int = 0


async def nothing(_: TaskStore) -> None: ...


async def lease_one(store: TaskStore, _: None) -> bool:
    (lease,) = await store.lease("t", 1, until=9.0)
    return await store.finish("b", DONE, fence=lease.fence) or lease.record == record(key="k")


async def reap_dead(store: TaskStore, _: Lease) -> list[str]:
    return [dead.record.task_id for dead in await store.reap(now=20.0, max_attempts=0)]


CALLS = {
    "put": LostCall(nothing, lambda store, _: store.put(record(key="k")), PutResult.STORED, RecordState.WAITING),
    "lease": LostCall(put, lease_one, True, RecordState.LEASED),
    "begin_attempt": LostCall(
        put_and_lease, lambda store, lease: store.begin_attempt(lease), True, RecordState.LEASED, attempts=1
    ),
    "release": LostCall(put_and_lease, lambda store, lease: store.release([lease]), None, RecordState.WAITING),
    "record_failures": LostCall(
        put_and_lease,
        lambda store, lease: store.record_failures(after_failure(lease)),
        True,
        RecordState.LEASED,
        failures=1,
    ),
    "delay": LostCall(
        put_and_lease,
        lambda store, lease: store.delay(after_failure(lease), due=5.0),
        True,
        RecordState.DELAYED,
        failures=1,
    ),
    "wake": LostCall(
        put_and_delay,
        lambda store, _: store.wake(now=6.0),
        WakeResult(woken=1, delayed=0, next_due=None),
        RecordState.WAITING,
        failures=1,
    ),
    "finish": LostCall(
        put_and_lease, lambda store, lease: store.finish("a", DONE, fence=lease.fence), True, RecordState.DONE
    ),
    "cancel": LostCall(put, lambda store, _: store.finish("a", DONE, fence=None), True, RecordState.DONE),
    "mark_dead": LostCall(put_and_lease, lambda store, lease: store.mark_dead(lease, DEAD), True, RecordState.DEAD),
    "requeue": LostCall(put_and_kill, lambda store, _: store.requeue("a"), PutResult.STORED, RecordState.WAITING),
    "delete_dead": LostCall(put_and_kill, lambda store, _: store.delete_dead("a"), True, None),
    "prune": LostCall(put_and_finish, lambda store, _: store.prune(before=60.0), 1, None),
}


@pytest.mark.parametrize("lost", ["request", "answer"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_call_whose_connection_breaks_is_done_once(
    remote: RedisTaskStore, proxy: CuttingProxy, call: LostCall, lost: Side
) -> None:
    given = await call.before(remote)
    proxy.cut_at(1, lost)
    assert await call.call(remote, given) == call.value
    assert proxy.has_cut
    found = await remote.find("a")
    if call.state is None:
        assert found is None
    else:
        assert found is not None
        assert (found[0], found[1].attempts, found[1].failures) == (call.state, call.attempts, call.failures)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_record_dies_once_whichever_part_of_reaping_is_lost(
    remote: RedisTaskStore, proxy: CuttingProxy, number: int, lost: Side
) -> None:
    await put_and_lease(remote)
    proxy.cut_at(number, lost)
    (dead,) = await remote.reap(now=20.0, max_attempts=0)
    assert proxy.has_cut
    assert dead.record == record(key="k")
    assert await state(remote) is RecordState.DEAD


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_leases_are_renewed_although_the_connection_breaks(
    remote: RedisTaskStore, proxy: CuttingProxy, lost: Side
) -> None:
    lease = await put_and_lease(remote)
    await renew(remote, [lease], until=10.0)  # so that the connection is there
    proxy.cut_at(1, lost)
    assert await renew(remote, [lease], until=30.0) == []
    assert proxy.has_cut
    assert list(await remote.reap(now=20.0, max_attempts=0)) == []


@pytest.mark.usefixtures("no_patience")
async def test_a_record_whose_storing_was_reported_as_failed_is_taken_back(
    remote: RedisTaskStore, proxy: CuttingProxy
) -> None:
    proxy.cut_at(1, "answer")
    with pytest.raises(StoreUnavailable):
        await remote.put(record(key="k", thread_id="t"))
    assert await remote.find("a") is None
    assert await remote.find_key("k") is None
    assert await remote.depths() == {}
    assert await remote.conversations() == {}
    assert await remote.put(record(key="k", thread_id="t")) is PutResult.STORED


@pytest.mark.usefixtures("no_patience")
async def test_what_is_taken_back_was_put_by_that_call(remote: RedisTaskStore, proxy: CuttingProxy, name: str) -> None:
    proxy.cut_at(1, "request")
    with pytest.raises(StoreUnavailable):
        await remote.put(record())
    async with opened(f"redis://{shared(behind_proxy).servers[0]}?name={name}") as other:
        assert await other.put(record()) is PutResult.STORED
    assert await state(remote) is RecordState.WAITING


@pytest.mark.usefixtures("no_patience")
async def test_a_record_that_another_process_runs_is_not_taken_back(
    remote: RedisTaskStore, proxy: CuttingProxy, name: str
) -> None:
    proxy.cut_at(1, "answer")
    with pytest.raises(StoreUnavailable):
        await remote.put(record())
    async with opened(f"redis://{shared(behind_proxy).servers[0]}?name={name}") as other:
        (lease,) = await other.lease("t", 1, until=9.0)
        assert await state(remote) is RecordState.LEASED
        assert await other.finish("a", DONE, fence=lease.fence)


@pytest.mark.usefixtures("no_patience")
async def test_a_record_put_leased_is_taken_back_from_its_own_holder(
    remote: RedisTaskStore, proxy: CuttingProxy
) -> None:
    proxy.cut_at(1, "answer")
    with pytest.raises(StoreUnavailable):
        await remote.put(record(), fence="mine", until=9.0)
    assert await state(remote) is None


ENDS: dict[str, Callable[[TaskStore, Lease], Awaitable[bool]]] = {
    "finish": lambda store, lease: store.finish("a", DONE, fence=lease.fence),
    "delay": lambda store, lease: store.delay(after_failure(lease), due=5.0),
    "mark_dead": lambda store, lease: store.mark_dead(lease, DEAD),
}


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("lost", ["request", "answer"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_the_end_of_a_lease_that_was_reported_as_failed_succeeds_when_it_is_tried_again(
    remote: RedisTaskStore,
    proxy: CuttingProxy,
    end: Callable[[TaskStore, Lease], Awaitable[bool]],
    lost: Side,
) -> None:
    lease = await put_and_lease(remote)
    proxy.cut_at(1, lost)
    with pytest.raises(StoreUnavailable):
        await end(remote, lease)
    assert await end(remote, lease)
    assert not await end(remote, lease)  # once


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_the_end_of_a_lease_that_was_lost_meanwhile_fails_when_it_is_tried_again(
    remote: RedisTaskStore, proxy: CuttingProxy, end: Callable[[TaskStore, Lease], Awaitable[bool]]
) -> None:
    lease = await put_and_lease(remote)
    proxy.cut_at(1, "request")
    with pytest.raises(StoreUnavailable):
        await end(remote, lease)
    await remote.reap(now=20.0, max_attempts=3)
    (held,) = await remote.lease("t", 1, until=9.0)
    assert await remote.finish("a", DONE, fence=held.fence)
    assert not await end(remote, lease)


@pytest.mark.blocks
async def test_a_group_that_arrives_after_the_client_has_gone_on_is_not_done(remote: RedisTaskStore, name: str) -> None:
    master = redis_master.RedisMaster(remote._url, name, prepare=[("SCRIPT", "LOAD", redis._SCRIPT)])
    late = remote._script_call([redis._encode(("prune", "1e9", 9))], (), next(remote._numbers))
    await put_and_finish(remote)
    with closing(master), pytest.raises(StoreUnavailable, match="STALE"):
        master.call(late)
    assert await state(remote) is RecordState.DONE


async def test_a_server_that_has_forgotten_the_script_gets_it_again(
    store: RedisTaskStore, server: StandaloneRedis
) -> None:
    server.servers[0].ask("SCRIPT", "FLUSH")
    assert await store.put(record()) is PutResult.STORED


async def test_a_store_that_is_away_answers_within_its_patience_and_then_at_once(
    remote: RedisTaskStore, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_master, "_PATIENCE", 0.3)
    proxy.refuse()
    for least, most in ((0.3, 2.0), (0.0, 0.2)):
        started = asyncio.get_running_loop().time()
        with pytest.raises(StoreUnavailable):
            await remote.put(record())
        assert least <= asyncio.get_running_loop().time() - started < most
    proxy.accept()
    assert await remote.put(record()) is PutResult.STORED


async def test_a_listener_whose_connection_breaks_listens_again_and_looks_for_what_it_has_missed(
    remote: RedisTaskStore, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_listener, "_RETRY_INTERVAL", 0.01)
    notified = asyncio.Event()
    remote.subscribe(on_waiting=notified.set, on_ended=notified.set)
    for _ in range(3):
        async with asyncio.timeout(10):
            await notified.wait()
        notified.clear()
        proxy.cut()


# --- an interruption, after which leases may have lapsed that nobody could renew --------------------------------------


def count_interruptions(store: RedisTaskStore) -> list[str]:
    """Return a list that gets an element whenever the store says that it was interrupted."""
    interruptions = list[str]()
    store.subscribe(
        on_waiting=lambda: None, on_ended=lambda: None, on_interrupted=lambda: interruptions.append("interrupted")
    )
    return interruptions


async def test_an_idle_connection_that_was_closed_is_no_interruption(
    remote: RedisTaskStore, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with a `timeout` closes them all the time, and then lapsed leases would never be taken."""
    monkeypatch.setattr(redis_master, "_INTERRUPTION", 5.0)  # on a slow machine
    lease = await put_and_lease(remote)
    interruptions = count_interruptions(remote)
    proxy.cut()
    assert await renew(remote, [lease], until=9.0) == []
    assert await state(remote) is RecordState.LEASED
    assert interruptions == []


async def test_a_master_that_one_call_waited_for_was_away(
    remote: RedisTaskStore, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call fails: all of them are repeated until it is back."""
    monkeypatch.setattr(redis_master, "_INTERRUPTION", 0.05)  # sooner than a call is repeated
    lease = await put_and_lease(remote)
    interruptions = count_interruptions(remote)
    proxy.refuse()
    finding = asyncio.create_task(remote.find("a"))
    renewing = asyncio.create_task(renew(remote, [lease], until=30.0))
    await asyncio.sleep(0.1)
    proxy.accept()
    assert await renewing == []
    assert await finding is not None
    assert interruptions == ["interrupted"] * 2  # of both connections; before the callers had their answers


@pytest.mark.usefixtures("no_patience")
async def test_a_master_that_answers_after_a_call_has_failed_was_away(
    remote: RedisTaskStore, proxy: CuttingProxy
) -> None:
    interruptions = count_interruptions(remote)
    proxy.refuse()
    with pytest.raises(StoreUnavailable):
        await remote.find("a")
    assert interruptions == []
    proxy.accept()
    await remote.find("a")
    await remote.find("a")
    assert interruptions == ["interrupted"]


async def test_another_server_than_before_is_an_interruption_for_a_client_that_called_none_meanwhile(
    name: str,
) -> None:
    with redis_server(appendonly="yes", appendfsync="always") as own:
        async with opened(f"{own.url}?name={name}") as store:
            await put_and_lease(store)
            interruptions = count_interruptions(store)
            own.servers[0].kill()
            own.servers[0].start()
            assert await state(store) is RecordState.LEASED
            assert interruptions == ["interrupted"]


# --- what is acknowledged --------------------------------------------------------------------------------------------


def with_replica() -> AbstractContextManager[StandaloneRedis]:
    return redis_replicated(proxied=True)


@pytest.fixture
def replicated(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandaloneRedis]:
    """Return a master with a replica, which the test may let lag, and let a store wait for it for 50 ms."""
    monkeypatch.setattr(redis, "_ACKNOWLEDGE_TIMEOUT_MS", 50)
    setup = shared(with_replica)
    yield setup
    catch_up(setup)


def catch_up(setup: StandaloneRedis) -> None:
    """Let the replica have all that its master has."""
    setup.proxies[0].lag(0.0)
    master, replica = setup.servers[0], setup.replicas()[0]
    offsets = [lambda: master.info("replication")["master_repl_offset"]]
    offsets.append(lambda: replica.info("replication")["slave_repl_offset"])
    until(lambda: offsets[0]() == offsets[1](), "the replica has caught up")


async def test_a_write_is_acknowledged_once_the_replicas_have_it(replicated: StandaloneRedis, name: str) -> None:
    async with opened(f"{replicated.url}?name={name}&replicas=1") as store:
        assert await store.put(record()) is PutResult.STORED
        (replica,) = replicated.replicas()
        with replica.client() as client:
            assert client.hexists(f"{{{name}}}:ids", "a")


async def test_a_record_that_too_few_replicas_have_is_rejected_and_taken_back(
    replicated: StandaloneRedis, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicated.proxies[0].lag(0.5)
    url = f"{replicated.url}?name={name}"
    async with opened(url) as other, opened(f"{url}&replicas=1") as store:
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            await store.put(record(key="k"))
        assert await other.find("a") is None
        assert await other.find_key("k") is None
        await other.put(record())
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            await store.find("a")  # it may be lost yet
        (lease,) = await store.lease("t", 1, until=9.0)
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            await store.begin_attempt(lease)
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            await store.finish("a", DONE, fence=lease.fence)
        catch_up(replicated)
        monkeypatch.setattr(redis, "_ACKNOWLEDGE_TIMEOUT_MS", 1_000)
        assert await store.finish("a", DONE, fence=lease.fence)
        assert await state(store) is RecordState.DONE


class Unacknowledged:
    """Records that wait for the replica until they are rejected, while another process leases all that it can.

    Attributes:
        leased: the ids of the records that it got.
        states: those in which it has seen the records.
    """

    def __init__(self) -> None:
        self.leased: list[str] = []
        self.states: set[RecordState] = set()

    async def watch(self, other: TaskStore, putting: asyncio.Task[PutResult], task_id: str) -> None:
        """Lease and look until the record is rejected."""
        while not putting.done():
            self.leased += [lease.record.task_id for lease in await other.lease("t", 9, until=9.0)]
            seen = await state(other, task_id)
            self.states |= set() if seen is None else {seen}
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            await putting


async def until_stored(other: TaskStore, putting: asyncio.Task[PutResult]) -> None:
    """Return when another process sees the record that is being put; if it is rejected before, raise its error."""
    while await state(other) is None:
        if putting.done():
            await putting


@pytest.mark.parametrize("not_before", [None, 1.0, 1e9])
@pytest.mark.parametrize("thread", [None, "thread"])
async def test_a_record_cannot_be_leased_before_it_is_acknowledged(
    replicated: StandaloneRedis,
    name: str,
    thread: str | None,
    not_before: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis, "_ACKNOWLEDGE_TIMEOUT_MS", 300)
    replicated.proxies[0].lag(1.0)
    url, watched = f"{replicated.url}?name={name}", Unacknowledged()
    async with opened(url) as other, opened(f"{url}&replicas=1") as store:
        given = record(thread_id=thread, not_before=not_before)
        await watched.watch(other, asyncio.create_task(store.put(given, now=5.0)), "a")
        assert await other.find("a") is None
    assert watched.leased == []
    assert watched.states == {RecordState.DELAYED}


async def test_a_recorded_task_that_is_parked_does_not_wait_before_it_is_acknowledged(
    replicated: StandaloneRedis, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, watched = f"{replicated.url}?name={name}", Unacknowledged()
    async with opened(url) as other, opened(f"{url}&replicas=1") as store:
        await other.put(record("first", thread_id="thread"), fence="theirs", until=9.0)
        monkeypatch.setattr(redis, "_ACKNOWLEDGE_TIMEOUT_MS", 300)
        replicated.proxies[0].lag(1.0)
        putting = asyncio.create_task(store.put(record(thread_id="thread"), fence="mine", until=9.0))
        await until_stored(other, putting)
        await other.finish("first", DONE, fence="theirs")
        await watched.watch(other, putting, "a")
        assert await other.find("a") is None
        assert await other.conversations() == {}
    assert watched.leased == []


async def test_a_recorded_task_is_not_released_before_it_is_acknowledged(
    replicated: StandaloneRedis, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "_ACKNOWLEDGE_TIMEOUT_MS", 300)
    replicated.proxies[0].lag(1.0)
    url, watched = f"{replicated.url}?name={name}", Unacknowledged()
    async with opened(url) as other, opened(f"{url}&replicas=1") as store:
        putting = asyncio.create_task(store.put(record(), fence="mine", until=9.0))
        await until_stored(other, putting)
        await other.reap(now=20.0, max_attempts=3)  # its lease is over before the answer
        await other.wake(now=20.0)
        await watched.watch(other, putting, "a")
        assert await other.find("a") is None
    assert watched.leased == []


async def test_an_acknowledged_record_is_there_as_if_it_had_not_been_hidden(
    replicated: StandaloneRedis, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "_ACKNOWLEDGE_TIMEOUT_MS", 1_000)
    async with opened(f"{replicated.url}?name={name}&replicas=1") as store:
        results = await asyncio.gather(
            store.put(record("a", thread_id="thread", enqueued_at=1.0)),
            store.put(record("b", thread_id="thread", enqueued_at=2.0)),
            store.put(record("c", not_before=50.0), now=10.0),
            store.put(record("d", thread_id="thread", enqueued_at=3.0), fence="mine", until=9.0),
            store.put(record("e"), fence="mine", until=9.0),
            store.put(record("a")),
        )
        stored, parked = PutResult.STORED, PutResult.PARKED
        assert list(results) == [stored, parked, stored, parked, stored, PutResult.DUPLICATE]
        assert [await state(store, each) for each in "abcde"] == [
            RecordState.WAITING,
            RecordState.PARKED,
            RecordState.DELAYED,
            RecordState.PARKED,
            RecordState.LEASED,
        ]
        await store.reap(now=9.5, max_attempts=3)
        assert await state(store, "e") is RecordState.WAITING
        assert (await store.wake(now=49.0)).next_due == 50.0


async def test_a_record_whose_submitter_is_gone_before_it_shows_it_wakes(
    replicated: StandaloneRedis, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: RedisTaskStore, master: redis_master.RedisMaster) -> Sequence[Any]:  # noqa: ARG001
        raise StoreUnavailable(where="here", why="it is gone", advice="")

    monkeypatch.setattr(redis, "_ACKNOWLEDGE_TIMEOUT_MS", 1_000)
    url = f"{replicated.url}?name={name}"
    async with opened(url) as other, opened(f"{url}&replicas=1") as store:
        settle = RedisTaskStore._settle
        calls = iter([settle, fail])

        def once(self: RedisTaskStore, master: redis_master.RedisMaster) -> Sequence[Any]:
            return next(calls, settle)(self, master)

        monkeypatch.setattr(RedisTaskStore, "_settle", once)
        assert await store.put(record(), now=1_000.0) is PutResult.STORED
        assert (await other.wake(now=1_029.0)).woken == 0
        assert (await other.wake(now=1_030.0)).woken == 1
        assert await state(other) is RecordState.WAITING
        (lease,) = await other.lease("t", 1, until=9.0)
        await store.begin_attempt(lease)  # it shows what it has not shown: that has woken
        assert await state(other) is RecordState.LEASED


async def test_a_write_is_acknowledged_once_it_is_on_disk(name: str) -> None:
    with redis_server(appendonly="yes", appendfsync="always") as server:
        async with opened(f"{server.url}?name={name}&fsync=yes") as store:
            assert await store.put(record()) is PutResult.STORED
        async with opened(f"{server.url}?name={name}&fsync=yes&replicas=1") as store:
            with pytest.raises(StoreUnavailable, match="only 0 of 1 disks of replicas"):
                await store.put(record("b"))


# --- clocks that differ ----------------------------------------------------------------------------------------------


@pytest.fixture
async def ahead(server: StandaloneRedis, name: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RedisTaskStore]:
    """Return a store of the same overflow whose process has a clock that is 100 seconds ahead of the server's."""
    async with opened(f"{server.url}?name={name}") as store:
        monkeypatch.setattr(store._clock, "ahead", lambda: 100.0)
        yield store


async def test_a_process_whose_clock_is_ahead_does_not_take_the_leases_of_others(
    store: RedisTaskStore, ahead: RedisTaskStore
) -> None:
    lease = await put_and_lease(store)  # until 9
    assert [each.until for each in await ahead.list_records(RecordState.LEASED, 1)] == [109.0]
    assert list(await ahead.reap(now=109.0, max_attempts=3, latest=109.0)) == []
    assert await renew(ahead, [lease], until=120.0) == []
    await store.reap(now=20.0, max_attempts=3, latest=20.0)
    assert await store.begin_attempt(lease)
    await ahead.reap(now=120.5, max_attempts=3)
    assert await state(store) is RecordState.WAITING


async def test_a_record_that_is_put_leased_lasts_by_the_clock_of_the_server(
    store: RedisTaskStore, ahead: RedisTaskStore
) -> None:
    await ahead.put(record(), fence="mine", until=109.0)
    await store.reap(now=9.0, max_attempts=3, latest=9.0)
    assert await state(store) is RecordState.LEASED
    (dead,) = await ahead.reap(now=109.5, max_attempts=0)
    assert dead.completion.finished_at == 109.5
    (listed,) = await store.list_records(RecordState.DEAD, 1)
    assert listed.position == (9.5, "a")


async def test_a_delay_ends_by_the_clock_of_the_server(store: RedisTaskStore, ahead: RedisTaskStore) -> None:
    await store.delay(after_failure(await put_and_lease(store)), due=50.0)
    assert await ahead.wake(now=149.0) == WakeResult(woken=0, delayed=1, next_due=150.0)
    assert (await ahead.wake(now=150.0)).woken == 1
    await ahead.put(record("b", not_before=300.0), now=250.0)
    assert (await store.wake(now=150.0)).next_due == 200.0
    assert (await store.wake(now=200.0)).woken == 1
    (_, found, _) = await store.find("b") or pytest.fail("it is lost")
    assert found.not_before == 300.0


async def test_results_are_kept_by_the_clock_of_the_server(store: RedisTaskStore, ahead: RedisTaskStore) -> None:
    for task_id in "abc":
        await store.put(record(task_id))
        assert await store.finish(task_id, DONE, fence=None)
    (_, _, completion) = await ahead.find("a") or pytest.fail("it is lost")
    assert completion is not None
    assert completion.finished_at == 150.0
    pages, after = list[tuple[float, str]](), None
    while page := await ahead.list_records(RecordState.DONE, 2, after=after):
        pages += [each.position for each in page]
        after = page[-1].position
    assert pages == [(150.0, "a"), (150.0, "b"), (150.0, "c")]
    assert await ahead.prune(before=150.0) == 0
    assert await ahead.prune(before=150.5) == 3


async def test_the_clock_is_compared_when_a_store_is_opened(
    server: StandaloneRedis, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for skew in (-3_600.0, 0.0, 0.4, 50.0):
        monkeypatch.setattr(redis_clock, "wall_time", lambda skew=skew: clock.wall_time() + skew)
        async with opened(f"{server.url}?name={name}") as store:
            assert store._clock.ahead() == round(skew)


# --- what is checked before ------------------------------------------------------------------------------------------


async def test_a_server_without_a_file_is_not_opened_with_fsync(server: StandaloneRedis) -> None:
    with pytest.raises(StoreUnavailable, match=r"no append-only file.*Set appendonly yes"):
        await open_task_store(f"{server.url}?fsync=yes").open()


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl"])
async def test_a_server_that_drops_keys_is_not_opened(policy: str) -> None:
    with redis_server(maxmemory="100mb", maxmemory_policy=policy) as server:
        with pytest.raises(StoreUnavailable, match=f"{policy}.*noeviction"):
            await open_task_store(server.url).open()
        server.servers[0].ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        async with opened(server.url) as store:
            assert await store.put(record()) is PutResult.STORED


async def test_a_full_server_rejects_records_and_lets_those_it_has_end() -> None:
    with redis_server(maxmemory="4mb") as server:
        async with opened(server.url) as store:
            await store.put(record("first", enqueued_at=0.0))
            stored = [put for put in range(100) if await stores(store, record(f"{put}", envelope=b"x" * 100_000))]
            assert 1 < len(stored) < 60
            (lease,) = await store.lease("t", 1, until=9.0)
            assert lease.record.task_id == "first"
            assert await store.begin_attempt(lease)
        async with opened(server.url) as store:  # by a process that starts now
            assert await store.finish("first", DONE, fence=lease.fence)
            leases = await store.lease("t", len(stored) // 2, until=9.0)
            *finished, rejected = await asyncio.gather(
                *(store.finish(lease.record.task_id, DONE, fence=lease.fence) for lease in leases),
                store.put(record("late", envelope=b"x" * 100_000)),
                return_exceptions=True,
            )
            assert isinstance(rejected, StoreUnavailable)
            assert "memory is full" in str(rejected)
            assert finished == [True] * len(leases)
            assert await store.put(record("late", envelope=b"x" * 100_000)) is PutResult.STORED


async def stores(store: TaskStore, record: TaskRecord) -> bool:
    try:
        return await store.put(record) is PutResult.STORED
    except StoreUnavailable:
        return False


async def test_each_opening_is_a_client_of_its_own(server: StandaloneRedis, name: str) -> None:
    store = open_task_store(f"{server.url}?name={name}")  # which a forked process may have a copy of
    assert isinstance(store, RedisTaskStore)
    clients = set()
    for task_id in "ab":
        await store.open()
        clients.add(store._client_id)
        assert await store.put(record(task_id)) is PutResult.STORED
        await store.close()
    assert len(clients) == 2


async def test_a_record_that_another_program_has_changed_fails_alone(
    store: RedisTaskStore, server: StandaloneRedis, name: str
) -> None:
    await store.put(record("a"))
    await store.put(record("b"))
    server.servers[0].ask("HSET", f"{{{name}}}:tasks", "000000000000001", "[]")
    bad, good = await asyncio.gather(store.find("a"), store.find("b"), return_exceptions=True)
    assert isinstance(bad, msgspec.ValidationError)
    assert good == (RecordState.WAITING, record("b"), None)


@pytest.mark.parametrize(("version", "fsync", "why"), [("6.2.14", False, "7.0"), ("7.0.15", True, "7.2.*fsync=yes")])
def test_a_server_that_is_too_old_is_not_opened(version: str, *, fsync: bool, why: str) -> None:
    url = RedisUrl(topology=RedisTopology.SINGLE, hosts=(("host", 1),), fsync=fsync)
    with pytest.raises(StoreUnavailable, match=why):
        redis_master._check({"redis_version": version}, url)
    redis_master._check({"redis_version": "7.2.0"}, url)


@pytest.mark.parametrize("found", ["0", "", "garbage", b"\xff", "-1", "x" * 1_000])
async def test_an_overflow_with_the_format_of_another_program_is_not_opened(
    server: StandaloneRedis, name: str, found: str | bytes
) -> None:
    server.servers[0].ask("SET", f"{{{name}}}:format", found)
    with pytest.raises(StoreUnavailable, match=r"another program wrote .*format.*\?name=") as caught:
        await open_task_store(f"{server.url}?name={name}").open()
    assert len(str(caught.value)) < 300


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://{host}/99", "it has no database 99"),
        ("redis+sentinel://{host}/mymaster/0", "is no Sentinel.* redis://"),
        ("redis+cluster://{host}", "not in a cluster.* redis://"),
        ("redis://127.0.0.1:1/0", r"used: it cannot be reached \(connection refused\)\. Check"),
        ("redis://no-such-host.invalid/0", r"used: it cannot be reached \(.*name.*\)\. Check"),
    ],
)
async def test_a_url_that_names_another_kind_of_server_is_explained(
    server: StandaloneRedis, url: str, why: str
) -> None:
    with pytest.raises(StoreUnavailable, match=why):
        await open_task_store(url.format(host=server.servers[0])).open()


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    ("scheme", "why"), [("redis", "what answers there is no Redis server"), ("rediss", "port for TLS")]
)
async def test_a_server_of_another_protocol_is_explained(scheme: str, why: str) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"<html>")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(StoreUnavailable, match=why):
            await open_task_store(f"{scheme}://127.0.0.1:{port}").open()


@pytest.mark.usefixtures("no_patience")
async def test_an_error_says_whether_it_may_be_done(remote: RedisTaskStore, proxy: CuttingProxy) -> None:
    await remote.lease("t", 1, until=9.0)
    proxy.cut_at(1, "answer")
    with pytest.raises(StoreAnswerLost, match="or do it yet"):
        await remote.put(record())
    proxy.refuse()
    for _ in range(2):  # the first meets the connection that is gone
        with pytest.raises(StoreUnavailable) as caught:
            await remote.put(record("b"))
    proxy.accept()
    assert not isinstance(caught.value, StoreAnswerLost)


class FailingStore(MemoryTaskStore):
    """A store that stores nothing.

    Attributes:
        error: what `put` raises.
    """

    error: StoreUnavailable

    async def put(self, *_: Any, **__: Any) -> PutResult:
        raise self.error


@pytest.mark.parametrize(("error", "may_run"), [(StoreAnswerLost, True), (StoreUnavailable, False)])
async def test_the_reason_of_a_rejection_says_whether_the_task_may_run(
    error: type[StoreUnavailable], *, may_run: bool
) -> None:
    store = FailingStore()
    store.error = error(where="here", why="it is gone", advice="")
    never = asyncio.Event()

    async def wait(_: Task[Any]) -> None:
        await never.wait()

    async with BackpressureSupervisor(overflow=store, max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=wait, task_types=["work"], max_concurrent=1)
        await supervisor.submit(Task("work", spill=False))
        ticket = await supervisor.submit(Task("work"))
        never.set()
    assert ticket.limited_by == "overflow"
    assert ("it may run" in (ticket.reason or "")) == may_run


async def test_a_user_with_few_rights_may_use_it(server: StandaloneRedis, name: str) -> None:
    rights = ["+@read", "+@write", "+@scripting", "+@connection", "+@pubsub", "+info", "+wait", "+waitaof"]
    server.servers[0].ask("ACL", "SETUSER", name, "on", ">p", f"~{{{name}}}:*", f"&{{{name}}}:*", *rights)
    async with opened(f"redis://{name}:p@{server.servers[0]}?name={name}") as store:
        assert await store.put(record()) is PutResult.STORED
        assert not store._clock.is_due()
        assert store._clock._server is not None
    server.servers[0].ask("ACL", "SETUSER", name, "-info")
    async with opened(f"redis://{name}:p@{server.servers[0]}?name={name}") as store:
        assert await state(store) is RecordState.WAITING


async def test_an_overflow_of_a_newer_release_is_not_opened(server: StandaloneRedis, name: str) -> None:
    server.servers[0].ask("SET", f"{{{name}}}:format", "2")
    with pytest.raises(StoreUnavailable, match=r"format 2; this one knows 1.*\?name="):
        await open_task_store(f"{server.url}?name={name}").open()


async def test_the_key_of_another_program_is_reported(
    store: RedisTaskStore, server: StandaloneRedis, name: str
) -> None:
    server.servers[0].ask("SET", f"{{{name}}}:ids", "mine")
    with pytest.raises(StoreUnavailable, match=r"another program.*\?name="):
        await store.put(record())


@pytest.mark.usefixtures("no_patience")
async def test_a_rejected_password_is_reported_at_once_and_not_shown() -> None:
    with redis_server(requirepass="right") as server:
        async with opened(server.url) as store:
            assert await store.put(record()) is PutResult.STORED
        for login in ("", ":secret@", "user:secret@"):
            url = f"redis://{login}{server.servers[0]}"
            with pytest.raises(StoreUnavailable, match="rejected the user or the password") as caught:
                await open_task_store(url).open()
            assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("no_patience")
async def test_a_replica_is_not_opened(replicated: StandaloneRedis) -> None:
    (replica,) = replicated.replicas()
    with pytest.raises(StoreUnavailable, match=r"it is a replica.*redis\+sentinel"):
        await open_task_store(f"redis://{replica}").open()
    async with opened(f"redis://{replica},{replicated.servers[0]}") as store:  # of several hosts, the master
        assert await store.lease("t", 1, until=9.0) == []


@pytest.mark.usefixtures("no_patience")
async def test_a_server_that_is_not_there_is_reported_with_its_address() -> None:
    with pytest.raises(StoreUnavailable, match=r"redis://127\.0\.0\.1:1/0.*connection refused.*server runs"):
        await open_task_store("redis://user:secret@127.0.0.1:1").open()


# --- groups ----------------------------------------------------------------------------------------------------------


async def test_large_payloads_are_sent_in_several_parts(
    remote: RedisTaskStore, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation_queue, "_MAX_PART_BYTES", 8)
    proxy.forget()
    await asyncio.gather(*(remote.put(record(f"{number}")) for number in range(3)), remote.depths())
    assert proxy.commands == ["EVALSHA", "EVALSHA", "EVALSHA", "HGETALL"]


async def test_calls_at_once_are_one_round_trip(remote: RedisTaskStore, proxy: CuttingProxy) -> None:
    proxy.forget()
    await asyncio.gather(*(remote.put(record(f"{number}")) for number in range(100)), remote.depths())
    assert proxy.commands == ["EVALSHA", "HGETALL"]  # in one pipeline


async def test_reading_writes_nothing(store: RedisTaskStore, server: StandaloneRedis) -> None:
    await store.put(record())
    before = server.servers[0].info("replication")["master_repl_offset"], server.servers[0].ask("LASTSAVE")
    changes = server.servers[0].info("persistence")["rdb_changes_since_last_save"]
    await asyncio.gather(store.find("a"), store.find_key("k"), store.depths(), store.conversations())
    await store.list_records(RecordState.WAITING, 9)
    assert server.servers[0].info("persistence")["rdb_changes_since_last_save"] == changes
    assert before[0] == server.servers[0].info("replication")["master_repl_offset"]


async def test_a_listing_goes_on_through_many_records_of_other_states_and_of_one_time(store: RedisTaskStore) -> None:
    ids = [f"{number:04}" for number in range(2_500)]
    await asyncio.gather(*(store.put(record(each)) for each in ids))
    leases = await store.lease("t", 2_499, until=9.0)
    (listed,) = await store.list_records(RecordState.WAITING, 9)
    assert listed.record.task_id == "2499"
    pages, after = list[str](), None
    while page := await store.list_records(RecordState.LEASED, 700, after=after):
        pages += [each.record.task_id for each in page]
        after = page[-1].position
        await store.finish(page[-1].record.task_id, DONE, fence=leases[int(page[-1].record.task_id)].fence)
    assert pages == ids[:-1]


@pytest.mark.blocks
def test_it_works_in_virtual_time(server: StandaloneRedis, name: str) -> None:
    async def main() -> list[str]:
        async with opened(f"{server.url}?name={name}") as store:
            store.subscribe(on_waiting=lambda: None, on_ended=lambda: None)
            await store.put(record())
            await asyncio.sleep(3_600.0)
            return [lease.record.task_id for lease in await store.lease("t", 1, until=9.0)]

    assert simulate(main()) == ["a"]
