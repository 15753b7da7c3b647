"""The gateway's connections to its providers: no caller ever gets the answer to another's call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.client_reqrep import ConnectionKey
from tests.support.gateway_harness import CHAT_RESPONSE, GatewayHarness, connect, request_bytes, until

from forebay import clock
from forebay.gateway.connections import connection_pool
from forebay.gateway.connections.connection_pool import ConnectionPool, PooledConnection
from forebay.gateway.server import Gateway
from forebay.quota import Price

ANSWER = json.dumps(CHAT_RESPONSE).encode()
EXTRA = b'{"another": "answer"}'
HEAD = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"


class ConnectionRecord:
    """The connections on which a provider was called, and a way to send more on the last of them."""

    def __init__(self, harness: GatewayHarness) -> None:
        self._provider = harness.provider
        self.used: list[int] = []  # ports of the gateway, one for each call
        self.transports: list[asyncio.Transport] = []
        harness.provider.behaviour = self.answer

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        transport: Any = request.transport
        self.used.append(transport.get_extra_info("peername")[1])
        self.transports.append(transport)
        return await self._provider.reply(request)

    def send_unasked(self, status: bytes = b"200 OK") -> None:
        self.transports[-1].write(HEAD % (status, len(EXTRA), EXTRA))

    @property
    def open_ports(self) -> set[int]:
        pairs = zip(self.used, self.transports, strict=True)
        return {port for port, transport in pairs if not transport.is_closing()}


@pytest.fixture
def record(harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> ConnectionRecord:
    monkeypatch.setattr(connection_pool, "_REST", 0.0)
    return ConnectionRecord(harness)


def key(number: int, name: str = "authorization") -> dict[str, Any]:
    return {"headers": {name: f"sk-{number}"}}


async def test_a_connection_serves_one_call_after_another(harness: GatewayHarness, record: ConnectionRecord) -> None:
    async with Gateway(harness.settings()) as gateway:
        for _ in range(3):
            assert (await harness.post(gateway, **key(1)))[0] == 200
    assert len(set(record.used)) == 1


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
async def test_keys_share_no_connection(harness: GatewayHarness, record: ConnectionRecord, header: str) -> None:
    async with Gateway(harness.settings(share_keys=True)) as gateway:
        for number in (1, 2, 1):
            assert (await harness.post(gateway, "/openai/v1/chat/completions", **key(number, header)))[0] == 200
    assert record.used[0] == record.used[2] != record.used[1]


async def test_an_answer_that_nobody_asked_for_reaches_no_call(
    harness: GatewayHarness, record: ConnectionRecord
) -> None:
    async with Gateway(harness.settings(max_attempts=1)) as gateway:
        await harness.post(gateway)
        record.send_unasked()  # not read yet when the next call comes
        assert (await harness.post(gateway))[2] == CHAT_RESPONSE
    assert len(set(record.used)) == 2


async def test_bytes_that_have_not_been_read_yet_keep_a_connection_from_being_lent(
    harness: GatewayHarness, record: ConnectionRecord
) -> None:
    pool = ConnectionPool(10)
    async with Gateway(harness.settings(), connector=lambda: pool) as gateway:
        await harness.post(gateway)
        [[(connection, _)]] = pool._conns.values()
        assert connection.is_connected()
        record.send_unasked()
        assert not connection.is_connected()  # although the event loop has not read them


async def test_what_arrives_on_an_idle_connection_closes_it(harness: GatewayHarness, record: ConnectionRecord) -> None:
    async with Gateway(harness.settings(max_attempts=1)) as gateway:
        await harness.post(gateway)
        record.send_unasked()
        await until(record.transports[0].is_closing)


async def test_a_provider_that_sent_bytes_unasked_gets_a_connection_for_each_call(
    harness: GatewayHarness, record: ConnectionRecord, caplog: pytest.LogCaptureFixture
) -> None:
    async with Gateway(harness.settings(max_attempts=1)) as gateway:
        await harness.post(gateway)
        record.send_unasked()
        await until(record.transports[0].is_closing)
        for _ in range(3):
            assert (await harness.post(gateway))[0] == 200
    assert len(set(record.used)) == 4
    assert "sent bytes that no call asked for" in caplog.text


@pytest.mark.parametrize("status", [b"408 Request Timeout", b""])
async def test_what_ends_an_idle_connection_is_no_reason_for_distrust(
    harness: GatewayHarness, record: ConnectionRecord, status: bytes
) -> None:
    async with Gateway(harness.settings(max_attempts=1)) as gateway:
        await harness.post(gateway)
        if status:
            record.send_unasked(status)
        record.transports[0].close()
        for _ in range(2):
            assert (await harness.post(gateway))[0] == 200
    assert len(set(record.used)) == 2


async def test_a_connection_rests_between_two_calls(
    harness: GatewayHarness, record: ConnectionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_pool, "_REST", 3600.0)
    async with Gateway(harness.settings()) as gateway:
        for _ in range(3):
            assert (await harness.post(gateway))[0] == 200
    assert len(set(record.used)) == 3


# --- a provider that closes idle connections ---


class Idleness:
    """The idle connections of a pool, and of their provider, for one credential each."""

    def __init__(self, record: ConnectionRecord, pool: ConnectionPool) -> None:
        self._record = record
        self._pool = pool

    async def close_after(self, seconds: float, number: int, answer: bytes = b"") -> None:
        """Let the provider close the connection of its call `number`, as if it had been idle so long."""
        left = len(self._pool._conns)
        self.pass_time(seconds, number)
        if answer:
            self._record.send_unasked(answer)
        else:
            self._record.transports[number].close()
        await until(lambda: self._pool._open < left)

    def pass_time(self, seconds: float, number: int) -> None:
        """Let the connection of the provider's call `number` be idle for so many seconds."""
        port = self._record.used[number]
        for connections in self._pool._conns.values():
            for connection, _ in connections:
                assert isinstance(connection, PooledConnection)
                if connection.transport and connection.transport.get_extra_info("sockname")[1] == port:
                    connection.idle_since = clock.now() - seconds


