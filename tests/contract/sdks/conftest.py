"""Fixtures: each test runs for each SDK, sync and async, bound and through a gateway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock
from llmock.testing import LLMockServer
from tests.contract.sdks.sdk_harness import CALL_PATHS, SDKS, Sdk, SdkHarness

from forebay.simulation import ProviderConfig, ProviderProcess, start_provider


def config(**rest: Any) -> ProviderConfig:
    return ProviderConfig(**({"ttft": 0.005, "tpot": 0.0002, "noise": 0.0, "slots": 100, "refusal_delay": 0.0} | rest))


@pytest.fixture(params=SDKS, ids=str)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    chosen: Sdk = request.param
    return chosen


@pytest.fixture(params=CALL_PATHS, ids=lambda path: path.name)
def harness(request: pytest.FixtureRequest, sdk: Sdk) -> Iterator[SdkHarness]:
    with contextlib.ExitStack() as stack:
        yield SdkHarness(request.param, sdk, stack)


@pytest.fixture(scope="session")
def process() -> Iterator[ProviderProcess]:
    with start_provider(config()) as running:
        yield running


class ProviderControl:
    """The simulated provider of a test, in its own process, which each test configures."""

    def __init__(self, process: ProviderProcess) -> None:
        self._process = process
        self.url = process.url
        self.configure()

    def configure(self, **fields: Any) -> None:
        """Start over with this configuration."""
        self._process.reset(config(**fields))

    def statistics(self) -> dict[str, Any]:
        """Return its statistics."""
        return self._process.statistics()

    @property
    def calls(self) -> int:
        """Return how many calls it has answered, with any status."""
        return sum(self.statistics()["by_status"].values())


@pytest.fixture
def provider(process: ProviderProcess) -> ProviderControl:
    return ProviderControl(process)


@pytest.fixture(scope="session")
def mock_server() -> Iterator[LLMockServer]:
    with LLMockServer() as server:
        yield server


@pytest.fixture
def mock(mock_server: LLMockServer) -> LLMock:
    return LLMock(mock_server).reset()


@pytest.fixture
def mock_url(mock: LLMock, sdk: Sdk) -> str:
    """Return the URL of llmock for the protocol of the SDK."""
    return mock.base_url(sdk.name).removesuffix("/v1")
