"""Every promise is asked of each SDK, sync and async, by each way; providers are the plant, llmock and aimock."""

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


@pytest.fixture(params=CALL_PATHS, ids=lambda way: way.name)
def house(request: pytest.FixtureRequest, sdk: Sdk) -> Iterator[SdkHarness]:
    with contextlib.ExitStack() as stack:
        yield SdkHarness(request.param, sdk, stack)


@pytest.fixture(scope="session")
def process() -> Iterator[ProviderProcess]:
    with start_provider(config()) as plant:
        yield plant


class Plant:
    """The simulated provider of a test, which is as it is made to be."""

    def __init__(self, process: ProviderProcess) -> None:
        self._process = process
        self.url = process.url
        self.be()

    def be(self, **how: Any) -> None:
        """Begin anew, like this."""
        self._process.reset(config(**how))

    def told(self) -> dict[str, Any]:
        """Its statistics."""
        return self._process.statistics()

    @property
    def asked(self) -> int:
        """How many calls it has answered, whatever it said."""
        return sum(self.told()["by_status"].values())


@pytest.fixture
def plant(process: ProviderProcess) -> Plant:
    return Plant(process)


@pytest.fixture(scope="session")
def mock_server() -> Iterator[LLMockServer]:
    with LLMockServer() as server:
        yield server


@pytest.fixture
def mock(mock_server: LLMockServer) -> LLMock:
    return LLMock(mock_server).reset()


@pytest.fixture
def mock_url(mock: LLMock, sdk: Sdk) -> str:
    """Where a provider of the SDK's protocol is."""
    return mock.base_url(sdk.name).removesuffix("/v1")
