"""Bound clients of the real SDKs before the plant: their callers see what they would see without."""

from __future__ import annotations

import asyncio
import gc
import operator
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any, Final

import anthropic
import httpx
import httpx2
import openai
import pytest
from tests.unit.upstream.transport.wire import NOTHING, Says, Script, left

from forebay import Overloaded
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry
from forebay.sim import Faults, ProviderConfig, RunningPlant, start_plant
from forebay.upstream import Upstream

SAY: Final[list[Any]] = [{"role": "user", "content": "Tell me of rivers."}]
GPT, CLAUDE = "gpt-4o-mini", "claude-sonnet-5"
QUICK = Retry(base=0.001, ceiling=0.01)


def config(**rest: Any) -> ProviderConfig:
    return ProviderConfig(**({"ttft": 0.01, "tpot": 0.0005, "noise": 0.0, "slots": 100} | rest))


@pytest.fixture(scope="module")
def process() -> Iterator[RunningPlant]:
    with start_plant(config()) as plant:
        yield plant


@pytest.fixture
def plant(process: RunningPlant) -> RunningPlant:
    process.reset(config())
    return process


made: list[Any] = []  # clients that await, by the test that is running
made_blocking: list[Any] = []


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    yield
    for client in made:
        await client.close()
    for client in made_blocking:
        client.close()
    made.clear()
    made_blocking.clear()


