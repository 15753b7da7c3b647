"""The spend of issued keys and tenants: it has their names, and their budgets go on with it after a restart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.gateway_harness import CHAT_REQUEST, GatewayHarness
from tests.support.issued_keys import IssuedKeys, bearer, in_thread
from typer.testing import CliRunner

from forebay.cli.app import app
from forebay.gateway import FallbackSettings, GatewaySettings, KeySettings, TargetSettings, TenantSettings
from forebay.gateway.server import Gateway
from forebay.quota import Price
from forebay.spend_log import SpendQuery, read_spend

PRICES = {"*": Price(input=1_000, output=1_000)}  # of a call with 30 tokens sent and 20 received:
COST = 0.05
CALL: Any = {"json": {**CHAT_REQUEST, "max_tokens": 20}}

Open = Callable[..., Gateway]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of the spend log."""
    return tmp_path / "spend.db"


@pytest.fixture
def opened(harness: GatewayHarness, path: Path) -> Open:
    """Return a function that returns a gateway whose calls have a price, with a spend log unless `keeps` is False."""

    def opened(*, keeps: bool = True, **gateway: Any) -> Gateway:
        kept = {"spend_log": f"sqlite:///{path}"} if keeps else {}
        return Gateway(harness.settings(gateway={**kept, **gateway}, prices=PRICES))

    return opened


async def spend(harness: GatewayHarness, gateway: Gateway, calls: int, headers: dict[str, str]) -> list[int]:
    """Make calls to both targets in turn, and return their statuses."""
    paths = ("/openai/v1/chat/completions", "/anthropic/v1/chat/completions")
    return [(await harness.post(gateway, paths[n % 2], **CALL, headers=headers))[0] for n in range(calls)]


# --- who has spent it ---


async def test_a_call_is_attributed_to_the_name_of_its_key_everywhere(
    harness: GatewayHarness, keys: IssuedKeys, path: Path, opened: Open, tmp_path: Path
) -> None:
    text, log = await keys.create("writer", tenant="acme"), tmp_path / "access.log"
    settings = {"keys": keys.url, "require_key": False, "access_log": "json", "access_log_to": str(log)}
    async with opened(**settings) as gateway:
        own = {"authorization": "Bearer sk-of-its-caller"}
        assert await spend(harness, gateway, 1, bearer(text)) + await spend(harness, gateway, 1, own) == [200, 200]
        statistics = gateway.forwarder.targets[0].upstream.statistics()
        digest = next(row.api_key for row in statistics.usage if not row.key)
        assert re.fullmatch("[0-9a-f]{8}", digest)
        page = gateway.forwarder.metrics.render().decode()
    assert [(row.tenant, row.key, row.api_key, row.usage.calls) for row in statistics.usage] == [
        ("acme", "writer", "", 1), ("default", "", digest, 1)
    ]  # fmt: skip
    labels = r'{api_key="(\w*)",.*\bkey="(\w*)"'
    assert re.findall(f"forebay_spend_usd_total{labels}", page) == [("", "writer"), (digest, "")]
    assert set(re.findall(f"forebay_tokens_total{labels}", page)) == {("", "writer"), (digest, "")}
    entries = [json.loads(line) for line in (await in_thread(log.read_text)).splitlines()]
    assert [entry["key"] for entry in entries] == ["writer", None]
    assert digest in entries[1]["account"]
    groups = await in_thread(read_spend, path, SpendQuery(by=("tenant", "key", "api_key")))
    assert sorted(group.values for group in groups) == [("acme", "writer", ""), ("default", "", digest)]
    shown = await in_thread(lambda: CliRunner().invoke(app, ["spend", str(path), "--by", "key,api_key", "--json"]))
    assert {(row["key"], row["api_key"]): row["usd"] for row in json.loads(shown.output)["rows"]} == {
        ("writer", ""): pytest.approx(COST), ("", digest): pytest.approx(COST)
    }  # fmt: skip


async def test_an_issued_key_and_a_key_of_the_provider_of_one_name_are_told_apart(
    harness: GatewayHarness, keys: IssuedKeys, path: Path
) -> None:
    text = await keys.create("shared-name", budget_usd=1.5 * COST)
    held = KeySettings(api_key_env="HELD", name="shared-name")
    target = TargetSettings(name="openai", url=harness.url, keys=(held,), prices=PRICES)
    settings = GatewaySettings(
        targets=(target,), listen="127.0.0.1:0", keys=keys.url, require_key=False, spend_log=f"sqlite:///{path}"
    )
    async with Gateway(settings, {"HELD": "sk-held"}) as gateway:
        assert [(await harness.post(gateway, **CALL))[0] for _ in range(3)] == [200, 200, 200]
        (row,) = gateway.forwarder.targets[0].upstream.statistics().usage
        assert (row.key, row.api_key, row.usage.calls) == ("", "shared-name", 3)
    async with Gateway(settings, {"HELD": "sk-held"}) as gateway:  # the budget of the key is its own
        assert (await harness.post(gateway, **CALL, headers=bearer(text)))[0] == 200
    groups = await in_thread(read_spend, path, SpendQuery(by=("key", "api_key")))
    assert {group.values: group.amounts.calls for group in groups} == {
        ("", "shared-name"): 3,
        ("shared-name", "shared-name"): 1,
    }