def aborting_second_calls(record: ConnectionRecord) -> Any:
    """Return a behaviour that ends a connection in place of an answer to its second call: a call came too late."""

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        transport: Any = request.transport
        if transport.get_extra_info("peername")[1] not in record.used:
            return await record.answer(request)
        transport.abort()
        return web.Response()

    return behave


@pytest.mark.parametrize("answer", [b"", b"408 Request Timeout"], ids=["without a word", "408"])
async def test_no_call_is_sent_on_a_connection_that_is_about_to_be_closed(
    harness: GatewayHarness, record: ConnectionRecord, answer: bytes
) -> None:
    harness.provider.behaviour = aborting_second_calls(record)
    pool = ConnectionPool(10)
    idleness = Idleness(record, pool)
    settings = harness.settings(budget_usd=1_000.0, prices={"gpt-4o": Price(input=0, output=1e6)})
    async with Gateway(settings, connector=lambda: pool) as gateway:
        upstream = gateway.forwarder.targets[0].upstream
        assert (await harness.post(gateway, **key(1)))[0] == 200
        cost = upstream.statistics().spent_usd
        assert (await harness.post(gateway, **key(2)))[0] == 200
        await idleness.close_after(5.0, 1, answer)
        idleness.pass_time(4.5, 0)
        assert (await harness.post(gateway, **key(1)))[0] == 200
        assert cost is not None
        assert upstream.statistics().spent_usd == pytest.approx(3 * cost), "nothing counts as reserved"
    assert len(set(record.used)) == 3


async def test_a_connection_that_was_idle_for_much_less_than_closed_ones_is_lent(
    harness: GatewayHarness, record: ConnectionRecord
) -> None:
    pool = ConnectionPool(10)
    idleness = Idleness(record, pool)
    async with Gateway(harness.settings(), connector=lambda: pool) as gateway:
        for number in (1, 2):
            await harness.post(gateway, **key(number))
        await idleness.close_after(5.0, 1)
        idleness.pass_time(3.5, 0)
        await harness.post(gateway, **key(1))
    assert record.used[2] == record.used[0]


