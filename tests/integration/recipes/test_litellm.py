"""The gateway in front of litellm's proxy, between it and its provider, and called by litellm's SDK."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web
from tests.integration.recipes.claude_code import answering, error, text
from tests.integration.recipes.conftest import HERE, Run
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    DONE,
    EVENT,
    NOTHING_LEFT,
    STOP,
    GatewayHarness,
    leftovers,
    streaming,
)
from tests.support.litellm_proxy import ENVIRONMENT, MASTER_KEY, missing, running

from forebay import clock
from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
ATTEMPTS = 2


@contextlib.asynccontextmanager
async def litellm_before(url: str, directory: Path) -> AsyncIterator[str]:
    """Run litellm's proxy in front of a provider, and yield its URL. It is started and stopped in a thread."""
    providers = {"OPENAI_URL": f"{url}/v1", "ANTHROPIC_URL": url}
    loop = asyncio.get_running_loop()
    proxy = running(HERE / "litellm.yaml", directory, providers)
    started = await loop.run_in_executor(None, proxy.__enter__)
    try:
        yield started
    finally:
        await loop.run_in_executor(None, proxy.__exit__, None, None, None)


def gateway_before(url: str, **target: Any) -> Gateway:
    litellm = TargetSettings(**{"name": "litellm", "url": url, "max_attempts": ATTEMPTS, **target})
    return Gateway(GatewaySettings(listen="127.0.0.1:0", targets=(litellm,)))


def client_of(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=MASTER_KEY)


# One test, since the proxy takes ten seconds to start.
async def test_calls_pass_the_gateway_and_litellm(harness: GatewayHarness, tmp_path: Path) -> None:
    async with (
        litellm_before(harness.url, tmp_path) as litellm,
        gateway_before(litellm) as gateway,
        client_of(gateway) as client,
    ):
        await _check_answers(harness, client)
        await _check_streams(harness, client)
        await _check_anthropics_protocol(harness, gateway)
        await _check_retry_after(harness, client)
        await _check_attempts(harness, client)
        assert leftovers(gateway) == NOTHING_LEFT


async def _check_answers(harness: GatewayHarness, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**CHAT_REQUEST)  # type: ignore[call-overload]
    assert (answer.choices[0].message.content, answer.usage.total_tokens) == ("The Danube.", 50)
    (received,) = [request for request in harness.provider.requests if request.path == "/v1/chat/completions"]
    assert received.headers["authorization"] == "Bearer sk-provider"


async def _check_streams(harness: GatewayHarness, client: openai.AsyncOpenAI) -> None:
    harness.provider.behaviour = streaming(EVENT, EVENT, STOP, DONE)
    stream = await client.chat.completions.create(**CHAT_REQUEST, stream=True)  # type: ignore[call-overload]
    parts = [part async for part in stream]
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "The The "


async def _check_anthropics_protocol(harness: GatewayHarness, gateway: Gateway) -> None:
    harness.provider.behaviour = answering([text("The Danube.")], [])
    base_url = f"http://127.0.0.1:{gateway.port}/litellm"  # /v1/messages alone is for targets of Anthropic's protocol
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key=MASTER_KEY) as client:
        asked: Any = {"model": "claude-sonnet-5", "max_tokens": 50, "messages": CHAT_REQUEST["messages"]}
        async with client.messages.stream(**asked) as stream:
            message = await stream.get_final_message()
    assert (getattr(message.content[0], "text", None), message.usage.output_tokens) == ("The Danube.", 7)


async def _check_retry_after(harness: GatewayHarness, client: openai.AsyncOpenAI) -> None:
    """A Retry-After of the provider is respected, though litellm renames it."""
    times: list[float] = []
    answers = [error(429, "rate_limit_error", retry_after="2"), web.json_response(CHAT_RESPONSE)]
    behave = answering(answers, [])

    async def timed(request: web.BaseRequest) -> web.StreamResponse:
        times.append(clock.now())
        return await behave(request)

    harness.provider.behaviour = timed
    answer = await client.chat.completions.create(**CHAT_REQUEST)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == "The Danube."
    assert len(times) == 2
    assert times[1] - times[0] >= 1.9  # two seconds after the answer


async def _check_attempts(harness: GatewayHarness, client: openai.AsyncOpenAI) -> None:
    """A failure is retried by the gateway alone: neither by litellm nor by the caller's SDK."""
    bodies: list[Any] = []
    harness.provider.behaviour = answering([error(500, "api_error") for _ in range(9)], bodies)
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(**CHAT_REQUEST)  # type: ignore[call-overload]
    assert len(bodies) == ATTEMPTS


async def test_the_gateway_paces_calls_between_litellm_and_its_provider(
    harness: GatewayHarness, tmp_path: Path
) -> None:
    async with (
        Gateway(harness.settings(max_attempts=ATTEMPTS)) as gateway,
        litellm_before(harness.at(gateway, "/openai"), tmp_path) as litellm,
        openai.AsyncOpenAI(base_url=f"{litellm}/v1", api_key=MASTER_KEY, max_retries=0) as client,
    ):
        await _check_answers(harness, client)
        await _check_attempts(harness, client)


@pytest.mark.parametrize(("model", "path"), [("openai/gpt-4o", "/v1"), ("anthropic/claude-sonnet-5", "")])
async def test_litellms_sdk_calls_through_the_gateway_and_adds_no_retries(
    harness: GatewayHarness, run: Run, model: str, path: str
) -> None:
    is_openai = model.startswith("openai")
    python = str(ENVIRONMENT / "bin/python")
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it calls its own home otherwise
    bodies: list[Any] = []
    async with Gateway(harness.settings(max_attempts=ATTEMPTS)) as gateway:
        command = (python, str(HERE / "litellm_sdk.py"), model, harness.at(gateway, path))
        harness.provider.behaviour = streaming(EVENT, STOP, DONE) if is_openai else answering([text("The ")], bodies)
        assert await run(*command, "stream", environment=environment) == {"text": "The "}
        harness.provider.behaviour = answering([error(500, "api_error") for _ in range(9)], bodies := [])
        assert await run(*command, environment=environment) == {"error": "InternalServerError", "status": 500}
        assert len(bodies) == ATTEMPTS
        assert bodies[0]["model"] == model.partition("/")[2]
