"""What a caller gets when all goes well is what it would get of the provider itself."""

from __future__ import annotations

from typing import Any

import pytest
from tests.contract.sdks.conftest import Plant
from tests.contract.sdks.sdk_harness import SAY, Sdk, SdkHarness, ThroughGateway

from forebay.quota import Price

A_DOLLAR_EACH = {"*": Price(input=1e6, output=1e6)}


def plain(thing: Any) -> Any:
    """A parsed answer without what differs from call to call."""
    told = thing.model_dump()
    for changing in ("id", "created"):
        told.pop(changing, None)
    if isinstance(told.get("message"), dict):
        told["message"].pop("id", None)
    return type(thing), told


def test_answers_are_the_providers_own(house: SdkHarness, plant: Plant) -> None:
    way, bare = house.open(plant.url), house.bare(plant.url)
    assert isinstance(way.caller.client, type(bare.client))
    exactly: Any = {"extra_headers": {"x-simulated-output-tokens": "30"}}
    assert plain(way.caller.create(**exactly)) == plain(bare.create(**exactly))
    assert way.is_idle()


def test_so_are_streams_part_by_part(house: SdkHarness, plant: Plant) -> None:
    way, bare = house.open(plant.url), house.bare(plant.url)
    exactly: Any = {"extra_headers": {"x-simulated-output-tokens": "30"}}
    parts = way.caller.parts(**exactly)
    assert [plain(part) for part in parts] == [plain(part) for part in bare.parts(**exactly)]
    assert len(house.sdk.text(parts).split()) == 30
    assert way.is_idle()


def test_models_are_listed(house: SdkHarness, plant: Plant) -> None:
    way, bare = house.open(plant.url), house.bare(plant.url)
    named = [model.id for model in way.caller.read(lambda client: client.models.list())]
    assert named == [model.id for model in bare.read(lambda client: client.models.list())]
    assert named
    assert way.is_idle()


def test_raw_answers_name_the_request_and_are_not_to_be_repeated(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url)
    raw = way.caller.do(lambda client: house.sdk.create(client.with_raw_response))
    assert raw.status_code == 200
    assert raw.headers[house.sdk.request_id].startswith("req_")
    assert raw.headers["x-should-retry"] == "false"
    assert raw.elapsed.total_seconds() > 0
    answer = way.caller.do(lambda _: raw.parse())
    assert answer._request_id == raw.headers[house.sdk.request_id]
    assert house.sdk.used(answer)[1] == 40
    assert way.is_idle()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "stream"])
def test_what_is_metered_is_what_the_caller_is_told(house: SdkHarness, plant: Plant, whole: bool) -> None:  # noqa: FBT001
    way = house.open(plant.url, budget_usd=1e6, prices=A_DOLLAR_EACH)
    ask: Any = {"extra_headers": {"x-simulated-output-tokens": "30"}}
    if whole:
        used = house.sdk.used(way.caller.create(**ask))
    else:
        ends: Any = {"stream_options": {"include_usage": True}} if house.sdk.name == "openai" else {}
        used = house.sdk.used_by(way.caller.parts(**ask, **ends))
    assert used[1] == 30
    assert way.is_idle()
    assert way.upstream.statistics().spent_usd == sum(used)
    if isinstance(way, ThroughGateway):
        told = way.gateway.forwarder.metrics.render().decode()
        for direction, tokens in zip(("input", "output"), used, strict=True):
            labels = f'direction="{direction}",model="{house.sdk.model}",target="{house.sdk.name}"'
            assert f"forebay_tokens_total{{{labels}}} {tokens:.1f}" in told


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not-asked"])
@pytest.mark.parametrize("sdk", [Sdk("openai", awaits=True), Sdk("openai", awaits=False)], ids=str)
def test_usage_of_openai_streams_is_seen_by_those_who_asked(house: SdkHarness, plant: Plant, asked: bool) -> None:  # noqa: FBT001
    way = house.open(plant.url, budget_usd=1e6, prices=A_DOLLAR_EACH)
    options: Any = {"stream_options": {"include_usage": True}} if asked else {}
    parts = way.caller.parts(**options)
    assert any(part.usage is not None for part in parts) is asked
    assert way.is_idle()
    assert (way.upstream.statistics().spent_usd or 0) > 40


def test_the_streaming_helpers_work(house: SdkHarness, plant: Plant) -> None:
    way, sdk = house.open(plant.url), house.sdk
    ask: Any = {
        "model": sdk.model,
        "messages": SAY,
        "max_tokens": 40,
        "extra_headers": {"x-simulated-output-tokens": "20"},
    }

    def streaming(client: Any) -> Any:
        return (client.chat.completions if sdk.name == "openai" else client.messages).stream(**ask)

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

    final = way.caller.do(awaited if sdk.awaits else blocking)
    said = final.choices[0].message.content if sdk.name == "openai" else final.content[0].text
    assert len(said.split()) == 20
    assert way.is_idle()


def test_many_share_what_there_is(house: SdkHarness, plant: Plant) -> None:
    plant.be(ttft=0.1)
    way = house.open(plant.url, max_concurrent=3)
    assert len(way.caller.many(10)) == 10
    assert 1 < plant.told()["peak_in_flight"] <= 3
    assert way.is_idle()


def test_keys_have_accounts_of_their_own(house: SdkHarness, plant: Plant) -> None:
    way = house.open(plant.url)
    way.caller.create()
    way.caller.with_options(api_key="sk-other").create()
    assert len(way.accounts) == 2


def test_a_target_can_be_reached_by_its_name(plant: Plant, house: SdkHarness) -> None:
    way = house.open(plant.url)
    if isinstance(way, ThroughGateway):
        way.caller = way.caller.with_options(base_url=house.sdk.base_url(f"{way.url}/{house.sdk.name}"))
    assert house.sdk.used(way.caller.create())[1] == 40
    assert way.is_idle()
