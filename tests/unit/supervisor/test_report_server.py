"""The HTTP server of a worker process, for probes and for an autoscaler."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from forebay.errors import InvalidSetting
from forebay.scale import ReplicaReport
from forebay.supervisor.report_server import ReportServer


class Worker:
    """What a worker says of itself."""

    def __init__(self) -> None:
        self.is_ready = True
        self.hangs = False

    def ready(self) -> bool:
        return self.is_ready

    async def report(self) -> ReplicaReport:
        if self.hangs:
            await asyncio.Event().wait()
        return ReplicaReport(running=2, service=1.5, limited_by="upstream:openai:rpm")


@contextlib.asynccontextmanager
async def served(worker: Worker) -> AsyncIterator[ReportServer]:
    server = ReportServer("127.0.0.1", 0, ready=worker.ready, report=worker.report)
    await server.open()
    try:
        yield server
    finally:
        await server.close()


async def ask(server: ReportServer, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(request)
        return await reader.read()
    finally:
        writer.close()


async def open_connections(
    server: ReportServer, number: int, request: bytes = b""
) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Return connections of which the server has read the requests, if there are any."""
    found = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(number)]
    for _, writer in found:
        writer.write(request)
    while request and sum(server._connections.values()) < number:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return found


async def get(server: ReportServer, path: str, method: str = "GET") -> tuple[int, Any]:
    answer = await ask(server, f"{method} {path} HTTP/1.1\r\nHost: there\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return int(head.split()[1]), json.loads(body)


async def test_it_answers_probes_and_reports() -> None:
    worker = Worker()
    async with served(worker) as server:
        assert await get(server, "/healthz") == (200, {"ready": True})
        assert await get(server, "/readyz?verbose") == (200, {"ready": True})
        report = {"running": 2, "service": 1.5, "limited_by": "upstream:openai:rpm", "draining": False}
        assert await get(server, "/report") == (200, report)
        worker.is_ready = False  # it starts, or drains
        assert await get(server, "/healthz") == (200, {"ready": False})
        assert await get(server, "/readyz") == (503, {"ready": False})
        assert (await get(server, "/report"))[0] == 503
        assert (await get(server, "/"))[0] == 404
        assert (await get(server, "/report", "DELETE"))[0] == 405


@pytest.mark.parametrize("request_", [b"", b"\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET", b"a" * 20_000 + b"\r\n\r\n"])
async def test_what_is_no_request_does_no_harm(request_: bytes) -> None:
    worker = Worker()
    async with served(worker) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with contextlib.suppress(OSError):
            writer.write(request_)
            writer.write_eof()
            assert (await reader.read())[:12] in (b"", b"HTTP/1.1 404")
        writer.close()
        assert await get(server, "/healthz") == (200, {"ready": True})


async def test_connections_are_bounded_and_cut_off_when_it_closes() -> None:
    worker = Worker()
    worker.hangs = True
    async with served(worker) as server:
        open_ones = await open_connections(server, 64, b"GET /report HTTP/1.1\r\n\r\n")
        assert await get(server, "/healthz") == (200, {"ready": True})
        assert await open_ones[0][0].read() == b""  # the oldest made room
        assert len(server._connections) == 63
    for reader, writer in open_ones:
        with contextlib.suppress(OSError):
            assert await reader.read() == b""
        writer.close()
    assert not server._connections


async def test_who_asks_nothing_keeps_nobody_out() -> None:
    worker = Worker()
    worker.hangs = True
    async with served(worker) as server:
        asking = await open_connections(server, 1, b"GET /report HTTP/1.1\r\n\r\n")
        idle = await open_connections(server, 200)
        assert await get(server, "/healthz") == (200, {"ready": True})
        assert len(server._connections) == 63
        assert await idle[0][0].read() == b""
        assert not asking[0][0].at_eof()
        worker.hangs = False
        for _, writer in [*asking, *idle]:
            writer.close()


async def test_metrics_are_text_and_there_before_it_is_ready() -> None:
    worker = Worker()
    worker.is_ready = False
    server = ReportServer(
        "127.0.0.1", 0, ready=worker.ready, report=worker.report, metrics=lambda: "forebay_desired_replicas 3\n"
    )
    await server.open()
    try:
        answer = await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert b"\r\nContent-Type: text/plain; version=0.0.4\r\n" in answer
        assert answer.endswith(b"\r\n\r\nforebay_desired_replicas 3\n")
        assert (await get(server, "/metric"))[1] == {"paths": ["/healthz", "/readyz", "/report", "/metrics"]}
    finally:
        await server.close()


async def test_a_worker_has_no_metrics() -> None:
    async with served(Worker()) as server:
        assert await get(server, "/metrics") == (404, {"paths": ["/healthz", "/readyz", "/report"]})


async def test_an_address_that_is_taken_is_an_error_in_words() -> None:
    worker = Worker()
    async with served(worker) as server:
        again = ReportServer(
            "127.0.0.1", server.port, ready=worker.ready, report=worker.report, owner="forebay autoscale"
        )
        with pytest.raises(InvalidSetting, match=r"forebay autoscale.*listen.*that is free \(.*in use"):
            await again.open()
