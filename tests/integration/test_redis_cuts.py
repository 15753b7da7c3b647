"""The connection to Redis is cut at each command: nothing acknowledged is lost, and nothing is done twice."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pytest
from tests.support.callers import running
from tests.support.cutting_proxy import CuttingProxy, Side
from tests.support.leases import after_failure
from tests.support.redis_servers import StandaloneRedis, redis_server

from forebay import BackpressureSupervisor, Task, clock
from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, Lease, RecordState, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.storage import redis_master
from forebay.task import Priority

T = TypeVar("T")

NAMES = itertools.count()

Attempt = Callable[[str, Callable[[], Awaitable[Any]]], Awaitable[Any]]  # makes an operation of that name


@pytest.fixture(scope="module")
def server() -> Iterator[StandaloneRedis]:
    with redis_server(proxied=True) as started:
        yield started


@pytest.fixture
def proxy(server: StandaloneRedis) -> Iterator[CuttingProxy]:
    [proxy] = server.proxies
    yield proxy
    proxy.forget()
    proxy.accept()


def record(task_id: str, at: float, **fields: Any) -> TaskRecord:
    envelope = f"envelope of {task_id}".encode()
    return TaskRecord(
        task_id=task_id, task_type="t", priority=Priority.NORMAL, envelope=envelope, enqueued_at=at, **fields
    )


@dataclass
class Script:
    """Each operation of a task store, on some records, and what came of it.

    Attributes:
        attempt: makes one operation, perhaps after failures.
        said: what the store has answered.
        ended: how often the store said that a task has ended.
    """

    store: TaskStore
    attempt: Attempt
    said: list[Any] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)

    async def _do(self, what: str, make: Callable[[], Awaitable[T]]) -> T:
        answer = await self.attempt(what, make)
        self.said.append((what, answer))
        return answer  # type: ignore[no-any-return]

    async def _lease(self, limit: int) -> list[Lease]:
        leases = await self.attempt("lease", lambda: self.store.lease("t", limit, until=100.0))
        self.said.append(("lease", [(lease.record.task_id, lease.record.attempts) for lease in leases]))
        return list(leases)

    async def _end(self, lease: Lease | str, status: str, *, dead: bool = False) -> None:
        task_id = lease if isinstance(lease, str) else lease.record.task_id
        completion = Completion(status=status, result=f"result of {task_id}".encode(), finished_at=50.0)
        if isinstance(lease, Lease) and dead:
            ended = await self._do("mark_dead", lambda: self.store.mark_dead(lease, completion))
        else:
            fence = None if isinstance(lease, str) else lease.fence
            ended = await self._do("finish", lambda: self.store.finish(task_id, completion, fence=fence))
        self.ended[task_id] += ended

    async def run(self) -> None:
        store = self.store
        await self.attempt("open", store.open)
        for number in range(6):
            plain = record(f"plain {number}", number)
            await self._do("put", lambda plain=plain: store.put(plain))  # type: ignore[misc]
        keyed = record("keyed", 6.0, key="the key")
        await self._do("put", lambda: store.put(keyed))
        other = record("its duplicate", 7.0, key="the key")
        await self._do("put", lambda: store.put(other))
        for number in range(2):
            message = record(f"message {number}", 8.0 + number, thread_id="conversation")
            await self._do("put", lambda message=message: store.put(message))  # type: ignore[misc]
        mine = record("mine", 10.0)
        held = Lease(record=mine, fence="my fence", until=1000.0)
        await self._do("put", lambda: store.put(mine, fence=held.fence, until=held.until))

        zero, one, two, three = await self._lease(4)
        await self._do("begin", lambda: store.begin_attempt(zero))
        renew = partial(store.renew, [zero, one, held], until=200.0)
        lost = await self.attempt("renew", lambda: asyncio.get_running_loop().run_in_executor(None, renew))
        self.said.append(("renew", len(lost)))
        await self._do("release", lambda: store.release([one]))
        await self._do("delay", lambda: store.delay(after_failure(two, wait=5.0, error="throttled"), due=60.0))
        await self._do("wake early", lambda: store.wake(now=55.0))
        await self._end(zero, "succeeded")
        await self._end(three, "failed", dead=True)
        await self._do("wake", lambda: store.wake(now=61.0))
        await self._do("requeue", lambda: store.requeue("plain 3"))
        await self._end("plain 5", "cancelled")
        await self._end(held, "succeeded")
        first, *_, last = await self._lease(5)
        await self._end(first, "failed", dead=True)
        await self._end(last, "succeeded")
        await self._do("delete", lambda: store.delete_dead("plain 1"))
        await self._do("reap", lambda: store.reap(now=150.0, max_attempts=3))
        await self._lease(20)
        await self._do("find", lambda: store.find("plain 0"))
        await self._do("find key", lambda: store.find_key("the key"))
        await self._do("depths", store.depths)
        await self._do("conversations", store.conversations)
        await self._do("prune", lambda: store.prune(before=49.0))

    async def close(self) -> None:
        await self.store.close()


async def contents(url: str) -> list[Any]:
    """Return all records of a store."""
    store = open_task_store(url)
    await store.open()
    found = [(state, stored) for state in RecordState for stored in await store.list_records(state, 1000)]
    await store.close()
    return found


def new_name(server: StandaloneRedis) -> tuple[str, str]:
    """Return the URLs of an overflow of a new name, by way of the proxy and past it."""
    name = f"cut-{next(NAMES)}"
    return f"{server.url}?name={name}", f"redis://127.0.0.1:{server.servers[0].port}/0?name={name}"


async def once(_: str, make: Callable[[], Awaitable[T]]) -> T:
    return await make()


async def run_script(server: StandaloneRedis, attempt: Attempt = once) -> tuple[Script, list[Any]]:
    """Run the script on a new overflow; return it with all that is stored then."""
    url, direct = new_name(server)
    script = Script(open_task_store(url), attempt)
    if isinstance(attempt, Persistent):
        attempt.script = script
    try:
        await script.run()
    finally:
        await script.close()
    return script, await contents(direct)


async def count_commands(server: StandaloneRedis, proxy: CuttingProxy) -> tuple[int, Script, list[Any]]:
    """Run the script without a fault; return how many commands it takes, and what came of it."""
    proxy.forget()
    script, stored = await run_script(server)
    return len(proxy.commands), script, stored


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_cut_at_any_command_makes_no_difference(
    server: StandaloneRedis, proxy: CuttingProxy, lost: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_master, "_RETRY_INTERVAL", 0.001)
    commands, expected, stored = await count_commands(server, proxy)
    assert commands > 40
    for number in range(1, commands + 1):
        proxy.cut_at(number, lost)
        script, found = await run_script(server)
        assert proxy.has_cut, number
        assert script.said == expected.said, f"after a cut at command {number}, {proxy.commands[number - 1]}"
        assert found == stored, f"after a cut at command {number}, {proxy.commands[number - 1]}"


class Persistent:
    """Makes an operation; if it fails, lets the store come back, and goes on as a supervisor does, or its caller.

    Attributes:
        failures: how many operations failed.
    """

    def __init__(self, proxy: CuttingProxy) -> None:
        self._proxy = proxy
        self.failures = 0
        self.script: Script

    async def __call__(self, what: str, make: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await make()
        except StoreUnavailable:
            self.failures += 1
            self._proxy.accept()
        store = self.script.store
        if what == "lease":  # whoever holds leases that it does not know lets them expire
            await store.reap(now=101.0, max_attempts=3)
        if what == "begin":
            found = await store.find("plain 0")
            assert found is not None
            if found[1].attempts:
                return True
        return await make()


# What these say of an operation that has happened, and is repeated, is known only to who did it first.
ONCE_ONLY = {"wake", "wake early", "requeue", "delete", "reap", "prune"}


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_store_that_is_away_after_a_cut_loses_nothing_and_does_nothing_twice(
    server: StandaloneRedis, proxy: CuttingProxy, lost: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, expected, stored = await count_commands(server, proxy)
    monkeypatch.setattr(redis_master, "_PATIENCE", 0.0)
    for number in range(1, commands + 1):
        persistent = Persistent(proxy)
        proxy.cut_at(number, lost, then_refuse=True)
        script, found = await run_script(server, persistent)
        where = f"after a cut at command {number}, {proxy.commands[number - 1]}"
        assert persistent.failures == 1, where
        assert known(script) == known(expected), where
        assert script.ended == expected.ended, where
        assert found == stored, where


def known(script: Script) -> list[Any]:
    return [(what, answer) for what, answer in script.said if what not in ONCE_ONLY]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_supervisors_whose_connections_are_cut_all_the_time_run_each_task_once(
    seed: int, server: StandaloneRedis, proxy: CuttingProxy
) -> None:
    url, direct = new_name(server)
    started, rng = Counter[str](), clock.new_random(seed)

    async def work(task: Task) -> str:
        started[task.task_id] += 1
        await asyncio.sleep(0.002)
        return f"result of {task.task_id}"

    async with AsyncExitStack() as stack:
        supervisors = []
        for number in range(3):
            supervisor = BackpressureSupervisor(overflow=url, max_queue_size=5)
            supervisor.register_worker(f"worker {number}", handler=work, task_types=["work"], max_concurrent=2)
            supervisors.append(await stack.enter_async_context(supervisor))

        async def submit(number: int) -> str:
            task = Task("work", task_id=f"{number}", durable=number % 2 == 0)
            return str(await supervisors[number % 3].run(task))

        async def cut() -> None:
            while True:
                proxy.cut_at(rng.randint(1, 20), rng.choice(("request", "answer")))
                while not await asyncio.get_running_loop().run_in_executor(None, proxy.cuts, 0.1):
                    pass
                if rng.random() < 0.2:
                    server.servers[0].ask("SCRIPT", "FLUSH")

        async with running(cut()):
            results = [await asyncio.gather(*map(submit, range(first, first + 20))) for first in range(0, 200, 20)]
        proxy.forget()
    assert [result for each in results for result in each] == [f"result of {number}" for number in range(200)]
    assert max(started.values()) == 1
    done = [stored for state, stored in await contents(direct) if state is RecordState.DONE]
    assert len(done) >= 100
