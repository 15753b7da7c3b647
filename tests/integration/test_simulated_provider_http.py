"""The simulated provider over HTTP, with the real SDKs of OpenAI and Anthropic."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import anthropic
import httpx2
import openai
import pytest

from forebay.simulation.provider.provider_config import (
    BusyReason,
    CapacityStep,
    Dialect,
    Faults,
    ProviderConfig,
    SimulatedRateLimit,
    Unit,
)
from forebay.simulation.provider.provider_process import ProviderProcess, ProviderProcessFailed, start_provider

SAY: Final[list[Any]] = [{"role": "user", "content": "Tell me of rivers."}]
GPT, CLAUDE = "gpt-4o-mini", "claude-sonnet-5"


def config(**rest: Any) -> ProviderConfig:
    settings: dict[str, Any] = {"ttft": 0.01, "tpot": 0.0005, "noise": 0.0, "slots": 100} | rest
    return ProviderConfig(**settings)


@pytest.fixture(scope="module")
def process() -> Iterator[ProviderProcess]:
    with start_provider(config()) as provider:
        yield provider


@pytest.fixture
def provider(process: ProviderProcess) -> ProviderProcess:
    process.reset(config())
    return process


@pytest.fixture
def gpt(provider: ProviderProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=provider.openai_url, api_key="sk-simulated", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(provider: ProviderProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=provider.url, api_key="sk-simulated", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_gpt(provider: ProviderProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=provider.openai_url, api_key="sk-simulated", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_claude(provider: ProviderProcess) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=provider.url, api_key="sk-simulated", max_retries=0) as client:
        yield client


async def ask(provider: ProviderProcess, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Poll the provider's statistics until they are as expected, for at most 5 s."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        async with asyncio.timeout(5):
            while not done(statistics := await loop.run_in_executor(pool, provider.statistics)):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
    return statistics


# --- success --------------------------------------------------------------------------------------------------------


def test_an_openai_answer(provider: ProviderProcess, gpt: openai.OpenAI) -> None:
    done = gpt.chat.completions.create(
        model=GPT, messages=SAY, extra_headers={"x-simulated-output-tokens": "30", "x-simulated-run": "run-1"}
    )
    assert done.choices[0].finish_reason == "stop"
    assert len((done.choices[0].message.content or "").split()) == 30
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (9, 30, 39)
    assert provider.statistics()["finished"] == 1
    assert provider.runs()["run-1"]["output_tokens"] == 30


def test_an_openai_answer_stops_at_its_bound(gpt: openai.OpenAI) -> None:
    bounds: list[dict[str, Any]] = [{"max_tokens": 7}, {"max_completion_tokens": 7}]
    for bound in bounds:
        done = gpt.chat.completions.create(
            model=GPT, messages=SAY, extra_headers={"x-simulated-output-tokens": "30"}, **bound
        )
        assert done.choices[0].finish_reason == "length"
        assert done.usage is not None
        assert done.usage.completion_tokens == 7


def test_an_openai_stream(gpt: openai.OpenAI) -> None:
    with gpt.chat.completions.create(
        model=GPT,
        messages=SAY,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-simulated-output-tokens": "30"},
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text.split()) == 30
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_an_anthropic_answer(claude: anthropic.Anthropic) -> None:
    done = claude.messages.create(
        model=CLAUDE,
        max_tokens=100,
        messages=SAY,
        system="Be brief.",
        extra_headers={"x-simulated-output-tokens": "30"},
    )
    assert done.stop_reason == "end_turn"
    assert (done.usage.input_tokens, done.usage.output_tokens) == (11, 30)
    assert done.content[0].type == "text"
    assert len(done.content[0].text.split()) == 30


def test_an_anthropic_stream(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model=CLAUDE, max_tokens=20, messages=SAY, extra_headers={"x-simulated-output-tokens": "30"}
    ) as stream:
        text = "".join(stream.text_stream)
        done = stream.get_final_message()
    assert done.stop_reason == "max_tokens"
    assert done.usage.output_tokens == 20
    assert len(text.split()) == 20


async def test_both_async_clients_stream_at_once(
    provider: ProviderProcess, async_gpt: openai.AsyncOpenAI, async_claude: anthropic.AsyncAnthropic
) -> None:
    async def streamed_gpt() -> int:
        stream = await async_gpt.chat.completions.create(model=GPT, messages=SAY, stream=True, max_tokens=40)
        return sum([len((chunk.choices[0].delta.content or "").split()) async for chunk in stream])

    async def streamed_claude() -> int:
        async with async_claude.messages.stream(model=CLAUDE, max_tokens=40, messages=SAY) as stream:
            return (await stream.get_final_message()).usage.output_tokens

    async def whole_gpt() -> int:
        done = await async_gpt.chat.completions.create(model=GPT, messages=SAY, max_tokens=40)
        assert done.usage is not None
        return done.usage.completion_tokens

    async def whole_claude() -> int:
        return (await async_claude.messages.create(model=CLAUDE, max_tokens=40, messages=SAY)).usage.output_tokens

    calls = [call() for call in (streamed_gpt, streamed_claude, whole_gpt, whole_claude) for _ in range(10)]
    tokens = await asyncio.gather(*calls)
    statistics = await ask(provider, lambda statistics: statistics["in_flight"] == 0)
    assert statistics["output_tokens"] == sum(tokens)
    assert statistics["finished"] == statistics["calls"] == 40
    assert statistics["peak_in_flight"] > 10


def test_the_models_are_those_with_a_price(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert GPT in [model.id for model in gpt.models.list()]
    assert "claude-sonnet" in [model.id for model in claude.models.list()]
    with pytest.raises(openai.NotFoundError):
        gpt.chat.completions.create(model="llama", messages=SAY)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_openai_rate_limit(provider: ProviderProcess, gpt: openai.OpenAI) -> None:
    provider.reset(config(rate_limits=ProviderConfig.openai(rpm=2, tpm=1000).rate_limits))
    answer = gpt.chat.completions.with_raw_response.create(model=GPT, messages=SAY, max_tokens=100)
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert answer.headers["x-ratelimit-reset-requests"] == "30s"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "900"
    assert answer.headers["x-ratelimit-reset-tokens"] == "6s"
    gpt.chat.completions.create(model=GPT, messages=SAY)
    with pytest.raises(
        openai.RateLimitError, match=r"requests per min \(RPM\): Limit 2, Used 2, Requested 1"
    ) as caught:
        gpt.chat.completions.create(model=GPT, messages=SAY)
    error = caught.value
    assert (error.code, error.type, error.request_id) == ("rate_limit_exceeded", "requests", "req_" + "3".zfill(24))
    assert 28 <= int(error.response.headers["retry-after"]) <= 30
    assert 28_000 <= int(error.response.headers["retry-after-ms"]) <= 30_000


def test_openai_token_limit_and_too_large(provider: ProviderProcess, gpt: openai.OpenAI) -> None:
    provider.reset(config(rate_limits=ProviderConfig.openai(tpm=1000).rate_limits))
    gpt.chat.completions.create(
        model=GPT, messages=SAY, max_tokens=600, extra_headers={"x-simulated-output-tokens": "5"}
    )
    with pytest.raises(openai.RateLimitError, match=r"tokens per min \(TPM\): Limit 1000") as caught:
        gpt.chat.completions.create(model=GPT, messages=SAY, max_tokens=600)
    assert caught.value.type == "tokens"
    with pytest.raises(openai.RateLimitError, match="Request too large"):
        gpt.chat.completions.create(model=GPT, messages=SAY, max_tokens=1001)


def test_an_openai_account_without_credit(provider: ProviderProcess, gpt: openai.OpenAI) -> None:
    provider.reset(config(spend_cap=0.0))
    with pytest.raises(openai.RateLimitError) as caught:
        gpt.chat.completions.create(model=GPT, messages=SAY)
    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")


def test_anthropic_rate_limit(provider: ProviderProcess, claude: anthropic.Anthropic) -> None:
    provider.reset(
        config(dialect=Dialect.ANTHROPIC, rate_limits=ProviderConfig.anthropic(rpm=1, itpm=1000).rate_limits)
    )
    answer = claude.messages.with_raw_response.create(model=CLAUDE, max_tokens=10, messages=SAY)
    assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert answer.headers["anthropic-ratelimit-input-tokens-remaining"] == "991"
    assert answer.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    with pytest.raises(anthropic.RateLimitError) as caught:
        claude.messages.create(model=CLAUDE, max_tokens=10, messages=SAY)
    assert caught.value.body == {
        "type": "error",
        "error": {
            "type": "rate_limit_error",
            "message": "This request would exceed the rate limit for your organization (org-simulated) of 1 requests "
            "per minute. You can see the response headers for current usage.",
        },
        "request_id": caught.value.request_id,
    }
    assert 58 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_overload_is_529_of_anthropic_and_503_of_openai(
    provider: ProviderProcess, gpt: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    provider.reset(config(slots=0))
    with pytest.raises(anthropic.APIStatusError) as overloaded:
        claude.messages.create(model=CLAUDE, max_tokens=10, messages=SAY)
    assert (overloaded.value.status_code, overloaded.value.type) == (529, "overloaded_error")
    with pytest.raises(openai.InternalServerError) as unavailable:
        gpt.chat.completions.create(model=GPT, messages=SAY)
    assert unavailable.value.status_code == 503


def test_an_anthropic_account_without_credit(provider: ProviderProcess, claude: anthropic.Anthropic) -> None:
    provider.reset(config(spend_cap=0.0))
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.messages.create(model=CLAUDE, max_tokens=10, messages=SAY)
    assert (caught.value.status_code, caught.value.type) == (402, "billing_error")


@pytest.mark.parametrize("faults", [Faults(error=1.0), Faults(bad_gateway=1.0), Faults(unavailable=1.0)])
def test_errors_5xx(provider: ProviderProcess, gpt: openai.OpenAI, claude: anthropic.Anthropic, faults: Faults) -> None:
    provider.reset(config(faults=faults))
    with pytest.raises(openai.InternalServerError):
        gpt.chat.completions.create(model=GPT, messages=SAY)
    with pytest.raises(anthropic.InternalServerError):
        claude.messages.create(model=CLAUDE, max_tokens=10, messages=SAY)


def test_an_invalid_request_is_a_bad_request(provider: ProviderProcess, gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="messages"):
        gpt.post("/chat/completions", body={"model": GPT, "messages": 3}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="invalid literal"):
        gpt.chat.completions.create(model=GPT, messages=SAY, extra_headers={"x-simulated-output-tokens": "many"})
    with pytest.raises(openai.BadRequestError, match="Tokens must be >= 0"):
        gpt.chat.completions.create(model=GPT, messages=SAY, extra_headers={"x-simulated-input-tokens": "-1"})
    assert provider.statistics()["calls"] == 0


# --- cuts and hang-ups ----------------------------------------------------------------------------------------------


def test_a_dropped_connection(provider: ProviderProcess, gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    provider.reset(config(faults=Faults(cut=1.0)))
    headers = {"x-simulated-output-tokens": "200"}
    with pytest.raises(openai.APIConnectionError):
        gpt.chat.completions.create(model=GPT, messages=SAY, extra_headers=headers)
    with pytest.raises((openai.APIConnectionError, httpx2.TransportError)):
        list(gpt.chat.completions.create(model=GPT, messages=SAY, stream=True, extra_headers=headers))
    with (
        pytest.raises((anthropic.APIConnectionError, httpx2.TransportError)),
        claude.messages.stream(model=CLAUDE, max_tokens=500, messages=SAY, extra_headers=headers) as stream,
    ):
        stream.get_final_message()
    statistics = provider.statistics()
    assert (statistics["cut"], statistics["in_flight"]) == (3, 0)
    assert 0 < statistics["wasted_output_tokens"] == statistics["output_tokens"] < 600


def test_an_error_in_the_middle_of_an_answer(
    provider: ProviderProcess, gpt: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    provider.reset(config(faults=Faults(late_error=1.0)))
    headers = {"x-simulated-output-tokens": "200"}
    with pytest.raises(openai.InternalServerError):
        gpt.chat.completions.create(model=GPT, messages=SAY, extra_headers=headers)
    with pytest.raises(openai.APIError, match="error while processing"):
        list(gpt.chat.completions.create(model=GPT, messages=SAY, stream=True, extra_headers=headers))
    with (
        pytest.raises(anthropic.APIStatusError, match="Overloaded"),
        claude.messages.stream(model=CLAUDE, max_tokens=500, messages=SAY, extra_headers=headers) as stream,
    ):
        stream.get_final_message()


async def test_a_client_that_hangs_up_frees_its_slot(provider: ProviderProcess, async_gpt: openai.AsyncOpenAI) -> None:
    await asyncio.get_running_loop().run_in_executor(
        None, provider.reset, config(slots=1, overcommit=1.0, busy_reason=BusyReason.CONCURRENCY, tpot=0.01)
    )
    headers = {"x-simulated-output-tokens": "100000"}
    whole = asyncio.create_task(async_gpt.chat.completions.create(model=GPT, messages=SAY, extra_headers=headers))
    await ask(provider, lambda statistics: statistics["in_flight"] == 1)
    with pytest.raises(openai.RateLimitError, match="in flight"):
        await async_gpt.chat.completions.create(model=GPT, messages=SAY)
    whole.cancel()
    await ask(provider, lambda statistics: statistics["hung_up"] == 1)
    stream = await async_gpt.chat.completions.create(model=GPT, messages=SAY, stream=True, extra_headers=headers)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    statistics = await ask(provider, lambda statistics: statistics["hung_up"] == 2)
    assert statistics["in_flight"] == 0
    assert 0 < statistics["wasted_output_tokens"] < 1000


async def test_an_outage_with_cut_ends_waiting_calls(provider: ProviderProcess, async_gpt: openai.AsyncOpenAI) -> None:
    outage = config(ttft=60.0, capacity_steps=(CapacityStep(at=0.2, slots=0, cut=True),))
    await asyncio.get_running_loop().run_in_executor(None, provider.reset, outage)
    with pytest.raises(openai.APIConnectionError):
        await async_gpt.chat.completions.create(model=GPT, messages=SAY)


def ended(watch: int) -> bool:
    """Return True if the process of this descriptor ends within 5 s."""
    readable, _, _ = select.select([watch], [], [], 5)
    os.close(watch)
    return bool(readable)


# --- the process ----------------------------------------------------------------------------------------------------


def test_each_key_has_its_own_account(provider: ProviderProcess, gpt: openai.OpenAI) -> None:
    provider.reset(config(by_key=True, rate_limits=(SimulatedRateLimit(unit=Unit.REQUESTS, amount=1),)))
    gpt.chat.completions.create(model=GPT, messages=SAY)
    with pytest.raises(openai.RateLimitError):
        gpt.chat.completions.create(model=GPT, messages=SAY)
    gpt.with_options(api_key="sk-other").chat.completions.create(model=GPT, messages=SAY)


def test_a_provider_process_ends_at_a_signal_or_with_its_block() -> None:
    with start_provider(config(), seed=3) as provider:
        assert provider.url.startswith("http://127.0.0.1:")
        watch = os.pidfd_open(provider.pid)
        os.kill(provider.pid, signal.SIGTERM)
        assert ended(watch)
    with pytest.raises(OSError, match="refused"):
        provider.statistics()


def test_a_provider_process_ends_with_the_program_that_started_it() -> None:
    program = """
from forebay.simulation import start_provider
with start_provider() as provider:
    print(provider.pid, flush=True)
    input()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        watch = os.pidfd_open(int(child.stdout.readline()))
        child.kill()
    assert ended(watch)


def test_a_provider_process_that_cannot_start_says_why() -> None:
    broken = config()
    object.__setattr__(broken, "slots", -1)
    with pytest.raises(ProviderProcessFailed, match="status 2"), start_provider(broken):
        pass
