"""Callers that leave early: their slot is released at once, and the call to the provider ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.contract.sdks.conftest import ProviderControl
from tests.contract.sdks.sdk_harness import SDKS, SdkHarness, until
from tests.contract.sdks.test_faults import error_of

ENDLESS: Any = {"extra_headers": {"x-simulated-output-tokens": "1000000"}, "max_tokens": 1_000_000}


def test_a_stream_may_be_closed_early(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url, max_concurrent=1)
    for number in (1, 2):
        with path.caller.start_stream(**ENDLESS):
            assert [account.in_flight for account in path.accounts] == [1]
        assert path.is_idle()
        until(lambda number=number: provider.statistics()["hung_up"] == number)  # type: ignore[misc]
    assert harness.sdk.used(path.caller.create())[1] == 40  # its slot is free


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_timeout_is_that_of_the_caller(harness: SdkHarness, provider: ProviderControl, stream: bool) -> None:  # noqa: FBT001
    provider.configure(ttft=300.0)
    path, bare = harness.open(provider.url, max_attempts=1), harness.bare(provider.url, timeout=0.3)
    caller = path.caller.with_options(timeout=0.3, max_retries=0)
    error, other = (error_of(one.parts if stream else one.create) for one in (caller, bare))
    assert type(error) is type(other)
    assert "Timeout" in type(error).__name__
    assert path.is_idle()
    until(lambda: provider.statistics()["in_flight"] == 0)  # long before it would respond


@pytest.mark.parametrize("sdk", [sdk for sdk in SDKS if sdk.awaits], ids=str)
def test_a_queued_call_can_be_cancelled(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(ttft=300.0)
    path = harness.open(provider.url, max_concurrent=1)

    async def leave(client: Any) -> None:
        calls = [asyncio.create_task(harness.sdk.create(client)) for _ in range(2)]  # one is in flight, one is queued
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, until, lambda: provider.statistics()["in_flight"] == 1)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)

    path.caller.do(leave)
    assert path.is_idle()
    until(lambda: provider.statistics()["in_flight"] == 0)
    assert provider.statistics()["hung_up"] >= 1  # two if the second was sent before its cancellation was seen
