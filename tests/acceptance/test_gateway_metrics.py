"""The metrics of a gateway: their names, what each counts, and how many series callers can make."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import disable_created_metrics, enable_created_metrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics_families
from prometheus_client.parser import text_string_to_metric_families
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    CUT,
    DONE,
    EVENT,
    NOTHING_LEFT,
    STOP,
    GatewayHarness,
    leftovers,
    request_bytes,
    responding,
    streaming,
    until,
)
from tests.support.gateway_harness import raw as send_raw
from tests.support.metric_conventions import problems
from tests.support.metric_samples import samples, total

from forebay.gateway import FallbackSettings, GatewaySettings, TargetSettings
from forebay.gateway.forwarded_call import ForwardedCall
from forebay.gateway.metrics.bounded_label import OTHER
from forebay.gateway.metrics.metric_definitions import METRICS
from forebay.gateway.server import Gateway
from forebay.quota import Price


@pytest.fixture(autouse=True)
def without_creation_times() -> Iterator[None]:
    """Leave out series that OpenMetrics has of its own, as ``forebay gateway`` does."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    yield
    enable_created_metrics()  # type: ignore[no-untyped-call]


PRICES = {"*": Price(input=0, output=1e6)}  # a dollar for each token of an answer
CHAT: dict[str, str] = {
    "target": "openai",
    "gen_ai_operation_name": "chat",
    "gen_ai_provider_name": "openai",
    "gen_ai_request_model": "gpt-4o",
}
CACHED_USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 12},
    "completion_tokens_details": {"reasoning_tokens": 7},
}
IMPATIENT = {"x-stainless-read-timeout": "2"}
STREAM = {**CHAT_REQUEST, "stream": True}


def asking(model: str) -> dict[str, Any]:
    return {**CHAT_REQUEST, "model": model}


def answering(first: web.Response, harness: GatewayHarness) -> Any:
    """Return a behaviour that answers `first`, and then as usual."""
    left = [first]

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        if left:
            await request.read()
            return left.pop()
        return await harness.provider.reply(request)

    return behave


def throttling(harness: GatewayHarness) -> Any:
    """Return a behaviour that throttles the first attempt, and answers those after it."""
    return answering(web.Response(status=429, headers={"retry-after-ms": "1"}), harness)


