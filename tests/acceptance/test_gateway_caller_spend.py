"""The spend of issued keys and tenants: it has their names, and their budgets go on with it after a restart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.gateway_harness import CHAT_REQUEST, GatewayHarness
from tests.support.issued_keys import IssuedKeys, in_thread
from typer.testing import CliRunner

from forebay.cli.app import app
from forebay.gateway.server import Gateway
from forebay.quota import Price
from forebay.spend_log import SpendQuery, read_spend

PRICES = {"*": Price(input=1_000, output=1_000)}  # of a call with 30 tokens sent and 20 received:
COST = 0.05
CALL: Any = {"json": {**CHAT_REQUEST, "max_tokens": 20}}

Open = Callable[..., Gateway]


@pytest.fixture
def keys(tmp_path: Path) -> IssuedKeys:
    return IssuedKeys(tmp_path / "keys.db")


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


def by(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


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
        assert await spend(harness, gateway, 1, by(text)) + await spend(harness, gateway, 1, own) == [200, 200]
        statistics = gateway.forwarder.targets[0].upstream.statistics()
        digest = next(row.key for row in statistics.usage if row.key != "writer")
        assert re.fullmatch("[0-9a-f]{8}", digest)
        page = gateway.forwarder.metrics.render().decode()
    assert [(row.tenant, row.key, row.usage.calls) for row in statistics.usage] == [
        ("acme", "writer", 1), ("default", digest, 1)
    ]  # fmt: skip
    assert re.findall(r'forebay_spend_usd_total{key="(\w*)"', page) == ["writer", digest]
    assert set(re.findall(r'forebay_tokens_total{.*key="(\w*)"', page)) == {"writer", digest}
    entries = [json.loads(line) for line in (await in_thread(log.read_text)).splitlines()]
    assert [entry["key"] for entry in entries] == ["writer", None]
    assert digest in entries[1]["account"]
    groups = await in_thread(read_spend, path, SpendQuery(by=("tenant", "key")))
    assert sorted(group.values for group in groups) == [("acme", "writer"), ("default", digest)]
    shown = await in_thread(lambda: CliRunner().invoke(app, ["spend", str(path), "--by", "key", "--json"]))
    assert {row["key"]: row["usd"] for row in json.loads(shown.output)["rows"]} == {
        "writer": pytest.approx(COST), digest: pytest.approx(COST)
    }  # fmt: skip
