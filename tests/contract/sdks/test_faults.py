"""Failing calls: the caller gets the error that its SDK would raise for the provider itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock
from tests.contract.sdks.conftest import ProviderControl
from tests.contract.sdks.sdk_harness import BoundClient, SdkCaller, SdkHarness

from forebay import Overloaded
from forebay.simulation import Faults

LONG: Any = {"extra_headers": {"x-simulated-output-tokens": "200"}, "max_tokens": 200}


def error_of(call: Callable[[], object]) -> Any:
    """Return the exception that `call` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is checked by the test
        call()
    return caught.value


def check_same(one: Any, other: Any) -> None:
    """Check that two errors of an SDK are the same."""
    assert type(one) is type(other)
    assert one.status_code == other.status_code
    assert one.message == other.message
    assert one.body == other.body


def test_a_client_error_is_not_retried(harness: SdkHarness, mock: LLMock, mock_url: str) -> None:
    path, bare = harness.open(mock_url), harness.bare(mock_url)
    for number, status in enumerate((400, 401, 403, 404, 413, 422), start=1):
        mock.fail(status, times=4)
        check_same(error_of(path.caller.create), error_of(bare.create))
        check_same(error_of(path.caller.parts), error_of(bare.parts))
        assert len(mock.requests) == 4 * number
    assert path.is_idle()


@pytest.mark.parametrize("status", [408, 409, 500, 502])
def test_a_fault_is_retried_as_often_as_the_upstream_allows(
    harness: SdkHarness, mock: LLMock, mock_url: str, status: int
) -> None:
    mock.fail(status, times=None)
    path, bare = harness.open(mock_url, max_attempts=3), harness.bare(mock_url)
    error = error_of(path.caller.create)
    assert len(mock.requests) == 3
    check_same(error, error_of(bare.create))
    error_of(path.caller.with_options(max_retries=5, timeout=7).create)
    assert len(mock.requests) == 3 + 1 + 3
    assert path.is_idle()


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_throttled_call_that_waits_in_vain_gets_the_providers_error(
    harness: SdkHarness, mock: LLMock, mock_url: str, status: int
) -> None:
    mock.fail(status, times=None, retry_after=3600)
    path, bare = harness.open(mock_url, max_wait=1.0), harness.bare(mock_url)
    error = error_of(path.caller.create)
    assert len(mock.requests) == 1
    check_same(error, error_of(bare.create))
    assert path.is_idle()


