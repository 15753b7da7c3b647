"""The saga log on a Redis that is away, cut off, killed, full or replaced: what was acknowledged is there, once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
from tests.support.cutting_proxy import CuttingProxy, Side
from tests.support.redis_servers import (
    RedisServer,
    RedisSetup,
    StandaloneRedis,
    redis_cluster,
    redis_replicated,
    redis_sentinels,
    redis_server,
    shared,
)

from forebay.errors import StoreAnswerLost, StoreUnavailable
from forebay.saga import SagaLog, SagaState, open_saga_log, redis_log
from forebay.saga.records import LogWrite, SagaHeader, StoredSaga
from forebay.storage import operation_queue, redis_master

NAMES = itertools.count()
ENDLESS = 1e6  # seconds
BOUND = 15.0  # seconds for an answer: the master is looked for, and its answer awaited, a few seconds each
RUNNING, DONE, COMPENSATED, PARKED = SagaState.RUNNING, SagaState.DONE, SagaState.COMPENSATED, SagaState.PARKED


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[SagaLog]:
    log = open_saga_log(url)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


async def in_thread(work: Callable[[], object]) -> None:
    """Run what blocks, while the event loop goes on."""
    await asyncio.get_running_loop().run_in_executor(None, work)


def header(saga_id: str) -> SagaHeader:
    return SagaHeader(saga_id=saga_id, name="publish", version="1", envelope=b"envelope", submission=1.0)


async def begin(log: SagaLog, saga_id: str = "a", *, fence: str = "mine", now: float = 100.0) -> StoredSaga:
    return await log.begin(header(saga_id), b"restarted", fence=fence, until=now + 10.0, now=now)


async def append(
    log: SagaLog, *entries: bytes, number: int = 0, state: SagaState = RUNNING, fence: str = "mine"
) -> bool:
    return await log.append("a", LogWrite(number, entries, state), fence=fence, now=101.0)


async def claim(log: SagaLog, *, fence: str = "other", now: float = 110.0) -> list[str]:
    claimed = await log.claim(["publish"], limit=10, fence=fence, until=now + 10.0, now=now)
    return [each.header.saga_id for each in claimed]


async def entries(log: SagaLog, saga_id: str = "a") -> list[bytes] | None:
    stored = await log.get(saga_id)
    return None if stored is None else list(stored.entries)


# --- one server, behind a proxy ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[StandaloneRedis]:
    with redis_server(proxied=True) as started:
        yield started


@pytest.fixture
def proxy(server: StandaloneRedis) -> Iterator[CuttingProxy]:
    [proxy] = server.proxies
    yield proxy
    proxy.forget()
    proxy.go_on()
    proxy.accept()


@pytest.fixture
def urls(server: StandaloneRedis) -> tuple[str, str]:
    """Return the URLs of a new log, by way of the proxy and past it."""
    name = f"log-{next(NAMES)}"
    return f"{server.url}?name={name}", f"redis://127.0.0.1:{server.servers[0].port}/0?name={name}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a server that does not answer up sooner."""
    monkeypatch.setattr(redis_master, "_ANSWER_TIMEOUT", 0.3)
    monkeypatch.setattr(redis_master, "_PATIENCE", 0.5)


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_is_away_is_reported_within_a_bound(proxy: CuttingProxy, urls: tuple[str, str]) -> None:
    async with opened(urls[0]) as log:
        assert (await begin(log)).holder == "mine"
        proxy.refuse()
        async with asyncio.timeout(BOUND):
            for call in (partial(begin, log, "b"), partial(append, log, b"entry"), partial(claim, log)):
                with pytest.raises(StoreUnavailable):
                    await call()
        proxy.accept()
        assert await append(log, b"entry")
        assert (await begin(log, "b")).holder == "mine"
        assert await entries(log) == [b"entry"]


