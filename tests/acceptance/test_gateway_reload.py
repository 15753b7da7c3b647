"""A gateway that is given other settings while it serves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    NOTHING_LEFT,
    GatewayHarness,
    leftovers,
    until,
)

from forebay.errors import InvalidSetting
from forebay.gateway import GatewaySettings, InvalidSecret, QuotaSettings, TargetSettings, TenantSettings
from forebay.gateway.access_log import CannotWriteLog
from forebay.gateway.server import Gateway
from forebay.quota import Price

PRICES = {"*": Price(input=1.0, output=10.0)}
COST = 0.00023  # of a call
KEY = {"authorization": "Bearer sk-1"}


def accounts(gateway: Gateway, target: int = 0) -> dict[str, Any]:
    """Return the accounts of a target by model group."""
    found = gateway.forwarder.targets[target].upstream.core.accounts
    return {account.name.rpartition(":")[2]: account for account in found}


def spent(gateway: Gateway) -> float | None:
    return gateway.forwarder.targets[0].upstream.statistics().spent_usd


async def test_accounts_with_the_same_limits_keep_what_they_have_learned(harness: GatewayHarness) -> None:
    models = {"gpt-4o*": QuotaSettings(rpm=100), "o3*": QuotaSettings(rpm=100)}
    async with Gateway(harness.settings(models=models)) as gateway:
        for model in ("gpt-4o", "o3"):
            await harness.post(gateway, json={**CHAT_REQUEST, "model": model}, headers=KEY)
        before = accounts(gateway)
        await gateway.reload(harness.settings(models={**models, "o3*": QuotaSettings(rpm=50)}, max_attempts=3))
        for model in ("gpt-4o", "o3"):
            await harness.post(gateway, json={**CHAT_REQUEST, "model": model}, headers=KEY)
        after = accounts(gateway)
        assert after["gpt-4o*"] is before["gpt-4o*"]
        assert after["gpt-4o*"].account.counts.sent == 2
        assert after["gpt-4o*"].retries.retry.max_attempts == 3
        assert after["o3*"] is not before["o3*"]
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_reload_refills_no_budget(harness: GatewayHarness) -> None:
    tenants = (TenantSettings(name="default", budget_usd=1.0),)
    settings = harness.settings(budget_usd=5.0, prices=PRICES, gateway={"tenants": tenants})
    async with Gateway(settings) as gateway:
        await harness.post(gateway, headers=KEY)
        assert spent(gateway) == pytest.approx(COST)
        await gateway.reload(settings)
        assert spent(gateway) == pytest.approx(COST)
        lower = harness.settings(budget_usd=COST, prices=PRICES, url=f"{harness.url}/elsewhere")
        await gateway.reload(lower)
        status, headers, _ = await harness.post(gateway, headers=KEY)
        assert (status, headers["x-forebay-limited-by"].rpartition(":")[2]) == (402, "budget")
        little = (TenantSettings(name="default", budget_usd=COST),)
        await gateway.reload(harness.settings(prices=PRICES, gateway={"tenants": little}))
        status, headers, _ = await harness.post(gateway, headers=KEY)
        assert (status, headers["x-forebay-limited-by"]) == (402, "tenant:default:budget")


async def test_a_target_that_comes_back_has_spent_what_it_had_spent(harness: GatewayHarness) -> None:
    settings = harness.settings(budget_usd=5.0, prices=PRICES)
    async with Gateway(settings) as gateway:
        await harness.post(gateway, headers=KEY)
        await gateway.reload(msgspec.structs.replace(settings, targets=settings.targets[1:]))
        assert (await harness.post(gateway))[0] == 404
        await gateway.reload(settings)
        assert spent(gateway) == pytest.approx(COST)


async def test_a_reload_refills_no_rate(harness: GatewayHarness) -> None:
    hurried = {**KEY, "x-stainless-read-timeout": "3"}
    async with Gateway(harness.settings(rpm=2)) as gateway:
        for _ in range(2):
            assert (await harness.post(gateway, headers=hurried))[0] == 200
        for changes in ({"rpm": 2}, {"rpm": 2, "max_wait": 5.0}, {"rpm": 1}):
            await gateway.reload(harness.settings(**changes))
            status, headers, _ = await harness.post(gateway, headers=hurried)
            assert (status, headers["x-forebay-limited-by"].rpartition(":")[2]) == (429, "requests per minute")


async def test_calls_in_progress_end_by_the_old_settings(harness: GatewayHarness) -> None:
    gate = asyncio.Event()

    async def gated(request: web.BaseRequest) -> web.StreamResponse:
        await gate.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = gated
    async with Gateway(harness.settings(max_concurrent=1)) as gateway:
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(harness.post(gateway, headers=KEY)) for _ in range(2)]
            await until(lambda: leftovers(gateway)[:2] == (1, 1))
            await gateway.reload(harness.settings(max_concurrent=5, url=f"{harness.url}/elsewhere"))
            calls.append(group.create_task(harness.post(gateway, headers=KEY)))
            await until(lambda: len(harness.provider.requests) == 2)
            gate.set()
        assert [call.result()[0] for call in calls] == [200] * 3
        paths = sorted(request.path for request in harness.provider.requests)
        assert paths == ["/elsewhere/v1/chat/completions", "/v1/chat/completions", "/v1/chat/completions"]
        assert leftovers(gateway) == NOTHING_LEFT


async def test_the_token_is_read_again(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first-token-of-the-gateway")
    settings = harness.settings(gateway={"token_file": str(file)})
    async with Gateway(settings) as gateway:
        file.write_text("second-token-of-the-gateway")
        assert (await harness.post(gateway, headers={"x-forebay-token": "first-token-of-the-gateway"}))[0] == 200
        await gateway.reload(settings)
        assert (await harness.post(gateway, headers={"x-forebay-token": "first-token-of-the-gateway"}))[0] == 401
        assert (await harness.post(gateway, headers={"x-forebay-token": "second-token-of-the-gateway"}))[0] == 200
        file.write_text("short")
        with pytest.raises(InvalidSecret):
            await gateway.reload(settings)
        assert (await harness.post(gateway, headers={"x-forebay-token": "second-token-of-the-gateway"}))[0] == 200


async def test_the_address_stays_and_so_does_the_need_of_a_token(harness: GatewayHarness, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a-token-of-the-gateway")
    settings = harness.settings(gateway={"token_file": str(file), "listen": "0.0.0.0:0"})
    async with Gateway(settings) as gateway:
        (kept,) = await gateway.reload(msgspec.structs.replace(settings, listen="127.0.0.1:1"))
        assert kept == "it listens on 0.0.0.0:0 until it is started again, not on 127.0.0.1:1"
        with pytest.raises(InvalidSetting, match="loopback"):
            await gateway.reload(harness.settings())  # no token: it would be open to everybody
        assert (await harness.post(gateway))[0] == 401


@pytest.mark.parametrize("way", ["fallback", "log"])
async def test_settings_that_do_not_work_change_nothing(harness: GatewayHarness, tmp_path: Path, way: str) -> None:
    settings = harness.settings(gateway={"access_log": "json", "access_log_to": str(tmp_path / "log")})
    bad: GatewaySettings
    if way == "log":
        bad = msgspec.structs.replace(settings, access_log_to=str(tmp_path / "missing" / "log"))
    else:
        openai, claude = harness.settings(rpm=7).targets
        wrong = TargetSettings(name="openai", url=harness.url, fallback=({"target": "anthropic"},))  # type: ignore[arg-type]
        del openai
        bad = msgspec.structs.replace(
            settings, targets=(msgspec.convert(msgspec.to_builtins(wrong), TargetSettings), claude), access_log="off"
        )
    async with Gateway(settings) as gateway:
        await harness.post(gateway, headers=KEY)
        before = accounts(gateway)
        with pytest.raises((InvalidSetting, CannotWriteLog)):
            await gateway.reload(bad)
        assert gateway.settings is settings
        await harness.post(gateway, headers=KEY)
        assert accounts(gateway) == before
    assert len((tmp_path / "log").read_text().splitlines()) == 2


async def test_a_log_that_was_moved_is_opened_again(harness: GatewayHarness, tmp_path: Path) -> None:
    file, moved = tmp_path / "log", tmp_path / "log.1"
    settings = harness.settings(gateway={"access_log": "json", "access_log_to": str(file)})
    async with Gateway(settings) as gateway:
        await harness.post(gateway, headers={"x-request-id": "one"})
        await until(lambda: bool(file.read_text()))
        file.rename(moved)
        await gateway.reload(settings)
        await harness.post(gateway, headers={"x-request-id": "two"})
        other = msgspec.structs.replace(settings, access_log="text", access_log_to=str(tmp_path / "text"))
        await gateway.reload(other)
        await harness.post(gateway, headers={"x-request-id": "three"})
    assert [json.loads(line)["request_id"] for line in moved.read_text().splitlines()] == ["one"]
    assert [json.loads(line)["request_id"] for line in file.read_text().splitlines()] == ["two"]
    assert " id=three" in (tmp_path / "text").read_text()


async def test_the_metrics_are_of_the_targets_that_there_are(harness: GatewayHarness) -> None:
    settings = harness.settings()
    async with Gateway(settings) as gateway:
        await harness.post(gateway)
        await gateway.reload(msgspec.structs.replace(settings, targets=settings.targets[1:]))
        async with harness.session.get(harness.at(gateway, "/metrics")) as response:
            text = await response.text()
    assert 'forebay_accounts{target="anthropic"}' in text
    assert 'forebay_accounts{target="openai"}' not in text
    assert 'forebay_gateway_requests_total{status="200",target="openai"} 1.0' in text
