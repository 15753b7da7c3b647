"""Rejections by Forebay: an exception of the SDK's family, at once, without a call to the provider."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.contract.sdks.conftest import ProviderControl
from tests.contract.sdks.sdk_harness import SDKS, SdkHarness, ThroughGateway, until
from tests.contract.sdks.test_faults import error_of

from forebay.quota import Price

LONG: Any = {"extra_headers": {"x-simulated-output-tokens": "100000"}, "max_tokens": 100_000}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_quota_that_is_used_up_rejects(harness: SdkHarness, provider: ProviderControl, stream: bool) -> None:  # noqa: FBT001
    path = harness.open(provider.url, rpm=1, max_wait=5.0)
    caller = path.caller.with_options(max_retries=0)  # else a caller of the gateway would retry after a minute
    caller.create()
    error = error_of(lambda: caller.create(stream=stream))
    path.check_rejection(error, 429, "requests per minute")
    if isinstance(path, ThroughGateway):
        assert 0 < int(error.response.headers["retry-after-ms"]) <= 130_000
    else:
        assert 0 < error.retry_after <= 130
        for caller in (path.caller, path.caller.with_options(max_retries=3, timeout=7)):  # no SDK retries it
            path.check_rejection(error_of(caller.create), 429, "requests per minute")
    assert provider.calls == 1
    assert path.is_idle()


def test_a_budget_that_is_spent_rejects(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url, budget_usd=60.0, prices={"*": Price(input=0, output=1e6)})
    path.caller.create()
    path.check_rejection(error_of(path.caller.create), 402, "budget")
    path.check_rejection(error_of(lambda: path.caller.create(stream=True)), 402, "budget")
    assert provider.calls == 1
    if isinstance(path, ThroughGateway):
        assert path.count_responses(402) == 2  # the SDK did not retry
    assert path.upstream.statistics().spent_usd == 40.0
    assert path.is_idle()


def test_a_call_that_exceeds_its_whole_quota_is_rejected(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url, output_tpm=30)
    path.check_rejection(error_of(path.caller.create), 413, "output tokens per minute")
    assert provider.calls == 0


def test_a_call_after_its_deadline_is_rejected(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url)
    path.check_rejection(error_of(path.within(-1.0).create), 408, "deadline")
    assert provider.calls == 0


def test_a_call_whose_deadline_comes_before_its_turn_is_rejected(
    harness: SdkHarness, provider: ProviderControl
) -> None:
    path = harness.open(provider.url, max_concurrent=1)
    with path.caller.start_stream(**LONG):
        error = error_of(path.within(0.5).with_options(max_retries=0).create)
    path.check_rejection(error, 429, "queue")
    assert provider.statistics()["calls"] == 1
    assert path.is_idle()


def test_queued_calls_are_served(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url, max_concurrent=1)
    assert len({response.id for response in path.caller.many(4)}) == 4
    assert path.is_idle()
    until(lambda: provider.statistics()["in_flight"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("harness", [ThroughGateway], ids=["gateway"], indirect=True)
def test_a_queued_call_is_rejected_before_its_caller_times_out(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url, max_concurrent=1)
    path.caller.create()  # so that the latency is known
    with path.caller.start_stream(**LONG):
        error = error_of(
            path.caller.with_options(timeout=2.0, max_retries=0).create
        )  # a later response would be a timeout
    path.check_rejection(error, 429, "queue")
    assert error.response.headers["x-should-retry"] == "true"
    assert path.is_idle()


@pytest.mark.slow
@pytest.mark.parametrize("harness", [ThroughGateway], ids=["gateway"], indirect=True)
@pytest.mark.parametrize("sdk", [sdk for sdk in SDKS if not sdk.awaits], ids=str)
def test_a_rejected_caller_retries_by_itself(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(tpot=0.001)
    path = harness.open(provider.url, max_concurrent=1)
    path.caller.create()
    three_seconds: Any = {"extra_headers": {"x-simulated-output-tokens": "3000"}, "max_tokens": 3000}
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(path.caller.create, **three_seconds)
        until(lambda: provider.statistics()["in_flight"] == 1)
        response = path.caller.with_options(timeout=1.0, max_retries=9).create()
        assert harness.sdk.used(response)[1] == 40
        holder.result()
    assert isinstance(path, ThroughGateway)
    assert path.count_responses(429) >= 1
    assert path.count_responses(200) == 3
    assert path.is_idle()
