"""Which worker of a gateway accepts a connection, of several that listen on one socket."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from tests.support.listening_workers import ListeningWorkers

from forebay.gateway.workers import worker_listener
from forebay.gateway.workers.connection_counts import most_to_accept


class ShortOfFiles(socket.socket):
    """A listening socket of a process that may open no more files."""

    def accept(self) -> tuple[socket.socket, Any]:
        raise OSError(errno.EMFILE, "Too many open files")


@asynccontextmanager
async def workers(count: int, **limits: int) -> AsyncIterator[ListeningWorkers]:
    with ListeningWorkers(count, **limits) as made:
        try:
            yield made
        finally:
            await made.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_connections_that_come_at_once_fall_evenly_on_the_workers(
    new_loop: Callable[[], asyncio.AbstractEventLoop], count: int
) -> None:
    async def accept() -> list[int]:
        async with workers(count) as made:
            made.open(*range(count))
            made.connect(64)
            return await made.settle()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        open_ = runner.run(accept())
    assert sum(open_) == 64
    assert max(open_) <= most_to_accept(open_) + 1


async def test_a_new_connection_goes_to_the_worker_with_the_fewest() -> None:
    async with workers(3) as made:
        made.open(0, 1, 2)
        made.connect(12)
        one, two, three = await made.settle()
        assert min(one, two, three) >= 3
        await made.hang_up(1, two)
        made.connect(2)
        assert await made.settle() == [one, 2, three]


async def test_a_worker_that_is_full_leaves_connections_to_one_that_is_not() -> None:
    async with workers(2, max_connections=3) as made:
        made.open(0)
        made.connect(3)
        assert await made.settle() == [3]
        made.open(1)
        made.connect(3)
        assert await made.settle() == [3, 3]
        made.connect()  # somebody has to reject it
        assert sum(await made.settle()) == 7


async def test_a_worker_that_starts_later_gets_connections_until_it_has_as_many() -> None:
    async with workers(2) as made:
        made.open(0)
        made.connect(6)
        assert await made.settle() == [6]
        made.open(1)
        made.connect(5)
        assert await made.settle() == [6, 5]


async def test_a_worker_takes_what_one_that_hangs_does_not_and_soon_waits_for_it_no_more() -> None:
    async with workers(2) as made:
        made.counts.publish(1, 0)  # and never again
        made.open(0, patience=0.0)
        made.connect(64)
        assert await made.settle() == [64]
        assert made.counts.waits == 50


async def test_a_worker_that_hung_gets_connections_again() -> None:
    async with workers(2) as made:
        made.counts.publish(1, 0)
        made.open(0, patience=0.0)
        made.connect(64)
        assert await made.settle() == [64]
        made.open(1)
        made.connect(50)
        assert await made.settle() == [64, 50]


async def test_a_worker_that_is_slow_but_lives_is_waited_for_each_time() -> None:
    async with workers(2) as made:
        made.counts.publish(1, 0)
        made.open(0, patience=0.0)
        for number in range(64):
            made.connect()
            await asyncio.sleep(0)
            made.counts.publish(1, 0)
            assert await made.settle() == [number + 1]
        assert made.counts.waits == 62  # not with the first two connections


async def test_nobody_waits_for_a_worker_that_has_died() -> None:
    async with workers(2) as made:
        made.open(0)
        made.counts.publish(1, 0)
        made.counts.withdraw(1)
        made.connect(10)
        assert await made.settle() == [10]
        assert made.counts.waits == 0


async def test_a_worker_that_drains_leaves_connections_to_the_others() -> None:
    async with workers(2) as made:
        made.open(0, 1)
        made.servers[0].listener.withdraw()
        made.connect(5)
        assert await made.settle() == [0, 5]


async def test_workers_that_all_drain_go_on_accepting() -> None:
    async with workers(2) as made:
        made.open(0, 1)
        made.servers[0].listener.withdraw()
        made.servers[1].listener.withdraw()
        made.connect(5)
        assert sum(await made.settle()) == 5


async def test_a_worker_that_ends_leaves_what_has_connected_to_another_that_accepts() -> None:
    async with workers(2) as made:
        made.open(0, 1)
        made.connect(5)
        await made.servers[0].listener.close()
        assert await made.settle() == [0, 5]


async def test_the_last_worker_that_ends_takes_what_has_connected() -> None:
    async with workers(2) as made:
        made.open(0, 1)
        await made.servers[0].listener.close()
        made.connect(5)
        await made.servers[1].listener.close()
        assert await made.settle() == [0, 5]


async def test_a_worker_that_may_open_no_more_files_leaves_connections_to_the_others_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with workers(2) as made:
        made.open(0, kind=ShortOfFiles)
        made.connect(3)
        await asyncio.sleep(0)
        made.open(1)
        assert await made.settle() == [0, 3]
    (line,) = caplog.messages
    assert "worker 0 of the gateway accepts no connections for a second: Too many open files" in line


async def test_a_worker_accepts_again_once_it_may_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class ShortOnce(ShortOfFiles):
        def accept(self) -> tuple[socket.socket, Any]:
            calls.append(1)
            return socket.socket.accept(self) if len(calls) > 1 else super().accept()

    monkeypatch.setattr(worker_listener, "_PAUSE", 0.0)
    async with workers(1) as made:
        made.open(0, kind=ShortOnce)
        made.connect(3)
        assert await made.settle() == [3]


async def test_a_connection_that_is_lost_before_it_is_served_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    async with workers(1) as made:
        monkeypatch.setattr(asyncio.get_running_loop(), "connect_accepted_socket", fail)
        made.open(0)
        made.connect(2)
        for _ in range(100):
            await asyncio.sleep(0)
        assert made.open_connections() == [0]


async def test_answers_are_sent_without_delay() -> None:
    async with workers(1) as made:
        made.open(0)
        made.connect()
        await made.settle()
        (connection,) = made.servers[0].connections
        assert connection.transport is not None
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