@pytest.mark.usefixtures("impatient")
async def test_a_write_that_got_no_answer_may_be_repeated(proxy: CuttingProxy, urls: tuple[str, str]) -> None:
    async with opened(urls[0]) as log:
        await begin(log)
        proxy.cut_at(1, "answer", then_refuse=True)
        with pytest.raises(StoreAnswerLost):
            await append(log, b"entry")
        proxy.accept()
        assert await append(log, b"entry")
        assert await entries(log) == [b"entry"]


class Script:
    """Each operation of a saga log, one after the other.

    Attributes:
        said: what the log has answered.
    """

    def __init__(self, log: SagaLog) -> None:
        self._log = log
        self.said: list[Any] = []

    async def _do(self, call: Awaitable[Any]) -> None:
        self.said.append(await call)

    async def _write(self, saga_id: str, number: int, state: SagaState, *texts: bytes, fence: str = "mine") -> None:
        await self._do(self._log.append(saga_id, LogWrite(number, texts, state, "why"), fence=fence, now=103.0))

    async def run(self) -> None:
        log, amended = self._log, LogWrite(2, [b"retried"], RUNNING)
        for saga_id in ("a", "b", "c"):
            await self._do(begin(log, saga_id))
        await self._write("a", 0, RUNNING, b"1", b"2")
        await self._do(log.renew({"a": "mine", "b": "other"}, until=120.0))
        await self._write("a", 2, COMPENSATED, b"3")
        await self._do(begin(log, "a", now=104.0))  # again
        await self._write("a", 4, RUNNING, b"4")
        await self._do(log.release("a", fence="mine"))
        await self._do(begin(log, "a", fence="other", now=105.0))  # taken
        await self._write("a", 5, DONE, b"5", fence="other")
        await self._write("b", 0, PARKED, b"1", b"2")
        await self._do(log.amend("b", amended, now=106.0))
        await self._do(log.amend("b", amended, now=106.0))  # by another person
        await self._do(log.claim(["publish"], limit=9, fence="third", until=140.0, now=130.0))
        await self._write("b", 3, SagaState.COMPENSATING, b"4", fence="third")
        for saga_id in ("a", "b", "c"):
            await self._do(log.get(saga_id))
        await self._do(log.list(states=list(SagaState), limit=9))
        await self._write("c", 0, SagaState.RESOLVED, b"1", fence="third")
        await self._do(log.list(states=list(SagaState), limit=9))


async def run_script(url: str) -> list[Any]:
    async with opened(url) as log:
        script = Script(log)
        await script.run()
        return script.said


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_cut_at_any_command_makes_no_difference(
    server: StandaloneRedis, proxy: CuttingProxy, lost: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_master, "_RETRY_INTERVAL", 0.001)
    proxy.forget()
    expected = await run_script(f"{server.url}?name=cut-{next(NAMES)}")
    count = len(proxy.commands)
    assert count > 20
    assert False in expected  # the second person
    for number in range(1, count + 1):
        proxy.cut_at(number, lost)
        said = await run_script(f"{server.url}?name=cut-{next(NAMES)}")
        assert said == expected, f"after a cut at command {number}, {proxy.commands[number - 1]}"
        assert proxy.has_cut, number


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_what_is_forgotten_is_gone_after_a_cut(
    server: StandaloneRedis, proxy: CuttingProxy, lost: Side, urls: tuple[str, str]
) -> None:
    async with opened(urls[0]) as log:
        await begin(log)
        await append(log, b"entry", state=DONE)
        proxy.cut_at(2, lost)
        await log.forget(before=200.0, limit=9)
        assert proxy.has_cut
        assert await log.get("a") is None
        assert await log.list(states=list(SagaState), limit=9) == []
    name = urls[0].rpartition("=")[2]
    assert server.servers[0].ask("KEYS", f"{{{name}}}:saga:[^f]*") == []


