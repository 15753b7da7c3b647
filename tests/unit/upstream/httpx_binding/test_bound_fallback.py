"""Fallback for calls of bound clients, whole and streamed: another model or another upstream serves them."""

from __future__ import annotations

import asyncio
import json
from types import ModuleType
from typing import Any

import httpx
import httpx2
import pytest
from tests.support.task_plane import now, virtual
from tests.unit.upstream.httpx_binding.wire import (
    CHAT,
    DONE,
    NOTHING,
    REQUEST,
    STOP,
    STREAM,
    URL,
    Reply,
    Script,
    left,
    words,
)

from forebay import BackpressureSupervisor, Budget, Fallback, Overloaded, Price, Quota, Retry, Task, Upstream
from forebay.errors import InvalidSetting

LIBRARIES = pytest.mark.parametrize("http", [httpx, httpx2], ids=lambda http: http.__name__)
ONCE = [Quota(requests=1, per="day")]
BUSY = Reply.error(503, "busy")
QUICK = Retry(max_attempts=2, base_delay=0.01, max_total_delay=0.02)
KEY = {"authorization": "Bearer sk-first"}


def first(*fallbacks: Fallback, **how: Any) -> Upstream:
    return Upstream("first", **{"provider": "openai", "retry": QUICK, **how}, fallback=fallbacks)


def to_mini(**how: Any) -> Upstream:
    return first(Fallback(to="gpt-4o-mini", models="gpt-4o"), **{"models": {"gpt-4o": (), "gpt-4o-mini": ()}, **how})


def spare(**how: Any) -> Upstream:
    return Upstream("spare", **{"provider": "vllm", "retry": QUICK, **how})


def to_spare(other: Upstream, **how: Any) -> Fallback:
    return Fallback(to=other, **{"base_url": "http://spare.test/v1", "model": "llama", **how})


async def ask(client: Any, **body: Any) -> Any:
    return await client.post(URL, json={**REQUEST, **body}, headers=KEY)


async def pieces(client: Any) -> list[bytes]:
    async with client.stream("POST", URL, json={**REQUEST, "stream": True}, headers=KEY) as response:
        return [piece async for piece in response.aiter_raw()]


def models(script: Script) -> list[str]:
    return [json.loads(request.content)["model"] for request in script.requests]


def served_by_fallback(up: Upstream) -> int:
    return sum(account.served_by_fallback for account in up.statistics().accounts)


@LIBRARIES
@virtual
async def test_a_rejected_call_falls_back_to_the_other_model_with_the_same_key(http: ModuleType) -> None:
    up = to_mini(models={"gpt-4o": ONCE, "gpt-4o-mini": ()})
    script = Script(http)
    client = script.client(up)
    for _ in range(3):
        assert (await ask(client)).json() == CHAT
    assert models(script) == ["gpt-4o", "gpt-4o-mini", "gpt-4o-mini"]
    assert {request.headers["authorization"] for request in script.requests} == {"Bearer sk-first"}
    assert {len(request.content) - int(request.headers["content-length"]) for request in script.requests} == {0}
    assert served_by_fallback(up) == 2
    assert left(up) == NOTHING


@LIBRARIES
def test_in_a_plain_thread_a_rejected_call_falls_back_too(http: ModuleType) -> None:
    other = spare()
    up = first(to_spare(other), quotas=ONCE)
    script = Script(http, Reply(), Reply(), Reply.stream(*STREAM))
    client = script.blocking_client(up)
    for _ in range(2):
        assert client.post(URL, json=REQUEST, headers=KEY).json() == CHAT
    with client.stream("POST", URL, json={**REQUEST, "stream": True}, headers=KEY) as response:
        assert b"".join(response.iter_raw()) == b"".join([*words("The ", "Danube."), STOP, DONE])
    assert models(script) == ["gpt-4o", "llama", "llama"]
    assert left(up) == left(other) == NOTHING


@LIBRARIES
@virtual
async def test_another_provider_gets_no_key_but_its_own(http: ModuleType) -> None:
    for api_key in (None, "sk-spare"):
        other = spare()
        up = first(to_spare(other, api_key=api_key), quotas=ONCE)
        script = Script(http)
        client = script.client(up)
        await ask(client)
        await ask(client)
        request = script.requests[1]
        assert str(request.url) == "http://spare.test/v1/chat/completions"
        assert request.headers["host"] == "spare.test"
        assert request.headers.get("authorization") == (None if api_key is None else "Bearer sk-spare")
        assert "sk-first" not in str(request.headers)
        (shared,) = other.core.accounts
        assert shared is other.core.accounts.account("llama", "" if api_key is None else "Bearer sk-spare")


@virtual
async def test_a_stream_falls_back_too_and_holds_the_permit_of_the_account_that_serves_it() -> None:
    price = {"llama": Price(input=1e6, output=1e5)}
    other = spare(budget=Budget(usd=1000, per="day"), prices=price)
    up = first(to_spare(other), quotas=ONCE)
    script = Script(httpx2, Reply(), Reply.stream(*STREAM))
    client = script.client(up)
    await ask(client)
    assert b"".join(await pieces(client)) == b"".join([*words("The ", "Danube."), STOP, DONE])
    assert json.loads(script.requests[1].content)["stream_options"] == {"include_usage": True}
    assert other.statistics().spent_usd == 30 * 1.0 + 20 * 0.1
    assert left(up) == left(other) == NOTHING
    assert script.closed == 2