def test_a_long_retry_after_is_respected(harness: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.rate_limit(times=None, retry_after=86_400)
    path = harness.open(mock_url, max_wait=10.0)
    assert isinstance(error_of(path.caller.create), harness.sdk.module.RateLimitError)
    error = error_of(path.caller.with_options(max_retries=0).create)  # else a caller of the gateway would retry
    assert (
        isinstance(error, Overloaded)
        if isinstance(path, BoundClient)
        else "x-forebay-limited-by" in error.response.headers
    )
    assert len(mock.requests) == 1
    assert path.is_idle()


def test_faults_and_throttling_are_retried(harness: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.rate_limit(times=2, retry_after=0.01).fail(500, times=2).fail(529, times=1, retry_after=0.01)
    path = harness.open(mock_url)
    assert sum(harness.sdk.used(path.caller.create())) > 0
    assert len(mock.requests) == 6
    assert path.is_idle()


def test_an_account_at_its_spend_cap_is_called_once(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(spend_cap=0.0)
    path, bare = harness.open(provider.url), harness.bare(provider.url)
    error = error_of(path.caller.create)
    assert provider.calls == 1
    other = error_of(bare.create)
    assert (type(error), error.status_code) == (type(other), other.status_code)
    path.check_rejection(error_of(path.caller.create), 402, "budget")  # the next call is rejected here
    assert provider.calls == 2
    assert path.is_idle()


def test_an_html_error_page_is_passed_on(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(faults=Faults(bad_gateway=1.0))
    path, bare = harness.open(provider.url, max_attempts=1), harness.bare(provider.url)
    check_same(error_of(path.caller.create), error_of(bare.create))
    assert path.is_idle()


def test_errors_have_a_request_id(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url)
    error = error_of(lambda: path.caller.create(model="no-such-model"))
    assert isinstance(error, harness.sdk.module.NotFoundError)
    assert error.request_id.startswith("req_")
    assert error.response.headers["x-should-retry"] == "false"
    assert provider.calls == 1


def test_responses_that_break_off_are_retried(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(faults=Faults(cut=0.3, error=0.1))  # more would use up the retry budget of ten calls
    path = harness.open(provider.url, max_attempts=30)
    assert all(harness.sdk.used(path.caller.create())[1] == 40 for _ in range(10))
    assert path.is_idle()


def test_a_response_that_always_breaks_off_is_a_connection_error(
    harness: SdkHarness, provider: ProviderControl
) -> None:
    provider.configure(faults=Faults(cut=1.0))
    path = harness.open(provider.url, max_attempts=2)
    sdk = harness.sdk.module
    error = error_of(lambda: path.caller.create(**LONG))
    assert isinstance(error, sdk.APIConnectionError if isinstance(path, BoundClient) else sdk.InternalServerError)
    assert provider.calls == 2
    assert path.is_idle()


def test_a_provider_that_is_down_is_a_connection_error(harness: SdkHarness) -> None:
    path = harness.open("http://127.0.0.1:9", max_attempts=2)
    sdk = harness.sdk.module
    error = error_of(path.caller.create)
    assert isinstance(error, sdk.APIConnectionError if isinstance(path, BoundClient) else sdk.InternalServerError)
    assert path.is_idle()


def test_streams_that_break_off_are_errors(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(faults=Faults(cut=1.0))
    path = harness.open(provider.url)
    for _ in range(5):
        assert isinstance(error_of(lambda: path.caller.parts(**LONG)), harness.sdk.broken)
    assert provider.statistics()["cut"] == 5
    assert path.is_idle()


def test_an_error_event_in_a_stream_is_raised(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(faults=Faults(late_error=1.0))
    path, bare = harness.open(provider.url), harness.bare(provider.url)
    one, other = error_of(lambda: path.caller.parts(**LONG)), error_of(lambda: bare.parts(**LONG))
    assert type(one) is type(other)
    if harness.sdk.name == "openai":  # the message of Anthropic's names the request
        assert one.message == other.message
    assert path.is_idle()


@pytest.mark.parametrize("fault", ["disconnect", "truncate", "corrupt"])
def test_broken_streams_release_everything(harness: SdkHarness, mock: LLMock, mock_url: str, fault: str) -> None:
    getattr(mock, fault)(after_chunks=2, times=None)
    path, bare = harness.open(mock_url), harness.bare(mock_url)
    for _ in range(2):
        one, other = _outcome(path.caller), _outcome(bare)
        assert isinstance(one, harness.sdk.broken) is isinstance(other, harness.sdk.broken)
        assert not isinstance(one, Overloaded)
    assert path.is_idle()


def test_a_stalled_stream_times_out(harness: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.stall(after_chunks=2, times=None)
    path = harness.open(mock_url)
    assert isinstance(_outcome(path.caller.with_options(timeout=0.3)), harness.sdk.broken)
    assert path.is_idle()


def _outcome(caller: SdkCaller) -> object:
    try:
        return caller.parts()
    except Exception as error:  # noqa: BLE001 - it is compared
        return error


def test_the_breaker_opens_for_a_broken_provider(harness: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.outage(status=500)
    path = harness.open(mock_url, max_attempts=1)
    for _ in range(5):
        assert isinstance(error_of(path.caller.create), harness.sdk.module.InternalServerError)
    caller = path.caller.with_options(max_retries=0)  # else a caller of the gateway would retry by itself
    path.check_rejection(error_of(caller.create), 503 if harness.sdk.name == "openai" else 529, "breaker")
    assert len(mock.requests) == 5
    assert path.is_idle()
