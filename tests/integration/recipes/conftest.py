"""Fixtures: a gateway's harness, aimock as the provider, and programs that run beside the event loop."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tests.contract.sdks.aimock import Aimock, running
from tests.support.gateway_harness import GatewayHarness, gateway_harness

HERE = Path(__file__).parent
Run: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]


@pytest.fixture
async def harness() -> AsyncIterator[GatewayHarness]:
    async with gateway_harness() as started:
        yield started


@pytest.fixture(scope="module")
def aimock_url() -> Iterator[str]:
    with running(HERE / "aimock.json") as url:
        yield url


@pytest.fixture
def aimock(aimock_url: str) -> Aimock:
    return Aimock(aimock_url)


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    """Return what runs a program to its end, and returns the JSON that it prints. It is killed with its test."""
    started: list[asyncio.subprocess.Process] = []

    async def run_program(*command: str, environment: Mapping[str, str] | None = None, cwd: Path = HERE) -> Any:
        program = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=cwd,
        )
        started.append(program)
        output, errors = await program.communicate()
        try:
            return json.loads(output)
        except ValueError:
            pytest.fail(f"{command[0]} printed no JSON: {output.decode()}\n{errors.decode()}")

    yield run_program
    for program in started:
        if program.returncode is None:
            program.kill()
            await program.wait()
