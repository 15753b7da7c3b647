"""The read timeout of a connection to a provider: counted from the last bytes, by one timer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from forebay.gateway.connections.connection_pool import ConnectionPool, PooledConnection
from forebay.simulation import simulate

TIMEOUT = 10.0  # seconds


@asynccontextmanager
async def open_connection() -> AsyncIterator[PooledConnection]:
    """Open a connection on which a call has been sent."""
    pool = ConnectionPool(10)
    connection = PooledConnection(pool)
    connection.connection_made(asyncio.Transport())
    connection.set_response_params(read_timeout=TIMEOUT)
    connection.start_timeout()
    try:
        yield connection
    finally:
        connection.connection_lost(None)
        await pool.close()


async def silence_ends(connection: PooledConnection) -> float:
    """Wait until a read fails for a timeout; return the time."""
    with pytest.raises(aiohttp.SocketTimeoutError):
        await connection.read()
    return asyncio.get_running_loop().time()


def test_a_provider_that_sends_nothing_is_given_up_after_the_timeout() -> None:
    async def scenario() -> None:
        start = asyncio.get_running_loop().time()
        async with open_connection() as connection:
            assert await silence_ends(connection) == pytest.approx(start + TIMEOUT)

    simulate(scenario())


def test_bytes_begin_the_timeout_again() -> None:
    async def scenario() -> None:
        start = asyncio.get_running_loop().time()
        async with open_connection() as connection:
            await asyncio.sleep(8.0)
            connection.data_received(b"HTTP/1.1 200 OK\r\n")
            assert await silence_ends(connection) == pytest.approx(start + 8.0 + TIMEOUT)

    simulate(scenario())


def test_a_shorter_timeout_of_the_next_call_counts() -> None:
    async def scenario() -> None:
        start = asyncio.get_running_loop().time()
        async with open_connection() as connection:
            connection.set_response_params(read_timeout=2.0)
            connection.start_timeout()
            assert await silence_ends(connection) == pytest.approx(start + 2.0)

    simulate(scenario())


def test_a_whole_response_ends_the_timeout() -> None:
    async def scenario() -> None:
        async with open_connection() as connection:
            connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            await asyncio.sleep(5 * TIMEOUT)
            assert connection.exception() is None

    simulate(scenario())


def test_a_lost_connection_leaves_no_timer() -> None:
    async def scenario() -> None:
        async with open_connection() as connection:
            pass
        assert connection._read_timeout_handle is None

    simulate(scenario())