class Side:
    """One SDK, with all the ways to call it. Every way returns what the caller's code would work with."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = GPT if name == "openai" else CLAUDE

    def upstream(self, **how: Any) -> Upstream:
        return Upstream(self.name, **{"provider": self.name, "retry": QUICK, **how})

    def client(self, plant: RunningPlant, **how: Any) -> Any:
        if self.name == "openai":
            client: Any = openai.OpenAI(base_url=plant.openai_url, api_key="sk-plant", **how)
        else:
            client = anthropic.Anthropic(base_url=plant.url, api_key="sk-plant", **how)
        made_blocking.append(client)
        return client

    def async_client(self, plant: RunningPlant, **how: Any) -> Any:
        if self.name == "openai":
            client: Any = openai.AsyncOpenAI(base_url=plant.openai_url, api_key="sk-plant", **how)
        else:
            client = anthropic.AsyncAnthropic(base_url=plant.url, api_key="sk-plant", **how)
        made.append(client)
        return client

    def create(self, client: Any, **how: Any) -> Any:
        how = {"model": self.model, "messages": SAY, "max_tokens": 40, **how}
        return client.chat.completions.create(**how) if self.name == "openai" else client.messages.create(**how)

    @property
    def http(self) -> ModuleType:
        """The HTTP library of this generation of the SDK."""
        bare = self.sdk.OpenAI(api_key="k") if self.name == "openai" else self.sdk.Anthropic(api_key="k")
        return httpx2 if isinstance(bare._client, httpx2.Client) else httpx

    @property
    def error(self) -> type[Exception]:
        return openai.OpenAIError if self.name == "openai" else anthropic.AnthropicError

    @property
    def sdk(self) -> Any:
        return openai if self.name == "openai" else anthropic


SIDES = pytest.mark.parametrize("side", [Side("openai"), Side("anthropic")], ids=lambda side: side.name)


async def reset(plant: RunningPlant, **how: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(None, plant.reset, config(**how))


async def served(plant: RunningPlant) -> None:
    """Wait until the plant works on a call: a connection that is cancelled while it is made is not always closed."""
    loop = asyncio.get_running_loop()
    while not (await loop.run_in_executor(None, plant.statistics))["in_flight"]:
        pass


def plain(thing: Any) -> Any:
    """A parsed answer without what differs from call to call."""
    told = thing.model_dump()
    for changing in ("id", "created"):
        told.pop(changing, None)
    if isinstance(told.get("message"), dict):
        told["message"].pop("id", None)
    return type(thing), told


@SIDES
def test_the_caller_sees_the_same_objects(side: Side, plant: RunningPlant) -> None:
    bare = side.client(plant)
    upstream = side.upstream()
    bound = upstream.bind(bare)
    assert isinstance(bound, type(bare))
    assert plain(side.create(bound)) == plain(side.create(bare))
    of_bound, of_bare = ([plain(part) for part in side.create(client, stream=True)] for client in (bound, bare))
    assert of_bound == of_bare
    assert left(upstream) == NOTHING
    raw = bound.with_raw_response
    told = (raw.chat.completions if side.name == "openai" else raw.messages).create(
        model=side.model, messages=SAY, max_tokens=40
    )
    assert told.headers["x-request-id" if side.name == "openai" else "request-id"]
    assert told.elapsed.total_seconds() > 0
    assert plain(told.parse())[0] is plain(side.create(bare))[0]
    with pytest.raises(side.sdk.APIStatusError):
        side.create(bound, model="no-such-model")
    assert left(upstream) == NOTHING


@SIDES
async def test_so_does_one_that_awaits(side: Side, plant: RunningPlant) -> None:
    upstream = side.upstream()
    async with side.async_client(plant) as bare:
        bound = upstream.bind(bare)
        assert plain(await side.create(bound)) == plain(await side.create(bare))
        assert [plain(part) async for part in await side.create(bound, stream=True)] == [
            plain(part) async for part in await side.create(bare, stream=True)
        ]
        assert await bound.models.list()
    assert left(upstream) == NOTHING


@pytest.mark.parametrize("usage", [True, False])
async def test_usage_of_openai_streams_is_seen_by_those_who_asked(plant: RunningPlant, usage: bool) -> None:  # noqa: FBT001
    upstream = Side("openai").upstream(budget=Budget(usd=1000, per="day"), prices={GPT: Price(input=0, output=1e6)})
    client = upstream.bind(Side("openai").async_client(plant))
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = [part async for part in await Side("openai").create(client, stream=True, **options)]
    assert any(part.usage is not None for part in chunks) is usage
    assert upstream.statistics().spent_usd == 40.0


@SIDES
async def test_the_streaming_helpers_work(side: Side, plant: RunningPlant) -> None:
    upstream = side.upstream()
    client = upstream.bind(side.async_client(plant))
    if side.name == "anthropic":
        async with client.messages.stream(model=CLAUDE, messages=SAY, max_tokens=40) as stream:
            text = "".join([text async for text in stream.text_stream])
            final = await stream.get_final_message()
        assert final.content[0].text == text
    else:
        async with client.chat.completions.stream(
            model=GPT, messages=SAY, max_tokens=40, extra_headers={"x-plant-output-tokens": "20"}
        ) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert final.choices[0].message.content
    assert left(upstream) == NOTHING


@SIDES
async def test_who_stops_reading_gives_the_permit_back(side: Side, plant: RunningPlant) -> None:
    await reset(plant, tpot=0.05)
    upstream = side.upstream()
    client = upstream.bind(side.async_client(plant))
    stream = await side.create(client, stream=True)
    async for _ in stream:
        break
    await stream.close()
    assert left(upstream) == NOTHING
    for _ in range(2):  # and who is cancelled while it waits or reads
        task = asyncio.create_task(side.create(client))
        await served(plant)
        task.cancel()
        await asyncio.wait([task])
        assert left(upstream) == NOTHING


@SIDES
async def test_a_stream_that_is_forgotten_gives_the_permit_back(side: Side, plant: RunningPlant) -> None:
    upstream = side.upstream()
    client = upstream.bind(side.async_client(plant))
    stream = await side.create(client, stream=True)
    assert left(upstream)["in_flight"] == 1
    del stream
    gc.collect()
    await asyncio.sleep(0.05)
    assert left(upstream) == NOTHING


@SIDES
async def test_faults_are_mended_here_and_by_nobody_else(side: Side, plant: RunningPlant) -> None:
    await reset(plant, faults=Faults(error=0.2, bad_gateway=0.1, cut=0.1))
    upstream = side.upstream()
    client = upstream.bind(side.async_client(plant, max_retries=5))
    answers = [await side.create(client) for _ in range(40)]
    assert all(answer.usage for answer in answers)
    assert left(upstream) == NOTHING


@SIDES
@pytest.mark.parametrize("max_retries", [None, 4])
def test_a_provider_that_stays_broken_is_asked_as_often_as_the_upstream_says(
    side: Side, plant: RunningPlant, max_retries: int | None
) -> None:
    plant.reset(config(faults=Faults(error=1.0)))
    upstream = side.upstream(retry=Retry(max_attempts=3, base=0.001))
    client = upstream.bind(side.client(plant))
    if max_retries is not None:
        client = client.with_options(max_retries=max_retries)
    with pytest.raises(side.sdk.InternalServerError):
        side.create(client)
    assert sum(plant.statistics()["by_status"].values()) == 3
    assert left(upstream) == NOTHING


def refusing(side: Side) -> Upstream:
    return side.upstream(quotas=[Quota(requests=1, per="day")])


def check_refusal(side: Side, error: Exception) -> None:
    assert isinstance(error, Overloaded)
    assert isinstance(error, side.error)
    assert error.__cause__ is None
    assert not hasattr(error, "status_code")
    assert not any(word in str(error).lower() for word in ("rate limit", "throttl", "too many requests"))
    assert error.retry_after is not None


@SIDES
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_comes_out_of_the_sdk_unchanged(side: Side, plant: RunningPlant, stream: bool) -> None:  # noqa: FBT001
    upstream = refusing(side)
    client = upstream.bind(side.async_client(plant, max_retries=5))
    await side.create(client)
    for asked in (client, client.with_options(max_retries=3, timeout=7)):
        with pytest.raises(Overloaded) as refused:
            await side.create(asked, stream=stream)
        check_refusal(side, refused.value)
    told = await asyncio.get_running_loop().run_in_executor(None, plant.statistics)
    assert sum(told["by_status"].values()) == 1


@SIDES
@pytest.mark.parametrize("stream", [False, True])
def test_so_it_does_in_a_plain_thread(side: Side, plant: RunningPlant, stream: bool) -> None:  # noqa: FBT001
    client = refusing(side).bind(side.client(plant, max_retries=5))
    side.create(client)
    for asked in (client, client.with_options(max_retries=3, timeout=7)):
        with pytest.raises(Overloaded) as refused:
            side.create(asked, stream=stream)
        check_refusal(side, refused.value)
    assert sum(plant.statistics()["by_status"].values()) == 1


@SIDES
def test_it_does_so_where_only_the_http_client_was_bound(side: Side, plant: RunningPlant) -> None:
    with side.http.Client() as bare:
        client = side.client(plant, http_client=refusing(side).bind(bare))
        side.create(client)
        with pytest.raises(Overloaded) as refused:
            side.create(client)
    check_refusal(side, refused.value)


@SIDES
def test_failures_are_those_of_the_sdk_and_it_does_not_call_again(side: Side, plant: RunningPlant) -> None:
    http = side.http
    for error, expected in (
        (http.ConnectError("no route"), side.sdk.APIConnectionError),
        (http.ReadTimeout("slow"), side.sdk.APITimeoutError),
    ):
        script = Script(http, error)
        upstream = side.upstream(retry=Retry(max_attempts=2, base=0.001))
        client = upstream.bind(side.client(plant, http_client=http.Client(transport=script.blocking())))
        with pytest.raises(expected) as failed:
            side.create(client)
        assert failed.value.__cause__ is error
        assert len(script.requests) == 2
        assert left(upstream) == NOTHING


@SIDES
def test_keys_have_accounts_of_their_own(side: Side, plant: RunningPlant) -> None:
    upstream = side.upstream()
    client = upstream.bind(side.client(plant))
    side.create(client)
    side.create(client.with_options(api_key="sk-other"))
    assert len(list(upstream.books)) == 2


def test_kin_of_the_sdks_are_bound() -> None:
    upstream = Upstream("azure", provider="azure")
    script = Script(Side("openai").http)
    bare = openai.AzureOpenAI(
        api_key="k", azure_endpoint="https://x.test", api_version="2025-01-01", http_client=script.blocking_client()
    )
    client: Any = upstream.bind(bare)
    assert isinstance(client, openai.AzureOpenAI)
    assert client.chat.completions.create(model="gpt-4o", messages=SAY).choices[0].message.content == "The Danube."
    assert "/deployments/gpt-4o/" in str(script.requests[0].url)
    script = Script(Side("anthropic").http)
    vertex = anthropic.AnthropicVertex(
        region="x",
        project_id="y",
        access_token="t",  # noqa: S106
        http_client=script.blocking_client(),
    )
    message = {"id": "m", "type": "message", "role": "assistant", "model": "c", "content": [], "usage": {}}
    script.answers = [Says(body=[str(message).replace("'", '"').encode()])]
    at_vertex: Any = Upstream("vertex", provider="anthropic").bind(vertex)
    assert at_vertex.messages.create(model="claude-x", max_tokens=9, messages=SAY).id == "m"


def many(side: Side, plant: RunningPlant, upstream: Upstream) -> Callable[[], None]:
    """Ten calls, three of them cancelled, on a loop of its own."""

    async def calls() -> None:
        async with side.async_client(plant) as bare:
            client = upstream.bind(bare)
            tasks = [asyncio.create_task(side.create(client)) for _ in range(10)]
            await served(plant)
            for task in tasks[:3]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return lambda: asyncio.run(calls())


@SIDES
async def test_several_loops_share_an_account(side: Side, plant: RunningPlant) -> None:
    upstream = side.upstream(max_concurrent=4)
    loop = asyncio.get_running_loop()
    await asyncio.gather(*[loop.run_in_executor(None, many(side, plant, upstream)) for _ in range(4)])
    assert left(upstream) == NOTHING
    assert max(desk.account.peak for desk in upstream.books) == 4


@pytest.mark.parametrize("where", ["responses", "realtime", "beta.realtime"])
def test_a_websocket_is_opened_as_ever_and_warned_of_once(where: str, caplog: pytest.LogCaptureFixture) -> None:
    bound = Upstream("key", provider="openai").bind(openai.OpenAI(api_key="k"))
    resource = operator.attrgetter(where)(bound)
    assert callable(resource.connect.__wrapped__), "this generation opens it elsewhere"
    managers = [resource.connect(**({} if where == "responses" else {"model": "gpt-realtime"})) for _ in range(2)]
    assert all(hasattr(manager, "__enter__") for manager in managers)
    (record,) = caplog.records
    assert "over HTTP" in record.message
    made_blocking.append(bound)