async def test_connections_that_this_side_closes_tell_nothing_of_a_provider(
    harness: GatewayHarness, record: ConnectionRecord
) -> None:
    pool = ConnectionPool(2)
    idleness = Idleness(record, pool)
    async with Gateway(harness.settings(), connector=lambda: pool) as gateway:
        for number in (1, 2, 3):  # the first connection makes room for the third
            await harness.post(gateway, **key(number))
        await until(lambda: pool._open == 2)
        idleness.pass_time(29.0, 2)
        await harness.post(gateway, **key(3))
    assert record.used[3] == record.used[2]


async def test_the_shortest_idle_time_of_each_provider_counts_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(clock, "now", lambda: now)
    pool = ConnectionPool(10)
    provider, another = (
        ConnectionKey(host, 443, is_ssl=True, ssl=True, proxy=None, proxy_auth=None, proxy_headers_hash=None)
        for host in ("one.example", "another.example")
    )
    assert not pool.may_be_closing(provider, 29.0)
    pool.record_closed_idle(provider, 5.0)
    pool.record_closed_idle(provider, 20.0)
    assert pool.may_be_closing(provider, 4.1)
    assert not pool.may_be_closing(provider, 3.9)
    assert not pool.may_be_closing(another, 29.0)
    pool.record_closed_idle(provider, 0.01)  # it was restarted
    assert pool.may_be_closing(provider, 0.6)
    assert not pool.may_be_closing(provider, 0.4)
    now += 601.0
    assert not pool.may_be_closing(provider, 29.0)
    pool.record_closed_idle(provider, 20.0)
    assert pool.may_be_closing(provider, 17.0)


async def test_a_caller_beyond_max_connections_gets_its_503_whatever_it_sends(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_connections": 1})) as gateway:
        _, first = await connect(gateway)
        await until(lambda: len(gateway._web.connections) == 1)
        for _ in range(20):
            reader, writer = await connect(gateway)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
            writer.write(request_bytes(b" " * (256 << 10)))
            await writer.drain()  # which is read: otherwise the connection is reset, and the answer may be lost
            assert b"forebay_connections" in await reader.read()
            writer.close()
        first.close()
        await until(lambda: not gateway._web.connections)
        assert (await harness.post(gateway))[0] == 200


async def test_idle_connections_make_room_for_new_ones(harness: GatewayHarness, record: ConnectionRecord) -> None:
    async with Gateway(harness.settings(gateway={"max_connections": 5})) as gateway:
        most_open = 0
        for number in range(12):
            assert (await harness.post(gateway, **key(number)))[0] == 200
            settled: Callable[[], bool] = lambda: len(record.open_ports) <= 5  # noqa: E731
            await until(settled)
            most_open = max(most_open, len(record.open_ports))
        assert most_open == len(record.open_ports) == 5  # no more were closed than needed


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("extra", [b"", b"x", b"\0" * 9])
async def test_however_a_response_arrives_its_body_is_as_it_was_sent(line_end: bytes, extra: bytes) -> None:
    body = b"\0 \r \r\n\r\n \n\n"
    early = line_end.join((b"HTTP/1.1 100 Continue", b"x: a\0b", b"", b""))
    head = line_end.join((b"HTTP/1.1 200 OK", b"x: a\0b", b"content-length: %d" % len(body), b"", b""))
    whole = early + head + body
    for cut in range(len(whole) + 1):
        connection = PooledConnection(ConnectionPool(1))
        connection.set_response_params(read_until_eof=True, auto_decompress=False)
        connection.data_received(whole[:cut])
        connection.data_received(whole[cut:] + extra)
        await connection.read()
        message, payload = await connection.read()
        assert message.raw_headers[0] == (b"x", b"a b")
        assert await payload.read() == body
