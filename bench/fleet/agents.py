"""Agents that call with the real SDKs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
import openai

from bench.fleet.cases import MAX_TOKENS, MODELS, FleetCase, Turn
from forebay.simulation.provider.provider_config import Dialect

_STREAM_ATTEMPTS = 5  # attempts of an agent at a stream that breaks off
_BROKEN = (httpx2.TransportError, openai.APIError, anthropic.APIError)


@dataclass(slots=True)
class FleetResult:
    """The result of a fleet.

    Attributes:
        seconds: until the last agent finished or failed.
        failed: agents that did not finish.
        reasons: the errors of these.
    """

    seconds: float = 0.0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


async def run_fleet(case: FleetCase, url: str, client: Callable[[], httpx2.AsyncClient | None]) -> FleetResult:
    """Start all agents at once, and wait for them.

    Args:
        case: what they do.
        url: of the provider, or of the gateway before it.
        client: makes the HTTP client of an SDK; None for the SDK's own.
    """
    result = FleetResult()
    clock = asyncio.get_running_loop().time
    started = clock()

    async def go(number: int, plan: tuple[Turn, ...]) -> None:
        sdk = _sdk(case.dialect, url, client())
        streams = case.streams and number % 2 == 1
        try:
            async with sdk:
                for turn in plan:
                    await asyncio.sleep(turn.tools)
                    await _call(sdk, case.dialect, turn, streams=streams)
        except _BROKEN as error:
            result.failed += 1
            result.reasons[_reason(error)] += 1

    await asyncio.gather(*(go(number, plan) for number, plan in enumerate(case.plans)))
    result.seconds = clock() - started
    return result


def _sdk(dialect: Dialect, url: str, client: httpx2.AsyncClient | None) -> Any:
    """Return the SDK at its defaults: two retries, a timeout of ten minutes."""
    if dialect is Dialect.OPENAI:
        return openai.AsyncOpenAI(api_key="sk-simulated", base_url=f"{url}/v1", http_client=client)
    return anthropic.AsyncAnthropic(api_key="sk-simulated", base_url=url, http_client=client)


async def _call(sdk: Any, dialect: Dialect, turn: Turn, *, streams: bool) -> None:
    create = sdk.chat.completions.create if dialect is Dialect.OPENAI else sdk.messages.create
    request: dict[str, Any] = {
        "model": MODELS[dialect],
        "max_tokens": MAX_TOKENS,
        "messages": [{"role": "user", "content": turn.text()}],
        "extra_headers": {"x-simulated-output-tokens": str(turn.output_tokens)},
    }
    if not streams:
        await create(**request)
        return
    for attempt in range(_STREAM_ATTEMPTS):
        stream = await create(stream=True, **request)
        try:
            async for _ in stream:
                pass
        except _BROKEN:
            if attempt == _STREAM_ATTEMPTS - 1:
                raise
        else:
            return


def _reason(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    return type(error).__name__ if status is None else f"{status} {type(error).__name__}"
