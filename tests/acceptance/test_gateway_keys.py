"""Keys that the gateway issues: who may call with one, what, as whom; and what becomes of one that is not valid."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    HELD_KEY,
    MESSAGE_RESPONSE,
    NOTHING_LEFT,
    GatewayHarness,
    leftovers,
    raw,
    request_bytes,
    responding,
    until,
)
from tests.support.issued_keys import IssuedKeys, bearer, in_thread, refresh

from forebay import Priority, clock
from forebay.errors import StoreUnavailable
from forebay.gateway import FallbackSettings, GatewaySettings, TargetSettings
from forebay.gateway.callers.issued_keys import new_key
from forebay.gateway.callers.key_file import KeyFile
from forebay.gateway.server import Gateway

MESSAGES: Any = CHAT_REQUEST["messages"]


def opened(
    harness: GatewayHarness, keys: IssuedKeys, *, gateway: dict[str, Any] | None = None, **target: Any
) -> Gateway:
    settings = harness.settings(gateway={"keys": keys.url, **(gateway or {})}, **{"api_key_env": "HELD", **target})
    return Gateway(settings, {"HELD": HELD_KEY, "TOKEN": "0123456789abcdef"})


# --- by the SDKs ---


async def test_the_sdks_call_with_a_key_and_a_base_url(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=text) as client:
            chat = await client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        harness.provider.behaviour = responding(
            200, json.dumps(MESSAGE_RESPONSE).encode(), content_type="application/json"
        )
        async with anthropic.AsyncAnthropic(base_url=url, api_key=text) as claude:
            by_key = await claude.messages.create(model="claude-sonnet-4", max_tokens=20, messages=MESSAGES)
        async with anthropic.AsyncAnthropic(base_url=url, auth_token=text) as claude:
            by_token = await claude.messages.create(model="claude-sonnet-4", max_tokens=20, messages=MESSAGES)
    assert chat.choices[0].message.content == "The Danube."
    assert by_key.usage.output_tokens == by_token.usage.output_tokens == 20
    sent = [request.headers for request in harness.provider.requests]
    assert [headers.get("authorization") for headers in sent] == [f"Bearer {HELD_KEY}", None, None]
    assert [headers.get("x-api-key") for headers in sent] == [None, HELD_KEY, HELD_KEY]


async def test_the_sdks_raise_their_own_errors_and_do_not_retry(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", models=("gpt-4o*", "claude-*"))
    async with opened(harness, keys) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=new_key()) as client:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
            with pytest.raises(openai.PermissionDeniedError) as forbidden:
                await client.with_options(api_key=text).chat.completions.create(model="o3", messages=MESSAGES)
        async with anthropic.AsyncAnthropic(base_url=url, api_key=new_key()) as claude:
            with pytest.raises(anthropic.AuthenticationError) as unknown_there:
                await claude.messages.create(model="claude-sonnet-4", max_tokens=20, messages=MESSAGES)
            with pytest.raises(anthropic.PermissionDeniedError) as forbidden_there:
                await claude.with_options(api_key=text).messages.create(model="o3", max_tokens=20, messages=MESSAGES)
    assert harness.provider.requests == []
    assert (unknown.value.code, forbidden.value.code) == ("invalid_api_key", "model_not_found")
    assert "gpt-4o*, claude-* only, not for 'o3'" in str(forbidden.value)
    kinds = [error.value.body["error"]["type"] for error in (unknown_there, forbidden_there)]  # type: ignore[index]
    assert kinds == ["authentication_error", "permission_error"]


# --- where a key stands ---


@pytest.mark.parametrize(
    ("header", "before"),
    [
        ("authorization", "Bearer "),
        ("authorization", "bearer   "),
        ("authorization", ""),
        ("x-api-key", ""),
        ("api-key", ""),
        ("x-goog-api-key", ""),
        ("ocp-apim-subscription-key", ""),
        ("x-forebay-token", ""),
    ],
)
async def test_a_key_is_found_in_any_header_with_api_keys(
    harness: GatewayHarness, keys: IssuedKeys, header: str, before: str
) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys) as gateway:
        status, _, body = await harness.post(gateway, headers={header: before + text})
    assert (status, body) == (200, CHAT_RESPONSE)
    assert text not in str(harness.provider.requests[0].raw_headers)


async def test_a_key_never_reaches_a_provider_whose_key_is_not_held(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys, api_key_env=None) as gateway:
        await harness.post(gateway, headers=bearer(text))
        own = {"authorization": "Bearer sk-own", "x-forebay-token": text, "x-api-key": text}
        status, _, _ = await harness.post(gateway, headers=own)
    first, second = harness.provider.requests
    assert status == 200
    assert "authorization" not in first.headers
    assert second.headers["authorization"] == "Bearer sk-own"  # the caller's own key of the provider
    assert text not in f"{first.raw_headers}{second.raw_headers}"


@pytest.mark.parametrize("other", ["x-api-key", "api-key", "x-forebay-token"])
async def test_two_different_keys_are_refused(harness: GatewayHarness, keys: IssuedKeys, other: str) -> None:
    text, second = await keys.create("writer"), await keys.create("reader")
    async with opened(harness, keys) as gateway:
        assert (await harness.post(gateway, headers={**bearer(text), other: second}))[0] == 401
        assert (await harness.post(gateway, headers={**bearer(text), other: new_key()}))[0] == 401
        assert (await harness.post(gateway, headers={**bearer(text), other: text}))[0] == 200


async def test_a_key_in_the_url_is_refused_and_not_forwarded(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys) as gateway:
        for headers in ({}, bearer(text)):
            status, _, body = await harness.post(gateway, f"/v1/chat/completions?key={text}", headers=headers)
            assert status == 401
            assert "in the URL" in body["error"]["message"]
            assert text not in str(body)
    assert harness.provider.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer sk-of-a-provider"},
        {"authorization": "Basic ZmItOg=="},
        {"authorization": "Bearer fb-"},
        {"authorization": "Bearer fb-{}"},
        {"x-forebay-token": "0123456789abcdef"},
        {"cookie": "key={key}"},
        {"x-key": "{key}"},
        {"authorization": "Bearer {key}x"},
        {"authorization": "Bearer {upper}"},
        {"authorization": "Token {key}"},
        {"authorization": "Bearer {key} {key}"},
    ],
)
async def test_without_a_valid_key_a_call_is_refused_also_on_loopback(
    harness: GatewayHarness, keys: IssuedKeys, headers: dict[str, str]
) -> None:
    text = await keys.create("writer")
    sent = {name: value.replace("{key}", text).replace("{upper}", text.upper()) for name, value in headers.items()}
    async with opened(harness, keys) as gateway:
        status, answered, body = await harness.post(gateway, headers=sent)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert answered["x-should-retry"] == "false"
        assert text not in str(body)
        assert leftovers(gateway) == NOTHING_LEFT
    assert harness.provider.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        (b"authorization: Bearer %k", b"authorization: Bearer sk-2"),
        (b"x-api-key: %k", b"X-API-KEY: %k"),
        (b"authorization: Bearer %k", b"connection: authorization"),
        (b"authorization: Bearer %k\xc3\xbc",),
        (b"authorization : Bearer %k",),
        (b"x: a\r\n authorization: Bearer %k",),
        (b"authorization: Bearer %k\x00",),
        (b"authorization: Bearer\xa0%k",),
    ],
)
async def test_a_key_in_a_header_that_servers_read_differently_is_refused(
    harness: GatewayHarness, keys: IssuedKeys, fields: tuple[bytes, ...]
) -> None:
    text = (await keys.create("writer")).encode()
    sent = request_bytes(json.dumps(CHAT_REQUEST).encode(), *(field.replace(b"%k", text) for field in fields))
    async with opened(harness, keys) as gateway:
        answer = await raw(gateway, sent)
    assert answer.split()[1] in (b"400", b"401")
    assert text not in answer
    assert harness.provider.requests == []


# --- valid, or not any more ---


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"enabled": False}, "is disabled"),
        ({"expires_at": 1.0}, "has expired"),
    ],
)
async def test_a_change_is_in_force_without_a_restart(
    harness: GatewayHarness, keys: IssuedKeys, change: dict[str, Any], reason: str
) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys) as gateway:
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 200
        await keys.update("writer", **change)
        await refresh(gateway)
        status, _, body = await harness.post(gateway, headers=bearer(text))
        assert status == 401
        assert reason in body["error"]["message"]
        await keys.update("writer", enabled=True, expires_at=None)
        await refresh(gateway)
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 200


async def test_a_running_gateway_notices_changes_by_itself(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys) as gateway:
        assert gateway.forwarder.keys is not None
        await keys.revoke("writer")
        later = await keys.create("reader")
        for key, status in ((text, 401), (later, 200)):
            while (await harness.post(gateway, headers=bearer(key)))[0] != status:  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0.05)


async def test_calls_in_progress_of_a_revoked_key_end_as_they_are(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text, goes_on = await keys.create("writer"), asyncio.Event()

    async def hold(request: web.BaseRequest) -> web.StreamResponse:
        await goes_on.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = hold
    async with opened(harness, keys) as gateway:
        call = asyncio.create_task(harness.post(gateway, headers=bearer(text)))
        await until(lambda: bool(harness.provider.requests))
        harness.provider.behaviour = harness.provider.reply  # of later calls, which would not wait
        await keys.revoke("writer")
        await refresh(gateway)
        status, _, body = await harness.post(gateway, headers=bearer(text))
        assert status == 401
        assert "was revoked" in body["error"]["message"]
        goes_on.set()
        assert (await call)[0] == 200


async def test_a_rotated_key_stays_valid_for_its_grace_period(harness: GatewayHarness, keys: IssuedKeys) -> None:
    first = await keys.create("writer")
    async with opened(harness, keys) as gateway:
        second = await keys.rotate("writer", grace=3600.0)
        await refresh(gateway)
        statuses = [(await harness.post(gateway, headers=bearer(text)))[0] for text in (first, second)]
        assert statuses == [200, 200]
        third = await keys.rotate("writer", grace=0.0)
        await refresh(gateway)
        for text in (first, second):
            status, _, body = await harness.post(gateway, headers=bearer(text))
            assert status == 401
            assert "replaced by another one" in body["error"]["message"]
        assert (await harness.post(gateway, headers=bearer(third)))[0] == 200


async def test_the_last_use_is_noted_to_the_hour(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")
    await keys.create("unused")
    before = clock.wall_time()
    async with opened(harness, keys) as gateway:
        await harness.post(gateway, headers=bearer(text))
        await refresh(gateway)

    def last_used() -> list[float | None]:
        with KeyFile(keys.path) as file:
            return [file.get(name).last_used for name in ("writer", "unused")]

    used, unused = await in_thread(last_used)
    assert used is not None
    assert used % 3600 == 0
    assert before - 3600 < used <= clock.wall_time()
    assert unused is None


# --- what a key may do ---


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "gpt-4o-mini", "messages": MESSAGES}, 200),
        ("/v1/chat/completions", {"model": "GPT-4O-MINI", "messages": MESSAGES}, 403),
        ("/v1/chat/completions", {"model": "o3", "messages": MESSAGES}, 403),
        ("/v1/chat/completions", {"messages": MESSAGES}, 403),
        ("/v1/chat/completions", {"model": "gpt-4o", "models": ["gpt-4o", "o3"], "messages": MESSAGES}, 403),
        ("/v1/chat/completions", {"model": "gpt-4o", "fallbacks": ["o3"], "messages": MESSAGES}, 403),
        ("/v1/chat/completions", {"model": "gpt-4o", "preset": "all", "messages": MESSAGES}, 403),
        ("/v1/responses", {"model": "gpt-4o", "prompt": {"id": "p"}, "input": "x"}, 403),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": "x"}, 403),
        ("/v1/threads", {"model": "gpt-4o"}, 403),
        ("/v1/batches", {"input_file_id": "f"}, 403),
        ("/v1/unknown", {"model": "gpt-4o"}, 403),
        ("/v1/files", {"purpose": "x"}, 200),
        ("/openai/deployments/gpt-4o/chat/completions", {"messages": MESSAGES}, 200),
        ("/openai/deployments/o3/chat/completions", {"model": "gpt-4o", "messages": MESSAGES}, 403),
    ],
)
async def test_a_key_for_some_models_is_for_no_others(
    harness: GatewayHarness, keys: IssuedKeys, path: str, body: dict[str, Any], status: int
) -> None:
    text = await keys.create("writer", models=("gpt-4o*",))
    async with opened(harness, keys) as gateway:
        answered, headers, answer = await harness.post(gateway, path, json=body, headers=bearer(text))
        assert answered == status
        if status == 403:
            assert headers["x-should-retry"] == "false"
            assert "this API key is for gpt-4o* only" in answer["error"]["message"]
            assert harness.provider.requests == []
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"o3","model":"gpt-4o","messages":[]}',
        b'{"model":"gpt-4o","Model":"o3","messages":[]}',
        b'{"model":"gpt-4o","mod\\u0065l":"o3","messages":[]}',
        b"model=gpt-4o",
    ],
)
async def test_a_model_that_servers_read_differently_is_refused(
    harness: GatewayHarness, keys: IssuedKeys, body: bytes
) -> None:
    text = await keys.create("writer", models=("gpt-4o",))
    async with opened(harness, keys) as gateway:
        status, _, _ = await harness.post(gateway, data=body, headers=bearer(text))
    assert status in (400, 403)
    assert harness.provider.requests == []


async def test_a_key_for_some_models_may_list_them(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", models=("gpt-4o",))
    async with (
        opened(harness, keys) as gateway,
        harness.session.get(harness.at(gateway, "/v1/models"), headers=bearer(text)) as response,
    ):
        assert response.status == 200


async def test_a_key_is_for_its_targets(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", targets=("second",))
    targets = tuple(TargetSettings(name=name, url=f"{harness.url}/{name}") for name in ("first", "second"))
    settings = GatewaySettings(targets=targets, listen="127.0.0.1:0", keys=keys.url)
    async with Gateway(settings) as gateway:
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 200  # to the first that it is for
        status, _, body = await harness.post(gateway, "/first/v1/chat/completions", headers=bearer(text))
    assert status == 403
    assert "not for the target 'first'" in body["error"]["message"]
    assert [request.path for request in harness.provider.requests] == ["/second/v1/chat/completions"]


@pytest.mark.parametrize("fields", [{"targets": ("first",)}, {"models": ("gpt-4o",)}])
async def test_a_call_does_not_fall_back_to_where_its_key_may_not_go(
    harness: GatewayHarness, keys: IssuedKeys, fields: dict[str, Any]
) -> None:
    text, other = await keys.create("writer", **fields), await keys.create("reader")
    elsewhere = FallbackSettings(target="second", model="llama")
    first = TargetSettings(name="first", url=harness.url, api_key_env="HELD", rpm=1, fallback=(elsewhere,))
    second = TargetSettings(name="second", url=harness.url, api_key_env="HELD")
    settings = GatewaySettings(targets=(first, second), listen="127.0.0.1:0", keys=keys.url)
    async with Gateway(settings, {"HELD": HELD_KEY}) as gateway:
        statuses = [
            (await harness.post(gateway, headers={**bearer(key), "x-stainless-read-timeout": "2"}))[0]
            for key in (text, text, other)
        ]
    assert statuses == [200, 429, 200]


# --- as whom a key calls ---


async def caller_of(harness: GatewayHarness, keys: IssuedKeys, fields: dict[str, Any], headers: dict[str, str]) -> Any:
    """Return the request that a call makes of its account, for its priority, tenant and task."""
    text = await keys.create("writer", **fields)
    seen = []
    async with opened(harness, keys) as gateway:
        core = gateway.forwarder.targets[0].upstream.core
        request_for = core.request_for

        def record(*args: Any, **how: Any) -> Any:
            seen.append(request_for(*args, **how))
            return seen[-1]

        core.request_for = record  # type: ignore[method-assign]
        assert (await harness.post(gateway, headers={**bearer(text), **headers}))[0] == 200
    return seen[0]


@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        ({}, {}, (Priority.NORMAL, "writer", None)),
        ({"tenant": "acme", "priority": "low"}, {}, (Priority.LOW, "acme", None)),
        ({}, {"x-forebay-priority": "critical"}, (Priority.NORMAL, "writer", None)),
        ({}, {"x-forebay-priority": "low"}, (Priority.LOW, "writer", None)),
        ({"max_priority": "high"}, {"x-forebay-priority": "critical"}, (Priority.HIGH, "writer", None)),
        ({"max_priority": "high"}, {}, (Priority.NORMAL, "writer", None)),
        ({"tenant": "acme"}, {"x-forebay-tenant": "other"}, (Priority.NORMAL, "acme", None)),
        ({"tenant": "acme", "sets_tenant": True}, {"x-forebay-tenant": "other"}, (Priority.NORMAL, "other", None)),
        ({"tenant": "acme", "sets_tenant": True}, {}, (Priority.NORMAL, "acme", None)),
        ({}, {"x-forebay-task": "run-7"}, (Priority.NORMAL, "writer", "writer:run-7")),
    ],
)
async def test_the_key_says_as_whom_it_calls(
    harness: GatewayHarness,
    keys: IssuedKeys,
    fields: dict[str, Any],
    headers: dict[str, str],
    expected: tuple[Priority, str, str | None],
) -> None:
    request = await caller_of(harness, keys, fields, headers)
    assert (request.priority, request.tenant, request.task_id) == expected


# --- other settings ---


async def test_callers_without_a_key_are_served_if_the_settings_say_so(
    harness: GatewayHarness, keys: IssuedKeys
) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys, gateway={"require_key": False}, api_key_env=None) as gateway:
        for headers, status in ((bearer("sk-own"), 200), (bearer(text), 200), (bearer(new_key()), 401)):
            assert (await harness.post(gateway, headers=headers))[0] == status
    assert [request.headers.get("authorization") for request in harness.provider.requests] == ["Bearer sk-own", None]
    token = {"require_key": False, "token_env": "TOKEN"}
    async with opened(harness, keys, gateway=token) as gateway:
        for headers, status in (({}, 401), ({"x-forebay-token": "0123456789abcdef"}, 200), (bearer(text), 200)):
            assert (await harness.post(gateway, headers=headers))[0] == status


async def test_the_metrics_are_for_who_runs_the_gateway(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")

    async def metrics(gateway: Gateway, headers: dict[str, str]) -> int:
        async with harness.session.get(harness.at(gateway, "/metrics"), headers=headers) as response:
            return response.status

    async with opened(harness, keys) as gateway:
        assert await metrics(gateway, {}) == 200  # on this machine
        assert await metrics(gateway, {"host": "evil.example"}) == 403
        assert (await harness.post(gateway, headers={**bearer(text), "host": "llm.example"}))[0] == 200
    async with opened(harness, keys, gateway={"token_env": "TOKEN"}) as gateway:
        assert await metrics(gateway, bearer(text)) == 401
        assert await metrics(gateway, {"x-forebay-token": "0123456789abcdef"}) == 200
    async with opened(harness, keys, gateway={"listen": "0.0.0.0:0"}) as gateway:
        assert await metrics(gateway, bearer(text)) == 403
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 200


async def test_health_needs_no_key(harness: GatewayHarness, keys: IssuedKeys) -> None:
    await keys.create("writer")
    async with opened(harness, keys) as gateway, harness.session.get(harness.at(gateway, "/healthz")) as response:
        assert response.status == 200


# --- the file ---


async def test_a_missing_file_is_an_error_at_start(harness: GatewayHarness, keys: IssuedKeys) -> None:
    with pytest.raises(StoreUnavailable, match=r"no such file.*forebay keys create"):
        async with opened(harness, keys):
            pass


@pytest.mark.parametrize("damage", ["removed", "emptied", "overwritten"])
async def test_the_keys_stay_while_their_file_cannot_be_read(
    harness: GatewayHarness, keys: IssuedKeys, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = await keys.create("writer")
    copy = await in_thread(keys.path.read_bytes)
    async with opened(harness, keys) as gateway:
        if damage == "removed":
            await in_thread(keys.path.unlink)
        else:
            await in_thread(keys.path.write_bytes, b"" if damage == "emptied" else b"x" * len(copy))
        registry = gateway.forwarder.keys
        assert registry is not None
        with caplog.at_level(logging.WARNING, logger="forebay"):
            await refresh(gateway)
            assert caplog.records == []  # it may be in the course of being replaced
            registry._failing_since -= 10.0
            await refresh(gateway)
            await refresh(gateway)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "the 1 keys that are known stay as they are" in caplog.text
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 200
        assert (await harness.post(gateway, headers=bearer(new_key())))[0] == 401
        await in_thread(keys.path.write_bytes, copy)
        await keys.revoke("writer")
        with caplog.at_level(logging.WARNING, logger="forebay"):
            await refresh(gateway)
        assert "can be read again" in caplog.text
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 401


async def test_the_keys_stay_while_their_file_is_locked(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")

    def lock() -> sqlite3.Connection:
        holder = sqlite3.connect(keys.path, isolation_level=None, check_same_thread=False)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        holder.execute("UPDATE change SET mark = randomblob(16)")
        return holder

    async with opened(harness, keys) as gateway:
        holder = await in_thread(lock)
        await refresh(gateway)
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 200
        await in_thread(holder.close)
        await keys.revoke("writer")
        await refresh(gateway)
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 401


async def test_a_key_for_an_unknown_target_is_worth_one_warning(
    harness: GatewayHarness, keys: IssuedKeys, caplog: pytest.LogCaptureFixture
) -> None:
    await keys.create("writer", targets=("openai", "opnai"))
    with caplog.at_level(logging.WARNING, logger="forebay"):
        async with opened(harness, keys) as gateway:
            await keys.update("writer", rpm=1)
            await refresh(gateway)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["the key 'writer' is for the target 'opnai', which this gateway does not have"]


async def test_a_file_that_is_replaced_counts_at_once(
    harness: GatewayHarness, keys: IssuedKeys, tmp_path: Path
) -> None:
    text = await keys.create("writer")
    others = IssuedKeys(tmp_path / "others.db")
    other = await others.create("writer")
    async with opened(harness, keys) as gateway:
        await in_thread(others.path.replace, keys.path)
        await refresh(gateway)
        statuses = [(await harness.post(gateway, headers=bearer(each)))[0] for each in (text, other)]
    assert statuses == [401, 200]


async def test_two_gateways_share_a_file(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer")
    async with opened(harness, keys) as one, opened(harness, keys) as two:
        for gateway in (one, two):
            assert (await harness.post(gateway, headers=bearer(text)))[0] == 200
            await refresh(gateway)
        later = await keys.create("reader")
        await keys.revoke("writer")
        for gateway in (one, two):
            await refresh(gateway)
            statuses = [(await harness.post(gateway, headers=bearer(each)))[0] for each in (text, later)]
            assert statuses == [401, 200]


# --- other settings while it runs ---


async def test_a_reload_can_begin_and_end_to_ask_for_keys(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", rpm=2)
    without = harness.settings()
    settings = harness.settings(gateway={"keys": keys.url})
    statuses = []
    async with Gateway(without) as gateway:
        for reloaded in (settings, settings, without):
            await gateway.reload(reloaded)
            for headers in ({}, {**bearer(text), "x-stainless-read-timeout": "2"}):
                statuses.append((await harness.post(gateway, headers=headers))[0])  # noqa: PERF401 - in turn
        assert leftovers(gateway) == NOTHING_LEFT
    assert statuses == [401, 200, 401, 200, 200, 200]


async def test_a_reload_keeps_what_was_used_of_the_limits_of_keys(harness: GatewayHarness, keys: IssuedKeys) -> None:
    text = await keys.create("writer", rpm=1)
    settings = harness.settings(gateway={"keys": keys.url})
    async with Gateway(settings) as gateway:
        statuses = []
        for _ in range(2):
            headers = {**bearer(text), "x-stainless-read-timeout": "2"}
            statuses.append((await harness.post(gateway, headers=headers))[0])
            await gateway.reload(settings)
    assert statuses == [200, 429]


async def test_a_reload_to_another_file_that_is_missing_changes_nothing(
    harness: GatewayHarness, keys: IssuedKeys, tmp_path: Path
) -> None:
    text = await keys.create("writer")
    others = IssuedKeys(tmp_path / "others.db")
    async with Gateway(harness.settings(gateway={"keys": keys.url})) as gateway:
        with pytest.raises(StoreUnavailable):
            await gateway.reload(harness.settings(gateway={"keys": others.url}))
        assert (await harness.post(gateway, headers=bearer(text)))[0] == 200
        other = await others.create("reader")
        await gateway.reload(harness.settings(gateway={"keys": others.url}))
        statuses = [(await harness.post(gateway, headers=bearer(each)))[0] for each in (text, other)]
    assert statuses == [401, 200]


async def test_a_reload_with_another_provider_key_sends_it(harness: GatewayHarness) -> None:
    environment = {"ONE": "sk-1", "TWO": "sk-2"}
    async with Gateway(harness.settings(api_key_env="ONE"), environment) as gateway:
        await harness.post(gateway)
        await gateway.reload(harness.settings(api_key_env="TWO"))
        await harness.post(gateway)
    assert [each.headers["authorization"] for each in harness.provider.requests] == ["Bearer sk-1", "Bearer sk-2"]


# --- secrecy ---


async def test_a_key_stands_in_no_log_error_or_metric(
    harness: GatewayHarness, keys: IssuedKeys, caplog: pytest.LogCaptureFixture
) -> None:
    text, unknown = await keys.create("writer", models=("gpt-4o",)), new_key()
    shown: list[Any] = []
    with caplog.at_level(logging.DEBUG, logger="forebay"):
        async with opened(harness, keys) as gateway:
            for key in (text, unknown):
                for path in ("/v1/chat/completions", f"/v1/x/{key}", f"/v1/chat/completions?a={key}", "/nowhere"):
                    for model in ("gpt-4o", "o3"):
                        body = {**CHAT_REQUEST, "model": model}
                        status, headers, answer = await harness.post(gateway, path, json=body, headers=bearer(key))
                        shown += [status, dict(headers), answer]
            async with harness.session.get(harness.at(gateway, "/metrics")) as response:
                shown.append(await response.text())
            shown.append(gateway.forwarder.targets[0].upstream.statistics())
    for key in (text, unknown, HELD_KEY):
        assert key not in f"{shown}"
        assert key not in caplog.text
