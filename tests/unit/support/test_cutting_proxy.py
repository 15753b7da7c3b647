"""The cutting proxy loses what it is told to lose, and nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from tests.support.cutting_proxy import CuttingProxy, Side
from tests.support.redis_servers import StandaloneRedis, redis_replicated, redis_server, until


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
        proxy.go_on()
        assert replicated.promote() is replica
        assert (replica.ask("GET", "before"), replica.ask("GET", "after")) == ("1", None)


@contextmanager
def sender_of(data: bytes) -> Iterator[int]:
    """Run a server that answers one command with `data` and closes the connection; return its port."""

    def serve() -> None:
        with listener.accept()[0] as connection:
            connection.recv(2**10)
            connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


def ask(proxy: CuttingProxy, command: bytes) -> socket.socket:
    """Return a connection on which a command was sent."""
    connection = socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0)
    connection.sendall(b"*1\r\n$%d\r\n%s\r\n" % (len(command), command))
    return connection


def received(connection: socket.socket) -> bytes:
    """Return all that arrives until the connection ends."""
    parts = []
    while part := connection.recv(2**10):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("command", [b"SYNC", b"GET"])
def test_what_a_server_sent_before_it_closed_the_connection_arrives_late_but_whole(command: bytes) -> None:
    """A master closes the connection on which it has sent a replica its data."""
    with sender_of(b"+data\r\n") as port, CuttingProxy(port) as proxy:
        proxy.lag(0.1)
        proxy.delay(0.1)
        with ask(proxy, command) as connection:
            assert received(connection) == b"+data\r\n"


def test_a_cut_loses_what_a_server_sent_before_it_closed_the_connection() -> None:
    with ExitStack() as stack:
        with sender_of(b"+data\r\n") as port:
            proxy = stack.enter_context(CuttingProxy(port))
            proxy.lag(1e6)
            connection = stack.enter_context(ask(proxy, b"SYNC"))
        proxy.cut()
        assert received(connection) == b""


def test_what_a_master_sent_that_had_not_arrived_is_lost_when_it_is_killed() -> None:
    with redis_replicated(proxied=True) as replicated:
        replica = replicated.servers[1]
        with replicated.servers[0].client() as client:
            client.set("before", 1)
            assert client.wait(1, 10_000) == 1
            replicated.proxies[0].lag(0.2)
            client.set("after", 1)
        replicated.kill_master()
        until(lambda: replica.info("replication")["master_link_status"] == "down", "the replica has lost its master")
        assert (replica.ask("GET", "before"), replica.ask("GET", "after")) == ("1", None)
