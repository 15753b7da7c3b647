"""The price list is loaded before the first call, in a thread, and not at all where it is not needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
from tests.support.task_plane import virtual
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, Reply, Script

from forebay.quota import Budget, Price, prices
from forebay.upstream import Fallback, HttpRequest, HttpResponse, Upstream, price_loading

_BROKEN = 30.0  # seconds after which a test that waits in vain fails

Call = Callable[[Upstream], Awaitable[object]]


async def bound(upstream: Upstream) -> None:
    await Script(httpx2).client(upstream).post(URL, json=REQUEST)


async def sent(upstream: Upstream) -> None:
    async def transport(_: HttpRequest) -> HttpResponse:
        return HttpResponse(200, body=Reply().body[0])  # type: ignore[arg-type]

    body = httpx2.Request("POST", URL, json=REQUEST).content
    await upstream.send(HttpRequest("POST", URL, {"content-type": "application/json"}, body), transport)


async def by_hand(upstream: Upstream) -> None:
    async with upstream.call("gpt-4o", input_tokens=30, output_tokens=20):
        pass


CALLS = pytest.mark.parametrize("call", [bound, sent, by_hand], ids=lambda call: call.__name__)


@pytest.fixture(autouse=True)
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the list be loaded again."""
    monkeypatch.setattr(prices, "_loaded", False)


@CALLS
@pytest.mark.parametrize("budget", [None, Budget(usd=10)], ids=["without a budget", "with a budget"])
async def test_the_event_loop_goes_on_while_the_list_is_loaded_and_the_first_call_has_its_price(
    call: Call, budget: Budget | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = threading.Event()

    def load() -> None:
        assert turned.wait(_BROKEN), "the event loop stands still"
        prices.load_price_list()

    monkeypatch.setattr(price_loading, "load_price_list", load)
    upstream = Upstream("openai", provider="openai", budget=budget)
    asyncio.get_running_loop().call_soon(turned.set)
    await call(upstream)
    assert prices.is_price_list_loaded()
    used = upstream.statistics().used
    assert (used.calls, used.unpriced) == (1, 0)
    assert used.usd > 0


async def test_calls_that_begin_together_load_the_list_once_and_all_have_their_price(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[int] = []

    def load() -> None:
        loads.append(threading.get_ident())
        prices.load_price_list()

    monkeypatch.setattr(price_loading, "load_price_list", load)
    upstream = Upstream("openai", provider="openai")
    await asyncio.gather(*(by_hand(upstream) for _ in range(20)))
    assert threading.get_ident() not in loads
    assert upstream.statistics().used.unpriced == 0
    assert upstream.statistics().used.calls == 20
    await by_hand(upstream)
    assert len(set(loads)) == 1


async def test_a_call_that_is_cancelled_while_the_list_is_loaded_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def load() -> None:
        loop.call_soon_threadsafe(begun.set)
        goes_on.wait(_BROKEN)

    monkeypatch.setattr(price_loading, "load_price_list", load)
    upstream = Upstream("openai", provider="openai", max_concurrent=1)
    call = asyncio.create_task(by_hand(upstream))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    goes_on.set()
    monkeypatch.undo()
    async with asyncio.timeout(_BROKEN):
        await by_hand(upstream)


@CALLS
@virtual
async def test_own_prices_of_all_models_need_no_list(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price_loading, "load_price_list", pytest.fail)
    await call(Upstream("openai", provider="openai", prices={"*": Price(input=1, output=1)}))


@virtual
async def test_a_guarded_function_needs_the_list_only_if_it_may_call_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    monkeypatch.setattr(price_loading, "load_price_list", lambda: loads.append(None))
    spare = Upstream("spare")

    async def plain() -> None: ...

    async def elsewhere(*, upstream: Upstream) -> None: ...

    await Upstream("openai", provider="openai").guard(plain)()
    assert loads == []
    await Upstream("openai", provider="openai", fallback=[Fallback(spare, model="gpt-4o")]).guard(elsewhere)()  # type: ignore[call-arg]
    assert loads == [None]
