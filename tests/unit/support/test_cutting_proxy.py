"""The cutting proxy loses what it is told to lose, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from tests.support.cutting_proxy import CuttingProxy, Side
from tests.support.redis_servers import StandaloneRedis, redis_replicated, redis_server


@pytest.fixture(scope="module")
def server() -> Iterator[StandaloneRedis]:
    with redis_server(proxied=True) as started:
        yield started


@pytest.fixture
def proxy(server: StandaloneRedis) -> CuttingProxy:
    server.servers[0].ask("FLUSHALL")
    return server.proxies[0]


@pytest.fixture(params=[2, 3], ids=lambda protocol: f"RESP{protocol}")
def client(proxy: CuttingProxy, request: pytest.FixtureRequest) -> Iterator[Any]:
    never = Retry(NoBackoff(), 0)
    with redis.Redis(port=proxy.port, protocol=request.param, retry=never, socket_timeout=10.0) as connected:
        connected.ping()
        yield connected


@pytest.mark.parametrize(("lost", "executed"), [("request", 2), ("answer", 3)])
def test_a_cut_loses_one_command_or_its_answer(
    proxy: CuttingProxy, client: Any, lost: Side, executed: int, server: StandaloneRedis
) -> None:
    proxy.cut_at(3, lost)
    assert [client.incr("count") for _ in range(2)] == [1, 2]
    with pytest.raises(redis.ConnectionError):
        client.incr("count")
    proxy.wait_for_cut()
    assert server.servers[0].ask("GET", "count") == f"{executed}"
    assert client.incr("count") == executed + 1  # on another connection


@pytest.mark.parametrize(("lost", "executed"), [("request", 2), ("answer", 3)])
def test_a_cut_within_a_pipeline_is_as_exact(
    proxy: CuttingProxy, client: Any, lost: Side, executed: int, server: StandaloneRedis
) -> None:
    proxy.cut_at(3, lost)
    pipeline = client.pipeline(transaction=False)
    for _ in range(5):
        pipeline.incr("count")
    with pytest.raises(redis.ConnectionError):
        pipeline.execute()
    proxy.wait_for_cut()
    assert server.servers[0].ask("GET", "count") == f"{executed}"
    assert proxy.commands == ["INCRBY"] * 3  # as the client says it


def test_all_kinds_of_answers_pass(proxy: CuttingProxy, client: Any) -> None:
    client.hset("hash", mapping={"field": "line\r\nline", "empty": ""})
    client.rpush("list", *range(1000))
    proxy.forget()
    assert client.hgetall("hash") == {b"field": b"line\r\nline", b"empty": b""}
    assert len(client.lrange("list", 0, -1)) == 1000
    assert client.get("none") is None
    nested = client.eval("return {1, {2, {}, 'text'}, redis.status_reply('fine')}", 0)
    assert nested == [1, [2, [], b"text"], b"fine"]
    with pytest.raises(redis.ResponseError):
        client.eval("return redis.error_reply('no')", 0)
    assert proxy.commands == ["HGETALL", "LRANGE", "GET", "EVAL", "EVAL"]


def test_what_is_held_arrives_when_it_goes_on(proxy: CuttingProxy, server: StandaloneRedis) -> None:
    with redis.Redis(port=proxy.port, socket_timeout=0.1, retry=Retry(NoBackoff(), 0)) as client:
        client.ping()
        proxy.hold()
        with pytest.raises(redis.TimeoutError):
            client.incr("count")
        assert server.servers[0].ask("GET", "count") is None
    proxy.go_on()
    with redis.Redis(port=proxy.port) as client:
        assert client.ping()


def test_a_client_is_refused_until_it_is_accepted(proxy: CuttingProxy, client: Any) -> None:
    proxy.refuse()
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            client.ping()
    proxy.accept()
    assert client.ping()


def test_a_held_replica_lacks_what_its_master_has() -> None:
    with redis_replicated(proxied=True) as replicated:
        master, replica = replicated.servers
        [proxy] = replicated.proxies[:1]
        master.ask("SET", "before", 1)
        with master.client() as client:
            client.set("before", 1)
            assert client.wait(1, 10_000) == 1
            proxy.hold()
            client.set("after", 1)
            assert client.wait(1, 50) == 0
        replicated.kill_master()
        proxy.cut()  # what it holds is lost
        proxy.go_on()
        assert replicated.promote() is replica
        assert (replica.ask("GET", "before"), replica.ask("GET", "after")) == ("1", None)
