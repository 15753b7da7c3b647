"""The spend of a gateway: it survives the process, and its alerts are in the metrics."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from tests.support.gateway_harness import CHAT_REQUEST, GatewayHarness, until

from forebay.errors import StoreUnavailable
from forebay.gateway import GatewaySettings
from forebay.gateway.server import Gateway
from forebay.quota import Price
from forebay.spend_log import SpendQuery, read_spend

PRICES = {"gpt-4o": Price(input=1_000, output=1_000)}  # of a call with 30 tokens sent and 20 received:
COST = 0.05
CALLS = 200  # that the budget of the surges lasts for
AT_ONCE = 20  # calls
KILLS = 2
WRITTEN = 60  # calls of a process that is killed that are written before
SPENT = 'forebay_budget_spent_usd{target="openai"}'
CONFIG = f"""
[targets.openai]
url = "{{url}}"
budget_usd = {CALLS * COST}
max_concurrent = {AT_ONCE}
    [targets.openai.prices."gpt-4o"]
    input = 1_000
    output = 1_000
"""

Settings = Callable[..., GatewaySettings]
Start = Callable[[], Awaitable[tuple[asyncio.subprocess.Process, str]]]


@pytest.fixture
def settings(harness: GatewayHarness, tmp_path: Path) -> Settings:
    """Return a function that returns settings of a gateway with a spend log and a budget for so many calls."""

    def settings(calls: float, **target: object) -> GatewaySettings:
        spend_log = f"sqlite:///{tmp_path / 'spend.db'}"
        budget = {"budget_usd": calls * COST, "prices": PRICES, **target}
        return harness.settings(gateway={"spend_log": spend_log}, **budget)

    return settings


def spent(path: Path) -> tuple[int, float]:
    """Return the calls and the dollars that a spend log has."""
    found = read_spend(path, SpendQuery(by=()))
    return (found[0].amounts.calls, found[0].amounts.usd) if found else (0, 0.0)


async def metric(harness: GatewayHarness, url: str, name: str) -> float:
    async with harness.session.get(f"{url}/metrics") as response:
        text = await response.text()
    return float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0])


@pytest.mark.blocks  # the settings of two processes: each opens the file
async def test_the_next_gateway_goes_on_with_what_is_spent(harness: GatewayHarness, settings: Settings) -> None:
    for _ in range(2):
        async with Gateway(settings(10)) as gateway:
            while (await harness.post(gateway))[0] == 200:
                pass
            url = f"http://127.0.0.1:{gateway.port}"
            assert await metric(harness, url, SPENT) == pytest.approx(len(harness.provider.bodies) * COST)
    assert 8 <= len(harness.provider.bodies) <= 10


@pytest.mark.blocks
async def test_a_gateway_on_a_new_shared_store_goes_on_with_what_is_spent(
    harness: GatewayHarness, tmp_path: Path
) -> None:
    for store in ("first", "second"):
        gateway_settings = {"spend_log": f"sqlite:///{tmp_path}/spend.db", "shared": f"sqlite:///{tmp_path}/{store}.db"}
        settings = harness.settings(gateway=gateway_settings, budget_usd=10 * COST, prices=PRICES)
        async with Gateway(settings) as gateway:
            for _ in range(6):
                await harness.post(gateway)
            url = f"http://127.0.0.1:{gateway.port}"
            assert await metric(harness, url, SPENT) == pytest.approx(len(harness.provider.bodies) * COST)
    assert 8 <= len(harness.provider.bodies) <= 10


async def test_an_alert_is_logged_and_counted(
    harness: GatewayHarness, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with Gateway(settings(4, budget_alert=0.4)) as gateway:
        for _ in range(3):
            await harness.post(gateway)
        name = 'forebay_budget_alerts_total{budget="budget",share="0.4",target="openai"}'
        assert await metric(harness, f"http://127.0.0.1:{gateway.port}", name) == 1.0
    assert "the budget of openai: 40% of 0.2 USD a day is spent: 0.1 USD" in caplog.text


async def test_a_spend_log_that_cannot_be_opened_stops_the_start(harness: GatewayHarness, tmp_path: Path) -> None:
    settings = harness.settings(gateway={"spend_log": f"sqlite:///{tmp_path}/none/spend.db"})
    with pytest.raises(StoreUnavailable, match=f"Create it: mkdir -p {tmp_path}/none"):
        async with Gateway(settings):
            pass


# --- kill -9 ---


class Surge:
    """Callers who call a gateway all the time, and what they and the file have seen."""

    def __init__(self, harness: GatewayHarness, url: str, callers: int = AT_ONCE) -> None:
        self.answered = 0
        self.rejected = 0
        self._harness = harness
        self._url = url
        self._callers = [asyncio.create_task(self._call()) for _ in range(callers)]

    async def _call(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # the gateway was killed
            while not self.rejected:
                async with self._harness.session.post(
                    f"{self._url}/v1/chat/completions", json=CHAT_REQUEST
                ) as response:
                    await response.read()
                    self.answered += response.status == 200
                    self.rejected += response.status == 402

    async def end(self) -> None:
        await asyncio.gather(*self._callers)


@pytest.fixture
async def start(harness: GatewayHarness, tmp_path: Path) -> AsyncIterator[Start]:
    started: list[asyncio.subprocess.Process] = []
    config = tmp_path / "forebay.toml"
    config.write_text(CONFIG.format(url=harness.url))

    async def start() -> tuple[asyncio.subprocess.Process, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forebay.cli", "gateway", "--config", str(config), "--listen", "127.0.0.1:0"),
            *("--spend-log", f"sqlite:///{tmp_path / 'spend.db'}"),
            stdout=asyncio.subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode().split()
        assert line[:2] == ["listening", "on"]
        return process, line[2]

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.slow
@pytest.mark.blocks  # the test reads the file
async def test_a_gateway_that_is_killed_in_a_surge_comes_back_with_its_spend(
    harness: GatewayHarness, start: Start, tmp_path: Path
) -> None:
    """Each process is killed with calls under way, and with calls that have ended and may not be written yet.

    What the file lacks of what the provider has counted are such calls only: none that it had is lost, none is counted
    twice, and the next process begins with its sum, to the cent.
    """
    path, provider = tmp_path / "spend.db", harness.provider
    allowed = asyncio.Semaphore(0)  # answers

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        await allowed.acquire()
        return await provider.reply(request)

    provider.behaviour = answer
    before = lacking = 0
    for _ in range(KILLS):
        process, url = await start()
        surge = Surge(harness, url)
        release(allowed, WRITTEN)
        await until(lambda least=before + WRITTEN: spent(path)[0] >= least)  # type: ignore[misc] # it is written meanwhile
        release(allowed, AT_ONCE)
        await until(lambda ended=WRITTEN + 1, surge=surge: surge.answered >= ended)  # type: ignore[misc]
        process.kill()
        await process.wait()
        await surge.end()
        allowed = asyncio.Semaphore(0)
        calls, usd = spent(path)
        assert before + WRITTEN <= calls <= before + WRITTEN + AT_ONCE
        assert usd == pytest.approx(calls * COST, abs=0.0001)
        before, lacking = calls, len(provider.bodies) - calls
        assert 0 <= lacking <= KILLS * AT_ONCE
    process, url = await start()
    assert await metric(harness, url, SPENT) == pytest.approx(usd, abs=0.0001)
    release(allowed, 2 * CALLS)
    for callers in (AT_ONCE, 1):  # of many, the first is rejected while others hold dollars that they return
        await Surge(harness, url, callers).end()
    process.terminate()
    assert await process.wait() == 0
    assert spent(path)[0] == len(provider.bodies) - lacking, "an orderly end writes everything"
    assert CALLS - 2 <= spent(path)[0] <= CALLS, "the budget is used once, by all processes together"


def release(allowed: asyncio.Semaphore, count: int) -> None:
    for _ in range(count):
        allowed.release()
