"""A gateway in front of a scripted provider: calls that pass, rejections, faults, draining."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    CUT,
    DONE,
    EVENT,
    NOTHING_LEFT,
    STOP,
    GatewayHarness,
    leftovers,
    raw,
    responding,
    streaming,
    until,
)  # fmt: skip
from tests.support.metric_samples import total
from yarl import URL

from forebay import clock
from forebay.gateway import (
    ContextSettings,
    FallbackSettings,
    GatewaySettings,
    MissingFallbackKey,
    QuotaSettings,
    TargetSettings,
)
from forebay.gateway.server import Gateway
from forebay.gateway.workers.worker_processes import CannotListen
from forebay.quota import Price
from forebay.upstream.accounts.account_retries import AccountRetries

# --- forwarding ---


async def test_a_response_passes_and_is_not_to_be_retried(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        status, headers, body = await harness.post(gateway, headers={"authorization": "Bearer sk-1", "x-custom": "ü"})
        assert (status, body) == (200, CHAT_RESPONSE)
        assert headers["x-request-id"] == "req_1"
        assert headers.getall("x-should-retry") == ["false"]
        (request,) = harness.provider.requests
        assert request.headers["authorization"] == "Bearer sk-1"
        assert request.headers["x-custom"] == "ü"
        assert request.headers["host"] == harness.url.removeprefix("http://")
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("query", ["?beta=true", "?name=%C3%BC&other=a+b", ""], ids=["plain", "escaped", "none"])
async def test_a_query_arrives_as_it_was_sent(harness: GatewayHarness, method: str, query: str) -> None:
    async with Gateway(harness.settings()) as gateway:
        url = URL(harness.at(gateway, "/v1/chat/completions" + query), encoded=True)
        async with harness.session.request(method, url, json=CHAT_REQUEST) as response:
            assert response.status == 200
        (request,) = harness.provider.requests
        assert request.raw_path == "/v1/chat/completions" + query


async def test_a_provider_is_reached_through_the_http_proxy_of_the_environment(harness: GatewayHarness) -> None:
    target = TargetSettings(name="openai", url="http://llm.example")
    environment = {"http_proxy": harness.url.replace("://", "://me:hidden@")}
    async with Gateway(GatewaySettings(targets=(target,), listen="127.0.0.1:0"), environment) as gateway:
        status, _, body = await harness.post(gateway, headers={"authorization": "Bearer sk-1"})
        assert (status, body) == (200, CHAT_RESPONSE)
        (request,) = harness.provider.requests
        assert request.raw_path == "http://llm.example/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer sk-1"
        assert "proxy-authorization" in request.headers


async def test_headers_for_the_gateway_are_not_forwarded(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        await harness.post(
            gateway, headers={"x-forebay-tenant": "acme", "connection": "keep-alive, x-hop", "x-hop": "1"}
        )
        (request,) = harness.provider.requests
        assert not [name for name in request.headers if name.lower().startswith("x-forebay") or name.lower() == "x-hop"]


async def test_a_stream_passes_unchanged_and_at_once(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, b": a comment\r\n\r\n", EVENT[:30], EVENT[30:], STOP, DONE)
    async with Gateway(harness.settings()) as gateway:
        asking: Any = {"json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}}
        async with harness.session.post(harness.at(gateway), **asking) as response:
            assert await response.read() == EVENT + b": a comment\r\n\r\n" + EVENT + STOP + DONE
            assert response.content_type == "text/event-stream"
        assert leftovers(gateway) == NOTHING_LEFT
        harness.provider.behaviour = streaming(EVENT, None)
        async with harness.session.post(harness.at(gateway), **asking) as response:
            assert await response.content.readany() == EVENT  # although nothing follows


async def test_a_compressed_response_stays_compressed_and_is_metered(harness: GatewayHarness) -> None:
    packed = gzip.compress(json.dumps(CHAT_RESPONSE).encode())
    harness.provider.behaviour = responding(200, packed, content_encoding="gzip", content_type="application/json")
    async with Gateway(harness.settings()) as gateway:
        async with harness.session.post(harness.at(gateway), json=CHAT_REQUEST, auto_decompress=False) as response:
            assert await response.read() == packed
        labels = {"target": "openai", "model": "gpt-4o"}
        assert total(gateway, "forebay_tokens_total", direction="input", **labels) == 30
        assert total(gateway, "forebay_tokens_total", direction="output", **labels) == 20


async def test_a_compressed_stream_stays_compressed_and_is_metered(harness: GatewayHarness) -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 20}
    packed = gzip.compress(EVENT + STOP + b"data: %b\n\n" % json.dumps({"choices": [], "usage": usage}).encode() + DONE)
    harness.provider.behaviour = streaming(packed[:20], packed[20:], encoding="gzip")
    asking: Any = {"json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}}
    async with Gateway(harness.settings()) as gateway:
        async with harness.session.post(
            harness.at(gateway), **asking, headers={"accept-encoding": "gzip"}, auto_decompress=False
        ) as response:
            assert await response.read() == packed
        labels = {"target": "openai", "model": "gpt-4o"}
        assert total(gateway, "forebay_tokens_total", direction="input", **labels) == 30
        assert total(gateway, "forebay_tokens_total", direction="output", **labels) == 20
        assert total(gateway, "forebay_attempts_total", outcome="failed") == 0


async def test_pages_of_the_gateway_are_found_with_a_query(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        for path in ("/metrics?name[]=forebay_tokens_total", "/metrics?", "/healthz?verbose", "/readyz?verbose"):
            async with harness.session.get(harness.at(gateway, path)) as response:
                assert response.status == 200
    assert harness.provider.requests == []


async def test_the_metrics_have_attempts_and_quotas(harness: GatewayHarness) -> None:
    limits = {"x_ratelimit_limit_requests": "100", "x_ratelimit_remaining_requests": "40"}
    harness.provider.behaviour = responding(
        200, json.dumps(CHAT_RESPONSE).encode(), content_type="application/json", **limits
    )
    async with Gateway(harness.settings()) as gateway:
        async with harness.session.post(harness.at(gateway), json=CHAT_REQUEST):
            pass
        async with harness.session.get(harness.at(gateway, "/metrics")) as response:
            lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    received = {line.partition("{")[0]: line for line in lines if 'quota="requests per minute"' in line}
    assert float(received["forebay_quota_remaining_requests"].split()[-1]) == pytest.approx(40, abs=1)
    assert float(received["forebay_quota_limit_requests"].split()[-1]) == 100.0
    attempts = [line for line in lines if line.startswith("forebay_attempts_total") and 'outcome="succeeded"' in line]
    assert [line.split()[-1] for line in attempts] == ["1.0"]


def metric_lines(gateway: Gateway) -> list[str]:
    return [line for line in gateway.forwarder.metrics.render().decode().splitlines() if not line.startswith("#")]


async def test_the_metrics_of_many_keys_are_bounded_and_its_counters_never_go_back(harness: GatewayHarness) -> None:
    harness.provider.behaviour = harness.provider.reply
    async with Gateway(harness.settings(gateway={"max_metrics_accounts": 3})) as gateway:
        sizes = []
        for number in range(1_010):  # more than the accounts that are kept
            await harness.post(gateway, headers={"authorization": f"Bearer {number}"})
            if number % 100 == 50:
                lines = metric_lines(gateway)
                sizes.append(sum("account=" in line for line in lines))
                assert total(gateway, "forebay_attempts_total", outcome="succeeded") == number + 1
        assert len(set(sizes)) == 1
        assert sum(line.startswith("forebay_calls_in_flight{") for line in lines) == 3


async def test_the_account_with_calls_in_flight_is_among_those_with_gauges(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_metrics_accounts": 1})) as gateway:
        for number in range(5):
            await harness.post(gateway, headers={"authorization": f"Bearer {number}"})
        harness.provider.behaviour = streaming(EVENT, None)
        async with harness.session.post(harness.at(gateway), json={**CHAT_REQUEST, "stream": True}):
            in_flight = [line for line in metric_lines(gateway) if line.startswith("forebay_calls_in_flight{")]
            assert [line.split()[-1] for line in in_flight] == ["1.0"]


async def test_a_target_can_be_called_by_its_name_on_any_path(harness: GatewayHarness) -> None:
    harness.provider.behaviour = responding(200, b"binary", content_type="audio/mpeg")
    async with Gateway(harness.settings()) as gateway:
        status, _, body = await harness.post(gateway, "/openai/v1/audio/speech?x=%20y")
        assert (status, body) == (200, b"binary")
        assert harness.provider.requests[0].raw_path == "/v1/audio/speech?x=%20y"
        assert leftovers(gateway) == NOTHING_LEFT


# --- callers ---


async def test_each_key_has_its_own_account_unless_keys_share_one(harness: GatewayHarness) -> None:
    for share, count in ((False, 2), (True, 1)):
        async with Gateway(harness.settings(share_keys=share)) as gateway:
            for key in ("sk-1", "sk-2", "sk-1"):
                await harness.post(gateway, headers={"authorization": f"Bearer {key}"})
            names = [account.name for account in gateway.forwarder.targets[0].upstream.core.accounts]
            assert len(names) == count
            assert "sk-" not in repr(names)


async def test_calls_are_served_by_the_priority_in_their_headers(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now)  # a call that waits four typical times moves up: here they are short
    async with Gateway(harness.settings(max_concurrent=1)) as gateway:
        gate = asyncio.Event()

        async def slow(request: web.BaseRequest) -> web.StreamResponse:
            await gate.wait()
            return await harness.provider.reply(request)

        harness.provider.behaviour = slow
        (account,) = [gateway.forwarder.targets[0].upstream.core.accounts.account("gpt-4o")]
        async with asyncio.TaskGroup() as group:
            group.create_task(harness.post(gateway))
            await until(lambda: account.account.in_flight == 1)
            for number, level in enumerate(["low", "normal", "critical", "high"], start=1):
                sent = {"x-forebay-priority": level, "x-level": level}
                group.create_task(harness.post(gateway, headers=sent))
                await until(lambda number=number: len(account.account.queue) == number)  # type: ignore[misc]
            gate.set()
        assert [request.headers.get("x-level") for request in harness.provider.requests] == [
            *(None, "critical", "high", "normal", "low")
        ]
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_call_that_runs_out_of_time_between_its_attempts_gets_the_last_answer(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.provider.behaviour = responding(500, b'{"error": {"message": "it broke"}}')
    later = 0.0
    monkeypatch.setattr(clock, "now", lambda: clock.monotonic() + later)

    def wait_beyond_the_deadline(*_: Any, **__: Any) -> float:
        nonlocal later
        later = 60.0
        return 0.0

    monkeypatch.setattr(AccountRetries, "next_delay", wait_beyond_the_deadline)
    async with Gateway(harness.settings()) as gateway:
        status, headers, body = await harness.post(gateway, headers={"x-forebay-deadline": str(clock.wall_time() + 30)})
        assert (status, body) == (500, {"error": {"message": "it broke"}})
        assert headers["x-forebay-retries"] == "out-of-time"
        assert headers["x-forebay-attempts"] == "1"
        assert "x-forebay-limited-by" not in headers
        assert leftovers(gateway) == NOTHING_LEFT


async def test_an_answer_after_which_attempts_are_used_up_is_not_marked(harness: GatewayHarness) -> None:
    harness.provider.behaviour = responding(400)
    async with Gateway(harness.settings()) as gateway:
        status, headers, _ = await harness.post(gateway)
        assert status == 400
        assert "x-forebay-retries" not in headers


async def test_a_call_after_its_deadline_is_rejected_without_cost(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        status, headers, body = await harness.post(gateway, headers={"x-forebay-deadline": str(clock.wall_time() - 1)})
        assert status == 408
        assert headers["x-should-retry"] == "false"
        assert "deadline" in body["error"]["message"]
        assert harness.provider.requests == []


async def test_an_invalid_header_is_a_400_that_names_what_is_allowed(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        status, _, body = await harness.post(gateway, "/v1/messages", headers={"x-forebay-priority": "urgent"})
        assert status == 400
        assert body["type"] == "error"
        assert "critical, high, normal, low" in body["error"]["message"]


# --- access ---


async def test_beyond_loopback_a_token_is_needed(harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "0123456789abcdef0123"  # noqa: S105 - of this test
    monkeypatch.setenv("GATE", token)
    settings = harness.settings(gateway={"listen": "0.0.0.0:0", "token_env": "GATE"})
    async with Gateway(settings) as gateway:
        for path in ("/v1/chat/completions", "/metrics", "/nowhere"):
            status, _, body = await harness.post(gateway, path)
            assert status == 401
            assert "x-forebay-token" in body["error"]["message"]
        assert harness.provider.requests == []
        status, _, _ = await harness.post(gateway, headers={"x-forebay-token": token})
        assert status == 200
        assert token not in repr(harness.provider.requests[0].headers)
        for path, expected in (("/healthz", {"status": "ok"}), ("/readyz", {"status": "ready", "problems": []})):
            async with harness.session.get(harness.at(gateway, path)) as response:
                assert await response.json() == expected


async def test_only_a_trusted_caller_may_name_its_tenant(harness: GatewayHarness) -> None:
    settings = harness.settings(
        gateway={"context": ContextSettings(trust="nobody")},
        tenant_budget_usd=1e-9,
        prices={"*": Price(input=1e6, output=1e6)},
    )
    async with Gateway(settings) as gateway:
        assert (await harness.post(gateway, headers={"x-forebay-tenant": "a"}))[0] == 402
    async with Gateway(harness.settings(gateway={"context": ContextSettings(tenant_headers=("x-user",))})) as gateway:
        assert (await harness.post(gateway, headers={"x-user": "a"}))[0] == 200


async def test_an_address_in_use_is_reported_in_one_line(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        address = f"127.0.0.1:{gateway.port}"
        with pytest.raises(CannotListen) as rejected:
            await Gateway(harness.settings(gateway={"listen": address})).__aenter__()
    assert str(rejected.value) == (
        f"The gateway cannot listen on {address}: Address already in use."
        " Give another address, or stop the program that uses it."
    )


# --- rejections ---


async def test_a_spent_budget_is_a_402(harness: GatewayHarness) -> None:
    settings = harness.settings(budget_usd=60.0, prices={"gpt-4o": Price(input=0, output=1e6)})
    async with Gateway(settings) as gateway:
        assert [(await harness.post(gateway))[0] for _ in range(2)] == [200, 402]
        status, headers, body = await harness.post(gateway)
        assert (status, body["error"]["type"]) == (402, "insufficient_quota")
        assert headers["x-should-retry"] == "false"
        assert int(headers["retry-after"]) > 0  # the end of the day
        assert gateway.forwarder.targets[0].upstream.statistics().spent_usd == 20.0
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize("budget", ["budget_usd", "tenant_budget_usd", "task_budget_usd"])
async def test_free_requests_pass_with_a_spent_budget(harness: GatewayHarness, budget: str) -> None:
    spends: dict[str, Any] = {budget: 20.0, "prices": {"gpt-4o": Price(input=0, output=1e6)}}
    async with Gateway(harness.settings(**spends)) as gateway:
        task = {"x-forebay-task": "t"}
        ask = {**CHAT_REQUEST, "max_tokens": 20}
        assert (await harness.post(gateway, headers=task, json=ask))[0] == 200
        assert (await harness.post(gateway, headers=task, json=ask))[0] == 402
        models = harness.at(gateway, "/v1/models")
        async with harness.session.get(models, headers=task) as response:
            assert response.status == 200
        assert (await harness.post(gateway, headers=task, json=ask))[0] == 402
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_call_that_exceeds_its_whole_quota_is_a_413(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(models={"gpt-4o": QuotaSettings(output_tpm=10)})) as gateway:
        status, headers, body = await harness.post(gateway)
        assert status == 413
        assert headers["x-should-retry"] == "false"
        assert "larger" in body["error"]["message"]


async def test_a_caller_that_cannot_wait_gets_a_429_with_a_retry_after(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(rpm=2)) as gateway:
        assert [(await harness.post(gateway))[0] for _ in range(2)] == [200, 200]
        status, headers, body = await harness.post(gateway, headers={"x-stainless-read-timeout": "2"})
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        assert headers["x-should-retry"] == "true"
        assert 0 < int(headers["retry-after-ms"]) <= 35_000
        assert len(harness.provider.requests) == 2
        status, _, body = await harness.post(
            gateway, "/anthropic/v1/messages", headers={"x-stainless-read-timeout": "2"}
        )
        assert status == 200  # it has another account


async def test_invalid_requests_are_answered_without_the_provider(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_body_bytes": 10_000})) as gateway:
        for path, sent, status in (
            ("/v1/chat/completions", b"{", 400),
            ("/v1/messages", b"[1]", 400),
            ("/v1/embeddings", b"\xff\xfe", 400),
            ("/v1/chat/completions", b"[" * 9_000, 400),
            ("/v1/chat/completions", b" " * 10_001, 413),
            ("/nowhere", b"{}", 404),
            ("/v1/../etc/passwd", b"{}", 404),
        ):
            got, headers, body = await harness.post(gateway, path, data=sent)
            assert got == status, path
            assert headers["x-should-retry"] == "false"
            assert body["error"]["message"]

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 4096

        try:
            got, _, _ = await harness.post(gateway, data=endless())
        except aiohttp.ClientError:  # it disconnects a caller that goes on sending
            pass
        else:
            assert got == 413
        assert harness.provider.requests == []
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize(
    "lengths",
    [
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"content-length: -1\r\n",
        b"content-length: two\r\n",
    ],
)
async def test_contradicting_lengths_are_invalid_http(harness: GatewayHarness, lengths: bytes) -> None:
    async with Gateway(harness.settings()) as gateway:
        received = await raw(
            gateway, b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n" + lengths + b"\r\n{}"
        )
        assert received.startswith(b"HTTP/1.0 400"), received
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert harness.provider.requests == []
        assert (await harness.post(gateway))[0] == 200  # the gateway still works


async def test_endless_headers_are_rejected(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_header_bytes": 4096})) as gateway:
        for head in (b"x: " + b"a" * 8192 + b"\r\n", b"".join(b"x%d: a\r\n" % n for n in range(300))):
            received = await raw(gateway, b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n")
            assert received.startswith(b"HTTP/1.0 431"), received[:100]
            assert b"invalid_request_error" in received
        assert (await harness.post(gateway))[0] == 200


async def test_connections_are_limited(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_connections": 2})) as gateway:
        open_ = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(2)]
        for _, writer in open_:
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        for reader, _ in open_:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert (await raw(gateway, b"")).startswith(b"HTTP/1.1 503")
        for _, writer in open_:
            writer.close()
            await writer.wait_closed()
        await until(lambda: not gateway._web.connections)
        assert (await harness.post(gateway))[0] == 200


async def test_a_body_that_does_not_arrive_is_a_408(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"body_timeout": 0.05})) as gateway:
        received = await raw(
            gateway, b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{"
        )
        assert received.startswith(b"HTTP/1.1 408")
        assert harness.provider.requests == []


# --- faults of providers ---


async def test_a_provider_that_is_down_is_a_502(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(url="http://127.0.0.1:9", max_attempts=2)) as gateway:
        for path, kind in (("/v1/chat/completions", "server_error"), ("/v1/messages", "api_error")):
            status, headers, body = await harness.post(gateway, path)
            assert (status, body["error"]["type"]) == (502, kind)
            assert headers["x-should-retry"] == "false"
        assert leftovers(gateway) == NOTHING_LEFT


async def test_an_invalid_body_from_the_provider_is_passed_on(harness: GatewayHarness) -> None:
    async def garbage(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        request.transport.close()
        return web.Response()

    async with Gateway(harness.settings(max_attempts=2)) as gateway:
        harness.provider.behaviour = garbage
        assert (await harness.post(gateway))[0] == 502
        harness.provider.behaviour = responding(200, b"\x00\xffno json", content_type="application/json")
        status, _, body = await harness.post(gateway)
        assert (status, body) == (200, b"\x00\xffno json")
        assert leftovers(gateway) == NOTHING_LEFT


async def test_faults_are_retried_here(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        bad = responding(500)

        async def twice(request: web.BaseRequest) -> web.StreamResponse:
            return await (bad if len(harness.provider.requests) < 2 else harness.provider.reply)(request)

        harness.provider.behaviour = twice
        assert (await harness.post(gateway))[0] == 200
        assert len(harness.provider.requests) == 2


@pytest.mark.parametrize(
    ("path", "event"),
    [
        ("/v1/chat/completions", b"data: {"),
        ("/v1/messages", b"event: error"),
        ("/v1/responses", b'event: error\ndata: {"type":"error",'),
    ],
)
async def test_a_stream_that_is_cut_off_ends_with_an_error_event(
    harness: GatewayHarness, path: str, event: bytes
) -> None:
    harness.provider.behaviour = streaming(EVENT, CUT)
    async with Gateway(harness.settings()) as gateway:
        async with harness.session.post(harness.at(gateway, path), json={**CHAT_REQUEST, "stream": True}) as response:
            raw = await response.read()
        assert raw.startswith(EVENT)
        assert raw[len(EVENT) :].startswith(event)
        assert b"broke off" in raw
        assert leftovers(gateway) == NOTHING_LEFT


async def test_an_unfinished_event_is_not_followed_by_an_error_event(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, EVENT[:20], CUT)
    async with Gateway(harness.settings()) as gateway:
        asking: Any = {"json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}}
        async with harness.session.post(harness.at(gateway), **asking) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        assert leftovers(gateway) == NOTHING_LEFT


# --- fallbacks ---


async def test_a_rejected_call_falls_back_to_another_target(harness: GatewayHarness) -> None:
    spare = TargetSettings(name="spare", url=f"{harness.url}/llm", provider="openai-compatible")
    elsewhere = FallbackSettings(target="spare", model="llama", api_key_env="SPARE")
    own = TargetSettings(name="openai", url=harness.url, rpm=1, fallback=(elsewhere,))
    settings = GatewaySettings(targets=(own, spare), listen="127.0.0.1:0")
    with pytest.raises(MissingFallbackKey, match="SPARE"):
        async with Gateway(settings, {}):
            pass
    async with Gateway(settings, {"SPARE": "sk-spare"}) as gateway:
        for _ in range(2):
            sent = {"authorization": "Bearer sk-1", "x-stainless-read-timeout": "2", "x-own": "1"}
            assert (await harness.post(gateway, headers=sent))[0] == 200
        first, second = harness.provider.requests
        assert (first.raw_path, second.raw_path) == ("/v1/chat/completions", "/llm/v1/chat/completions")
        assert first.headers.getall("authorization") == ["Bearer sk-1"]
        assert second.headers.getall("authorization") == ["Bearer sk-spare"]
        assert (first.headers.get("x-own"), second.headers.get("x-own")) == ("1", None)
        assert harness.provider.bodies[1] == {**CHAT_REQUEST, "model": "llama"}
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_rejected_call_falls_back_to_another_model(harness: GatewayHarness) -> None:
    models = {"gpt-4o": QuotaSettings(rpm=1), "gpt-4o-mini": QuotaSettings(rpm=1)}
    smaller = FallbackSettings(model="gpt-4o-mini", models="gpt-4o")
    settings = harness.settings(models=models, fallback=(smaller,))
    async with Gateway(settings) as gateway:
        statuses = [(await harness.post(gateway, headers={"x-stainless-read-timeout": "2"}))[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert [body["model"] for body in harness.provider.bodies] == ["gpt-4o", "gpt-4o-mini"]
        assert leftovers(gateway) == NOTHING_LEFT


# --- strict quotas ---


async def test_a_strict_target_rejects_a_call_without_a_bound(harness: GatewayHarness) -> None:
    unbounded = {name: value for name, value in CHAT_REQUEST.items() if name != "max_tokens"}
    async with Gateway(harness.settings(output_tpm=100, strict=True)) as gateway:
        status, headers, body = await harness.post(gateway, json=unbounded)
        assert (status, headers["x-forebay-limited-by"]) == (400, "upstream:openai:unbounded")
        assert "set max_tokens" in body["error"]["message"]
        assert (await harness.post(gateway, json={**CHAT_REQUEST, "max_tokens": 101}))[0] == 413
        assert not harness.provider.requests
        assert (await harness.post(gateway))[0] == 200
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_fallback_to_a_strict_target_needs_a_bound_there(harness: GatewayHarness) -> None:
    spare = TargetSettings(name="spare", url=harness.url, provider="openai-compatible", output_tpm=100, strict=True)
    own = TargetSettings(
        name="openai", url=harness.url, rpm=1, fallback=(FallbackSettings(target="spare", api_key_env="K"),)
    )
    async with Gateway(GatewaySettings(targets=(own, spare), listen="127.0.0.1:0"), {"K": "sk-spare"}) as gateway:
        waits = {"x-stainless-read-timeout": "2"}
        requests = [CHAT_REQUEST, {"model": "gpt-4o", "messages": []}, CHAT_REQUEST]
        statuses = [(await harness.post(gateway, json=body, headers=waits))[0] for body in requests]
        assert statuses == [200, 429, 200]
        assert leftovers(gateway) == NOTHING_LEFT


# --- callers that disconnect ---


@pytest.mark.parametrize("behaviour", ["silent", "streaming"])
async def test_a_disconnected_caller_ends_the_call_to_the_provider(harness: GatewayHarness, behaviour: str) -> None:
    async def silent(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        await asyncio.Event().wait()
        raise AssertionError

    harness.provider.behaviour = silent if behaviour == "silent" else streaming(EVENT, None)
    async with Gateway(harness.settings(max_concurrent=1)) as gateway:
        (account,) = [gateway.forwarder.targets[0].upstream.core.accounts.account("gpt-4o")]
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        body = json.dumps({**CHAT_REQUEST, "stream": True}).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        await until(lambda: account.account.in_flight == 1 and len(harness.provider.requests) == 1)
        writer.close()
        await harness.provider.disconnected.wait()
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)


async def test_a_queued_call_leaves_the_queue_when_its_caller_disconnects(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    async with Gateway(harness.settings(max_concurrent=1)) as gateway:
        (account,) = [gateway.forwarder.targets[0].upstream.core.accounts.account("gpt-4o")]
        first = asyncio.create_task(harness.post(gateway, json={**CHAT_REQUEST, "stream": True}))
        await until(lambda: account.account.in_flight == 1)
        second = asyncio.create_task(harness.post(gateway))
        await until(lambda: len(account.account.queue) == 1)
        second.cancel()
        await until(lambda: len(account.account.queue) == 0)
        first.cancel()
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)
        assert len(harness.provider.requests) == 1


async def test_a_caller_that_hangs_up_while_it_waits_teaches_how_long_its_kind_waits(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    now = 0.0
    user_agent = {"user-agent": "impatient/1.0"}
    async with Gateway(harness.settings(max_concurrent=1)) as gateway:
        reader = gateway.forwarder._client_timeouts
        account = gateway.forwarder.targets[0].upstream.core.accounts.account("gpt-4o")
        first = asyncio.create_task(harness.post(gateway, json={**CHAT_REQUEST, "stream": True}))
        await until(lambda: account.account.in_flight == 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clock, "now", lambda: now)
            for number in range(3):
                queued = asyncio.create_task(harness.post(gateway, headers=user_agent))
                await until(lambda: len(account.account.queue) == 1)
                now += 30.0 + 0.1 * number
                queued.cancel()
                await until(lambda: len(account.account.queue) == 0)
            assert reader.read(now, user_agent).max_wait == pytest.approx(29.0)
            assert reader.read(now, {"user-agent": "patient/1.0"}).max_wait == 299.0
        first.cancel()
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)


# --- draining ---


async def test_draining_finishes_calls_in_progress_and_rejects_new_ones(harness: GatewayHarness) -> None:
    gate = asyncio.Event()

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        await gate.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = slow
    gateway = Gateway(harness.settings(max_concurrent=1))
    await gateway.__aenter__()
    calls = [asyncio.create_task(harness.post(gateway)) for _ in range(2)]  # one in flight, one queued
    await until(lambda: leftovers(gateway)[:2] == (1, 1))
    end = asyncio.create_task(gateway.__aexit__(None, None, None))
    await until(lambda: gateway.forwarder.draining)
    async with harness.session.get(harness.at(gateway, "/readyz")) as response:
        assert (response.status, await response.json()) == (503, {"status": "unready", "problems": ["draining"]})
        assert response.headers["connection"] == "close"
    async with harness.session.get(harness.at(gateway, "/healthz")) as response:
        assert (response.status, await response.json()) == (200, {"status": "draining"})
    status, headers, body = await harness.post(gateway, "/v1/messages")
    assert (status, body["type"]) == (503, "error")
    assert headers["connection"] == "close"
    gate.set()
    port = gateway.port
    assert [(await call)[0] for call in calls] == [200, 200]
    await end
    with pytest.raises(aiohttp.ClientConnectionError):
        await harness.session.get(f"http://127.0.0.1:{port}/healthz")
    assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize(
    ("path", "event"), [("/v1/chat/completions", b'data: {"error"'), ("/v1/messages", b"event: error")]
)
async def test_calls_that_do_not_end_in_time_are_aborted_with_an_error(
    harness: GatewayHarness, path: str, event: bytes
) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    gateway = Gateway(harness.settings(gateway={"drain_timeout": 0.05}, max_concurrent=1))
    await gateway.__aenter__()
    async with harness.session.post(harness.at(gateway, path), json={**CHAT_REQUEST, "stream": True}) as response:
        assert await response.content.readany() == EVENT
        waits = asyncio.create_task(harness.post(gateway, path))
        await until(lambda: leftovers(gateway)[1] == 1)
        await gateway.__aexit__(None, None, None)
        last = await response.read()
        assert last.startswith(event)
        assert b"shut down" in last
    status, headers, body = await waits
    assert (status, body["error"]["code"]) == (503, "forebay_draining")
    assert headers["retry-after-ms"] == "1000"
    await harness.provider.disconnected.wait()
    assert leftovers(gateway) == NOTHING_LEFT


async def test_a_call_is_aborted_only_once(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    async with Gateway(harness.settings()) as gateway:
        path = harness.at(gateway, "/v1/chat/completions")
        async with harness.session.post(path, json={**CHAT_REQUEST, "stream": True}) as response:
            assert await response.content.readany() == EVENT
            gateway.abort()
            await asyncio.sleep(0)  # it is being aborted, and has not noticed yet
            gateway.abort()
            assert b"shut down" in await response.read()
        await harness.provider.disconnected.wait()