async def call_in_every_way(harness: GatewayHarness, gateway: Gateway) -> None:
    """Make calls that are answered, streamed, throttled, retried, rejected and served by a fallback."""
    limits = {"x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "90"}
    headers = {**limits, "x-ratelimit-limit-tokens": "100000", "x-ratelimit-remaining-tokens": "90000"}
    harness.provider.behaviour = answering(web.json_response(CHAT_RESPONSE, headers=headers), harness)
    assert (await harness.post(gateway, "/spare/v1/chat/completions"))[0] == 200
    harness.provider.behaviour = throttling(harness)
    assert (await harness.post(gateway, "/spare/v1/chat/completions"))[0] == 200
    harness.provider.behaviour = streaming(EVENT, STOP, DONE)
    assert (await harness.post(gateway, json=STREAM))[0] == 200
    harness.provider.behaviour = harness.provider.reply
    assert (await harness.post(gateway, headers=IMPATIENT))[0] == 200  # by the fallback: the quota is used up
    assert (await harness.post(gateway, json=[], headers=IMPATIENT))[0] == 400
    assert (await harness.post(gateway, headers={"x-forebay-deadline": "1"}))[0] == 408


def settings_with_fallback(harness: GatewayHarness, **gateway: Any) -> GatewaySettings:
    spare = TargetSettings(name="spare", url=harness.url, provider="openai-compatible", prices=PRICES, budget_usd=1e6)
    elsewhere = FallbackSettings(target="spare", api_key_env="SPARE")
    own = TargetSettings(
        name="openai",
        url=harness.url,
        rpm=1,
        tpm=10**6,
        fallback=(elsewhere,),
        prices=PRICES,
        budget_usd=1e6,
        budget_alert=1e-12,
    )
    return GatewaySettings(targets=(own, spare), listen="127.0.0.1:0", **gateway)


# --- names ---


async def test_the_names_follow_the_conventions_of_prometheus(harness: GatewayHarness) -> None:
    async with Gateway(settings_with_fallback(harness), {"SPARE": "sk-spare"}) as gateway:
        await call_in_every_way(harness, gateway)
        assert problems(gateway.forwarder.metrics.render().decode()) == []


async def test_each_metric_has_the_type_and_the_labels_of_its_definition(harness: GatewayHarness) -> None:
    async with Gateway(settings_with_fallback(harness), {"SPARE": "sk-spare"}) as gateway:
        await call_in_every_way(harness, gateway)
        page = gateway.forwarder.metrics.render().decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert {metric.name.removesuffix("_total") for metric in METRICS} == set(families)
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        assert labels == {frozenset(metric.labels)}, metric.name


async def test_the_page_is_open_metrics_where_that_is_accepted(harness: GatewayHarness) -> None:
    accepted = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    async with Gateway(settings_with_fallback(harness), {"SPARE": "sk-spare"}) as gateway:
        await call_in_every_way(harness, gateway)
        async with harness.session.get(harness.at(gateway, "/metrics"), headers=accepted) as response:
            assert response.content_type == "application/openmetrics-text"
            names = {family.name for family in open_metrics_families(await response.text())}  # type: ignore[no-untyped-call]
        assert {metric.name.removesuffix("_total") for metric in METRICS} <= names
        async with harness.session.get(harness.at(gateway, "/metrics")) as response:
            assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_quotas_that_were_given_and_learned_have_series_of_their_own(harness: GatewayHarness) -> None:
    limits = {"x_ratelimit_limit_requests": "100", "x_ratelimit_remaining_requests": "40"}
    body = json.dumps(CHAT_RESPONSE).encode()
    harness.provider.behaviour = responding(200, body, content_type="application/json", **limits)
    async with Gateway(harness.settings(rpm=500)) as gateway:
        await harness.post(gateway)
        name, quota = "forebay_quota_limit_requests", "requests per minute"
        assert total(gateway, name, quota=quota, source="configured") == 500
        assert total(gateway, name, quota=quota, source="learned") == 100


# --- what is counted ---


async def test_a_call_is_counted_by_target_model_and_status(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        await harness.post(gateway)
        labels = {"target": "openai", "model": "gpt-4o", "status": "200"}
        for name in ("request_duration_seconds", "wait_seconds"):
            assert total(gateway, f"forebay_gateway_{name}_count", **labels) == 1
        assert total(gateway, "forebay_gateway_request_duration_seconds_sum", **labels) > 0
        assert total(gateway, "gen_ai_client_operation_duration_seconds_count", **CHAT, error_type="") == 1


async def test_a_call_that_waits_for_another_has_waited(harness: GatewayHarness) -> None:
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        began.set()
        await goes_on.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = behave
    async with Gateway(harness.settings(max_concurrent=1)) as gateway:
        first = asyncio.create_task(harness.post(gateway))
        await began.wait()
        second = asyncio.create_task(harness.post(gateway))
        await until(lambda: total(gateway, "forebay_calls_queued") == 1)
        await asyncio.sleep(0.02)  # it waits at least as long
        goes_on.set()
        await asyncio.gather(first, second)
        assert total(gateway, "forebay_gateway_wait_seconds_count") == 2
        assert total(gateway, "forebay_gateway_wait_seconds_sum") >= 0.02


async def test_a_rejected_call_is_counted_by_what_limits_it(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(rpm=1)) as gateway:
        statuses = [(await harness.post(gateway, headers=IMPATIENT))[0] for _ in range(2)]
        assert statuses == [200, 429]
        assert total(gateway, "forebay_gateway_rejections_total", limited_by="requests per minute") == 1
        assert total(gateway, "forebay_gateway_wait_seconds_count", status="429") == 1
        assert total(gateway, "forebay_attempts_total") == 1


async def test_an_attempt_that_was_throttled_and_its_retry_are_counted(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        await harness.post(gateway)
        harness.provider.behaviour = throttling(harness)
        assert (await harness.post(gateway))[0] == 200
        labels = {"target": "openai", "model": "gpt-4o"}
        assert total(gateway, "forebay_attempts_total", outcome="throttled", **labels) == 1
        assert total(gateway, "forebay_attempts_total", outcome="succeeded", **labels) == 2
        assert total(gateway, "forebay_retries_total", **labels) == 1
        assert total(gateway, "gen_ai_client_operation_duration_seconds_count", **CHAT, error_type="429") == 1
        assert total(gateway, "forebay_gateway_request_duration_seconds_count", **labels) == 2  # one for each call


async def test_a_call_that_a_fallback_serves_is_counted_for_both_targets(harness: GatewayHarness) -> None:
    async with Gateway(settings_with_fallback(harness), {"SPARE": "sk-spare"}) as gateway:
        statuses = [(await harness.post(gateway, headers=IMPATIENT))[0] for _ in range(2)]
        assert statuses == [200, 200]
        assert total(gateway, "forebay_fallbacks_total", target="openai", fallback_target="spare") == 1
        assert total(gateway, "forebay_attempts_total", target="spare") == 1
        assert total(gateway, "forebay_gateway_requests_total", target="openai", status="200") == 2
        assert total(gateway, "forebay_spend_usd_total", target="spare") == 20


async def test_the_first_token_of_a_stream_is_timed_and_of_an_answer_that_is_whole_not(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        await harness.post(gateway)
        assert total(gateway, "gen_ai_client_operation_time_to_first_chunk_seconds_count") == 0
        harness.provider.behaviour = streaming(b": a comment\n\n", EVENT, STOP, DONE)
        await harness.post(gateway, json=STREAM)
        assert total(gateway, "gen_ai_client_operation_time_to_first_chunk_seconds_count", **CHAT) == 1
        assert total(gateway, "forebay_time_to_first_token_seconds_count", target="openai", model="gpt-4o") == 1
        chunk = total(gateway, "gen_ai_client_operation_time_to_first_chunk_seconds_sum")
        assert 0 < chunk <= total(gateway, "forebay_time_to_first_token_seconds_sum")


@pytest.mark.parametrize(
    ("pieces", "error_type", "outcome"),
    [((EVENT, STOP, DONE), "", "succeeded"), ((EVENT, CUT), "incomplete", "failed")],
    ids=["whole", "cut"],
)
async def test_a_stream_is_one_attempt_by_its_end(
    harness: GatewayHarness, pieces: tuple[bytes | float, ...], error_type: str, outcome: str
) -> None:
    async with Gateway(harness.settings()) as gateway:
        harness.provider.behaviour = streaming(*pieces)
        await harness.post(gateway, json=STREAM)
        assert (
            total(gateway, "forebay_attempts_total") == total(gateway, "forebay_attempts_total", outcome=outcome) == 1
        )
        assert total(gateway, "gen_ai_client_operation_duration_seconds_count", **CHAT, error_type=error_type) == 1


async def test_tokens_are_counted_once_by_direction_and_kind(harness: GatewayHarness) -> None:
    body = json.dumps({**CHAT_RESPONSE, "usage": CACHED_USAGE}).encode()
    harness.provider.behaviour = responding(200, body, content_type="application/json")
    async with Gateway(harness.settings()) as gateway:
        await harness.post(gateway, headers={"x-forebay-tenant": "acme"})
        tokens = {
            (sample.labels["direction"], sample.labels["kind"]): sample.value
            for sample in samples(gateway, "forebay_tokens_total", target="openai", model="gpt-4o", tenant="acme")
        }
        assert tokens == {
            ("input", "uncached"): 18,
            ("input", "cache_read"): 12,
            ("output", "answer"): 13,
            ("output", "reasoning"): 7,
        }
        for token_type, number in (("input", 30), ("output", 20)):
            assert total(gateway, "gen_ai_client_token_usage_sum", **CHAT, gen_ai_token_type=token_type) == number


async def test_a_stored_response_that_is_fetched_counts_no_tokens_again(harness: GatewayHarness) -> None:
    stored = {"id": "resp_1", "object": "response", "status": "completed", "model": "gpt-4o", "output": []}
    body = json.dumps({**stored, "usage": {"input_tokens": 30, "output_tokens": 20}}).encode()
    harness.provider.behaviour = responding(200, body, content_type="application/json")
    async with Gateway(harness.settings()) as gateway:
        await harness.post(gateway, "/v1/responses", json={"model": "gpt-4o", "input": "Rivers?"})
        for _ in range(2):
            async with harness.session.get(harness.at(gateway, "/v1/responses/resp_1")) as response:
                assert response.status == 200
        assert total(gateway, "forebay_tokens_total") == 50
        assert total(gateway, "gen_ai_client_token_usage_count") == 2  # input and output, once


async def test_the_spend_of_tenants_and_keys_adds_up_to_that_of_the_budget(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(budget_usd=100.0, prices=PRICES)) as gateway:
        for tenant, key in (("acme", "sk-1"), ("acme", "sk-2"), ("umbrella", "sk-1")):
            headers = {"x-forebay-tenant": tenant, "authorization": f"Bearer {key}"}
            assert (await harness.post(gateway, headers=headers))[0] == 200
        assert total(gateway, "forebay_spend_usd_total", tenant="acme") == 40
        assert sorted(s.value for s in samples(gateway, "forebay_spend_usd_total")) == [20, 20, 20]
        assert len({sample.labels["api_key"] for sample in samples(gateway, "forebay_spend_usd_total")}) == 2
        assert total(gateway, "forebay_budget_spent_usd", target="openai") == 60
        assert total(gateway, "forebay_budget_limit_usd", target="openai") == 100
        assert total(gateway, "forebay_budget_used_ratio", target="openai") == pytest.approx(0.6)


async def test_spend_is_counted_without_a_budget(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(prices=PRICES)) as gateway:
        await harness.post(gateway)
        assert total(gateway, "forebay_spend_usd_total", model="gpt-4o", tenant="default") == 20
        assert list(samples(gateway, "forebay_budget_limit_usd")) == []


async def test_no_key_is_on_the_page(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        await harness.post(gateway, headers={"authorization": "Bearer sk-very-secret"})
        (account,) = {sample.labels["account"] for sample in samples(gateway, "forebay_calls_limit")}
        (key,) = {sample.labels["api_key"] for sample in samples(gateway, "forebay_tokens_total")}
        assert account == f"upstream:openai:{key}:gpt-4o"
        assert b"secret" not in gateway.forwarder.metrics.render()


# --- bounds ---


async def test_models_beyond_the_bound_count_together(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_metrics_models": 2})) as gateway:
        for number in range(5):
            assert (await harness.post(gateway, json=asking(f"model-{number}")))[0] == 200
        page = gateway.forwarder.metrics.render().decode()
        families = text_string_to_metric_families(page)
        found = {sample.labels[label] for family in families for sample in family.samples for label in sample.labels
                 if label in ("model", "gen_ai_request_model")}  # fmt: skip
        assert found == {"model-0", "model-1", OTHER}
        assert total(gateway, "forebay_attempts_total", model=OTHER) == 3


@pytest.mark.parametrize("label", ["tenant", "api_key"])
async def test_tenants_and_keys_beyond_their_bound_count_together(harness: GatewayHarness, label: str) -> None:
    bounds = {"max_metrics_tenants": 2, "max_metrics_keys": 2}
    async with Gateway(harness.settings(gateway=bounds)) as gateway:
        for number in range(5):
            headers = {"x-forebay-tenant": f"t{number}"} if label == "tenant" else {"authorization": f"Bearer {number}"}
            await harness.post(gateway, headers=headers)
            gateway.forwarder.metrics.render()  # what was seen first has series of its own
        found = {sample.labels[label] for sample in samples(gateway, "forebay_tokens_total")}
        assert len(found) == 3
        assert total(gateway, "forebay_tokens_total", direction="output", **{label: OTHER}) == 60


async def test_a_name_that_no_provider_has_served_takes_no_place(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_metrics_models": 1})) as gateway:
        harness.provider.behaviour = responding(404)
        for number in range(3):
            await harness.post(gateway, json=asking(f"junk-{number}"))
        harness.provider.behaviour = harness.provider.reply
        await harness.post(gateway)
        assert total(gateway, "forebay_gateway_request_duration_seconds_count", model=OTHER, status="404") == 3
        assert total(gateway, "forebay_gateway_request_duration_seconds_count", model="gpt-4o", status="200") == 1


async def test_no_name_of_a_caller_breaks_the_page(harness: GatewayHarness) -> None:
    body = json.dumps(CHAT_REQUEST).encode()
    async with Gateway(harness.settings()) as gateway:
        sent = request_bytes(body, b'x-forebay-tenant: \xff\xfe"}\\', b"connection: close")
        assert (await send_raw(gateway, sent)).startswith(b"HTTP/1.1 200 ")
        await harness.post(gateway, json=asking("m\u2028" + "x" * 100_000))
        page = gateway.forwarder.metrics.render()
        assert len(page) < 100_000
        assert problems(page.decode()) == []


async def test_the_metrics_of_a_call_do_not_keep_it(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(budget_usd=1e6, prices=PRICES)) as gateway:
        await harness.post(gateway)
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)
        gc.collect()
        gc.disable()
        try:
            await harness.post(gateway)
            await until(lambda: total(gateway, "forebay_gateway_requests_total") == 2)
            assert [each for each in gc.get_objects() if type(each) is ForwardedCall] == []
        finally:
            gc.enable()