@pytest.mark.parametrize(
    "reply",
    [
        BUSY,
        Reply.error(529),
        Reply.error(429, "requests per day", retry_after="86400"),
        Reply.error(429, "insufficient credits"),
        Reply.error(500),
        httpx2.ConnectError("no route"),
    ],
    ids=["503", "529", "429", "spend cap", "500", "unreachable"],
)
@virtual
async def test_a_call_falls_back_after_the_last_error_of_the_provider(reply: Reply | Exception) -> None:
    class FailingFirst(Script):
        def next(self, request: Any) -> Reply:
            self.replies = [Reply() if request.url.host == "spare.test" else reply]
            return super().next(request)

    other = spare()
    up = first(to_spare(other))
    script = FailingFirst(httpx2)
    assert (await ask(script.client(up))).json() == CHAT
    assert served_by_fallback(up) == 1
    assert left(up) == left(other) == NOTHING
    assert script.opened == script.closed


@virtual
async def test_a_request_error_does_not_fall_back() -> None:
    script = Script(httpx2, Reply.error(400, "no such parameter"))
    assert (await ask(script.client(to_mini()))).status_code == 400
    assert len(script.requests) == 1


@virtual
async def test_if_the_fallback_fails_too_the_caller_gets_the_error_of_its_own_provider() -> None:
    up = first(to_spare(spare()))
    script = Script(httpx2, BUSY)
    for status in (404, 503):

        def reply(request: Any, status: int = status) -> Reply:
            script.requests.append(request)
            return Reply.error(status) if request.url.host == "spare.test" else BUSY

        script.next = reply  # type: ignore[method-assign]
        response = await ask(script.client(up))
        assert response.status_code == 503
        assert response.headers["x-should-retry"] == "false"
    assert served_by_fallback(up) == 0
    assert script.opened == script.closed


@virtual
async def test_a_rejection_by_both_says_what_the_other_provider_answered() -> None:
    up = first(to_spare(spare()), quotas=ONCE)
    script = Script(httpx2, Reply(), Reply.error(401))
    client = script.client(up)

    async def agent(_: Task) -> None:
        (await ask(client)).raise_for_status()
        await ask(client)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"])
        with pytest.raises(Overloaded, match=r"first: .* requests per day.*; spare: its provider answered 401"):
            await supervisor.run(Task("ask"))


@virtual
async def test_with_a_load_threshold_a_call_with_a_long_retry_after_falls_back_at_once() -> None:
    other = spare()
    up = first(to_spare(other, load_threshold=0.25), retry=Retry())
    script = Script(httpx2, Reply.error(429, "requests per minute", retry_after="30"), Reply())
    began = now()
    assert (await ask(script.client(up))).json() == CHAT
    assert now() - began < 1.0
    assert models(script) == ["gpt-4o", "llama"]
    assert (await ask(script.client(up))).json() == CHAT
    assert models(script) == ["gpt-4o", "llama", "llama"]
    assert left(up) == left(other) == NOTHING


@virtual
async def test_without_a_load_threshold_a_call_waits_for_its_own_provider() -> None:
    up = first(to_spare(spare()), retry=Retry())
    script = Script(httpx2, Reply.error(429, "requests per minute", retry_after="30"), Reply())
    began = now()
    await ask(script.client(up))
    assert 30.0 <= now() - began <= 37.0
    assert models(script) == ["gpt-4o", "gpt-4o"]


@virtual
async def test_a_signed_request_is_rejected_rather_than_changed() -> None:
    script = Script(httpx2)
    client = script.client(to_mini(models={"gpt-4o": ONCE, "gpt-4o-mini": ()}))
    signed = {"authorization": "AWS4-HMAC-SHA256 Credential=x", "x-amz-date": "20260101T000000Z"}
    assert (await client.post(URL, json=REQUEST, headers=signed)).status_code == 200
    with pytest.raises(Overloaded):
        await client.post(URL, json=REQUEST, headers=signed)
    assert len(script.requests) == 1


@pytest.mark.parametrize("reply", [Reply(), Reply.stream(), BUSY], ids=["whole", "stream", "busy"])
def test_a_call_cancelled_at_any_moment_leaves_nothing_behind(reply: Reply) -> None:
    @virtual
    async def cancelled_after(iterations: int) -> None:
        soon = Retry(max_attempts=2, base_delay=0.0005, max_total_delay=0.001)
        other = spare(retry=soon, max_concurrent=4)
        up = first(to_spare(other), quotas=ONCE, retry=soon, max_concurrent=4)
        script = Script(httpx2, Reply(), reply)
        client = script.client(up)
        await ask(client)
        task = asyncio.create_task(pieces(client) if reply.headers else ask(client))
        for iteration in range(iterations):
            await asyncio.sleep(0 if iteration < 12 else 0.0002 * 1.3 ** (iteration - 12))  # it may retry for a minute
        ended.append(task.done())
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert left(up) == left(other) == NOTHING
        assert script.closed == script.opened

    ended: list[bool] = []
    while not ended or not ended[-1]:
        cancelled_after(len(ended))
    assert len(ended) > 3


def test_a_client_is_not_bound_to_a_fallback_that_requests_cannot_be_sent_to() -> None:
    up = first(Fallback(to=spare()))
    with pytest.raises(InvalidSetting, match="base_url"):
        Script(httpx2).client(up)