@pytest.mark.parametrize("what", ["begin", "claim"])
async def test_what_was_taken_for_a_caller_that_was_cancelled_is_released(
    what: str, proxy: CuttingProxy, urls: tuple[str, str]
) -> None:
    async with opened(urls[0]) as log, opened(urls[1]) as direct:
        await begin(direct)
        proxy.forget()
        proxy.cut_at(1 if what == "begin" else 2, "answer", then_refuse=True)  # a claim looks for sagas first
        take = partial(begin, now=110.0) if what == "begin" else claim
        calling = asyncio.ensure_future(take(log, fence="cancelled"))
        await in_thread(proxy.wait_for_cut)
        stored = await direct.get("a")
        assert stored is not None
        assert stored.holder == "cancelled"
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        proxy.accept()
        await log.release("unknown", fence="none")  # after what was begun before
        assert await claim(direct, now=111.0) == ["a"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Any]]:
    """Return the commands that logs are about to send, which a connection that was given up may deliver late."""
    commands: list[Sequence[Any]] = []
    script = redis_log.RedisSagaLog._script

    def record(*args: Any) -> Sequence[Any]:
        commands.append(script(*args))
        return commands[-1]

    monkeypatch.setattr(redis_log.RedisSagaLog, "_script", record)
    return commands


def deliver(server: StandaloneRedis, commands: Sequence[Sequence[Any]]) -> None:
    with server.servers[0].client() as client:
        for command in commands:
            client.execute_command(*command)


async def test_the_late_copy_of_a_call_changes_nothing(
    server: StandaloneRedis, urls: tuple[str, str], sent: list[Sequence[Any]]
) -> None:
    async with opened(urls[1]) as log:
        await begin(log)
        await append(log, b"1", state=PARKED)
        await log.amend("a", LogWrite(1, [b"2"], RUNNING), now=102.0)
        await claim(log)
        await append(log, b"3", number=2, state=COMPENSATED, fence="other")
        await begin(log, now=120.0)
        await append(log, b"4", number=4, state=COMPENSATED)
        before = await log.get("a")
        deliver(server, [*sent])
        assert await log.get("a") == before
        assert await log.list(states=[RUNNING], limit=9) == []
        assert await claim(log, now=900.0) == []


@pytest.mark.usefixtures("impatient")
async def test_what_was_not_given_to_its_caller_is_not_released_once_it_is_taken_again(
    server: StandaloneRedis, proxy: CuttingProxy, urls: tuple[str, str], sent: list[Sequence[Any]]
) -> None:
    async with opened(urls[0]) as log:
        proxy.refuse()
        with pytest.raises(StoreUnavailable):
            await begin(log)
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable):
            await log.get("a")  # behind what releases it
        late = [*sent]
        proxy.accept()
        assert (await begin(log)).holder == "mine"
        deliver(server, late)
        stored = await log.get("a")
        assert stored is not None
        assert (stored.holder, stored.until) == ("mine", 110.0)


