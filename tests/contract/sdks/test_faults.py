"""When the provider goes wrong, the caller gets the error that its SDK would have raised of the provider itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock
from tests.contract.sdks.conftest import Plant
from tests.contract.sdks.sdk_harness import BoundClient, SdkCaller, SdkHarness

from forebay import Overloaded
from forebay.simulation import Faults

LONG: Any = {"extra_headers": {"x-simulated-output-tokens": "200"}, "max_tokens": 200}


def error_of(ask: Callable[[], object]) -> Any:
    """What it raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one, is what is asked
        ask()
    return caught.value


def same(one: Any, other: Any) -> None:
    """Two errors by which an SDK says the same."""
    assert type(one) is type(other)
    assert one.status_code == other.status_code
    assert one.message == other.message
    assert one.body == other.body


def test_what_the_request_is_to_blame_for_is_asked_once(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    way, bare = house.open(mock_url), house.bare(mock_url)
    for number, status in enumerate((400, 401, 403, 404, 413, 422), start=1):
        mock.fail(status, times=4)
        same(error_of(way.caller.create), error_of(bare.create))
        same(error_of(way.caller.parts), error_of(bare.parts))
        assert len(mock.requests) == 4 * number
    assert way.is_idle()


@pytest.mark.parametrize("status", [408, 409, 500, 502])
def test_what_may_be_cured_is_asked_as_often_as_the_upstream_says(
    house: SdkHarness, mock: LLMock, mock_url: str, status: int
) -> None:
    mock.fail(status, times=None)
    way, bare = house.open(mock_url, max_attempts=3), house.bare(mock_url)
    error = error_of(way.caller.create)
    assert len(mock.requests) == 3
    same(error, error_of(bare.create))
    error_of(way.caller.with_options(max_retries=5, timeout=7).create)
    assert len(mock.requests) == 3 + 1 + 3
    assert way.is_idle()


@pytest.mark.parametrize("status", [429, 503, 529])
def test_not_now_is_waited_for_in_vain_and_handed_on(
    house: SdkHarness, mock: LLMock, mock_url: str, status: int
) -> None:
    mock.fail(status, times=None, retry_after=3600)
    way, bare = house.open(mock_url, max_wait=1.0), house.bare(mock_url)
    error = error_of(way.caller.create)
    assert len(mock.requests) == 1
    same(error, error_of(bare.create))
    assert way.is_idle()


def test_a_long_retry_after_is_kept(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.rate_limit(times=None, retry_after=86_400)
    way = house.open(mock_url, max_wait=10.0)
    assert isinstance(error_of(way.caller.create), house.sdk.module.RateLimitError)
    error = error_of(way.caller.with_options(max_retries=0).create)  # else a caller of the gateway would come back
    assert (
        isinstance(error, Overloaded)
        if isinstance(way, BoundClient)
        else "x-forebay-limited-by" in error.response.headers
    )
    assert len(mock.requests) == 1
    assert way.is_idle()


def test_faults_and_refusals_are_mended_on_the_way(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.rate_limit(times=2, retry_after=0.01).fail(500, times=2).fail(529, times=1, retry_after=0.01)
    way = house.open(mock_url)
    assert sum(house.sdk.used(way.caller.create())) > 0
    assert len(mock.requests) == 6
    assert way.is_idle()


def test_an_account_whose_money_is_spent_is_asked_once(house: SdkHarness, plant: Plant) -> None:
    plant.be(spend_cap=0.0)
    way, bare = house.open(plant.url), house.bare(plant.url)
    error = error_of(way.caller.create)
    assert plant.asked == 1
    told = error_of(bare.create)
    assert (type(error), error.status_code) == (type(told), told.status_code)
    way.check_rejection(error_of(way.caller.create), 402, "budget")  # and who comes next is told here
    assert plant.asked == 2
    assert way.is_idle()


def test_errors_that_are_a_page_of_html_pass(house: SdkHarness, plant: Plant) -> None:
    plant.be(faults=Faults(bad_gateway=1.0))
    way, bare = house.open(plant.url, max_attempts=1), house.bare(plant.url)
    same(error_of(way.caller.create), error_of(bare.create))
    assert way.is_idle()


def test_errors_name_their_request(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url)
    error = error_of(lambda: way.caller.create(model="no-such-model"))
    assert isinstance(error, house.sdk.module.NotFoundError)
    assert error.request_id.startswith("req_")
    assert error.response.headers["x-should-retry"] == "false"
    assert plant.asked == 1


def test_answers_that_break_off_are_asked_for_again(house: SdkHarness, plant: Plant) -> None:
    plant.be(faults=Faults(cut=0.5, error=0.2))
    way = house.open(plant.url, max_attempts=30)
    assert all(house.sdk.used(way.caller.create())[1] == 40 for _ in range(10))
    assert way.is_idle()


def test_one_that_always_breaks_off_is_a_broken_connection(house: SdkHarness, plant: Plant) -> None:
    plant.be(faults=Faults(cut=1.0))
    way = house.open(plant.url, max_attempts=2)
    sdk = house.sdk.module
    error = error_of(lambda: way.caller.create(**LONG))
    assert isinstance(error, sdk.APIConnectionError if isinstance(way, BoundClient) else sdk.InternalServerError)
    assert plant.asked == 2
    assert way.is_idle()


def test_a_provider_that_is_down_is_one_too(house: SdkHarness) -> None:
    way = house.open("http://127.0.0.1:9", max_attempts=2)
    sdk = house.sdk.module
    error = error_of(way.caller.create)
    assert isinstance(error, sdk.APIConnectionError if isinstance(way, BoundClient) else sdk.InternalServerError)
    assert way.is_idle()


def test_streams_that_break_off_are_never_taken_for_whole(house: SdkHarness, plant: Plant) -> None:
    plant.be(faults=Faults(cut=1.0))
    way = house.open(plant.url)
    for _ in range(5):
        assert isinstance(error_of(lambda: way.caller.parts(**LONG)), house.sdk.broken)
    assert plant.told()["cut"] == 5
    assert way.is_idle()


def test_a_breakdown_that_the_stream_tells_of_is_raised(house: SdkHarness, plant: Plant) -> None:
    plant.be(faults=Faults(late_error=1.0))
    way, bare = house.open(plant.url), house.bare(plant.url)
    one, other = error_of(lambda: way.caller.parts(**LONG)), error_of(lambda: bare.parts(**LONG))
    assert type(one) is type(other)
    if house.sdk.name == "openai":  # the message of Anthropic's names the request
        assert one.message == other.message
    assert way.is_idle()


@pytest.mark.parametrize("fault", ["disconnect", "truncate", "corrupt"])
def test_streams_that_go_wrong_leave_nothing_behind(house: SdkHarness, mock: LLMock, mock_url: str, fault: str) -> None:
    getattr(mock, fault)(after_chunks=2, times=None)
    way, bare = house.open(mock_url), house.bare(mock_url)
    for _ in range(2):
        one, other = _outcome(way.caller), _outcome(bare)
        assert isinstance(one, house.sdk.broken) is isinstance(other, house.sdk.broken)
        assert not isinstance(one, Overloaded)
    assert way.is_idle()


def test_a_stream_that_stands_still_is_left(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.stall(after_chunks=2, times=None)
    way = house.open(mock_url)
    assert isinstance(_outcome(way.caller.with_options(timeout=0.3)), house.sdk.broken)
    assert way.is_idle()


def _outcome(caller: SdkCaller) -> object:
    try:
        return caller.parts()
    except Exception as error:  # noqa: BLE001 - it is compared
        return error


def test_a_broken_provider_is_left_alone_for_a_while(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.outage(status=500)
    way = house.open(mock_url, max_attempts=1)
    for _ in range(5):
        assert isinstance(error_of(way.caller.create), house.sdk.module.InternalServerError)
    away = way.caller.with_options(max_retries=0)  # else a caller of the gateway would come back by itself
    way.check_rejection(error_of(away.create), 503 if house.sdk.name == "openai" else 529, "breaker")
    assert len(mock.requests) == 5
    assert way.is_idle()
