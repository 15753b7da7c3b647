"""Limits of issued keys: rates, calls in progress and money, over all targets, changed while the gateway runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    EVENT,
    NOTHING_LEFT,
    GatewayHarness,
    leftovers,
    streaming,
    until,
)
from tests.support.issued_keys import IssuedKeys, bearer, in_thread, refresh
from tests.support.metric_samples import total

from forebay.gateway.callers.issued_keys import IssuedKey
from forebay.gateway.server import Gateway
from forebay.quota import Price

PRICES = {"*": Price(input=10_000, output=10_000)}  # the answer's 50 tokens cost half a dollar
IMPATIENT = {"x-stainless-read-timeout": "2"}
MESSAGES: Any = CHAT_REQUEST["messages"]


def opened(
    harness: GatewayHarness, keys: IssuedKeys, *, gateway: dict[str, Any] | None = None, **target: Any
) -> Gateway:
    return Gateway(harness.settings(gateway={"keys": keys.url, **(gateway or {})}, prices=PRICES, **target))


def by(text: str) -> dict[str, str]:
    return {**bearer(text), **IMPATIENT}


def in_progress(gateway: Gateway, name: str) -> int:
    assert gateway.forwarder.keys is not None
    return gateway.forwarder.keys.limits_of(IssuedKey(name=name)).in_progress


async def test_a_rate_of_a_key_is_a_429_with_a_retry_after(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text, other = await keys.create("writer", rpm=2), await keys.create("reader", rpm=2)
    async with opened(harness, keys) as gateway:
        answers = [await harness.post(gateway, headers=by(text)) for _ in range(3)]
        assert [status for status, _, _ in answers] == [200, 200, 429]
        _, headers, body = answers[-1]
        assert headers["x-forebay-limited-by"] == "key:writer:requests per minute"
        assert float(headers["retry-after-ms"]) > 10_000
        assert body["error"]["type"] == "rate_limit_error"
        limit = "key requests per minute"  # not one of the target
        assert total(gateway, "forebay_gateway_rejections_total", limited_by=limit) == 1
        assert (await harness.post(gateway, headers=by(other)))[0] == 200
        assert leftovers(gateway) == NOTHING_LEFT


async def test_the_sdks_raise_a_rate_limit_error(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", rpm=1)
    async with opened(harness, keys) as gateway:
        await harness.post(gateway, headers=by(text))
        url = f"http://127.0.0.1:{gateway.port}"
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=text, max_retries=0, timeout=2.0) as client:
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        async with anthropic.AsyncAnthropic(base_url=url, api_key=text, max_retries=0, timeout=2.0) as claude:
            with pytest.raises(anthropic.RateLimitError):
                await claude.messages.create(model="claude-sonnet-4", max_tokens=5, messages=MESSAGES)


async def test_a_rate_holds_over_all_targets(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", rpm=2)
    async with opened(harness, keys) as gateway:
        paths = ("/openai/v1/chat/completions", "/anthropic/v1/messages", "/openai/v1/chat/completions")
        statuses = [(await harness.post(gateway, path, headers=by(text)))[0] for path in paths]
    assert statuses == [200, 200, 429]


async def test_tokens_count_as_they_were_used(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", tpm=1000)
    async with opened(harness, keys) as gateway:
        call = {**CHAT_REQUEST, "max_tokens": 600}  # of which 50 are used, input included
        statuses = [(await harness.post(gateway, json=call, headers=by(text)))[0] for _ in range(3)]
        assert statuses == [200, 200, 200]
        assert (await harness.post(gateway, json={**call, "max_tokens": 990}, headers=by(text)))[0] == 429


async def test_calls_beyond_max_concurrent_wait_until_a_stream_has_ended(
    harness: GatewayHarness, keys: IssuedKeys
) -> None:
    text, goes_on = await keys.create("writer", max_concurrent=1), asyncio.Event()

    async def stream(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(EVENT)
        await goes_on.wait()
        await response.write_eof()
        return response

    harness.provider.behaviour = stream
    headers = bearer(text)
    async with opened(harness, keys) as gateway:
        call: Any = {"json": {**CHAT_REQUEST, "stream": True}, "headers": headers}
        async with harness.session.post(harness.at(gateway), **call) as response:
            assert await response.content.readany()
            harness.provider.behaviour = harness.provider.reply
            waiting = asyncio.create_task(harness.post(gateway, headers=headers))
            limits = gateway.forwarder.keys.limits_of(IssuedKey(name="writer"))  # type: ignore[union-attr]
            await until(lambda: bool(limits._account.account.queue))
            assert len(harness.provider.requests) == 1
            goes_on.set()
            await response.read()
        assert (await waiting)[0] == 200
        assert in_progress(gateway, "writer") == 0


async def test_a_caller_that_leaves_frees_the_slot_of_its_key(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", max_concurrent=1)
    harness.provider.behaviour = streaming(EVENT, None)
    async with opened(harness, keys) as gateway:
        call: Any = {"json": {**CHAT_REQUEST, "stream": True}, "headers": by(text)}
        async with harness.session.post(harness.at(gateway), **call) as response:
            assert await response.content.readany()
            assert in_progress(gateway, "writer") == 1
        await until(lambda: in_progress(gateway, "writer") == 0)
        harness.provider.behaviour = harness.provider.reply
        assert (await harness.post(gateway, headers=by(text)))[0] == 200


async def test_a_spent_budget_of_a_key_is_a_402_over_all_targets(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text, other = await keys.create("writer", budget_usd=1.2), await keys.create("reader")
    call = {**CHAT_REQUEST, "max_tokens": 20}
    async with opened(harness, keys) as gateway:
        paths = ("/openai/v1/chat/completions", "/anthropic/v1/chat/completions", "/openai/v1/chat/completions")
        answers = [await harness.post(gateway, path, json=call, headers=by(text)) for path in paths]
        assert [status for status, _, _ in answers] == [200, 200, 402]
        _, headers, body = answers[-1]
        assert headers["x-forebay-limited-by"] == "key:writer:budget"
        assert headers["x-should-retry"] == "false"
        assert "the budget of key 'writer' would be overspent" in body["error"]["message"]
        assert (await harness.post(gateway, json=call, headers=by(other)))[0] == 200
        async with harness.session.get(harness.at(gateway, "/v1/models"), headers=by(text)) as response:
            assert response.status == 200  # it costs nothing


async def test_a_call_without_a_price_is_refused_to_a_key_with_a_budget(
    harness: GatewayHarness, keys: IssuedKeys
) -> None:
    text, other = await keys.create("writer", budget_usd=1.0), await keys.create("reader")
    settings = harness.settings(gateway={"keys": keys.url})
    call = {**CHAT_REQUEST, "model": "a-model-of-our-own"}
    async with Gateway(settings) as gateway:
        status, headers, _ = await harness.post(gateway, json=call, headers=by(text))
        assert (status, headers["x-forebay-limited-by"].rpartition(":")[2]) == (400, "unpriced")
        assert (await harness.post(gateway, json=call, headers=by(other)))[0] == 200


async def test_a_raised_budget_keeps_what_was_spent(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", budget_usd=0.6)
    call = {**CHAT_REQUEST, "max_tokens": 20}
    async with opened(harness, keys) as gateway:
        statuses = [(await harness.post(gateway, json=call, headers=by(text)))[0] for _ in range(2)]
        await keys.update("writer", budget_usd=1.2)
        await refresh(gateway)
        statuses += [(await harness.post(gateway, json=call, headers=by(text)))[0] for _ in range(2)]
        await keys.rotate("writer", grace=3600.0)
        await keys.update("writer", enabled=False)
        await refresh(gateway)
        await keys.update("writer", enabled=True)
        await refresh(gateway)
        statuses.append((await harness.post(gateway, json=call, headers=by(text)))[0])
    assert statuses == [200, 402, 200, 402, 402]


async def test_changed_rates_are_in_force_without_a_restart(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", rpm=1)
    async with opened(harness, keys) as gateway:
        statuses = [(await harness.post(gateway, headers=by(text)))[0] for _ in range(2)]
        await keys.update("writer", rpm=2)
        await refresh(gateway)
        statuses += [(await harness.post(gateway, headers=by(text)))[0] for _ in range(2)]
        await keys.update("writer", rpm=None)
        await refresh(gateway)
        statuses += [(await harness.post(gateway, headers=by(text)))[0] for _ in range(2)]
    assert statuses == [200, 429, 200, 429, 200, 200]


async def test_a_refused_call_takes_nothing_of_the_limits_of_its_key(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", rpm=1, models=("gpt-4o",))
    async with opened(harness, keys) as gateway:
        assert (await harness.post(gateway, json={**CHAT_REQUEST, "model": "o3"}, headers=by(text)))[0] == 403
        assert (await harness.post(gateway, data=b"{", headers=by(text)))[0] == 400
        assert (await harness.post(gateway, headers=by(text)))[0] == 200


async def test_the_access_log_names_the_key_and_never_shows_it(
    harness: GatewayHarness, keys: IssuedKeys, tmp_path: Path
) -> None:
    text, file = await keys.create("writer", tenant="acme"), tmp_path / "access.log"
    log = {"access_log": "json", "access_log_to": str(file)}
    async with opened(harness, keys, gateway=log) as gateway:
        await harness.post(gateway, headers=by(text))
        for path in (f"/v1/x?key={text}", f"/v1/{text}", f"/{'x' * 180}/{text}"):
            await harness.post(gateway, path, headers=by(text))
        await keys.revoke("writer")
        await refresh(gateway)
        assert (await harness.post(gateway, headers=by(text)))[0] == 401
    lines = (await in_thread(file.read_text)).splitlines()
    assert ['"key":"writer"' in line for line in lines] == [True, False, False, False, True]
    assert '"tenant":"acme"' in lines[0]
    assert text[:20] not in "".join(lines)
