"""A gateway before a provider that does as it is told: what passes, what is refused, and what is left behind."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.acceptance.gateways import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    CUT,
    DONE,
    EVENT,
    NOTHING,
    STOP,
    GatewayHarness,
    leftovers,
    raw,
    responding,
    streaming,
    until,
)  # fmt: skip

from forebay import clock
from forebay.gateway import (
    ContextSettings,
    FallbackSettings,
    GatewaySettings,
    MissingFallbackKey,
    QuotaSettings,
    TargetSettings,
)
from forebay.gateway.server import CannotListen, Gateway
from forebay.quota import Price

# --- what passes ---


async def test_an_answer_passes_and_its_caller_is_not_to_call_again(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        status, headers, body = await scene.post(gateway, headers={"authorization": "Bearer sk-1", "x-custom": "ü"})
        assert (status, body) == (200, CHAT_RESPONSE)
        assert headers["x-request-id"] == "req_1"
        assert headers.getall("x-should-retry") == ["false"]
        (asked,) = scene.provider.asked
        assert asked.headers["authorization"] == "Bearer sk-1"
        assert asked.headers["x-custom"] == "ü"
        assert asked.headers["host"] == scene.url.removeprefix("http://")
        assert leftovers(gateway) == NOTHING


async def test_a_provider_is_reached_through_the_proxy_of_the_environment(scene: GatewayHarness) -> None:
    target = TargetSettings(name="openai", url="http://llm.example")
    environment = {"http_proxy": scene.url.replace("://", "://me:hidden@")}
    async with Gateway(GatewaySettings(targets=(target,), listen="127.0.0.1:0"), environment) as gateway:
        status, _, body = await scene.post(gateway, headers={"authorization": "Bearer sk-1"})
        assert (status, body) == (200, CHAT_RESPONSE)
        (asked,) = scene.provider.asked
        assert asked.raw_path == "http://llm.example/v1/chat/completions"
        assert asked.headers["authorization"] == "Bearer sk-1"
        assert "proxy-authorization" in asked.headers


async def test_what_is_the_gateways_own_goes_no_further(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        await scene.post(gateway, headers={"x-forebay-tenant": "acme", "connection": "keep-alive, x-hop", "x-hop": "1"})
        (asked,) = scene.provider.asked
        assert not [name for name in asked.headers if name.lower().startswith("x-forebay") or name.lower() == "x-hop"]


async def test_a_stream_passes_byte_by_byte_and_at_once(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(EVENT, b": a comment\r\n\r\n", EVENT[:30], EVENT[30:], STOP, DONE)
    async with Gateway(scene.settings()) as gateway:
        asking: Any = {"json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}}
        async with scene.session.post(scene.at(gateway), **asking) as answer:
            assert await answer.read() == EVENT + b": a comment\r\n\r\n" + EVENT + STOP + DONE
            assert answer.content_type == "text/event-stream"
        assert leftovers(gateway) == NOTHING
        scene.provider.behaviour = streaming(EVENT, None)
        async with scene.session.post(scene.at(gateway), **asking) as answer:
            assert await answer.content.readany() == EVENT  # though nothing follows


async def test_a_packed_answer_stays_packed_and_is_metered(scene: GatewayHarness) -> None:
    packed = gzip.compress(json.dumps(CHAT_RESPONSE).encode())
    scene.provider.behaviour = responding(200, packed, content_encoding="gzip", content_type="application/json")
    async with Gateway(scene.settings()) as gateway:
        async with scene.session.post(scene.at(gateway), json=CHAT_REQUEST, auto_decompress=False) as answer:
            assert await answer.read() == packed
        async with scene.session.get(scene.at(gateway, "/metrics")) as answer:
            told = await answer.text()
    assert 'forebay_tokens_total{direction="input",model="gpt-4o",target="openai"} 30.0' in told
    assert 'forebay_tokens_total{direction="output",model="gpt-4o",target="openai"} 20.0' in told


async def test_the_metrics_tell_of_attempts_and_of_quotas(scene: GatewayHarness) -> None:
    limits = {"x_ratelimit_limit_requests": "100", "x_ratelimit_remaining_requests": "40"}
    scene.provider.behaviour = responding(
        200, json.dumps(CHAT_RESPONSE).encode(), content_type="application/json", **limits
    )
    async with Gateway(scene.settings()) as gateway:
        async with scene.session.post(scene.at(gateway), json=CHAT_REQUEST):
            pass
        async with scene.session.get(scene.at(gateway, "/metrics")) as answer:
            lines = [line for line in (await answer.text()).splitlines() if not line.startswith("#")]
    told = {line.partition("{")[0]: line for line in lines if 'quota="requests per minute"' in line}
    assert float(told["forebay_quota_remaining"].split()[-1]) == pytest.approx(40, abs=1)
    assert float(told["forebay_quota_amount"].split()[-1]) == 100.0
    attempts = [line for line in lines if line.startswith("forebay_attempts_total") and 'outcome="succeeded"' in line]
    assert [line.split()[-1] for line in attempts] == ["1.0"]


async def test_a_target_by_its_name_gets_whatever_is_asked(scene: GatewayHarness) -> None:
    scene.provider.behaviour = responding(200, b"binary", content_type="audio/mpeg")
    async with Gateway(scene.settings()) as gateway:
        status, _, body = await scene.post(gateway, "/openai/v1/audio/speech?x=%20y")
        assert (status, body) == (200, b"binary")
        assert scene.provider.asked[0].raw_path == "/v1/audio/speech?x=%20y"
        assert leftovers(gateway) == NOTHING


# --- whose it is ---


async def test_keys_have_accounts_of_their_own_unless_told_otherwise(scene: GatewayHarness) -> None:
    for share, count in ((False, 2), (True, 1)):
        async with Gateway(scene.settings(share_keys=share)) as gateway:
            for key in ("sk-1", "sk-2", "sk-1"):
                await scene.post(gateway, headers={"authorization": f"Bearer {key}"})
            names = [desk.name for desk in gateway.forwarder.targets[0].upstream.core.accounts]
            assert len(names) == count
            assert "sk-" not in repr(names)


async def test_headers_put_a_call_in_its_place(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(max_concurrent=1)) as gateway:
        gate = asyncio.Event()

        async def slow(request: web.BaseRequest) -> web.StreamResponse:
            await gate.wait()
            return await scene.provider.answer(request)

        scene.provider.behaviour = slow
        (desk,) = [gateway.forwarder.targets[0].upstream.core.accounts.account("gpt-4o")]
        async with asyncio.TaskGroup() as group:
            group.create_task(scene.post(gateway))
            await until(lambda: desk.account.in_flight == 1)
            for number, rung in enumerate(["low", "normal", "critical", "high"], start=1):
                told = {"x-forebay-priority": rung, "x-rung": rung}
                group.create_task(scene.post(gateway, headers=told))
                await until(lambda number=number: len(desk.account.queue) == number)  # type: ignore[misc]
            gate.set()
        assert [asked.headers.get("x-rung") for asked in scene.provider.asked] == [
            *(None, "critical", "high", "normal", "low")
        ]
        assert leftovers(gateway) == NOTHING


async def test_a_deadline_that_has_passed_costs_nothing(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        status, headers, body = await scene.post(gateway, headers={"x-forebay-deadline": str(clock.wall_time() - 1)})
        assert status == 408
        assert headers["x-should-retry"] == "false"
        assert "deadline" in body["error"]["message"]
        assert scene.provider.asked == []


async def test_a_header_that_cannot_be_meant_is_told(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        status, _, body = await scene.post(gateway, "/v1/messages", headers={"x-forebay-priority": "urgent"})
        assert status == 400
        assert body["type"] == "error"
        assert "critical, high, normal, low" in body["error"]["message"]


# --- who is let in ---


async def test_beyond_loopback_a_token_is_wanted(scene: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "0123456789abcdef0123"  # noqa: S105 - of this test
    monkeypatch.setenv("GATE", token)
    settings = scene.settings(gateway={"listen": "0.0.0.0:0", "token_env": "GATE"})
    async with Gateway(settings) as gateway:
        for path in ("/v1/chat/completions", "/metrics", "/nowhere"):
            status, _, body = await scene.post(gateway, path)
            assert status == 401
            assert "x-forebay-token" in body["error"]["message"]
        assert scene.provider.asked == []
        status, _, _ = await scene.post(gateway, headers={"x-forebay-token": token})
        assert status == 200
        assert token not in repr(scene.provider.asked[0].headers)
        async with scene.session.get(scene.at(gateway, "/healthz")) as answer:
            assert await answer.json() == {"status": "ok"}


async def test_only_who_is_trusted_speaks_for_a_tenant(scene: GatewayHarness) -> None:
    settings = scene.settings(
        gateway={"context": ContextSettings(trust="nobody")},
        tenant_budget_usd=1e-9,
        prices={"*": Price(input=1e6, output=1e6)},
    )
    async with Gateway(settings) as gateway:
        assert (await scene.post(gateway, headers={"x-forebay-tenant": "a"}))[0] == 402
    async with Gateway(scene.settings(gateway={"context": ContextSettings(tenant_headers=("x-user",))})) as gateway:
        assert (await scene.post(gateway, headers={"x-user": "a"}))[0] == 200


async def test_an_address_that_is_taken_is_told_in_a_word(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        address = f"127.0.0.1:{gateway.port}"
        with pytest.raises(CannotListen) as refused:
            await Gateway(scene.settings(gateway={"listen": address})).__aenter__()
    told = f"Nothing can listen on {address}: Address already in use. Give another address, or stop what listens there."
    assert str(refused.value) == told


# --- what is refused ---


async def test_money_that_is_spent_is_a_402(scene: GatewayHarness) -> None:
    settings = scene.settings(budget_usd=60.0, prices={"gpt-4o": Price(input=0, output=1e6)})
    async with Gateway(settings) as gateway:
        assert [(await scene.post(gateway))[0] for _ in range(2)] == [200, 402]
        status, headers, body = await scene.post(gateway)
        assert (status, body["error"]["type"]) == (402, "insufficient_quota")
        assert headers["x-should-retry"] == "false"
        assert int(headers["retry-after"]) > 0  # the day's end
        assert gateway.forwarder.targets[0].upstream.statistics().spent_usd == 20.0
        assert leftovers(gateway) == NOTHING


@pytest.mark.parametrize("budget", ["budget_usd", "tenant_budget_usd", "task_budget_usd"])
async def test_what_costs_nothing_passes_though_the_money_is_spent(scene: GatewayHarness, budget: str) -> None:
    spends: dict[str, Any] = {budget: 20.0, "prices": {"gpt-4o": Price(input=0, output=1e6)}}
    async with Gateway(scene.settings(**spends)) as gateway:
        task = {"x-forebay-task": "t"}
        ask = {**CHAT_REQUEST, "max_tokens": 20}
        assert (await scene.post(gateway, headers=task, json=ask))[0] == 200
        assert (await scene.post(gateway, headers=task, json=ask))[0] == 402
        models = scene.at(gateway, "/v1/models")
        async with scene.session.get(models, headers=task) as answer:
            assert answer.status == 200
        assert (await scene.post(gateway, headers=task, json=ask))[0] == 402
        assert leftovers(gateway) == NOTHING


async def test_a_call_larger_than_its_bucket_will_never_pass(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(models={"gpt-4o": QuotaSettings(output_tpm=10)})) as gateway:
        status, headers, body = await scene.post(gateway)
        assert status == 413
        assert headers["x-should-retry"] == "false"
        assert "larger" in body["error"]["message"]


async def test_who_cannot_wait_is_told_when_to_come_back(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(rpm=2)) as gateway:
        assert [(await scene.post(gateway))[0] for _ in range(2)] == [200, 200]
        status, headers, body = await scene.post(gateway, headers={"x-stainless-read-timeout": "2"})
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        assert headers["x-should-retry"] == "true"
        assert 0 < int(headers["retry-after-ms"]) <= 35_000
        assert len(scene.provider.asked) == 2
        status, _, body = await scene.post(gateway, "/anthropic/v1/messages", headers={"x-stainless-read-timeout": "2"})
        assert status == 200  # another account


async def test_what_a_provider_need_not_be_asked_is_answered_here(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(gateway={"max_body_bytes": 10_000})) as gateway:
        for path, sent, status in (
            ("/v1/chat/completions", b"{", 400),
            ("/v1/messages", b"[1]", 400),
            ("/v1/embeddings", b"\xff\xfe", 400),
            ("/v1/chat/completions", b"[" * 9_000, 400),
            ("/v1/chat/completions", b" " * 10_001, 413),
            ("/nowhere", b"{}", 404),
            ("/v1/../etc/passwd", b"{}", 404),
        ):
            got, headers, body = await scene.post(gateway, path, data=sent)
            assert got == status, path
            assert headers["x-should-retry"] == "false"
            assert body["error"]["message"]

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 4096

        try:
            got, _, _ = await scene.post(gateway, data=endless())
        except aiohttp.ClientError:  # it hangs up on whoever goes on
            pass
        else:
            assert got == 413
        assert scene.provider.asked == []
        assert leftovers(gateway) == NOTHING


@pytest.mark.parametrize(
    "lengths",
    [
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"content-length: -1\r\n",
        b"content-length: two\r\n",
    ],
)
async def test_lengths_that_contradict_each_other_are_no_http(scene: GatewayHarness, lengths: bytes) -> None:
    async with Gateway(scene.settings()) as gateway:
        told = await raw(gateway, b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n" + lengths + b"\r\n{}")
        assert told.startswith(b"HTTP/1.0 400"), told
        assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert scene.provider.asked == []
        assert (await scene.post(gateway))[0] == 200  # it lives on


async def test_headers_without_end_are_refused(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(gateway={"max_header_bytes": 4096})) as gateway:
        for head in (b"x: " + b"a" * 8192 + b"\r\n", b"".join(b"x%d: a\r\n" % n for n in range(300))):
            told = await raw(gateway, b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n")
            assert told.startswith(b"HTTP/1.0 400"), told[:100]
        assert (await scene.post(gateway))[0] == 200


async def test_connections_are_bounded(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(gateway={"max_connections": 2})) as gateway:
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
        assert (await scene.post(gateway))[0] == 200


async def test_a_body_that_does_not_come_is_not_waited_for(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(gateway={"body_timeout": 0.05})) as gateway:
        told = await raw(
            gateway, b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{"
        )
        assert told.startswith(b"HTTP/1.1 408")
        assert scene.provider.asked == []


# --- providers that go wrong ---


async def test_a_provider_that_is_down_is_a_502(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(url="http://127.0.0.1:9", max_attempts=2)) as gateway:
        for path, kind in (("/v1/chat/completions", "server_error"), ("/v1/messages", "api_error")):
            status, headers, body = await scene.post(gateway, path)
            assert (status, body["error"]["type"]) == (502, kind)
            assert headers["x-should-retry"] == "false"
        assert leftovers(gateway) == NOTHING


async def test_garbage_for_an_answer_is_handed_on(scene: GatewayHarness) -> None:
    async def garbage(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        request.transport.close()
        return web.Response()

    async with Gateway(scene.settings(max_attempts=2)) as gateway:
        scene.provider.behaviour = garbage
        assert (await scene.post(gateway))[0] == 502
        scene.provider.behaviour = responding(200, b"\x00\xffno json", content_type="application/json")
        status, _, body = await scene.post(gateway)
        assert (status, body) == (200, b"\x00\xffno json")
        assert leftovers(gateway) == NOTHING


async def test_faults_are_mended_here(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        bad = responding(500)

        async def twice(request: web.BaseRequest) -> web.StreamResponse:
            return await (bad if len(scene.provider.asked) < 2 else scene.provider.answer)(request)

        scene.provider.behaviour = twice
        assert (await scene.post(gateway))[0] == 200
        assert len(scene.provider.asked) == 2


@pytest.mark.parametrize(("path", "told"), [("/v1/chat/completions", b"data: {"), ("/v1/messages", b"event: error")])
async def test_a_stream_that_is_cut_ends_with_an_event_that_says_so(
    scene: GatewayHarness, path: str, told: bytes
) -> None:
    scene.provider.behaviour = streaming(EVENT, CUT)
    async with Gateway(scene.settings()) as gateway:
        async with scene.session.post(scene.at(gateway, path), json={**CHAT_REQUEST, "stream": True}) as answer:
            raw = await answer.read()
        assert raw.startswith(EVENT)
        assert raw[len(EVENT) :].startswith(told)
        assert b"broke off" in raw
        assert leftovers(gateway) == NOTHING


async def test_half_an_event_is_not_followed_by_another(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(EVENT, EVENT[:20], CUT)
    async with Gateway(scene.settings()) as gateway:
        asking: Any = {"json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}}
        async with scene.session.post(scene.at(gateway), **asking) as answer:
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        assert leftovers(gateway) == NOTHING


# --- calls that are sent on ---


async def test_what_its_account_cannot_serve_goes_to_another_target(scene: GatewayHarness) -> None:
    spare = TargetSettings(name="spare", url=f"{scene.url}/llm", provider="openai-compatible")
    elsewhere = FallbackSettings(target="spare", model="llama", api_key_env="SPARE")
    own = TargetSettings(name="openai", url=scene.url, rpm=1, fallback=(elsewhere,))
    settings = GatewaySettings(targets=(own, spare), listen="127.0.0.1:0")
    with pytest.raises(MissingFallbackKey, match="SPARE"):
        async with Gateway(settings, {}):
            pass
    async with Gateway(settings, {"SPARE": "sk-spare"}) as gateway:
        for _ in range(2):
            told = {"authorization": "Bearer sk-1", "x-stainless-read-timeout": "2", "x-kept": "1"}
            assert (await scene.post(gateway, headers=told))[0] == 200
        first, second = scene.provider.asked
        assert (first.raw_path, second.raw_path) == ("/v1/chat/completions", "/llm/v1/chat/completions")
        assert first.headers.getall("authorization") == ["Bearer sk-1"]
        assert second.headers.getall("authorization") == ["Bearer sk-spare"]
        assert second.headers["x-kept"] == "1"
        assert scene.provider.bodies[1] == {**CHAT_REQUEST, "model": "llama"}
        assert leftovers(gateway) == NOTHING


async def test_or_to_another_model_of_its_own(scene: GatewayHarness) -> None:
    models = {"gpt-4o": QuotaSettings(rpm=1), "gpt-4o-mini": QuotaSettings(rpm=1)}
    smaller = FallbackSettings(model="gpt-4o-mini", models="gpt-4o")
    settings = scene.settings(models=models, fallback=(smaller,))
    async with Gateway(settings) as gateway:
        statuses = [(await scene.post(gateway, headers={"x-stainless-read-timeout": "2"}))[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert [body["model"] for body in scene.provider.bodies] == ["gpt-4o", "gpt-4o-mini"]
        assert leftovers(gateway) == NOTHING


# --- callers who hang up ---


@pytest.mark.parametrize("behaviour", ["silent", "streaming"])
async def test_who_hangs_up_is_hung_up_on_behind_the_gateway(scene: GatewayHarness, behaviour: str) -> None:
    async def silent(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        await asyncio.Event().wait()
        raise AssertionError

    scene.provider.behaviour = silent if behaviour == "silent" else streaming(EVENT, None)
    async with Gateway(scene.settings(max_concurrent=1)) as gateway:
        (desk,) = [gateway.forwarder.targets[0].upstream.core.accounts.account("gpt-4o")]
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        body = json.dumps({**CHAT_REQUEST, "stream": True}).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        await until(lambda: desk.account.in_flight == 1 and len(scene.provider.asked) == 1)
        writer.close()
        await scene.provider.left.wait()
        await until(lambda: leftovers(gateway) == NOTHING)


async def test_who_hangs_up_in_line_leaves_it(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(EVENT, None)
    async with Gateway(scene.settings(max_concurrent=1)) as gateway:
        (desk,) = [gateway.forwarder.targets[0].upstream.core.accounts.account("gpt-4o")]
        first = asyncio.create_task(scene.post(gateway, json={**CHAT_REQUEST, "stream": True}))
        await until(lambda: desk.account.in_flight == 1)
        second = asyncio.create_task(scene.post(gateway))
        await until(lambda: len(desk.account.queue) == 1)
        second.cancel()
        await until(lambda: len(desk.account.queue) == 0)
        first.cancel()
        await until(lambda: leftovers(gateway) == NOTHING)
        assert len(scene.provider.asked) == 1


# --- the end ---


async def test_at_the_end_calls_under_way_are_finished_and_who_comes_is_told(scene: GatewayHarness) -> None:
    gate = asyncio.Event()

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        await gate.wait()
        return await scene.provider.answer(request)

    scene.provider.behaviour = slow
    gateway = Gateway(scene.settings(max_concurrent=1))
    await gateway.__aenter__()
    calls = [asyncio.create_task(scene.post(gateway)) for _ in range(2)]  # one under way, one in line
    await until(lambda: leftovers(gateway)[:2] == (1, 1))
    end = asyncio.create_task(gateway.__aexit__(None, None, None))
    await until(lambda: gateway.forwarder.draining)
    async with scene.session.get(scene.at(gateway, "/healthz")) as answer:
        assert (answer.status, await answer.json()) == (503, {"status": "draining"})
        assert answer.headers["connection"] == "close"
    status, headers, body = await scene.post(gateway, "/v1/messages")
    assert (status, body["type"]) == (503, "error")
    assert headers["connection"] == "close"
    gate.set()
    port = gateway.port
    assert [(await call)[0] for call in calls] == [200, 200]
    await end
    with pytest.raises(aiohttp.ClientConnectionError):
        await scene.session.get(f"http://127.0.0.1:{port}/healthz")
    assert leftovers(gateway) == NOTHING


@pytest.mark.parametrize(
    ("path", "told"), [("/v1/chat/completions", b'data: {"error"'), ("/v1/messages", b"event: error")]
)
async def test_what_does_not_end_is_cut_off_and_told_so(scene: GatewayHarness, path: str, told: bytes) -> None:
    scene.provider.behaviour = streaming(EVENT, None)
    gateway = Gateway(scene.settings(gateway={"drain_timeout": 0.05}, max_concurrent=1))
    await gateway.__aenter__()
    async with scene.session.post(scene.at(gateway, path), json={**CHAT_REQUEST, "stream": True}) as answer:
        assert await answer.content.readany() == EVENT
        waits = asyncio.create_task(scene.post(gateway, path))
        await until(lambda: leftovers(gateway)[1] == 1)
        await gateway.__aexit__(None, None, None)
        last = await answer.read()
        assert last.startswith(told)
        assert b"shut down" in last
    status, headers, body = await waits
    assert (status, body["error"]["code"]) == (503, "forebay_draining")
    assert headers["retry-after-ms"] == "1000"
    await scene.provider.left.wait()
    assert leftovers(gateway) == NOTHING


async def test_who_is_cut_off_already_is_not_cut_off_again(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(EVENT, None)
    async with Gateway(scene.settings()) as gateway:
        path = scene.at(gateway, "/v1/chat/completions")
        async with scene.session.post(path, json={**CHAT_REQUEST, "stream": True}) as answer:
            assert await answer.content.readany() == EVENT
            gateway.abort()
            await asyncio.sleep(0)  # it is being cut off, and does not know it yet
            gateway.abort()
            assert b"shut down" in await answer.read()
        await scene.provider.left.wait()
