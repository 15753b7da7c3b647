"""Calls of bound httpx clients: responses, retries, streams and rejections."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import gzip
import json
import pickle
import statistics
import threading
from types import ModuleType
from typing import Any

import httpx
import httpx2
import pytest
from tests.support.task_plane import approximately, now, virtual
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

from forebay import BackpressureSupervisor, Overloaded, Task, TaskStatus
from forebay.breaker import BreakerState
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry
from forebay.testing import run_ready
from forebay.upstream import Upstream
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.accounts.token_estimates import TokenEstimates

SPENT = Reply(status=429, body=[b'{"error": {"message": "You exceeded your quota.", "code": "insufficient_quota"}}'])
LIBRARIES = pytest.mark.parametrize("http", [httpx, httpx2], ids=lambda http: http.__name__)


def upstream(**how: Any) -> Upstream:
    return Upstream("key", **{"provider": "openai", **how})


def only_account(up: Upstream) -> ThreadSafeAccount:
    (shared,) = up.core.accounts
    return shared


async def ask(client: Any, **body: Any) -> Any:
    return await client.post(URL, json={**REQUEST, **body}, headers={"authorization": "Bearer sk-secret"})


async def pieces(client: Any, **body: Any) -> list[bytes]:
    async with client.stream("POST", URL, json={**REQUEST, "stream": True, **body}) as response:
        return [piece async for piece in response.aiter_raw()]


# --- responses ---


@LIBRARIES
@virtual
async def test_a_response_passes_unchanged_and_nothing_is_left_behind(http: ModuleType) -> None:
    up = upstream()
    script = Script(http, Reply(headers={"x-request-id": "req_7"}))
    response = await ask(script.client(up))
    assert response.json() == CHAT
    assert response.headers["x-request-id"] == "req_7"
    assert response.headers["x-should-retry"] == "false"
    assert script.closed == 1
    assert left(up) == NOTHING


@LIBRARIES
def test_in_a_plain_thread_a_response_passes_unchanged_too(http: ModuleType) -> None:
    up = upstream()
    script = Script(http)
    client = script.blocking_client(up)
    assert client.post(URL, json=REQUEST).json() == CHAT
    script.replies = [Reply.stream()]
    with client.stream("POST", URL, json={**REQUEST, "stream": True}) as response:
        assert b"".join(response.iter_raw()) == b"".join([*words("The ", "Danube."), STOP, DONE])
    assert script.closed == 2
    assert left(up) == NOTHING


@LIBRARIES
@virtual
async def test_the_last_answer_is_marked_if_no_time_is_left_for_a_retry(http: ModuleType) -> None:
    replies = Reply.error(500, "first"), Reply.error(500, "last", retry_after="120")  # longer than max_total_delay
    response = await ask(Script(http, *replies).client(upstream()))
    assert (response.status_code, response.json()["error"]["message"]) == (500, "last")
    assert response.headers["x-forebay-retries"] == "out-of-time"


@LIBRARIES
@virtual
async def test_the_last_answer_is_not_marked_if_the_attempts_are_used_up(http: ModuleType) -> None:
    client = Script(http, Reply.error(500)).client(upstream(retry=Retry(max_attempts=2)))
    assert "x-forebay-retries" not in (await ask(client)).headers


@LIBRARIES
@virtual
async def test_a_stream_asks_for_usage_and_hides_it_from_a_caller_who_did_not(http: ModuleType) -> None:
    up = upstream(budget=Budget(usd=1000, per="day"), prices={"gpt-4o": Price(input=1e6, output=1e5)})
    script = Script(http, Reply.stream(*STREAM))
    client = script.client(up)
    assert b"".join(await pieces(client)) == b"".join([*words("The ", "Danube."), STOP, DONE])
    assert json.loads(script.requests[0].content)["stream_options"] == {"include_usage": True}
    assert up.statistics().spent_usd == 30 * 1.0 + 20 * 0.1


@LIBRARIES
@virtual
async def test_a_caller_who_asked_for_usage_gets_every_byte(http: ModuleType) -> None:
    script = Script(http, Reply.stream(*STREAM))
    client = script.client(upstream())
    asked = {"stream_options": {"include_usage": True}}
    assert await pieces(client, **asked) == STREAM
    assert script.requests[0].content == http.Request("POST", URL, json={**REQUEST, "stream": True, **asked}).content


@LIBRARIES
@virtual
async def test_compressed_responses_are_metered_too(http: ModuleType) -> None:
    up = upstream(budget=Budget(usd=1000, per="day"), prices={"gpt-4o": Price(input=1e6, output=0)})
    zipped = {"content-encoding": "gzip"}
    whole = Reply(body=[gzip.compress(json.dumps(CHAT).encode())], headers=zipped)
    stream = Reply.stream(gzip.compress(b"".join(STREAM)))
    stream.headers |= zipped
    client = Script(http, whole, stream).client(up)
    response = await ask(client)
    assert response.json() == CHAT
    assert response.headers["content-encoding"] == "gzip"
    assert b"".join(await pieces(client)) == b"".join([*words("The ", "Danube."), STOP, DONE])
    assert up.statistics().spent_usd == 60.0


@virtual
async def test_a_signed_request_is_sent_unchanged() -> None:
    script = Script(httpx2, Reply.stream(*STREAM))
    client = script.client(upstream())
    signed = {"authorization": "AWS4-HMAC-SHA256 Credential=x", "x-amz-date": "20260101T000000Z"}
    body = json.dumps({**REQUEST, "stream": True}).encode()
    async with client.stream("POST", URL, content=body, headers=signed) as response:
        assert b"".join([piece async for piece in response.aiter_raw()]) == b"".join(STREAM)
    assert script.requests[0].content == body


@virtual
async def test_calls_belong_to_the_account_of_their_key_and_model() -> None:
    up = upstream(models={"gpt-4o*": [], "o3": []})
    client = Script(httpx2).client(up)
    for header, model in (("authorization", "gpt-4o-mini"), ("x-api-key", "gpt-4o"), ("api-key", "o3")):
        await client.post(URL, json={**REQUEST, "model": model}, headers={header: "sk-secret"})
    names = {shared.name for shared in up.core.accounts}
    assert {name.rpartition(":")[2] for name in names} == {"gpt-4o*", "o3"}
    assert len(names) == 2  # the first two headers carry the same key
    assert "secret" not in repr(names) + repr(up.statistics())


@virtual
async def test_the_account_learns_its_quotas_from_headers() -> None:
    def headers(remaining: int) -> dict[str, str]:
        names = {"limit": "2", "remaining": f"{remaining}", "reset": f"{60 - 30 * remaining}s"}
        return {f"x-ratelimit-{name}-requests": value for name, value in names.items()}

    up = upstream()
    client = Script(httpx2, Reply(headers=headers(1)), Reply(headers=headers(0)), Reply()).client(up)
    began = now()
    for _ in range(3):
        await ask(client)
    assert now() - began > 20.0


def quota_left(up: Upstream) -> float:
    (level,) = only_account(up).account.quotas.levels(now())
    return level.remaining


def limits(remaining: int) -> dict[str, str]:
    return {"x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": f"{remaining}"}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@virtual
async def test_usage_by_other_clients_is_read_from_headers_after_a_moment_at_most(streamed: bool) -> None:  # noqa: FBT001
    up = upstream()
    replies = [Reply.stream() if streamed else Reply() for _ in range(4)]
    for reply, remaining in zip(replies, (99, 70, 60, 50), strict=True):
        reply.headers.update(limits(remaining))
    client = Script(httpx2, *replies).client(up)
    call = pieces if streamed else ask
    await call(client)
    await call(client)
    assert quota_left(up) == pytest.approx(98, abs=0.1)  # our own usage: the headers of the second were not read
    await asyncio.sleep(0.1)
    await call(client)
    assert quota_left(up) == pytest.approx(60, abs=0.1)


@virtual
async def test_the_headers_of_an_error_are_always_read() -> None:
    up = upstream(retry=Retry(max_attempts=1))
    error = Reply.error(400)
    error.headers.update(limits(40))
    client = Script(httpx2, Reply(headers=limits(99)), error).client(up)
    await ask(client)
    await ask(client)
    assert quota_left(up) == pytest.approx(40, abs=0.1)


# --- retries ---


@LIBRARIES
@virtual
async def test_faults_are_retried_until_an_attempt_succeeds(http: ModuleType) -> None:
    up = upstream()
    script = Script(http, Reply.error(500), http.ConnectError("no route"), Reply.error(502), Reply())
    assert (await ask(script.client(up))).json() == CHAT
    assert len(script.requests) == 4
    assert left(up) == NOTHING


@virtual
async def test_a_call_whose_response_body_breaks_off_is_retried() -> None:
    up = upstream()
    script = Script(httpx2, Reply(body=[b'{"id":', httpx2.ReadError("cut")]), Reply())
    assert (await ask(script.client(up))).json() == CHAT
    assert script.closed == 2
    assert left(up) == NOTHING


@LIBRARIES
@virtual
async def test_a_stream_in_an_encoding_that_cannot_be_read_passes_as_it_came_and_is_no_fault(http: ModuleType) -> None:
    up = upstream()
    stream = Reply.stream(b"\x1b\x02", b"\x03packed")
    stream.headers |= {"content-encoding": "x-packed"}
    client = Script(http, stream).client(up)
    async with client.stream("POST", URL, json={**REQUEST, "stream": True}) as response:
        assert b"".join([piece async for piece in response.aiter_raw()]) == b"\x1b\x02\x03packed"
        assert response.headers["content-encoding"] == "x-packed"
    assert only_account(up).account.counts.failed == 0
    assert left(up) == NOTHING


@LIBRARIES
@virtual
async def test_a_timeout_of_the_caller_is_retried_once_and_is_no_fault(http: ModuleType) -> None:
    up = upstream()
    script = Script(http, http.ReadTimeout("slow"))
    with pytest.raises(http.ReadTimeout):
        await ask(script.client(up))
    assert len(script.requests) == 2
    assert only_account(up).account.counts.failed == 0
    assert left(up) == NOTHING


@LIBRARIES
@virtual
async def test_a_connection_that_cannot_be_made_in_time_is_a_fault(http: ModuleType) -> None:
    up = upstream(retry=Retry(max_attempts=3))
    script = Script(http, http.ConnectTimeout("slow"))
    with pytest.raises(http.ConnectTimeout):
        await ask(script.client(up))
    assert len(script.requests) == 3
    assert only_account(up).account.counts.failed == 3


@LIBRARIES
@virtual
async def test_a_stream_whose_caller_stops_waiting_is_no_fault(http: ModuleType) -> None:
    up = upstream()
    script = Script(http, Reply.stream(*words("The "), http.ReadTimeout("slow")))
    with pytest.raises(http.ReadTimeout):
        await pieces(script.client(up))
    assert only_account(up).account.counts.failed == 0
    assert left(up) == NOTHING


@LIBRARIES
@virtual
async def test_a_provider_that_asks_for_retries_of_a_wrong_request_gets_no_more_than_max_attempts(
    http: ModuleType,
) -> None:
    up = upstream(retry=Retry(max_attempts=3))
    script = Script(http, Reply.error(400, "boom", x_should_retry="true"))
    assert (await ask(script.client(up))).status_code == 400
    assert len(script.requests) == 3
    assert only_account(up).account.counts.throttled == 0


@LIBRARIES
@virtual
async def test_after_the_last_retry_the_caller_gets_the_error_of_the_provider(http: ModuleType) -> None:
    up = upstream(retry=Retry(max_attempts=3))
    script = Script(http, Reply.error(500, "boom"))
    response = await ask(script.client(up))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "boom"
    assert response.headers["x-should-retry"] == "false"
    assert len(script.requests) == 3
    script = Script(http, http.ReadError("cut"))
    with pytest.raises(http.ReadError):
        await ask(script.client(up))
    assert len(script.requests) == 3
    assert left(up) == NOTHING


@virtual
async def test_a_request_error_is_not_retried() -> None:
    for reply in (Reply.error(400), Reply.error(401), Reply.error(404), Reply.error(500, x_should_retry="false")):
        script = Script(httpx2, reply)
        await ask(script.client(upstream()))
        assert len(script.requests) == 1


@virtual
async def test_a_streamed_request_body_is_sent_once() -> None:
    async def body() -> Any:
        yield b"x"

    script = Script(httpx2, Reply.error(500))
    response = await script.client(upstream()).post("https://provider.test/v1/files", content=body())
    assert response.status_code == 500
    assert len(script.requests) == 1


@virtual
async def test_a_throttled_call_waits_and_uses_no_attempt() -> None:
    up = upstream(retry=Retry(max_attempts=2))
    throttled = [Reply.error(429, "tokens per min", retry_after="2") for _ in range(4)]
    script = Script(httpx2, *throttled, Reply())
    began = now()
    assert (await ask(script.client(up))).status_code == 200
    assert now() - began >= 8.0
    assert left(up) == NOTHING


@virtual
async def test_after_a_rate_limited_call_others_are_sent_one_at_a_time_until_one_is_accepted() -> None:
    up = upstream()
    refusal = Reply.error(429, "requests per min", retry_after="5")
    script = Script(httpx2, *[refusal] * 5, Reply())
    client = script.client(up)
    began = now()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(ask(client))
        await asyncio.sleep(0.1)
        others = [group.create_task(ask(client)) for _ in range(20)]
        await asyncio.sleep(4.5)
        assert 1 <= len(script.requests) <= 5, "one for each silence, which doubles"
    assert now() - began >= 5.0
    assert all(call.result().status_code == 200 for call in (first, *others))
    assert left(up) == NOTHING


@virtual
async def test_a_retry_after_of_a_day_is_not_waited_for() -> None:
    up = upstream()
    script = Script(httpx2, Reply.error(429, "requests per day", retry_after="86400"))
    began = now()
    response = await ask(script.client(up))
    assert response.status_code == 429
    assert now() == approximately(began)
    assert len(script.requests) == 1


@virtual
async def test_at_the_spend_cap_of_the_provider_calls_are_rejected() -> None:
    up = upstream()
    script = Script(httpx2, SPENT)
    client = script.client(up)
    assert (await ask(client)).status_code == 429
    with pytest.raises(Overloaded) as rejection:
        await ask(client)
    assert rejection.value.retry_after == approximately(60.0)
    assert len(script.requests) == 1


@virtual
async def test_at_the_spend_cap_of_the_provider_a_free_request_is_still_sent() -> None:
    up = upstream()
    script = Script(httpx2, SPENT, Reply())
    client = script.client(up)
    assert (await ask(client)).status_code == 429
    assert (await client.get("https://provider.test/v1/models")).status_code == 200
    with pytest.raises(Overloaded):
        await ask(client)


@pytest.mark.parametrize("stream", [True, False])
@virtual
async def test_a_fetched_response_teaches_nothing_about_latency_and_tokens(*, stream: bool) -> None:
    up = upstream()
    client = Script(httpx2, *[Reply.stream() if stream else Reply()] * 20).client(up)
    for _ in range(20):
        assert (await client.get("https://provider.test/v1/responses/resp_1")).status_code == 200
    (shared,) = up.core.accounts
    assert shared.account.latency_model.expected(100) is None
    assert shared.token_estimates.output_tokens == TokenEstimates().output_tokens


@virtual
async def test_a_free_request_does_not_change_the_typical_cost_of_a_call() -> None:
    up = upstream(budget=Budget(usd=1e6), prices={"gpt-4o": Price(input=1e6, output=1e6)})
    client = Script(httpx2, *[Reply()] * 21).client(up)
    await ask(client)
    (shared,) = up.core.accounts
    typical = shared._typical.usd
    assert typical > 0
    for _ in range(20):
        await client.get("https://provider.test/v1/models")
    assert shared._typical.usd == typical


@virtual
async def test_at_the_spend_cap_calls_are_rejected_for_an_hour_at_most() -> None:
    body = b'{"error": {"message": "no", "code": "insufficient_quota"}}'
    spent = Reply(status=429, body=[body], headers={"retry-after": "9" * 40})
    client = Script(httpx2, spent, Reply()).client(upstream())
    assert (await ask(client)).status_code == 429
    await asyncio.sleep(2.0)
    with pytest.raises(Overloaded) as rejection:
        await ask(client)
    assert rejection.value.retry_after == approximately(3598.0)
    await asyncio.sleep(3598.0)
    assert (await ask(client)).status_code == 200


@virtual
async def test_a_402_stops_the_calls_once_each_of_two_seconds_was_refused() -> None:
    script = Script(httpx2, Reply.error(402, "no"))
    client = script.client(upstream())
    for _ in range(21):
        assert (await ask(client)).status_code == 402
        await asyncio.sleep(0.1)
    with pytest.raises(Overloaded, match="money is spent"):
        await ask(client)
    assert len(script.requests) == 21


class DearRequests(Script):
    """A provider that refuses requests for many tokens, and answers others after a second."""

    def next(self, request: Any) -> Reply:
        body = json.loads(request.content)
        return super().next(request) if body["max_tokens"] > 1_000 else Reply(pause=1.0)


@pytest.mark.parametrize("model", ["gpt-4o", "o3"])
@pytest.mark.parametrize("refusal", [Reply.error(402, "can only afford 41234"), Reply.error(400, "Credit balance!")])
@virtual
async def test_a_request_that_the_account_cannot_afford_stops_no_others(refusal: Reply, model: str) -> None:
    client = DearRequests(httpx2, refusal).client(upstream())

    async def ask_often(pause: float, **body: Any) -> set[int]:
        statuses = set()
        while now() < 60.0:
            try:
                statuses.add((await ask(client, **body)).status_code)
            except Overloaded:
                statuses.add(429)
            await asyncio.sleep(pause)
        return statuses

    async with asyncio.TaskGroup() as group:
        group.create_task(ask_often(0.1, model=model, max_tokens=65_536))
        others = [group.create_task(ask_often(pause)) for pause in (0.1, 0.3, 0.7)]
    assert all(other.result() == {200} for other in others)


@pytest.mark.parametrize(("pause", "after"), [(3.0, 30.0), (10.0, 30.0), (10.0, 0.0)])
@virtual
async def test_a_request_that_the_account_cannot_afford_stops_no_others_where_they_are_few(
    pause: float, after: float
) -> None:
    client = DearRequests(httpx2, Reply.error(402, "can only afford 41234")).client(upstream())

    async def ask_often(pause: float, **body: Any) -> list[int]:
        statuses = []
        while now() < 1_800.0:
            try:
                statuses.append((await ask(client, **body)).status_code)
            except Overloaded:
                statuses.append(429)
            await asyncio.sleep(pause)
        return statuses

    async with asyncio.TaskGroup() as group:
        others = group.create_task(ask_often(pause))
        await asyncio.sleep(after)
        group.create_task(ask_often(1.0, max_tokens=65_536))
    assert others.result().count(200) >= 0.97 * len(others.result())


@virtual
async def test_after_a_night_of_402s_for_one_request_others_are_soon_served() -> None:
    client = DearRequests(httpx2, Reply.error(402, "can only afford 41234")).client(upstream())

    async def loop() -> None:
        while True:
            with contextlib.suppress(Overloaded):
                await ask(client, max_tokens=65_536)
            await asyncio.sleep(1.0)

    looping = asyncio.create_task(loop())
    await asyncio.sleep(8 * 3600.0)
    begun = now()
    while True:
        try:
            response = await ask(client)
        except Overloaded:
            await asyncio.sleep(5.0)
            continue
        break
    looping.cancel()
    assert response.status_code == 200
    assert now() - begun < 125.0


@virtual
async def test_a_probe_that_is_refused_stops_no_other_model() -> None:
    client = DearRequests(httpx2, Reply.error(402, "this model needs a plan")).client(upstream())

    async def ask_often(pause: float, **body: Any) -> set[int]:
        statuses = set()
        while now() < 300.0:
            try:
                statuses.add((await ask(client, **body)).status_code)
            except Overloaded:
                statuses.add(429)
            await asyncio.sleep(pause)
        return statuses

    async with asyncio.TaskGroup() as group:
        group.create_task(ask_often(1.0, model="o3", max_tokens=65_536))
        others = [group.create_task(ask_often(pause)) for pause in (0.3, 0.7)]
    assert all(other.result() == {200} for other in others)


class RefusedForItself(Script):
    """A provider that refuses requests for many tokens for a rate, and answers others, all after half a second."""

    def __init__(self, retry_after: int) -> None:
        refusal = Reply.error(429, "Extra usage is required", retry_after=str(retry_after))
        super().__init__(httpx2, dataclasses.replace(refusal, pause=0.5))

    def next(self, request: Any) -> Reply:
        body = json.loads(request.content)
        return super().next(request) if body["max_tokens"] > 1_000 else Reply(pause=0.5)


@pytest.mark.parametrize(
    ("retry_after", "pause", "least", "median"),
    # With a call in 0.9 s the others alone are more than the quota grants, so that it is used up most of the time.
    [(1, 2.0, 0.97, 12.0), (5, 2.0, 0.97, 12.0), (20, 2.0, 0.97, 12.0), (5, 0.9, 0.9, 60.0)],
)
@virtual
async def test_requests_that_are_refused_for_what_they_ask_use_up_no_quota_that_was_given(
    retry_after: int, pause: float, least: float, median: float
) -> None:
    client = RefusedForItself(retry_after).client(upstream(quotas=[Quota(requests=60, per="minute")]))

    async def ask_in_a_loop() -> None:
        await asyncio.sleep(10.0)
        while now() < 900.0:
            with contextlib.suppress(Overloaded, TimeoutError):
                async with asyncio.timeout(120.0):
                    await ask(client, max_tokens=65_536)
            await asyncio.sleep(1.0)

    async def ask_once() -> tuple[int, float]:
        begun = now()
        try:
            return (await ask(client)).status_code, now() - begun
        except Overloaded:
            return 429, now() - begun

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(ask_in_a_loop())
        others = []
        while now() < 900.0:
            others.append(group.create_task(ask_once()))
            await asyncio.sleep(pause)
    results = [other.result() for other in others]
    assert sum(status == 200 for status, _ in results) >= least * len(results)
    assert statistics.median(seconds for _, seconds in results) < median


@virtual
async def test_429_for_too_many_concurrent_requests_lowers_the_limit() -> None:
    up = upstream(retry=Retry(max_attempts=1, max_total_delay=0))
    client = Script(httpx2, Reply(), *[Reply.error(429, "too many concurrent requests")] * 9).client(up)
    await ask(client)
    before = only_account(up).account.limit.limit(now())
    await asyncio.gather(*(ask(client) for _ in range(8)))
    assert only_account(up).account.limit.limit(now()) < before


# --- streams ---


@virtual
async def test_a_stream_holds_its_permit_until_it_ends() -> None:
    up = upstream()
    client = Script(httpx2, Reply.stream(pause=1.0)).client(up)
    async with client.stream("POST", URL, json={**REQUEST, "stream": True}) as response:
        assert {only_account(up).account.in_flight async for _ in response.aiter_raw()} == {1}
    assert left(up) == NOTHING
    assert only_account(up).account.durations.typical == approximately(5.0)


@virtual
async def test_a_caller_who_closes_a_stream_early_pays_for_the_received_part() -> None:
    up = upstream(budget=Budget(usd=1000, per="day"), prices={"gpt-4o": Price(input=0, output=1e6)})
    script = Script(httpx2, Reply.stream(*words(*["word"] * 50)))
    async with script.client(up).stream("POST", URL, json={**REQUEST, "stream": True}) as response:
        async for _ in response.aiter_raw():
            break
    assert left(up) == NOTHING
    assert script.closed == 1
    assert 0 < (up.statistics().spent_usd or 0) <= 3.0


@virtual
async def test_a_stream_that_breaks_off_is_a_fault_and_raises_the_error() -> None:
    up = upstream(retry=Retry(max_attempts=1))
    client = Script(httpx2, Reply.stream(*words("a"), httpx2.RemoteProtocolError("cut"))).client(up)
    for _ in range(5):
        with pytest.raises(httpx2.RemoteProtocolError, match="cut"):
            await pieces(client)
    assert left(up) == NOTHING
    assert only_account(up).account.breaker.state(now()) is BreakerState.OPEN


@virtual
async def test_a_stream_that_ends_too_early_or_with_an_error_event_is_a_fault() -> None:
    error = b'event: error\ndata: {"type": "error", "error": {"type": "api_error", "message": "x"}}\n\n'
    for end in ([], [error]):
        up = upstream(retry=Retry(max_attempts=1))
        client = Script(httpx2, Reply.stream(*words("a"), *end)).client(up)
        for _ in range(5):
            assert await pieces(client) == [*words("a"), *end]
        assert only_account(up).account.breaker.state(now()) is BreakerState.OPEN
        assert left(up) == NOTHING


@virtual
async def test_an_unparsable_response_passes_and_costs_the_reserved_amount() -> None:
    up = upstream(budget=Budget(usd=1000, per="day"), prices={"gpt-4o": Price(input=0, output=1e6)})
    client = Script(httpx2, Reply(body=[b"\xff\x00garbage"]), Reply.stream(b"\xffgarbage\n\n", b"data: {\n\n")).client(
        up
    )
    assert (await ask(client)).content == b"\xff\x00garbage"
    assert up.statistics().spent_usd == 100.0  # max_tokens
    assert b"".join(await pieces(client)) == b"\xffgarbage\n\ndata: {\n\n"
    assert left(up) == NOTHING


@LIBRARIES
@virtual
async def test_a_discarded_stream_returns_its_permit(http: ModuleType) -> None:
    up = upstream()
    client = Script(http, Reply.stream()).client(up)
    request = client.build_request("POST", URL, json={**REQUEST, "stream": True})
    response = await client.send(request, stream=True)
    assert only_account(up).account.in_flight == 1
    del response
    gc.collect()
    await run_ready()
    assert left(up) == NOTHING


def test_a_discarded_stream_in_a_thread_returns_its_permit() -> None:
    up = upstream()
    client = Script(httpx2, Reply.stream()).blocking_client(up)
    response = client.send(client.build_request("POST", URL, json={**REQUEST, "stream": True}), stream=True)
    settled = threading.Event()
    settle = only_account(up).settle

    def watched(*arguments: Any) -> None:
        settle(*arguments)
        settled.set()

    only_account(up).settle = watched  # type: ignore[method-assign,assignment]
    del response
    gc.collect()
    assert settled.wait(5.0)
    assert left(up) == NOTHING


@pytest.mark.parametrize("reply", [Reply(), Reply.stream(), Reply.error(500)], ids=["whole", "stream", "error"])
def test_a_call_cancelled_at_any_moment_leaves_nothing_behind(reply: Reply) -> None:
    @virtual
    async def cancelled_after(iterations: int) -> None:
        up = upstream(quotas=[Quota(requests=100, per="minute")], retry=Retry(base_delay=0.001, max_attempts=3))
        script = Script(httpx2, reply)
        client = script.client(up)
        task = asyncio.create_task(pieces(client) if reply.headers else ask(client))
        for iteration in range(iterations):
            await asyncio.sleep(0 if iteration < 12 else 0.0002)  # retries sleep
        ended.append(task.done())
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert left(up) == NOTHING
        assert script.closed == script.opened

    ended: list[bool] = []
    while not ended or not ended[-1]:
        cancelled_after(len(ended))
    assert len(ended) > 3


# --- rejections ---


@LIBRARIES
@virtual
async def test_a_rejection_is_both_overloaded_and_an_error_of_the_http_library(http: ModuleType) -> None:
    up = upstream(quotas=[Quota(requests=1, per="day")])
    script = Script(http)
    client = script.client(up)
    await ask(client)
    with pytest.raises(Overloaded) as rejection:
        await ask(client)
    error = rejection.value
    assert isinstance(error, http.HTTPError)
    assert not isinstance(error, http.TransportError)
    assert error.request.url == URL
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert not hasattr(error, "status_code")
    assert len(script.requests) == 1
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(again), str(again), again.retry_after) == (Overloaded, str(error), error.retry_after)


@virtual
async def test_a_run_whose_call_is_rejected_ends_as_overloaded_whatever_it_raises() -> None:
    up = upstream(quotas=[Quota(requests=1, per="day")])
    script = Script(httpx2)
    client = script.client(up)

    async def agent(_: Task) -> None:
        try:
            await ask(client)
        except httpx2.HTTPError:
            raise ValueError("ours") from None

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("agent", handler=agent, task_types=["ask"])
        assert (await (await supervisor.submit(Task("ask")))).status is TaskStatus.SUCCEEDED
        with pytest.raises(Overloaded):
            await supervisor.run(Task("ask"))
        assert worker.sources


@virtual
async def test_a_run_whose_call_the_provider_throttles_to_the_end_ends_as_overloaded() -> None:
    up = upstream()
    client = Script(httpx2, Reply.error(429, "requests per day", retry_after="86400")).client(up)

    async def agent(_: Task) -> None:
        (await ask(client)).raise_for_status()

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"])
        with pytest.raises(Overloaded) as rejection:
            await supervisor.run(Task("ask"))
        assert rejection.value.retry_after == 86400.0


@virtual
async def test_a_call_outside_of_a_task_counts_and_belongs_to_no_task() -> None:
    up = upstream(task_budget=Budget(usd=1e-9, per="day"))
    client = Script(httpx2, Reply(pause=1.0)).client(up)
    assert (await ask(client)).status_code == 200
    assert only_account(up).account.durations.typical > 0


def test_threads_and_loops_share_one_account() -> None:
    up = upstream(max_concurrent=2)
    script = Script(httpx2)
    blocking = script.blocking_client(up)

    async def ten() -> None:
        client = script.client(up)
        await asyncio.gather(*[ask(client) for _ in range(10)])

    threads = [threading.Thread(target=asyncio.run, args=(ten(),)) for _ in range(3)]
    threads += [
        threading.Thread(target=lambda: [blocking.post(URL, json=REQUEST) for _ in range(10)]) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(script.requests) == 60
    assert left(up) == NOTHING
    assert max(shared.account.peak_in_flight for shared in up.core.accounts) <= 2


@virtual
async def test_an_sdk_that_retries_a_call_after_its_last_retry_gets_the_same_error_at_once() -> None:
    up = upstream(retry=Retry(max_attempts=2))
    script = Script(httpx2, httpx2.ConnectError("no route"))
    client = script.client(up)
    for count in ("0", "1", "2"):
        with pytest.raises(httpx2.ConnectError, match="no route"):
            await client.post(URL, json=REQUEST, headers={"x-stainless-retry-count": count})
    assert len(script.requests) == 2
    with pytest.raises(httpx2.ConnectError):
        await client.post(URL, json=REQUEST)
    assert len(script.requests) == 4


@virtual
async def test_cached_input_tokens_cost_the_cached_price() -> None:
    price = Price(input=1e6, output=0, cached_input=1e5)
    up = upstream(budget=Budget(usd=1000, per="day"), prices={"gpt-4o": price})
    usage = {**CHAT["usage"], "prompt_tokens_details": {"cached_tokens": 10}}
    client = Script(httpx2, Reply(body=[json.dumps({**CHAT, "usage": usage}).encode()])).client(up)
    await ask(client)
    assert up.statistics().spent_usd == 20 * 1.0 + 10 * 0.1
