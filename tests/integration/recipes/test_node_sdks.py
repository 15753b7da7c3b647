"""The gateway in front of aimock, called by OpenAI's SDK for Node and by Vercel's AI SDK."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import pytest
from tests.contract.sdks.aimock import NODE_MODULES, Aimock, missing
from tests.integration.recipes.conftest import HERE, Run
from tests.support.gateway_harness import NOTHING_LEFT, leftovers, until

from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway

REPLY: Final = "The Danube rises in the Black Forest."
ATTEMPTS: Final = 2
VERCEL: Final = {"openai": "/v1/responses", "chat": "/v1/chat/completions", "anthropic": "/v1/messages"}
_PACKAGES: Final = [NODE_MODULES / name for name in ("openai", "ai", "@ai-sdk/openai", "@ai-sdk/anthropic", "zod")]
_MISSING: Final = missing(*_PACKAGES)

pytestmark = pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")


def gateway_before(aimock: Aimock, **target: Any) -> Gateway:
    targets = [
        TargetSettings(**{"name": name, "url": aimock.url, "max_attempts": ATTEMPTS, **target})
        for name in ("openai", "anthropic")
    ]
    return Gateway(GatewaySettings(listen="127.0.0.1:0", targets=tuple(targets)))


def url_of(gateway: Gateway) -> str:
    return f"http://127.0.0.1:{gateway.port}"


class Client:
    """A client in Node, and the calls that reach its provider."""

    def __init__(self, run: Run, aimock: Aimock) -> None:
        self._run = run
        self._aimock = aimock

    async def openai(self, gateway: Gateway, question: str, how: str = "") -> Any:
        return await self._node("openai_sdk.cjs", f"{url_of(gateway)}/v1", question, how)

    async def vercel(self, gateway: Gateway, question: str, provider: str, how: str = "", *, retries: str = "0") -> Any:
        return await self._node("vercel_ai.cjs", url_of(gateway), question, provider, retries, how)

    async def _node(self, program: str, url: str, *arguments: str) -> Any:
        command = ("node", str(HERE / program), str(NODE_MODULES), url, self._aimock.test_id, *arguments)
        return await self._run(*command)

    async def statuses(self) -> list[int]:
        """Return the status of each call that reached the provider."""
        requests = await asyncio.get_running_loop().run_in_executor(None, lambda: self._aimock.requests)
        return [request["response"]["status"] for request in requests]

    async def paths(self) -> list[str]:
        requests = await asyncio.get_running_loop().run_in_executor(None, lambda: self._aimock.requests)
        return [request["path"] for request in requests]


@pytest.fixture
def client(run: Run, aimock: Aimock) -> Client:
    return Client(run, aimock)


# --- OpenAI's SDK ---


async def test_openais_sdk_gets_whole_and_streamed_answers(client: Client, aimock: Aimock) -> None:
    async with gateway_before(aimock) as gateway:
        answer = await client.openai(gateway, "Which river?")
        assert (answer["text"], answer["usage"]["total_tokens"]) == (REPLY, 18)
        assert (await client.openai(gateway, "Which river?", "stream"))["text"] == REPLY
        assert await client.statuses() == [200, 200]


async def test_openais_sdk_receives_tool_calls(client: Client, aimock: Aimock) -> None:
    async with gateway_before(aimock) as gateway:
        answer = await client.openai(gateway, "How is the weather?", "tool")
        assert answer["tool"] == {"name": "weather", "arguments": '{"city":"Paris"}'}


async def test_a_stream_that_openais_sdk_aborts_returns_its_permit(client: Client, aimock: Aimock) -> None:
    async with gateway_before(aimock, max_concurrent=1) as gateway:
        assert REPLY not in (await client.openai(gateway, "Tell it slowly.", "abort"))["text"]
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)


@pytest.mark.slow
async def test_a_throttled_call_of_openais_sdk_is_retried_by_the_gateway_alone(client: Client, aimock: Aimock) -> None:
    async with gateway_before(aimock) as gateway:
        assert (await client.openai(gateway, "throttled once"))["text"] == REPLY
        assert await client.statuses() == [429, 200]


async def test_openais_sdk_at_its_defaults_adds_no_retries(client: Client, aimock: Aimock) -> None:
    async with gateway_before(aimock) as gateway:
        answer = await client.openai(gateway, "fails always")
        assert (answer["error"], answer["status"]) == ("InternalServerError", 500)
        assert await client.statuses() == [500] * ATTEMPTS


async def test_a_mistake_reaches_openais_sdk_as_the_provider_put_it(client: Client, aimock: Aimock) -> None:
    async with gateway_before(aimock) as gateway:
        answer = await client.openai(gateway, "wrong")
        assert answer == {"error": "BadRequestError", "status": 400, "message": "400 No such field"}
        assert await client.statuses() == [400]


# --- Vercel's AI SDK ---


@pytest.mark.parametrize("provider", VERCEL)
async def test_vercels_sdk_generates_and_streams_text(client: Client, aimock: Aimock, provider: str) -> None:
    async with gateway_before(aimock) as gateway:
        answer = await client.vercel(gateway, "Which river?", provider)
        assert (answer["text"], answer["usage"]["inputTokens"], answer["usage"]["outputTokens"]) == (REPLY, 11, 7)
        assert (await client.vercel(gateway, "Which river?", provider, "stream"))["text"] == REPLY
        assert await client.paths() == [VERCEL[provider]] * 2


@pytest.mark.parametrize("provider", VERCEL)
async def test_vercels_sdk_calls_a_tool_and_goes_on(client: Client, aimock: Aimock, provider: str) -> None:
    async with gateway_before(aimock) as gateway:
        answer = await client.vercel(gateway, "How is the weather?", provider, "tool")
        assert answer == {"text": REPLY, "cities": ["Paris"]}
        assert await client.statuses() == [200, 200]


@pytest.mark.parametrize("provider", VERCEL)
async def test_a_stream_that_vercels_sdk_aborts_returns_its_permit(
    client: Client, aimock: Aimock, provider: str
) -> None:
    async with gateway_before(aimock, max_concurrent=1) as gateway:
        assert REPLY not in (await client.vercel(gateway, "Tell it slowly.", provider, "abort"))["text"]
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)


@pytest.mark.slow
@pytest.mark.parametrize("provider", VERCEL)
async def test_a_throttled_call_of_vercels_sdk_is_retried_by_the_gateway_alone(
    client: Client, aimock: Aimock, provider: str
) -> None:
    async with gateway_before(aimock) as gateway:
        assert (await client.vercel(gateway, "throttled once", provider, retries="default"))["text"] == REPLY
        assert await client.statuses() == [429, 200]


@pytest.mark.parametrize("provider", VERCEL)
async def test_vercels_sdk_adds_no_retries_with_max_retries_0(client: Client, aimock: Aimock, provider: str) -> None:
    async with gateway_before(aimock) as gateway:
        answer = await client.vercel(gateway, "fails always", provider)
        assert (answer["error"], answer["status"]) == ("AI_APICallError", 500)
        assert await client.statuses() == [500] * ATTEMPTS


@pytest.mark.slow
async def test_vercels_sdk_at_its_defaults_triples_the_gateways_attempts(client: Client, aimock: Aimock) -> None:
    async with gateway_before(aimock) as gateway:  # it does not read x-should-retry, as the page says
        answer = await client.vercel(gateway, "fails always", "chat", retries="default")
        assert answer["error"] == "AI_RetryError"
        assert await client.statuses() == [500] * ATTEMPTS * 3
