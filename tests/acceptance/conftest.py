"""Fixtures of the acceptance tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.gateway_harness import GatewayHarness, gateway_harness
from tests.support.issued_keys import IssuedKeys
from tests.support.task_stores import STORES, StoreBackend


@pytest.fixture
async def harness() -> AsyncIterator[GatewayHarness]:
    async with gateway_harness() as started:
        yield started


@pytest.fixture
def keys(tmp_path: Path) -> IssuedKeys:
    """The keys that a gateway has issued, none yet."""
    return IssuedKeys(tmp_path / "keys.db")


@pytest.fixture(params=STORES, ids=str)
def overflow(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    backend: StoreBackend = request.param
    return backend.fast_url(tmp_path)


@pytest.fixture(params=[None, *STORES], ids=str)
def any_overflow(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    backend: StoreBackend | None = request.param
    return None if backend is None else backend.fast_url(tmp_path)
