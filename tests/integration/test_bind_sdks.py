"""Bound clients of the real SDKs; `tests/contract/sdks` has the tests that they share with clients of a gateway."""

from __future__ import annotations

import asyncio
import gc
import operator
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from tests.contract.sdks.sdk_harness import MESSAGES, Sdk
from tests.unit.upstream.httpx_binding.wire import NOTHING, Reply, Script, left

from forebay import Overloaded
from forebay.quota import Quota
from forebay.retry import Retry
from forebay.simulation import ProviderConfig, ProviderProcess, start_provider
from forebay.upstream import Upstream

BLOCKING = pytest.mark.parametrize("sdk", [Sdk("openai", awaits=False), Sdk("anthropic", awaits=False)], ids=str)
ASYNC = pytest.mark.parametrize("sdk", [Sdk("openai", awaits=True), Sdk("anthropic", awaits=True)], ids=str)


@pytest.fixture(scope="module")
def provider() -> Iterator[ProviderProcess]:
    with start_provider(ProviderConfig(ttft=0.01, tpot=0.0005, noise=0.0, slots=100)) as running:
        yield running


def upstream_of(sdk: Sdk, **how: Any) -> Upstream:
    return Upstream(sdk.name, provider=sdk.name, **how)


async def wait_until_served(provider: ProviderProcess) -> None:
    """Wait until the provider serves a call: a connection cancelled while it is opened is not always closed."""
    loop = asyncio.get_running_loop()
    while not (await loop.run_in_executor(None, provider.statistics))["in_flight"]:
        pass


@ASYNC
async def test_a_discarded_stream_returns_its_permit(sdk: Sdk, provider: ProviderProcess) -> None:
    upstream = upstream_of(sdk)
    async with sdk.client(provider.url) as bare:
        stream = await sdk.create(upstream.bind(bare), stream=True)
        assert left(upstream)["in_flight"] == 1
        del stream
        gc.collect()
        await asyncio.sleep(0.05)
        assert left(upstream) == NOTHING


@BLOCKING
def test_an_sdk_client_with_a_bound_http_client_raises_a_rejection_unchanged(
    sdk: Sdk, provider: ProviderProcess
) -> None:
    upstream = upstream_of(sdk, quotas=[Quota(requests=1, per="day")])
    with sdk.http.Client() as bare, sdk.client(provider.url, http_client=upstream.bind(bare)) as client:
        sdk.create(client)
        with pytest.raises(Overloaded) as rejection:
            sdk.create(client)
    assert isinstance(rejection.value, sdk.base_error)
    assert rejection.value.retry_after is not None


@BLOCKING
def test_failures_raise_the_errors_of_the_sdk_and_it_does_not_retry(sdk: Sdk) -> None:
    http = sdk.http
    for error, expected in (
        (http.ConnectError("no route"), sdk.module.APIConnectionError),
        (http.ReadTimeout("slow"), sdk.module.APITimeoutError),
    ):
        script = Script(http, error)
        upstream = upstream_of(sdk, retry=Retry(max_attempts=2, base_delay=0.001))
        with sdk.client("http://x.test", http_client=http.Client(transport=script.blocking())) as bare:
            with pytest.raises(expected) as failed:
                sdk.create(upstream.bind(bare))
            assert failed.value.__cause__ is error
            assert len(script.requests) == 2
            assert left(upstream) == NOTHING


def test_azure_and_vertex_clients_are_bound() -> None:
    upstream = Upstream("azure", provider="azure")
    script = Script(Sdk("openai", awaits=False).http)
    bare = openai.AzureOpenAI(
        api_key="k", azure_endpoint="https://x.test", api_version="2025-01-01", http_client=script.blocking_client()
    )
    client: Any = upstream.bind(bare)
    assert isinstance(client, openai.AzureOpenAI)
    assert client.chat.completions.create(model="gpt-4o", messages=MESSAGES).choices[0].message.content == "The Danube."
    assert "/deployments/gpt-4o/" in str(script.requests[0].url)
    script = Script(Sdk("anthropic", awaits=False).http)
    vertex = anthropic.AnthropicVertex(
        region="x",
        project_id="y",
        access_token="t",  # noqa: S106
        http_client=script.blocking_client(),
    )
    message = {"id": "m", "type": "message", "role": "assistant", "model": "c", "content": [], "usage": {}}
    script.replies = [Reply(body=[str(message).replace("'", '"').encode()])]
    at_vertex: Any = Upstream("vertex", provider="anthropic").bind(vertex)
    assert at_vertex.messages.create(model="claude-x", max_tokens=9, messages=MESSAGES).id == "m"


def ten_calls(sdk: Sdk, provider: ProviderProcess, upstream: Upstream) -> Callable[[], None]:
    """Return a function that makes ten calls on an event loop of its own and cancels three of them."""

    async def calls() -> None:
        async with sdk.client(provider.url) as bare:
            client = upstream.bind(bare)
            tasks = [asyncio.create_task(sdk.create(client)) for _ in range(10)]
            await wait_until_served(provider)
            for task in tasks[:3]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return lambda: asyncio.run(calls())


@ASYNC
async def test_several_loops_share_an_account(sdk: Sdk, provider: ProviderProcess) -> None:
    upstream = upstream_of(sdk, max_concurrent=4)
    loop = asyncio.get_running_loop()
    await asyncio.gather(*[loop.run_in_executor(None, ten_calls(sdk, provider, upstream)) for _ in range(4)])
    assert left(upstream) == NOTHING
    assert max(shared.account.peak_in_flight for shared in upstream.core.accounts) == 4


@pytest.mark.parametrize("where", ["responses", "realtime", "beta.realtime"])
def test_a_websocket_is_opened_as_before_and_warned_of_once(where: str, caplog: pytest.LogCaptureFixture) -> None:
    with openai.OpenAI(api_key="k") as bare:
        resource = operator.attrgetter(where)(Upstream("key", provider="openai").bind(bare))
        assert callable(resource.connect.__wrapped__), "this version of the SDK opens it by another method"
        managers = [resource.connect(**({} if where == "responses" else {"model": "gpt-realtime"})) for _ in range(2)]
    assert all(hasattr(manager, "__enter__") for manager in managers)
    (record,) = caplog.records
    assert "over HTTP" in record.message
