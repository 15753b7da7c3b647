"""Agents that call with the real SDKs, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
import openai

from bench.fleet.cases import MODELS, MOST, Case, Turn
from forebay.simulation.provider.provider_config import Dialect

_ASKS = 5  # times that an agent asks for a stream that breaks off
_BROKEN = (httpx2.TransportError, openai.APIError, anthropic.APIError)


@dataclass(slots=True)
class Outcome:
    """What became of a fleet.

    Attributes:
        seconds: until the last agent was done, or gave up.
        failed: agents that did not finish.
        whys: what these failed by.
    """

    seconds: float = 0.0
    failed: int = 0
    whys: Counter[str] = field(default_factory=Counter)


async def run_fleet(case: Case, url: str, client: Callable[[], httpx2.AsyncClient | None]) -> Outcome:
    """Start all agents at once, and wait for them.

    Args:
        case: what they do.
        url: of the provider, or of what stands before it.
        client: makes what carries an SDK's requests; None for the SDK's own.
    """
    outcome = Outcome()
    clock = asyncio.get_running_loop().time
    began = clock()

    async def go(number: int, plan: tuple[Turn, ...]) -> None:
        sdk = _sdk(case.dialect, url, client())
        streams = case.streams and number % 2 == 1
        try:
            async with sdk:
                for turn in plan:
                    await asyncio.sleep(turn.tools)
                    await _call(sdk, case.dialect, turn, streams=streams)
        except _BROKEN as error:
            outcome.failed += 1
            outcome.whys[_why(error)] += 1

    await asyncio.gather(*(go(number, plan) for number, plan in enumerate(case.plans)))
    outcome.seconds = clock() - began
    return outcome


def _sdk(dialect: Dialect, url: str, client: httpx2.AsyncClient | None) -> Any:
    """As its user makes it: two retries, ten minutes."""
    if dialect is Dialect.OPENAI:
        return openai.AsyncOpenAI(api_key="sk-simulated", base_url=f"{url}/v1", http_client=client)
    return anthropic.AsyncAnthropic(api_key="sk-simulated", base_url=url, http_client=client)


async def _call(sdk: Any, dialect: Dialect, turn: Turn, *, streams: bool) -> None:
    create = sdk.chat.completions.create if dialect is Dialect.OPENAI else sdk.messages.create
    asked: dict[str, Any] = {
        "model": MODELS[dialect],
        "max_tokens": MOST,
        "messages": [{"role": "user", "content": turn.text()}],
        "extra_headers": {"x-simulated-output-tokens": str(turn.output_tokens)},
    }
    if not streams:
        await create(**asked)
        return
    for ask in range(_ASKS):
        stream = await create(stream=True, **asked)
        try:
            async for _ in stream:
                pass
        except _BROKEN:
            if ask == _ASKS - 1:
                raise
        else:
            return


def _why(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    return type(error).__name__ if status is None else f"{status} {type(error).__name__}"
