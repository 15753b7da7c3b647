"""Limits of tenants and issued keys of gateways that share a store: one for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.support.gateway_harness import CHAT_REQUEST, NOTHING_LEFT, GatewayHarness, leftovers, until
from tests.support.issued_keys import IssuedKeys
from tests.support.metric_samples import total

from forebay.gateway import TenantSettings
from forebay.gateway.server import Gateway
from forebay.quota import Price
from forebay.upstream.accounts import spend as accounts_spend
from forebay.upstream.shared.leases.leased_budget import LeasedBudget

PRICES = {"*": Price(input=0, output=25_000)}  # the answer's 20 tokens cost half a dollar, as is expected
REQUEST = {**CHAT_REQUEST, "max_tokens": 20}
IMPATIENT = {"x-stainless-read-timeout": "2"}


@pytest.fixture
def keys(tmp_path: Path) -> IssuedKeys:
    return IssuedKeys(tmp_path / "keys.db")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/account.db"


@asynccontextmanager
async def two_gateways(harness: GatewayHarness, store: str, **gateway: Any) -> AsyncIterator[list[Gateway]]:
    """Yield two gateways that share a store, as two processes do."""
    settings = harness.settings(gateway={"shared": store, **gateway}, prices=PRICES, share_keys=True)
    async with Gateway(settings) as one, Gateway(settings) as other:
        yield [one, other]
        await until(lambda: [leftovers(each) for each in (one, other)] == [NOTHING_LEFT] * 2)


def by(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}", **IMPATIENT}


async def statuses(harness: GatewayHarness, gateways: list[Gateway], calls: int, **how: Any) -> list[int]:
    """Make calls at one gateway after the other; return their statuses."""
    return [(await harness.post(gateways[number % len(gateways)], json=REQUEST, **how))[0] for number in range(calls)]


async def test_a_key_has_one_rate_at_all_gateways(harness: GatewayHarness, keys: IssuedKeys, store: str) -> None:
    text = await keys.create("writer", rpm=1)
    async with two_gateways(harness, store, keys=keys.url) as gateways:
        assert sorted(await statuses(harness, gateways, 2, headers=by(text))) == [200, 429]


async def test_a_key_has_as_many_calls_in_progress_as_it_may_at_all_gateways(
    harness: GatewayHarness, keys: IssuedKeys, store: str
) -> None:
    text = await keys.create("writer", max_concurrent=1)
    held = asyncio.Event()

    async def hold(request: web.BaseRequest) -> web.StreamResponse:
        await held.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = hold
    async with two_gateways(harness, store, keys=keys.url) as (one, other):
        first = asyncio.create_task(harness.post(one, headers=by(text)))
        await until(lambda: len(harness.provider.requests) == 1)
        status, _, answer = await harness.post(other, headers=by(text))
        assert (status, len(harness.provider.requests)) == (429, 1)
        assert "key 'writer'" in answer["error"]["message"]
        held.set()
        assert (await first)[0] == 200


async def test_a_key_spends_one_budget_at_all_gateways(harness: GatewayHarness, keys: IssuedKeys, store: str) -> None:
    text = await keys.create("writer", budget_usd=2.0)
    async with two_gateways(harness, store, keys=keys.url) as gateways:
        assert await statuses(harness, gateways, 8, headers=by(text)) == [200] * 4 + [402] * 4


async def test_a_gateway_that_learns_from_the_store_that_a_key_has_spent_its_budget_names_the_key(
    harness: GatewayHarness, keys: IssuedKeys, store: str
) -> None:
    text = await keys.create("writer", budget_usd=0.6)
    async with two_gateways(harness, store, keys=keys.url) as (one, other):
        assert (await harness.post(one, json=REQUEST, headers=by(text)))[0] == 200
        patient = {**by(text), "x-stainless-read-timeout": "60"}
        status, headers, answer = await harness.post(other, json=REQUEST, headers=patient)
        assert (status, headers["x-forebay-limited-by"]) == (402, "key:writer:budget")
        assert answer["error"]["message"].startswith("Rejected: the budget of key 'writer' would be overspent")
        assert total(other, "forebay_gateway_rejections_total", limited_by="key budget") == 1


async def test_a_tenant_spends_one_budget_at_all_gateways(harness: GatewayHarness, store: str) -> None:
    tenants = (TenantSettings(name="*", budget_usd=2.0),)
    async with two_gateways(harness, store, tenants=tenants) as gateways:
        for tenant in ("acme", "other"):
            found = await statuses(harness, gateways, 6, headers={"x-forebay-tenant": tenant, **IMPATIENT})
            assert found == [200] * 4 + [402] * 2


async def test_what_a_key_has_spent_is_known_after_all_gateways_were_restarted(
    harness: GatewayHarness, keys: IssuedKeys, store: str
) -> None:
    text = await keys.create("writer", budget_usd=2.0)
    served = []
    for _ in range(2):
        async with two_gateways(harness, store, keys=keys.url) as gateways:
            served += await statuses(harness, gateways, 3, headers=by(text))
    assert served == [200] * 4 + [402] * 2


async def test_what_a_target_had_spent_before_a_store_was_shared_stays_spent(
    harness: GatewayHarness, store: str, tmp_path: Path
) -> None:
    log = {"spend_log": f"sqlite:///{tmp_path}/spend.db"}
    how: dict[str, Any] = {"prices": PRICES, "share_keys": True, "budget_usd": 2.0}
    async with Gateway(harness.settings(gateway=log, **how)) as alone:
        assert await statuses(harness, [alone], 3, headers=IMPATIENT) == [200] * 3
    async with Gateway(harness.settings(gateway={**log, "shared": store}, **how)) as sharing:
        assert await statuses(harness, [sharing], 3, headers=IMPATIENT) == [200, 402, 402]


async def test_a_gateway_that_was_restarted_shows_what_was_spent_before_its_first_call(
    harness: GatewayHarness, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_spend, "_FIRST_ANSWER", 60.0)
    how: dict[str, Any] = {"prices": PRICES, "share_keys": True, "budget_usd": 2.0, "gateway": {"shared": store}}
    async with Gateway(harness.settings(**how)) as gateway:
        assert await statuses(harness, [gateway], 3, headers=IMPATIENT) == [200] * 3
        budget = gateway.forwarder.targets[0].upstream.core.budgets.upstream_budget
        assert isinstance(budget, LeasedBudget)
        await until(lambda: not budget._spent and not budget.is_asking)  # the ledger has all
    async with Gateway(harness.settings(**how)) as restarted:
        assert total(restarted, "forebay_budget_spent_usd", target="openai") == pytest.approx(1.5)


async def test_what_a_key_had_spent_before_a_store_was_shared_stays_spent(
    harness: GatewayHarness, keys: IssuedKeys, store: str, tmp_path: Path
) -> None:
    text = await keys.create("writer", budget_usd=2.0)
    log = {"keys": keys.url, "spend_log": f"sqlite:///{tmp_path}/spend.db"}
    async with Gateway(harness.settings(gateway=log, prices=PRICES, share_keys=True)) as alone:
        assert await statuses(harness, [alone], 3, headers=by(text)) == [200] * 3
    async with two_gateways(harness, store, **log) as gateways:
        assert await statuses(harness, gateways, 3, headers=by(text)) == [200, 402, 402]
