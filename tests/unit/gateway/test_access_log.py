"""The access log: what holds up its writer stops no call, and what is lost is counted."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.support.gateway_harness import until

from forebay.gateway import access_log
from forebay.gateway.access_log import AccessEntry, AccessLog, CannotWriteLog, format_text

ENTRY = AccessEntry(
    time="2026-11-30T09:12:44.310Z",
    request_id="id-1",
    provider_request_id=None,
    method="POST",
    path="/v1/chat/completions",
    status=200,
    result="answered",
    tenant="acme",
    key=None,
    target="openai",
    model="gpt-4o",
    account="upstream:openai:gpt-4o",
    waited_seconds=0.0,
    first_output_seconds=None,
    duration_seconds=2.034,
    attempts=1,
    input_tokens=812,
    output_tokens=214,
    cost_usd=0.00417,
    limited_by=None,
)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Return a named pipe, and a file descriptor that reads from it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield str(path), reader
    os.close(reader)


async def read_lines(reader: int, lines: int) -> list[bytes]:
    """Return so many lines from a pipe."""
    received = b""
    while received.count(b"\n") < lines:
        try:
            received += os.read(reader, 1 << 16)
        except BlockingIOError:
            await asyncio.sleep(0)
    return received.splitlines()


async def test_a_pipe_that_nobody_reads_holds_up_nobody(
    pipe: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    path, reader = pipe
    log = AccessLog("json", path)
    with caplog.at_level(logging.WARNING, "forebay"):
        for number in range(access_log._MAX_HELD + 500):
            log.add(functools.partial(msgspec.structs.replace, ENTRY, request_id=f"{number}"))
    assert log.dropped == 500
    assert "were not written: they come faster than they can be written" in caplog.text
    lines = await read_lines(reader, access_log._MAX_HELD)
    assert [json.loads(line)["request_id"] for line in lines] == [f"{n}" for n in range(access_log._MAX_HELD)]
    await until(lambda: log._writing is None)
    log.add(lambda: ENTRY)
    assert len(await read_lines(reader, 1)) == 1
    await log.close()


async def test_closing_does_not_wait_for_a_pipe_that_nobody_reads(pipe: tuple[str, int]) -> None:
    path, reader = pipe
    log = AccessLog("text", path)
    for _ in range(access_log._MAX_HELD):  # more than a pipe holds
        log.add(lambda: ENTRY)
    await log.close(seconds=0.05)
    assert log.dropped == access_log._MAX_HELD
    await read_lines(reader, access_log._MAX_HELD)  # so that its thread ends


async def test_what_cannot_be_written_is_counted(pipe: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    path, _ = pipe
    log = AccessLog("text", path)
    os.close(log._file)
    log._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that writing fails
    log.add(lambda: ENTRY)
    await until(lambda: log.dropped == 1)
    assert "1 lines of the access log" in caplog.text
    await log.close()


async def test_a_file_that_cannot_be_opened_again_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    log = AccessLog("text", str(directory / "log"))
    moved = tmp_path / "moved"
    directory.rename(moved)
    log.reopen()
    log.add(lambda: ENTRY)
    await log.close()
    assert "It goes on in the old file" in caplog.text
    assert (moved / "log").read_bytes() == format_text(ENTRY)


@pytest.mark.parametrize("name", ["missing/log", "."])
def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(CannotWriteLog, match="Give another file"):
        AccessLog("text", str(tmp_path / name))


def test_others_may_not_read_it(tmp_path: Path) -> None:
    AccessLog("text", str(tmp_path / "log"))
    assert (tmp_path / "log").stat().st_mode & 0o007 == 0


def test_a_line_of_text() -> None:
    assert format_text(ENTRY).decode() == (
        "2026-11-30T09:12:44.310Z 200 answered POST /v1/chat/completions tenant=acme target=openai model=gpt-4o"
        " account=upstream:openai:gpt-4o waited=0.000 duration=2.034 attempts=1 tokens=812/214 usd=0.00417 id=id-1\n"
    )
