"""Who does not wait for the end of an answer gives its place back at once, and the provider is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.contract.sdks.conftest import Plant
from tests.contract.sdks.sdk_harness import SDKS, SdkHarness, until
from tests.contract.sdks.test_faults import error_of

ENDLESS: Any = {"extra_headers": {"x-simulated-output-tokens": "1000000"}, "max_tokens": 1_000_000}


def test_a_stream_is_given_up_half_way(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url, max_concurrent=1)
    for number in (1, 2):
        with way.caller.begin(**ENDLESS):
            assert [account.in_flight for account in way.accounts] == [1]
        assert way.is_idle()
        until(lambda number=number: plant.told()["hung_up"] == number)  # type: ignore[misc]
    assert house.sdk.used(way.caller.create())[1] == 40  # its place is free


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_timeout_is_the_callers_own(house: SdkHarness, plant: Plant, stream: bool) -> None:  # noqa: FBT001
    plant.be(ttft=300.0)
    way, bare = house.open(plant.url, max_attempts=1), house.bare(plant.url, timeout=0.3)
    caller = way.caller.with_options(timeout=0.3, max_retries=0)
    error, other = (error_of(one.parts if stream else one.create) for one in (caller, bare))
    assert type(error) is type(other)
    assert "Timeout" in type(error).__name__
    assert way.is_idle()
    until(lambda: plant.told()["in_flight"] == 0)  # long before it would have answered


@pytest.mark.parametrize("sdk", [sdk for sdk in SDKS if sdk.awaits], ids=str)
def test_a_call_is_cancelled_while_it_waits(house: SdkHarness, plant: Plant) -> None:
    plant.be(ttft=300.0)
    way = house.open(plant.url, max_concurrent=1)

    async def leave(client: Any) -> None:
        calls = [asyncio.create_task(house.sdk.create(client)) for _ in range(2)]  # one is served, one is in line
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, until, lambda: plant.told()["in_flight"] == 1)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)

    way.caller.do(leave)
    assert way.is_idle()
    until(lambda: plant.told()["in_flight"] == 0)
    assert plant.told()["hung_up"] >= 1  # two where the second had its turn before it was seen to leave
