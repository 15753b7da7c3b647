"""Bound models of LangChain with the simulated provider, alone and in a graph of LangGraph."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypedDict

import anthropic
import httpx2
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_anthropic import _client_utils as anthropic_utils
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_openai.chat_models import _client_utils
from langgraph.graph import END, START, StateGraph
from langgraph.types import RetryPolicy
from tests.unit.upstream.httpx_binding.wire import NOTHING, Reply, Script, left

from forebay import BackpressureSupervisor, Overloaded, Task
from forebay.quota import Quota
from forebay.simulation import ProviderConfig, ProviderProcess, start_provider
from forebay.upstream import Upstream

GPT, CLAUDE = "gpt-4o-mini", "claude-sonnet-5"


@pytest.fixture(scope="module")
def provider() -> Iterator[ProviderProcess]:
    with start_provider(ProviderConfig(ttft=0.01, tpot=0.0005, noise=0.0)) as running:
        yield running


@pytest.fixture(autouse=True)
async def close_clients() -> AsyncIterator[None]:
    """Close the asynchronous HTTP clients that LangChain caches: each belongs to the event loop of its test."""
    yield
    for make in (_client_utils._cached_async_httpx_client, anthropic_utils._get_default_async_httpx_client):
        make.cache_clear()
    for client in created:
        await client.aclose()
    created.clear()


created: list[Any] = []


def model(name: str, provider: ProviderProcess) -> Any:
    if name == "openai":
        chat: Any = ChatOpenAI(model=GPT, api_key="sk-simulated", base_url=provider.openai_url, max_tokens=40)  # type: ignore[call-arg,arg-type]
        created.append(chat.root_async_client._client)
    else:
        chat = ChatAnthropic(model=CLAUDE, api_key="sk-simulated", base_url=provider.url, max_tokens=40)  # type: ignore[call-arg,arg-type]
        created.append(chat._async_client._client)
    return chat


NAMES = pytest.mark.parametrize("name", ["openai", "anthropic"])
ERRORS = {"openai": openai.OpenAIError, "anthropic": anthropic.AnthropicError}


def message(answer: Any) -> Any:
    return answer.content, answer.usage_metadata


@NAMES
async def test_a_bound_model_answers_as_an_unbound_one(name: str, provider: ProviderProcess) -> None:
    upstream = Upstream("key", provider=name)
    bare = model(name, provider)
    bound = upstream.bind(bare)
    assert message(await bound.ainvoke("Rivers?")) == message(await bare.ainvoke("Rivers?"))
    assert [message(part) async for part in bound.astream("Rivers?")] == [
        message(part) async for part in bare.astream("Rivers?")
    ]
    assert left(upstream) == NOTHING
    assert next(iter(upstream.core.accounts)).account.durations.typical > 0


@NAMES
def test_in_a_plain_thread_a_bound_model_answers_as_an_unbound_one(name: str, provider: ProviderProcess) -> None:
    upstream = Upstream("key", provider=name)
    bare = model(name, provider)
    bound = upstream.bind(bare)
    assert message(bound.invoke("Rivers?")) == message(bare.invoke("Rivers?"))
    assert [part.content for part in bound.stream("Rivers?")] == [part.content for part in bare.stream("Rivers?")]
    assert left(upstream) == NOTHING


@NAMES
async def test_a_model_raises_a_rejection_unchanged(name: str, provider: ProviderProcess) -> None:
    bound = Upstream("key", provider=name, quotas=[Quota(requests=1, per="day")]).bind(model(name, provider))
    await bound.ainvoke("Rivers?")
    with pytest.raises(Overloaded) as rejection:
        await bound.ainvoke("Rivers?")
    assert isinstance(rejection.value, ERRORS[name])
    with pytest.raises(Overloaded):
        async for _ in bound.astream("Rivers?"):
            pass


@NAMES
async def test_what_bind_tools_makes_of_a_model_is_bound_with_it(name: str, provider: ProviderProcess) -> None:
    upstream = Upstream("key", provider=name)
    bound = upstream.bind(model(name, provider).bind_tools([State]))
    assert (await bound.ainvoke("Rivers?")).content
    assert [account.succeeded for account in upstream.statistics().accounts] == [1]


async def statistics(provider: ProviderProcess) -> dict[str, Any]:
    return await asyncio.get_running_loop().run_in_executor(None, provider.statistics)


class State(TypedDict, total=False):
    answer: str


@NAMES
async def test_a_graph_that_retries_ends_overloaded_without_further_requests(
    name: str, provider: ProviderProcess
) -> None:
    await asyncio.get_running_loop().run_in_executor(None, provider.reset)
    upstream = Upstream("key", provider=name, quotas=[Quota(requests=1, per="day")])
    bound = upstream.bind(model(name, provider))
    attempts: list[int] = []

    async def think(_: State) -> State:
        attempts.append(len(attempts))
        await bound.ainvoke("Rivers?")
        return {"answer": (await bound.ainvoke("And lakes?")).content}

    graph = StateGraph(State)
    policy = RetryPolicy(max_attempts=3, initial_interval=0.001, jitter=False)
    node: Any = think
    graph.add_node("think", node, retry_policy=policy)
    graph.add_edge(START, "think")
    graph.add_edge("think", END)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("graph", handler=graph.compile(), task_types=["ask"])
        with pytest.raises(Overloaded) as rejection:
            await supervisor.run(Task("ask", {}))
    assert rejection.value.retry_after is not None
    assert len(attempts) == 3  # the graph retried, and each retry was rejected at once
    assert sum((await statistics(provider))["by_status"].values()) == 1
    assert left(upstream) == NOTHING


def test_embeddings_use_the_quota() -> None:
    vector = {
        "object": "list",
        "model": "e",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    script = Script(httpx2, Reply(body=[json.dumps(vector).encode()]))
    upstream = Upstream("key", provider="openai", quotas=[Quota(input_tokens=1000, per="day")])
    bare = OpenAIEmbeddings(
        api_key="k",  # type: ignore[arg-type]
        http_client=httpx2.Client(transport=script.blocking()),
        check_embedding_ctx_length=False,
    )
    assert upstream.bind(bare).embed_query("rivers") == [0.5, 0.25]
    (level,) = next(iter(upstream.core.accounts)).account.quotas.levels(0.0)
    assert level.remaining == pytest.approx(993, abs=1)
    assert left(upstream) == NOTHING