@pytest.mark.usefixtures("impatient")
async def test_nothing_is_claimed_until_holders_could_renew_their_leases(
    proxy: CuttingProxy, urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(urls[0]) as log:
        await begin(log)
        proxy.refuse()
        with pytest.raises(StoreUnavailable):
            await claim(log)
        proxy.accept()
        assert await claim(log) == []
        monkeypatch.setattr(redis_log, "_GRACE", 0.0)
        assert await claim(log) == ["a"]


async def test_processes_whose_clocks_differ_agree_on_leases(
    urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(urls[1]) as log, opened(urls[1]) as other:
        monkeypatch.setattr(other._clock, "ahead", lambda: 50.0)  # type: ignore[attr-defined]
        await begin(log)
        assert await append(log, b"1")
        assert await claim(other, now=159.0) == []  # 109 by the clock of the server
        (listed,) = await other.list(states=[RUNNING], limit=9)
        assert (listed.created_at, listed.updated_at) == (150.0, 151.0)
        assert await other.list(states=[RUNNING], limit=9, after=(150.0, "a")) == []
        assert await claim(other, now=160.0) == ["a"]
        for each, until in ((log, 120.0), (other, 170.0)):
            stored = await each.get("a")
            assert stored is not None
            assert (stored.holder, stored.until) == ("other", until)
        assert await other.renew({"a": "other"}, until=190.0) == []
        assert await claim(log, now=139.0) == []
        assert await log.amend("a", LogWrite(1, [b"2"], DONE), now=140.0)
        assert await other.forget(before=190.0, limit=9) == 0
        assert await other.forget(before=190.5, limit=9) == 1


# --- memory, rights and other programs --------------------------------------------------------------------------------


async def test_with_its_memory_full_what_has_begun_goes_on_and_nothing_begins() -> None:
    with redis_server() as own:
        [server] = own.servers
        async with opened(own.url) as log:
            await begin(log)
            await begin(log, "lapsed", now=50.0)
            server.ask("CONFIG", "SET", "maxmemory", 1)
            with pytest.raises(StoreUnavailable, match="memory is full"):
                await begin(log, "b")
            assert await log.get("b") is None
            assert await log.list(states=list(SagaState), limit=9) == [
                each.header for each in (await log.get("lapsed"), await log.get("a")) if each is not None
            ]
            assert await append(log, b"1")
            assert await log.renew({"a": "mine"}, until=120.0) == []
            assert await claim(log) == ["lapsed"]
            await log.release("lapsed", fence="other")
            assert await append(log, b"2", number=1, state=PARKED)
            assert await log.amend("a", LogWrite(2, [b"3"], COMPENSATED), now=200.0)
            with pytest.raises(StoreUnavailable, match="memory is full"):
                await begin(log)
            assert await entries(log) == [b"1", b"2", b"3"]
            assert await log.forget(before=300.0, limit=9) == 1
        async with opened(own.url) as log:  # nor does it need memory to be opened
            assert await entries(log, "lapsed") == []


async def test_the_rights_that_the_guide_lists_are_enough() -> None:
    with redis_replicated(appendonly="yes", appendfsync="always") as own:
        [master, *_] = own.servers
        rights = ["~{log}:*", "+@read", "+@write", "+@scripting", "+@connection", "+info", "+wait", "+waitaof"]
        master.ask("ACL", "SETUSER", "few", "on", ">secret", *rights)
        for options in ("", "&fsync=yes", "&replicas=1"):
            async with opened(own.url.replace("://", "://few:secret@") + f"?name=log{options}") as log:
                script = Script(log)
                await script.run()
                assert await log.forget(before=900.0, limit=9) == 2
            master.ask("DEL", *master.ask("KEYS", "*"))


async def test_a_log_of_a_newer_release_is_not_opened() -> None:
    url = f"{shared(redis_server).url}?name=newer"
    shared(redis_server).servers[0].ask("SET", "{newer}:saga:format", "2")
    with pytest.raises(StoreUnavailable, match=r"a newer Forebay wrote \{newer\}:saga:"):
        await open_saga_log(url).open()


async def test_a_saga_that_another_program_has_changed_fails_alone() -> None:
    setup = shared(redis_server)
    async with opened(f"{setup.url}?name=strange") as log:
        await begin(log)
        await begin(log, "strange")
        setup.servers[0].ask("SET", "{strange}:saga:+strange", "text")
        write = LogWrite(0, [b"entry"], RUNNING)
        strange, fine = await asyncio.gather(
            log.append("strange", write, fence="mine", now=101.0), append(log, b"entry"), return_exceptions=True
        )
        assert isinstance(strange, StoreUnavailable)
        assert "another program" in str(strange)
        assert fine is True


# --- killed and restarted ---------------------------------------------------------------------------------------------


async def keep_appending(log: SagaLog, saga_id: str, acknowledged: dict[str, int], changed: asyncio.Event) -> None:
    """Append one entry after the other; what is not acknowledged is repeated, as a driver does."""
    while not await try_to_begin(log, saga_id):
        pass
    for number in itertools.count():
        write = LogWrite(number, [f"{saga_id} {number}".encode()], RUNNING)
        while True:
            with suppress(StoreUnavailable):
                assert await log.append(saga_id, write, fence="mine", now=101.0)
                break
        acknowledged[saga_id] = number + 1
        changed.set()


async def try_to_begin(log: SagaLog, saga_id: str) -> bool:
    with suppress(StoreUnavailable):
        assert (await begin(log, saga_id)).holder == "mine"
        return True
    return False


async def append_while(url: str, disturb: Callable[[], object]) -> Mapping[str, int]:
    """Append to several sagas while something happens to the server; return how many entries were acknowledged."""
    acknowledged, changed = dict[str, int](), asyncio.Event()

    async def more(count: int) -> None:
        wanted = sum(acknowledged.values()) + count
        while sum(acknowledged.values()) < wanted:
            changed.clear()
            waiting = asyncio.ensure_future(changed.wait())
            done, _ = await asyncio.wait([waiting, *appending], return_when=asyncio.FIRST_COMPLETED)
            for each in done - {waiting}:
                each.result()  # it has failed: so does the test
            waiting.cancel()

    async with opened(url) as log:
        appending = {
            asyncio.ensure_future(keep_appending(log, f"saga {number}", acknowledged, changed)) for number in range(10)
        }
        await more(100)
        await in_thread(disturb)
        await more(100)
        for each in appending:
            each.cancel()
        await asyncio.wait(appending)
    return acknowledged


async def check_entries(log: SagaLog, acknowledged: Mapping[str, int]) -> None:
    """Check that each saga has the entries that were acknowledged, once, in order."""
    for saga_id, count in acknowledged.items():
        found = await entries(log, saga_id)
        assert found is not None
        assert found == [f"{saga_id} {number}".encode() for number in range(len(found))]
        assert count <= len(found) <= count + 1  # one was on its way


def restart(server: RedisServer) -> None:
    server.kill()
    server.start()


async def test_a_server_that_is_killed_has_all_that_was_acknowledged_when_it_is_back() -> None:
    with redis_server(appendonly="yes", appendfsync="always") as durable:
        acknowledged = await append_while(f"{durable.url}?fsync=yes", partial(restart, durable.servers[0]))
        async with opened(durable.url) as log:
            await check_entries(log, acknowledged)


# --- a master and its replica -----------------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandaloneRedis]:
    """Return a master with a replica, both behind proxies; the log waits for replicas for a tenth of a second."""
    monkeypatch.setattr(redis_log, "_ACKNOWLEDGE_TIMEOUT_MS", 100)
    with redis_replicated(proxied=True) as started:
        yield started


def lose_master(pair: StandaloneRedis) -> str:
    """Kill the master with all that its replica has not got, and return the URL of what was its replica."""
    pair.kill_master()
    pair.proxies[0].cut()
    replica = pair.promote()
    return f"redis://127.0.0.1:{replica.port}/0"


def catch_up(pair: StandaloneRedis) -> None:
    """Let the replica have what it lags behind."""
    pair.proxies[0].lag(0.0)
    pair.proxies[0].cut()
    pair.wait_for_replicas()


async def test_without_replicas_that_have_them_acknowledged_entries_are_lost_with_the_master(
    pair: StandaloneRedis,
) -> None:
    """The control: what the other tests hold does not hold by itself."""
    async with opened(pair.url) as log:
        await begin(log)
        assert await append(log, b"1")
        await in_thread(pair.wait_for_replicas)
        pair.proxies[0].lag(ENDLESS)
        assert await append(log, b"2", number=1)
    async with opened(lose_master(pair)) as log:
        assert await entries(log) == [b"1"]


async def test_acknowledged_entries_survive_the_master(pair: StandaloneRedis) -> None:
    async with opened(f"{pair.url}?replicas=1") as log:
        await begin(log)
        assert await append(log, b"1")
        pair.proxies[0].lag(ENDLESS)
        for _ in range(2):  # repeated, it is there already: on the master
            with pytest.raises(StoreAnswerLost, match="only 0 of 1 replicas had the write"):
                await append(log, b"2", number=1)
    async with opened(lose_master(pair)) as log:
        assert await entries(log) == [b"1"]
        assert await append(log, b"2", number=1)


async def test_a_group_waits_for_missing_replicas_once(pair: StandaloneRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_queue, "_MAX_PART_BYTES", 1)  # each operation is a round trip
    async with opened(f"{pair.url}?replicas=1") as log:
        await begin(log)
        pair.proxies[0].lag(ENDLESS)
        pair.proxies[0].forget()
        appending = [append(log, b"entry", number=number) for number in range(50)]
        for error in await asyncio.gather(*appending, return_exceptions=True):
            assert isinstance(error, StoreAnswerLost)
        assert pair.proxies[0].commands == ["EVALSHA", "WAIT"]


async def test_a_repeated_entry_is_acknowledged_once_a_replica_has_it(pair: StandaloneRedis) -> None:
    async with opened(f"{pair.url}?replicas=1") as log:
        await begin(log)
        pair.proxies[0].lag(ENDLESS)
        with pytest.raises(StoreAnswerLost):
            await append(log, b"1")
        await in_thread(partial(catch_up, pair))
        assert await append(log, b"1")
    async with opened(lose_master(pair)) as log:
        assert await entries(log) == [b"1"]


async def test_on_a_new_connection_what_is_there_already_is_not_acknowledged(pair: StandaloneRedis) -> None:
    """That connection has written nothing, so that it would have nothing to wait for."""
    async with opened(f"{pair.url}?replicas=1") as log:
        await begin(log)
        pair.proxies[0].lag(ENDLESS)
        with pytest.raises(StoreAnswerLost):
            await append(log, b"1", state=DONE)
    calls: list[Callable[[SagaLog], Awaitable[object]]] = [
        partial(begin, fence="other"),
        lambda log: append(log, b"1", state=DONE),
        entries,
    ]
    for call in calls:
        async with opened(f"{pair.url}?replicas=1") as log:
            with pytest.raises(StoreAnswerLost):
                await call(log)


async def test_a_lost_fence_is_not_hidden_by_replicas_that_are_missing(pair: StandaloneRedis) -> None:
    async with opened(f"{pair.url}?replicas=1") as log:
        await begin(log)
        pair.proxies[0].lag(ENDLESS)
        assert not await append(log, b"1", fence="lost")
        assert not await log.amend("a", LogWrite(7, [b"note"], DONE), now=900.0)
        assert await log.renew({"a": "mine", "b": "mine"}, until=900.0) == ["b"]
        assert await log.get("unknown") is None


@pytest.mark.parametrize("what", ["begin", "claim"])
async def test_what_was_taken_and_not_acknowledged_may_be_taken_again(what: str, pair: StandaloneRedis) -> None:
    async with opened(f"{pair.url}?replicas=1") as log:
        if what == "claim":
            await begin(log, now=50.0)
        pair.proxies[0].lag(ENDLESS)
        with pytest.raises(StoreAnswerLost):
            await (begin(log) if what == "begin" else claim(log, fence="mine", now=100.0))
        await in_thread(partial(catch_up, pair))
        again = await begin(log, fence="other", now=101.0)
        assert (again.holder, again.header.claims) == ("other", 1)


# --- a master of Sentinels, or of a cluster, killed while sagas go on -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", [redis_sentinels, redis_cluster], ids=lambda start: start.__name__)
async def test_no_acknowledged_entry_is_lost_with_a_master_that_is_killed_under_load(
    start: Callable[..., AbstractContextManager[RedisSetup]],
) -> None:
    with start(proxied=True) as setup:

        def replace_master() -> None:
            killed = setup.kill_master()
            setup.promote()
            killed.start()  # a replica now

        for proxy in setup.proxies:
            proxy.lag(0.05)
        acknowledged = await append_while(f"{setup.url}?replicas=1", replace_master)
        async with opened(setup.url) as log:
            await check_entries(log, acknowledged)
