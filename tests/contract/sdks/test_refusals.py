"""What Forebay refuses ends in an exception of the SDK's own family, at once, and costs nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.contract.sdks.conftest import Plant
from tests.contract.sdks.sdk_harness import SDKS, SdkHarness, ThroughGateway, until
from tests.contract.sdks.test_faults import error_of

from forebay.quota import Price

LONG: Any = {"extra_headers": {"x-simulated-output-tokens": "100000"}, "max_tokens": 100_000}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_quota_that_is_used_up(house: SdkHarness, plant: Plant, stream: bool) -> None:  # noqa: FBT001
    way = house.open(plant.url, rpm=1, max_wait=5.0)
    caller = way.caller.with_options(max_retries=0)  # else a caller of the gateway would come back in a minute
    caller.create()
    error = error_of(lambda: caller.create(stream=stream))
    way.check_rejection(error, 429, "requests per minute")
    if isinstance(way, ThroughGateway):
        assert 0 < int(error.response.headers["retry-after-ms"]) <= 130_000
    else:
        assert 0 < error.retry_after <= 130
        for asked in (
            way.caller,
            way.caller.with_options(max_retries=3, timeout=7),
        ):  # no SDK calls again, whatever it is told
            way.check_rejection(error_of(asked.create), 429, "requests per minute")
    assert plant.asked == 1
    assert way.is_idle()


def test_a_budget_that_is_spent(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url, budget_usd=60.0, prices={"*": Price(input=0, output=1e6)})
    way.caller.create()
    way.check_rejection(error_of(way.caller.create), 402, "budget")
    way.check_rejection(error_of(lambda: way.caller.create(stream=True)), 402, "budget")
    assert plant.asked == 1
    if isinstance(way, ThroughGateway):
        assert way.count_responses(402) == 2  # an SDK that would ask again did not
    assert way.upstream.statistics().spent_usd == 40.0
    assert way.is_idle()


def test_a_call_that_is_larger_than_its_bucket(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url, output_tpm=30)
    way.check_rejection(error_of(way.caller.create), 413, "output tokens per minute")
    assert plant.asked == 0


def test_a_deadline_that_has_passed(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url)
    way.check_rejection(error_of(way.within(-1.0).create), 408, "deadline")
    assert plant.asked == 0


def test_a_full_limit_and_a_deadline_that_is_too_near(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url, max_concurrent=1)
    with way.caller.begin(**LONG):
        error = error_of(way.within(0.5).with_options(max_retries=0).create)
    way.check_rejection(error, 429, "line")
    assert plant.told()["calls"] == 1
    assert way.is_idle()


def test_who_has_to_wait_gets_a_turn(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url, max_concurrent=1)
    assert len({answer.id for answer in way.caller.many(4)}) == 4
    assert way.is_idle()
    until(lambda: plant.told()["in_flight"] == 0)


@pytest.mark.parametrize("house", [ThroughGateway], ids=["gateway"], indirect=True)
def test_whose_turn_does_not_come_is_told_so_before_it_gives_up(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url, max_concurrent=1)
    way.caller.create()  # so that it is known how long one takes
    with way.caller.begin(**LONG):
        error = error_of(
            way.caller.with_options(timeout=2.0, max_retries=0).create
        )  # a word that comes later is a timeout
    way.check_rejection(error, 429, "line")
    assert error.response.headers["x-should-retry"] == "true"
    assert way.is_idle()


@pytest.mark.slow
@pytest.mark.parametrize("house", [ThroughGateway], ids=["gateway"], indirect=True)
@pytest.mark.parametrize("sdk", [sdk for sdk in SDKS if not sdk.awaits], ids=str)
def test_and_comes_back_by_itself(house: SdkHarness, plant: Plant) -> None:
    plant.be(tpot=0.001)
    way = house.open(plant.url, max_concurrent=1)
    way.caller.create()
    three_seconds: Any = {"extra_headers": {"x-simulated-output-tokens": "3000"}, "max_tokens": 3000}
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(way.caller.create, **three_seconds)
        until(lambda: plant.told()["in_flight"] == 1)
        answer = way.caller.with_options(timeout=1.0, max_retries=9).create()
        assert house.sdk.used(answer)[1] == 40
        holder.result()
    assert isinstance(way, ThroughGateway)
    assert way.count_responses(429) >= 1
    assert way.count_responses(200) == 3
    assert way.is_idle()
