"""`Upstream.send`: requests sent with a client of the user's own, and retried, rerouted and metered by the upstream."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.task_plane import virtual
from tests.unit.upstream.httpx_binding.wire import CHAT, NOTHING, REQUEST, STREAM, URL, left

from forebay import Budget, Fallback, Overloaded, Quota, Upstream
from forebay.errors import InvalidSetting
from forebay.quota import Price
from forebay.retry import Retry
from forebay.upstream import HttpRequest, HttpResponse

HEADERS = {"Authorization": "Bearer sk-1", "Content-Type": "application/json"}
ANSWER = HttpResponse(200, {"Content-Type": "application/json"}, json.dumps(CHAT).encode())
THROTTLED = HttpResponse(429, {"Retry-After": "2"}, b'{"error": {"message": "requests per minute"}}')


def request(**fields: Any) -> HttpRequest:
    return HttpRequest("POST", URL, HEADERS, json.dumps({**REQUEST, **fields}).encode())


class Client:
    """A user's client: it answers by a list, the last answer again and again, and records what it was asked."""

    def __init__(self, *answers: HttpResponse | Exception) -> None:
        self.answers = list(answers)
        self.sent: list[HttpRequest] = []

    def blocking(self, request: HttpRequest) -> HttpResponse:
        self.sent.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.blocking(request)


def upstream(name: str = "key", **settings: Any) -> Upstream:
    return Upstream(name, provider="openai", **{"retry": Retry(base_delay=0.01), **settings})


@virtual
async def test_an_answer_comes_back_as_it_is_and_its_tokens_are_counted() -> None:
    llm = upstream(budget=Budget(usd=10), prices={"gpt-4o": Price(input=1e4, output=1e4)})
    client = Client(ANSWER)
    assert await llm.send(request(), client) is ANSWER
    assert client.sent == [request()]
    statistics = llm.statistics()
    assert statistics.spent_usd == pytest.approx(0.5)
    assert (statistics.accounts[0].input_tokens, statistics.accounts[0].output_tokens) == (30, 20)
    assert left(llm) == NOTHING


@virtual
async def test_a_throttled_request_and_one_whose_connection_failed_are_retried() -> None:
    llm = upstream()
    client = Client(THROTTLED, ConnectionResetError("gone"), ANSWER)
    assert await llm.send(request(), client) is ANSWER
    assert len(client.sent) == 3
    account = llm.statistics().accounts[0]
    assert (account.sent, account.throttled, account.failed, account.succeeded) == (3, 1, 1, 1)
    assert left(llm) == NOTHING


@virtual
async def test_the_last_error_is_raised_and_the_last_answer_is_returned() -> None:
    llm = upstream(retry=Retry(max_attempts=2, base_delay=0.01))
    with pytest.raises(ConnectionResetError, match="gone"):
        await llm.send(request(), Client(ConnectionResetError("gone")))
    wrong = HttpResponse(400, {}, b'{"error": {"message": "no such model"}}')
    assert await llm.send(request(), Client(wrong)) is wrong
    assert left(llm) == NOTHING


def test_in_a_plain_thread_it_is_the_same() -> None:
    llm = upstream()
    client = Client(ConnectionResetError("gone"), ANSWER)
    assert llm.send_blocking(request(), client.blocking) is ANSWER
    assert len(client.sent) == 2
    assert left(llm) == NOTHING


@virtual
async def test_a_rejected_request_is_not_sent() -> None:
    llm = upstream(quotas=[Quota(requests=1, per="day")])
    client = Client(ANSWER)
    await llm.send(request(), client)
    with pytest.raises(Overloaded) as rejection:
        await llm.send(request(), client)
    assert rejection.value.limited_by == "upstream:key:0f2c10bf:requests per day"
    assert len(client.sent) == 1


@virtual
async def test_a_fallback_changes_url_key_and_model() -> None:
    spare = upstream("spare")
    fallback = Fallback(spare, base_url="https://spare.test/v1", api_key="sk-2", model="llama")
    llm = upstream(fallback=fallback, retry=Retry(max_attempts=1))
    client = Client(HttpResponse(500, {}, b""), ANSWER)
    assert await llm.send(request(), client) is ANSWER
    _, rerouted = client.sent
    assert rerouted.url == "https://spare.test/v1/chat/completions"
    assert rerouted.headers == {"Content-Type": "application/json", "authorization": "Bearer sk-2"}
    assert json.loads(rerouted.body)["model"] == "llama"
    assert llm.statistics().accounts[0].served_by_fallback == 1


@virtual
async def test_a_fallback_that_cannot_be_reached_is_rejected() -> None:
    with pytest.raises(InvalidSetting, match="base_url"):
        await upstream(fallback=Fallback(upstream("spare"))).send(request(), Client(ANSWER))


@virtual
async def test_a_streamed_answer_is_metered_and_has_no_usage_that_was_not_asked_for() -> None:
    llm = upstream()
    client = Client(HttpResponse(200, {"content-type": "text/event-stream"}, b"".join(STREAM)))
    answer = await llm.send(request(stream=True), client)
    assert b"Danube" in answer.body
    assert b"prompt_tokens" not in answer.body
    assert json.loads(client.sent[0].body)["stream_options"] == {"include_usage": True}
    account = llm.statistics().accounts[0]
    assert (account.input_tokens, account.output_tokens) == (30, 20)
    assert left(llm) == NOTHING


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
@virtual
async def test_whatever_the_client_raises_is_a_fault_and_leaves_nothing_behind(error: Callable[[], Exception]) -> None:
    llm = upstream(retry=Retry(max_attempts=1))
    with pytest.raises(type(error())):
        await llm.send(request(), Client(error()))
    assert llm.statistics().accounts[0].failed == 1
    assert left(llm) == NOTHING


class RateLimitError(Exception):
    """An exception with an answer, as SDKs raise it."""

    def __init__(self, status: int = 429, **headers: str) -> None:
        super().__init__("no")
        self.status_code = status
        self.response = HttpResponse(status, {name.replace("_", "-"): value for name, value in headers.items()})


@virtual
async def test_an_exception_with_an_answer_counts_as_that_answer() -> None:
    llm = upstream()
    client = Client(RateLimitError(retry_after="2"), ANSWER)
    assert await llm.send(request(), client) is ANSWER
    (account,) = llm.statistics().accounts
    assert (account.throttled, account.failed) == (1, 0)
    with pytest.raises(RateLimitError):
        await llm.send(request(), client := Client(RateLimitError(400)))
    assert len(client.sent) == 1
    assert left(llm) == NOTHING
