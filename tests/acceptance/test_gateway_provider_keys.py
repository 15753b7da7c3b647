"""Provider keys that the gateway holds: every call is sent with them, and no caller's credential is."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    HELD_KEY,
    MESSAGE_RESPONSE,
    GatewayHarness,
    responding,
)

from forebay.gateway import FallbackSettings, GatewaySettings, InvalidProviderKey, TargetSettings
from forebay.gateway.server import Gateway

CREDENTIALS = {
    "authorization": "Bearer sk-of-the-caller",
    "x-api-key": "sk-of-the-caller",
    "api-key": "sk-of-the-caller",
    "x-goog-api-key": "sk-of-the-caller",
    "ocp-apim-subscription-key": "sk-of-the-caller",
    "cookie": "session=sk-of-the-caller",
    "openai-organization": "org-of-the-caller",
    "openai-project": "proj-of-the-caller",
    "x-goog-user-project": "proj-of-the-caller",
    "sec-websocket-protocol": "realtime, openai-insecure-api-key.sk-of-the-caller",
}


def holding(harness: GatewayHarness, **target: Any) -> GatewaySettings:
    return harness.settings(api_key_env="HELD", **target)


def environment() -> dict[str, str]:
    return {"HELD": f" {HELD_KEY}\n"}


@pytest.mark.parametrize(
    ("target", "path", "header", "value"),
    [
        ("openai", "/v1/chat/completions", "authorization", f"Bearer {HELD_KEY}"),
        ("anthropic", "/v1/messages", "x-api-key", HELD_KEY),
        ("anthropic", "/anthropic/v1/messages/count_tokens", "x-api-key", HELD_KEY),
        ("anthropic", "/anthropic/v1/models", "x-api-key", HELD_KEY),
        ("anthropic", "/anthropic/v1/chat/completions", "authorization", f"Bearer {HELD_KEY}"),
        ("azure", "/azure/openai/deployments/gpt-4o/chat/completions", "api-key", HELD_KEY),
        ("vllm", "/vllm/v1/chat/completions", "authorization", f"Bearer {HELD_KEY}"),
    ],
)
async def test_a_call_is_sent_with_the_held_key_where_its_provider_reads_it(
    harness: GatewayHarness, target: str, path: str, header: str, value: str
) -> None:
    settings = GatewaySettings(
        targets=(TargetSettings(name=target, url=harness.url, api_key_env="HELD"),), listen="127.0.0.1:0"
    )
    async with Gateway(settings, environment()) as gateway:
        await harness.post(gateway, path, headers=CREDENTIALS)
    (request,) = harness.provider.requests
    sent = {name.lower(): text for name, text in request.headers.items()}
    assert sent[header] == value
    assert [name for name in sent if name in CREDENTIALS] == [header]
    assert "of-the-caller" not in str(sent)


async def test_a_caller_needs_no_credential(harness: GatewayHarness) -> None:
    async with Gateway(holding(harness), environment()) as gateway:
        status, _, body = await harness.post(gateway)
    assert (status, body) == (200, CHAT_RESPONSE)


async def test_the_keys_in_a_query_are_not_forwarded(harness: GatewayHarness) -> None:
    path = "/v1/chat/completions?a=1&key=sk-caller&b=%20x&api%2Dkey=sk-caller&Subscription-Key=sk-caller&c"
    async with Gateway(holding(harness), environment()) as gateway:
        await harness.post(gateway, path)
    (request,) = harness.provider.requests
    assert request.raw_path == "/v1/chat/completions?a=1&b=%20x&c"


async def test_all_callers_share_the_account_of_the_held_key(harness: GatewayHarness) -> None:
    async with Gateway(holding(harness), environment()) as gateway:
        for key in ("sk-1", "sk-2"):
            await harness.post(gateway, headers={"authorization": f"Bearer {key}"})
        (account,) = gateway.forwarder.targets[0].upstream.statistics().accounts
    assert account.sent == 2


async def test_the_sdks_call_with_any_key(harness: GatewayHarness) -> None:
    async with Gateway(holding(harness), environment()) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", organization="o") as client:
            messages: Any = CHAT_REQUEST["messages"]
            chat = await client.chat.completions.create(model="gpt-4o", messages=messages)
        harness.provider.behaviour = responding(
            200, json.dumps(MESSAGE_RESPONSE).encode(), content_type="application/json"
        )
        bearer = {"authorization": "Bearer unused"}
        async with anthropic.AsyncAnthropic(base_url=url, api_key="unused", default_headers=bearer) as claude:
            message = await claude.messages.create(model="claude-sonnet-4", max_tokens=20, messages=messages)
    assert chat.choices[0].message.content == "The Danube."
    assert message.usage.output_tokens == 20
    sent = [request.headers for request in harness.provider.requests]
    assert sent[0]["authorization"] == f"Bearer {HELD_KEY}"
    assert sent[1]["x-api-key"] == HELD_KEY
    assert "authorization" not in sent[1]


@pytest.mark.parametrize("value", ["", "  \n", "two words", "sk-ü"])
async def test_a_key_that_is_missing_or_invalid_is_an_error_at_start(harness: GatewayHarness, value: str) -> None:
    with pytest.raises(InvalidProviderKey, match=r"target 'openai' cannot be read from the environment variable HELD"):
        async with Gateway(holding(harness), {"HELD": value}):
            pass


@pytest.mark.blocks
async def test_a_key_is_read_from_a_file(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "key"
    with pytest.raises(InvalidProviderKey, match="No such file"):
        async with Gateway(harness.settings(api_key_file=str(file))):
            pass
    file.write_text(f"{HELD_KEY}\n")
    async with Gateway(harness.settings(api_key_file=str(file))) as gateway:
        await harness.post(gateway)
    assert harness.provider.requests[0].headers["authorization"] == f"Bearer {HELD_KEY}"


async def test_a_refused_held_key_is_no_fault_of_the_caller(
    harness: GatewayHarness, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {HELD_KEY}"}}).encode()
    harness.provider.behaviour = responding(401, body, content_type="application/json")
    async with Gateway(holding(harness), environment()) as gateway:
        with caplog.at_level(logging.ERROR, logger="forebay"):
            answers = [await harness.post(gateway) for _ in range(2)]
    for status, headers, answer in answers:
        assert (status, answer["error"]["code"]) == (502, "forebay_provider_key")
        assert headers["x-should-retry"] == "false"
        assert HELD_KEY not in str(answer)
    assert [record.message.count("refused the API key") for record in caplog.records] == [1]
    assert HELD_KEY not in caplog.text


async def test_an_error_that_quotes_the_held_key_passes_without_it(harness: GatewayHarness) -> None:
    body = json.dumps({"error": {"message": f"{HELD_KEY} may not use this model"}}).encode()
    harness.provider.behaviour = responding(403, body, content_type="application/json")
    async with Gateway(holding(harness), environment()) as gateway:
        status, _, answer = await harness.post(gateway)
    assert (status, answer["error"]["message"]) == (403, "*** may not use this model")


async def test_a_fallback_uses_the_key_of_its_target(harness: GatewayHarness) -> None:
    elsewhere = FallbackSettings(target="second")
    first = TargetSettings(name="first", url=harness.url, api_key_env="ONE", rpm=1, fallback=(elsewhere,))
    second = TargetSettings(name="second", url=harness.url, api_key_env="TWO")
    settings = GatewaySettings(targets=(first, second), listen="127.0.0.1:0")
    async with Gateway(settings, {"ONE": "sk-1", "TWO": "sk-2"}) as gateway:
        for _ in range(2):
            sent = {"authorization": "Bearer sk-caller", "x-stainless-read-timeout": "2"}
            assert (await harness.post(gateway, "/first/v1/chat/completions", headers=sent))[0] == 200
    keys = [request.headers.getall("authorization") for request in harness.provider.requests]
    assert keys == [["Bearer sk-1"], ["Bearer sk-2"]]