async def test_a_call_that_a_fallback_serves_is_attributed_to_its_key_and_spends_its_budget_over_a_restart(
    harness: GatewayHarness, keys: IssuedKeys, path: Path
) -> None:
    text, held = await keys.create("writer", budget_usd=3 * COST), {"HELD": "sk-held"}
    elsewhere = FallbackSettings(target="second", model="llama")
    common: dict[str, Any] = {"url": harness.url, "api_key_env": "HELD", "prices": PRICES}
    first = TargetSettings(name="first", rpm=1, fallback=(elsewhere,), **common)
    targets = (first, TargetSettings(name="second", **common))
    settings = GatewaySettings(targets=targets, listen="127.0.0.1:0", keys=keys.url, spend_log=f"sqlite:///{path}")
    headers = {**bearer(text), "x-stainless-read-timeout": "2"}
    async with Gateway(settings, held) as gateway:
        assert [(await harness.post(gateway, **CALL, headers=headers))[0] for _ in range(2)] == [200, 200]
    groups = await in_thread(read_spend, path, SpendQuery(by=("upstream", "model", "key")))
    assert sorted(group.values for group in groups) == [("first", "gpt-4o", "writer"), ("second", "llama", "writer")]
    async with Gateway(settings, held) as gateway:
        assert [(await harness.post(gateway, **CALL, headers=headers))[0] for _ in range(2)] == [200, 402]


# --- a restart ---


async def test_a_restart_does_not_refill_the_budget_of_a_key(
    harness: GatewayHarness, keys: IssuedKeys, opened: Open
) -> None:
    text, other = await keys.create("writer", budget_usd=5 * COST), await keys.create("reader", budget_usd=COST)
    async with opened(keys=keys.url) as gateway:
        assert await spend(harness, gateway, 3, bearer(text)) == [200] * 3  # at both targets
    async with opened(keys=keys.url) as gateway:
        assert await spend(harness, gateway, 3, bearer(text)) == [200, 200, 402]
        assert await spend(harness, gateway, 2, bearer(other)) == [200, 402]


async def test_a_restart_does_not_refill_the_budget_of_a_tenant(harness: GatewayHarness, opened: Open) -> None:
    tenants = (TenantSettings(name="acme", budget_usd=5 * COST), TenantSettings(name="*", budget_usd=2 * COST))
    acme, other = {"x-forebay-tenant": "acme"}, {"x-forebay-tenant": "umbrella"}
    async with opened(tenants=tenants) as gateway:
        assert await spend(harness, gateway, 3, acme) + await spend(harness, gateway, 1, other) == [200] * 4
    async with opened(tenants=tenants) as gateway:
        assert await spend(harness, gateway, 3, acme) == [200, 200, 402]
        assert await spend(harness, gateway, 2, other) == [200, 402]


async def test_a_key_that_is_rotated_keeps_its_spend_over_a_restart(
    harness: GatewayHarness, keys: IssuedKeys, opened: Open
) -> None:
    text = await keys.create("writer", budget_usd=3 * COST)
    async with opened(keys=keys.url) as gateway:
        await spend(harness, gateway, 1, bearer(text))
        text = await keys.rotate("writer", grace=0.0)
        assert gateway.forwarder.keys is not None
        await gateway.forwarder.keys.refresh()
        await spend(harness, gateway, 1, bearer(text))
    async with opened(keys=keys.url) as gateway:
        assert await spend(harness, gateway, 2, bearer(text)) == [200, 402]


async def test_a_key_of_another_file_with_the_same_name_goes_on_with_its_spend(
    harness: GatewayHarness, keys: IssuedKeys, opened: Open, tmp_path: Path
) -> None:
    again = IssuedKeys(tmp_path / "again.db")
    first = await keys.create("writer", budget_usd=2 * COST)
    second = await again.create("writer", budget_usd=2 * COST)
    async with opened(keys=keys.url) as gateway:
        await spend(harness, gateway, 1, bearer(first))
        await gateway.reload(msgspec.structs.replace(gateway.settings, keys=again.url))
        assert await spend(harness, gateway, 2, bearer(second)) == [200, 402]


async def test_a_budget_that_a_key_gets_later_begins_with_what_it_has_spent(
    harness: GatewayHarness, keys: IssuedKeys, opened: Open
) -> None:
    text = await keys.create("writer")
    async with opened(keys=keys.url) as gateway:
        await spend(harness, gateway, 2, bearer(text))
        await keys.update("writer", budget_usd=3 * COST)
        assert gateway.forwarder.keys is not None
        await gateway.forwarder.keys.refresh()
        assert await spend(harness, gateway, 2, bearer(text)) == [200, 402]


async def test_without_a_spend_log_the_budget_of_a_key_begins_again(
    harness: GatewayHarness, keys: IssuedKeys, opened: Open
) -> None:
    text = await keys.create("writer", budget_usd=COST)
    for _ in range(2):
        async with opened(keeps=False, keys=keys.url) as gateway:
            assert await spend(harness, gateway, 2, bearer(text)) == [200, 402]
