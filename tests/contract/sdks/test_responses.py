"""Successful calls: the caller gets what it would get from the provider itself."""

from __future__ import annotations

from typing import Any

import pytest
from tests.contract.sdks.conftest import ProviderControl
from tests.contract.sdks.sdk_harness import MESSAGES, Sdk, SdkHarness, ThroughGateway
from tests.support.metric_samples import total

from forebay.quota import Price

A_DOLLAR_EACH = {"*": Price(input=1e6, output=1e6)}


def comparable(thing: Any) -> Any:
    """Return a parsed response without the fields that differ between calls."""
    fields = thing.model_dump()
    for varying in ("id", "created"):
        fields.pop(varying, None)
    if isinstance(fields.get("message"), dict):
        fields["message"].pop("id", None)
    return type(thing), fields


def test_responses_are_those_of_the_provider(harness: SdkHarness, provider: ProviderControl) -> None:
    path, bare = harness.open(provider.url), harness.bare(provider.url)
    assert isinstance(path.caller.client, type(bare.client))
    exactly: Any = {"extra_headers": {"x-simulated-output-tokens": "30"}}
    assert comparable(path.caller.create(**exactly)) == comparable(bare.create(**exactly))
    assert path.is_idle()


def test_streams_are_those_of_the_provider_part_by_part(harness: SdkHarness, provider: ProviderControl) -> None:
    path, bare = harness.open(provider.url), harness.bare(provider.url)
    exactly: Any = {"extra_headers": {"x-simulated-output-tokens": "30"}}
    parts = path.caller.parts(**exactly)
    assert [comparable(part) for part in parts] == [comparable(part) for part in bare.parts(**exactly)]
    assert len(harness.sdk.text(parts).split()) == 30
    assert path.is_idle()


def test_models_are_listed(harness: SdkHarness, provider: ProviderControl) -> None:
    path, bare = harness.open(provider.url), harness.bare(provider.url)
    names = [model.id for model in path.caller.read(lambda client: client.models.list())]
    assert names == [model.id for model in bare.read(lambda client: client.models.list())]
    assert names
    assert path.is_idle()


def test_raw_responses_have_a_request_id_and_are_not_to_be_retried(
    harness: SdkHarness, provider: ProviderControl
) -> None:
    path = harness.open(provider.url)
    raw = path.caller.do(lambda client: harness.sdk.create(client.with_raw_response))
    assert raw.status_code == 200
    assert raw.headers[harness.sdk.request_id].startswith("req_")
    assert raw.headers["x-should-retry"] == "false"
    assert raw.elapsed.total_seconds() > 0
    response = path.caller.do(lambda _: raw.parse())
    assert response._request_id == raw.headers[harness.sdk.request_id]
    assert harness.sdk.used(response)[1] == 40
    assert path.is_idle()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "stream"])
def test_the_metered_usage_is_that_of_the_response(harness: SdkHarness, provider: ProviderControl, whole: bool) -> None:  # noqa: FBT001
    path = harness.open(provider.url, budget_usd=1e6, prices=A_DOLLAR_EACH)
    fields: Any = {"extra_headers": {"x-simulated-output-tokens": "30"}}
    if whole:
        used = harness.sdk.used(path.caller.create(**fields))
    else:
        ends: Any = {"stream_options": {"include_usage": True}} if harness.sdk.name == "openai" else {}
        used = harness.sdk.used_by(path.caller.parts(**fields, **ends))
    assert used[1] == 30
    assert path.is_idle()
    assert path.upstream.statistics().spent_usd == sum(used)
    if isinstance(path, ThroughGateway):
        labels = {"model": harness.sdk.model, "target": harness.sdk.name}
        for direction, tokens in zip(("input", "output"), used, strict=True):
            assert total(path.gateway, "forebay_tokens_total", direction=direction, **labels) == tokens


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not-asked"])
@pytest.mark.parametrize("sdk", [Sdk("openai", awaits=True), Sdk("openai", awaits=False)], ids=str)
def test_usage_of_openai_streams_reaches_only_callers_who_ask(
    harness: SdkHarness,
    provider: ProviderControl,
    asked: bool,  # noqa: FBT001
) -> None:
    path = harness.open(provider.url, budget_usd=1e6, prices=A_DOLLAR_EACH)
    options: Any = {"stream_options": {"include_usage": True}} if asked else {}
    parts = path.caller.parts(**options)
    assert any(part.usage is not None for part in parts) is asked
    assert path.is_idle()
    assert (path.upstream.statistics().spent_usd or 0) > 40


def test_the_streaming_helpers_work(harness: SdkHarness, provider: ProviderControl) -> None:
    path, sdk = harness.open(provider.url), harness.sdk
    fields: Any = {
        "model": sdk.model,
        "messages": MESSAGES,
        "max_tokens": 40,
        "extra_headers": {"x-simulated-output-tokens": "20"},
    }

    def streaming(client: Any) -> Any:
        return (client.chat.completions if sdk.name == "openai" else client.messages).stream(**fields)

    def last(stream: Any) -> Any:
        return stream.get_final_completion() if sdk.name == "openai" else stream.get_final_message()

    def blocking(client: Any) -> Any:
        with streaming(client) as stream:
            for _ in stream:
                pass
            return last(stream)

    async def awaited(client: Any) -> Any:
        async with streaming(client) as stream:
            async for _ in stream:
                pass
            return await last(stream)

    final = path.caller.do(awaited if sdk.awaits else blocking)
    text = final.choices[0].message.content if sdk.name == "openai" else final.content[0].text
    assert len(text.split()) == 20
    assert path.is_idle()


def test_many_calls_share_the_limit(harness: SdkHarness, provider: ProviderControl) -> None:
    provider.configure(ttft=0.1)
    path = harness.open(provider.url, max_concurrent=3)
    assert len(path.caller.many(10)) == 10
    assert 1 < provider.statistics()["peak_in_flight"] <= 3
    assert path.is_idle()


def test_each_key_has_its_own_account(harness: SdkHarness, provider: ProviderControl) -> None:
    path = harness.open(provider.url)
    path.caller.create()
    path.caller.with_options(api_key="sk-other").create()
    assert len(path.accounts) == 2


def test_a_target_can_be_called_by_its_name(provider: ProviderControl, harness: SdkHarness) -> None:
    path = harness.open(provider.url)
    if isinstance(path, ThroughGateway):
        path.caller = path.caller.with_options(base_url=harness.sdk.base_url(f"{path.url}/{harness.sdk.name}"))
    assert harness.sdk.used(path.caller.create())[1] == 40
    assert path.is_idle()
