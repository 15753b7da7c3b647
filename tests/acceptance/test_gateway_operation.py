"""What people see of a gateway's calls: headers of answers, the access log, the limits of tenants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
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
    connect,
    leftovers,
    raw,
    request_bytes,
    responding,
    streaming,
    until,
    writing_raw,
)

from forebay.gateway import ContextSettings, FallbackSettings, GatewaySettings, TargetSettings, TenantSettings
from forebay.gateway.server import Gateway
from forebay.quota import Price

PRICES = {"*": Price(input=1.0, output=10.0)}
STREAM: Any = {**CHAT_REQUEST, "stream": True}
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":20}}\n\n'


# --- headers of answers ---


async def test_an_answer_says_how_its_call_was_served(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(prices=PRICES)) as gateway:
        _, headers, _ = await harness.post(gateway, headers={"authorization": "Bearer sk-1"})
    assert headers["x-request-id"] == "req_1"  # the provider's
    assert float(headers["x-forebay-waited"]) < 1.0
    assert headers["x-forebay-attempts"] == "1"
    assert headers["x-forebay-account"].startswith("upstream:openai:")
    assert headers["x-forebay-cost-usd"] == "0.00023"
    assert "x-forebay-target" not in headers
    assert "x-forebay-model" not in headers


async def test_without_a_price_an_answer_says_no_cost(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        _, headers, _ = await harness.post(gateway, json={**CHAT_REQUEST, "model": "nobody-knows"})
    assert headers["x-forebay-attempts"] == "1"
    assert "x-forebay-cost-usd" not in headers


async def test_the_cost_of_a_stream_is_not_said_before_it_is_known(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, STOP, USAGE, DONE)
    async with Gateway(harness.settings(prices=PRICES)) as gateway:
        _, headers, _ = await harness.post(gateway, json=STREAM)
    assert headers["x-forebay-attempts"] == "1"
    assert "x-forebay-cost-usd" not in headers


async def test_an_answer_says_who_served_it_if_that_was_a_fallback(harness: GatewayHarness) -> None:
    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        if request.path.startswith("/first"):
            return web.json_response({"error": {"code": "overloaded"}}, status=503)
        return await harness.provider.reply(request)

    harness.provider.behaviour = behave
    targets = (
        TargetSettings(
            name="first",
            url=f"{harness.url}/first",
            max_attempts=1,
            max_wait=1.0,
            fallback=(FallbackSettings(target="second", model="gpt-4o-mini"),),
        ),
        TargetSettings(name="second", url=f"{harness.url}/second"),
    )
    async with Gateway(GatewaySettings(targets=targets, listen="127.0.0.1:0")) as gateway:
        status, headers, _ = await harness.post(gateway)
    assert status == 200
    assert (headers["x-forebay-target"], headers["x-forebay-model"]) == ("second", "gpt-4o-mini")
    assert int(headers["x-forebay-attempts"]) >= 2
    assert headers["x-forebay-account"].startswith("upstream:second")


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), ("ü", False), ("", False)],
)
async def test_the_valid_request_id_of_a_caller_is_taken(harness: GatewayHarness, given: str, taken: bool) -> None:  # noqa: FBT001
    harness.provider.behaviour = responding(200, json.dumps(CHAT_RESPONSE).encode(), content_type="application/json")
    async with Gateway(harness.settings()) as gateway:
        _, headers, _ = await harness.post(gateway, headers={"x-request-id": given})
    assert (headers["x-request-id"] == given) is taken
    assert headers["x-request-id"]


@pytest.mark.parametrize("path", ["/nowhere", "/v1/chat/completions", "/v1/messages", "/metrics"])
async def test_errors_of_the_gateway_have_a_request_id(harness: GatewayHarness, path: str) -> None:
    token = "a-token-of-this-gateway"  # noqa: S105 - a test's
    async with Gateway(harness.settings(gateway={"token_env": "T"}), {"T": token}) as gateway:
        for headers in ({}, {"x-forebay-token": token, "x-forebay-priority": "none"}):
            status, answer, _ = await harness.post(gateway, path, headers={**headers, "x-request-id": "mine"})
            if status != 200:
                assert answer["x-request-id"] == "mine"


async def test_what_is_no_http_gets_a_request_id(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        received = await raw(gateway, b"GET / HTTP/9.9.9\r\n\r\n")
    assert b" 400 " in received.partition(b"\r\n")[0]
    assert b"x-request-id: " in received.lower()


async def test_the_sdks_find_the_request_id_of_an_error(harness: GatewayHarness) -> None:
    asking: Any = {"model": "m", "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 5}
    async with Gateway(harness.settings(rpm=1)) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        gpt = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=5.0)
        claude = anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0, timeout=5.0)
        for create in (gpt.chat.completions.create, claude.messages.create):
            await create(**asking)
            with pytest.raises((openai.RateLimitError, anthropic.RateLimitError)) as caught:
                await create(**asking)
            error: Any = caught.value
            assert error.request_id
            assert error.response.headers["x-forebay-attempts"] == "0"
        await gpt.close()
        await claude.close()


async def test_the_headers_can_be_switched_off(harness: GatewayHarness) -> None:
    harness.provider.behaviour = responding(200, json.dumps(CHAT_RESPONSE).encode(), content_type="application/json")
    async with Gateway(harness.settings(gateway={"response_headers": False})) as gateway:
        for path in ("/v1/chat/completions", "/nowhere"):
            _, headers, _ = await harness.post(gateway, path)
            added = [name for name in headers if name.lower().startswith(("x-forebay", "x-request"))]
            assert added == []
        assert b"x-request-id" not in (await raw(gateway, b"GET / HTTP/9.9.9\r\n\r\n")).lower()


async def test_a_model_with_control_characters_splits_no_header(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        body = json.dumps({**CHAT_REQUEST, "model": "a\r\nx-evil: 1\u2028ü"}).encode()
        received = await raw(gateway, request_bytes(body, b"connection: close"))
    assert received.startswith(b"HTTP/1.1 200")
    assert b"\nx-evil" not in received


async def test_the_wait_in_the_queue_is_said(harness: GatewayHarness) -> None:
    gate = asyncio.Event()

    async def gated(request: web.BaseRequest) -> web.StreamResponse:
        await gate.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = gated
    async with Gateway(harness.settings(max_concurrent=1)) as gateway:
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(harness.post(gateway)) for _ in range(2)]
            await until(lambda: leftovers(gateway)[:2] == (1, 1))
            await asyncio.sleep(0.05)  # in which the second call waits
            gate.set()
        said = sorted(float(call.result()[1]["x-forebay-waited"]) for call in calls)
    assert said[1] >= 0.05


# --- the access log ---


async def logged(harness: GatewayHarness, file: Path, *requests: Any, **settings: Any) -> list[dict[str, Any]]:
    """Return the lines of the access log after these requests, each an argument of `GatewayHarness.post`."""
    own = settings.pop("gateway", {})
    gateway = {"access_log": "json", "access_log_to": str(file), **own}
    async with Gateway(harness.settings(gateway=gateway, **settings)) as running:
        for path, how in requests:
            await harness.post(running, path, **how)
    return lines_of(file)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


CHAT = ("/v1/chat/completions", {"headers": {"authorization": "Bearer sk-secret-1", "x-forebay-tenant": "acme"}})


async def test_a_call_is_one_line(harness: GatewayHarness, tmp_path: Path) -> None:
    (line,) = await logged(harness, tmp_path / "log", CHAT, prices=PRICES)
    assert line.pop("time").endswith("Z")
    assert line.pop("account").startswith("upstream:openai:")
    assert line.pop("request_id")
    assert 0.0 <= line.pop("waited_seconds") <= line.pop("duration_seconds")
    assert line == {
        "provider_request_id": "req_1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "result": "answered",
        "tenant": "acme",
        "key": None,
        "target": "openai",
        "model": "gpt-4o",
        "first_output_seconds": None,
        "attempts": 1,
        "input_tokens": 30,
        "output_tokens": 20,
        "cost_usd": 0.00023,
        "limited_by": None,
    }


async def test_a_line_of_text_is_for_people(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "log"
    settings = harness.settings(gateway={"access_log": "text", "access_log_to": str(file)}, prices=PRICES)
    async with Gateway(settings) as gateway:
        await harness.post(gateway, headers={"x-forebay-tenant": 'a "b" c', "x-request-id": "id-1"})
    (line,) = file.read_text().splitlines()
    assert " 200 answered POST /v1/chat/completions " in line
    assert ' tenant="a \\"b\\" c" ' in line
    assert " tokens=30/20 usd=0.00023 id=id-1 provider_id=req_1" in line


async def test_a_stream_is_logged_at_its_end_with_its_first_output(harness: GatewayHarness, tmp_path: Path) -> None:
    harness.provider.behaviour = streaming(EVENT, STOP, USAGE, DONE)
    (line,) = await logged(harness, tmp_path / "log", ("/v1/chat/completions", {"json": STREAM}), prices=PRICES)
    assert (line["status"], line["result"], line["cost_usd"]) == (200, "answered", 0.00023)
    assert (line["input_tokens"], line["output_tokens"]) == (30, 20)
    assert 0.0 <= line["first_output_seconds"] <= line["duration_seconds"]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/chat/completions?key=sk-secret-2&a=b", "/v1/chat/completions"),
        ("/v1/models%3Fkey=sk-secret-2", "/v1/models"),
        ("/nowhere?key=sk-secret-2", "/nowhere"),
        ("/v1/%0Ax?api_key=sk-secret-2", "/v1/%0Ax"),
    ],
)
async def test_no_query_is_logged(harness: GatewayHarness, tmp_path: Path, path: str, shown: str) -> None:
    file = tmp_path / "log"
    settings = harness.settings(gateway={"access_log": "json", "access_log_to": str(file)})
    async with Gateway(settings) as gateway:
        start = b"POST %b HTTP/1.1" % path.encode()
        await raw(gateway, request_bytes(json.dumps(CHAT_REQUEST).encode(), b"connection: close", start=start))
    (line,) = lines_of(file)
    assert line["path"] == shown
    assert "sk-secret" not in file.read_text()


async def test_a_whole_url_in_the_place_of_a_path_is_not_logged(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "log"
    settings = harness.settings(gateway={"access_log": "json", "access_log_to": str(file)})
    async with Gateway(settings) as gateway:
        for start in (b"GET http://me:sk-secret@h/v1/models HTTP/1.1", b"CONNECT me:sk-secret@h:443 HTTP/1.1"):
            await raw(gateway, request_bytes(b"", b"connection: close", start=start))
    assert [line["path"] for line in lines_of(file)] in ([None, None], [None])
    assert "sk-secret" not in file.read_text()


@pytest.mark.parametrize("kind", ["json", "text"])
async def test_neither_content_nor_keys_nor_tokens_are_logged(
    harness: GatewayHarness, tmp_path: Path, kind: str
) -> None:
    token, file = "a-token-of-this-gateway", tmp_path / "log"
    settings = harness.settings(gateway={"access_log": kind, "access_log_to": str(file), "token_env": "T"})
    async with Gateway(settings, {"T": token}) as gateway:
        for headers in (
            {"authorization": "Bearer sk-secret-1"},
            {"authorization": "Bearer sk-secret-1", "x-forebay-token": token},
            {"x-api-key": "sk-secret-3", "x-forebay-token": token},
        ):
            for path in ("/v1/chat/completions", "/v1/messages", "/nowhere"):
                await harness.post(gateway, path, headers=headers)
            await harness.post(gateway, headers={**headers, "x-forebay-token": token}, data=b'{"secret-words')
    text = file.read_text()
    assert len(text.splitlines()) == 12
    for secret in ("sk-secret", token, "Rivers", "Danube", "secret-words"):
        assert secret not in text


async def test_names_of_callers_forge_no_line(harness: GatewayHarness, tmp_path: Path) -> None:
    evil = "m\n200 forged\x1b[31m\x85\u2028\u202e\ud800"
    for kind in ("json", "text"):
        file = tmp_path / kind
        settings = harness.settings(gateway={"access_log": kind, "access_log_to": str(file)})
        async with Gateway(settings) as gateway:
            await harness.post(gateway, json={**CHAT_REQUEST, "model": evil})
        (line,) = file.read_text().splitlines()
        assert line.isprintable()
        assert "forged" in line


async def test_the_result_says_how_a_call_ended(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "log"
    results = {}
    for name, behaviour in {
        "provider_error": responding(400),
        "unreachable": writing_raw(b""),
        "broke_off": streaming(EVENT, CUT),
    }.items():
        harness.provider.behaviour = behaviour
        request = ("/v1/chat/completions", {"json": STREAM})
        *_, line = await logged(harness, file, request, max_attempts=1)
        results[name] = (line["result"], line["status"], line["attempts"])
    assert results == {
        "provider_error": ("provider_error", 400, 1),
        "unreachable": ("unreachable", 502, 1),
        "broke_off": ("broke_off", 502, 1),
    }
    *_, line = await logged(harness, file, ("/v1/chat/completions", {"data": b"{"}))
    assert (line["result"], line["status"], line["attempts"]) == ("invalid", 400, 0)


async def test_a_rejection_is_logged_with_what_limited_it(harness: GatewayHarness, tmp_path: Path) -> None:
    hurried = {"headers": {"x-stainless-read-timeout": "3"}}
    lines = await logged(
        harness, tmp_path / "log", ("/v1/chat/completions", hurried), ("/v1/chat/completions", hurried), rpm=1
    )
    assert [line["result"] for line in lines] == ["answered", "rejected"]
    assert (lines[1]["status"], lines[1]["attempts"]) == (429, 0)
    assert lines[1]["limited_by"].endswith(":requests per minute")


async def test_a_caller_that_left_is_logged_as_499(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "log"
    harness.provider.behaviour = streaming(None)
    settings = harness.settings(gateway={"access_log": "json", "access_log_to": str(file)})
    async with Gateway(settings) as gateway:
        _, writer = await connect(gateway, request_bytes(json.dumps(CHAT_REQUEST).encode()))
        await until(lambda: bool(harness.provider.requests))
        writer.transport.abort()
        await harness.provider.disconnected.wait()
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)
    (line,) = lines_of(file)
    assert (line["result"], line["status"]) == ("caller_left", 499)


async def test_pages_of_the_gateway_are_not_logged(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "log"
    settings = harness.settings(gateway={"access_log": "json", "access_log_to": str(file)})
    async with Gateway(settings) as gateway:
        for path in ("/healthz", "/readyz", "/metrics"):
            async with harness.session.get(harness.at(gateway, path)) as response:
                assert response.status == 200
    assert file.read_text() == ""


# --- the limits of tenants ---


@pytest.fixture
async def gate(harness: GatewayHarness) -> AsyncIterator[asyncio.Event]:
    """Return an event until which the provider answers nobody."""
    opened = asyncio.Event()

    async def gated(request: web.BaseRequest) -> web.StreamResponse:
        await opened.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = gated
    yield opened
    opened.set()


def of(tenant: str, timeout: float = 600.0) -> dict[str, str]:
    return {"x-forebay-tenant": tenant, "x-stainless-read-timeout": f"{timeout}"}


async def test_a_tenant_has_its_calls_in_progress_over_all_targets(
    harness: GatewayHarness, gate: asyncio.Event
) -> None:
    tenants = (TenantSettings(name="acme", max_concurrent=2),)
    async with Gateway(harness.settings(gateway={"tenants": tenants})) as gateway, asyncio.TaskGroup() as group:
        calls = [
            group.create_task(harness.post(gateway, path, headers=of("acme")))
            for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages")
        ]
        await until(lambda: len(harness.provider.requests) == 2)
        other = group.create_task(harness.post(gateway, headers=of("other")))
        await until(lambda: len(harness.provider.requests) == 3)
        status, headers, _ = await harness.post(gateway, headers={**of("acme"), "x-forebay-deadline": "1"})
        assert status == 408
        assert headers["x-forebay-limited-by"] == "tenant:acme:deadline"
        gate.set()
    assert [call.result()[0] for call in (*calls, other)] == [200] * 4
    assert len(harness.provider.requests) == 4


async def test_a_tenant_beyond_its_rate_gets_a_429_that_the_sdk_reads(harness: GatewayHarness) -> None:
    tenants = (TenantSettings(name="*", rpm=1),)
    async with Gateway(harness.settings(gateway={"tenants": tenants})) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        client = anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0, timeout=10.0)
        asking: Any = {"model": "m", "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 5}
        await client.messages.create(**asking)
        with pytest.raises(anthropic.RateLimitError, match="tenant 'default'") as caught:
            await client.messages.create(**asking)
        assert int(caught.value.response.headers["retry-after-ms"]) > 10_000
        await client.messages.create(**asking, extra_headers={"x-forebay-tenant": "another"})
        await client.close()


async def test_a_tenants_budget_holds_over_all_targets(harness: GatewayHarness) -> None:
    tenants = (TenantSettings(name="acme", budget_usd=0.0008),)
    settings = harness.settings(gateway={"tenants": tenants}, prices=PRICES)
    async with Gateway(settings) as gateway:
        statuses = []
        for path in ("/v1/chat/completions", "/v1/messages") * 2:
            status, headers, _ = await harness.post(gateway, path, headers=of("acme"))
            statuses.append(status)
        assert statuses == [200, 200, 402, 402]
        assert headers["x-forebay-limited-by"] == "tenant:acme:budget"
        assert (await harness.post(gateway, headers=of("other")))[0] == 200
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_model_without_a_price_is_refused_only_to_tenants_with_a_budget(harness: GatewayHarness) -> None:
    tenants = (TenantSettings(name="acme", budget_usd=1.0),)
    asking = {**CHAT_REQUEST, "model": "nobody-knows"}
    async with Gateway(harness.settings(gateway={"tenants": tenants})) as gateway:
        status, headers, _ = await harness.post(gateway, json=asking, headers=of("acme"))
        assert (status, headers["x-forebay-limited-by"].rpartition(":")[2]) == (400, "unpriced")
        assert (await harness.post(gateway, json=asking, headers=of("other")))[0] == 200


async def test_a_call_that_its_target_rejects_takes_nothing_of_its_tenants_rate(harness: GatewayHarness) -> None:
    tenants = (TenantSettings(name="acme", rpm=1),)
    settings = harness.settings(gateway={"tenants": tenants}, budget_usd=1e-9, prices=PRICES)
    async with Gateway(settings) as gateway:
        for _ in range(3):
            status, headers, _ = await harness.post(gateway, headers=of("acme", 5.0))
            assert (status, headers["x-forebay-limited-by"].partition(":")[0]) == (402, "upstream")


async def test_a_tenants_calls_have_its_priority_and_no_better_one(harness: GatewayHarness) -> None:
    tenants = (TenantSettings(name="acme", priority="low", max_priority="normal"),)
    async with Gateway(harness.settings(gateway={"tenants": tenants}, max_concurrent=1)) as gateway:
        order: list[str] = []
        gate = asyncio.Event()

        async def behave(request: web.BaseRequest) -> web.StreamResponse:
            order.append((await request.json())["user"])
            await gate.wait()
            return web.json_response(CHAT_RESPONSE)

        harness.provider.behaviour = behave

        async def call(name: str, tenant: str, **headers: str) -> None:
            given = {**of(tenant), **{key.replace("_", "-"): value for key, value in headers.items()}}
            await harness.post(gateway, json={**CHAT_REQUEST, "user": name}, headers=given)

        async with asyncio.TaskGroup() as group:
            group.create_task(call("first", "other"))
            await until(lambda: order == ["first"])
            for queued, (name, tenant, given) in enumerate(
                [
                    ("low", "acme", {}),
                    ("capped", "acme", {"x_forebay_priority": "critical"}),
                    ("high", "other", {"x_forebay_priority": "high"}),
                ],
                1,
            ):
                group.create_task(call(name, tenant, **given))
                await until(lambda queued=queued: leftovers(gateway)[1] == queued)  # type: ignore[misc]
            gate.set()
    assert order == ["first", "high", "capped", "low"]


async def test_a_caller_who_is_not_trusted_has_the_limits_of_the_default_tenant(harness: GatewayHarness) -> None:
    settings = harness.settings(
        gateway={"tenants": (TenantSettings(name="default", rpm=1),), "context": ContextSettings(trust="nobody")}
    )
    async with Gateway(settings) as gateway:
        assert (await harness.post(gateway, headers=of("acme", 5.0)))[0] == 200
        assert (await harness.post(gateway, headers=of("another", 5.0)))[0] == 429
