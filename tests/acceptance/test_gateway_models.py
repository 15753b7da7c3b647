"""Aliases and pools: callers name a model of the gateway, and one of its deployments serves the call."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import msgspec
import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    NOTHING_LEFT,
    GatewayHarness,
    leftovers,
    responding,
)
from tests.support.issued_keys import IssuedKeys, bearer

from forebay.errors import InvalidSetting
from forebay.gateway import (
    DeploymentSettings,
    FallbackSettings,
    GatewaySettings,
    InvalidProviderKey,
    KeySettings,
    ModelSettings,
    TargetSettings,
)
from forebay.gateway.server import Gateway

KEYS = {"KEY_A": "sk-first", "KEY_B": "sk-second"}
TWO_KEYS = (KeySettings(api_key_env="KEY_A", name="a"), KeySettings(api_key_env="KEY_B", name="b"))
USAGE = {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}
FAST = {**CHAT_REQUEST, "model": "fast"}


def settings(harness: GatewayHarness, *models: ModelSettings, **targets: dict[str, Any]) -> GatewaySettings:
    """Return settings with these targets, which are told apart by the first segment of their paths."""
    made = tuple(
        TargetSettings(**{"name": name, "url": f"{harness.url}/at-{name}", **fields})
        for name, fields in targets.items()
    )
    return GatewaySettings(targets=made, models=models, listen="127.0.0.1:0", drain_timeout=5.0)


def keys_used(harness: GatewayHarness) -> Counter[str]:
    """Return how many requests the provider got with each credential."""
    names = ("authorization", "x-api-key", "api-key")
    found = [
        next((request.headers[name] for name in names if name in request.headers), "")
        for request in harness.provider.requests
    ]
    return Counter(found)


def targets_used(harness: GatewayHarness) -> Counter[str]:
    return Counter(request.raw_path.split("/")[1].removeprefix("at-") for request in harness.provider.requests)


# --- aliases ---


async def test_an_alias_is_sent_as_the_model_that_it_stands_for(harness: GatewayHarness) -> None:
    alias = ModelSettings(name="fast", target="b", model="gpt-4o-mini")
    async with Gateway(settings(harness, alias, a={}, b={})) as gateway:
        body = json.dumps({**FAST, "seed": 1.50, "x": "model"}).encode()
        status, _, answer = await harness.post(gateway, data=body, headers={"authorization": "Bearer own"})
        assert (status, answer) == (200, CHAT_RESPONSE)
        assert leftovers(gateway) == NOTHING_LEFT
    (sent,) = harness.provider.requests
    assert sent.raw_path == "/at-b/v1/chat/completions"
    assert sent.headers["authorization"] == "Bearer own"
    assert harness.provider.bodies == [{**FAST, "model": "gpt-4o-mini", "seed": 1.5, "x": "model"}]


async def test_an_alias_without_a_target_goes_where_the_call_goes(harness: GatewayHarness) -> None:
    alias = ModelSettings(name="fast", model="small")
    async with Gateway(settings(harness, alias, a={}, anthropic={})) as gateway:
        await harness.post(gateway, json=FAST)
        await harness.post(gateway, "/v1/messages", json=FAST, headers={"x-api-key": "k"})
    assert [body["model"] for body in harness.provider.bodies] == ["small", "small"]
    assert targets_used(harness) == {"a": 1, "anthropic": 1}


async def test_a_pattern_sends_models_to_their_target_and_the_longest_counts(harness: GatewayHarness) -> None:
    models = (ModelSettings(name="llama-*", target="b"), ModelSettings(name="llama-3*", target="c", model="l3"))
    async with Gateway(settings(harness, *models, a={}, b={}, c={})) as gateway:
        for model in ("gpt-4o", "llama-2", "llama-3.3"):
            await harness.post(gateway, json={**CHAT_REQUEST, "model": model})
    assert [request.raw_path.split("/")[1] for request in harness.provider.requests] == ["at-a", "at-b", "at-c"]
    assert [body["model"] for body in harness.provider.bodies] == ["gpt-4o", "llama-2", "l3"]


async def test_below_the_name_of_a_target_models_have_its_own_names(harness: GatewayHarness) -> None:
    alias = ModelSettings(name="fast", target="b", model="slow")
    async with Gateway(settings(harness, alias, a={}, b={})) as gateway:
        await harness.post(gateway, "/a/v1/chat/completions", json=FAST)
    assert harness.provider.bodies == [FAST]
    assert targets_used(harness) == {"a": 1}


async def test_an_alias_of_another_protocol_is_refused_with_what_to_do(harness: GatewayHarness) -> None:
    alias = ModelSettings(name="fast", target="anthropic", model="claude")
    async with Gateway(settings(harness, alias, a={}, anthropic={})) as gateway:
        status, _, answer = await harness.post(gateway, json=FAST)
    assert status == 400
    assert "'anthropic'" in answer["error"]["message"]
    assert harness.provider.requests == []


async def test_the_fallbacks_of_the_target_of_an_alias_hold(harness: GatewayHarness) -> None:
    alias = ModelSettings(name="fast", target="b", model="x")
    fallback = FallbackSettings(target="c", model="y")
    harness.provider.behaviour = lambda request: (
        responding(500)(request) if "at-b" in request.raw_path else harness.provider.reply(request)
    )
    async with Gateway(settings(harness, alias, a={}, b={"fallback": (fallback,), "max_attempts": 1}, c={})) as gateway:
        status, _, _ = await harness.post(gateway, json=FAST)
    assert status == 200
    assert targets_used(harness) == {"b": 1, "c": 1}
    assert harness.provider.bodies == [{**FAST, "model": "y"}]


# --- the list of models ---


def listing(*models: str) -> Any:
    body = json.dumps({"object": "list", "data": [{"id": model, "object": "model"} for model in models]}).encode()
    return responding(200, body, content_type="application/json")


async def test_the_list_of_models_begins_with_the_aliases(harness: GatewayHarness) -> None:
    models = (
        ModelSettings(name="fast", model="small"),
        ModelSettings(name="gpt-4o", target="b"),
        ModelSettings(name="llama-*", target="b"),
        ModelSettings(name="claude", target="anthropic", model="claude-5"),
    )
    harness.provider.behaviour = listing("gpt-4o", "gpt-4o-mini")
    async with Gateway(settings(harness, *models, a={}, b={}, anthropic={})) as gateway:
        async with harness.session.get(harness.at(gateway, "/v1/models")) as response:
            listed = await response.json()
        async with harness.session.get(harness.at(gateway, "/a/v1/models")) as response:
            own = await response.json()
        async with harness.session.get(harness.at(gateway, "/v1/models/fast")) as response:
            one = await response.json()
    assert [model["id"] for model in listed["data"]] == ["fast", "gpt-4o", "gpt-4o-mini"]
    assert [model["id"] for model in own["data"]] == ["gpt-4o", "gpt-4o-mini"]
    assert one == {"id": "fast", "object": "model", "created": 0, "owned_by": "forebay"}
    assert len(harness.provider.requests) == 2


async def test_a_provider_without_a_list_leaves_the_aliases_and_its_errors_pass(harness: GatewayHarness) -> None:
    async with Gateway(settings(harness, ModelSettings(name="fast", model="small"), a={})) as gateway:
        harness.provider.behaviour = responding(404)
        async with harness.session.get(harness.at(gateway, "/v1/models")) as response:
            listed = await response.json()
        harness.provider.behaviour = responding(401, b'{"error":{}}')
        async with harness.session.get(harness.at(gateway, "/v1/models")) as response:
            refused = response.status
    assert [model["id"] for model in listed["data"]] == ["fast"]
    assert refused == 401


# --- keys of a target ---


async def test_the_keys_of_a_target_share_its_calls_and_no_caller_s_key_is_sent(harness: GatewayHarness) -> None:
    async with Gateway(settings(harness, a={"keys": TWO_KEYS}), KEYS) as gateway:
        own = {"authorization": "Bearer own", "x-api-key": "own", "openai-organization": "org", "cookie": "own"}
        for _ in range(40):
            status, _, _ = await harness.post(gateway, "/v1/chat/completions?key=own&beta=1", headers=own)
            assert status == 200
        assert leftovers(gateway) == NOTHING_LEFT
        async with harness.session.get(harness.at(gateway, "/metrics")) as response:
            metrics = await response.text()
    used = keys_used(harness)
    assert set(used) == {"Bearer sk-first", "Bearer sk-second"}
    assert min(used.values()) >= 5
    for request in harness.provider.requests:
        assert "own" not in str(request.headers) + request.raw_path
        assert request.query == {"beta": "1"}
    assert 'account="upstream:a:a:gpt-4o"' in metrics
    assert "sk-" not in metrics


async def test_an_anthropic_key_is_sent_in_its_own_header(harness: GatewayHarness) -> None:
    async with Gateway(settings(harness, anthropic={"keys": TWO_KEYS[:1]}), KEYS) as gateway:
        await harness.post(gateway, "/v1/messages", headers={"authorization": "Bearer own"})
    (sent,) = harness.provider.requests
    assert sent.headers["x-api-key"] == "sk-first"
    assert "authorization" not in sent.headers


async def test_a_full_key_gets_no_call_while_another_is_free(harness: GatewayHarness) -> None:
    keys = tuple(KeySettings(api_key_env=name, max_concurrent=most) for name, most in (("KEY_A", 1), ("KEY_B", 3)))
    arrived, go = asyncio.Semaphore(0), asyncio.Event()

    async def hold(request: web.BaseRequest) -> web.StreamResponse:
        arrived.release()
        await go.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = hold
    async with Gateway(settings(harness, a={"keys": keys}), KEYS) as gateway:
        calls = [asyncio.create_task(harness.post(gateway)) for _ in range(4)]
        for _ in calls:
            await arrived.acquire()  # all four are at the provider at the same time
        assert keys_used(harness) == {"Bearer sk-first": 1, "Bearer sk-second": 3}
        go.set()
        assert [status for status, _, _ in await asyncio.gather(*calls)] == [200] * 4


async def test_a_throttled_key_leaves_its_call_to_the_other_one_at_once(harness: GatewayHarness) -> None:
    def throttles_one(request: web.BaseRequest) -> Any:
        if request.headers["authorization"] == "Bearer sk-first":
            return responding(429, retry_after="600")(request)
        return harness.provider.reply(request)

    harness.provider.behaviour = throttles_one
    async with Gateway(settings(harness, a={"keys": TWO_KEYS}), KEYS) as gateway:
        statuses = [(await harness.post(gateway))[0] for _ in range(30)]
    assert statuses == [200] * 30
    assert keys_used(harness)["Bearer sk-first"] <= 4  # one whose refusal names no limit is tried again


async def test_a_key_that_the_provider_refuses_fails_no_call_and_is_soon_left_alone(harness: GatewayHarness) -> None:
    def refuses_one(request: web.BaseRequest) -> Any:
        if request.headers["authorization"] == "Bearer sk-first":
            return responding(401, b'{"error":{"message":"Incorrect API key provided: sk-fi***st"}}')(request)
        return harness.provider.reply(request)

    harness.provider.behaviour = refuses_one
    async with Gateway(settings(harness, a={"keys": TWO_KEYS}), KEYS) as gateway:
        statuses = [(await harness.post(gateway))[0] for _ in range(60)]
    assert statuses == [200] * 60
    assert keys_used(harness)["Bearer sk-first"] <= 12


@pytest.mark.parametrize("keys", [TWO_KEYS, TWO_KEYS[:1]])
async def test_if_every_key_is_refused_the_caller_learns_nothing_of_it(
    harness: GatewayHarness, keys: tuple[KeySettings, ...]
) -> None:
    harness.provider.behaviour = responding(401, b'{"error":{"message":"Incorrect API key provided: sk-fi***st"}}')
    async with Gateway(settings(harness, a={"keys": keys}), KEYS) as gateway:
        status, headers, answer = await harness.post(gateway)
    assert status == 502
    assert "sk-" not in str(headers) + str(answer)
    assert "API key that this gateway holds" in answer["error"]["message"]


async def test_calls_without_a_model_use_the_first_key(harness: GatewayHarness) -> None:
    async with Gateway(settings(harness, a={"keys": TWO_KEYS}), KEYS) as gateway:
        for _ in range(10):
            async with harness.session.get(harness.at(gateway, "/v1/files")) as response:
                assert response.status == 200
    assert keys_used(harness) == {"Bearer sk-first": 10}


async def test_a_key_that_is_not_set_stops_the_start(harness: GatewayHarness) -> None:
    with pytest.raises(InvalidProviderKey, match="KEY_B"):
        async with Gateway(settings(harness, a={"keys": TWO_KEYS}), {"KEY_A": "sk-first", "KEY_B": " "}):
            pass


async def test_two_keys_that_are_the_same_stop_the_start_without_being_shown(harness: GatewayHarness) -> None:
    with pytest.raises(InvalidSetting, match="same one as 'a'") as caught:
        async with Gateway(settings(harness, a={"keys": TWO_KEYS}), dict.fromkeys(KEYS, "sk-first")):
            pass
    assert "sk-" not in str(caught.value)


# --- pools of targets ---


def pool(*places: tuple[str, str | None, float]) -> ModelSettings:
    made = tuple(DeploymentSettings(target=target, model=model, weight=weight) for target, model, weight in places)
    return ModelSettings(name="fast", pool=made)


async def test_a_pool_shares_calls_by_weight_with_each_target_s_model_and_key(harness: GatewayHarness) -> None:
    alias = pool(("b", "gpt-4o", 1.0), ("c", None, 3.0))
    targets: dict[str, Any] = {"a": {}, "b": {"keys": TWO_KEYS[:1]}, "c": {}}
    async with Gateway(settings(harness, alias, **targets), KEYS) as gateway:
        for _ in range(100):
            status, _, _ = await harness.post(gateway, json=FAST, headers={"authorization": "Bearer own"})
            assert status == 200
        assert leftovers(gateway) == NOTHING_LEFT
    used = targets_used(harness)
    assert set(used) == {"b", "c"}
    assert used["c"] > used["b"]
    assert set(keys_used(harness)) == {"Bearer sk-first", ""}
    assert {body["model"] for body in harness.provider.bodies} == {"gpt-4o", "fast"}


async def test_a_target_that_fails_leaves_its_calls_to_the_others_in_the_pool(harness: GatewayHarness) -> None:
    alias = pool(("b", "x", 1.0), ("c", "y", 1.0))
    harness.provider.behaviour = lambda request: (
        responding(500)(request) if "at-b" in request.raw_path else harness.provider.reply(request)
    )
    async with Gateway(settings(harness, alias, b={}, c={})) as gateway:
        statuses = [(await harness.post(gateway, json=FAST))[0] for _ in range(60)]
    assert statuses == [200] * 60
    assert {body["model"] for body in harness.provider.bodies} == {"y"}
    assert targets_used(harness)["b"] <= 12


async def test_two_models_of_a_target_are_called_with_the_key_of_the_caller(harness: GatewayHarness) -> None:
    alias = pool(("a", "x", 1.0), ("a", "y", 1.0))
    harness.provider.behaviour = harness.provider.reply
    async with Gateway(settings(harness, alias, a={})) as gateway:
        for _ in range(40):
            await harness.post(gateway, json=FAST, headers={"authorization": "Bearer own"})
    assert set(keys_used(harness)) == {"Bearer own"}
    assert {body["model"] for body in harness.provider.bodies} == {"x", "y"}


async def test_a_mistake_of_the_caller_is_answered_by_one_deployment(harness: GatewayHarness) -> None:
    harness.provider.behaviour = responding(400, b'{"error":{"message":"bad"}}')
    async with Gateway(settings(harness, pool(("b", "x", 1.0), ("c", "y", 1.0)), b={}, c={})) as gateway:
        status, _, answer = await harness.post(gateway, json=FAST)
    assert (status, answer) == (400, {"error": {"message": "bad"}})
    assert len(harness.provider.requests) == 1


# --- stored responses ---


async def test_what_continues_or_fetches_a_stored_response_goes_to_the_key_that_has_made_it(
    harness: GatewayHarness,
) -> None:
    made: dict[str, str] = {}

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        if request.method == "POST":
            made[f"resp_{len(made)}"] = request.headers["authorization"]
            answer = {"object": "response", "id": f"resp_{len(made) - 1}", "status": "completed", "usage": USAGE}
            return web.json_response(answer)
        return web.json_response({})

    harness.provider.behaviour = respond
    alias = pool(("b", "x", 1.0), ("c", "x", 1.0))
    targets = {"b": {"keys": TWO_KEYS[:1]}, "c": {"keys": TWO_KEYS[1:]}}
    async with Gateway(settings(harness, alias, a={}, **targets), KEYS) as gateway:
        for _ in range(20):
            await harness.post(gateway, "/v1/responses", json={"model": "fast", "input": "Rivers?"})
        assert len(set(made.values())) == 2
        first = dict(made)
        for response_id, key in first.items():
            body = {"model": "fast", "input": "More?", "previous_response_id": response_id}
            await harness.post(gateway, "/v1/responses", json=body)
            assert harness.provider.requests[-1].headers["authorization"] == key
            async with harness.session.get(harness.at(gateway, f"/v1/responses/{response_id}")) as response:
                assert response.status == 200
            assert harness.provider.requests[-1].headers["authorization"] == key


# --- with keys that the gateway issues ---


async def test_an_issued_key_is_for_the_alias_by_its_name_and_for_the_targets_that_serve_it(
    harness: GatewayHarness, keys: IssuedKeys
) -> None:
    alias = ModelSettings(name="fast", target="b", model="gpt-4o")
    by_alias = await keys.create("by-alias", models=("fast",))
    by_model = await keys.create("by-model", models=("gpt-4o",))
    elsewhere = await keys.create("elsewhere", targets=("a",))
    made = msgspec.structs.replace(settings(harness, alias, a={}, b={"keys": TWO_KEYS}), keys=keys.url)
    async with Gateway(made, KEYS) as gateway:
        statuses = [
            (await harness.post(gateway, json=FAST, headers=bearer(key)))[0] for key in (by_alias, by_model, elsewhere)
        ]
        harness.provider.behaviour = listing()
        async with harness.session.get(harness.at(gateway, "/v1/models"), headers=bearer(by_model)) as response:
            listed = await response.json()
    assert statuses == [200, 403, 403]
    assert listed["data"] == []
    assert harness.provider.bodies == [{**FAST, "model": "gpt-4o"}]
    assert not any("fb-" in str(request.headers) for request in harness.provider.requests)


POOLED = ModelSettings(name="fast", pool=tuple(DeploymentSettings(target=name) for name in "abc"))


async def with_key(harness: GatewayHarness, gateway: Gateway, key: str, path: str = "/v1/chat/completions") -> int:
    """Return the status of a call of the pool with an issued key."""
    return (await harness.post(gateway, path, json=FAST, headers=bearer(key)))[0]


@pytest.mark.parametrize("allowed", [("b",), ("a", "c"), ("c", "b")])
async def test_an_issued_key_is_served_by_the_members_of_a_pool_that_it_may_use(
    harness: GatewayHarness, keys: IssuedKeys, allowed: tuple[str, ...]
) -> None:
    limited, free = await keys.create("limited", targets=allowed), await keys.create("free")
    made = msgspec.structs.replace(settings(harness, POOLED, a={}, b={}, c={}), keys=keys.url)
    async with Gateway(made) as gateway:
        statuses = {await with_key(harness, gateway, limited) for _ in range(40)}
        used = set(targets_used(harness))
        statuses |= {await with_key(harness, gateway, free) for _ in range(40)}
        assert leftovers(gateway) == NOTHING_LEFT
    assert statuses == {200}
    assert used == set(allowed)
    assert set(targets_used(harness)) == {"a", "b", "c"}


async def test_a_call_with_an_issued_key_fails_over_only_within_its_targets(
    harness: GatewayHarness, keys: IssuedKeys
) -> None:
    key = await keys.create("limited", targets=("a", "b"))
    harness.provider.behaviour = lambda request: (
        harness.provider.reply(request) if "at-c" in request.raw_path else responding(403)(request)
    )
    made = msgspec.structs.replace(settings(harness, POOLED, a={}, b={}, c={}), keys=keys.url)
    async with Gateway(made) as gateway:
        assert await with_key(harness, gateway, key) == 403
    assert set(targets_used(harness)) == {"a", "b"}


async def test_an_issued_key_for_no_member_of_a_pool_is_refused_and_does_not_see_its_alias(
    harness: GatewayHarness, keys: IssuedKeys
) -> None:
    elsewhere, one = await keys.create("elsewhere", targets=("d",)), await keys.create("one", targets=("b",))
    made = msgspec.structs.replace(settings(harness, POOLED, a={}, b={}, c={}, d={}), keys=keys.url)
    async with Gateway(made) as gateway:
        headers = bearer(elsewhere)
        status, _, answer = await harness.post(gateway, json=FAST, headers=headers)
        assert (status, answer["error"]["code"]) == (403, "forebay_target")
        assert "not for the targets 'a', 'b', 'c'" in answer["error"]["message"]
        assert await with_key(harness, gateway, elsewhere, "/b/v1/chat/completions") == 403
        assert harness.provider.requests == []
        harness.provider.behaviour = listing()
        seen = []
        for key in (elsewhere, one):
            url = harness.at(gateway, "/v1/models")
            async with harness.session.get(url, headers=bearer(key)) as response:
                seen.append([model["id"] for model in (await response.json())["data"]])
    assert seen == [[], ["fast"]]


async def test_a_pool_of_which_a_key_may_use_one_target_is_not_sent_the_caller_s_own_key(
    harness: GatewayHarness, keys: IssuedKeys
) -> None:
    key = await keys.create("limited", targets=("b",))
    made = msgspec.structs.replace(settings(harness, POOLED, a={}, b={}, c={}), keys=keys.url)
    async with Gateway(made) as gateway:
        headers = {"x-forebay-token": key, "authorization": "Bearer own"}
        assert (await harness.post(gateway, json=FAST, headers=headers))[0] == 200
    assert keys_used(harness) == {"": 1}
